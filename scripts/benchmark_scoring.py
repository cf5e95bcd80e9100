"""What scoring costs: ValueScorer against reading every whole trace again, in one run, on random weights.

    python scripts/benchmark_scoring.py

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
from benchmark_search import SMALL
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier, ValueScorer
from classifier_lib.modeling import success_probs
from common_lib.cli import ArgumentParser, run_script
from common_lib.devices import hardware_name

Beam = tuple[int, list[int]]  # node number, all tokens
Score = Callable[[list[Beam], list[list[int]]], list[float]]  # of parents, each with a block


def make_model(device: str, dtype: torch.dtype) -> Qwen2ForClassifier:
    torch.manual_seed(0)
    model = Qwen2ForClassifier._from_config(Qwen2Config(**SMALL, num_labels=3), dtype=dtype)
    # At the usual initial scale a random head gives 1/3 for everything, and no difference would show.
    with torch.no_grad():
        for layer in (0, 2):
            model.score[layer].weight.mul_(10)
    return model.to(device).eval()


def grow(score: Score, args: argparse.Namespace) -> tuple[list[Beam], list[float]]:
    """Grow one tree as a search does; returns the final beams and their values."""
    rng, node = random.Random(1), 0
    beams: list[Beam] = [(0, random_tokens(rng, args.prompt))] * (args.candidates // 2)
    for _ in range(args.rounds):
        blocks = [random_tokens(rng, args.block) for _ in range(args.candidates)]
        parents = [beams[i // 2] for i in range(args.candidates)]
        values = score(parents, blocks)
        order = sorted(range(args.candidates), key=lambda i: -values[i])[: args.candidates // 2]
        beams = [(node + 1 + i, parents[i][1] + blocks[i]) for i in order]
        node += args.candidates
    return beams, [values[i] for i in order]


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(SMALL["vocab_size"]) for _ in range(count)]


def measure_cached(model: Qwen2ForClassifier, args: argparse.Namespace) -> float:
    """Seconds it takes."""
    scorer = ValueScorer(model)

    def score(parents: list[Beam], blocks: list[list[int]]) -> list[float]:
        if not scorer.usage.tokens_scored:
            scorer.start("tree", parents[0][1])
        else:
            scorer.keep("tree", {node for node, _ in parents})
        return scorer.score("tree", [(node, block) for (node, _), block in zip(parents, blocks, strict=True)])

    begin = time.perf_counter()
    beams, values = grow(score, args)
    seconds = time.perf_counter() - begin
    show("cached", seconds, scorer.usage.tokens_scored)
    worst = max(abs(value - full_value(model, ids)) for value, (_, ids) in zip(values, beams, strict=True))
    print(f"\nlargest difference of a value to a full forward pass: {worst:.2e}")
    return seconds


def measure_rereading(model: Qwen2ForClassifier, args: argparse.Namespace) -> float:
    """Seconds it takes."""
    tokens = 0

    def score(parents: list[Beam], blocks: list[list[int]]) -> list[float]:
        nonlocal tokens
        traces = [ids + block for (_, ids), block in zip(parents, blocks, strict=True)]
        tokens += sum(map(len, traces))
        return [full_value(model, ids) for ids in traces]

    begin = time.perf_counter()
    beams, _ = grow(score, args)
    score(beams, [[]] * len(beams))
    seconds = time.perf_counter() - begin
    show("re-reading", seconds, tokens)
    return seconds


def show(name: str, seconds: float, tokens: int) -> None:
    print(f"| {name} | {seconds:.2f} | {tokens:,} | {tokens / seconds:,.0f} |", flush=True)


@torch.inference_mode()
def full_value(model: Qwen2ForClassifier, ids: Sequence[int]) -> float:
    hidden = model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[:, -1]
    return success_probs(model.score(hidden)).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    for name, default in (("prompt", 100), ("block", 128), ("rounds", 4), ("candidates", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    print(f"{args.dtype}, {hardware_name(args.device)}, torch {torch.__version__}; prompt {args.prompt}, {args.rounds} rounds of "
          f"{args.candidates} x {args.block} tokens\n")  # fmt: skip
    print("| way | seconds | tokens read | tokens/s |\n|---|---|---|---|")
    model = make_model(args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    full_value(model, list(range(16)))  # warm-up
    print(f"re-reading / cached: {measure_rereading(model, args) / measure_cached(model, args):.2f} x the time")


if __name__ == "__main__":
    run_script(main)
