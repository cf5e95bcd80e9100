"""The value model on the real SGLang engine in this process, on a CPU, beside a generator. Skipped where sglang is not
installed: see scripts/install_sglang_cpu.sh. The tests use up the engines: they stand in the order in which they run."""

import asyncio
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import urllib.request
from dataclasses import replace

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import tiny
import torch
from sglang.srt.managers.io_struct import EmbeddingReqInput
from sglang_host import Server, free_port, wait_until

from engine_lib import value_server
from engine_lib.base import EngineConfig, EngineError, Request
from engine_lib.sglang_import import TESTED_VERSION
from engine_lib.sglang_local import SGLangEngine
from engine_lib.sglang_value_local import SGLangValueEngine
from engine_lib.sglang_value_model.qwen2 import EntryClass
from engine_lib.value_base import ValueConfig
from engine_lib.value_wire import read_positions, read_row, read_vocabulary, row_of

POISON = 263  # a token whose embedding is NaN, in the model of 3 labels
ARGS = ("max_running_requests=64", "chunked_prefill_size=64")


def poisoned(num_labels: int):
    model = tiny.tiny_value_model(num_labels=num_labels)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    return model


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


@pytest.fixture(scope="module")
def models():
    return {3: poisoned(3), 1: tiny.tiny_value_model(num_labels=1)}


@pytest.fixture(scope="module")
def config(models, tmp_path_factory):
    """Of the value engine with 3 labels; its folder is bare, as the released one is."""
    folder = tmp_path_factory.mktemp("value")
    models[3].save_pretrained(folder)
    return ValueConfig(str(folder), 264, 3, request_timeout_s=60.0, sglang_args=("max_total_tokens=8192", *ARGS))


@pytest.fixture(scope="module")
def generator(tmp_path_factory, fork):
    """It is started first, and draws by seeds, which SGLang has to be told at its start."""
    folder = tiny.save_generator(tmp_path_factory.mktemp("generator"))
    engine = SGLangEngine(EngineConfig(str(folder), 264, seeded=True, sglang_args=("max_total_tokens=8192",)))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def engine(generator, config):
    engine = SGLangValueEngine(config)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def small(engine, models, tmp_path_factory):
    """One label, and a pool that is smaller than the model's context."""
    folder = tmp_path_factory.mktemp("one")
    models[1].save_pretrained(folder)
    args = ("max_total_tokens=1000", "max_running_requests=64")
    engine = SGLangValueEngine(ValueConfig(str(folder), 264, 1, request_timeout_s=60.0, sglang_args=args))
    yield engine
    asyncio.run(engine.close())


def ask(engine, *traces):
    return asyncio.run(engine.values(traces, "0/0"))


def full_pass(model, trace):
    with torch.no_grad():
        return model(torch.tensor([trace])).success_probs[0].tolist()


def write(generator, seed=5):
    return asyncio.run(generator.generate([Request([1, 2, 3], 6, 1.0, 1.0, (), seed)]))[0].token_ids


def test_a_server_is_started_by_its_module(fork, config, models):
    """As a process that has SGLang imported, which saves half a minute."""
    port = free_port()
    flags = [
        "--classifier_ckpt_path",
        config.model_path,
        "--port",
        str(port),
        "--device",
        "cpu",
        "--log-level",
        "error",
    ]
    server = multiprocessing.get_context("fork").Process(
        target=value_server.main, args=([*flags, "--max-total-tokens", "2048", "--skip-server-warmup"],)
    )
    server.start()
    served = Server(server.pid, None, port)
    try:
        wait_until(lambda: served.running and served.is_up(), 90)
        assert served.get("model_info")["architectures"] == ["Qwen2ForClassifier"]
        body = json.dumps({"input_ids": [[1, 2, 3], [4, 5]]}).encode()
        request = urllib.request.Request(f"{served.url}/encode", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            valued = [read_row(row_of(output), 3) for output in json.load(reply)]
        assert [got.value for got in valued] == pytest.approx(
            [full_pass(models[3], trace)[-1] for trace in ([1, 2, 3], [4, 5])], abs=1e-5
        )
        assert [got.tokens_computed for got in valued] == [3, 2]
    finally:
        served.kill()
        server.join(10)


def test_values_are_the_classifiers_and_each_token_is_computed_once(engine, models):
    """A prompt, awaited, then its eight extensions of several chunks each, then those of one of them."""
    prompt = text(0, 150)
    (first,) = ask(engine, prompt)
    extensions = [[*prompt, i, *text(i, 69 + i)] for i in range(1, 9)]  # (no two share their first token)
    valued = [first, *ask(engine, *extensions)]
    grown = [[*extensions[4], i, *text(20 + i, 29)] for i in range(8)]
    valued += ask(engine, *grown)
    for trace, got in zip([prompt, *extensions, *grown], valued, strict=True):
        assert got.value == pytest.approx(full_pass(models[3], trace)[-1], abs=1e-5)
    assert [got.tokens_computed for got in valued] == [150, *range(71, 79), *[30] * 8]
    assert [got.tokens_computed for got in ask(engine, *grown)] == [1] * 8, "what is wholly cached"
    assert ask(engine) == []


def test_one_label(small, models):
    traces = [text(40 + i, 60 + 20 * i) for i in range(5)]
    for trace, got in zip(traces, ask(small, *traces), strict=True):
        assert got.value == pytest.approx(full_pass(models[1], trace)[-1], abs=1e-5)
        assert got.tokens_computed == len(trace)


def row_at(engine, trace, positions):
    async def embed():
        request = EmbeddingReqInput(input_ids=trace, token_indices_to_pool=positions)
        return await anext(engine._engine.tokenizer_manager.generate_request(request, None))

    return row_of(asyncio.run(engine._process.run(embed, 60, "late")))


def at_positions(engine, trace, positions):
    return read_positions(row_at(engine, trace, positions), len(positions), engine.num_labels)


def test_values_at_several_positions_over_chunks(engine, models):
    trace = text(60, 200)
    positions = [0, 63, 64, 64, 5, 150, 199]
    values, computed = at_positions(engine, trace, positions)
    expected = full_pass(models[3], trace)
    assert values == pytest.approx([expected[position] for position in positions], abs=1e-5)
    assert computed == 200
    longer = trace + text(61, 90)
    values, computed = at_positions(engine, longer, [0, 199, 200, 270, 289])
    assert values[:2] == [None, None], "their keys and values were cached"
    assert values[2:] == pytest.approx([full_pass(models[3], longer)[i] for i in (200, 270, 289)], abs=1e-5)
    assert computed == 90
    for ids in ([5], longer):  # all but the last token of the second is cached
        assert read_vocabulary(row_at(engine, ids, [len(ids) - 1]), 3) == 264


def test_what_would_kill_or_hang_it_is_refused_and_it_answers_the_next(engine, small):
    for trace, message in (
        ([], "a trace is empty"),
        ([264], "token id 264 is outside"),
        ([-1], "token id -1 is outside"),
        ([5] * 2047, "a trace of 2047 tokens is longer than the 2046"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(engine, [1, 2, 3], trace)
    with pytest.raises(ValueError, match="longer than the 998 that are served"):
        ask(small, [5] * 999)
    for served, length in ((engine, 2046), (small, 998)):
        assert ask(served, text(70, length))[0].tokens_computed == length


def test_a_nan_is_one_line_and_it_answers_the_next(engine):
    with pytest.raises(
        EngineError, match=r"^the value model gave \[nan, nan, nan\], which are no numbers to compare by$"
    ):
        ask(engine, [1, 2, 3], [1, POISON, 3])
    assert ask(engine, [1, 2, 3])[0].tokens_computed == 1


def test_an_aborted_request_is_sent_again(engine, models):
    trace = text(80, 2000)
    manager = engine._engine.tokenizer_manager
    first: list[str] = []

    async def main():
        running = asyncio.create_task(engine.values([trace], "0/0"))
        await asyncio.to_thread(wait_until, lambda: manager.rid_to_state, 10)
        first.extend(manager.rid_to_state)
        engine._process._loop.call_soon_threadsafe(manager.abort_request, first[0])
        (valued,) = await running
        return valued

    valued = asyncio.run(main())
    assert valued.value == pytest.approx(full_pass(models[3], trace)[-1], abs=1e-5)
    assert valued.tokens_computed < 2000, "it was not aborted, or counted with what was aborted"


def test_the_time_limit_and_a_cancelled_call(engine, monkeypatch):
    monkeypatch.setattr(engine, "request_timeout_s", 0.02)
    with pytest.raises(
        EngineError, match=r"^the SGLang value engine did not score 4 traces within --request_timeout 0.02 s$"
    ):
        ask(engine, *(text(90 + i, 2000) for i in range(4)))
    monkeypatch.undo()
    wait_until(lambda: not engine._engine.tokenizer_manager.rid_to_state, 20)
    assert ask(engine, [1, 2, 3])[0].tokens_computed == 1


def test_it_says_what_it_is(engine):
    said = engine.describe()
    assert (said["name"], said["sglang"], said["kv_pool_tokens"]) == ("sglang", TESTED_VERSION, engine.pool_tokens)
    assert (said["device"], said["dtype"], said["disable_radix_cache"]) == ("cpu", "float32", False)
    assert engine.pool_tokens == 8192
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in os.environ
    json.dumps(said)


def test_the_generator_keeps_its_own_settings(generator, engine):
    """SGLang has one place a process for them, and the value engine was started last."""
    assert write(generator) == write(generator) != write(generator, seed=6)


# The start


def test_a_missing_weight_of_the_backbone_stops_the_start(generator, models, config, tmp_path, capfd):
    weights = models[3].state_dict()
    del weights["model.layers.1.self_attn.k_proj.weight"]
    models[3].save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(EngineError, match=r"^the SGLang value engine did not start: .*$"):
        SGLangValueEngine(replace(config, model_path=str(tmp_path)))
    assert "has no model.layers.1.self_attn.k_proj.weight" in capfd.readouterr().err
    assert len(write(generator)) == 6


class Loaded(torch.nn.Module):
    """What the loader looks at, with a backbone of one weight."""

    load_weights = EntryClass.load_weights

    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(4)})
        head = [torch.nn.Linear(4, out, bias=False) for out in (4, 3)]
        self.score = torch.nn.Sequential(head[0], torch.nn.ReLU(), head[1])
        self.config = tiny.tiny_config()


def test_a_head_that_is_missing_or_another_is_an_error_by_name():
    whole = {"model.norm.weight": torch.ones(4), "score.0.weight": torch.ones(4, 4), "score.2.weight": torch.ones(3, 4)}
    loaded = Loaded()
    loaded.load_weights((whole | {"lm_head.weight": torch.ones(9, 9)}).items())
    assert loaded.score[2].weight.tolist() == torch.ones(3, 4).tolist()
    for changes, message in (
        ({"score.2.weight": None}, "has no score.2.weight"),
        ({"score.0.weight": None}, "has no score.0.weight"),
        ({"model.norm.weight": None}, "has no model.norm.weight"),
        ({"score.2.weight": torch.ones(1, 4)}, r"score.2.weight of shape \[1, 4\] does not fit"),
        ({"score.0.bias": torch.ones(4)}, "head has score.0.bias"),
    ):
        given = [(name, weight) for name, weight in (whole | changes).items() if weight is not None]
        with pytest.raises(ValueError, match=message):
            Loaded().load_weights(given)
    with pytest.raises(ValueError, match="backbone is 'llama'; only 'qwen2' is served"):
        EntryClass(type("Config", (), {"model_type": "llama"}))


# Deaths: each engine dies and ends alone


def kill(engine):
    os.kill(engine._engine.get_all_child_pids()[0], signal.SIGKILL)


async def dies_of(killed, running, message):
    """Kill an engine under a call; it ends with the line, and so does the next."""
    task = asyncio.create_task(running())
    await asyncio.to_thread(wait_until, lambda: killed._engine.tokenizer_manager.rid_to_state, 10)
    kill(killed)
    async with asyncio.timeout(10):
        with pytest.raises(EngineError, match=message):
            await task
        with pytest.raises(EngineError, match=message):
            await running()


def test_the_death_of_each_is_named_and_the_others_answer(generator, engine, small):
    handler = signal.getsignal(signal.SIGQUIT)
    value_died = r"^the SGLang value engine died: one of its processes failed \(its messages are above\)$"
    asyncio.run(dies_of(small, lambda: small.values([text(i, 900) for i in range(20)], ""), value_died))
    assert ask(engine, [1, 2, 3])[0].tokens_computed == 1
    assert len(write(generator)) == 6
    asyncio.run(small.close())
    assert ask(engine, [1, 2, 3])[0].tokens_computed == 1, "closing one ended another's processes"
    endless = [Request([7], 2000)] * 4
    asyncio.run(
        dies_of(generator, lambda: generator.generate(endless), r"^the SGLang generator engine died: one of its")
    )
    asyncio.run(generator.close())
    assert ask(engine, text(99, 300))[0].tokens_computed == 300
    assert signal.getsignal(signal.SIGQUIT) == handler, "the last engine's death would end this process"


def test_close_ends_it(engine):
    pids = engine._engine.get_all_child_pids()
    asyncio.run(engine.close())
    with pytest.raises(EngineError, match="the SGLang value engine has been closed"):
        ask(engine, [1, 2, 3])
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL
