"""What the order of work costs: this search against the released code's order, on one engine, in one run.

    python scripts/benchmark_search.py                     # SGLang where installed, else transformers; a small model
    python scripts/benchmark_search.py --device cuda --generator MODEL --value_model MODEL --block_size 4096 ...

"lock-step": all searches generate a block and wait for the last one; then every candidate's whole trace is read by the
value model, one at a time; then all select; at the end the final beams are read once more. "this search": every search
goes at its own pace, and each token is read once. Both get the same number of prompts of random tokens, nothing stops
before its length, so both generate the same number of tokens. Their runs alternate, on new prompts each time.

Engine idle: nothing was asked of the engine. Per search, "waiting" is for the other searches (lock-step) or for the
scorer's turn (this search); "own" is what is left: building requests, the tree, selection, the event loop.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from benchmark_scoring import SHAPES

from common_lib.cli import ArgumentParser, UserError, quiet_transformers, run_script, set_up_logging
from common_lib.concurrency import run_bounded
from common_lib.models import inspect_model
from engine_lib.base import Engine, EngineConfig, Request
from engine_lib.choose import choose_engine, make_engine
from search_lib.scorers import ScorerThread
from search_lib.search import search
from search_lib.tree import SearchConfig, SearchTask, select

Interval = tuple[float, float]


@dataclass
class Times:
    """When engine and value model worked, in seconds of `time.perf_counter`, and what each search waited for."""

    engine: list[Interval] = field(default_factory=list)
    scorer: list[Interval] = field(default_factory=list)
    generating: float = 0.0  # summed over searches
    scoring: float = 0.0
    waiting: float = 0.0
    total: float = 0.0
    tokens_generated: int = 0
    tokens_scored: int = 0


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - begin for begin, end in union(intervals))


def both(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Time that lies in both."""
    return length(first) + length(second) - length([*first, *second])


# ---------------------------------------------------------------------------------------------------------------------
# The two orders of work


@dataclass
class Bench:
    """What both orders are given."""

    engine: Engine
    model: object  # Qwen2ForClassifier
    config: SearchConfig
    prompts: list[tuple[int, ...]]
    cache_bytes: int
    times: Times = field(default_factory=Times)

    async def generate(self, prompt_ids: list[int], n: int, limit: int, tree_id: str):
        begin = time.perf_counter()
        replies = await self.engine.generate(
            [Request(prompt_ids, limit, 1.0, 0.95, seed=random.getrandbits(31), group=tree_id) for _ in range(n)]
        )
        self.times.engine.append((begin, time.perf_counter()))
        self.times.tokens_generated += sum(len(reply.token_ids) for reply in replies)
        return replies


class TimedScorer:
    """A ValueScorer that notes when it works."""

    def __init__(self, scorer, times: Times):
        self.scorer, self.times = scorer, times

    def __getattr__(self, name: str):
        return getattr(self.scorer, name)

    def score(self, *args):
        begin = time.perf_counter()
        values = self.scorer.score(*args)
        self.times.scorer.append((begin, time.perf_counter()))
        return values


async def this_search(bench: Bench) -> None:
    from classifier_lib import ValueScorer

    times, scorer = bench.times, ScorerThread(TimedScorer(ValueScorer(bench.model, bench.cache_bytes), bench.times))

    async def generate(prompt_ids, n, limit, seeds, tree_id):
        return await bench.generate(prompt_ids, n, limit, tree_id)

    class Waits:
        """What a search sees of the scorer: how long it waited for its values."""

        start, keep, release = scorer.start, scorer.keep, scorer.release

        async def score(self, *args):
            begin = time.perf_counter()
            scored = await scorer.score(*args)
            times.waiting += time.perf_counter() - begin - scored.seconds
            return scored

    async def one(task: SearchTask) -> None:
        result = await search(task, generate, Waits(), bench.config)
        times.generating += result.total("seconds_generate")
        times.scoring += result.total("seconds_score")
        times.tokens_scored += result.total("tokens_scored")
        times.total += result.seconds

    try:
        tasks = [SearchTask(i, 0, prompt) for i, prompt in enumerate(bench.prompts)]
        await run_bounded(tasks, one, len(tasks))
    finally:
        scorer.close()


async def lock_step(bench: Bench) -> None:
    import torch

    times, config, start = bench.times, bench.config, time.perf_counter()
    device = next(bench.model.parameters()).device
    paths = [[list(prompt)] * config.num_beams for prompt in bench.prompts]

    def score(ids: list[int]) -> float:
        """The whole trace, alone."""
        begin = time.perf_counter()
        with torch.inference_mode():
            value = bench.model(torch.tensor([ids], device=device)).success_probs[0, -1].item()
        times.scorer.append((begin, time.perf_counter()))
        times.tokens_scored += len(ids)
        return value

    async def extend(index: int) -> list[list[int]]:
        begin = time.perf_counter()
        beams = [bench.generate(path, config.beam_width, config.block_size, f"{index}/0") for path in paths[index]]
        written = await asyncio.gather(*beams)
        times.generating += time.perf_counter() - begin
        return [path + r.token_ids for path, beam in zip(paths[index], written, strict=True) for r in beam]

    for round_idx in range(config.max_length // config.block_size):
        candidates = await asyncio.gather(*(extend(i) for i in range(len(paths))))
        values = [[score(ids) for ids in tree] for tree in candidates]
        for i, tree in enumerate(candidates):
            kept = select(values[i], config.num_beams, config, SearchTask(i, 0, ()), round_idx)
            paths[i] = [ids for ids, keep in zip(tree, kept, strict=True) if keep]
    for tree in paths:
        for ids in tree:
            score(ids)
    times.scoring = length(times.scorer)
    times.total = len(paths) * (time.perf_counter() - start)
    # Every search waits for the slowest block of a round, and while the other searches are scored.
    every_generating = len(paths) * length(times.engine)
    times.waiting = every_generating - times.generating + (len(paths) - 1) * times.scoring


# ---------------------------------------------------------------------------------------------------------------------
# Measure and show


async def measure(order, bench: Bench) -> dict[str, float]:
    begin = time.perf_counter()
    await order(bench)
    wall, times, count = time.perf_counter() - begin, bench.times, len(bench.prompts)
    engine = length(times.engine)
    return {
        "wall-clock, s": wall,
        "searches a minute": 60 * count / wall,
        "engine busy, s": engine,
        "engine idle, s": wall - engine,
        "engine idle, %": 100 * (1 - engine / wall),
        "value model busy, s": length(times.scorer),
        "both at once, s": both(times.engine, times.scorer),
        "neither, s": wall - length([*times.engine, *times.scorer]),
        "tokens generated": times.tokens_generated,
        "tokens scored": times.tokens_scored,
        "tokens scored a token generated": times.tokens_scored / times.tokens_generated,
        "one search: generating, s": times.generating / count,
        "one search: scoring, s": times.scoring / count,
        "one search: waiting, s": times.waiting / count,
        "one search: own, s": (times.total - times.generating - times.scoring - times.waiting) / count,
    }


async def compare(make_bench, args: argparse.Namespace, engine: Engine) -> dict[str, list[dict[str, float]]]:
    """Measurements of each order, one a repeat."""
    orders = {"lock-step": lock_step, "this search": this_search}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in orders}
    try:
        for order in orders.values():  # warm up
            await measure(order, make_bench(2))
        for repeat in range(args.repeats):
            for name, order in orders.items():
                results[name].append(await measure(order, make_bench(args.searches)))
                seconds = results[name][-1]["wall-clock, s"]
                print(f"{name}, run {repeat + 1}: {seconds:.2f} s", file=sys.stderr, flush=True)
    finally:
        await engine.close()
    return results


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: the median of the repeats, and this search over lock-step."""
    first, second = results
    lines = [f"| | {first} | {second} | ratio |", "|---|---:|---:|---:|"]
    for name in results[first][0]:
        a, b = (statistics.median(run[name] for run in results[order]) for order in (first, second))
        digits = 0 if name.startswith("tokens g") or name == "tokens scored" else 2 if a < 100 else 1
        ratio = f"{b / a:.2f}" if a > 0.005 else "-"
        lines.append(f"| {name} | {a:,.{digits}f} | {b:,.{digits}f} | {ratio} |")
    return "\n".join(lines)


def make_models(args: argparse.Namespace, folder: Path):
    """Folder of the generator, and the value model; random weights of `--shape` where none are named."""
    import torch
    from benchmark_scoring import make_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from classifier_lib import Qwen2ForClassifier

    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    generator = args.generator
    if generator is None:
        torch.manual_seed(1)
        settings = SHAPES[args.shape] | dict(max_position_embeddings=1 << 15, tie_word_embeddings=False, eos_token_id=0)
        Qwen2ForCausalLM(Qwen2Config(**settings)).to(dtype).save_pretrained(folder)
        generator = folder
    if args.value_model is None:
        return Path(generator), make_model(args.shape, args.device, dtype, "sdpa")
    value_model = Qwen2ForClassifier.from_pretrained(args.value_model, dtype=dtype, attn_implementation="auto")
    return Path(generator), value_model.to(args.device).eval()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--searches", type=int, default=16, help="at once")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of a trace")
    parser.add_argument("--block_size", type=int, default=64, help="tokens of a block")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--num_beams", type=int, default=4, help="beams of a search")
    parser.add_argument("--beam_width", type=int, default=2, help="candidates of a beam")
    parser.add_argument("--repeats", type=int, default=3, help="of both orders, one after the other; medians are shown")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of random models")
    parser.add_argument("--generator", help="a model folder in place of random weights")
    parser.add_argument("--value_model", help="a model folder in place of random weights")
    parser.add_argument(
        "--engine", choices=("auto", "sglang", "transformers"), default="auto", help="auto: sglang where installed"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--sglang_args", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the SGLang engine"
    )
    parser.add_argument("--piref_gpu_util", type=float, default=0.4, help="SGLang's share of the GPU's memory")
    parser.add_argument("--value_cache_gb", type=float, default=2.0, help="bound of the scorer's caches")
    args = parser.parse_args(argv)
    for name in ("searches", "rounds", "block_size", "prompt", "num_beams", "beam_width", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    quiet_transformers()
    args = parse(argv)
    if args.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))  # half for each model
    import torch

    if args.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        generator, model = make_models(args, Path(folder))
        kind, info = choose_engine(args.engine), inspect_model(generator, "--generator")
        engine = make_engine(
            kind,
            EngineConfig(
                info.path, info.vocab_size, args.device, seed=1, samples=False, gpu_share=args.piref_gpu_util,
                sglang_args=tuple(args.sglang_args),
            ),
        )  # fmt: skip
        config = SearchConfig(args.num_beams, args.beam_width, args.block_size, args.rounds * args.block_size)
        rng = random.Random(0)

        def bench(searches: int) -> Bench:
            prompts = [tuple(rng.randrange(1, info.vocab_size) for _ in range(args.prompt)) for _ in range(searches)]
            return Bench(engine, model, config, prompts, int(args.value_cache_gb * 1e9))

        results = asyncio.run(compare(bench, args, engine))
    print(
        f"{args.searches} searches of {args.num_beams} x {args.beam_width} candidates, {args.rounds} blocks of {args.block_size} tokens, "
        f"prompts of {args.prompt}; {kind} engine, {args.device}, {os.cpu_count()} cores; median of {args.repeats} runs\n"
    )
    print(table(results))
    return 0


if __name__ == "__main__":
    run_script(main)
