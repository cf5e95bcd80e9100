"""Block-wise beam search guided by values, on the event loop: pure Python, no model library.

Wang et al. 2025 (arXiv 2505.17373), section 2: a beam is extended by blocks of tokens, every candidate block is scored
by the value model, and the best ones go on. Several independent searches of one problem, pooled, are DVTS (diverse
verifier tree search; Beeching et al. 2024, "Scaling test-time compute with open models").
"""

import asyncio
import hashlib
import math
import random
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cli_utils import UserError

ROOT = 0  # node number of the prompt; candidates are numbered from 1 in the order they were written in
MAX_ATTEMPTS = 4  # of one request: the first and three retries
SELECTIONS = ("value", "random")


# ---------------------------------------------------------------------------------------------------------------------
# What is searched


@dataclass(frozen=True)
class SearchConfig:
    """`width` beams are kept, each extended by `branch` candidates a round; lengths are in response tokens."""

    width: int
    branch: int
    block_size: int
    max_length: int
    selection: str = "value"
    seed: int = 0


def parse_search_type(search_type: str, num_blocks: int, block_size: int, max_length: int) -> tuple[int, int, int]:
    """(width, branch, block_size) of a search type: `beamB`, `bfs` or `bon`.

    beamB: num_blocks / B beams of B candidates. bfs: one beam of num_blocks candidates. bon: num_blocks independent
    samples, that is beam1 with one block of max_length. Raises UserError.
    """
    for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("max_length", max_length)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if search_type == "bon":
        return num_blocks, 1, max_length
    if block_size > max_length:
        raise UserError(f"--block_size {block_size} is more than --max_length {max_length}; give at most {max_length}")
    if search_type == "bfs":
        return 1, num_blocks, block_size
    digits = search_type.removeprefix("beam")
    if not search_type.startswith("beam") or not digits.isdecimal() or int(digits) < 1:
        raise UserError(f"--search_type {search_type!r} is unknown; give beamB (beam2, say), bfs or bon")
    branch = int(digits)
    if num_blocks % branch:
        valid = [b for b in range(1, num_blocks + 1) if num_blocks % b == 0]
        nearest = min(valid, key=lambda b: abs(b - branch))
        more = math.ceil(num_blocks / branch) * branch
        raise UserError(
            f"--num_blocks {num_blocks} is not divisible by the {branch} of --search_type {search_type}; "
            f"give beam{nearest} or --num_blocks {more}"
        )
    return num_blocks // branch, branch, block_size


@dataclass(frozen=True)
class SearchTask:
    """One search: which problem, which repetition, and the prompt."""

    data_idx: int
    repeat_idx: int
    prompt_ids: tuple[int, ...]

    @property
    def tree_id(self) -> str:
        return f"{self.data_idx}/{self.repeat_idx}"


def request_seed(seed: int, data_idx: int, repeat_idx: int, round_idx: int, beam: int, candidate: int) -> int:
    """A seed in 0 .. 2**31 - 1 that depends on these six numbers and nothing else."""
    packed = struct.pack("<6q", seed, data_idx, repeat_idx, round_idx, beam, candidate)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little") & 0x7FFFFFFF


# ---------------------------------------------------------------------------------------------------------------------
# The tree


@dataclass
class Round:
    """One finished round of one search: its candidates side by side. This is what the journal holds."""

    round: int
    parent: list[int]  # node numbers
    tokens: list[list[int]]
    value: list[float]
    kept: list[bool]
    finish: list[str]  # "stop", "length" (max_length reached), or "" (goes on if kept)
    seconds_generate: float = 0.0
    seconds_score: float = 0.0
    tokens_scored: int = 0
    tokens_reread: int = 0
    tokens_cached: int = 0


class Tree:
    """All nodes of a search and the beams that are still held. Built round by round, live or from a journal alike."""

    def __init__(self, prompt_ids: Sequence[int], width: int):
        self.prompt_ids = list(prompt_ids)
        self.parent, self.finish, self.value = [-1], [""], [math.nan]
        self.tokens: list[list[int]] = [[]]
        self.beams = [ROOT] * width
        self.rounds: list[Round] = []

    @property
    def open_slots(self) -> list[int]:
        """Places of the beams that are not finished."""
        return [slot for slot, node in enumerate(self.beams) if not self.finish[node]]

    def path(self, node: int) -> list[int]:
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def response(self, node: int) -> list[int]:
        """Response tokens from the prompt's end to the end of this node."""
        return [token for above in self.path(node) for token in self.tokens[above]]

    def add(self, record: Round) -> None:
        """Append a round. Kept candidates take the places of the beams they replace, in the order of the candidates."""
        first = len(self.parent)
        self.parent += record.parent
        self.tokens += record.tokens
        self.value += record.value
        self.finish += record.finish
        kept = [first + i for i, keep in enumerate(record.kept) if keep]
        for slot, node in zip(self.open_slots, kept, strict=True):
            self.beams[slot] = node
        self.rounds.append(record)

    def history(self) -> list[tuple[int, list[int]]]:
        """(parent, tokens) of every node but the prompt, for a scorer that has not seen them."""
        return list(zip(self.parent[1:], self.tokens[1:], strict=True))


@dataclass
class SearchResult:
    """A finished search. `beams` are node numbers of `tree`; `seconds` is its own wall-clock, waiting included."""

    task: SearchTask
    tree: Tree
    seconds: float

    @property
    def beams(self) -> list[int]:
        return self.tree.beams

    def total(self, name: str) -> Any:
        """Sum of a number over the rounds: seconds_generate, tokens_scored, ..."""
        return sum(getattr(record, name) for record in self.tree.rounds)


def select(values: Sequence[float], count: int, config: SearchConfig, task: SearchTask, round_idx: int) -> list[bool]:
    """Which candidates are kept: the `count` best (ties: the lower index), or a seeded draw for `selection` random."""
    if config.selection == "random":
        draw = random.Random(request_seed(config.seed, task.data_idx, task.repeat_idx, round_idx, -1, -1))
        chosen = set(draw.sample(range(len(values)), count))
    else:
        chosen = set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    return [i in chosen for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------------------------
# What a search is given


class ReplyLike(Protocol):
    """What the search reads of a generator's reply (engine_utils.Reply)."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def cached_tokens(self) -> int: ...


# generate(prompt_ids, n, max_new_tokens, seeds, tree_id) -> n replies
Generate = Callable[[list[int], int, int, list[int], str], Awaitable[Sequence[ReplyLike]]]


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


# ---------------------------------------------------------------------------------------------------------------------
# The search


class SearchError(RuntimeError):
    """A search cannot go on; the message is one line."""


async def search(
    task: SearchTask,
    generate: Generate,
    scorer: Scorer,
    config: SearchConfig,
    rounds: Iterable[Round] = (),
    on_round: Callable[[SearchTask, Tree, Round], None] = lambda task, tree, record: None,
) -> SearchResult:
    """Search one problem once. `rounds` are those of a journal, not done again; `on_round` is told of each new one.

    Raises SearchError where the generator keeps failing or the value model gives no number.
    """
    tree = Tree(task.prompt_ids, config.width)
    for record in rounds:
        tree.add(record)
    spent, begin = sum(r.seconds_generate + r.seconds_score for r in tree.rounds), time.perf_counter()
    if tree.open_slots:
        scorer.start(task.tree_id, tree.prompt_ids, tree.history())
    try:
        while slots := tree.open_slots:
            record = await _one_round(task, tree, slots, generate, scorer, config)
            tree.add(record)
            scorer.keep(task.tree_id, {tree.beams[slot] for slot in tree.open_slots})
            on_round(task, tree, record)
    finally:
        scorer.release(task.tree_id)
    return SearchResult(task, tree, spent + time.perf_counter() - begin)


async def _one_round(
    task: SearchTask, tree: Tree, slots: list[int], generate: Generate, scorer: Scorer, config: SearchConfig
) -> Round:
    begin, index = time.perf_counter(), len(tree.rounds)
    written = await _gather([_extend(task, tree, slot, index, generate, config) for slot in slots])
    seconds = time.perf_counter() - begin
    parent = [tree.beams[slot] for slot in slots for _ in range(config.branch)]
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
    task: SearchTask, tree: Tree, slot: int, index: int, generate: Generate, config: SearchConfig
) -> list[ReplyLike]:
    """`branch` continuations of one beam. A failed request (abort, or a block that is too short) is sent again."""
    response = tree.response(tree.beams[slot])
    limit = min(config.block_size, config.max_length - len(response))
    prompt = tree.prompt_ids + response
    replies: dict[int, ReplyLike] = {}
    for attempt in range(MAX_ATTEMPTS):
        missing = [c for c in range(config.branch) if c not in replies]
        seeds = [request_seed(config.seed, task.data_idx, task.repeat_idx, index, slot, c) for c in missing]
        got = await generate(prompt, len(missing), limit, seeds, task.tree_id)
        replies |= {c: reply for c, reply in zip(missing, got, strict=True) if _is_whole(reply, limit)}
        if len(replies) == config.branch:
            return [replies[c] for c in range(config.branch)]
        await asyncio.sleep(0.1 * 2**attempt)
    reasons = sorted({f"{reply.finish_reason} after {len(reply.token_ids)} tokens" for reply in got})
    raise SearchError(
        f"the generator failed {MAX_ATTEMPTS} times on round {index} of problem {task.data_idx}, "
        f"repetition {task.repeat_idx} (asked for {limit} tokens; got {', '.join(reasons)})"
    )


def _is_whole(reply: ReplyLike, limit: int) -> bool:
    """A block ends with a stop token or has all the tokens asked for; so all unfinished beams are equally long."""
    if reply.finish_reason == "stop":
        return 0 < len(reply.token_ids) <= limit
    return reply.finish_reason == "length" and len(reply.token_ids) == limit


T = TypeVar("T")


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; where one fails, the others are cancelled and waited for before its error goes on."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for pending in tasks:
            pending.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def run_searches(
    tasks: Sequence[SearchTask],
    run_one: Callable[[SearchTask], Coroutine[Any, Any, None]],
    batch_size: int,
) -> None:
    """Run all searches, at most `batch_size` at once, the earlier ones first. The first error ends all."""
    queue = iter(tasks)

    async def worker() -> None:
        for task in queue:
            await run_one(task)

    await _gather([worker() for _ in range(min(batch_size, len(tasks)))])
