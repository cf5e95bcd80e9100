"""The value engine in this process beside the generator's, with a fake package in the place of sglang: quick, and anywhere."""

import asyncio
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
from test_sglang_insides import CONFIG, REQUEST, package, until, written  # noqa: F401

from common_lib.cli import ArgumentParser, UserError
from engine_lib import sglang_import, sglang_process, value_server, value_settings
from engine_lib.base import EngineError
from engine_lib.retry import RetryPolicy
from engine_lib.sglang_import import TESTED_VERSION
from engine_lib.sglang_local import SGLangEngine
from engine_lib.sglang_value_local import SGLangValueEngine
from engine_lib.value_base import ValueConfig, Valued
from engine_lib.value_settings import PACKAGE, ROOT

MODEL = f"{PACKAGE}.qwen2"
HALF = [0.0, 0.0, -1000.0]  # logits of a value of 0.5


def answer(ids: list[int], finish: str = "length", logits=HALF) -> dict:
    return {"embedding": [*logits, float(len(ids))], "meta_info": {"finish_reason": {"type": finish}}}


class Requests:
    """What came, and `reply(ids)` for each; None: it is never answered."""

    def __init__(self):
        self.asked, self.ids, self.cancelled = [], set(), 0
        self.reply = answer

    async def generate_request(self, request, _):
        self.asked += request.input_ids
        assert not self.ids & set(request.rid), "an id that is used again is counted together"
        self.ids |= set(request.rid)
        if self.reply is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        yield [self.reply(ids) for ids in request.input_ids]


@pytest.fixture(scope="module")
def value_folder_of_3(tmp_path_factory):
    return tiny.save_value_model(tmp_path_factory.mktemp("value"), tokenizer=False)


@pytest.fixture
def requests(package, monkeypatch):  # noqa: F811
    """Of every value engine that is made."""
    requests = Requests()
    module = ModuleType("sglang.srt.managers.io_struct")
    module.EmbeddingReqInput = SimpleNamespace
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, MODEL, ModuleType(MODEL))  # the real one needs the real package
    old = package.Engine.__init__

    def init(self, **settings):
        self.packages = {name: os.environ.get(name) for name in ("SGLANG_EXTERNAL_MODEL_PACKAGE", "PYTHONPATH")}
        old(self, **settings)
        self.tokenizer_manager.generate_request = requests.generate_request

    monkeypatch.setattr(package.Engine, "__init__", init)
    monkeypatch.setattr(value_settings, "SHARE_OF_RAM", 0.25)
    return requests


@pytest.fixture
def config(value_folder_of_3):
    return ValueConfig(str(value_folder_of_3), vocab_size=100, num_labels=3, dtype="fp32")


def with_value_engine(main, config):
    async def run(engine):
        engine.retry = RetryPolicy(attempts=3, pause_s=0.001)
        try:
            return await main(engine)
        finally:
            await engine.close()

    return asyncio.run(run(SGLangValueEngine(config)))


def test_a_batch_is_one_request_and_comes_back_in_order(requests, config):
    traces = [[1] * length for length in (3, 1, 7)]
    valued = with_value_engine(lambda engine: engine.values(traces, "0/0"), config)
    assert valued == [Valued(0.5, 3), Valued(0.5, 1), Valued(0.5, 7)]
    assert requests.asked == traces


def test_how_it_is_started(requests, package, config, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "theirs")
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    with_value_engine(lambda engine: asyncio.sleep(0), config)
    with_value_engine(lambda engine: asyncio.sleep(0), replace(config, device="cuda:2", dtype="bf16"))
    cpu, gpu = package.Engine.made
    for engine in (cpu, gpu):
        assert engine.packages == {
            "SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE, "PYTHONPATH": os.pathsep.join([ROOT, "somewhere"])
        }  # fmt: skip
        needed = ("is_embedding", "skip_tokenizer_init", "page_size", "cuda_graph_backend_prefill")
        assert [engine.settings[name] for name in needed] == [True, True, 1, "disabled"]
    assert os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "theirs", "the generator's processes would get ours"
    named = ("device", "dtype", "mem_fraction_static")
    assert [cpu.settings[name] for name in named] == ["cpu", "float32", 0.25]
    assert [gpu.settings[name] for name in (*named, "base_gpu_id")] == ["cuda", "bfloat16", 0.8, 2]


@pytest.mark.parametrize("where", ["in process", "a server"])
def test_a_model_package_that_does_not_load_is_one_line_before_the_start(requests, package, config, monkeypatch, where):  # noqa: F811
    """SGLang says nothing of it where it shows errors alone, and then that it may have run out of memory."""
    monkeypatch.delitem(sys.modules, MODEL)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.pooler", None)
    monkeypatch.setattr(sglang_import, "command_line", lambda: ArgumentParser(add_help=False))
    with pytest.raises(
        UserError, match=rf"package {PACKAGE} does not load \(ModuleNotFoundError: .*sglang\.srt\."
    ) as error:
        SGLangValueEngine(config) if where == "in process" else value_server.serve([], [])
    assert f"written for sglang {TESTED_VERSION}, and {TESTED_VERSION} is installed" in str(error.value)
    assert "\n" not in str(error.value) and not package.Engine.made


def test_aborted_requests_alone_are_sent_again(requests, config):
    finish = iter(["length", "abort", "length", "abort", "length"])
    requests.reply = lambda ids: answer(ids, next(finish))  # an abort in mid-prompt has the row of the chunk before
    traces = [[1], [2, 2], [3, 3, 3]]
    valued = with_value_engine(lambda engine: engine.values(traces, "0/0"), config)
    assert [value.tokens_computed for value in valued] == [1, 2, 3]
    assert requests.asked == [*traces, [2, 2], [2, 2]]


def test_aborts_without_end_are_one_line_and_it_answers_the_next(requests, config):
    async def main(engine):
        requests.reply = lambda ids: {"meta_info": {"finish_reason": {"type": "abort"}}}
        with pytest.raises(EngineError, match=r"^the SGLang value engine failed 3 times \(got abort\)$"):
            await engine.values([[1], [2]], "0/0")
        requests.reply = lambda ids: answer(ids, logits=[float("nan")] * 3)
        with pytest.raises(EngineError, match="are no numbers to compare by"):
            await engine.values([[1]], "0/0")
        requests.reply = lambda ids: {"embedding": [0.0] * 32, "meta_info": {"finish_reason": {"type": "length"}}}
        with pytest.raises(EngineError, match="it serves another model, or the package .* failed to load"):
            await engine.values([[1]], "0/0")
        requests.reply = answer
        assert await engine.values([[1]], "0/0") == [Valued(0.5, 1)]

    with_value_engine(main, config)


@pytest.mark.parametrize("trace", [[], [100], [-1], [1] * 2047])
def test_nothing_that_kills_or_hangs_is_sent(requests, config, trace):
    async def main(engine):
        assert (engine.context_length, engine.pool_tokens) == (2046, 8192)
        with pytest.raises(ValueError, match="trace|token id"):
            await engine.values([[1], trace], "0/0")

    with_value_engine(main, config)
    assert requests.asked == []


def test_a_call_that_takes_too_long_is_aborted(requests, config):
    requests.reply = None
    with pytest.raises(EngineError, match=r"did not score 2 traces within --request_timeout 0.05 s"):
        with_value_engine(lambda engine: engine.values([[1], [2]], "0/0"), replace(config, request_timeout_s=0.05))
    assert requests.cancelled == 1


def test_a_call_that_is_made_as_the_engine_dies_ends(requests, config, monkeypatch):
    """The death is told by another thread, and may fall between any two lines."""
    requests.reply = None
    begin = asyncio.run_coroutine_threadsafe

    async def main(engine):
        def begin_and_die(*args):
            future = begin(*args)
            engine._process.died("at once")
            return future

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", begin_and_die)
        async with asyncio.timeout(5):
            with pytest.raises(EngineError, match="died: at once"):
                await engine.values([[1]], "0/0")

    with_value_engine(main, config)


def test_another_backbone_is_refused_by_name(requests, package, config, tmp_path):  # noqa: F811
    text = (Path(config.model_path) / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace("Qwen2ForClassifier", "Qwen3ForClassifier").replace("qwen2", "qwen3")
    )
    with pytest.raises(
        UserError, match=r"is a Qwen3ForClassifier with a qwen3 backbone; SGLang serves Qwen2ForClassifier"
    ):
        SGLangValueEngine(replace(config, model_path=str(tmp_path)))
    assert not package.Engine.made


def test_a_cache_that_sglang_switched_off_is_said(requests, package, config, caplog):  # noqa: F811
    package.Engine.on_start = staticmethod(lambda: None)
    with_value_engine(lambda engine: asyncio.sleep(0), config)
    assert "SGLang has switched its radix cache off" in caplog.text  # the fake says 1 of each setting


# Beside a generator


@pytest.fixture
def both(requests, package, config):  # noqa: F811
    package.Engine.answer = None
    requests.reply = None
    before = signal.getsignal(signal.SIGQUIT)
    generator = SGLangEngine(CONFIG)
    value = SGLangValueEngine(config)
    yield generator, value
    for engine in (generator, value):
        asyncio.run(engine.close())
    assert signal.getsignal(signal.SIGQUIT) == before


async def both_asked(generator, value, requests):
    tasks = asyncio.create_task(generator.generate([REQUEST])), asyncio.create_task(value.values([[1]], "0/0"))
    await until(lambda: generator._engine.asked.is_set() and requests.asked)
    return tasks


async def only_one_died(dead, other, name: str, how: str):
    with pytest.raises(EngineError, match=rf"^the SGLang {name} engine died: {how} failed \(its messages are above\)$"):
        async with asyncio.timeout(5):
            await dead
    await asyncio.sleep(0.02)
    assert not other.done()
    other.cancel()


@pytest.mark.parametrize("first", [True, False])
def test_a_process_that_dies_ends_its_own_engine(both, requests, first):
    async def main():
        generator, value = both
        tasks = await both_asked(generator, value, requests)
        dead, other = tasks if first else tasks[::-1]
        both[0 if first else 1]._engine.child.kill()
        os.kill(os.getpid(), signal.SIGQUIT)
        await only_one_died(dead, other, "generator" if first else "value", "one of its processes")
        os.kill(os.getpid(), signal.SIGQUIT)  # the watchdog says it again
        await asyncio.sleep(0.05)
        assert not both[1 if first else 0]._process.end

    asyncio.run(main())


@pytest.mark.parametrize("first", [True, False])
def test_a_manager_that_fails_ends_its_own_engine(both, requests, first):
    async def main():
        tasks = await both_asked(*both, requests)
        dead, other = tasks if first else tasks[::-1]
        manager = sys.modules["sglang.srt.managers.tokenizer_manager"]
        both[0 if first else 1]._process._loop.call_soon_threadsafe(manager.kill_process_tree, os.getpid())
        await only_one_died(dead, other, "generator" if first else "value", "its tokenizer manager")

    asyncio.run(main())


def test_a_word_that_nobody_explains_ends_both_unless_one_is_gone(both, requests, monkeypatch):
    monkeypatch.setattr(sglang_process, "PATIENCE_S", 0.05)
    monkeypatch.setattr(sglang_process._DEATHS, "_some_gone", True)

    async def main():
        tasks = await both_asked(*both, requests)
        os.kill(os.getpid(), signal.SIGQUIT)
        await asyncio.sleep(0.15)
        assert not any(task.done() for task in tasks)
        monkeypatch.undo()
        monkeypatch.setattr(sglang_process, "PATIENCE_S", 0.05)
        os.kill(os.getpid(), signal.SIGQUIT)
        for task, name in zip(tasks, ("generator", "value"), strict=True):
            with pytest.raises(EngineError, match=f"the SGLang {name} engine died"):
                await task

    asyncio.run(main())


@pytest.mark.parametrize("first", [True, False])
def test_closing_one_leaves_the_other(both, requests, first):
    async def main():
        tasks = await both_asked(*both, requests)
        closed, other = both if first else both[::-1]
        await closed.close()
        assert closed._engine.child.poll() is not None
        assert closed._engine.context.destroyed
        assert other._engine.child.poll() is None
        assert not other._engine.context.destroyed
        assert not tasks[1 if first else 0].done()
        other._engine.child.kill()
        os.kill(os.getpid(), signal.SIGQUIT)
        with pytest.raises(EngineError, match=f"the SGLang {'value' if first else 'generator'} engine died"):
            await tasks[1 if first else 0]

    asyncio.run(main())


def test_what_sglang_keeps_for_the_process_stays_the_generators(both, package):  # noqa: F811
    kept = package.Engine.process
    assert {kept._server_args, kept._config_bags, kept._overrides_log, kept._publish_role} == {"folder"}
    assert kept.parallel._config == "folder"


def test_a_value_engine_that_does_not_start_leaves_the_generator(requests, package, config):  # noqa: F811
    package.Engine.answer = staticmethod(written)
    generator = SGLangEngine(CONFIG)

    def fail():
        os.kill(os.getpid(), signal.SIGQUIT)
        raise RuntimeError("no room")

    package.Engine.on_start = staticmethod(fail)
    with pytest.raises(EngineError, match=r"^the SGLang value engine did not start: no room$"):
        SGLangValueEngine(config)
    assert package.Engine.made[1].child.poll() is not None
    assert len(asyncio.run(generator.generate([REQUEST]))) == 1
    asyncio.run(generator.close())


def test_a_start_that_fails_without_a_word_beside_the_generator(requests, package, config, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sglang_process, "PATIENCE_S", 0.05)
    generator = SGLangEngine(CONFIG)
    release = threading.Event()

    def fail():
        os.kill(os.getpid(), signal.SIGQUIT)
        release.wait(30)
        raise SystemExit

    package.Engine.on_start = staticmethod(fail)
    with pytest.raises(EngineError, match=r"^the SGLang value engine did not start: one of its processes failed"):
        SGLangValueEngine(config, start_grace_s=0.1)
    release.set()
    assert not generator._process.end
    asyncio.run(generator.close())
