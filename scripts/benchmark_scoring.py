"""What scoring costs: ValueScorer against reading every whole trace again, in one run, on random weights.

    python scripts/benchmark_scoring.py                          # CPU, a small model
    python scripts/benchmark_scoring.py --shape 1.5b --device cuda --dtype bf16 --block 4096 --rounds 4 --generate 64

One search tree is grown as beam search grows it: `candidates` blocks a round, half of them kept, until the trace is
rounds x block tokens long. "re-reading" is the released code's way: the whole trace of every candidate at every block, and
of every final beam once more. Prints seconds, tokens read, tokens/s, FLOPs and, on a known GPU, MFU and peak memory, and
the largest difference of a value to that of a plain full forward pass.

FLOPs: 2 x weights of the layers per token + 4 x layers x heads x head_dim per pair of tokens that attend (Kaplan et al.
2020, arXiv 2001.08361, table 1, with the pairs counted instead of bounded); embedding and head left out.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier, ValueScorer

SHAPES = {
    "small": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                  vocab_size=4096),
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151936),
}  # fmt: skip
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}  # dense, data sheets


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


def flops(model: Qwen2ForClassifier, tokens: int, pairs: int) -> float:
    config = model.config
    weights = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * weights * tokens + 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * pairs


def causal_pairs(prefix: int, new: int) -> int:
    """Pairs (query, key) of `new` tokens behind `prefix` ones."""
    return new * prefix + new * (new + 1) // 2


def grow(score, args: argparse.Namespace):
    """Grow one tree as a search does; returns (seconds in `score`, final traces, values of the last round)."""
    rng = random.Random(1)
    vocabulary = SHAPES[args.shape]["vocab_size"]
    beams, seconds = [(0, [rng.randrange(vocabulary) for _ in range(args.prompt)])] * (args.candidates // 2), 0.0
    node = 0
    for _ in range(args.rounds):
        blocks = [[rng.randrange(vocabulary) for _ in range(args.block)] for _ in range(args.candidates)]
        parents = [beams[i // 2] for i in range(args.candidates)]
        synchronize(args.device)
        begin = time.perf_counter()
        values = score(parents, blocks)
        synchronize(args.device)
        seconds += time.perf_counter() - begin
        order = sorted(range(args.candidates), key=lambda i: -values[i])[: args.candidates // 2]
        beams = [(node + 1 + i, parents[i][1] + blocks[i]) for i in order]
        node += args.candidates
    return seconds, beams, [values[i] for i in order]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.inference_mode()
def full_value(model: Qwen2ForClassifier, ids: Sequence[int]) -> float:
    hidden = model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state[:, -1]
    return torch.softmax(model.score(hidden).float(), -1)[0, 1].item()


def cached(model: Qwen2ForClassifier, args: argparse.Namespace):
    scorer = ValueScorer(model, int(args.cache_gb * 1e9) if args.cache_gb else None)

    def score(parents, blocks):
        if not scorer.usage.tokens_scored:
            scorer.start("tree", parents[0][1])
        else:
            scorer.keep("tree", {node for node, _ in parents})
        return scorer.score("tree", [(node, block) for (node, _), block in zip(parents, blocks, strict=True)])

    return score, scorer


def row(name: str, seconds: float, tokens: int, work: float, args: argparse.Namespace, peak: float | None) -> str:
    mfu = memory = "-"
    if args.device.startswith("cuda"):
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        mfu = f"{work / seconds / peak:.1%}" if peak else "unknown GPU"
    return f"| {name} | {seconds:.2f} | {tokens:,} | {tokens / seconds:,.0f} | {work:.3g} | {mfu} | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="sdpa flash_attention_2")
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--cache_gb", type=float, help="bound on the scorer's caches")
    parser.add_argument(
        "--generate", type=int, default=0, help="also time the transformers engine's model on that many rows"
    )
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    peak = next((flop for gpu, flop in PEAK_BF16.items() if gpu in name), None)
    print(f"{args.shape} model, {args.dtype}, {name}, torch {torch.__version__}; prompt {args.prompt}, {args.rounds} rounds of "
          f"{args.candidates} x {args.block} tokens\n")  # fmt: skip
    print("| way | seconds | tokens read | tokens/s | FLOPs | MFU | peak GiB |\n|---|---|---|---|---|---|---|")
    for attention in args.attention:
        model = make_model(args.shape, args.device, dtype, attention)
        full_value(model, list(range(16)))  # warm-up
        ours = measure_cached(model, args, attention, peak)
        if attention == args.attention[0]:
            theirs = measure_rereading(model, args, attention, peak)
            print(f"\nre-reading / cached: {theirs / ours:.2f} x the time")
    if args.generate:
        measure_generation(args, dtype)


def measure_cached(model, args, attention, peak) -> float:
    reset_peak(args.device)
    score, scorer = cached(model, args)
    seconds, beams, values = grow(score, args)
    work, length = flops(model, args.prompt, causal_pairs(0, args.prompt)), args.prompt
    for _ in range(args.rounds):
        work += args.candidates * flops(model, args.block, causal_pairs(length, args.block))
        length += args.block
    print(row(f"cached, {attention}", seconds, scorer.usage.tokens_scored, work, args, peak))
    worst = max(abs(value - full_value(model, ids)) for value, (_, ids) in zip(values, beams, strict=True))
    print(f"| largest difference of a value to a full forward pass: {worst:.2e} | | | | | | |")
    return seconds


def measure_rereading(model, args, attention, peak) -> float:
    reset_peak(args.device)

    def score(parents, blocks):
        return [full_value(model, ids + block) for (_, ids), block in zip(parents, blocks, strict=True)]

    seconds, beams, _ = grow(score, args)
    synchronize(args.device)
    begin = time.perf_counter()
    for _, ids in beams:
        full_value(model, ids)
    synchronize(args.device)
    seconds += time.perf_counter() - begin
    lengths = [args.prompt + (r + 1) * args.block for r in range(args.rounds) for _ in range(args.candidates)]
    lengths += [len(ids) for _, ids in beams]
    work = sum(flops(model, n, causal_pairs(0, n)) for n in lengths)
    print(row(f"re-reading, {attention}", seconds, sum(lengths), work, args, peak))
    return seconds


def measure_generation(args, dtype) -> None:
    """Tokens/s of transformers' generate, the engine of last resort, at a batch of that many rows."""
    from transformers import Qwen2ForCausalLM

    config = Qwen2Config(**SHAPES[args.shape], max_position_embeddings=1 << 17, tie_word_embeddings=False)
    with torch.device(args.device):
        model = Qwen2ForCausalLM._from_config(config, dtype=dtype).eval()
    ids = torch.randint(0, config.vocab_size, (args.generate, args.prompt), device=args.device)
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    synchronize(args.device)
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=128, min_new_tokens=128, do_sample=False, pad_token_id=0, eos_token_id=None)
    synchronize(args.device)
    print(
        f"\ntransformers generate: {args.generate * 128 / (time.perf_counter() - begin):,.0f} tokens/s at {args.generate} rows"
    )


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
