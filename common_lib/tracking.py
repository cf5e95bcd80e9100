"""One tracker object for both scripts: neptune-scale, trackio, or none. The local output files are the record of truth.

A tracker may be down, slow or absent; nothing here stops a run. Its first failure is a warning, later ones are silent.
"""

import atexit
import base64
import contextlib
import glob
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import ssl
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from common_lib.cli import UserError

logger = logging.getLogger(__name__)

KINDS = ("neptune", "trackio", "none")
CLOSE_SECONDS = 30.0  # for sending what is left; what was not sent stays on disk
HOST_SECONDS = 5.0  # for asking whether the tracker's host answers at all

Scalar = str | int | float | bool


class _Backend(Protocol):
    id: str  # names the run when it is resumed
    where: str  # a sentence: where the data is, how to see it

    def log_configs(self, configs: dict[str, Scalar]) -> None: ...
    def log_metrics(self, metrics: dict[str, float], step: int) -> None: ...
    def close(self, seconds: float) -> None: ...


class Tracker:
    """Logs to its backend, if any; never raises. `id` is for resuming the run, `where` says where the data is."""

    def __init__(self, backend: _Backend | None = None, where: str = "not tracked") -> None:
        self._backend = backend
        self._warned = False
        self.id = backend.id if backend else ""
        self.where = backend.where if backend else where
        # Runs before neptune-scale's own exit handler, which has no timeout and waits for ever for a host that is gone.
        atexit.register(self.close)

    def log_configs(self, configs: Mapping[str, object]) -> None:
        """Any nested mapping, before the first metrics: keys are joined by '/', lists and other objects become text."""
        if self._backend:
            self._guarded(self._backend.log_configs, _flat(configs))

    def log_metrics(self, metrics: Mapping[str, object], step: int) -> None:
        """Numbers by name at a step. What is None or not finite is left out, with a warning the first time."""
        if self._backend is None:
            return
        numbers = {name: number for name, value in metrics.items() if (number := _finite(value)) is not None}
        if left_out := [name for name in metrics if name not in numbers]:
            self._warn(f"not finite numbers at step {step}: {', '.join(left_out)}")
        if numbers:
            self._guarded(self._backend.log_metrics, numbers, step)

    def close(self) -> None:
        """Send what is left, for at most CLOSE_SECONDS. Idempotent."""
        backend, self._backend = self._backend, None
        atexit.unregister(self.close)
        if backend is None:
            return
        closing = threading.Thread(target=self._guarded, args=(backend.close, CLOSE_SECONDS), daemon=True)
        try:
            closing.start()
        except RuntimeError:  # the interpreter is ending: no new threads
            self._guarded(backend.close, CLOSE_SECONDS)
            return
        closing.join(CLOSE_SECONDS + 10)
        if closing.is_alive():
            self._warn("it does not close; going on without it")

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "tracker: %s (the run goes on; later troubles of the tracker are not shown)", _secret(problem)
            )


def make_tracker(
    kind: str,
    project: str | None = None,
    run_name: str = "run",
    tags: Sequence[str] = (),
    resume_id: str | None = None,
) -> Tracker:
    """The tracker of a run; one process calls it, inside its main guard (neptune-scale may start a process).

    kind: one of KINDS. project: for neptune `workspace/project`, default $NEPTUNE_PROJECT; for trackio any name.
    resume_id: the `id` of the tracker that the run had before. Raises UserError for an unknown kind, a project that is
    missing or malformed, or a package that is not installed; any other failure is a warning and a tracker that logs
    nowhere.
    """
    if kind not in KINDS:
        raise UserError(f"unknown tracker {kind!r}: one of {', '.join(KINDS)}")
    if kind == "none":
        return Tracker()
    run_id = resume_id or _new_id(run_name)
    make = _make_neptune if kind == "neptune" else _make_trackio
    try:
        return Tracker(make(project, run_id, list(tags)))
    except UserError:
        raise
    except Exception as error:
        problem = _secret(f"{type(error).__name__}: {error}")
        logger.warning("tracker: %s does not start (%s); the run goes on without it", kind, problem)
        return Tracker(where=f"not tracked: {kind} did not start ({problem})")


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


def _secret(text: str) -> str:
    token = _token()
    return text.replace(token, "<token>") if token else text


# -------------------------------------------------------------------------------------------------------------- neptune


class _Neptune:
    def __init__(self, project: str, run_id: str, tags: list[str], offline_because: str | None) -> None:
        from neptune_scale import Run

        folder = Path(os.environ.get("NEPTUNE_LOG_DIRECTORY") or ".neptune").absolute()
        others = set(multiprocessing.active_children())
        self._reported = False
        self._run = Run(
            project=project,
            run_id=run_id,
            api_token=_token(),
            mode="offline" if offline_because else "async",
            log_directory=folder,
            enable_console_log_capture=False,
            source_tracking_config=None,
            on_network_error_callback=self._report,
            on_error_callback=self._report,
            on_warning_callback=self._report,
        )
        self._children = set(multiprocessing.active_children()) - others
        self.id = run_id
        databases = sorted(
            folder.glob(f"*{glob.escape(run_id[:64])}*/*.sqlite3"), key=lambda path: path.stat().st_mtime
        )
        sync = f"`neptune sync {shlex.quote(str(databases[-1] if databases else folder))}`"
        if offline_because:
            # Its advice on closing is what `where` says already.
            logging.getLogger("neptune").setLevel(logging.ERROR)
            self.where = f"neptune, offline ({offline_because}): {sync} uploads it"
        else:
            self.where = f"neptune project {project}, run {run_id}; if the host fails, {sync} uploads the rest"
        if tags:
            self._run.add_tags(tags)

    def _report(self, error: BaseException, last_seen: float | None) -> None:
        if not self._reported:
            self._reported = True
            problem = " ".join(_secret(f"{type(error).__name__}: {error}").split())
            logger.warning("tracker: %s (the run goes on; %s)", problem[:300], self.where)

    def log_configs(self, configs: dict[str, Scalar]) -> None:
        self._run.log_configs(configs)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._run.log_metrics(metrics, step=step)

    def close(self, seconds: float) -> None:
        self._run.close(timeout=seconds)
        # A sending process that cannot reach its host outlives the timeout by a minute, and the interpreter would wait.
        for child in self._children:
            if child.is_alive():
                child.kill()


def _make_neptune(project: str | None, run_id: str, tags: list[str]) -> _Backend:
    project = project or os.environ.get("NEPTUNE_PROJECT")
    if not project:
        raise UserError("no neptune project: give --neptune_project WORKSPACE/PROJECT or set NEPTUNE_PROJECT")
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
        raise UserError(f"neptune project {project!r}: it must be WORKSPACE/PROJECT")
    try:
        import neptune_scale  # noqa: F401
    except ImportError:
        raise UserError("neptune-scale is not installed: pip install neptune-scale, or use --tracker none") from None
    offline = os.environ.get("NEPTUNE_MODE", "").lower() == "offline"
    return _Neptune(project, run_id, tags, "as NEPTUNE_MODE says" if offline else _why_offline(_token()))


def _why_offline(token: str | None) -> str | None:
    """Why neptune cannot be reached (its hosted service ended on 5 March 2026); None where its host answers."""
    if token is None:
        return "no NEPTUNE_API_TOKEN"
    try:
        fields = json.loads(base64.b64decode(token))
        address = str(fields.get("api_url") or fields["api_address"]).rstrip("/")
    except (ValueError, KeyError, AttributeError, TypeError):
        return "the token in the environment is not a neptune token"
    answers: list[bool] = []
    # In a thread: a name look-up has no timeout of its own.
    thread = threading.Thread(target=lambda: answers.append(_host_answers(address)), daemon=True)
    thread.start()
    thread.join(HOST_SECONDS + 1)
    return None if answers == [True] else f"{address} does not answer"


def _host_answers(address: str) -> bool:
    """Does a neptune service answer? The token is not sent, so the certificate need not be checked here."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(OSError, ValueError):  # URLError is an OSError; ValueError: no URL, no JSON
        url = f"{address}/api/backend/v1/clients/config"
        with urllib.request.urlopen(url, timeout=HOST_SECONDS, context=context) as reply:
            return isinstance(json.loads(reply.read(1 << 20)), dict)
    return False


# -------------------------------------------------------------------------------------------------------------- trackio


class _Trackio:
    def __init__(self, project: str, run_id: str, tags: list[str]) -> None:
        import trackio

        self._trackio = trackio
        self._logged = False
        self._run = trackio.init(project=project, name=run_id, resume="allow", embed=False)
        self.id = run_id
        self.where = (
            f"trackio project {project}, run {run_id}: `trackio show --project {shlex.quote(project)}` shows it"
        )
        if tags:
            self.log_configs({"tags": json.dumps(tags)})

    def log_configs(self, configs: dict[str, Scalar]) -> None:
        if self._logged:
            raise RuntimeError("trackio takes configs only before the first metrics")
        self._run.config |= configs  # written with the first metrics

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._logged = True
        self._run.log(metrics, step=step)

    def close(self, seconds: float) -> None:
        self._trackio.finish()


def _make_trackio(project: str | None, run_id: str, tags: list[str]) -> _Backend:
    try:
        import trackio  # noqa: F401
    except ImportError:
        raise UserError("trackio is not installed: pip install trackio, or use --tracker none") from None
    return _Trackio(project or "value-guided-search", run_id, tags)
