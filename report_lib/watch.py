"""A report that is renewed while its runs go on, until they are finished or it is stopped."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common_lib.cli import UserError
from common_lib.signals import StopSignal
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
    missing and the files have rested for a look, or by Ctrl-C or SIGTERM. A run that cannot be read, or a report that
    cannot be written, at first is a UserError; a run that has no finished search yet is waited for; an error later on is
    said, the page stays as it was, and it is tried again. However it ends, open pages are told.
    """
    renewal = _Renewal(folder, read, write)
    seen: Files | None = None
    with StopSignal(_interrupt):
        try:
            while True:
                files = states(paths)
                if files != seen:
                    seen = files if renewal.do() else None
                elif renewal.complete:
                    end_live(folder, "finished")
                    logger.info("finished: no search is missing; %s is renewed no more", folder / "report.html")
                    return renewal.text
                time.sleep(renewal.rest)
        except KeyboardInterrupt:
            if not renewal.text:
                raise
            say(folder, renewal.runs, "stopped; the same command goes on")
            return renewal.text
        finally:
            end_live(folder, "stopped")


def _interrupt() -> None:
    raise KeyboardInterrupt


class _Renewal:
    """Writes the report anew. `text` is the last one, `rest` the seconds to wait then; complete: was no search missing?"""

    def __init__(self, folder: Path, read: Callable[[], list[RunRecord]], write: Callable[..., str]):
        self._folder, self._read, self._write = folder, read, write
        self.runs: list[RunRecord] = []
        self.text, self.rest, self.complete, self._told = "", LOOK_SECONDS, False, ""

    def do(self) -> bool:
        """Returns whether it need not be tried again before a file changes. Raises UserError the first time only."""
        begin, self.complete, done = time.monotonic(), False, True
        try:
            runs = self._read()
            self.text = self._write(runs=runs, live=time.time_ns() // 1_000_000)
            self.runs, self.complete, self._told = runs, not any(run.partial for run in runs), ""
            say(self._folder, runs, f"{time.monotonic() - begin:.1f} s")
        except NothingYet as error:
            logger.info("%s; waiting", error)
        except UserError as error:
            if not self.text:
                raise
            if str(error) != self._told:
                logger.warning("%s; the page stays as it was, and it is tried again", error)
            self._told, done = str(error), False
        self.rest = LOOK_SECONDS if self.complete else max(LOOK_SECONDS, REST * (time.monotonic() - begin))
        return done


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
