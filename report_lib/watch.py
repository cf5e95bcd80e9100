"""A report that is renewed while its runs go on, until they are finished or it is stopped."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common_lib.cli import UserError
from report_lib.analysis import Analysis
from report_lib.data import NothingYet, RunRecord
from report_lib.page import end_live
from search_lib.run_reader import RunPaths
from search_lib.run_shards import find_shards

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between looks at the files
REST = 2.0  # a renewal is followed by a rest of that many times what it took, so it never holds a core for long
Draw = Callable[[Path, Sequence[Analysis]], list[dict[str, Any]]]
Files = list[tuple[int, int, int] | None]  # of each: inode, size, time of change


def watch(paths: Sequence[Path], folder: Path, read: Callable[[], list[RunRecord]], write: Callable[..., str]) -> str:
    """Write the report anew whenever a file of a run has changed; returns its last text.

    read: the runs as they are. write(runs, live): the report with this version, in `folder`, whole at any moment. Ends when no search is
    missing and the files have rested for a look, or by Ctrl-C. A run that cannot be read at first is a UserError, one
    that has no finished search yet is waited for; an error later on is said, and the page stays as it was.
    """
    seen: Files | None = None
    runs: list[RunRecord] = []
    text, rest, complete = "", LOOK_SECONDS, False
    try:
        while True:
            files = states(paths)
            if files != seen:
                seen, begin = files, time.monotonic()
                try:
                    runs = read()
                    text = write(runs=runs, live=time.time_ns() // 1_000_000)
                    say(folder, runs, f"{time.monotonic() - begin:.1f} s")
                except NothingYet as error:
                    logger.info("%s; waiting", error)
                except UserError as error:
                    if not text:
                        raise
                    logger.warning("%s; the page stays as it was", error)
                complete = bool(runs) and not any(run.partial for run in runs)
                rest = LOOK_SECONDS if complete else max(LOOK_SECONDS, REST * (time.monotonic() - begin))
            elif complete:
                end_live(folder, "finished")
                logger.info("finished: no search is missing; %s is renewed no more", folder / "report.html")
                return text
            time.sleep(rest)
    except KeyboardInterrupt:
        if not text:
            raise
        end_live(folder, "stopped")
        say(folder, runs, "stopped; the same command goes on")
        return text


def say(folder: Path, runs: Sequence[RunRecord], more: str) -> None:
    """A line on what the page shows."""
    done = ", ".join(f"{run.name} {len(run.lines)} of {run.planned} searches" for run in runs)
    logger.info("%s %s: %s (%s)", time.strftime("%H:%M:%S"), folder / "report.html", done, more)


def states(paths: Sequence[Path]) -> Files:
    """What changes when a run's files do."""
    found: Files = []
    for path in paths:
        parts = [*find_shards(path).values()] or [RunPaths.of(path)]
        for file in (file for part in parts for file in (part.results, part.tree, part.meta)):
            try:
                stat = file.stat()
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
            except FileNotFoundError:
                found.append(None)
    return found


def draw_aside(draw: Draw) -> Draw:
    """`draw`, whose files take the place of earlier ones whole."""

    def drawn(folder: Path, analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
        with TemporaryDirectory(prefix=".plots-", dir=folder) as aside:
            plots = draw(Path(aside), analyses)
            for file in Path(aside).iterdir():
                os.replace(file, folder / file.name)
        return plots

    return drawn
