"""What the search asks of a value model, and a local one behind it: in a thread of its own."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Scored:
    """Values of the items of one call, and what they cost: `seconds` without the time spent waiting for the scorer."""

    values: list[float]
    seconds: float = 0.0
    tokens_scored: int = 0
    tokens_reread: int = 0


class Scorer(Protocol):
    """The asynchronous side of a scorer; `start`, `keep` and `release` take effect in the order they are called in."""

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[tuple[int, Sequence[int]]]) -> None: ...

    async def score(
        self, tree_id: str, items: Sequence[tuple[int, Sequence[int]]], finished: Sequence[bool]
    ) -> Scored: ...

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None: ...

    def release(self, tree_id: str) -> None: ...


class ScorerThread:
    """Runs a `classifier_lib.ValueScorer` in one worker thread, so that the event loop is never blocked."""

    def __init__(self, scorer: Any):
        self._scorer = scorer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        self.busy_seconds = 0.0

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[tuple[int, Sequence[int]]]) -> None:
        self._pool.submit(self._scorer.start, tree_id, prompt_ids, list(history)).add_done_callback(_raise_if_failed)

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None:
        self._pool.submit(self._scorer.keep, tree_id, list(nodes)).add_done_callback(_raise_if_failed)

    def release(self, tree_id: str) -> None:
        self._pool.submit(self._scorer.release, tree_id)

    async def score(self, tree_id: str, items: Sequence[tuple[int, Sequence[int]]], finished: Sequence[bool]) -> Scored:
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._score, tree_id, items, finished)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _score(self, tree_id: str, items: Sequence[tuple[int, Sequence[int]]], finished: Sequence[bool]) -> Scored:
        usage = self._scorer.tree_usage(tree_id)
        scored, reread, begin = usage.tokens_scored, usage.tokens_reread, time.perf_counter()
        values = self._scorer.score(tree_id, items, finished)
        seconds = time.perf_counter() - begin
        self.busy_seconds += seconds
        return Scored(values, seconds, usage.tokens_scored - scored, usage.tokens_reread - reread)


def _raise_if_failed(future) -> None:
    """A failed `start` or `keep` shows in the next `score`; this only keeps its traceback from being lost."""
    if not future.cancelled() and future.exception() is not None:
        raise future.exception()
