"""What the order of work costs: this search against the released code's order, on one engine, in one run.

    python scripts/benchmark_search.py                     # SGLang where installed, else transformers; a small model
    python scripts/benchmark_search.py --device cuda --generator MODEL --value_model MODEL --block_size 4096 ...

"lock-step": all searches generate a block and wait for the last one; then every candidate's whole trace is read by the
value model, one at a time; then all select; at the end the final beams are read once more. "this search": every search
goes at its own pace, and each token is read once. Both get the same number of prompts of random tokens, nothing stops
before its length, so both generate the same number of tokens. Their runs alternate, on new prompts each time.

Engine idle: nothing was asked of the engine.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from classifier_lib import Qwen2ForClassifier, ValueScorer
from common_lib.cli import ArgumentParser, check_rules, quiet_transformers, run_script, set_up_logging
from common_lib.concurrency import run_bounded
from common_lib.devices import memory_of
from common_lib.models import inspect_model
from engine_lib.base import Engine, EngineConfig, Request
from engine_lib.choose import choose_engine, make_engine
from search_lib.memory_plan import auto_limit
from search_lib.scorers import ScorerThread
from search_lib.search import search, select
from search_lib.tree import SearchConfig, SearchTask

SMALL = dict(
    hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=4096, max_position_embeddings=1 << 15, tie_word_embeddings=False, eos_token_id=0,
)  # fmt: skip
Interval = tuple[float, float]  # of `time.perf_counter`


def length(intervals: Sequence[Interval]) -> float:
    """Time that lies in any of them."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def both(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Time that lies in both."""
    return length(first) + length(second) - length([*first, *second])


def timed(work: Callable, times: list[Interval]) -> Callable:
    """`work`, which notes when it works."""

    def worker(*args):
        begin = time.perf_counter()
        result = work(*args)  # values are numbers of Python: a GPU has done its part
        times.append((begin, time.perf_counter()))
        return result

    return worker


# ---------------------------------------------------------------------------------------------------------------------
# The two orders of work


@dataclass
class Bench:
    """What both orders are given, and what they note: when engine and value model worked, and the tokens."""

    engine: Engine
    model: Qwen2ForClassifier
    config: SearchConfig
    prompts: list[tuple[int, ...]]
    engine_times: list[Interval] = field(default_factory=list)
    scorer_times: list[Interval] = field(default_factory=list)
    tokens_generated: int = 0
    tokens_scored: int = 0
    tokens_asked: int = 0  # of the requests' prompts
    tokens_cached: int = 0  # of them the engine's cache held

    async def generate(self, prompt_ids: list[int], n: int, limit: int, seeds: Sequence[int], tree_id: str):
        begin = time.perf_counter()
        replies = await self.engine.generate(
            [Request(prompt_ids, limit, 1.0, 0.95, seed=seed, group=tree_id) for seed in seeds[:n]]
        )
        self.engine_times.append((begin, time.perf_counter()))
        self.tokens_generated += sum(len(reply.token_ids) for reply in replies)
        self.tokens_asked += sum(reply.prompt_tokens for reply in replies)
        self.tokens_cached += sum(reply.cached_tokens for reply in replies)
        return replies


async def this_search(bench: Bench) -> None:
    device = str(bench.model.device)
    value_scorer = ValueScorer(bench.model, auto_limit(device, *memory_of(device)))
    value_scorer.score = timed(value_scorer.score, bench.scorer_times)
    scorer = ScorerThread(value_scorer)

    async def one(task: SearchTask) -> None:
        result = await search(task, bench.generate, scorer, bench.config)
        bench.tokens_scored += result.total("tokens_scored")

    try:
        tasks = [SearchTask(i, 0, prompt) for i, prompt in enumerate(bench.prompts)]
        await run_bounded(tasks, one, len(tasks))
    finally:
        await scorer.close()


async def lock_step(bench: Bench) -> None:
    config = bench.config
    paths = [[list(prompt)] * config.num_beams for prompt in bench.prompts]

    def score_alone(ids: list[int]) -> float:
        bench.tokens_scored += len(ids)
        with torch.inference_mode():
            return bench.model(torch.tensor([ids], device=bench.model.device)).success_probs[0, -1].item()

    score = timed(score_alone, bench.scorer_times)

    async def extend(index: int) -> list[list[int]]:
        seeds = [random.getrandbits(31) for _ in range(config.beam_width)]
        beams = [bench.generate(path, len(seeds), config.block_size, seeds, f"{index}/0") for path in paths[index]]
        written = await asyncio.gather(*beams)
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


# ---------------------------------------------------------------------------------------------------------------------
# Measure and show


async def measure(order, bench: Bench) -> dict[str, float]:
    begin = time.perf_counter()
    await order(bench)
    wall, engine = time.perf_counter() - begin, length(bench.engine_times)
    return {
        "wall-clock, s": wall,
        "searches a minute": 60 * len(bench.prompts) / wall,
        "engine busy, s": engine,
        "engine idle, s": wall - engine,
        "engine idle, %": 100 * (1 - engine / wall),
        "value model busy, s": length(bench.scorer_times),
        "both at once, s": both(bench.engine_times, bench.scorer_times),
        "tokens generated": bench.tokens_generated,
        "tokens scored": bench.tokens_scored,
        "tokens scored a token generated": bench.tokens_scored / bench.tokens_generated,
        "prompt tokens from the cache, %": 100 * bench.tokens_cached / bench.tokens_asked,
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


def make_models(args: argparse.Namespace, folder: Path) -> tuple[Path, Qwen2ForClassifier]:
    """Folder of the generator, and the value model; random weights in `folder` where none are named."""
    torch.manual_seed(1)
    generator, dtype = args.generator, torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    if generator is None:
        generator = folder
        Qwen2ForCausalLM(Qwen2Config(**SMALL)).to(dtype).save_pretrained(folder)
    load = Qwen2ForClassifier.from_pretrained if args.value_model else Qwen2ForClassifier.from_backbone
    value_model = load(args.value_model or generator, dtype=dtype, attn_implementation="auto")
    return Path(generator), value_model.to(args.device).eval()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    counts = {
        "searches": (16, "at once"), "rounds": (4, "blocks of a trace"), "block_size": (64, "tokens of a block"),
        "prompt": (64, "tokens of a prompt"), "num_beams": (4, "beams of a search"), "beam_width": (2, "candidates of a beam"),
        "repeats": (3, "of both orders, one after the other; medians are shown"),
    }  # fmt: skip
    for name, (default, meaning) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--generator", help="a model folder (default: a small model of random weights)")
    parser.add_argument("--value_model", help="a model folder (default: the generator's weights, and a random head)")
    parser.add_argument("--engine", choices=("auto", "sglang", "transformers"), default="auto", help="as in the search")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sglang_args", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the engine")
    args = parser.parse_args(argv)
    check_rules(args, [(name, getattr(args, name) >= 1, "must be at least 1") for name in counts])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    set_up_logging()
    quiet_transformers()
    if args.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))  # half for each model
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        generator, model = make_models(args, Path(folder))
        kind, info = choose_engine(args.engine), inspect_model(generator, "--generator")
        settings = {"samples": False, "sglang_args": tuple(args.sglang_args)}
        engine = make_engine(kind, EngineConfig(info.path, info.vocab_size, args.device, **settings))
        config = SearchConfig(args.num_beams, args.beam_width, args.block_size, args.rounds * args.block_size)
        rng = random.Random(0)

        def bench(searches: int) -> Bench:
            prompts = [tuple(rng.randrange(1, info.vocab_size) for _ in range(args.prompt)) for _ in range(searches)]
            return Bench(engine, model, config, prompts)

        results = asyncio.run(compare(bench, args, engine))
    print(f"{args.searches} searches of {args.num_beams} x {args.beam_width} candidates, {args.rounds} blocks of "
          f"{args.block_size} tokens, prompts of {args.prompt}; {kind} engine, {args.device}, {os.cpu_count()} cores; "
          f"median of {args.repeats} runs\n")  # fmt: skip
    print(table(results))
    return 0


if __name__ == "__main__":
    run_script(main)
