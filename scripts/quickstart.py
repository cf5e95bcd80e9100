"""The paper in miniature: a value model trained on a generator's own roll-outs makes its search beat majority voting.

    bash scripts/quickstart.sh            # installs what is needed first
    python scripts/quickstart.py          # in an environment that has it
    python scripts/quickstart.py --fast   # a smaller run, for CI; --seed N: another one, beside it

Every step is done by the project's own scripts; their commands are shown, to be copied. Everything lies in one folder,
OUTPUT_DIR/seedN, with a log of each command. Stopped at any moment, the same command goes on; what is there is reused.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common_lib.cli import ArgumentParser, UserError, run_script
from common_lib.progress import format_seconds

JOURNAL = "quickstart.json"  # in the folder of a run: which commands are done
NUM_BLOCKS, REPETITIONS = 8, 2  # budgets N = 8 and, both repetitions pooled, 16
BLOCK_SIZE, MAX_LENGTH = 6, 60  # one step of a trace; a whole one has 42 tokens
INDENT = "      "
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Size:
    """What `--fast` changes."""

    generator_steps: int
    train_problems: int
    test_problems: int
    held_out: int  # train problems that the value model is evaluated on, not trained
    value_steps: int


FULL = Size(generator_steps=750, train_problems=3000, test_problems=200, held_out=400, value_steps=750)
FAST = Size(generator_steps=500, train_problems=1500, test_problems=100, held_out=300, value_steps=400)


@dataclass(frozen=True)
class Command:
    """One command of a step; `outputs` are what it leaves behind."""

    name: str
    line: str  # `python` and `torchrun` stand for those of this environment
    outputs: tuple[Path, ...]


@dataclass(frozen=True)
class Step:
    title: str
    why: str
    commands: tuple[Command, ...]


# ---------------------------------------------------------------------------------------------------------------------
# The five steps


def make_steps(folder: Path, seed: int, size: Size) -> list[Step]:
    generator, rollouts, run = folder / "generator", folder / "rollouts", folder / "value_model"
    train, test, checkpoint = folder / "problems_train.jsonl", folder / "problems_test.jsonl", run / "latest"
    report = folder / "report"
    q = {name: shlex.quote(str(path)) for name, path in locals().items() if isinstance(path, Path)}
    sampling = "--prompt_format bare --temperature 0.6 --top_p 1.0 --engine transformers --device cpu"

    make_generator = Command(
        "make_generator",
        f"python -m examples.miniature.make_generator --output_dir {q['folder']} --seed {seed} "
        f"--num_steps {size.generator_steps} --num_train {size.train_problems} --num_test {size.test_problems}",
        (generator, train, test),
    )
    collect = Command(
        "collect_rollouts",
        f"python collect_rollouts.py --problems {q['train']} --piref_model {q['generator']} "
        f"--output_dir {q['rollouts']} --num_roll_ins 0 --rollouts_per_prefix 4 --keep_unsolved "
        f"--max_length {MAX_LENGTH} --batch_size 512 --seed {seed} {sampling}",
        (rollouts,),
    )
    train_value = Command(
        "train_classifier",
        f"torchrun --standalone --nproc_per_node=2 train_classifier.py --model_path {q['generator']} "
        f"--data_path {q['rollouts']} --data_num_response 4 --small_group_size 1 --max_length 80 "
        f"--total_batch_size 32 --micro_batch_size 16 --num_steps {size.value_steps} --max_lr 3e-3 "
        f"--eval_every {size.value_steps} --eval_size {size.held_out} --save_every 250 --max_keep_ckpts 1 "
        f"--no-gradient_checkpointing --device cpu --seed {seed} --save_dir {q['folder']} --run_name {run.name}",
        (run, checkpoint),
    )

    def search(name: str, search_type: str, block_size: int, selection: str = "value") -> Command:
        output = folder / f"{name}.jsonl"
        return Command(
            f"search_{name}",
            f"python inference_eval.py --benchmark {q['test']} --piref_model {q['generator']} "
            f"--classifier_ckpt_path {q['checkpoint']} --output_path {shlex.quote(str(output))} "
            f"--search_type {search_type} --selection {selection} --num_blocks {NUM_BLOCKS} "
            f"--num_repetitions {REPETITIONS} --block_size {block_size} --max_length {MAX_LENGTH} "
            f"--batch_size 256 --seed {seed} --attention_impl auto {sampling}",
            (output, output.with_suffix(".meta.json"), output.with_suffix(".tree.jsonl")),
        )

    bon, vgs = search("bon", "bon", MAX_LENGTH), search("vgs", "beam2", BLOCK_SIZE)
    random = search("random", "beam2", BLOCK_SIZE, "random")
    runs = [shlex.quote(str(command.outputs[0])) for command in (vgs, bon, random)]
    make_report = Command("report", f"python report.py {' '.join(runs)} --out {q['report']}", (report,))
    return [
        Step(
            "A tiny reasoning model",
            "A Qwen2 of 150k parameters learns from nothing to add digits one by one, and to slip now and then.",
            (make_generator,),
        ),
        Step(
            "Its roll-outs, graded",
            "It solves every train problem four times; each trace is labelled wrong, right, or cut off.",
            (collect,),
        ),
        Step(
            "The value model",
            "The same backbone with a small head learns to tell, at every token, whether a trace will end right.",
            (train_value,),
        ),
        Step(
            f"Held-out problems, three ways, at N = {NUM_BLOCKS} and {NUM_BLOCKS * REPETITIONS}",
            "Independent samples to vote on; value-guided search; the same search with a random choice of blocks.",
            (bon, vgs, random),
        ),
        Step("What it showed", "Tables, plots, and a page that opens every search tree.", (make_report,)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Running them


class Journal:
    """Which commands are done and how long they took, kept in the run's folder."""

    def __init__(self, folder: Path):
        self.path = folder / JOURNAL
        self.done: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def has(self, command: Command) -> bool:
        same = self.done.get(command.name, {}).get("line") == command.line
        return same and all(path.exists() for path in command.outputs)

    def add(self, command: Command, seconds: float) -> None:
        before = self.done.get(command.name, {}).get("seconds", 0.0)
        self.done[command.name] = {"line": command.line, "seconds": round(before + seconds, 1)}
        self.write()

    def forget(self, commands: Sequence[Command]) -> None:
        """Remove what these commands have made, because what it was made from is made again."""
        for command in commands:
            self.done.pop(command.name, None)
            for path in command.outputs:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self.write()

    def write(self) -> None:
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.done, indent=1) + "\n")
        os.replace(unfinished, self.path)


def run_steps(steps: Sequence[Step], journal: Journal, folder: Path) -> None:
    """Run what is not done. Raises UserError where a command fails, KeyboardInterrupt where it is stopped."""
    commands = [command for step in steps for command in step.commands]
    redone = False
    for number, step in enumerate(steps, start=1):
        say(f"\n[{number}/{len(steps)}] {step.title}")
        say(textwrap.fill(step.why, 79, initial_indent=INDENT, subsequent_indent=INDENT))
        for command in step.commands:
            if not redone and journal.has(command):
                say(f"{INDENT}reused: {command.outputs[0]}")
                continue
            if not redone:
                journal.forget(commands[commands.index(command) + 1 :])
                redone = True
            say(textwrap.indent(wrapped(command.line), INDENT))
            begin = time.monotonic()
            run_command(command, folder)
            journal.add(command, time.monotonic() - begin)
            say(f"{INDENT}done in {format_seconds(time.monotonic() - begin)}")


def run_command(command: Command, folder: Path) -> None:
    """Run it in the checkout: progress to this terminal, tables to its log."""
    program, *arguments = shlex.split(command.line)
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[program]
    log = folder / "logs" / f"{command.name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as stream:
        child = subprocess.Popen([*start, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=stream)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            end(child)
            if program == "torchrun":
                say("(A traceback above is torchrun's way to say that it was stopped.)")
            raise
    if status:
        raise UserError(
            f"{command.name} ended with status {status}; what it said is above and in {log}; mend the cause and "
            "start again, or start from nothing with --clean"
        )


def end(child: subprocess.Popen) -> None:
    """Let it stop in order. From a terminal, Ctrl-C has reached it already; from elsewhere it is told now."""
    for wait, act in ((5, child.terminate), (25, child.kill), (None, child.kill)):
        try:
            child.wait(wait)
            return
        except subprocess.TimeoutExpired:
            act()
        except KeyboardInterrupt:  # impatience
            child.kill()


def wrapped(line: str, width: int = 72) -> str:
    """A command on several lines, as a shell takes it; a flag stays with its values."""
    parts: list[str] = []
    for word in map(shlex.quote, shlex.split(line)):
        if word.startswith("--") or not parts or not parts[-1].startswith("--"):
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines = ["$"]
    for part in parts:
        if len(lines[-1]) + len(part) + 1 > width:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}"
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One quickstart at a time in a folder. Raises UserError."""
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another quickstart is at work in {folder}; wait for it, or give --output_dir") from None
        yield


# ---------------------------------------------------------------------------------------------------------------------
# What was found

ROWS = {
    "maj": "majority of N samples",
    "bon": "best of N samples by value",
    "wmaj": "weighted majority of N samples",
    "random": "search, random choice",
    "vgs": "value-guided search",
}


def collect_results(folder: Path) -> dict[str, Any]:
    """Accuracies (0 .. 1) by budget, from the report's table, and the value model's AUC within problems."""
    tables = {
        Path(run["path"]).stem: {row["N"]: row for row in run["table"]}
        for run in json.loads((folder / "report" / "table.json").read_text())["runs"]
    }
    results: dict[str, Any] = {}
    for budget in (NUM_BLOCKS, NUM_BLOCKS * REPETITIONS):
        bon = tables["bon"][budget]
        results[str(budget)] = {
            "maj": bon["maj_m"],
            "wmaj": bon["wmaj_m"],
            "bon": bon["bon_m"],
            "vgs": tables["vgs"][budget]["wmaj_m"],
            "random": tables["random"][budget]["wmaj_m"],
        }
    lines = (folder / "value_model" / "metrics.jsonl").read_text().splitlines()
    name = "eval/within_auc_at_75"
    results["within_auc_75"] = [line[name] for line in map(json.loads, lines) if name in line][-1]
    return results


def tell(results: dict[str, Any], folder: Path, steps: Sequence[Step], seconds: float) -> None:
    budgets = [key for key in results if key.isdigit()]
    say("\nAccuracy on problems that neither model has seen, %")
    say(f"  {'':32}" + "".join(f"{'N = ' + budget:>10}" for budget in budgets))
    for key, name in ROWS.items():
        say(f"  {name:32}" + "".join(f"{100 * results[budget][key]:>10.1f}" for budget in budgets))
    small = results[budgets[0]]
    found = (
        f"At N = {budgets[0]}, weighting votes by value adds {100 * (small['wmaj'] - small['maj']):.0f} points to the majority's, "
        f"and searching by value {100 * (small['vgs'] - small['wmaj']):.0f} more. Three quarters through a trace the value "
        f"model ranks a right one above a wrong one of the same problem {results['within_auc_75']:.0%} of the time."
    )
    say("\n" + textwrap.fill(found, 79))
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    page = shlex.quote(str(folder / "report" / "report.html"))
    vgs = next(command for step in steps for command in step.commands if command.name == "search_vgs")
    say(f"\nTook {format_seconds(seconds)}. Look inside: tables, plots, every search tree\n    {opener} {page}")
    say(f"Numbers: {folder / 'results.json'}; what each command said: {folder / 'logs'}")
    say("\nFor a real model on a GPU, change three flags of the search,")
    say("    --benchmark aime-24 --piref_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\")
    say("    --classifier_ckpt_path VGS-AI/DeepSeek-VM-1.5B")
    say("and leave out those of size and machine: their defaults are the paper's. It was")
    say(textwrap.indent(wrapped(vgs.line), "    "))


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of everything; each has a folder of its own")
    parser.add_argument("--fast", action="store_true", help="a smaller run with the same outcome, for CI")
    parser.add_argument("--clean", action="store_true", help="remove the folder of this run, and start from nothing")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "quickstart_out", help="the runs' folders lie there")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must be 0 or more")
    return args


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder, made; relative to the checkout where it lies inside. Raises UserError."""
    folder = args.output_dir.resolve() / f"seed{args.seed}{'-fast' if args.fast else ''}"
    if args.clean and folder.exists():
        if not (folder / JOURNAL).is_file():
            raise UserError(
                f"--clean: {folder} was not made by the quickstart (it has no {JOURNAL}); remove it by hand"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be made ({error.strerror})") from error
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    folder = run_folder(args)
    os.chdir(ROOT)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell in the background has it ignored
        signal.signal(number, signal.default_int_handler)
    steps = make_steps(folder, args.seed, FAST if args.fast else FULL)
    with folder_lock(folder):
        journal = Journal(folder)
        journal.write()
        say(f"The paper in miniature, in {folder}\nCtrl-C stops it; the same command goes on.")
        try:
            run_steps(steps, journal, folder)
        except KeyboardInterrupt:
            say("\nStopped. Nothing is lost: the same command goes on from here.")
            return 130
        results = collect_results(folder)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        tell(results, folder, steps, sum(entry["seconds"] for entry in journal.done.values()))
    return 0


if __name__ == "__main__":
    run_script(main)
