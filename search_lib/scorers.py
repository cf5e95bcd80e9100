"""What the search asks of a value model, and a local one behind it: in a thread of its own."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from common_lib.devices import set_thread_device

MORE_MEMORY = (
    "leave the value model more: a lower --piref_gpu_util (servers: --mem-fraction-static), another --value_device, or, in a "
    "new run, --value_dtype bf16 or a smaller --max_length"
)
Block = tuple[int, Sequence[int]]  # number of the parent node, tokens


@dataclass(frozen=True)
class Scored:
    """Values of the items of one call, and what they cost: `seconds` without the time spent waiting for the scorer."""

    values: list[float]
    seconds: float = 0.0
    tokens_scored: int = 0
    tokens_reread: int = 0


class Scorer(Protocol):
    """The asynchronous side of a scorer; `start`, `keep` and `release` take effect in the order they are called in."""

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[Block]) -> None: ...

    async def score(self, tree_id: str, items: Sequence[Block], finished: Sequence[bool]) -> Scored:
        """Raises ValueError for what cannot be scored, MemoryError where there is no memory for it; one line each."""

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None: ...

    def release(self, tree_id: str) -> None: ...


class ScorerThread:
    """Runs a `classifier_lib.ValueScorer` in one worker thread, so that the event loop is never blocked."""

    def __init__(self, scorer: Any, device: str = "cpu"):
        """`device`: where its model is."""
        self._scorer = scorer
        self._pool = ThreadPoolExecutor(1, "score", set_thread_device, (device,))

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[Block]) -> None:
        self._call(self._scorer.start, tree_id, prompt_ids, list(history))

    async def score(self, tree_id: str, items: Sequence[Block], finished: Sequence[bool]) -> Scored:
        return await self._call(self._score, tree_id, items, finished)

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None:
        self._call(self._scorer.keep, tree_id, list(nodes))

    def release(self, tree_id: str) -> None:
        self._call(self._scorer.release, tree_id)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _call(self, function: Callable[..., Any], *arguments: object) -> asyncio.Future:
        """In the thread, after the earlier ones. Of a failed `start` or `keep` asyncio logs the traceback."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _score(self, tree_id: str, items: Sequence[Block], finished: Sequence[bool]) -> Scored:
        usage = self._scorer.tree_usage(tree_id)
        scored, reread, begin = usage.tokens_scored, usage.tokens_reread, time.perf_counter()
        try:
            values = self._scorer.score(tree_id, items, finished)
        except MemoryError as error:
            raise MemoryError(f"{error}; {MORE_MEMORY}") from None
        seconds = time.perf_counter() - begin
        return Scored(values, seconds, usage.tokens_scored - scored, usage.tokens_reread - reread)
