"""A simulated generator and scorer: pure functions of what they are asked, so any order of work gives the same trees."""

import asyncio
import random

from engine_lib.base import Reply
from search_lib.scorers import Scored

STOP = 1


def sim_block(prompt_ids, seed: int, limit: int, stop_share: float = 0.15, stop: int = STOP) -> Reply:
    """A block that depends on prompt and seed alone; some stop early."""
    rng = random.Random(hash((tuple(prompt_ids), seed)))
    if rng.random() < stop_share:
        length = rng.randint(1, limit)
        return Reply([*(rng.randint(2, 99) for _ in range(length - 1)), stop], "stop", len(prompt_ids))
    return Reply([rng.randint(2, 99) for _ in range(limit)], "length", len(prompt_ids))


def sim_value(path) -> float:
    """A value that depends on the trace alone."""
    return random.Random(hash(tuple(path))).random()


class SimScorer:
    """A `search_lib.scorers.Scorer` that answers at once or after `delay(tokens)` seconds, one call at a time."""

    def __init__(self, delay=None):
        self.trees, self.delay = {}, delay
        self.lock = asyncio.Lock()
        self.busy = 0.0

    def start(self, tree_id, prompt_ids, history):
        assert tree_id not in self.trees
        self.trees[tree_id] = [list(prompt_ids)]
        for parent, tokens in history:
            self._add(tree_id, parent, tokens)

    def _add(self, tree_id, parent, tokens):
        paths = self.trees[tree_id]
        paths.append(paths[parent] + list(tokens))
        return paths[-1]

    def keep(self, tree_id, nodes):
        assert all(0 <= node < len(self.trees[tree_id]) for node in nodes)

    def release(self, tree_id):
        self.trees.pop(tree_id, None)

    async def check(self):
        pass

    async def close(self):
        assert not self.trees

    def describe(self):
        return {"name": "simulated"}

    async def score(self, tree_id, items, finished):
        tokens = sum(len(new) for _, new in items)
        seconds = self.delay(tokens) if self.delay else 0.0
        async with self.lock:
            await asyncio.sleep(seconds)
            self.busy += seconds
        values = [sim_value(self._add(tree_id, parent, new)) for parent, new in items]
        return Scored(values, seconds, tokens)


def simple_generate(stop_share: float = 0.15, shuffle: random.Random | None = None, fail=lambda seed: False):
    """`generate` of a search; with `shuffle`, replies come after a random number of turns of the event loop."""

    async def generate(prompt_ids, n, max_new_tokens, seeds, tree_id):
        for _ in range(shuffle.randint(0, 5) if shuffle else 0):
            await asyncio.sleep(0)
        assert len(seeds) == n
        return [
            Reply([], "abort", 0) if fail(seed) else sim_block(prompt_ids, seed, max_new_tokens, stop_share)
            for seed in seeds
        ]

    return generate
