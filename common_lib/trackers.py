"""The trackers by name: where each sends what a run logs. Their packages are optional, and imported when one is made."""

import contextlib
import glob
import logging
import multiprocessing
import netrc
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common_lib.cli import UserError
from common_lib.tracking import Scalar, Tracker, in_words

logger = logging.getLogger(__name__)
PROJECT = "value-guided-search"  # where a service needs a name and none is given


def _token() -> str | None:
    """Neptune's token; NEPTUNE_API_KEY is the name that the released code reads."""
    return os.environ.get("NEPTUNE_API_TOKEN") or os.environ.get("NEPTUNE_API_KEY") or None


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
            self._warn(in_words(error))

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


class WandbTracker(Tracker):
    """Weights & Biases: to its host where there is a key, else to files on disk, as WANDB_MODE=offline also asks.

    WANDB_MODE=disabled makes no such tracker: see `wandb_tracker`.

    Its files are in `wandb/` of the working directory, or of WANDB_DIR. A later session of a run has the same id: online
    it goes on in the same run, offline it has a folder of its own, which `wandb sync` adds to that run. W&B takes steps
    that grow: what is logged again at an earlier one is left out, with a warning; but a session offline does not know the
    steps of earlier ones, and there it is W&B that leaves them out when they are uploaded.
    """

    start_seconds = 10.0  # for the host to answer; then the run is kept offline

    def __init__(self, project: str | None, run_id: str, tags: list[str]) -> None:
        project = project or os.environ.get("WANDB_PROJECT") or PROJECT
        entity, _, name = project.rpartition("/")
        if not re.fullmatch(r"[^/\\#?%:\s]{1,128}", name) or "/" in entity:
            raise UserError(
                f"wandb project {project!r}: it must be PROJECT or ENTITY/PROJECT, without any of /\\\\#?%:"
            )
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # of wandb to its makers: 10 s at exit without a network
        with _as_it_was():
            import wandb

            wandb.setup(settings=wandb.Settings(silent=True))  # else it tells how it logs in
        # Its threads log tracebacks where its process has gone; what matters of that is said here.
        logging.getLogger("wandb").setLevel(logging.CRITICAL)
        self._wandb: Any = wandb
        self._target: dict[str, Any] = {"entity": entity or None, "project": name, "tags": tags or None}
        asked = os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun")
        offline_because = "as WANDB_MODE says" if asked else "" if _has_wandb_key() else "no WANDB_API_KEY"
        if not offline_because:
            before = _wandb_folders(run_id)
            try:
                self._start(run_id, "online")
            except Exception as error:
                logger.warning("tracker: wandb's host does not take the run (%s); it is kept offline", in_words(error))
                offline_because = "its host did not take the run"
                self._end(1.0, wandb.teardown)  # its process holds the run's id
                for folder in _wandb_folders(run_id) - before:
                    shutil.rmtree(folder, ignore_errors=True)  # nothing was logged to it
        if offline_because:
            self._start(run_id, "offline")
        sync = f"`wandb sync {shlex.quote(str(self._run.settings.sync_dir))}`"
        if offline_because:
            where = f"wandb, offline ({offline_because}): {sync} uploads it"
        else:
            where = f"wandb project {project}, run {run_id}; if the host fails, {sync} uploads the rest"
        super().__init__(run_id, where)

    def _start(self, run_id: str, mode: str) -> None:
        """Begin a run of which W&B takes nothing but what is logged, and leaves output, signals and exit alone."""
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_save_requirements=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_transaction_log_flush_interval=1.0,  # what its process holds back is lost with it
            init_timeout=self.start_seconds,
            stop_fn=lambda: self._warn("the stop button of W&B does not stop a run; press Ctrl-C where it runs"),
        )
        resume = "allow" if mode == "online" else None
        with _as_it_was():
            self._run = self._wandb.init(
                id=run_id, name=run_id, mode=mode, resume=resume, reinit="create_new", settings=settings, **self._target
            )

    def send_configs(self, configs: dict[str, Scalar]) -> None:
        self._run.config.update(configs, allow_val_change=True)

    def send_metrics(self, metrics: dict[str, float], step: int) -> None:
        if step < self._run.step:
            raise ValueError(f"step {step} comes after {self._run.step}, and W&B takes no earlier one: left out")
        self._run.log(metrics, step=step)

    def send_rest(self, seconds: float) -> None:
        errors = self._end(seconds, self._run.finish, self._wandb.teardown)
        if errors:
            uploads = self.where.rpartition(": " if ", offline (" in self.where else "; ")[2]
            raise TimeoutError(f"not all was sent ({in_words(errors[0])}); {uploads}")

    def _end(self, seconds: float, *steps: Callable[[], object]) -> list[Exception]:
        """Do that, each whatever became of the last; what still goes on after so long ends with the process it waits for.

        W&B waits without end while its host is gone, in its handler at exit too.
        """
        errors: list[Exception] = []
        service = _wandb_service(self._wandb)

        def work() -> None:
            for step in steps:
                try:
                    step()
                except Exception as error:
                    errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            errors.append(TimeoutError(f"it took longer than {seconds:g} s"))
            if service is not None:
                service.kill()
            thread.join(1.0)
        return errors


def wandb_tracker(project: str | None, run_id: str, tags: list[str]) -> Tracker:
    """A `WandbTracker`, or where WANDB_MODE says `disabled` one that keeps nothing but the run's id."""
    if os.environ.get("WANDB_MODE", "").lower() == "disabled":
        return Tracker(run_id, "not tracked: WANDB_MODE is disabled")
    return WandbTracker(project, run_id, tags)


def _wandb_folders(run_id: str) -> set[Path]:
    """Those of a run's sessions online."""
    return set(Path(os.environ.get("WANDB_DIR") or ".").absolute().glob(f"*wandb/run-*-{glob.escape(run_id)}"))


@contextlib.contextmanager
def _as_it_was() -> Any:
    """W&B puts its own functions in the place of these two."""
    exit_function, hook = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = exit_function, hook


def _has_wandb_key() -> bool:
    """Is W&B's key given, or stored by `wandb login`? Asked here because wandb would prompt for it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _wandb_service(wandb: Any) -> Any:
    """The process (subprocess.Popen) that sends; None where this version keeps it elsewhere."""
    connection = getattr(wandb.setup(), "_connection", None)
    return getattr(getattr(connection, "_proc", None), "_process", None)


class TrackioTracker(Tracker):
    """trackio: a local database, shown by its own command."""

    def __init__(self, project: str | None, run_id: str, tags: list[str]) -> None:
        import trackio

        project = project or PROJECT
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
