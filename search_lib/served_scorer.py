"""A value model that SGLang serves, as the search asks it: no thread, all on the event loop.

SGLang caches prefixes, but requests that arrive together do not share what none of them has been computed of. So what
candidates have in common goes first, alone: the prompt while the first block is being written, and, in a search that goes
on from a journal, each beam, one after the other.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common_lib.concurrency import cancel_all
from engine_lib.value_base import ValueConfig, Valued, ValueEngine, check_traces
from engine_lib.value_check import check_values
from search_lib.scorers import Block, Scored


@dataclass
class _SentTree:
    """traces: all tokens up to the end of each node, by its number; none of those that were not kept.
    computed: nodes that the engine had in this process.
    first: the prompt's request, until a round has waited for it. unread: tokens of a prompt that was never read before."""

    traces: list[list[int]]
    computed: set[int]
    first: asyncio.Task[list[Valued]] | None
    unread: int


class ServedScorer:
    """Keeps whole traces of what goes on, and sends a round as one batch. SGLang is not told what to keep: it gives up what
    was least recently used, of all searches together."""

    def __init__(self, engine: ValueEngine, config: ValueConfig):
        """config: that the engine was made with."""
        self._engine, self._config = engine, config
        self._trees: dict[str, _SentTree] = {}

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[Block]) -> None:
        """Sends the prompt. What becomes of it, an error too, the first `score` tells."""
        if tree_id in self._trees:
            raise ValueError(f"tree {tree_id!r} has been started already")
        traces = [list(prompt_ids)]
        for parent, tokens in history:
            traces.append(traces[parent] + list(tokens))
        first = asyncio.create_task(self._engine.values([traces[0]], tree_id))
        self._trees[tree_id] = _SentTree(traces, {0}, first, len(prompt_ids) if len(traces) == 1 else 0)

    async def score(self, tree_id: str, items: Sequence[Block], finished: Sequence[bool]) -> Scored:
        """tokens_scored: that were computed for it, the first requests' too; tokens_reread: those beyond the new ones.
        seconds: until all was there, with the time that requests waited at the server, which nobody tells.
        Nothing is sent where an item cannot be scored."""
        if not items:
            return Scored([])
        tree, begin = self._trees[tree_id], time.perf_counter()
        traces = [self._trace(tree_id, tree, parent, tokens) for parent, tokens in items]
        check_traces(traces, self._engine.context_length, self._config.vocab_size)
        before: list[Valued] = []
        if tree.first is not None:
            before += await tree.first
            tree.first = None
        parents = {parent for parent, _ in items} - tree.computed
        for node in sorted(parents):  # they have lower numbers than their children
            before += await self._engine.values([tree.traces[node]], tree_id)
            tree.computed.add(node)
        prefixes = [tree.traces[node] for node in sorted({parent for parent, _ in items})]
        valued = await self._engine.values(traces, tree_id, prefixes)
        tree.computed |= set(range(len(tree.traces), len(tree.traces) + len(traces)))
        tree.traces += traces
        new = sum(len(tokens) for _, tokens in items) + tree.unread
        tree.unread = 0
        computed = sum(one.tokens_computed for one in [*before, *valued])
        return Scored([one.value for one in valued], time.perf_counter() - begin, computed, max(0, computed - new))

    def _trace(self, tree_id: str, tree: _SentTree, parent: int, tokens: Sequence[int]) -> list[int]:
        if not 0 <= parent < len(tree.traces):
            raise ValueError(f"tree {tree_id!r} has no node {parent} (it has 0 to {len(tree.traces) - 1})")
        if not tree.traces[parent]:
            raise ValueError(f"tree {tree_id!r}: node {parent} was not kept")
        if not tokens:
            raise ValueError(f"tree {tree_id!r}: an empty block has no last token to score")
        return tree.traces[parent] + list(tokens)

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None:
        """Forget the traces of all others: of thousands of tokens each, and only these have children later."""
        tree, kept = self._trees[tree_id], set(nodes)
        tree.traces = [trace if node in kept else [] for node, trace in enumerate(tree.traces)]

    def release(self, tree_id: str) -> None:
        """Forget a tree, and cancel its prompt's request where that is still under way. Unknown ones are no error."""
        tree = self._trees.pop(tree_id, None)
        if tree is not None and tree.first is not None:
            tree.first.cancel()  # also where it has failed: then asyncio does not log what nobody has waited for

    async def check(self) -> None:
        await check_values(self._engine, self._config)

    async def close(self) -> None:
        await cancel_all([tree.first for tree in self._trees.values() if tree.first is not None])
        self._trees.clear()
        await self._engine.close()

    def describe(self) -> dict[str, object]:
        return self._engine.describe()
