"""How fast training is: what packing saves in counted tokens, and the step itself.

    python scripts/benchmark_training.py     # counts, and a step scaled down for a CPU; where there is a GPU, one of a
                                             # 1.5B model at length 16384: tokens/s, MFU, memory

The length distribution is stated, not real data: in each row 14 roll-ins of 4 nested prefixes, prefix lengths uniform in
4k to 8k, roll-outs lognormal with mean 6k and standard deviation 4k, traces cut at 16384; 64 roll-outs a step on 4 ranks
with micro batches of 8 (the released command).
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import torch
from benchmark_scoring import SHAPES
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier
from common_lib.cli import ArgumentParser, run_script
from training_lib.arguments import PACKINGS
from training_lib.attention import choose_attention
from training_lib.batch_order import RankBatches
from training_lib.packing import MicroBatch
from training_lib.ranks import World
from training_lib.rollout_data import RolloutTable, load_rollouts
from training_lib.step import TrainStep, compile_layers, make_optimizer, peak_flops, step_flops

VOCAB = SHAPES["1.5b"]["vocab_size"]
MAX_LENGTH = 16_384
RANKS, MICRO_BATCH, TOTAL_BATCH = 4, 8, 64
SIGMA = np.sqrt(np.log(1 + (4000 / 6000) ** 2))  # of the lognormal with mean 6000 and standard deviation 4000
MU = np.log(6000) - SIGMA**2 / 2


def synthetic_rows(num_rows: int, scale: float = 1.0, vocab: int = VOCAB, seed: int = 0) -> Iterator[dict]:
    """Rows of 14 x 4 roll-outs of the stated lengths, all divided by `scale`."""
    rng = np.random.default_rng(seed)
    for number in range(num_rows):
        roll_ins, roll_outs = [], []
        for _ in range(14):
            cuts = np.sort(rng.uniform(4000, 8000, 4) / scale).astype(int)
            trunk = rng.integers(0, vocab, cuts[-1], dtype=np.int32)
            for cut, length in zip(cuts, rng.lognormal(MU, SIGMA, 4), strict=True):
                roll_ins.append(trunk[:cut])
                roll_outs.append(rng.integers(0, vocab, max(int(min(length, MAX_LENGTH) / scale), 1), dtype=np.int32))
        labels = rng.integers(0, 3, 56).tolist()
        yield {"problem": str(number), "roll_in_ids": roll_ins, "roll_outs_ids": roll_outs, "labels": labels}


def make_table(folder: Path, num_rows: int, scale: float = 1.0, vocab: int = VOCAB) -> RolloutTable:
    """A memory-mapped data set of synthetic rows."""
    numbers = {"num_rows": num_rows, "scale": scale, "vocab": vocab}
    made = datasets.Dataset.from_generator(
        synthetic_rows, cache_dir=str(folder / "cache"), writer_batch_size=4, gen_kwargs=numbers
    )
    made.save_to_disk(str(folder / "data"))
    return load_rollouts(str(folder / "data"), vocab_size=vocab, max_length=int(MAX_LENGTH / scale), num_response=56)


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def totals(batches: list[MicroBatch]) -> np.ndarray:
    """Tokens computed (padding included), tokens, loss tokens, pairs that attend, rows."""
    counts = [(b.input_ids.size, b.num_tokens, len(b.token_index), b.num_pairs, 1) for b in batches]
    return np.array(counts, dtype=np.float64).sum(axis=0)


def benchmark_counts(table, steps: int = 12) -> None:
    print(
        f"\nTokens computed per loss token, padding included ({steps} steps of {TOTAL_BATCH} roll-outs, {RANKS} ranks)"
    )
    print(f"{'':24s}{'group 2':>10s}{'group 4':>10s}{'padding':>10s}{'rows a step':>13s}")
    cost = {}
    for packing in PACKINGS:
        for group in (2, 4):
            ranks = [
                RankBatches(table, 0, TOTAL_BATCH, MICRO_BATCH, packing, group, False, rank, RANKS, multiple=128)
                for rank in range(RANKS)
            ]
            computed, real, owned, _, rows = sum(totals(batches[step]) for batches in ranks for step in range(steps))
            cost[packing, group] = computed / owned
        shares = f"{1 - real / computed:10.1%}{rows / steps:13.1f}"
        print(f"{packing:24s}{cost[packing, 2]:10.3f}{cost[packing, 4]:10.3f}{shares}")
    for a, b, goals in (("none", "pack", "1.2, 1.2"), ("pack", "tree", "1.25, 1.4")):
        ratios = "".join(f"{cost[a, group] / cost[b, group]:10.3f}" for group in (2, 4))
        print(f"{f'{a} / {b}':24s}{ratios}   (goal {goals})")


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def make_step(
    config: Qwen2Config, packing: str, device: torch.device, compiled: bool
) -> tuple[TrainStep, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Qwen2ForClassifier(config).to(device).train()
    on_gpu = device.type == "cuda"
    attention = choose_attention(packing, device.type, half_precision=on_gpu)
    model.set_attn_implementation(attention.name)
    if on_gpu:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        compile_layers(model)
    step = TrainStep(model, World(0, 1, device), attention, autocast=on_gpu, total_batch_size=TOTAL_BATCH)
    return step, make_optimizer(model, 1e-4, (0.9, 0.95), 0.1)


def timed_steps(step: TrainStep, optimizer, batches: RankBatches, warm_up: int, steps: int) -> tuple[float, np.ndarray]:
    """Seconds and `totals` of `steps` whole optimizer steps, after `warm_up` others."""
    counts, begin = np.zeros(5), 0.0
    for number in range(warm_up + steps):
        if number == warm_up:
            synchronize(step.world.device)
            begin = time.perf_counter()
        found = batches[number]
        step.backward(found)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number >= warm_up:
            counts += totals(found)
    synchronize(step.world.device)
    return time.perf_counter() - begin, counts


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def benchmark_step(device: torch.device, table: RolloutTable, config: Qwen2Config, size: tuple[int, int, int]) -> None:
    """size: ranks (of which one is run), micro batch, roll-outs a step."""
    ranks, micro_batch, total_batch = size
    print(
        f"{'':24s}{'s a step':>10s}{'loss tok/s':>12s}{'against none':>14s}{'counted':>10s}{'MFU':>8s}{'GiB':>8s}  attention"
    )
    base, on_gpu, steps, peak = None, device.type == "cuda", 4, peak_flops(device)
    for packing, compiled in itertools.product(PACKINGS, (False, True) if on_gpu else (False,)):
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step, optimizer = make_step(config, packing, device, compiled)
        batches = RankBatches(
            table, 0, total_batch, micro_batch, packing, 4, world_size=ranks, multiple=step.attention.row_multiple
        )
        seconds, (computed, real, owned, pairs, _) = timed_steps(step, optimizer, batches, 2, steps)
        rate, cost = owned / seconds, computed / owned
        base = base or (rate, cost)
        mfu = f"{step_flops(step.model, real, pairs) / seconds / peak:.1%}" if peak else "-"
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "-"
        print(f"{packing + (' --compile' if compiled else ''):24s}{seconds / steps:10.3f}{rate:12.0f}{rate / base[0]:13.2f}x"
              f"{base[1] / cost:9.2f}x{mfu:>8s}{memory:>8s}  {step.attention.name}", flush=True)  # fmt: skip
        del step, optimizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="synthetic rows of the full lengths; 32 are 70 MB")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder) / "full", args.rows)
        benchmark_counts(table)
        scale, vocab = 64, 1000
        print(f"\nOptimizer step on this CPU, 1.3M parameters, lengths divided by {scale}, one rank of {RANKS}")
        config = Qwen2Config(
            vocab_size=vocab, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, num_labels=3,
        )  # fmt: skip
        small = make_table(Path(folder) / "small", 24, scale, vocab)
        benchmark_step(torch.device("cpu"), small, config, (RANKS, MICRO_BATCH, TOTAL_BATCH))
        print("\nOptimizer step on one GPU, 1.5B random weights, length 16384, 16 roll-outs a step")
        if torch.cuda.is_available():
            config = Qwen2Config(
                **SHAPES["1.5b"], max_position_embeddings=1 << 17, num_labels=3, tie_word_embeddings=True
            )
            benchmark_step(torch.device("cuda"), table, config, (1, 4, 16))
        else:
            print("not measured: no GPU here")
    return 0


if __name__ == "__main__":
    run_script(main)
