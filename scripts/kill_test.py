"""Kill a run at random moments, start it again with the same command, and compare with an uninterrupted run.

    python scripts/kill_test.py --times 100                      # search, simulated generator and scorer: byte-identical
    python scripts/kill_test.py --times 20 --engine transformers # search, tiny real models: scores within 1e-6
    python scripts/kill_test.py --train --times 20               # training: see scripts/kill_train.py

Prints one line a trial and a summary; exit status 1 if any trial differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What a second start may change: how long things took, and what had to be read again.
FREE_KEYS = {"dt", "seconds_generate", "seconds_score", "tokens_scored", "tokens_reread", "tokens_cached"}


def make_inputs(folder: Path, problems: int) -> list[str]:
    """Tiny models and a benchmark; the flags that name them."""
    import tiny

    tiny.save_generator(folder / "generator")
    tiny.save_value_model(folder / "value")
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(problems)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--benchmark", str(folder / "problems.jsonl"), "--piref_model", str(folder / "generator"),
        "--classifier_ckpt_path", str(folder / "value"), "--max_length", "64", "--block_size", "8", "--num_repetitions", "3",
        "--batch_size", "8",
    ]  # fmt: skip


def command(engine: str, flags: Sequence[str], output: Path) -> list[str]:
    script = ROOT / "tests/simulated_eval.py" if engine == "simulated" else ROOT / "inference_eval.py"
    more = [] if engine == "simulated" else ["--engine", engine]
    return [sys.executable, str(script), *flags, *more, "--output_path", str(output)]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_to_end(cmd: Sequence[str]) -> float:
    """Seconds it took. Raises RuntimeError with its output where it fails."""
    begin = time.monotonic()
    done = subprocess.run(cmd, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.monotonic() - begin


def run_and_kill(cmd: Sequence[str], journal: Path, seconds: float) -> bool:
    """Kill the process `seconds` after its journal first grew; False if it had ended by then."""
    size = journal.stat().st_size if journal.exists() else 0
    process = subprocess.Popen(cmd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > size):
            time.sleep(0.005)
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def read_run(output: Path) -> tuple[list[str], list[float]]:
    """(lines without what may differ, scores) of a finished run. Raises ValueError for anything lost or done twice."""
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    order = [row["global_idx"] for row in rows]
    if order != list(range(len(rows))):
        raise ValueError(f"global_idx is not 0 .. {len(rows) - 1} in order: {order}")
    rounds: dict[tuple[int, int], list[int]] = {}
    for line in output.with_name(output.stem + ".tree.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rounds.setdefault((row["data_idx"], row["repeat_idx"]), []).append(row["round"])
    for key, numbers in rounds.items():
        if numbers != list(range(len(numbers))):
            raise ValueError(f"rounds of search {key} are {numbers}")
    if len(rounds) != len(rows):
        raise ValueError(f"{len(rows)} results, but {len(rounds)} searches in the journal")
    scores = [score for row in rows for score in row.pop("generated_scores")]
    return [json.dumps({k: v for k, v in row.items() if k not in FREE_KEYS}) for row in rows], scores


def compare(output: Path, reference: Path, tolerance: float) -> None:
    """Raises ValueError where two finished runs differ."""
    (lines, scores), (expected, expected_scores) = read_run(output), read_run(reference)
    for line, other in zip(lines, expected, strict=True):
        if line != other:
            raise ValueError(f"a line differs:\n{line}\n{other}")
    worst = max(abs(a - b) for a, b in zip(scores, expected_scores, strict=True))
    if worst > tolerance:
        raise ValueError(f"scores differ by {worst:.2e}")


def kill_trials(times: int, engine: str, problems: int, seed: int, folder: Path) -> int:
    """Number of trials that failed."""
    flags, rng = make_inputs(folder, problems), random.Random(seed)
    reference = folder / "reference.jsonl"
    begin = time.monotonic()
    run_to_end(command(engine, flags, reference))
    meta = json.loads((folder / "reference.meta.json").read_text())
    searching = meta["sessions"][0]["seconds"]  # without imports
    print(f"uninterrupted: {time.monotonic() - begin:.1f} s, {searching:.1f} s of them in the run", flush=True)
    failed, total_kills = 0, 0
    for trial in range(times):
        output, kills = folder / f"trial{trial}.jsonl", 0
        cmd = command(engine, flags, output)
        for _ in range(rng.randint(1, 3)):
            kills += run_and_kill(cmd, output.with_name(output.stem + ".tree.jsonl"), rng.uniform(0, 0.6) * searching)
        total_kills += kills
        try:
            run_to_end(cmd)
            compare(output, reference, 0.0 if engine == "simulated" else 1e-6)
            print(f"trial {trial + 1}/{times}: killed {kills} times, equal", flush=True)
        except (ValueError, RuntimeError) as error:
            failed += 1
            print(f"trial {trial + 1}/{times}: killed {kills} times, DIFFERENT: {error}", flush=True)
    print(f"{times} trials, {total_kills} kills, {failed} failed (seed {seed}, {engine} engine)")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="trials (default: %(default)s)")
    parser.add_argument("--engine", choices=("simulated", "transformers"), default="simulated")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="training in the place of a search")
    args = parser.parse_args(argv)
    if args.train:
        import kill_train

        return kill_train.main(["--times", str(args.times), "--seed", str(args.seed)])
    with tempfile.TemporaryDirectory() as folder:
        return 1 if kill_trials(args.times, args.engine, args.problems, args.seed, Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
