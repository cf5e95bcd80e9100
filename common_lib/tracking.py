"""One tracker object for both scripts: neptune-scale, trackio, or none. The local output files are the record of truth.

A tracker may be down, slow or absent; nothing here stops a run. Its first failure is a warning, later ones are silent.
"""

import atexit
import glob
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common_lib.cli import UserError

logger = logging.getLogger(__name__)

Scalar = str | int | float | bool


class Tracker:
    """Takes what a run logs and never raises. This one keeps nothing; those below send it somewhere.

    `id` names the run when it is resumed; `where` says where the data are and how to see them.
    """

    close_seconds = 30.0  # for sending what is left; what was not sent stays on disk
    _warned = _closed = False

    def __init__(self, run_id: str = "", where: str = "not tracked") -> None:
        self.id, self.where = run_id, where
        # Runs before neptune-scale's own exit handler, which has no timeout and waits for ever for a host that is gone.
        atexit.register(self.close)

    def log_configs(self, configs: Mapping[str, object]) -> None:
        """Any nested mapping, before the first metrics: keys are joined by '/', lists and other objects become text."""
        self._guarded(self.send_configs, _flat(configs))

    def log_metrics(self, metrics: Mapping[str, object], step: int) -> None:
        """Numbers by name at a step. What is None or not finite is left out, with a warning the first time."""
        numbers = {name: number for name, value in metrics.items() if (number := _finite(value)) is not None}
        if left_out := [name for name in metrics if name not in numbers]:
            self._warn(f"not finite numbers at step {step}: {', '.join(left_out)}")
        if numbers:
            self._guarded(self.send_metrics, numbers, step)

    def close(self) -> None:
        """Send what is left, for at most `close_seconds`. Can be called twice."""
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            self._guarded(self.send_rest, self.close_seconds)

    def send_configs(self, configs: dict[str, Scalar]) -> None:
        """May raise anything, as the next two."""

    def send_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Finite numbers."""

    def send_rest(self, seconds: float) -> None:
        """For at most that long."""

    def _guarded(self, send: Callable[..., None], *args: Any) -> None:
        try:
            send(*args)
        except Exception as error:
            self._warn(_in_words(error))

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("tracker: %s (the run goes on; later troubles of the tracker are not shown)", problem)


def make_tracker(
    kind: str,
    project: str | None = None,
    run_name: str = "run",
    tags: Sequence[str] = (),
    resume_id: str | None = None,
) -> Tracker:
    """The tracker of a run; one process calls it, inside its main guard (neptune-scale may start a process).

    kind: one of TRACKERS. project: for neptune `workspace/project`, default $NEPTUNE_PROJECT; for trackio any name.
    resume_id: the `id` of the tracker that the run had before. Raises UserError for an unknown kind, a project that is
    missing or malformed, or a package that is not installed; any other failure is a warning and a tracker that logs
    nowhere.
    """
    if kind not in TRACKERS:
        raise UserError(f"unknown tracker {kind!r}: one of {', '.join(TRACKERS)}")
    try:
        return TRACKERS[kind](project, resume_id or _new_id(run_name), list(tags))
    except ImportError:
        package = {"neptune": "neptune-scale"}.get(kind, kind)
        raise UserError(f"{package} is not installed: pip install {package}, or use --tracker none") from None
    except UserError:
        raise
    except Exception as error:
        logger.warning("tracker: %s does not start (%s); the run goes on without it", kind, _in_words(error))
        return Tracker(where=f"not tracked: {kind} did not start ({_in_words(error)})")


def _new_id(run_name: str) -> str:
    """Readable, unique, safe as a folder's name, and within the 64 characters that neptune keeps of one."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run_name).strip("-.") or "run"
    return f"{name[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _flat(configs: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in configs.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, name + "/")
        elif isinstance(value, (str, bool)) or (isinstance(value, (int, float)) and abs(value) < 2**63):
            flat[name] = value
        elif isinstance(value, (list, tuple, set, frozenset)):
            flat[name] = json.dumps(list(value), default=str, ensure_ascii=False)
        else:
            flat[name] = str(value)
    return flat


def _finite(value: object) -> float | None:
    """The value as a finite float (numbers, NumPy and torch scalars), else None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, str) else None


def _token() -> str | None:
    """Neptune's token; NEPTUNE_API_KEY is the name that the released code reads."""
    return os.environ.get("NEPTUNE_API_TOKEN") or os.environ.get("NEPTUNE_API_KEY") or None


def _in_words(error: BaseException) -> str:
    """An error in one line, without the token."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    token = _token()
    return (text.replace(token, "<token>") if token else text)[:300]


# ---------------------------------------------------------------------------------------------------------------------
# Where it is sent


class NeptuneTracker(Tracker):
    """neptune-scale: to its host where there is a token, else to a file on disk, as NEPTUNE_MODE=offline also asks."""

    def __init__(self, project: str | None, run_id: str, tags: list[str]) -> None:
        project = project or os.environ.get("NEPTUNE_PROJECT")
        if not project:
            raise UserError("no neptune project: give --neptune_project WORKSPACE/PROJECT or set NEPTUNE_PROJECT")
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
            raise UserError(f"neptune project {project!r}: it must be WORKSPACE/PROJECT")
        from neptune_scale import Run

        asked = os.environ.get("NEPTUNE_MODE", "").lower() == "offline"
        offline_because = "as NEPTUNE_MODE says" if asked else "no NEPTUNE_API_TOKEN" if _token() is None else ""
        folder = Path(os.environ.get("NEPTUNE_LOG_DIRECTORY") or ".neptune").absolute()
        others = set(multiprocessing.active_children())

        def report(error: BaseException, last_seen: float | None) -> None:
            self._warn(_in_words(error))

        self._run = Run(
            project=project,
            run_id=run_id,
            api_token=_token(),
            mode="offline" if offline_because else "async",
            log_directory=folder,
            enable_console_log_capture=False,
            source_tracking_config=None,
            on_network_error_callback=report,
            on_error_callback=report,
            on_warning_callback=report,
        )
        self._children = set(multiprocessing.active_children()) - others
        databases = folder.glob(f"*{glob.escape(run_id[:64])}*/*.sqlite3")
        newest = max(databases, key=lambda path: path.stat().st_mtime, default=folder)
        sync = f"`neptune sync {shlex.quote(str(newest))}`"
        if offline_because:
            # Its advice on closing is what `where` says already.
            logging.getLogger("neptune").setLevel(logging.ERROR)
            where = f"neptune, offline ({offline_because}): {sync} uploads it"
        else:
            where = f"neptune project {project}, run {run_id}; if the host fails, {sync} uploads the rest"
        super().__init__(run_id, where)
        if tags:
            self._run.add_tags(tags)

    def send_configs(self, configs: dict[str, Scalar]) -> None:
        self._run.log_configs(configs)

    def send_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._run.log_metrics(metrics, step=step)

    def send_rest(self, seconds: float) -> None:
        self._run.close(timeout=seconds)
        # A sending process that cannot reach its host outlives the timeout by a minute, and the interpreter would wait.
        for child in self._children:
            if child.is_alive():
                child.kill()


class TrackioTracker(Tracker):
    """trackio: a local database, shown by its own command."""

    def __init__(self, project: str | None, run_id: str, tags: list[str]) -> None:
        import trackio

        project = project or "value-guided-search"
        self._trackio = trackio
        self._run = trackio.init(project=project, name=run_id, resume="allow", embed=False)
        shown = f"`trackio show --project {shlex.quote(project)}` shows it"
        super().__init__(run_id, f"trackio project {project}, run {run_id}: {shown}")
        if tags:
            self.log_configs({"tags": tags})

    def send_configs(self, configs: dict[str, Scalar]) -> None:
        self._run.config |= configs  # written with the first metrics

    def send_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def send_rest(self, seconds: float) -> None:
        self._trackio.finish()


# name -> maker, which is given project, id and tags
TRACKERS: dict[str, Callable[[str | None, str, list[str]], Tracker]] = {
    "neptune": NeptuneTracker,
    "trackio": TrackioTracker,
    "none": lambda *_: Tracker(),
}
