"""Small training sets in OpenR1-VM's schema, and the training script run on them, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def random_rows(num_rows: int = 40, per_row: int = 4, seed: int = 0, vocab: int = 8, longest: int = 30) -> list[dict]:
    """Rows of nested roll-in prefixes with a random roll-out and label each; every third row repeats a roll-in."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        trunk = rng.integers(0, vocab, longest)
        cuts = np.sort(rng.integers(1, longest, per_row))
        if number % 3 == 0:
            cuts[:] = cuts[0]
        rows.append(
            {
                "message_id": str(number),
                "problem": f"problem {number}",
                "roll_in_ids": [trunk[:cut].tolist() for cut in cuts],
                "roll_outs_ids": [rng.integers(0, vocab, rng.integers(1, longest)).tolist() for _ in cuts],
                "labels": [int(x) for x in rng.integers(0, 3, per_row)],
            }
        )
    return rows


def write_rows(folder: Path, rows: list[dict], files: int = 1) -> Path:
    """Parquet files under `folder`; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files])
        pq.write_table(table, folder / f"train-{number:05d}-of-{files:05d}.parquet")
    return folder


def run_script(
    arguments: list[str], ranks: int = 1, timeout: float = 120, env: dict | None = None, script="train_classifier.py"
):
    """Run a script of the project, under torchrun where there are several ranks. Returns the finished process."""
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    return subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=os.environ | (env or {}),
    )  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, as metrics.jsonl has it; the steps must be 1, 2, 3 ..."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return [record["loss"] for record in steps]
