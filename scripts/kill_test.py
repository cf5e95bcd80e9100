"""Stop a run at random moments, start it again with the same command, and compare with an uninterrupted run.

    python scripts/kill_test.py --times 100                      # search, simulated generator and scorer: byte-identical
    python scripts/kill_test.py --times 20 --engine transformers # search, tiny real models: scores within 1e-6
    python scripts/kill_test.py --stop sure --times 50           # search that stops decided problems: the lines that count
    python scripts/kill_test.py --shards 4 --times 10            # four shards, two killed: lines and report of one run
    python scripts/kill_test.py --train --times 20               # training: losses bit-identical
    python scripts/kill_test.py --collect --times 20             # collection in three shards, simulated generators: byte-identical

A search is killed one to three times a trial. A training run is stopped `--times` times in every way in turn: SIGKILL and
SIGTERM at a random moment of a random step, SIGKILL and SIGTERM during a save, SIGKILL while starting; after SIGKILL at
most `save_every` steps are lost, after SIGTERM none. Of a collection one shard is killed one to three times while the others
run, and started again; the whole is compared with one process's. Prints one line a trial and a summary; exit status 1 if anything
differs.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common_lib.cli import ArgumentParser, UserError, run_script
from search_lib.counted import is_counted, stopped_of
from search_lib.run_reader import RunPaths, read_meta

# What a second start may change: how long things took, and what had to be read again.
FREE_KEYS = {"dt", "seconds_generate", "seconds_score", "tokens_scored", "tokens_reread", "tokens_cached"}
SAVE_EVERY = 5
KINDS = ("kill", "term", "kill in save", "term in save", "kill at start")  # ways to stop training


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_to_end(cmd: Sequence[str]) -> None:
    """Raises ValueError with its output where it fails."""
    done = subprocess.run(cmd, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"exit status {done.returncode}:\n{done.stdout}{done.stderr}")


def stop_when(due: Callable[[], bool], cmd: Sequence[str], number: signal.Signals = signal.SIGKILL) -> bool:
    """Start a run, and send a signal to all its processes as soon as it is `due`; False if it had ended by then.

    Returns when nothing of it is left. Raises ValueError with what it said where it is not due for two minutes.
    """
    process = Popen(cmd, env=environment(), start_new_session=True, stdout=DEVNULL, stderr=PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not due():
        time.sleep(0.0005)
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise ValueError(f"the moment did not come in two minutes:\n{process.communicate(timeout=60)[1][-2000:]}")
    if running := process.poll() is None:
        os.killpg(process.pid, number)
    process.communicate(timeout=60)  # ranks hold this pipe open
    return running


# ---------------------------------------------------------------------------------------------------------------------
# Search


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


def tolerance(engine: str) -> float:
    """Of values after a kill: a real model reads what it had read in other batches."""
    return 0.0 if engine == "simulated" else 1e-6


def kill_trials(times: int, engine: str, problems: int, seed: int, folder: Path, stop: str = "none") -> int:
    """Number of trials that failed."""
    flags, rng = make_inputs(folder, problems), random.Random(seed)
    if stop != "none":  # so many repetitions that some problems are decided before the last one
        flags += ["--num_repetitions", "8", "--stop", stop, "--stop_vote", "majority"]
    reference = folder / "reference.jsonl"
    run_to_end(command(engine, flags, reference))
    meta = json.loads((folder / "reference.meta.json").read_text())
    searching = meta["sessions"][0]["seconds"]  # without imports
    print(f"uninterrupted: {searching:.1f} s", flush=True)
    failed, total_kills = 0, 0
    for trial in range(times):
        output, kills = folder / f"trial{trial}.jsonl", 0
        journal, cmd = output.with_name(f"trial{trial}.tree.jsonl"), command(engine, flags, output)
        try:
            for _ in range(rng.randint(1, 3)):
                kills += stop_when(after_growth(journal, rng.uniform(0, 0.6) * searching), cmd)
            run_to_end(cmd)
            compare(output, reference, tolerance(engine))
            result = "equal" + in_vain(output)
        except ValueError as error:
            failed += 1
            result = f"DIFFERENT: {error}"
        total_kills += kills
        print(f"trial {trial + 1}/{times}: killed {kills} times, {result}", flush=True)
    print(f"{times} trials, {total_kills} kills, {failed} failed (seed {seed}, {engine} engine)")
    return failed


def after_growth(journal: Path, seconds: float) -> Callable[[], bool]:
    """Due `seconds` after the journal has first grown."""
    size, since = journal.stat().st_size if journal.exists() else 0, 0.0

    def due() -> bool:
        nonlocal since
        if not since and journal.exists() and journal.stat().st_size > size:
            since = time.monotonic()
        return bool(since) and time.monotonic() >= since + seconds

    return due


def in_vain(output: Path) -> str:
    """Of a run with --stop: how many problems were decided, and what was done beyond."""
    meta = read_meta(RunPaths.of(output).meta) or {}
    words = "; {} problems decided, {} tokens uncounted"
    return words.format(len(meta["stopped"]), meta["tokens_uncounted"]["generated"]) if "stopped" in meta else ""


def read_run(output: Path) -> tuple[list[str], list[float]]:
    """(lines without what may differ, scores) of a finished run. Raises ValueError for anything lost or done twice."""
    paths, stopped = RunPaths.of(output), stopped_of(read_meta(RunPaths.of(output).meta))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    order = [row["global_idx"] for row in rows]
    if order != (sorted(set(order)) if stopped else list(range(len(rows)))):
        raise ValueError(f"global_idx is not 0 .. {len(rows) - 1} in order: {order}")
    aside = paths.uncounted.read_text(encoding="utf-8").splitlines() if paths.uncounted.exists() else []
    for number, row in enumerate([*rows, *map(json.loads, aside)]):
        if is_counted(stopped, row["data_idx"], row["repeat_idx"]) != (number < len(rows)):
            raise ValueError(f"global_idx {row['global_idx']} is in the wrong file (stopped: {stopped})")
    rounds: dict[tuple[int, int], list[int]] = {}
    for line in paths.tree.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rounds.setdefault((row["data_idx"], row["repeat_idx"]), []).append(row["round"])
    for key, numbers in rounds.items():
        if numbers != list(range(len(numbers))):
            raise ValueError(f"rounds of search {key} are {numbers}")
    if len(rows) != (searches := sum(is_counted(stopped, *key) for key in rounds)):
        raise ValueError(f"{len(rows)} results, but {searches} searches in the journal")
    scores = [score for row in rows for score in row.pop("generated_scores")]
    return [json.dumps({k: v for k, v in row.items() if k not in FREE_KEYS}) for row in rows], scores


def compare(output: Path, reference: Path, tolerance: float) -> None:
    """Raises ValueError where two finished runs differ."""
    if len({json.dumps((read_meta(RunPaths.of(path).meta) or {}).get("stopped")) for path in (output, reference)}) > 1:
        raise ValueError("other problems are decided, or after other repetitions")
    (lines, scores), (expected, expected_scores) = read_run(output), read_run(reference)
    for line, other in zip(lines, expected, strict=True):
        if line != other:
            raise ValueError(f"a line differs:\n{line}\n{other}")
    worst = max(abs(a - b) for a, b in zip(scores, expected_scores, strict=True))
    if worst > tolerance:
        raise ValueError(f"scores differ by {worst:.2e}")


# ---------------------------------------------------------------------------------------------------------------------
# Search in shards

# What of a report depends on time, on what had to be read again, or on the name of the file.
FREE_NUMBERS = FREE_KEYS | {"run", "path", "answers", "notes", "seconds", "wall_clock_seconds", "tokens_per_second", "flops_score",
                            "flops_prefill", "flops"}  # fmt: skip


def shard_trials(times: int, engine: str, problems: int, shards: int, seed: int, folder: Path) -> int:
    """Number of trials that failed: all shards of a run, two of which are killed and go on, against one process."""
    flags, rng = make_inputs(folder, problems), random.Random(seed)
    reference = folder / "reference.jsonl"
    run_to_end(command(engine, flags, reference))
    searching = json.loads((folder / "reference.meta.json").read_text())["sessions"][0]["seconds"]
    expected, failed, kills = report_numbers(reference), 0, 0
    for trial in range(times):
        output, killed = folder / f"trial{trial}.jsonl", rng.sample(range(shards), min(2, shards))
        try:
            for index in range(shards):
                part = output.with_name(f"trial{trial}.shard-{index}-of-{shards}.tree.jsonl")
                cmd = [*command(engine, flags, output), "--shard", f"{index}/{shards}"]
                if index in killed:
                    kills += stop_when(after_growth(part, rng.uniform(0, 0.6) * searching / shards), cmd)
                run_to_end(cmd)
            compare(joined(output, shards), reference, tolerance(engine))
            if report_numbers(output) != expected:
                raise ValueError("the report differs")
            result = "equal"
        except ValueError as error:
            result, failed = f"DIFFERENT: {error}", failed + 1
        print(f"trial {trial + 1}/{times}: shards {' and '.join(map(str, killed))} killed, {result}", flush=True)
    print(f"{times} trials of {shards} shards, {kills} kills, {failed} failed (seed {seed}, {engine} engine)")
    return failed


def joined(output: Path, shards: int) -> Path:
    """The files of all shards as those of one run."""
    whole = output.with_name(f"joined-{output.name}")
    for ending in (".jsonl", ".tree.jsonl"):
        parts = [output.with_name(f"{output.stem}.shard-{index}-of-{shards}{ending}") for index in range(shards)]
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        if ending == ".jsonl":
            lines.sort(key=lambda line: json.loads(line)["global_idx"])
        whole.with_name(whole.stem + ending).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return whole


def report_numbers(output: Path) -> object:
    """table.json of the run's report, without what may differ."""
    folder = output.with_suffix(".report")
    run_to_end([sys.executable, str(ROOT / "report.py"), str(output), "--out", str(folder)])

    def fixed(value: object) -> object:
        if isinstance(value, dict):
            return {key: fixed(item) for key, item in value.items() if key not in FREE_NUMBERS}
        return [fixed(item) for item in value] if isinstance(value, list) else value

    return fixed(json.loads((folder / "table.json").read_text(encoding="utf-8")))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_trials(kinds: Sequence[str], ranks: int, seed: int, folder: Path) -> None:
    """Reference run, one that is stopped in each way in turn, comparison. Raises ValueError where they differ."""
    import rollouts
    import tiny

    rng, num_steps = random.Random(seed), (2 * SAVE_EVERY + 1) * (len(kinds) + 1)
    tiny.save_generator(folder / "backbone", vocab_size=20_000)  # so large that a save can be caught
    rollouts.write_rows(folder / "data", rollouts.random_rows(60))
    run_to_end(train_command(folder, "reference", num_steps, ranks))
    cmd, run_dir = train_command(folder, "stopped", num_steps, ranks), folder / "runs/stopped"
    for number, kind in enumerate(kinds, 1):
        start = saved_step(run_dir)
        moment = training_moment(kind, run_dir, start + rng.randint(1, 2 * SAVE_EVERY), rng)
        if not stop_when(moment, cmd, signal.SIGKILL if "kill" in kind else signal.SIGTERM):
            raise ValueError(f"the run ended by itself before {kind}")
        done, saved = len(losses(run_dir)), saved_step(run_dir)
        writing = ", while writing" if any(run_dir.glob(".writing-step*")) else ""
        print(f"{number:2d}: {kind:13s} from step {start:3d}, at step {done:3d}, saved {saved:3d}{writing}", flush=True)
        if done - saved > (SAVE_EVERY if "kill" in kind else 0):
            raise ValueError(f"{kind}: {done - saved} steps are lost (step {done}, checkpoint {saved})")
    run_to_end(cmd)
    expected, found = losses(folder / "runs/reference"), losses(run_dir)
    if len(expected) != num_steps or found != expected:
        first = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
        raise ValueError(f"losses of {len(expected)} and {len(found)} steps differ from step {first + 1} on")
    print(f"{num_steps} losses are bit-identical after {len(kinds)} stops")


def train_command(folder: Path, name: str, num_steps: int, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = (
        f"--num_steps {num_steps} --save_every {SAVE_EVERY} --eval_every 10 --eval_size 5 --max_length 32 "
        "--total_batch_size 8 --micro_batch_size 2 --data_num_response 4 --max_keep_ckpts 4 --max_lr 1e-3 --device cpu "
        f"--run_name {name}"
    )
    paths = ["--model_path", folder / "backbone", "--data_path", folder / "data", "--save_dir", folder / "runs"]
    start = ["env", f"HF_DATASETS_CACHE={folder / 'cache'}", sys.executable, *launcher]
    return [*start, str(ROOT / "train_classifier.py"), *flags.split(), *map(str, paths)]


def training_moment(kind: str, run_dir: Path, step: int, rng: random.Random) -> Callable[[], bool]:
    """Due at `step`, or in a save around it, or some seconds after the start."""
    before, starting_until = log_changed(run_dir), time.monotonic() + rng.uniform(0.5, 5)

    def due() -> bool:
        if "start" in kind:
            return time.monotonic() > starting_until
        if log_changed(run_dir) == before:
            return False  # what lies there is still the last process's
        if "save" in kind:
            return saved_step(run_dir) >= step - SAVE_EVERY and any(run_dir.glob(".writing-step*"))
        if len(losses(run_dir)) < step:
            return False
        time.sleep(rng.uniform(0, 0.05))
        return True

    return due


def losses(run_dir: Path) -> list[float]:
    """Losses of steps 1, 2, 3 ... so far; a line that is being written does not count yet."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = [record for record in map(json.loads, lines) if "loss" in record]
    steps = [record["step"] for record in records]
    if steps != list(range(1, len(steps) + 1)):
        raise ValueError(f"{path}: steps are missing or repeated: {steps}")
    return [record["loss"] for record in records]


def saved_step(run_dir: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run_dir.glob("step-*")), default=0)


def log_changed(run_dir: Path) -> int:
    """Another number once a new process has cut or written the log: until then its lines are the last process's."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


# ---------------------------------------------------------------------------------------------------------------------
# Collection

SHARDS, PROBLEMS_EACH = 3, 2  # problems of a parquet file


def collect_trials(times: int, problems: int, seed: int, folder: Path) -> int:
    """Number of trials that failed. There must be problems for a parquet file of each shard."""
    import tiny

    make_inputs(folder, problems)
    tiny.save_generator(folder / "other", seed=1)
    rng, reference, failed, total_kills = random.Random(seed), folder / "reference", 0, 0
    run_to_end(collect_command(folder, reference))
    for trial in range(times):
        output, victim = folder / f"trial{trial}", rng.randrange(SHARDS)
        commands = [[*collect_command(folder, output), "--shard", f"{index}/{SHARDS}"] for index in range(SHARDS)]
        cmd = commands.pop(victim)
        others = [Popen(other, env=environment(), stdout=DEVNULL, stderr=PIPE, text=True) for other in commands]
        files, kills = range(victim, -(-problems // PROBLEMS_EACH), SHARDS), 0
        try:
            for _ in range(rng.randint(1, 3)):
                wanted = rng.randint(collected(output, files), collected(reference, files) - 1)
                kills += stop_when(after_lines(output, files, wanted), cmd)
            run_to_end(cmd)
            for other in others:
                said = other.communicate(timeout=120)[1]
                if other.returncode:
                    raise ValueError(f"another shard failed: {said}")
            compare_collections(output, reference)
            result = "equal"
        except ValueError as error:
            failed += 1
            result = f"DIFFERENT: {error}"
            for other in others:
                other.kill()
                other.communicate()
        total_kills += kills
        print(f"trial {trial + 1}/{times}: shard {victim} killed {kills} times, {result}", flush=True)
    print(f"{times} collections in {SHARDS} shards, {total_kills} kills, {failed} failed (seed {seed})")
    return failed


def collect_command(folder: Path, output: Path) -> list[str]:
    """Of two roll-in models one is the generator itself."""
    flags = (
        f"--num_roll_ins 2 --prefixes_per_roll_in 2 --max_length 32 --batch_size 2 --shard_size {PROBLEMS_EACH} --keep_unsolved "
        f"--problems {folder}/problems.jsonl --piref_model {folder}/generator --roll_in_models {folder}/generator {folder}/other"
    )
    return [sys.executable, str(ROOT / "tests/simulated_collect.py"), *flags.split(), "--output_dir", str(output)]


def after_lines(output: Path, files: Sequence[int], wanted: int) -> Callable[[], bool]:
    return lambda: collected(output, files) >= wanted


def collected(output: Path, files: Sequence[int]) -> int:
    """How far these parquet files are: lines of their journals, of which a finished one has had all."""
    lines = 0
    for file in files:
        if any(output.glob(f"data/train-{file:05d}-of-*.parquet")):
            lines += 2 * PROBLEMS_EACH  # a problem's roll-ins, and its row
            continue
        for path in output.glob(f".collect/*-{file:05d}.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # it has just been finished
                lines += path.read_text(encoding="utf-8").count("\n")
    return lines


def files_of(collection: Path) -> dict[str, bytes]:
    """All but locks, by path."""
    paths = {str(path.relative_to(collection)): path for path in collection.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(".collect/lock")}


def compare_collections(output: Path, reference: Path) -> None:
    """Raises ValueError where two finished collections differ in a byte, or a journal is left."""
    found, expected = files_of(output), files_of(reference)
    if found != expected:
        names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise ValueError(f"{', '.join(names)} differ")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="trials, or stops of training")
    parser.add_argument("--engine", choices=("simulated", "transformers"), default="simulated")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="search in N shards, two of which are killed once"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="training in the place of a search")
    what.add_argument("--collect", action="store_true", help="a collection in three shards in the place of a search")
    parser.add_argument("--stop", choices=("none", "sure", "certified"), default="none", help="of a search")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks of training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.stop != "none" and (args.train or args.collect or args.shards > 1):
        raise UserError("--stop is for a search in one process")
    with tempfile.TemporaryDirectory() as folder:
        if args.collect:
            return 1 if collect_trials(args.times, args.problems, args.seed, Path(folder)) else 0
        if args.shards > 1:
            return (
                1 if shard_trials(args.times, args.engine, args.problems, args.shards, args.seed, Path(folder)) else 0
            )
        if not args.train:
            return 1 if kill_trials(args.times, args.engine, args.problems, args.seed, Path(folder), args.stop) else 0
        try:
            train_trials([KINDS[i % len(KINDS)] for i in range(args.times)], args.ranks, args.seed, Path(folder))
        except ValueError as error:
            print(error)
            return 1
    return 0


if __name__ == "__main__":
    run_script(main)
