"""The real SGLang engine in this process, on a CPU. Skipped where sglang is not installed: see scripts/install_sglang_cpu.sh.

(Searches of inference_eval.py through it, and through servers, are in test_sglang_runs.py.)
"""

import asyncio
import importlib.util
import json
import random
import signal
import time

import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("sglang is not installed; bash scripts/install_sglang_cpu.sh FOLDER does it", allow_module_level=True)

import logging
import os

import psutil
import tiny
from sglang_host import TWO_RANKS, wait_until

from classifier_lib import ValueScorer
from common_lib.cli import UserError
from engine_lib.base import EngineConfig, EngineError, Request
from engine_lib.choose import make_engine
from engine_lib.sglang_import import TESTED_VERSION, command_line
from engine_lib.sglang_wire import parse_sglang_args
from engine_lib.transformers_engine import TransformersEngine
from search_lib.scorers import ScorerThread
from search_lib.search import search
from search_lib.tree import SearchConfig, SearchTask

STOPS = (5, 77, 200, 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_generator(tmp_path_factory.mktemp("generator"))


def new_engine(folder, sglang_args=("max_total_tokens=16384", "max-running-requests=64"), **settings):
    config = EngineConfig(
        str(folder), 264, seed=1, samples=False, request_timeout_s=120.0, sglang_args=sglang_args, **settings
    )
    return make_engine("sglang", config)


@pytest.fixture(scope="module")
def engine(folder, fork):
    before = logging.getLogger().handlers[:], logging.getLogger().level, asyncio.get_event_loop_policy()
    handler = signal.getsignal(signal.SIGTERM)
    engine = new_engine(folder)
    # sglang replaces all of these where it can
    assert before == (logging.getLogger().handlers[:], logging.getLogger().level, asyncio.get_event_loop_policy())
    yield engine
    assert signal.getsignal(signal.SIGTERM) == handler
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def reference(folder):
    return TransformersEngine(EngineConfig(str(folder), 264))


def some_requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy ones of many lengths, some with stop tokens."""
    rng = random.Random(seed)
    return [
        Request(
            [rng.randrange(256) for _ in range(rng.randint(1, 40))], rng.randint(1, 60), temperature=0,
            stop_ids=rng.choice([(), STOPS]),
        )
        for _ in range(count)
    ]  # fmt: skip


def test_greedy_replies_equal_the_transformers_engine(engine, reference):
    requests = some_requests(40)
    replies = asyncio.run(engine.generate(requests))
    expected = asyncio.run(reference.generate(requests))
    assert [(r.token_ids, r.finish_reason, r.prompt_tokens) for r in replies] == [
        (r.token_ids, r.finish_reason, r.prompt_tokens) for r in expected
    ]
    assert {r.finish_reason for r in replies} == {"stop", "length"}


def test_what_it_wrote_is_read_from_its_cache(engine):
    prompt = random.Random(9).choices(range(256), k=50)
    (first,) = asyncio.run(engine.generate([Request(prompt, 30, temperature=0)]))
    extended = prompt + first.token_ids
    replies = asyncio.run(engine.generate([Request(extended, 8, temperature=0)] * 4))
    assert [(r.prompt_tokens, r.cached_tokens) for r in replies] == [(80, 79)] * 4  # all but the last token


def test_the_longest_request_is_written_whole(engine, reference):
    assert engine.context_length == 2046  # of 2048: SGLang would cut two tokens off
    for prompt_length in (1500, 2040):
        request = Request([3] * prompt_length, engine.context_length - prompt_length, temperature=0)
        (reply,) = asyncio.run(engine.generate([request]))
        assert (len(reply.token_ids), reply.finish_reason) == (request.max_new_tokens, "length")
    with pytest.raises(ValueError, match="longer than the generator's context of 2046"):
        asyncio.run(engine.generate([Request([3] * 1000, 1047)]))


def test_ids_that_would_kill_it_are_refused(engine):
    for ids, message in (([264], "token id 264"), ([-1], "token id -1"), ([], "empty prompt")):
        with pytest.raises(ValueError, match=message):
            asyncio.run(engine.generate([Request(ids, 4)]))
    assert len(asyncio.run(engine.generate(some_requests(3)))) == 3


def test_sampling_draws_what_the_model_says(engine, reference):
    """One token after one prompt, many times: the frequencies are the probabilities, cut at top_p."""
    import torch

    prompt, count = [7, 8, 9], 600
    with torch.no_grad():
        logits = tiny.tiny_generator()(torch.tensor([prompt])).logits[0, -1]
    probs = torch.softmax(logits / 2.0, dim=-1).sort(descending=True)
    kept = [
        i
        for i, p in zip(probs.indices.tolist(), (probs.values.cumsum(0) - probs.values).tolist(), strict=True)
        if p < 0.7
    ]
    assert len(kept) > 2
    request = Request(prompt, 1, temperature=2.0, top_p=0.7)
    drawn = [reply.token_ids[0] for reply in asyncio.run(engine.generate([request] * count))]
    assert set(drawn) <= set(kept)
    total = sum(torch.softmax(logits / 2.0, dim=-1)[kept]).item()
    for token in kept[:3]:
        share = (torch.softmax(logits / 2.0, dim=-1)[token] / total).item()
        assert drawn.count(token) / count == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)


@pytest.mark.parametrize("config", [SearchConfig(3, 2, 16, 64), SearchConfig(1, 4, 24, 60)])
def test_greedy_searches_equal_those_of_the_transformers_engine(engine, reference, config):
    tasks = [SearchTask(i, 0, tuple(random.Random(i).choices(range(256), k=10 + i))) for i in range(6)]

    async def run(generator):
        scorer = ScorerThread(ValueScorer(tiny.tiny_value_model(), 1 << 24))

        async def generate(prompt_ids, n, max_new_tokens, seeds, tree_id):
            return await generator.generate(
                [Request(prompt_ids, max_new_tokens, 0, 1.0, STOPS, s, tree_id) for s in seeds]
            )

        try:
            return await asyncio.gather(*(search(task, generate, scorer, config) for task in tasks))
        finally:
            await scorer.close()

    for result, expected in zip(asyncio.run(run(engine)), asyncio.run(run(reference)), strict=True):
        tree, other = result.tree, expected.tree
        assert (tree.parent, tree.tokens, tree.finish, tree.beams) == (
            other.parent,
            other.tokens,
            other.finish,
            other.beams,
        )
        assert tree.value[1:] == pytest.approx(other.value[1:], abs=1e-6)


def test_a_cancelled_request_is_aborted(engine):
    async def main():
        running = asyncio.create_task(engine.generate([Request([1, 2], 2000, stop_ids=())] * 8))
        states = engine._engine.tokenizer_manager.rid_to_state
        await asyncio.to_thread(wait_until, lambda: len(states) == 8, 10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.to_thread(wait_until, lambda: not states, 10)

    asyncio.run(main())
    assert len(asyncio.run(engine.generate(some_requests(2)))) == 2


def test_the_time_limit_of_a_request(engine, monkeypatch):
    monkeypatch.setattr(engine, "request_timeout_s", 0.2)
    with pytest.raises(EngineError, match=r"did not write 2000 tokens within --request_timeout 0.2 s"):
        asyncio.run(engine.generate([Request([1, 2], 2000)]))
    monkeypatch.undo()
    assert len(asyncio.run(engine.generate(some_requests(2)))) == 2


def test_it_says_what_it_is(engine):
    said = engine.describe()
    assert (said["name"], said["sglang"], said["kv_pool_tokens"]) == ("sglang", TESTED_VERSION, 16384)
    assert (said["device"], said["dtype"], said["disable_radix_cache"]) == ("cpu", "float32", False)
    json.dumps(said)


# Settings


def test_a_setting_that_sglang_does_not_know(folder):
    with pytest.raises(UserError, match=r"'tp_sizee' is no setting of SGLang's server; the nearest is 'tp_size'"):
        new_engine(folder, ["tp_sizee=2"])
    with pytest.raises(UserError, match=r"tp_size='two' cannot be read: .*invalid int value: 'two'"):
        new_engine(folder, ["tp_size=two"])
    with pytest.raises(UserError, match=r"attention_backend='fastest' cannot be read: .*flashinfer"):
        new_engine(folder, ["attention_backend=fastest"])
    with pytest.raises(UserError, match=r"'tp_size' has no '='; give KEY=VALUE"):
        new_engine(folder, ["tp_size"])
    with pytest.raises(UserError, match="--deterministic needs a GPU"):
        new_engine(folder, deterministic=True)


def test_settings_are_read_as_sglangs_command_line_reads_them():
    given = [
        "tp-size=2",
        "context_length=32k",
        "disable_overlap_schedule=false",
        "mem_fraction_static=0.3",
        "--log-level=info",
    ]
    assert parse_sglang_args(given, command_line()) == {
        "tp_size": 2, "context_length": 32000, "disable_overlap_schedule": False, "mem_fraction_static": 0.3,
        "log_level": "info",
    }  # fmt: skip


# Data-parallel ranks


def test_searches_stay_on_the_rank_that_has_read_their_prefixes(folder, fork, monkeypatch):
    """Three searches on two ranks, each round's requests one after the other: left to itself sglang would send every
    second one to the rank that has not read it."""
    for name, value in TWO_RANKS.items():
        monkeypatch.setenv(name, value)
    two = new_engine(folder, ("max_total_tokens=16384", "max_running_requests=64", "dp_size=2"))

    async def main():
        prompts = {f"{i}/0": random.Random(i).choices(range(256), k=60) for i in range(3)}
        cached = []
        for _ in range(3):
            for group, prompt in prompts.items():
                replies = [(await two.generate([Request(prompt, 8, temperature=0, group=group)]))[0] for _ in range(2)]
                cached += [(reply.prompt_tokens, reply.cached_tokens) for reply in replies]
                prompt += replies[0].token_ids
        ranks = {group: entry.place for group, entry in two._placement._groups.items()}
        await two.close()
        return cached, ranks

    cached, ranks = asyncio.run(main())
    assert list(ranks.values()) in ([0, 1, 0], [1, 0, 1])
    assert cached == [(60, 0), (60, 59)] * 3 + [(68, 67)] * 6 + [(76, 75)] * 6
    assert two.describe()["dp_size"] == 2


# Death: last in this file, with engines of their own


def test_an_engine_that_dies_ends_every_request_with_one_line(folder, fork, engine):
    async def main():
        doomed = new_engine(folder)
        others = set(psutil.Process().children(recursive=True))
        running = [asyncio.create_task(doomed.generate([Request([i], 2000)] * 4)) for i in range(3)]
        states = doomed._engine.tokenizer_manager.rid_to_state
        await asyncio.to_thread(wait_until, lambda: len(states) == 12, 10)
        os.kill(doomed._engine.get_all_child_pids()[0], signal.SIGKILL)
        begin = time.monotonic()
        for task in running:
            with pytest.raises(
                EngineError, match=r"^the SGLang generator engine died: one of its processes failed .*$"
            ):
                await task
        assert time.monotonic() - begin < 10
        with pytest.raises(EngineError, match="died"):
            await doomed.generate(some_requests(1))
        await doomed.close()
        return others, set(doomed._engine.get_all_child_pids())

    others, own = asyncio.run(main())
    left = {process.pid for process in others if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}
    assert not left & own
    # the other engine's processes are not its business
    assert set(engine._engine.get_all_child_pids()) <= left
    assert len(asyncio.run(engine.generate(some_requests(2)))) == 2


def test_an_engine_that_does_not_start_says_so(folder, fork, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    count = len(psutil.Process().children(recursive=True))
    with pytest.raises(EngineError, match=r"^the SGLang generator engine did not start: .*$"):
        new_engine(tmp_path)
    wait_until(lambda: len(psutil.Process().children(recursive=True)) <= count, 10)
