"""Block-wise beam search guided by values, on the event loop: pure Python, no model library.

Wang et al. 2025 (arXiv 2505.17373), section 2: a beam is extended by blocks of tokens, every candidate block is scored
by the value model, and the best ones go on. Several independent searches of one problem, pooled, are DVTS (diverse
verifier tree search; Beeching et al. 2024, "Scaling test-time compute with open models").
"""

import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from common_lib.concurrency import gather_all
from engine_lib.base import Reply
from engine_lib.retry import RequestsFailed, RetryPolicy, ask_until_whole
from search_lib.scorers import Scorer
from search_lib.tree import Round, SearchConfig, SearchResult, SearchTask, Tree, request_seed

# generate(prompt_ids, n, max_new_tokens, seeds, tree_id) -> n replies
Generate = Callable[[list[int], int, int, list[int], str], Awaitable[Sequence[Reply]]]


class SearchError(RuntimeError):
    """A search cannot go on; the message is one line."""


async def search(
    task: SearchTask,
    generate: Generate,
    scorer: Scorer,
    config: SearchConfig,
    rounds: Iterable[Round] = (),
    on_round: Callable[[SearchTask, Tree, Round], None] = lambda task, tree, record: None,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008
) -> SearchResult:
    """Search one problem once. `rounds` are those of a journal, not done again; `on_round` is told of each new one.

    Raises SearchError where the generator keeps failing or the value model gives no number.
    """
    tree = Tree(task.prompt_ids, config.num_beams)
    for record in rounds:
        tree.add(record)
    spent, begin = sum(r.seconds_generate + r.seconds_score for r in tree.rounds), time.perf_counter()
    if tree.open_slots:
        scorer.start(task.tree_id, tree.prompt_ids, tree.history())
    try:
        while slots := tree.open_slots:
            record = await _one_round(task, tree, slots, generate, scorer, config, retry)
            tree.add(record)
            scorer.keep(task.tree_id, {tree.beams[slot] for slot in tree.open_slots})
            on_round(task, tree, record)
    finally:
        scorer.release(task.tree_id)
    return SearchResult(task, tree, spent + time.perf_counter() - begin)


async def _one_round(
    task: SearchTask,
    tree: Tree,
    slots: list[int],
    generate: Generate,
    scorer: Scorer,
    config: SearchConfig,
    retry: RetryPolicy,
) -> Round:
    begin, index = time.perf_counter(), len(tree.rounds)
    written = await gather_all(_extend(task, tree, slot, index, generate, config, retry) for slot in slots)
    seconds = time.perf_counter() - begin
    parent = [tree.beams[slot] for slot in slots for _ in range(config.beam_width)]
    replies = [reply for beam in written for reply in beam]
    tokens = [list(reply.token_ids) for reply in replies]
    lengths = {node: len(tree.response(node)) for node in set(parent)}
    finish = [
        "stop" if reply.finish_reason == "stop" else "length" if lengths[node] + len(new) >= config.max_length else ""
        for node, new, reply in zip(parent, tokens, replies, strict=True)
    ]
    try:
        scored = await scorer.score(task.tree_id, list(zip(parent, tokens, strict=True)), [bool(f) for f in finish])
    except ValueError as error:  # an id outside the value model's vocabulary, a cache that cannot hold one trace
        raise SearchError(f"problem {task.data_idx} cannot be scored: {error}") from error
    for value in scored.values:
        if not math.isfinite(value):
            raise SearchError(f"the value model gave {value} in round {index} of problem {task.data_idx}")
    return Round(
        round=index,
        parent=parent,
        tokens=tokens,
        value=scored.values,
        kept=select(scored.values, len(slots), config, task, index),
        finish=finish,
        seconds_generate=seconds,
        seconds_score=scored.seconds,
        tokens_scored=scored.tokens_scored,
        tokens_reread=scored.tokens_reread,
        tokens_cached=sum(reply.cached_tokens for reply in replies),
    )


async def _extend(
    task: SearchTask, tree: Tree, slot: int, index: int, generate: Generate, config: SearchConfig, retry: RetryPolicy
) -> list[Reply]:
    """`beam_width` continuations of one beam."""
    response = tree.response(tree.beams[slot])
    limit = min(config.block_size, config.max_length - len(response))
    prompt = tree.prompt_ids + response

    async def ask(candidates: list[int]) -> Sequence[Reply]:
        seeds = [request_seed(config.seed, task.data_idx, task.repeat_idx, index, slot, c) for c in candidates]
        return await generate(prompt, len(candidates), limit, seeds, task.tree_id)

    try:
        return await ask_until_whole(ask, [limit] * config.beam_width, retry)
    except RequestsFailed as error:
        where = f"round {index} of problem {task.data_idx}, repetition {task.repeat_idx}"
        raise SearchError(f"{where}: {error}") from error


def select(values: Sequence[float], count: int, config: SearchConfig, task: SearchTask, round_idx: int) -> list[bool]:
    """Which candidates are kept: the `count` best (ties: the lower index), or a seeded draw for `selection` random."""
    if config.selection == "random":
        draw = random.Random(request_seed(config.seed, task.data_idx, task.repeat_idx, round_idx, -1, -1))
        chosen = set(draw.sample(range(len(values)), count))
    else:
        chosen = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    return [i in chosen for i in range(len(values))]
