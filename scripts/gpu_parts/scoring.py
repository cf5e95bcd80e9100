"""Scoring: values of ValueScorer against plain full passes, its speed against reading every trace again, and its memory.

One search tree is grown as beam search grows it: `candidates` blocks a round, half of them kept, until the trace is
rounds x block tokens long. "re-reading" is the released code's way: the whole trace of every candidate at every block,
and of every final beam once more.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch

from classifier_lib import Qwen2ForClassifier, ValueScorer
from classifier_lib.attention import flash_missing
from classifier_lib.modeling import success_probs
from common_lib.devices import memory_of, use_expandable_segments
from gpu_parts.models import NOT_ON_CPU, allocated_gb, free_memory, peak_gb, timed, value_model
from gpu_parts.needs import need
from gpu_parts.report import Report
from search_lib.memory_plan import auto_limit
from training_lib.step import peak_flops, step_flops

before_cuda = use_expandable_segments  # as a search does

Beam = tuple[int, list[int]]  # node number, all tokens
Score = Callable[[int, list[Beam], list[list[int]]], list[float]]  # of a tree's parents, each with a block


@dataclass(frozen=True)
class Growth:
    """What is scored: `trees` trees at once, each of `candidates` blocks a round."""

    prompt: int
    block: int
    rounds: int = 4
    candidates: int = 8
    trees: int = 1

    @property
    def kept(self) -> int:
        return self.candidates // 2

    @property
    def tokens_cached(self) -> int:
        """Tokens read where each is read once."""
        return self.trees * (self.prompt + self.rounds * self.candidates * self.block)

    @property
    def tokens_reread(self) -> int:
        """Tokens read where every candidate's whole trace is, and every final beam's."""
        lengths = [self.prompt + self.block * (i + 1) for i in range(self.rounds)]
        return self.trees * (self.candidates * sum(lengths) + self.kept * lengths[-1])

    @property
    def pairs(self) -> int:
        """(query, key) pairs of the tokens that are read once."""
        branches = [(self.prompt + i * self.block, self.block) for i in range(self.rounds)]
        pairs = sum(self.candidates * (prefix * new + new * (new + 1) // 2) for prefix, new in branches)
        return self.trees * (pairs + self.prompt * (self.prompt + 1) // 2)


CHECK = {"tiny": Growth(20, 12, 2, 4), "small": Growth(100, 64, 3), "full": Growth(500, 256, 3)}  # of the differences
SPEED = {"tiny": Growth(20, 24, 3, 4), "small": Growth(100, 128), "full": Growth(500, 4096)}
MANY = 8  # trees
SPEED_TABLE, MEMORY = "growing trees", "memory"
DIFFERENCE = "largest difference of a value"
TIGHT = {"tiny": 0.0006, "small": 0.06, "full": 6.0}  # GB, less than MANY trees want


def run(report: Report) -> None:
    with report.going_on("differences"):
        differences(report)
    model = value_model(report.size, report.device, torch.bfloat16 if report.device == "cuda" else torch.float32)
    for name, work in (("out of memory", out_of_memory), ("speed", speed), ("memory", memory), ("copies", copies)):
        if report.has_time(need("scoring", name, report.size), name):
            with report.going_on(name):
                work(report, model)


# ---------------------------------------------------------------------------------------------------------------------
# Growing trees


@functools.cache
def drawn(growth: Growth, vocab_size: int) -> tuple[list[list[int]], list[list[list[list[int]]]]]:
    """Random tokens: the trees' prompts, and by round and tree the blocks."""
    rng = random.Random(1)

    def tokens(count: int) -> list[int]:
        return rng.choices(range(vocab_size), k=count)

    prompts = [tokens(growth.prompt) for _ in range(growth.trees)]
    blocks = [[[tokens(growth.block) for _ in range(growth.candidates)] for _ in prompts] for _ in range(growth.rounds)]
    return prompts, blocks


def grow(score: Score, growth: Growth, vocab_size: int) -> list[list[Beam]]:
    """Grow the trees, a round of each in turn; the final beams of each."""
    prompts, rounds = drawn(growth, vocab_size)
    beams: list[list[Beam]] = [[(0, prompt)] * growth.kept for prompt in prompts]
    for round_idx, round_blocks in enumerate(rounds):
        for tree, blocks in enumerate(round_blocks):
            parents = [beams[tree][i // 2] for i in range(growth.candidates)]
            values = score(tree, parents, blocks)
            order = sorted(range(growth.candidates), key=lambda i: -values[i])[: growth.kept]
            first = 1 + round_idx * growth.candidates  # nodes are numbered in the order of scoring
            beams[tree] = [(first + i, parents[i][1] + blocks[i]) for i in order]
    return beams


def cached(scorer: ValueScorer, growth: Growth) -> list[tuple[list[int], float]]:
    """Grow with every token read once, as the search does; (trace, value) of each candidate."""
    begun, scored = set(), []

    def score(tree: int, parents: list[Beam], blocks: list[list[int]]) -> list[float]:
        if tree not in begun:
            begun.add(tree)
            scorer.start(str(tree), parents[0][1])
        else:
            scorer.keep(str(tree), {node for node, _ in parents})
        items = [(node, block) for (node, _), block in zip(parents, blocks, strict=True)]
        values = scorer.score(str(tree), items)
        scored.extend((ids + block, v) for (_, ids), block, v in zip(parents, blocks, values, strict=True))
        return values

    try:
        grow(score, growth, scorer.model.config.vocab_size)
    finally:
        for tree in begun:
            scorer.release(str(tree))
    return scored


def rereading(model: Qwen2ForClassifier, growth: Growth) -> int:
    """Grow with every candidate's whole trace read, one at a time, as the released code does; tokens read."""
    tokens = 0

    def score(tree: int, parents: list[Beam], blocks: list[list[int]]) -> list[float]:
        nonlocal tokens
        traces = [ids + block for (_, ids), block in zip(parents, blocks, strict=True)]
        tokens += sum(map(len, traces))
        return [full_value(model, ids) for ids in traces]

    for tree, beams in enumerate(grow(score, growth, model.config.vocab_size)):
        score(tree, beams, [[]] * len(beams))
    return tokens


@torch.inference_mode()
def full_value(model: Qwen2ForClassifier, ids: Sequence[int], rows: int = 1) -> float:
    """By a pass of that many equal rows: the first one's."""
    input_ids = torch.tensor([ids] * rows, device=model.device)
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1]
    return success_probs(model.score(hidden))[0].item()


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def differences(report: Report) -> None:
    """In float32 the scorer's values are those of a full pass; in bfloat16 they differ by its rounding, which is
    measured: that of full passes in bfloat16 to one in float32."""
    exact = value_model(report.size, report.device, torch.float32)
    for dtype, attention in kernels(report):
        name = f"{str(dtype).removeprefix('torch.')}, {attention}"
        if report.has_time(need("scoring", name, report.size), f"differences, {name}"):
            with report.going_on(name):
                difference(report, name, exact, dtype, attention)


def difference(report: Report, name: str, exact: Qwen2ForClassifier, dtype: torch.dtype, attention: str) -> None:
    is_exact = dtype == torch.float32
    model = exact if is_exact else value_model(report.size, report.device, dtype, attention)
    scored = cached(ValueScorer(model), CHECK[report.size])
    if attention not in (used := model.config._attn_implementation):
        report.say(f"{name}: ValueScorer takes {used} instead")
    full = [full_value(model, ids) for ids, _ in scored]
    report.figure(DIFFERENCE, "spread of values", max(full) - min(full), case=name, at_least=1e-3)
    worst = max(abs(value - other) for (_, value), other in zip(scored, full, strict=True))
    rounding = max(abs(full_value(exact, ids) - value) for (ids, _), value in zip(scored, full, strict=True))
    bound = exact_bound(report, name, exact, [ids for ids, _ in scored], full) if is_exact else max(2 * rounding, 1e-3)
    report.figure(DIFFERENCE, "scorer - full pass", worst, case=name, at_most=bound)
    report.figure(DIFFERENCE, "full pass - full pass in float32", rounding, case=name, at_most=0.1)


def exact_bound(
    report: Report, name: str, exact: Qwen2ForClassifier, traces: list[list[int]], full: list[float]
) -> float:
    """Of the scorer's difference in float32. A GPU multiplies matrices of other shapes in another order, so there it is
    twice what a full pass itself changes by beside a copy of it, if that is more than on a CPU."""
    pairs = zip(traces, full, strict=True)
    floor = max(abs(full_value(exact, ids, rows=2) - value) for ids, value in pairs)
    report.figure(DIFFERENCE, "full pass - full pass in a batch of two", floor, case=name, at_most=1e-4)
    if report.device == "cpu":
        return 1e-5
    report.say(
        "float32: the scorer may be off by 1e-5, or twice what a full pass differs by in a batch of two, if more"
    )
    return max(1e-5, 2 * floor)


def kernels(report: Report) -> list[tuple[torch.dtype, str]]:
    """(dtype, attention) of each way to compute that is installed; the others are told."""
    ways = [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa")]
    for name in ("flash_attention_2", "flash_attention_4"):
        if why := flash_missing(name, torch.bfloat16, report.device):
            report.leave_out(f"bfloat16, {name}", why)
        else:
            ways.append((torch.bfloat16, name))
    return ways


def speed(report: Report, model: Qwen2ForClassifier) -> None:
    """Of one tree and of many, each token read once, against reading every trace again."""
    peak, alone = peak_flops(model.device), SPEED[report.size]
    longest = alone.prompt + alone.rounds * alone.block
    report.say(
        f"traces grow by {alone.rounds} blocks of {alone.block} tokens, to {longest}, {alone.candidates} blocks a round"
    )
    full_value(model, list(range(16)))
    cached(ValueScorer(model), replace(alone, rounds=1))  # warm-up
    baseline, reread = timed(report.device, lambda: rereading(model, alone))
    rate = 0.0
    for trees in (1, MANY):
        growth, name = replace(alone, trees=trees), f"{trees} tree{'s' * (trees > 1)}"
        if rate and not report.has_time(1.3 * growth.tokens_cached / rate, f"speed, {name}"):
            return
        drawn(growth, model.config.vocab_size)
        scorer = ValueScorer(model, auto_limit(report.device, *memory_of(report.device)))
        free_memory(report.device)
        before = allocated_gb(report.device)
        seconds, _ = timed(report.device, lambda scorer=scorer, growth=growth: cached(scorer, growth))
        rate = scorer.usage.tokens_scored / seconds
        flops = step_flops(model, growth.tokens_cached, growth.pairs) / 3  # forward only: a third of a training step's
        used = peak_gb(report.device)
        report.figure(SPEED_TABLE, "tokens scored", scorer.usage.tokens_scored, case=name)
        report.figure(SPEED_TABLE, "seconds", seconds, "s", case=name)
        report.figure(SPEED_TABLE, "tokens/s", rate, case=name)
        report.figure(
            SPEED_TABLE, "MFU", 100 * flops / seconds / peak if peak else None, "%", case=name, why="no peak is known"
        )
        limit, over = scorer.budget.limit / 1e9, used and used - before
        report.figure(SPEED_TABLE, "peak over the weights", over, "GB", case=name, at_most=limit, why=NOT_ON_CPU)
        report.figure(
            SPEED_TABLE, "re-reading / cached, tokens", trees * reread / scorer.usage.tokens_scored, "x", case=name
        )
        report.figure(SPEED_TABLE, "re-reading / cached, time", trees * baseline / seconds, "x", case=name)


def copies(report: Report, model: Qwen2ForClassifier) -> None:
    """Share of the time in which keys and values are copied, into the working cache and out of it."""
    scorer, seconds = ValueScorer(model), [0.0]

    def counted(work: Callable) -> Callable:
        def copy(*args):
            took, result = timed(report.device, lambda: work(*args))
            seconds[0] += took
            return result

        return copy

    scorer._working_cache, scorer._hold = counted(scorer._working_cache), counted(scorer._hold)
    total, _ = timed(report.device, lambda: cached(scorer, SPEED[report.size]))
    report.figure(MEMORY, "time in copies of keys and values, 1 tree", 100 * seconds[0] / total, "%")


def memory(report: Report, model: Qwen2ForClassifier) -> None:
    """Many trees in a cache that is too small for them: the budget holds, and values are those of before."""
    growth, limit = replace(SPEED[report.size], trees=MANY, rounds=2), TIGHT[report.size]
    expected = dict_of(cached(ValueScorer(model), growth))
    free_memory(report.device)
    before = allocated_gb(report.device)
    scorer = ValueScorer(model, int(limit * 1e9))
    difference, used = largest(dict_of(cached(scorer, growth)), expected), peak_gb(report.device)
    small, reread = f"cache of {limit:g} GB", 100 * scorer.usage.tokens_reread / growth.tokens_cached
    report.figure(MEMORY, f"{small}: peak", used and used - before, "GB", at_most=limit, why=NOT_ON_CPU)
    report.figure(MEMORY, f"{small}: tokens read again", reread, "%")
    report.figure(MEMORY, f"{small}: difference of a value", difference, at_most=tolerance(model))


def dict_of(scored: list[tuple[list[int], float]]) -> dict[tuple[int, ...], float]:
    return {tuple(ids): value for ids, value in scored}


def largest(found: dict[tuple[int, ...], float], expected: dict[tuple[int, ...], float]) -> float:
    """Of the differences on the traces that are in both: near-equal values may be ranked otherwise."""
    return max(abs(found[ids] - expected[ids]) for ids in found.keys() & expected.keys())


def tolerance(model: Qwen2ForClassifier) -> float:
    return 1e-5 if model.dtype == torch.float32 else 0.1


def out_of_memory(report: Report, model: Qwen2ForClassifier) -> None:
    """A device with less memory than the scorer was told of: it must back off, with the same values."""
    growth = replace(SPEED[report.size], rounds=2)
    free_memory(report.device)
    before = allocated_gb(report.device)
    expected = dict_of(cached(ValueScorer(model), growth))
    wanted = (peak_gb(report.device) or 0) - (before or 0)
    scorer = ValueScorer(model)
    with small_device(report.device, model, 0.6 * wanted, growth.candidates * growth.block // 2):
        difference = largest(dict_of(cached(scorer, growth)), expected)
    report.figure(MEMORY, "device too small: back-offs", scorer.back_offs, at_least=1)
    report.figure(MEMORY, "device too small: difference of a value", difference, at_most=tolerance(model))


@contextmanager
def small_device(device: str, model: Qwen2ForClassifier, more_gb: float, tokens: int) -> Iterator[None]:
    """A GPU that gives only `more_gb` more. On a CPU a stand-in, which refuses passes of more than `tokens`."""
    if device.startswith("cuda"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_gb * 1e9) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = model.model.forward

    def refusing(*args, **kwargs):
        if kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError(f"a stand-in for a GPU that takes {tokens} tokens a pass")
        return forward(*args, **kwargs)

    with mock.patch.object(model.model, "forward", refusing):
        yield
