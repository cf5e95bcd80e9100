"""The searches of a run side by side, where one is aborted because its problem is decided."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from simulated import SimScorer, sim_block

from search_lib.runner import SearchRunner
from search_lib.tree import SearchConfig


class Decided:
    """Problem 0 is decided by its first repetition."""

    done = False

    def counts(self, data_idx, repeat_idx):
        return data_idx or not repeat_idx or not self.done

    async def look(self, data_idx):
        self.done = self.done or data_idx == 0
        return self.done and data_idx == 0

    def close(self): ...


class Result:
    async def result(self, result):
        return result.task.tree_id

    def block_texts(self, tree, record):
        return []


def test_a_run_that_ends_while_a_search_is_aborted_begins_no_other():
    """Of three places one has the search that is aborted, which takes its time; then the whole run is told to stop."""
    asked, written = [], []

    async def generate(prompt_ids, n, limit, seeds, tree_id):
        asked.append(tree_id)
        if tree_id == "0/0":
            return [sim_block(prompt_ids, seed, limit) for seed in seeds]
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            for _ in range(100):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
            raise

    files = SimpleNamespace(
        finished={}, rounds={}, add_result=written.append, add_round=lambda *_: None, write_meta=lambda: None
    )
    progress = SimpleNamespace(add_round=lambda *_: None, end=lambda task: None, close=lambda: None)
    scorer = SimScorer()
    runner = SearchRunner(generate, scorer, SearchConfig(1, 1, 5, 5), files, Result(), Decided(), progress)

    async def main():
        run = asyncio.create_task(runner.run({0: [1], 1: [2]}, 4, 3))
        while "1/1" not in asked:
            await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await scorer.close()  # it holds no tree

    asyncio.run(main())
    assert written == ["0/0"]
    assert asked == ["0/0", "1/0", "0/1", "1/1"]  # the place of 0/0 went to 1/1; that of 0/1 to nobody
