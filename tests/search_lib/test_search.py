"""The search: its rules, that concurrency changes nothing, that a journal goes on exactly, and that nothing idles."""

import asyncio
import itertools
import random
from dataclasses import replace

import pytest
from simulated import SimScorer, sim_block, sim_value, simple_generate

from common_lib.cli import UserError
from common_lib.concurrency import run_bounded
from common_lib.virtual_time import run_virtual
from engine_lib.base import Reply
from engine_lib.retry import RetryPolicy
from search_lib.search import SearchError, search, select
from search_lib.tree import SearchConfig, SearchTask, parse_search_type, request_seed


def config(search_type="beam2", num_blocks=8, block_size=10, max_length=45, **more) -> SearchConfig:
    return SearchConfig(*parse_search_type(search_type, num_blocks, block_size, max_length), max_length, **more)


def tasks(count: int) -> list[SearchTask]:
    return [SearchTask(i % 5, i // 5, tuple(range(2, 5 + i % 5))) for i in range(count)]


def run_one(task, cfg, **more):
    return asyncio.run(search(task, more.pop("generate", simple_generate()), SimScorer(), cfg, **more))


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("search_type", "expected"),
    [("beam2", (4, 2, 10)), ("beam1", (8, 1, 10)), ("beam8", (1, 8, 10)), ("bfs", (1, 8, 10)), ("bon", (8, 1, 45))],
)
def test_search_types(search_type, expected):
    assert parse_search_type(search_type, 8, 10, 45) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("beam3", 8, 10, 45), "not divisible by the 3.*beam2 or --num_blocks 9"),
        (("beam", 8, 10, 45), "unknown"),
        (("dvts", 8, 10, 45), "unknown"),
        (("beam2", 8, 46, 45), "block_size 46 is more than --max_length 45"),
        (("beam2", 0, 10, 45), "num_blocks is 0"),
    ],
)
def test_bad_search_types_name_the_rule(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_search_type(*arguments)


@pytest.mark.parametrize("search_type", ["beam1", "beam2", "beam4", "bfs", "bon"])
def test_rounds_follow_the_rules(search_type):
    """Every unfinished beam gets B candidates; as many of all are kept as beams were unfinished, the best ones."""
    cfg = config(search_type)
    for task in tasks(10):
        result = run_one(task, cfg)
        tree, finished, open_beams = result.tree, 0, [0] * cfg.num_beams
        for record in tree.rounds:
            assert record.parent == [node for node in open_beams for _ in range(cfg.beam_width)]
            assert sum(record.kept) == len(open_beams)
            worst_kept = min(v for v, kept in zip(record.value, record.kept, strict=True) if kept)
            assert all(v <= worst_kept for v, kept in zip(record.value, record.kept, strict=True) if not kept)
            open_beams = []
            for i, kept in enumerate(record.kept):
                node = 1 + sum(len(r.parent) for r in tree.rounds[: record.round]) + i
                if kept and record.finish[i]:
                    finished += 1
                elif kept:
                    open_beams.append(node)
        assert not open_beams
        assert finished == cfg.num_beams == len(set(result.beams))
        for node in range(1, len(tree.parent)):
            assert tree.start[node] == len(tree.response(tree.parent[node]))
            assert tree.end(node) == len(tree.response(node))
        for node in result.beams:
            assert len(tree.response(node)) <= cfg.max_length
            assert (
                tree.finish[node] == ("length" if len(tree.response(node)) == 45 else "stop")
                or tree.tokens[node][-1] == 1
            )


def test_unfinished_beams_are_equally_long():
    for task in tasks(20):
        tree = run_one(task, config("beam4")).tree
        for record in tree.rounds:
            assert len({len(tree.response(node)) for node in record.parent}) == 1


def test_finished_beams_keep_their_place_and_are_not_scored_again():
    scored_items, ended = [], []

    class Counting(SimScorer):
        async def score(self, tree_id, items, finished):
            scored_items.extend(items)
            ended.extend(finished)
            return await super().score(tree_id, items, finished)

    task = tasks(1)[0]
    result = asyncio.run(search(task, simple_generate(stop_share=0.5), Counting(), config()))
    tree = result.tree
    assert len(tree.rounds[1].parent) < 8  # some finished in the first round
    assert len(scored_items) == len(tree.parent) - 1
    assert ended == [bool(finish) for finish in tree.finish[1:]]  # whose caches a scorer need not keep
    for node in result.beams:
        assert tree.value[node] == sim_value([*task.prompt_ids, *tree.response(node)])


def test_ties_go_to_the_lower_index():
    task = tasks(1)[0]
    assert select([0.5, 0.9, 0.5, 0.5], 2, config(), task, 0) == [True, True, False, False]


def test_random_selection_is_seeded_and_ignores_values():
    task, cfg = tasks(1)[0], config(selection="random", seed=3)
    draws = [select([float(i == j) for i in range(8)], 4, cfg, task, 0) for j in range(8)]
    assert all(draw == draws[0] and sum(draw) == 4 for draw in draws)
    assert any(select([0.0] * 8, 4, cfg, task, r) != draws[0] for r in range(1, 9))


def test_request_seeds_depend_on_all_six_numbers_and_fit_31_bits():
    grid = list(itertools.product(range(3), repeat=6))
    seeds = {request_seed(*numbers) for numbers in grid}
    assert len(seeds) == len(grid)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1337, 1, 2, 3, 4, 5) == request_seed(1337, 1, 2, 3, 4, 5)


# --------------------------------------------------------------------------------------------------------- exactness


def trees(results) -> dict:
    return {
        r.task: ([vars(record) | {"seconds": 0, "seconds_generate": 0} for record in r.tree.rounds], r.beams)
        for r in results
    }


@pytest.mark.parametrize("search_type", ["beam2", "bfs", "bon"])
def test_concurrent_searches_give_the_trees_of_sequential_ones(search_type):
    cfg, work = config(search_type), tasks(40)
    one_by_one = [run_one(task, cfg) for task in work]

    async def together():
        results, scorer, generate = [], SimScorer(), simple_generate(shuffle=random.Random(5))

        async def one(task):
            results.append(await search(task, generate, scorer, cfg))

        await run_bounded(work, one, 16)
        assert not scorer.trees  # all released
        return results

    assert trees(asyncio.run(together())) == trees(one_by_one)


def test_goes_on_from_a_journal_of_any_length():
    cfg = config()
    for task in tasks(5):
        whole = run_one(task, cfg)
        for done in range(len(whole.tree.rounds) + 1):
            told = []
            again = run_one(
                task, cfg, rounds=whole.tree.rounds[:done], on_round=lambda t, tree, r, told=told: told.append(r.round)
            )
            assert trees([again]) == trees([whole])
            assert told == list(range(done, len(whole.tree.rounds)))


def test_a_resumed_search_counts_the_waiting_of_its_earlier_start():
    """Ten searches share one slow scorer, so most of their time is waiting; stopped after two rounds, one goes on."""
    cfg, work = config(), tasks(10)

    async def generate(prompt_ids, n, max_new_tokens, seeds, tree_id):
        await asyncio.sleep(1)
        return [sim_block(prompt_ids, seed, max_new_tokens, stop_share=0) for seed in seeds]

    async def together():
        scorer = SimScorer(delay=lambda tokens: 2)
        return await asyncio.gather(*(search(task, generate, scorer, cfg) for task in work))

    async def again(rounds):
        return await search(whole.task, generate, SimScorer(delay=lambda tokens: 2), cfg, rounds)

    whole = max(run_virtual(together()), key=lambda result: result.seconds)
    assert [record.seconds for record in whole.tree.rounds] == [21, 20, 20, 20, 20]  # 1 of them alone, 2 scored
    assert whole.seconds == 101
    first = whole.tree.rounds[:2]
    assert run_virtual(again(first)).seconds == 21 + 20 + 3 * (1 + 2)
    older = [replace(record, seconds=0.0) for record in first]  # a journal that does not say it
    assert run_virtual(again(older)).seconds == 5 * (1 + 2)
    assert run_virtual(again(whole.tree.rounds)).seconds == 101


def test_failed_requests_are_retried_with_their_seed():
    cfg, task = config(), tasks(1)[0]
    failures = {}

    def fails_twice(seed):
        failures[seed] = failures.get(seed, 0) + 1
        return failures[seed] <= 2 and seed % 3 == 0

    flaky = run_one(task, cfg, generate=simple_generate(fail=fails_twice))
    assert any(count > 1 for count in failures.values())
    assert trees([flaky]) == trees([run_one(task, cfg)])


def test_short_blocks_are_failures_and_end_the_search_in_one_line():
    async def short(prompt_ids, n, max_new_tokens, seeds, tree_id):
        return [Reply([5] * (max_new_tokens - 1), "length", 0)] * n

    message = r"round 0 of problem 0, repetition 0: the generator failed 2 times \(.*length after 9 tokens\)"
    with pytest.raises(SearchError, match=message):
        run_one(tasks(1)[0], config(), generate=short, retry=RetryPolicy(attempts=2, pause_s=0))


def test_a_value_that_is_no_number_is_named():
    class Broken(SimScorer):
        async def score(self, tree_id, items, finished):
            scored = await super().score(tree_id, items, finished)
            scored.values[0] = float("nan")
            return scored

    with pytest.raises(SearchError, match="round 0 of problem 0, repetition 0: the value model gave nan"):
        asyncio.run(search(tasks(1)[0], simple_generate(), Broken(), config()))


def test_what_cannot_be_scored_is_named():
    class Refusing(SimScorer):
        async def score(self, tree_id, items, finished):
            raise ValueError("token id 300 is outside")

    with pytest.raises(SearchError, match="round 0 of problem 0, .* cannot be scored: token id 300 is outside"):
        asyncio.run(search(tasks(1)[0], simple_generate(), Refusing(), config()))


def test_one_failed_search_ends_the_run_and_releases_the_others():
    scorer = SimScorer()

    async def one(task):
        if task.data_idx == 3:
            raise SearchError("no")
        await search(task, simple_generate(shuffle=random.Random(1)), scorer, config())

    with pytest.raises(SearchError, match="no"):
        asyncio.run(run_bounded(tasks(20), one, 8))
    assert not scorer.trees


# ------------------------------------------------------------------------------------------- nothing idles (virtual time)


class SlotEngine:
    """32 slots, first come first served; a block takes a lognormal time with mean 1 and sd 0.5, drawn from its seed."""

    def __init__(self, slots=32):
        self.slots, self.work, self.sigma2 = asyncio.Semaphore(slots), 0.0, 0.2231  # ln(1 + 0.5 ** 2)

    async def request(self, prompt_ids, seed, limit):
        seconds = random.Random(seed).lognormvariate(-self.sigma2 / 2, self.sigma2**0.5)
        async with self.slots:
            await asyncio.sleep(seconds)
        self.work += seconds
        return sim_block(prompt_ids, seed, limit, stop_share=0.1)

    async def generate(self, prompt_ids, n, max_new_tokens, seeds, tree_id):
        return await asyncio.gather(*(self.request(prompt_ids, seed, max_new_tokens) for seed in seeds))


async def ours(cfg, work, seconds_per_token):
    engine, scorer = SlotEngine(), SimScorer(delay=lambda tokens: tokens * seconds_per_token)
    loop, longest = asyncio.get_running_loop(), 0.0
    alone = {}

    async def one(task):
        result = await search(task, engine.generate, scorer, cfg)
        alone[task] = result

    begin = loop.time()
    await run_bounded(work, one, 64)
    makespan = loop.time() - begin
    for result in alone.values():  # how long each would take with engine and scorer to itself
        total = 0.0
        for record in result.tree.rounds:
            branch = len(record.parent) // max(1, sum(record.kept))
            seeds = [
                request_seed(cfg.seed, result.task.data_idx, result.task.repeat_idx, record.round, slot, c)
                for slot in range(sum(record.kept))
                for c in range(branch)
            ]
            total += max(random.Random(s).lognormvariate(-0.2231 / 2, 0.2231**0.5) for s in seeds)
            total += sum(map(len, record.tokens)) * seconds_per_token
        longest = max(longest, total)
    return makespan, max(engine.work / 32, scorer.busy, longest), engine.work, scorer.busy


async def lock_step(cfg, work, seconds_per_token):
    """The released code's order: all searches generate, then all are scored, then all select."""
    engine, scorer = SlotEngine(), SimScorer(delay=lambda tokens: tokens * seconds_per_token)
    arrived, release, alive = 0, asyncio.Event(), len(work)

    async def barrier():
        nonlocal arrived, release
        arrived += 1
        here = release
        if arrived >= alive:
            arrived, release = 0, asyncio.Event()
            here.set()
        await here.wait()

    class Barriers(SimScorer):
        async def score(self, *args):
            await barrier()  # everyone has generated
            scored = await scorer.score(*args)
            await barrier()  # everyone is scored
            return scored

    gates = Barriers()
    gates.start = scorer.start
    gates.keep = scorer.keep
    gates.release = scorer.release

    async def one(task):
        nonlocal alive, arrived, release
        await search(task, engine.generate, gates, cfg)
        alive -= 1
        if alive and arrived >= alive:
            arrived, here, release = 0, release, asyncio.Event()
            here.set()

    begin = asyncio.get_running_loop().time()
    await run_bounded(work, one, len(work))
    return asyncio.get_running_loop().time() - begin


@pytest.mark.parametrize("scoring_share", [0.2, 0.6, 1.0])
def test_makespan_is_near_the_bound(scoring_share, capsys):
    """64 searches, 32 slots, one scorer: at most 1.1 x max(work / slots, total scoring, longest search)."""
    cfg = config(max_length=80)
    work = [SearchTask(i, 0, (2, 3, 4)) for i in range(64)]
    # A block of 10 tokens takes 1/32 of a second of all slots; the scorer takes `scoring_share` of that.
    per_token = scoring_share / 32 / 10
    makespan, bound, generating, scoring = run_virtual(ours(cfg, work, per_token))
    barriers = run_virtual(lock_step(cfg, work, per_token))
    with capsys.disabled():
        print(
            f"\n  scoring/generating {scoring / (generating / 32):.2f}: makespan {makespan:.1f}, bound {bound:.1f} "
            f"(ratio {makespan / bound:.3f}); lock-step {barriers:.1f} (ratio {barriers / bound:.3f})"
        )
    assert makespan <= 1.1 * bound
    assert makespan < barriers
