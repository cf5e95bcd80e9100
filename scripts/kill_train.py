"""Stop a training run at random moments, go on, and compare its losses with an uninterrupted run's, bit by bit.

    python scripts/kill_train.py --times 20

Every kind of stop in turn: SIGKILL and SIGTERM at a random moment of a random step, SIGKILL and SIGTERM during a save,
SIGKILL while starting. After SIGKILL at most `save_every` steps are lost, after SIGTERM none.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 5
KINDS = ("kill", "term", "kill in save", "term in save", "kill at start")


def environment(folder: Path) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | quiet | {"HF_DATASETS_CACHE": str(folder / "cache")}


def make_inputs(folder: Path) -> None:
    """A tiny backbone whose checkpoints take long enough to be caught being written, and random roll-outs for it."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shapes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=20_000, num_key_value_heads=2, max_position_embeddings=128, **shapes)
    Qwen2ForCausalLM(config).save_pretrained(folder / "backbone")
    rng = np.random.default_rng(0)
    rows = [
        {
            "problem": f"problem {number}",
            "roll_in_ids": [rng.integers(0, 100, 5).tolist()] * 4,
            "roll_outs_ids": [rng.integers(0, 100, rng.integers(1, 20)).tolist() for _ in range(4)],
            "labels": rng.integers(0, 3, 4).tolist(),
        }
        for number in range(60)
    ]
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/train-00000-of-00001.parquet")


def command(folder: Path, name: str, num_steps: int, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    flags = {
        "model_path": folder / "backbone", "data_path": folder / "data", "save_dir": folder / "runs", "run_name": name,
        "num_steps": num_steps, "save_every": SAVE_EVERY, "eval_every": 10, "eval_size": 5, "max_length": 32,
        "total_batch_size": 8, "micro_batch_size": 2, "data_num_response": 4, "max_keep_ckpts": 2, "max_lr": 1e-3,
        "device": "cpu",
    }  # fmt: skip
    script = [str(ROOT / "train_classifier.py")] + [
        str(part) for item in flags.items() for part in (f"--{item[0]}", item[1])
    ]
    return [sys.executable, *(launcher if ranks > 1 else []), *script]


def losses(run_dir: Path) -> list[float]:
    """Losses of steps 1, 2, 3 ... so far; a line that is being written does not count yet."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [record for record in map(json.loads, lines) if "loss" in record]
    steps = [record["step"] for record in records]
    if steps != list(range(1, len(steps) + 1)):
        raise SystemExit(f"{path}: steps are missing or repeated: {steps}")
    return [record["loss"] for record in records]


def saved_step(run_dir: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run_dir.glob("step-*")), default=0)


def log_identity(run_dir: Path) -> int:
    """Another number once a new process has taken up the log: until then its lines are the last process's."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def stop_once(arguments: list[str], run_dir: Path, kind: str, rng: random.Random) -> str:
    """Start the run, stop it as `kind` says, and check what is left. Returns a line about it."""
    start, old_log = saved_step(run_dir), log_identity(run_dir)
    until = start + rng.randint(1, 2 * SAVE_EVERY)
    process = subprocess.Popen(
        arguments, env=environment(run_dir.parent.parent), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    begun = time.monotonic() + (rng.uniform(0.5, 5) if kind == "kill at start" else 1e9)
    while process.poll() is None and time.monotonic() < min(deadline, begun):
        time.sleep(0.0005)
        if "start" in kind or log_identity(run_dir) == old_log:
            continue  # what lies there is still the last process's
        if "save" in kind:
            if saved_step(run_dir) >= until - SAVE_EVERY and any(run_dir.glob(".writing-step*")):
                break
        elif len(losses(run_dir)) >= until:
            time.sleep(rng.uniform(0, 0.05))
            break
    if process.poll() is not None:
        raise SystemExit(f"the run ended by itself before {kind} at step {until}: {process.stderr.read()[:2000]}")
    if time.monotonic() > deadline:
        os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(f"no {kind} at step {until} came about: {process.stderr.read()[-2000:]}")
    caught = bool(list(run_dir.glob(".writing-step*")))
    os.killpg(process.pid, signal.SIGKILL if "kill" in kind else signal.SIGTERM)
    process.communicate(timeout=60)  # returns when nothing of the run is left: ranks hold this pipe open
    done, saved = len(losses(run_dir)), saved_step(run_dir)
    lost = done - saved
    if lost > (SAVE_EVERY if "kill" in kind else 0):
        raise SystemExit(f"{kind}: {lost} steps are lost (step {done}, checkpoint {saved})")
    return f"{kind:13s} from step {start:3d}, at step {done:3d}, saved {saved:3d}, lost {max(lost, 0)}" + (
        ", while writing" if caught else ""
    )


def run_test(folder: Path, kinds: Sequence[str], ranks: int, seed: int, say=print) -> None:
    """Reference run, stopped run, comparison. Raises SystemExit where they differ."""
    rng = random.Random(seed)
    num_steps = (2 * SAVE_EVERY + 1) * (len(kinds) + 1)
    make_inputs(folder)
    env = environment(folder)
    subprocess.run(command(folder, "reference", num_steps, ranks), check=True, capture_output=True, env=env)
    arguments, run_dir = command(folder, "stopped", num_steps, ranks), folder / "runs/stopped"
    for number, kind in enumerate(kinds, 1):
        say(f"{number:2d}: {stop_once(arguments, run_dir, kind, rng)}")
    subprocess.run(arguments, check=True, capture_output=True, env=env)
    expected, found = losses(folder / "runs/reference"), losses(run_dir)
    if len(expected) != num_steps or found != expected:
        first = next(i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b)
        raise SystemExit(f"losses differ from step {first + 1} on: {expected[first]} and {found[first]}")
    say(f"{num_steps} losses are bit-identical after {len(kinds)} stops")


def main(argv: Sequence[str] | None = None) -> int:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="stops (default: 20)")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        kinds = [KINDS[i % len(KINDS)] for i in range(args.times)]
        run_test(Path(folder), kinds, args.ranks, args.seed, say=lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
