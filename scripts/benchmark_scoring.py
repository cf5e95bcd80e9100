"""What scoring costs: ValueScorer against reading every whole trace again, in one run, on random weights.

    python scripts/benchmark_scoring.py                          # CPU, a small model
    python scripts/benchmark_scoring.py --shape 1.5b --device cuda --dtype bf16 --block 4096 --attention flash_attention_2

One search tree is grown as beam search grows it: `candidates` blocks a round, half of them kept, until the trace is
rounds x block tokens long. "re-reading" is the released code's way: the whole trace of every candidate at every block, and
of every final beam once more. Prints seconds and tokens read, and the largest difference of a value to that of a plain full
forward pass.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier, ValueScorer
from common_lib.cli import ArgumentParser, run_script

SHAPES = {
    "small": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                  vocab_size=4096),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936),
}  # fmt: skip
Beam = tuple[int, list[int]]  # node number, all tokens
Interval = tuple[float, float]  # of `time.perf_counter`


def make_model(shape: str, device: str, dtype: torch.dtype, attention: str) -> Qwen2ForClassifier:
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=1 << 17, num_labels=3, tie_word_embeddings=False)
    with torch.device(device):
        model = Qwen2ForClassifier._from_config(config, attn_implementation=attention, dtype=dtype)
    # At the usual initial scale a random head gives 1/3 for everything, and no difference would show.
    with torch.no_grad():
        for layer in (0, 2):
            model.score[layer].weight.mul_(10)
    return model.eval()


def timed(work: Callable, times: list[Interval]) -> Callable:
    """`work`, which notes when it works."""

    def worker(*args):
        begin = time.perf_counter()
        result = work(*args)  # values are numbers of Python: a GPU has done its part
        times.append((begin, time.perf_counter()))
        return result

    return worker


def length(intervals: Sequence[Interval]) -> float:
    """Time that lies in any of them."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def grow(score: Callable, args: argparse.Namespace) -> tuple[list[Beam], list[float]]:
    """Grow one tree as a search does; returns the final beams and their values."""
    rng, vocabulary, node = random.Random(1), SHAPES[args.shape]["vocab_size"], 0
    beams: list[Beam] = [(0, [rng.randrange(vocabulary) for _ in range(args.prompt)])] * (args.candidates // 2)
    for _ in range(args.rounds):
        blocks = [[rng.randrange(vocabulary) for _ in range(args.block)] for _ in range(args.candidates)]
        parents = [beams[i // 2] for i in range(args.candidates)]
        values = score(parents, blocks)
        order = sorted(range(args.candidates), key=lambda i: -values[i])[: args.candidates // 2]
        beams = [(node + 1 + i, parents[i][1] + blocks[i]) for i in order]
        node += args.candidates
    return beams, [values[i] for i in order]


def measure_cached(model: Qwen2ForClassifier, args: argparse.Namespace) -> float:
    scorer, times = ValueScorer(model, int(args.cache_gb * 1e9) if args.cache_gb else None), []

    def score(parents: list[Beam], blocks: list[list[int]]) -> list[float]:
        if not scorer.usage.tokens_scored:
            scorer.start("tree", parents[0][1])
        else:
            scorer.keep("tree", {node for node, _ in parents})
        return scorer.score("tree", [(node, block) for (node, _), block in zip(parents, blocks, strict=True)])

    beams, values = grow(timed(score, times), args)
    show("cached", length(times), scorer.usage.tokens_scored)
    worst = max(abs(value - full_value(model, ids)) for value, (_, ids) in zip(values, beams, strict=True))
    print(f"\nlargest difference of a value to a full forward pass: {worst:.2e}")
    return length(times)


def measure_rereading(model: Qwen2ForClassifier, args: argparse.Namespace) -> float:
    tokens, times = [], []

    def score(parents: list[Beam], blocks: list[list[int]]) -> list[float]:
        traces = [ids + block for (_, ids), block in zip(parents, blocks, strict=True)]
        tokens.extend(map(len, traces))
        return [full_value(model, ids) for ids in traces]

    score = timed(score, times)
    beams, _ = grow(score, args)
    score(beams, [[]] * len(beams))
    show("re-reading", length(times), sum(tokens))
    return length(times)


def show(name: str, seconds: float, tokens: int) -> None:
    print(f"| {name} | {seconds:.2f} | {tokens:,} | {tokens / seconds:,.0f} |", flush=True)


@torch.inference_mode()
def full_value(model: Qwen2ForClassifier, ids: Sequence[int]) -> float:
    hidden = model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[:, -1]
    return torch.softmax(model.score(hidden).float(), -1)[0, 1].item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--attention", default="sdpa", help="sdpa or flash_attention_2")
    for name, default in (("prompt", 100), ("block", 128), ("rounds", 4), ("candidates", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cache_gb", type=float, help="bound on the scorer's caches")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(f"{args.shape} model, {args.dtype}, {where}, torch {torch.__version__}; prompt {args.prompt}, {args.rounds} rounds of "
          f"{args.candidates} x {args.block} tokens\n")  # fmt: skip
    print("| way | seconds | tokens read | tokens/s |\n|---|---|---|---|")
    model = make_model(args.shape, args.device, dtype, args.attention)
    full_value(model, list(range(16)))  # warm-up
    print(f"re-reading / cached: {measure_rereading(model, args) / measure_cached(model, args):.2f} x the time")


if __name__ == "__main__":
    run_script(main)
