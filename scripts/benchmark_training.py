"""What packing saves in training: tokens computed per loss token, counted.

    python scripts/benchmark_training.py

The length distribution is stated, not real data: in each row 14 roll-ins of 4 nested prefixes, prefix lengths uniform in
4k to 8k, roll-outs lognormal with mean 6k and standard deviation 4k, traces cut at 16384; 64 roll-outs a step on 4 ranks
with micro batches of 8 (the released command).
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np

from common_lib.cli import ArgumentParser, run_script
from training_lib.arguments import PACKINGS
from training_lib.batch_order import RankBatches
from training_lib.rollout_data import RolloutTable, load_rollouts

VOCAB = 151_936
MAX_LENGTH = 16_384
STEPS, RANKS, MICRO_BATCH, TOTAL_BATCH = 12, 4, 8, 64
SIGMA = np.sqrt(np.log(1 + (4000 / 6000) ** 2))  # of the lognormal with mean 6000 and standard deviation 4000
MU = np.log(6000) - SIGMA**2 / 2


def synthetic_rows(num_rows: int) -> Iterator[dict]:
    """Rows of 14 x 4 roll-outs of the stated lengths."""
    rng = np.random.default_rng(0)
    for number in range(num_rows):
        roll_ins, roll_outs = [], []
        for _ in range(14):
            cuts = np.sort(rng.uniform(4000, 8000, 4)).astype(int)
            trunk = rng.integers(0, VOCAB, cuts[-1], dtype=np.int32)
            for cut, length in zip(cuts, rng.lognormal(MU, SIGMA, 4), strict=True):
                roll_ins.append(trunk[:cut])
                roll_outs.append(rng.integers(0, VOCAB, max(int(min(length, MAX_LENGTH)), 1), dtype=np.int32))
        labels = rng.integers(0, 3, 56).tolist()
        yield {"problem": str(number), "roll_in_ids": roll_ins, "roll_outs_ids": roll_outs, "labels": labels}


def make_table(folder: Path, num_rows: int) -> RolloutTable:
    """A memory-mapped data set of synthetic rows."""
    made = datasets.Dataset.from_generator(
        synthetic_rows, cache_dir=str(folder / "cache"), writer_batch_size=4, gen_kwargs={"num_rows": num_rows}
    )
    made.save_to_disk(str(folder / "data"))
    return load_rollouts(str(folder / "data"), vocab_size=VOCAB, max_length=MAX_LENGTH, num_response=56)


def count(table: RolloutTable, packing: str, group: int) -> np.ndarray:
    """Tokens computed (padding included), tokens, loss tokens, and rows, of all ranks' steps."""
    counts = np.zeros(4)
    for rank in range(RANKS):
        batches = RankBatches(table, 0, TOTAL_BATCH, MICRO_BATCH, packing, group, False, rank, RANKS, multiple=128)
        for batch in (batch for step in range(STEPS) for batch in batches[step]):
            counts += batch.input_ids.size, batch.num_tokens, len(batch.token_index), 1
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="synthetic rows of the full lengths; 32 are 70 MB")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(Path(folder), args.rows)
        sizes = f"{STEPS} steps of {TOTAL_BATCH} roll-outs, {RANKS} ranks"
        print(f"Tokens computed per loss token, padding included ({sizes})")
        print(f"{'':24s}{'group 2':>10s}{'group 4':>10s}{'padding':>10s}{'rows a step':>13s}")
        cost = {}
        for packing in PACKINGS:
            for group in (2, 4):
                computed, real, owned, rows = count(table, packing, group)
                cost[packing, group] = computed / owned
            shares = f"{1 - real / computed:10.1%}{rows / STEPS:13.1f}"
            print(f"{packing:24s}{cost[packing, 2]:10.3f}{cost[packing, 4]:10.3f}{shares}")
    for a, b, goals in (("none", "pack", "1.2, 1.2"), ("pack", "tree", "1.25, 1.4")):
        ratios = "".join(f"{cost[a, group] / cost[b, group]:10.3f}" for group in (2, 4))
        print(f"{f'{a} / {b}':24s}{ratios}   (goal {goals})")
    return 0


if __name__ == "__main__":
    run_script(main)
