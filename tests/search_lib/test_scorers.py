"""The scorer in its thread: the order of calls, what a call cost, and that the event loop is never blocked."""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch
from simulated import SimScorer, simple_generate

from classifier_lib import ValueScorer
from common_lib.concurrency import run_bounded
from common_lib.virtual_time import run_virtual
from search_lib.scorers import LocalScorers, ScorerThread
from search_lib.search import search
from search_lib.tree import SearchConfig, SearchTask


class Recording:
    """A ValueScorer that notes its calls; `score` waits for `gate`."""

    def __init__(self):
        self.calls, self.gate, self.usage = [], threading.Event(), SimpleNamespace(tokens_scored=7, tokens_reread=1)

    def tree_usage(self, tree_id):
        return self.usage

    def start(self, tree_id, prompt_ids, history):
        self.calls.append(("start", tree_id, list(prompt_ids), history))

    def score(self, tree_id, items, finished):
        assert self.gate.wait(10)
        self.calls.append(("score", tree_id, items, finished))
        self.usage.tokens_scored += 5
        self.usage.tokens_reread += 2
        return [0.5]

    def keep(self, tree_id, nodes):
        self.calls.append(("keep", tree_id, nodes))

    def release(self, tree_id):
        self.calls.append(("release", tree_id))


def test_the_thread_stands_on_the_models_gpu(monkeypatch):
    """Some kernels launch where the thread stands, which is the first GPU unless it is told."""
    stood = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: stood.append((device, threading.current_thread().name))
    )
    for device in ("cuda:1", "cpu"):
        recording = Recording()
        scorer = ScorerThread(recording, device)

        async def main(scorer=scorer):
            scorer.start("a", (1, 2), [])
            await scorer.close()

        asyncio.run(main())
        assert recording.calls == [("start", "a", [1, 2], [])]
    assert stood == [("cuda:1", "score_0")]


def test_calls_take_effect_in_order_and_the_event_loop_goes_on():
    recording = Recording()
    scorer = ScorerThread(recording)

    async def main():
        scorer.start("a", (1, 2), iter([(0, [3])]))
        scored = asyncio.create_task(scorer.score("a", [(0, [4])], [False]))
        scorer.keep("b", {2})
        await asyncio.sleep(0)
        assert not scored.done()
        recording.gate.set()  # from the loop, which the scorer in its thread does not block
        scored = await scored
        scorer.release("a")
        await scorer.score("b", [(0, [5])], [False])  # calls are in order: the release has been done by then
        await scorer.close()
        return scored

    scored = asyncio.run(main())
    assert (scored.values, scored.tokens_scored, scored.tokens_reread) == ([0.5], 5, 2)
    assert recording.calls[0] == ("start", "a", [1, 2], [(0, [3])])
    assert recording.calls[-2] == ("release", "a")
    assert {call[0] for call in recording.calls} == {"start", "score", "keep", "release"}


def test_errors_of_a_score_come_through_and_those_of_the_others_are_logged(caplog):
    class Broken(Recording):
        def keep(self, tree_id, nodes):
            raise KeyError("no such tree")

        def score(self, *args):
            raise ValueError("too long")

    scorer = ScorerThread(Broken())

    async def main():
        scorer.keep("a", [1])
        with pytest.raises(ValueError, match="too long"):
            await scorer.score("a", [], [])
        await scorer.close()

    asyncio.run(main())
    assert "no such tree" in caplog.text


def test_a_device_without_memory_says_what_to_change():
    class Full(Recording):
        def score(self, *args):
            raise MemoryError("out of memory on cuda:0 for a single trace of 9 tokens")

    scorer = ScorerThread(Full())

    async def main():
        with pytest.raises(MemoryError) as caught:
            await scorer.score("a", [], [])
        await scorer.close()
        return str(caught.value)

    line = asyncio.run(main())
    assert line.startswith("out of memory on cuda:0 for a single trace of 9 tokens; leave the value model more: ")
    for flag in ("--value_dtype bf16", "--piref_gpu_util", "--mem-fraction-static", "--value_device", "--max_length"):
        assert flag in line


# ------------------------------------------------------------------------------------------------------------- several


class Noting(SimScorer):
    """Stands for a thread; notes which trees it got."""

    device = "cpu"

    def __init__(self, delay=None):
        super().__init__(delay)
        self.started = []

    def start(self, tree_id, prompt_ids, history):
        self.started.append(tree_id)
        super().start(tree_id, prompt_ids, history)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("stop_share", [0.0, 0.15, 0.5])
def test_trees_are_spread_evenly_and_stay_where_they_are(count, stop_share):
    """64 searches, 16 at once, whose prompts and times differ by a factor of ten."""
    rng = random.Random(count)
    tasks = [SearchTask(i, 0, tuple(range(2, 2 + rng.randrange(5, 50)))) for i in range(64)]
    shape = SearchConfig(num_beams=4, beam_width=2, block_size=12, max_length=48)
    threads = [Noting(delay=lambda tokens: tokens * rng.uniform(0.001, 0.01)) for _ in range(count)]
    scorer, results, simple = LocalScorers(threads, 8 * 12), {}, simple_generate(stop_share)

    async def generate(*asked):
        await asyncio.sleep(rng.uniform(0.1, 1))
        return await simple(*asked)

    async def one(task):
        results[task] = await search(task, generate, scorer, shape)

    run_virtual(run_bounded(tasks, one, 16))
    assert sorted(name for thread in threads for name in thread.started) == sorted(task.tree_id for task in tasks)
    for thread in threads:
        assert not thread.trees
        assert len(thread.started) == pytest.approx(64 / count, rel=0.25)
    for task, result in list(results.items())[::16]:
        alone = asyncio.run(search(task, simple, SimScorer(), shape))
        assert (result.tree.tokens, result.tree.value, result.beams) == (
            alone.tree.tokens,
            alone.tree.value,
            alone.beams,
        )


def test_a_tree_goes_where_the_least_is_held():
    threads = [Noting() for _ in range(2)]
    scorer = LocalScorers(threads, round_tokens=10)

    async def homes():
        scorer.start("a", [1] * 50, [])  # the first of equals
        scorer.start("b", [1] * 5, [])
        scorer.start("c", [1] * 5, [])
        assert [thread.started for thread in threads] == [["a"], ["b", "c"]]
        await scorer.score("a", [(0, [2] * 40), (0, [3] * 9), (0, [4] * 7)], [False, False, True])
        scorer.start("d", [1] * 60, [])
        assert threads[1].started[-1] == "d"  # 110 there and 30 here
        scorer.keep("a", [2])
        assert scorer._trees["a"].tokens_held == 50 + 9  # what is finished or not kept is not held
        scorer.start("e", [1], [])
        assert threads[0].started[-1] == "e"  # 69 there and 100 here
        scorer.release("d")
        scorer.release("d")
        scorer.start("f", [1], [])
        assert threads[1].started[-1] == "f"

    asyncio.run(homes())


def test_trees_that_start_together_are_counted_by_what_they_will_hold():
    """One long prompt is not worth ten searches."""
    threads = [Noting() for _ in range(2)]
    scorer = LocalScorers(threads, round_tokens=1000)
    for number in range(12):
        scorer.start(f"{number}", [1] * (500 if number == 0 else 50), [])
    assert [len(thread.started) for thread in threads] == [6, 6]


def test_a_search_that_goes_on_counts_what_its_journal_holds_until_a_round_tells_which_beams_go_on():
    scorer = LocalScorers([Noting(), Noting()], round_tokens=0)

    async def held():
        scorer.start("a", [1] * 5, [(0, [2] * 4), (0, [3] * 3), (1, [4] * 2)])
        before = scorer._trees["a"].tokens_held
        await scorer.score("a", [(3, [5]), (3, [6] * 9)], [False, True])
        return before, scorer._trees["a"].tokens_held

    assert asyncio.run(held()) == (14, 5 + 4 + 2 + 1)


def test_two_threads_give_what_one_gives():
    """With a real value model each: the same values to the last bit, as the same passes are made."""
    tasks = [SearchTask(i, 0, tuple(range(2 + i, 30 + i))) for i in range(16)]
    shape = SearchConfig(num_beams=3, beam_width=2, block_size=12, max_length=36)

    async def trees(count):
        threads = [ScorerThread(ValueScorer(tiny.tiny_value_model(), 1 << 24)) for _ in range(count)]
        scorer = LocalScorers(threads, 6 * 12)
        try:
            done = await asyncio.gather(*(search(task, simple_generate(), scorer, shape) for task in tasks))
        finally:
            await scorer.close()
        return [(r.tree.tokens, r.tree.value, r.beams, r.total("tokens_scored")) for r in done], [
            thread._scorer.usage.tokens_scored for thread in threads
        ]

    (one, _), (two, scored) = asyncio.run(trees(1)), asyncio.run(trees(2))
    assert one == two
    assert min(scored) > 0.7 * max(scored)
    assert LocalScorers([Noting(), Noting()]).describe() == {"name": "local", "devices": ["cpu", "cpu"]}
