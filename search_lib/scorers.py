"""What the search asks of a value model, and local ones behind it: each in a thread of its own."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
        """Raises ValueError for what cannot be scored, MemoryError where there is no memory for it, EngineError where a
        value model that is served is dead or out of reach; one line each."""

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None: ...

    def release(self, tree_id: str) -> None: ...


class LoadedScorer(Scorer, Protocol):
    """A scorer of a run, which checks it, writes down what it is, and ends it."""

    async def check(self) -> None:
        """Raises UserError where another value model is served than was asked for. Before the first search."""

    async def close(self) -> None:
        """End its threads or its engine. Can be called twice."""

    def describe(self) -> dict[str, object]:
        """Name, devices and settings, JSON-able, for the run's meta file."""


class ScorerThread:
    """Runs a `classifier_lib.ValueScorer` in one worker thread, so that the event loop is never blocked."""

    def __init__(self, scorer: Any, device: str = "cpu"):
        """`device`: where its model is."""
        self.device = device
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

    async def close(self) -> None:
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)

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


# ---------------------------------------------------------------------------------------------------------------------
# Several


@dataclass
class _HomedTree:
    """Which thread has a tree, and what it has been asked to hold of it: nodes by number, with parent and tokens."""

    home: int
    parent: list[int]
    tokens: list[int]
    held: set[int] = field(default_factory=set)

    @property
    def tokens_held(self) -> int:
        return sum(self.tokens[node] for node in self.held)

    def add(self, items: Iterable[Block], finished: Iterable[bool]) -> None:
        for (parent, tokens), final in zip(items, finished, strict=True):
            if not final:
                self.held.add(len(self.parent))
            self.parent.append(parent)
            self.tokens.append(len(tokens))

    def keep(self, nodes: Iterable[int]) -> None:
        self.held = set()
        for node in nodes:
            while node >= 0:
                self.held.add(node)
                node = self.parent[node]


class LocalScorers:
    """Value models side by side, one a device: a tree goes to the one with the least to hold as it starts, and stays there.

    What a thread holds is reckoned here from what it was asked, so that nobody waits for it: tokens of the nodes that go
    on, and for each tree the round that it will add (`round_tokens`). So trees that start together spread evenly, and a
    thread whose trees are long gets fewer. What its cache had to give up counts too: it will be read again.
    """

    def __init__(self, threads: Sequence[ScorerThread], round_tokens: int = 0):
        """round_tokens: of all candidates of one round of one tree, at most."""
        self._threads, self._round_tokens = threads, round_tokens
        self._trees: dict[str, _HomedTree] = {}

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[Block]) -> None:
        history = list(history)
        tree = _HomedTree(self._least_loaded(), [-1], [len(prompt_ids)], {0})
        tree.add(history, [False] * len(history))  # which of them go on, the first round tells
        self._trees[tree_id] = tree
        self._threads[tree.home].start(tree_id, prompt_ids, history)

    async def score(self, tree_id: str, items: Sequence[Block], finished: Sequence[bool]) -> Scored:
        tree = self._trees[tree_id]
        scored = await self._threads[tree.home].score(tree_id, items, finished)
        tree.keep({parent for parent, _ in items})
        tree.add(items, finished)
        return scored

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None:
        tree, nodes = self._trees[tree_id], list(nodes)
        tree.keep(nodes)
        self._threads[tree.home].keep(tree_id, nodes)

    def release(self, tree_id: str) -> None:
        if tree := self._trees.pop(tree_id, None):
            self._threads[tree.home].release(tree_id)

    async def check(self) -> None:
        """Nothing: it was loaded from where it was asked for."""

    async def close(self) -> None:
        for thread in self._threads:
            await thread.close()

    def describe(self) -> dict[str, object]:
        return {"name": "local", "devices": [thread.device for thread in self._threads]}

    def _least_loaded(self) -> int:
        """Equals: the one with fewer trees, then the first."""
        loads = [[0, 0, number] for number in range(len(self._threads))]
        for tree in self._trees.values():
            loads[tree.home][0] += tree.tokens_held + self._round_tokens
            loads[tree.home][1] += 1
        return min(loads)[2]
