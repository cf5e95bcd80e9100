"""The engine's thread, its life and its death, with a fake package in the place of sglang: quick, and anywhere."""

import argparse
import asyncio
import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from common_lib.cli import UserError
from engine_lib import sglang_local
from engine_lib.base import EngineConfig, EngineError, Reply, Request
from engine_lib.seeded import logit_processor
from engine_lib.sglang_import import TESTED_VERSION, import_sglang, warn_of_version
from engine_lib.sglang_local import SGLangEngine
from engine_lib.sglang_process import DESCRIBED_SETTINGS
from engine_lib.sglang_wire import sampling_params

CONFIG = EngineConfig(model_path="folder", vocab_size=100, samples=False)
REQUEST = Request([1, 2, 3], 2, temperature=0)


class Context:
    """zmq's."""

    destroyed = False

    def destroy(self, linger: int) -> None:
        self.destroyed = True


class HTTPException(Exception):
    def __init__(self, detail: str):
        self.detail = detail


def kept_settings() -> SimpleNamespace:
    """What sglang keeps for a process."""
    names = ("_server_args", "_config_bags", "_overrides_log", "_publish_role")
    return SimpleNamespace(**dict.fromkeys(names), parallel=SimpleNamespace(_config=None))


class FakeEngine:
    """`sgl.Engine` with a process of its own; `on_start` and `answer` may be changed before it is made."""

    made: "list[FakeEngine]"
    process: SimpleNamespace
    on_start = staticmethod(lambda: None)
    answer = None  # to a prompt; None: it writes forever

    def __init__(self, **settings):
        self.settings, self.asked, self.aborted, self.routed = settings, asyncio.Event(), 0, []
        self.child, self.context = subprocess.Popen(["sleep", "60"]), Context()
        self.made.append(self)
        for owner in (self.process, self.process.parallel):  # the last one's for all
            vars(owner).update({name: settings["model_path"] for name in vars(owner) if name != "parallel"})
        logging.getLogger().setLevel(logging.DEBUG)  # as sglang does, or worse
        logging.getLogger().handlers.clear()
        asyncio.set_event_loop_policy(None)
        self.quieted = os.environ.get("PYTHONWARNINGS")
        self.on_start()
        self.server_args = SimpleNamespace(resolved_dict=lambda: dict.fromkeys(DESCRIBED_SETTINGS, 1) | settings)
        self._scheduler_init_result = SimpleNamespace(
            scheduler_infos=[{"max_req_input_len": 2042, "max_total_num_tokens": 8192}]
        )
        self.tokenizer_manager = SimpleNamespace(_subprocess_watchdog=None)

    def get_all_child_pids(self) -> list[int]:
        return [self.child.pid]

    def shutdown(self) -> None:
        pass

    async def async_generate(self, input_ids, sampling_params, custom_logit_processor=None, routed_dp_rank=None):
        self.asked.set()
        self.processor = custom_logit_processor
        self.routed += [(routed_dp_rank, ids[0]) for ids in input_ids]
        if self.answer is not None:
            return [self.answer(ids, params) for ids, params in zip(input_ids, sampling_params, strict=True)]
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise


def written(ids, params) -> dict:
    meta = {"finish_reason": {"type": "length"}, "prompt_tokens": len(ids), "cached_tokens": 1}
    return {"output_ids": [7] * params["max_new_tokens"], "meta_info": meta}


@pytest.fixture
def package(monkeypatch):
    """A fake sglang, of the tested version; its manager module, with the function that is patched there."""
    fake = type("Engine", (FakeEngine,), {"made": [], "process": kept_settings()})
    modules = {
        "sglang": {"__version__": TESTED_VERSION, "Engine": fake},
        "sglang.srt": {},
        "sglang.srt.runtime_context": {"get_context": lambda: fake.process},
        "sglang.srt.managers": {},
        "sglang.srt.managers.tokenizer_manager": {"kill_process_tree": None},
        "zmq": {"Context": Context},
        "fastapi": {"HTTPException": HTTPException},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    warn_of_version.cache_clear()
    yield sys.modules["sglang"]
    warn_of_version.cache_clear()
    for engine in fake.made:
        engine.child.kill()
        engine.child.wait()


def with_engine(main, config=CONFIG):
    async def run(engine):
        try:
            return await main(engine)
        finally:
            await engine.close()

    return asyncio.run(run(SGLangEngine(config)))


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def asked(package, requests, engine):
    """A task that waits for replies which never come."""
    running = asyncio.create_task(engine.generate(requests))
    await until(package.Engine.made[0].asked.is_set)
    return running


# The version


def test_the_tested_version_is_not_spoken_of(package, caplog):
    with_engine(lambda engine: asyncio.sleep(0))
    assert not caplog.text


def test_another_version_is_one_warning_that_names_both(package, caplog):
    package.__version__ = "0.6.0"
    for _ in range(2):
        with_engine(lambda engine: asyncio.sleep(0))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "sglang 0.6.0 is installed" in record.getMessage()
    assert TESTED_VERSION in record.getMessage()


def test_no_sglang_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(UserError, match=r"sglang cannot be imported .*; install requirements.txt on a GPU node"):
        import_sglang()


# The start


def test_this_process_stays_as_it_was(package):
    root, policy = logging.getLogger(), asyncio.get_event_loop_policy()
    before = root.handlers[:], root.level, os.environ.get("PYTHONWARNINGS"), signal.getsignal(signal.SIGQUIT)
    assert before[0], "pytest has handlers of its own"

    async def main(engine):
        assert (root.handlers, root.level, os.environ.get("PYTHONWARNINGS")) == before[:3]
        assert signal.getsignal(signal.SIGQUIT) is not before[3]
        assert package.Engine.made[0].quieted == "ignore"

    with_engine(main)
    assert asyncio.get_event_loop_policy() is policy
    assert (root.handlers[:], root.level, os.environ.get("PYTHONWARNINGS"), signal.getsignal(signal.SIGQUIT)) == before


def test_an_engine_that_does_not_start_says_why_and_leaves_nothing(package):
    def fail():
        raise RuntimeError("\n  no room on the GPU\nand more")

    package.Engine.on_start = staticmethod(fail)
    before = signal.getsignal(signal.SIGQUIT)
    with pytest.raises(EngineError, match=r"^the SGLang generator engine did not start: no room on the GPU$"):
        SGLangEngine(CONFIG)
    assert package.Engine.made[0].child.poll() is not None
    assert signal.getsignal(signal.SIGQUIT) == before


def test_a_process_that_fails_at_the_start_without_a_word(package):
    release = threading.Event()

    def fail():
        os.kill(os.getpid(), signal.SIGQUIT)
        release.wait(30)
        raise SystemExit

    package.Engine.on_start = staticmethod(fail)
    with pytest.raises(EngineError, match="did not start: one of its processes failed; its messages are above"):
        SGLangEngine(CONFIG, start_grace_s=0.1)
    release.set()
    for thread in threading.enumerate():
        if thread.name == "sglang":
            thread.join(10)


# Requests


def test_replies_and_what_is_told_of_it(package):
    package.Engine.answer = staticmethod(written)

    async def main(engine):
        assert await engine.generate([REQUEST, Request([4], 1)]) == [
            Reply([7, 7], "length", 3, 1), Reply([7], "length", 1, 1),
        ]  # fmt: skip
        assert await engine.generate([]) == []
        with pytest.raises(ValueError, match="longer than the generator's context of 2046"):
            await engine.generate([Request([1], 2046)])
        said = engine.describe()
        assert (said["sglang"], said["context_length"], said["kv_pool_tokens"]) == (TESTED_VERSION, 2046, 8192)
        assert set(DESCRIBED_SETTINGS) <= set(said)

    with_engine(main)
    (engine,) = package.Engine.made
    assert (engine.settings["model_path"], engine.settings["device"]) == ("folder", "cpu")


def test_each_request_is_asked_with_its_own_settings(package):
    asked = []
    package.Engine.answer = staticmethod(lambda ids, params: asked.append((ids, params)) or written(ids, params))
    requests = [Request([i], i, temperature=i / 10, top_p=1 - i / 10, stop_ids=(i, 99), seed=70 + i) for i in (1, 2)]
    for deterministic in (False, True):
        config = replace(CONFIG, deterministic=deterministic, device="cuda:1")
        replies = with_engine(lambda engine: engine.generate(requests), config)
        assert [len(reply.token_ids) for reply in replies] == [1, 2]
    assert asked == [
        ([i], {"max_new_tokens": i, "temperature": i / 10, "top_p": 1 - i / 10, "ignore_eos": False,
               "stop_token_ids": [i, 99]} | ({"sampling_seed": 70 + i} if deterministic else {}))
        for deterministic in (False, True) for i in (1, 2)
    ]  # fmt: skip
    assert [engine.settings["base_gpu_id"] for engine in package.Engine.made] == [1, 1]


@pytest.fixture
def flags_of_sglang(monkeypatch):
    parser = argparse.ArgumentParser()
    for name in ("--dp-size", "--attn-dp-size"):
        parser.add_argument(name, type=int)
    monkeypatch.setattr(sglang_local, "command_line", lambda: parser)


@pytest.mark.parametrize("setting", ["dp_size=3", "attn_dp_size=3"])
def test_each_group_stays_on_one_data_parallel_rank(package, flags_of_sglang, setting):
    """sglang by itself goes from rank to rank, so the next round's prefixes were read on another one."""
    package.Engine.answer = staticmethod(written)

    async def main(engine):
        for _ in range(4):
            rounds = [[Request([number], 2, group=f"{number}/0")] * 4 for number in range(7)]
            await asyncio.gather(*(engine.generate(requests) for requests in rounds))

    with_engine(main, replace(CONFIG, sglang_args=(setting,)))
    ranks = {number: {rank for rank, first in package.Engine.made[0].routed if first == number} for number in range(7)}
    assert all(len(mine) == 1 for mine in ranks.values())
    assert sorted(Counter(rank for mine in ranks.values() for rank in mine).values()) == [2, 2, 3]


def test_requests_of_several_groups_in_one_call_come_back_in_order(package, flags_of_sglang):
    package.Engine.answer = staticmethod(lambda ids, params: written(ids, params) | {"output_ids": [ids[0]] * 2})
    requests = [Request([number], 2, group=f"{number % 5}" if number % 3 else "") for number in range(30)]

    async def main(engine):
        assert [reply.token_ids[0] for reply in await engine.generate(requests)] == list(range(30))
        assert len({rank for rank, _ in package.Engine.made[0].routed}) == 2

    with_engine(main, replace(CONFIG, sglang_args=("dp_size=2",)))


def test_one_rank_is_not_named_and_a_call_stays_one(package):
    package.Engine.answer = staticmethod(written)
    requests = [Request([number], 2, group=str(number)) for number in range(3)]
    with_engine(lambda engine: engine.generate(requests))
    assert package.Engine.made[0].routed == [(None, 0), (None, 1), (None, 2)]


def test_a_cancelled_call_is_aborted_on_every_rank(package, flags_of_sglang):
    requests = [Request([number], 2, group=str(number)) for number in range(4)]

    async def main(engine):
        running = await asked(package, requests, engine)
        await until(lambda: len(package.Engine.made[0].routed) == 4)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: package.Engine.made[0].aborted == 2)
        await until(lambda: not any(entry.running for entry in engine._placement._groups.values()))

    with_engine(main, replace(CONFIG, sglang_args=("dp_size=2",)))


def test_few_searches_for_many_ranks_are_said(package, flags_of_sglang, caplog):
    with_engine(lambda engine: asyncio.sleep(0), replace(CONFIG, sglang_args=("dp_size=2",), groups_at_once=15))
    assert "15 at once for 2 data-parallel ranks" in caplog.text


def test_seeds_go_with_the_sampler_that_draws_by_them(package):
    asked = []
    package.Engine.answer = staticmethod(lambda ids, params: asked.append(params) or written(ids, params))
    for seeded in (False, True):
        with_engine(lambda engine: engine.generate([REQUEST]), replace(CONFIG, seeded=seeded))
    assert [engine.processor for engine in package.Engine.made] == [None, logit_processor()]
    assert asked == [sampling_params(REQUEST, False, seeded) for seeded in (False, True)]


def test_a_request_that_takes_too_long(package):
    with pytest.raises(EngineError, match=r"did not write 2 tokens within --request_timeout 0.05 s"):
        with_engine(lambda engine: engine.generate([REQUEST]), replace(CONFIG, request_timeout_s=0.05))
    assert package.Engine.made[0].aborted == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("too long"), "SGLang refused a request: too long"),
        (HTTPException("cache full"), "SGLang failed on a request: cache full"),
    ],
)
def test_a_request_that_fails(package, error, message):
    def fail(ids, params):
        raise error

    package.Engine.answer = staticmethod(fail)
    with pytest.raises(EngineError, match=message):
        with_engine(lambda engine: engine.generate([REQUEST]))


def test_a_cancelled_request_is_aborted(package):
    async def main(engine):
        running = await asked(package, [REQUEST], engine)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: package.Engine.made[0].aborted)

    with_engine(main)


# The end


def test_close_ends_its_requests_its_processes_and_its_contexts_alone(package, monkeypatch):
    other, context = subprocess.Popen(["sleep", "60"]), Context()

    async def main(engine):
        running = await asked(package, [REQUEST], engine)
        await engine.close()
        with pytest.raises(EngineError, match="has been closed"):
            await running
        with pytest.raises(EngineError, match="has been closed"):
            await engine.generate([REQUEST])

    unregistered = []
    monkeypatch.setattr(atexit, "unregister", unregistered.append)
    with_engine(main)  # which closes it again
    (engine,) = package.Engine.made
    assert unregistered == [engine.shutdown], "it would kill every child of this process at its exit"
    assert engine.child.poll() is not None
    assert engine.context.destroyed
    assert not context.destroyed
    assert other.poll() is None
    other.kill()
    other.wait()


@pytest.mark.parametrize("how", ["its process", "its manager"])
def test_its_death_ends_every_request_with_one_line(package, how):
    async def main(engine):
        running = [await asked(package, [REQUEST], engine) for _ in range(3)]
        if how == "its process":
            package.Engine.made[0].child.kill()
            os.kill(os.getpid(), signal.SIGQUIT)  # as sglang's children do
        else:  # as the manager would end this process, from its own thread
            manager = sys.modules["sglang.srt.managers.tokenizer_manager"]
            await asyncio.to_thread(manager.kill_process_tree, os.getpid(), include_parent=True)
        for task in running:
            with pytest.raises(
                EngineError, match=r"^the SGLang generator engine died: .* failed \(its messages are above\)$"
            ):
                await task
        with pytest.raises(EngineError, match="died"):
            await engine.generate([REQUEST])

    with_engine(main)
    assert package.Engine.made[0].child.poll() is not None
