"""SGLang's engine inside this process. Facts about sglang in the comments are of version 0.5.23."""

import asyncio
import atexit
import contextlib
import gc
import importlib
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from engine_lib.base import EngineError, Reply, Request, check_requests
from engine_lib.sglang_wire import import_sglang, longest_request, process_unchanged, sampling_params, to_reply

START_GRACE_S = 20.0  # a start that failed has this long to say why, before it is given up


class SGLangEngine:
    """`sgl.Engine`, whose tokenizer manager lives on an event loop in a thread of its own.

    On the main thread sglang takes over SIGTERM and SIGQUIT, and kills the whole process, without a line, when one of
    its own dies. From another thread it leaves signals alone; its children still say that they failed by SIGQUIT, which
    is caught here and becomes an EngineError of every request.
    """

    name = "sglang"

    def __init__(self, settings: Mapping[str, Any], vocab_size: int, *, request_timeout_s: float = 3600.0):
        self.settings, self.vocab_size, self.request_timeout_s = dict(settings), vocab_size, request_timeout_s
        self.deterministic = bool(self.settings.get("enable_deterministic_inference"))
        self._death: str | None = None
        self._closed = False
        self._running: set[Future] = set()
        self._loop = asyncio.new_event_loop()
        with process_unchanged():
            self._package = import_sglang()
        self._old_quit: Any = None
        if threading.current_thread() is threading.main_thread():
            self._old_quit = signal.signal(signal.SIGQUIT, lambda *_: self._died("one of its processes failed"))
        started: Future = Future()
        self._thread = threading.Thread(target=self._live, args=(started,), name="sglang", daemon=True)
        others = _children()
        try:
            with process_unchanged():
                self._thread.start()
                self._engine = self._wait_for(started)
        except BaseException:
            _kill(_children() - others)
            self._restore_signals()
            raise
        info = self._engine._scheduler_init_result.scheduler_infos[0]
        self.context_length = longest_request(info["max_req_input_len"])
        self.pool_tokens = info["max_total_num_tokens"]

    def describe(self) -> dict[str, object]:
        shown = (
            "device", "dtype", "attention_backend", "sampling_backend", "mem_fraction_static", "max_running_requests",
            "chunked_prefill_size", "schedule_policy", "disable_radix_cache", "tp_size", "dp_size", "random_seed",
        )  # fmt: skip
        resolved = self._engine.server_args.resolved_dict()  # what sglang made of the settings
        return {
            "name": self.name,
            "sglang": self._package.__version__,
            "deterministic": self.deterministic,
            "context_length": self.context_length,
            "kv_pool_tokens": self.pool_tokens,
            **{key: resolved[key] for key in shown},
        }

    async def generate(self, requests: Sequence[Request]) -> list[Reply]:
        check_requests(requests, self.context_length, self.vocab_size)
        if self._closed or self._death:
            raise EngineError(self._death or "the SGLang engine has been closed")
        if not requests:
            return []
        future = asyncio.run_coroutine_threadsafe(self._ask(requests), self._loop)
        self._running.add(future)
        try:
            async with asyncio.timeout(self.request_timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            longest = max(request.max_new_tokens for request in requests)
            raise EngineError(
                f"the SGLang engine did not write {longest} tokens within --request_timeout {self.request_timeout_s:g} s"
            ) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._death is None or (task is not None and task.cancelling()):
                raise
            raise EngineError(self._death) from None
        finally:
            future.cancel()  # where it still runs, sglang aborts the request
            self._running.discard(future)

    async def close(self) -> None:
        """Abort what runs and end the engine's processes, and only those: `Engine.shutdown` kills every child."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._shut_down)
        self._restore_signals()

    async def _ask(self, requests: Sequence[Request]) -> list[Reply]:
        import fastapi

        try:
            outputs = await self._engine.async_generate(
                input_ids=[request.prompt_ids for request in requests],
                sampling_params=[sampling_params(request, self.deterministic) for request in requests],
            )
        except (TypeError, ValueError) as error:
            raise EngineError(f"SGLang refused a request: {error}") from error
        except fastapi.HTTPException as error:  # how it says that a request failed inside
            raise EngineError(f"SGLang failed on a request: {error.detail}") from error
        return [to_reply(request, output) for request, output in zip(requests, outputs, strict=True)]

    # Life and death

    def _live(self, started: Future) -> None:
        """The thread: start the engine, then run its event loop until `close`."""
        asyncio.set_event_loop(self._loop)
        others = _zmq_contexts()
        try:
            engine = self._package.Engine(**self.settings)
            manager: Any = importlib.import_module("sglang.srt.managers.tokenizer_manager")
            # An error in the manager's own loop would end this process without a line.
            manager.kill_process_tree = lambda *_, **__: self._died("its tokenizer manager failed")
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(engine)
            self._loop.run_forever()
        # Messages to processes that are gone would keep this one from ending.
        for context in _zmq_contexts():
            if context not in others:
                context.destroy(linger=0)
        self._loop.close()

    def _wait_for(self, started: Future) -> Any:
        """The started engine. Raises EngineError with the reason where it does not start."""
        failing = 0.0
        while failing < START_GRACE_S:
            try:
                return started.result(timeout=0.5)
            except TimeoutError:
                failing += 0.5 if self._death else 0.0
            except (Exception, SystemExit) as error:
                raise EngineError(f"the SGLang engine did not start: {_first_line(error)}") from error
        raise EngineError("the SGLang engine did not start: one of its processes failed; its messages are above")

    def _died(self, how: str) -> None:
        """Called from a signal handler or from the engine's thread: every request ends with the reason."""
        if self._closed or self._death:
            return
        self._death = f"the SGLang engine died: {how} (its messages are above)"
        for future in list(self._running):
            future.cancel()

    def _shut_down(self) -> None:
        engine = self._engine
        atexit.unregister(engine.shutdown)
        if engine.tokenizer_manager._subprocess_watchdog is not None:
            engine.tokenizer_manager._subprocess_watchdog.stop()
        for future in list(self._running):
            future.cancel()
        _kill(_children(engine.get_all_child_pids()))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _restore_signals(self) -> None:
        if self._old_quit is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, self._old_quit)
            self._old_quit = None


def _zmq_contexts() -> list[Any]:
    """All that there are in this process; sglang keeps its own to itself, and a notebook has some."""
    import zmq

    return [thing for thing in gc.get_objects() if issubclass(type(thing), zmq.Context)]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _children(pids: Sequence[int] | None = None) -> set[Any]:
    """This process' descendants, or these processes and theirs; psutil comes with sglang."""
    import psutil

    if pids is None:
        return set(psutil.Process().children(recursive=True))
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= {process, *process.children(recursive=True)}
    return found


def _kill(processes: set[Any]) -> None:
    """SIGKILL, and wait until their GPU memory and ports are free."""
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)
