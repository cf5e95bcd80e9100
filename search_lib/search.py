"""Block-wise beam search guided by values, on the event loop: pure Python, no model library.

Wang et al. 2025 (arXiv 2505.17373), section 2: a beam is extended by blocks of tokens, every candidate block is scored
by the value model, and the best ones go on. Several independent searches of one problem, pooled, are DVTS (diverse
verifier tree search; Beeching et al. 2024, "Scaling test-time compute with open models").
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from common_lib.concurrency import gather_all
from engine_lib.base import Reply
from engine_lib.retry import RequestsFailed, RetryPolicy, ask_until_whole
from search_lib.scorers import Scored, Scorer
from search_lib.tree import Round, SearchConfig, SearchResult, SearchTask, Tree, request_seed

# generate(prompt_ids, n, max_new_tokens, seeds, tree_id) -> n replies
Generate = Callable[[list[int], int, int, list[int], str], Awaitable[Sequence[Reply]]]
RETRY = RetryPolicy()


class SearchError(RuntimeError):
    """A search cannot go on; the message is one line."""


async def search(
    task: SearchTask,
    generate: Generate,
    scorer: Scorer,
    config: SearchConfig,
    rounds: Iterable[Round] = (),
    on_round: Callable[[SearchTask, Tree, Round], None] = lambda task, tree, record: None,
    retry: RetryPolicy = RETRY,
) -> SearchResult:
    """Search one problem once. `rounds` are those of a journal, not done again; `on_round` is told of each new one.

    Seconds are those of the event loop's clock. Raises SearchError where the generator keeps failing or the value model
    gives no number.
    """
    tree = Tree(task.prompt_ids, config.num_beams)
    new_rounds = _Rounds(task, tree, generate, scorer, config, retry)
    for record in rounds:
        tree.add(record)
    clock = asyncio.get_running_loop().time
    since = clock()
    if tree.open_slots:
        scorer.start(task.tree_id, tree.prompt_ids, tree.history())
    try:
        while tree.open_slots:
            record = await new_rounds.make()
            record.seconds = clock() - since
            since += record.seconds
            tree.add(record)
            scorer.keep(task.tree_id, {tree.beams[slot] for slot in tree.open_slots})
            on_round(task, tree, record)
    finally:
        scorer.release(task.tree_id)
    # Journals of earlier versions do not say how long a round took as a whole.
    seconds = sum(r.seconds or r.seconds_generate + r.seconds_score for r in tree.rounds)
    return SearchResult(task, tree, seconds + clock() - since)


@dataclass(frozen=True)
class _Rounds:
    """Makes the rounds of one search, each from the tree as it stands."""

    task: SearchTask
    tree: Tree
    generate: Generate
    scorer: Scorer
    config: SearchConfig
    retry: RetryPolicy

    async def make(self) -> Round:
        """Every open beam is extended; all candidates are scored; as many as there were open beams are kept."""
        tree, config, slots = self.tree, self.config, self.tree.open_slots
        length = len(tree.response(tree.beams[slots[0]]))  # open beams are equally long
        limit = min(config.block_size, config.max_length - length)
        clock = asyncio.get_running_loop().time
        begin = clock()
        written = await gather_all(self._extend(slot, limit) for slot in slots)
        seconds_generate = clock() - begin
        replies = [reply for beam in written for reply in beam]
        parent = [tree.beams[slot] for slot in slots for _ in range(config.beam_width)]
        tokens = [list(reply.token_ids) for reply in replies]
        full = "length" if length + limit == config.max_length else ""
        finish = ["stop" if reply.finish_reason == "stop" else full for reply in replies]
        scored = await self._score(list(zip(parent, tokens, strict=True)), [bool(reason) for reason in finish])
        return Round(
            round=len(tree.rounds),
            parent=parent,
            tokens=tokens,
            value=scored.values,
            kept=select(scored.values, len(slots), config, self.task, len(tree.rounds)),
            finish=finish,
            seconds_generate=seconds_generate,
            seconds_score=scored.seconds,
            tokens_scored=scored.tokens_scored,
            tokens_reread=scored.tokens_reread,
            tokens_cached=sum(reply.cached_tokens for reply in replies),
        )

    async def _extend(self, slot: int, limit: int) -> list[Reply]:
        """`beam_width` continuations of one beam, of at most `limit` tokens."""
        task, tree = self.task, self.tree
        key = self.config.seed, task.data_idx, task.repeat_idx, len(tree.rounds), slot
        prompt = tree.prompt_ids + tree.response(tree.beams[slot])

        async def ask(candidates: list[int]) -> Sequence[Reply]:
            seeds = [request_seed(*key, candidate) for candidate in candidates]
            return await self.generate(prompt, len(candidates), limit, seeds, task.tree_id)

        try:
            return await ask_until_whole(ask, [limit] * self.config.beam_width, self.retry)
        except RequestsFailed as error:
            raise self._error(error) from error

    async def _score(self, items: list[tuple[int, list[int]]], finished: list[bool]) -> Scored:
        """Values of a round's candidates, (parent, tokens) each; all of them are numbers."""
        try:
            scored = await self.scorer.score(self.task.tree_id, items, finished)
        # An id outside the value model's vocabulary, a cache that cannot hold one trace, a device that cannot
        except (ValueError, MemoryError) as error:
            raise self._error(f"it cannot be scored: {error}") from error
        for value in scored.values:
            if not math.isfinite(value):
                raise self._error(f"the value model gave {value}")
        return scored

    def _error(self, what: object) -> SearchError:
        where = f"round {len(self.tree.rounds)} of problem {self.task.data_idx}, repetition {self.task.repeat_idx}"
        return SearchError(f"{where}: {what}")


def select(values: Sequence[float], count: int, config: SearchConfig, task: SearchTask, round_idx: int) -> list[bool]:
    """Which candidates are kept: the `count` best (ties: the lower index), or a seeded draw for `selection` random."""
    if config.selection == "random":
        draw = random.Random(request_seed(config.seed, task.data_idx, task.repeat_idx, round_idx, -1, -1))
        chosen = set(draw.sample(range(len(values)), count))
    else:
        chosen = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    return [i in chosen for i in range(len(values))]
