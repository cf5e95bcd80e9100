"""A served value model as the search asks it: what goes first and alone, what nothing is sent of, and what it costs."""

import asyncio
import gc
import random

import pytest
from fake_value import FakeValueEngine
from simulated import SimScorer, sim_value, simple_generate

from engine_lib.base import EngineError
from engine_lib.value_base import ValueConfig
from search_lib.search import SearchError, search
from search_lib.served_scorer import ServedScorer
from search_lib.tree import SearchConfig, SearchTask

PROMPT = [5, 6, 7]
HISTORY = [(0, [10, 11]), (0, [12, 13]), (1, [14]), (2, [15]), (1, [16])]
SHAPE = SearchConfig(num_beams=4, beam_width=2, block_size=10, max_length=45)


def engine(**settings) -> FakeValueEngine:
    return FakeValueEngine(ValueConfig("folder", 100, 3), **settings)


def run(served: FakeValueEngine, work):
    """`work(scorer)` on an event loop; the scorer is closed."""

    async def main():
        scorer = ServedScorer(served, served.config)
        try:
            return await work(scorer)
        finally:
            await scorer.close()

    return asyncio.run(main())


def test_the_prompt_leaves_at_once_and_a_round_waits_for_it():
    served = engine()

    async def work(scorer):
        served.gate.clear()
        scorer.start("0/0", PROMPT, [])
        await asyncio.sleep(0)
        assert served.asked == [([PROMPT], "0/0")]
        scored = asyncio.create_task(scorer.score("0/0", [(0, [1, 2]), (0, [3])], [False, False]))
        await asyncio.sleep(0.01)
        assert len(served.asked) == 1  # a round beside it would read the prompt twice more
        served.gate.set()
        return await scored

    scored = run(served, work)
    assert served.asked[1:] == [([[*PROMPT, 1, 2], [*PROMPT, 3]], "0/0")]
    assert scored.values == [sim_value([*PROMPT, 1, 2]), sim_value([*PROMPT, 3])]
    assert (scored.tokens_scored, scored.tokens_reread) == (3 + 2 + 1, 0)
    assert scored.seconds > 0
    assert served.closed == 1


def test_of_a_journal_each_beam_goes_once_alone_and_in_order():
    served = engine()

    async def work(scorer):
        scorer.start("0/0", PROMPT, HISTORY)
        first = await scorer.score("0/0", [(5, [1]), (3, [2]), (5, [3])], [False] * 3)
        second = await scorer.score("0/0", [(6, [4]), (8, [5])], [False] * 2)
        return first, second

    first, second = run(served, work)
    beams = [[*PROMPT, 10, 11, 14], [*PROMPT, 10, 11, 16]]
    assert [traces for traces, _ in served.asked] == [
        [PROMPT], [beams[0]], [beams[1]], [[*beams[1], 1], [*beams[0], 2], [*beams[1], 3]],
        [[*beams[1], 1, 4], [*beams[1], 3, 5]],
    ]  # fmt: skip
    # Prompt 3, the first beam's 3, and the one token that the second has for itself, all of them read before.
    assert (first.tokens_scored, first.tokens_reread) == (3 + 3 + 1 + 3, 3 + 3 + 1)
    assert (second.tokens_scored, second.tokens_reread) == (2, 0)


def test_what_a_pool_that_is_too_small_computes_again_is_counted():
    served = engine()

    async def work(scorer):
        scorer.start("0/0", PROMPT, [])
        await scorer.score("0/0", [(0, [1, 2])], [False])
        served.cached = {()}  # all is evicted
        return await scorer.score("0/0", [(1, [3])], [False])

    scored = run(served, work)
    assert (scored.tokens_scored, scored.tokens_reread) == (6, 5)


def test_what_candidates_go_on_from_is_read_once_after_a_server_was_lost():
    served = engine()
    beams = [[*PROMPT, 1, 2], [*PROMPT, 3, 4]]

    async def work(scorer):
        scorer.start("0/0", PROMPT, [])
        await scorer.score("0/0", [(0, [1, 2]), (0, [3, 4])], [False] * 2)
        served.lose()
        return await scorer.score("0/0", [(2, [5]), (1, [6]), (2, [7])], [False] * 3)

    scored = run(served, work)
    assert [traces for traces, _ in served.asked[2:]] == [
        [beams[0]], [beams[1]], [[*beams[1], 5], [*beams[0], 6], [*beams[1], 7]],
    ]  # fmt: skip
    assert (scored.tokens_scored, scored.tokens_reread) == (5 + 2 + 3, 5 + 2)


def test_equal_candidates_cost_less_than_they_have_and_never_less_than_nothing():
    served = engine()

    async def work(scorer):
        scorer.start("0/0", PROMPT, [])
        await scorer.score("0/0", [(0, [1, 2])], [False])
        return await scorer.score("0/0", [(0, [1, 2])], [False])

    scored = run(served, work)
    assert (scored.tokens_scored, scored.tokens_reread) == (1, 0)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(3, [1]), (1, [])], "an empty block"),
        ([(3, [1]), (9, [2])], "no node 9"),
        ([(3, [1]), (0, [100])], "token id 100 is outside the value model's vocabulary of 100"),
        ([(3, [1]), (0, [-1])], "token id -1 is outside"),
        ([(3, [1]), (0, [1] * 20)], "a trace of 23 tokens is longer than the 20 that are served"),
    ],
)
def test_what_cannot_be_scored_is_told_before_anything_leaves(items, message):
    served = engine(context_length=20)

    async def work(scorer):
        scorer.start("0/0", PROMPT, HISTORY)
        with pytest.raises(ValueError, match=message):
            await scorer.score("0/0", items, [False] * len(items))
        return len(served.asked)

    assert run(served, work) <= 1  # the prompt, and not the beam


def test_only_nodes_that_are_kept_have_children():
    served = engine()

    async def work(scorer):
        scorer.start("0/0", PROMPT, [])
        await scorer.score("0/0", [(0, [1, 2]), (0, [3])], [False] * 2)
        scorer.keep("0/0", [2])
        held = [len(trace) for trace in scorer._trees["0/0"].traces]
        with pytest.raises(ValueError, match="node 1 was not kept"):
            await scorer.score("0/0", [(1, [4])], [False])
        return held, await scorer.score("0/0", [(2, [4])], [False])

    held, scored = run(served, work)
    assert held == [0, 0, 4]
    assert scored.values == [sim_value([*PROMPT, 3, 4])]


@pytest.mark.parametrize("scored", [True, False])
def test_a_prompt_that_failed_shows_in_score_and_nowhere_else(scored, caplog):
    served = engine(fail_after=0)

    async def work(scorer):
        scorer.start("0/0", PROMPT, [])
        await asyncio.sleep(0.01)
        if scored:
            with pytest.raises(EngineError, match="the fake value engine died"):
                await scorer.score("0/0", [(0, [1])], [False])
        scorer.release("0/0")

    run(served, work)
    gc.collect()
    assert caplog.text == ""


@pytest.mark.parametrize("end", ["release", "close"])
def test_a_prompt_that_nobody_waits_for_is_cancelled(end):
    served = engine()

    async def main():
        served.gate.clear()
        scorer = ServedScorer(served, served.config)
        scorer.start("0/0", PROMPT, [])
        await asyncio.sleep(0)
        scorer.release("no such tree")
        if end == "release":
            scorer.release("0/0")
            await asyncio.sleep(0.01)
        else:
            await scorer.close()
        return served.cancelled

    assert asyncio.run(main()) == 1


def test_searches_are_those_of_a_scorer_in_this_process_and_each_token_is_computed_once():
    served, rng = engine(), random.Random(0)

    async def all_of(scorer):
        tasks = [SearchTask(i, 0, tuple(range(2 + i, 9 + 2 * i))) for i in range(12)]
        generate = simple_generate(shuffle=random.Random(rng.random()))
        return await asyncio.gather(*(search(task, generate, scorer, SHAPE) for task in tasks))

    results, expected = run(served, all_of), asyncio.run(all_of(SimScorer()))
    for result, other in zip(results, expected, strict=True):
        assert (result.tree.tokens, result.tree.value, result.beams) == (
            other.tree.tokens,
            other.tree.value,
            other.beams,
        )
        written = sum(map(len, result.tree.tokens))
        assert result.total("tokens_scored") == len(result.tree.prompt_ids) + written
        assert result.total("tokens_reread") == 0


def test_a_value_engine_that_dies_ends_the_search_as_the_generators_does():
    served = engine(fail_after=3)

    async def work(scorer):
        with pytest.raises(EngineError, match="the fake value engine died"):
            await search(SearchTask(0, 0, tuple(PROMPT)), simple_generate(stop_share=0), scorer, SHAPE)

    run(served, work)


def test_a_trace_that_cannot_be_scored_ends_the_search_in_one_line():
    served = engine(context_length=20)

    async def work(scorer):
        with pytest.raises(
            SearchError, match="round 1 of problem 0, repetition 0: it cannot be scored: a trace of 23 tokens"
        ):
            await search(SearchTask(0, 0, tuple(PROMPT)), simple_generate(stop_share=0), scorer, SHAPE)

    run(served, work)
