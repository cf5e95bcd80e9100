"""SGLang engines inside this process, and the file that depends on the insides of SGLang, those of 0.5.23.

That is: the thread that each engine lives in, how its death shows (signals, its `kill_process_tree`), how it ends (its
processes and zmq contexts), and what two engines of one process share that they must not.
"""

import asyncio
import atexit
import contextlib
import gc
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from engine_lib.base import EngineError, first_line
from engine_lib.sglang_import import import_sglang, process_unchanged, warn_of_version

DESCRIBED_SETTINGS = (
    "device", "dtype", "attention_backend", "sampling_backend", "mem_fraction_static", "max_running_requests",
    "chunked_prefill_size", "schedule_policy", "disable_radix_cache", "tp_size", "dp_size", "random_seed",
    "cuda_graph_max_bs_decode",
)  # fmt: skip
FAILED = "one of its processes failed"
# A process says that it failed before it has ended, and on a GPU it may take seconds to end.
PATIENCE_S = 10.0


class SGLangProcess:
    """One `sgl.Engine`, whose tokenizer manager lives on an event loop in a thread of its own.

    On the main thread sglang takes over SIGTERM and SIGQUIT, and kills the whole process, without a line, when one of
    its own dies. From another thread it leaves signals alone; its children still say that they failed by SIGQUIT, which
    is caught here and becomes an EngineError of every request.
    """

    def __init__(self, what: str, settings: Mapping[str, Any], start_grace_s: float = 20.0, guest: bool = False):
        """Start it. `what` names it in messages; a `guest` leaves what SGLang keeps for the process to the engine beside
        it. A start that failed has `start_grace_s` to say why. Raises UserError where sglang is not installed, EngineError
        where the engine does not start."""
        self.what, self._guest = what, guest
        self.package = import_sglang()
        warn_of_version(self.package.__version__)
        self.engine: Any = None
        self.thread: threading.Thread | None = None
        self.end = ""  # why nothing can be asked any more
        self._closed = False
        self._running: set[Future] = set()
        self._loop = asyncio.new_event_loop()
        _DEATHS.add(self)
        others = families(os.getpid())
        try:
            with process_unchanged():
                self.engine = self._start(settings, start_grace_s)
        except BaseException:
            _kill(families(os.getpid()) - others - families(*_DEATHS.pids_of_all()))
            _DEATHS.remove(self)
            raise
        self.info: Mapping[str, Any] = self.engine._scheduler_init_result.scheduler_infos[0]

    def describe(self) -> dict[str, object]:
        """SGLang's version, and what it made of the settings."""
        resolved = self.resolved()
        return {"sglang": self.package.__version__, **{key: resolved[key] for key in DESCRIBED_SETTINGS}}

    def resolved(self) -> dict[str, Any]:
        return self.engine.server_args.resolved_dict()

    def pids(self) -> list[int]:
        """Of its processes; none before it has started."""
        return [] if self.engine is None else self.engine.get_all_child_pids()

    async def run(self, work: Callable[[], Coroutine[Any, Any, Any]], limit_s: float, too_late: str) -> Any:
        """The result of `work()` in the engine's thread. Raises EngineError where the engine is dead or closed, and with
        `too_late` after `limit_s`. Cancelling cancels the work, upon which sglang aborts its requests."""
        if self.end:
            raise EngineError(self.end)
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        self._running.add(future)
        if self.end:  # since the line above; another thread says so
            future.cancel()
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise EngineError(too_late) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.end or (task is not None and task.cancelling()):
                raise
            raise EngineError(self.end) from None
        finally:
            future.cancel()  # where it still runs, sglang aborts the request
            self._running.discard(future)

    async def close(self) -> None:
        """Abort what runs and end the engine's processes, and only those: `Engine.shutdown` kills every child."""
        if self._closed:
            return
        self._closed = True
        self._stop_requests(f"the {self.what} has been closed")
        await asyncio.to_thread(self._shut_down)
        _DEATHS.remove(self)

    def died(self, how: str) -> None:
        """From any thread: every request ends with this."""
        self._stop_requests(f"the {self.what} died: {how} (its messages are above)")

    def _start(self, settings: Mapping[str, Any], grace_s: float) -> Any:
        """The started engine. Raises EngineError with the reason where it does not start."""
        started: Future = Future()
        self.thread = threading.Thread(target=self._live, args=(settings, started), name="sglang", daemon=True)
        self.thread.start()
        failing = 0.0
        while failing < grace_s:
            try:
                return started.result(timeout=0.5)
            except TimeoutError:
                failing += 0.5 if self.end else 0.0
            except (Exception, SystemExit) as error:
                raise EngineError(f"the {self.what} did not start: {first_line(error)}") from error
        raise EngineError(f"the {self.what} did not start: {FAILED}; its messages are above")

    def _live(self, settings: Mapping[str, Any], started: Future) -> None:
        """The thread: start the engine, then run its event loop until `close`."""
        asyncio.set_event_loop(self._loop)
        others = _zmq_contexts()
        try:
            with _config_kept(self._guest and _DEATHS.others_live(self)):
                engine = self.package.Engine(**settings)
            manager: Any = importlib.import_module("sglang.srt.managers.tokenizer_manager")
            # An error in a manager's own loop would end this process without a line; the function is every engine's.
            manager.kill_process_tree = _DEATHS.manager_failed
        except BaseException as error:
            own = [context for context in _zmq_contexts() if context not in others]
            started.set_exception(error)
        else:
            own = [context for context in _zmq_contexts() if context not in others]
            started.set_result(engine)
            with contextlib.suppress(SystemExit):  # of a manager that failed
                self._loop.run_forever()
            if tasks := asyncio.all_tasks(self._loop):
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=5))
        for context in own:  # messages to processes that are gone would keep this one from ending
            context.destroy(linger=0)
        self._loop.close()

    def _stop_requests(self, why: str) -> None:
        self.end = self.end or why
        for future in list(self._running):
            future.cancel()

    def _shut_down(self) -> None:
        atexit.unregister(self.engine.shutdown)
        watchdog = self.engine.tokenizer_manager._subprocess_watchdog
        if watchdog is not None:
            watchdog.stop()
        _kill(families(*self.pids()))
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._loop.stop)
        if self.thread is not None:
            self.thread.join(timeout=10)


class _Deaths:
    """Which engine of this process has died: a failed child says it by SIGQUIT to this process, a failed manager by a
    function of its module, and neither says whose it was."""

    def __init__(self) -> None:
        self._engines: list[SGLangProcess] = []
        self._some_gone = False  # closed, or did not start
        self._old_quit: Any = None

    def add(self, engine: SGLangProcess) -> None:
        if self._old_quit is None and threading.current_thread() is threading.main_thread():
            self._old_quit = signal.signal(signal.SIGQUIT, self._told)
        self._engines.append(engine)

    def remove(self, engine: SGLangProcess) -> None:
        self._engines.remove(engine)
        self._some_gone = bool(self._engines)
        main = threading.current_thread() is threading.main_thread()
        if not self._engines and main and self._old_quit is not None:
            signal.signal(signal.SIGQUIT, self._old_quit)
            self._old_quit = None

    def others_live(self, engine: SGLangProcess) -> bool:
        return any(other is not engine and not other.end for other in self._engines)

    def pids_of_all(self) -> list[int]:
        return [pid for engine in self._engines for pid in engine.pids()]

    def manager_failed(self, *_, **__) -> None:
        """In the place of `kill_process_tree`, in the thread of the engine that failed."""
        here = [engine for engine in self._engines if engine.thread is threading.current_thread()]
        for engine in here or self._engines:
            engine.died("its tokenizer manager failed")

    def _told(self, *_) -> None:
        living = [engine for engine in self._engines if not engine.end]
        starting = [engine for engine in living if engine.engine is None]
        if len(starting) < len(living):  # a signal handler must not wait
            threading.Thread(target=self._find, args=(living, starting), daemon=True).start()
        for engine in starting if len(starting) == len(living) else ():
            engine.died(FAILED)

    def _find(self, living: list[SGLangProcess], starting: list[SGLangProcess]) -> None:
        """Look whose process has ended. Where none does, it is the engine that was starting; else it may be a late word
        of an engine that is gone, and only where there was none nobody else can be meant."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if ended := [engine for engine in living if any(map(_ended, engine.pids()))]:
                for engine in ended:
                    engine.died(FAILED)
                return
            if not all(engine in self._engines for engine in living):  # it did not start, or was closed
                return
            time.sleep(0.02)
        explained = self._some_gone or any(engine.end for engine in self._engines)
        for engine in starting or ([] if explained else living):
            engine.died(FAILED)


_DEATHS = _Deaths()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What SGLang raises about a request, as an EngineError."""
    import fastapi

    try:
        yield
    except (TypeError, ValueError) as error:
        raise EngineError(f"SGLang refused a request: {error}") from error
    except fastapi.HTTPException as error:  # how it says that a request failed inside
        raise EngineError(f"SGLang failed on a request: {error.detail}") from error


@contextlib.contextmanager
def _config_kept(wanted: bool) -> Iterator[None]:
    """SGLang keeps one engine's settings for this process, the last one's, and asks them about every engine's requests:
    whether they may bring a sampler, which rank they may name. A generator beside a value model needs its own."""
    if not wanted:
        yield
        return
    context = importlib.import_module("sglang.srt.runtime_context").get_context()
    places = [(context, name) for name in ("_server_args", "_config_bags", "_overrides_log", "_publish_role")]
    places.append((context.parallel, "_config"))
    before = [getattr(owner, name) for owner, name in places]
    try:
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def _zmq_contexts() -> list[Any]:
    """All that there are in this process; sglang keeps its own to itself, and a notebook has some."""
    import zmq

    return [thing for thing in gc.get_objects() if issubclass(type(thing), zmq.Context)]


def families(*pids: int) -> set[Any]:
    """These processes and their descendants. (psutil comes with sglang.)"""
    import psutil

    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= {process, *process.children(recursive=True)}
    return found


def _ended(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill(processes: set[Any]) -> None:
    """SIGKILL, and wait until their GPU memory and ports are free."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)
