"""SGLang's engine inside this process, and the only file that depends on the insides of SGLang, those of 0.5.23.

That is: how it is imported without changing this process, the thread that it lives in, how its death shows (signals, its
`kill_process_tree`), how it ends (its processes and zmq contexts), and the limits that its scheduler has worked out.
Another version than TESTED_VERSION is warned of.
"""

import argparse
import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from common_lib.cli import UserError
from common_lib.concurrency import gather_all
from engine_lib.base import EngineConfig, EngineError, Reply, Request, check_requests, first_line
from engine_lib.placement import Placement, warn_of_few_groups
from engine_lib.seeded import logit_processor
from engine_lib.sglang_wire import data_parallel_ranks, engine_settings, longest_request, sampling_params, to_reply

logger = logging.getLogger(__name__)

TESTED_VERSION = "0.5.23"
DESCRIBED_SETTINGS = (
    "device", "dtype", "attention_backend", "sampling_backend", "mem_fraction_static", "max_running_requests",
    "chunked_prefill_size", "schedule_policy", "disable_radix_cache", "tp_size", "dp_size", "random_seed",
    "cuda_graph_max_bs_decode",
)  # fmt: skip


class SGLangEngine:
    """`sgl.Engine`, whose tokenizer manager lives on an event loop in a thread of its own.

    On the main thread sglang takes over SIGTERM and SIGQUIT, and kills the whole process, without a line, when one of
    its own dies. From another thread it leaves signals alone; its children still say that they failed by SIGQUIT, which
    is caught here and becomes an EngineError of every request.
    """

    name = "sglang"

    def __init__(self, config: EngineConfig, start_grace_s: float = 20.0):
        """A start that failed has `start_grace_s` to say why. Raises UserError for settings that cannot be and where
        sglang is not installed, EngineError where the engine does not start."""
        self.vocab_size, self.deterministic = config.vocab_size, config.deterministic
        self.request_timeout_s = config.request_timeout_s
        self.seeded = config.seeded
        settings = engine_settings(config, command_line)
        self._package = import_sglang()
        warn_of_version(self._package.__version__)
        self._end = ""  # why nothing can be asked any more
        self._closed = False
        self._running: set[Future] = set()
        self._loop = asyncio.new_event_loop()
        self._old_quit: Any = None
        if threading.current_thread() is threading.main_thread():
            self._old_quit = signal.signal(signal.SIGQUIT, lambda *_: self._died("one of its processes failed"))
        others = _families(os.getpid())
        try:
            with process_unchanged():
                self._engine = self._start(settings, start_grace_s)
        except BaseException:
            _kill(_families(os.getpid()) - others)
            self._restore_signals()
            raise
        info = self._engine._scheduler_init_result.scheduler_infos[0]
        self.context_length = longest_request(info["max_req_input_len"])
        self.pool_tokens = info["max_total_num_tokens"]
        self.ranks = range(data_parallel_ranks(self._engine.server_args.resolved_dict()))
        self._placement: Placement[int] = Placement(config.groups_at_once)  # used in the engine's thread only
        warn_of_few_groups(config.groups_at_once, len(self.ranks), "data-parallel ranks")

    def describe(self) -> dict[str, object]:
        resolved = self._engine.server_args.resolved_dict()  # what sglang made of the settings
        return {
            "name": self.name,
            "sglang": self._package.__version__,
            "deterministic": self.deterministic,
            "seeded": self.seeded,
            "context_length": self.context_length,
            "kv_pool_tokens": self.pool_tokens,
            **{key: resolved[key] for key in DESCRIBED_SETTINGS},
        }

    async def generate(self, requests: Sequence[Request]) -> list[Reply]:
        check_requests(requests, self.context_length, self.vocab_size)
        if self._end:
            raise EngineError(self._end)
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
            if not self._end or (task is not None and task.cancelling()):
                raise
            raise EngineError(self._end) from None
        finally:
            future.cancel()  # where it still runs, sglang aborts the request
            self._running.discard(future)

    async def close(self) -> None:
        """Abort what runs and end the engine's processes, and only those: `Engine.shutdown` kills every child."""
        if self._closed:
            return
        self._closed = True
        self._stop_requests("the SGLang engine has been closed")
        await asyncio.to_thread(self._shut_down)
        self._restore_signals()

    async def _ask(self, requests: Sequence[Request]) -> list[Reply]:
        """In the engine's thread: each group's requests to its rank, which has read what they share."""
        replies: dict[int, Reply] = {}

        async def ask(rank: int, rows: list[int]) -> None:
            replies.update(zip(rows, await self._ask_rank(rank, [requests[row] for row in rows]), strict=True))

        with contextlib.ExitStack() as stack:
            places = [stack.enter_context(self._placement.use(request.group, self.ranks)) for request in requests]
            rows_of = {rank: [row for row, place in enumerate(places) if place == rank] for rank in set(places)}
            await gather_all(ask(rank, rows) for rank, rows in rows_of.items())
        return [replies[row] for row in range(len(requests))]

    async def _ask_rank(self, rank: int, requests: Sequence[Request]) -> list[Reply]:
        import fastapi

        settings: dict[str, Any] = {
            "input_ids": [request.prompt_ids for request in requests],
            "sampling_params": [sampling_params(request, self.deterministic, self.seeded) for request in requests],
        }
        if self.seeded:
            settings["custom_logit_processor"] = logit_processor()
        if len(self.ranks) > 1:  # one rank for the whole list; left alone, sglang goes from rank to rank
            settings["routed_dp_rank"] = rank
        try:
            outputs = await self._engine.async_generate(**settings)
        except (TypeError, ValueError) as error:
            raise EngineError(f"SGLang refused a request: {error}") from error
        except fastapi.HTTPException as error:  # how it says that a request failed inside
            raise EngineError(f"SGLang failed on a request: {error.detail}") from error
        return [to_reply(request, output) for request, output in zip(requests, outputs, strict=True)]

    # Life and death

    def _start(self, settings: Mapping[str, Any], grace_s: float) -> Any:
        """The started engine. Raises EngineError with the reason where it does not start."""
        started: Future = Future()
        self._thread = threading.Thread(target=self._live, args=(settings, started), name="sglang", daemon=True)
        self._thread.start()
        failing = 0.0
        while failing < grace_s:
            try:
                return started.result(timeout=0.5)
            except TimeoutError:
                failing += 0.5 if self._end else 0.0
            except (Exception, SystemExit) as error:
                raise EngineError(f"the SGLang engine did not start: {first_line(error)}") from error
        raise EngineError("the SGLang engine did not start: one of its processes failed; its messages are above")

    def _live(self, settings: Mapping[str, Any], started: Future) -> None:
        """The thread: start the engine, then run its event loop until `close`."""
        asyncio.set_event_loop(self._loop)
        others = _zmq_contexts()
        try:
            engine = self._package.Engine(**settings)
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

    def _died(self, how: str) -> None:
        """Called from a signal handler or from the engine's thread."""
        self._stop_requests(f"the SGLang engine died: {how} (its messages are above)")

    def _stop_requests(self, why: str) -> None:
        self._end = self._end or why
        for future in list(self._running):
            future.cancel()

    def _shut_down(self) -> None:
        atexit.unregister(self._engine.shutdown)
        watchdog = self._engine.tokenizer_manager._subprocess_watchdog
        if watchdog is not None:
            watchdog.stop()
        _kill(_families(*self._engine.get_all_child_pids()))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def _restore_signals(self) -> None:
        if self._old_quit is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, self._old_quit)
            self._old_quit = None


def import_sglang() -> Any:
    """The package. Raises UserError where it cannot be imported."""
    try:
        with process_unchanged():
            return importlib.import_module("sglang")
    except ImportError as error:
        raise UserError(
            f"--engine sglang: sglang cannot be imported ({error}); install requirements.txt on a GPU node, or give "
            "--engine transformers"
        ) from error


@functools.cache  # said once
def warn_of_version(installed: str) -> None:
    if installed != TESTED_VERSION:
        logger.warning(
            "engine: sglang %s is installed and this was tested with %s, on whose insides it depends; where it does not "
            "start or end in order, install that one", installed, TESTED_VERSION,
        )  # fmt: skip


def command_line() -> argparse.ArgumentParser:
    """The flags of sglang's own server. Raises UserError where sglang cannot be imported."""
    import_sglang()
    parser = argparse.ArgumentParser(add_help=False)
    with process_unchanged():
        importlib.import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return parser


@contextlib.contextmanager
def process_unchanged() -> Iterator[None]:
    """Importing and starting sglang replaces the root logger's handlers and level and the policy of event loops, and its
    processes are talkative at their start: all is put back, and only their errors are shown."""
    root, policy = logging.getLogger(), asyncio.get_event_loop_policy()
    handlers, level = root.handlers[:], root.level
    quiet = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    before = {name: os.environ[name] for name in quiet if name in os.environ}
    os.environ.update(quiet)
    logging.getLogger("sglang").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        asyncio.set_event_loop_policy(policy)
        root.handlers[:], root.level = handlers, level
        for name in quiet:
            os.environ.pop(name, None)
        os.environ.update(before)


def _zmq_contexts() -> list[Any]:
    """All that there are in this process; sglang keeps its own to itself, and a notebook has some."""
    import zmq

    return [thing for thing in gc.get_objects() if issubclass(type(thing), zmq.Context)]


def _families(*pids: int) -> set[Any]:
    """These processes and their descendants; psutil comes with sglang."""
    import psutil

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
