"""One tracker object for both scripts: neptune-scale, W&B, trackio, or none. The local files are the record of truth.

A tracker may be down, slow or absent; nothing here stops a run. Its first failure is a warning, later ones are silent.
"""

import atexit
import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from common_lib.cli import UserError

logger = logging.getLogger(__name__)

Scalar = str | int | float | bool
PACKAGES = {  # name, and what pip is to be given
    "neptune": ("neptune-scale", "neptune-scale"),
    "wandb": ("wandb", '"wandb>=0.31,<0.32"'),
    "trackio": ("trackio", "trackio"),
}
TOKENS = ("NEPTUNE_API_TOKEN", "NEPTUNE_API_KEY", "WANDB_API_KEY")  # in the environment; never shown


class Tracker:
    """Takes what a run logs and never raises. This one keeps nothing; those of `trackers.py` send it somewhere.

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
            self._warn(in_words(error))

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

    kind: one of TRACKERS. project: for neptune `workspace/project`, default $NEPTUNE_PROJECT; for wandb `project` or
    `entity/project`, default $WANDB_PROJECT; for trackio any name.
    resume_id: the `id` of the tracker that the run had before. Raises UserError for an unknown kind, a project that is
    missing or malformed, or a package that is not installed; any other failure is a warning and a tracker that logs
    nowhere.
    """
    if kind not in TRACKERS:
        raise UserError(f"unknown tracker {kind!r}: one of {', '.join(TRACKERS)}")
    try:
        return TRACKERS[kind](project, resume_id or _new_id(run_name), list(tags))
    except ImportError as error:
        package, install = PACKAGES[kind]
        if isinstance(error, ModuleNotFoundError) and error.name == package.replace("-", "_"):
            raise UserError(f"{package} is not installed: pip install {install}, or use --tracker none") from None
        raise UserError(
            f"{package} is installed but cannot be imported ({in_words(error)}); mend that, or use --tracker none"
        ) from error
    except UserError:
        raise
    except Exception as error:
        logger.warning("tracker: %s does not start (%s); the run goes on without it", kind, in_words(error))
        return Tracker(where=f"not tracked: {kind} did not start ({in_words(error)})")


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


def in_words(error: BaseException) -> str:
    """An error in one line, without anybody's token."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name in TOKENS:
        if token := os.environ.get(name):
            text = text.replace(token, "<token>")
    return text[:300]


# name -> maker, which is given project, id and tags
TRACKERS: dict[str, Callable[[str | None, str, list[str]], Tracker]] = {
    "neptune": lambda *given: import_module("common_lib.trackers").NeptuneTracker(*given),
    "wandb": lambda *given: import_module("common_lib.trackers").wandb_tracker(*given),
    "trackio": lambda *given: import_module("common_lib.trackers").TrackioTracker(*given),
    "none": lambda *_: Tracker(),
}
