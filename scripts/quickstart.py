"""The paper in miniature: a value model trained on a generator's own roll-outs makes its search beat majority voting.

    bash scripts/quickstart.sh            # installs what is needed first
    python scripts/quickstart.py          # in an environment that has it
    python scripts/quickstart.py --fast   # a smaller run, for CI; --seed N: another one, beside it

Every step is done by the project's own scripts; their commands are shown, to be copied. Everything lies in one folder,
OUTPUT_DIR/seedN, with a log of each command. Stopped at any moment, the same command goes on: each script goes on where
it stopped, and what is done takes it a moment.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common_lib.cli import ArgumentParser, UserError, check_rules, run_script
from common_lib.files import read_rows, write_json
from common_lib.progress import format_seconds
from common_lib.signals import Stopped, StopSignal

NUM_BLOCKS, REPETITIONS = 8, 2  # budgets N = 8 and, both repetitions pooled, 16
# Of the run that is asked when it could have stopped: with two repetitions nothing can be saved, with more than a few
# problems it would take minutes.
FEW_PROBLEMS, FEW_BLOCKS, MANY_REPETITIONS, POLICY = 12, 4, 16, "weighted:sure"
BLOCK_SIZE, MAX_LENGTH = 6, 60  # one step of a trace; a whole one has 42 tokens
INDENT = "      "
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# What `--fast` changes. held_out: train problems that the value model is evaluated on, not trained.
FULL = dict(generator_steps=750, train_problems=3000, test_problems=200, held_out=400, value_steps=750)
FAST = dict(generator_steps=500, train_problems=1500, test_problems=100, held_out=300, value_steps=400)

# ---------------------------------------------------------------------------------------------------------------------
# The six steps: commands with {folder}, {seed} and the numbers of FULL or FAST. `python` and `torchrun` stand for those of
# this environment.


@dataclass(frozen=True)
class QuickstartStep:
    title: str
    why: str
    commands: Mapping[str, str]  # by the name of their log


SAMPLING = "--prompt_format bare --temperature 0.6 --top_p 1.0 --engine transformers --device cpu"


def search_command(name: str, search_type: str, num_blocks: int = NUM_BLOCKS, repetitions: int = REPETITIONS) -> str:
    """search_type: with the flags that belong to it."""
    return (
        "python inference_eval.py --benchmark {folder}/problems_test.jsonl --piref_model {folder}/generator "
        f"--classifier_ckpt_path {{folder}}/value_model/latest --output_path {{folder}}/{name}.jsonl "
        f"--search_type {search_type} --num_blocks {num_blocks} --num_repetitions {repetitions} "
        f"--max_length {MAX_LENGTH} --batch_size 256 --seed {{seed}} --attention_impl auto {SAMPLING}"
    )


STEPS = (
    QuickstartStep(
        "A tiny reasoning model",
        "A Qwen2 of 150k parameters learns from nothing to add digits one by one, and to slip now and then.",
        {
            "make_generator": "python -m examples.miniature.make_generator --output_dir {folder} --seed {seed} "
            "--num_steps {generator_steps} --num_train {train_problems} --num_test {test_problems}"
        },
    ),
    QuickstartStep(
        "Its roll-outs, graded",
        "It solves every train problem four times; each trace is labelled wrong, right, or length-limited.",
        {
            "collect_rollouts": "python collect_rollouts.py --problems {folder}/problems_train.jsonl "
            "--piref_model {folder}/generator --output_dir {folder}/rollouts --num_roll_ins 0 --rollouts_per_prefix 4 "
            f"--keep_unsolved --max_length {MAX_LENGTH} --batch_size 512 --seed {{seed}} {SAMPLING}"
        },
    ),
    QuickstartStep(
        "The value model",
        "The same backbone with a small head learns to tell, at every token, whether a trace will end right.",
        {
            "train_classifier": "torchrun --standalone --nproc_per_node=2 train_classifier.py "
            "--model_path {folder}/generator --data_path {folder}/rollouts --data_num_response 4 --small_group_size 1 "
            "--max_length 80 --total_batch_size 32 --micro_batch_size 16 --num_steps {value_steps} --max_lr 3e-3 "
            "--eval_every {value_steps} --eval_size {held_out} --save_every 250 --max_keep_ckpts 1 "
            "--no-gradient_checkpointing --device cpu --seed {seed} --save_dir {folder} --run_name value_model"
        },
    ),
    QuickstartStep(
        f"Held-out problems, three ways, at N = {NUM_BLOCKS} and {NUM_BLOCKS * REPETITIONS}",
        "Independent samples to vote on; value-guided search; the same search with a random choice of blocks.",
        {
            "search_bon": search_command("bon", "bon"),
            "search_vgs": search_command("vgs", f"beam2 --block_size {BLOCK_SIZE}"),
            "search_random": search_command("random", f"beam2 --block_size {BLOCK_SIZE} --selection random"),
        },
    ),
    QuickstartStep(
        f"{FEW_PROBLEMS} of them {MANY_REPETITIONS} times: when was their vote decided?",
        "More repetitions, smaller searches; then a replay of stopping as soon as the vote cannot change any more.",
        {
            "search_many": search_command(
                "many",
                f"beam2 --block_size {BLOCK_SIZE} --max_problems {FEW_PROBLEMS}",
                FEW_BLOCKS,
                MANY_REPETITIONS,
            ),
            "what_if": f"python report.py {{folder}}/many.jsonl --what_if --policy {POLICY} --out {{folder}}/what_if",
        },
    ),
    QuickstartStep(
        "What it showed",
        "Tables, plots, and a page that opens every search tree.",
        {
            "report": "python report.py {folder}/vgs.jsonl {folder}/bon.jsonl {folder}/random.jsonl "
            "--out {folder}/report"
        },
    ),
)


def fill_in(command: str, folder: Path, seed: int, size: Mapping[str, int]) -> str:
    """The command of one run, as a shell takes it."""
    return command.format(folder=shlex.quote(str(folder)), seed=seed, **size)


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def run_steps(steps: Sequence[QuickstartStep], folder: Path, seed: int, size: Mapping[str, int]) -> None:
    """Run every command. Raises UserError where one fails, Stopped where a signal ends it."""
    for number, step in enumerate(steps, start=1):
        say(f"\n[{number}/{len(steps)}] {step.title}")
        say(textwrap.fill(step.why, 79, initial_indent=INDENT, subsequent_indent=INDENT))
        for name, command in step.commands.items():
            if name == "make_generator" and (folder / "generator").is_dir():
                say(f"{INDENT}reused: {folder / 'generator'}")
                continue
            line = fill_in(command, folder, seed, size)
            say(textwrap.indent(wrapped(line), INDENT))
            begin = time.monotonic()
            run_command(line, folder / "logs" / f"{name}.txt")
            say(f"{INDENT}done in {format_seconds(time.monotonic() - begin)}")


def run_command(line: str, log: Path, patience: int = 50) -> None:
    """Run it in the checkout: progress to this terminal, tables to its log."""
    program, *arguments = shlex.split(line)
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[program]
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as stream, StopSignal() as stop:
        child = subprocess.Popen([*start, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=stream)
        status = wait(child, stop, patience)
    if stop.received:
        if program == "torchrun":
            say("(A traceback above is torchrun's way to say that it was stopped.)")
        raise Stopped(stop.received)
    if status:
        raise UserError(
            f"{log.stem} ended with status {status}; what it said is above and in {log}; mend the cause and "
            "start again, or start from nothing with --clean"
        )


def wait(child: subprocess.Popen, stop: StopSignal, patience: int, poll_s: float = 0.1) -> int:
    """Its exit status. From a terminal, Ctrl-C reaches it too; a signal from elsewhere is passed on after `patience`
    polls, because torchrun takes a second one as leave not to wait for its ranks."""
    while child.poll() is None:
        time.sleep(poll_s)
        patience -= stop.received is not None
        if patience == 0:
            child.terminate()
    return child.returncode


def wrapped(line: str, width: int = 72) -> str:
    """A command on several lines, as a shell takes it; a flag stays with its values."""
    parts: list[str] = []
    for word in map(shlex.quote, shlex.split(line)):
        if word.startswith("--") or not parts or not parts[-1].startswith("--"):
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    shown = "$"
    for part in parts:
        fits = len(shown.splitlines()[-1]) + len(part) < width
        shown += f" {part}" if fits else f" \\\n    {part}"
    return shown


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# What was found

ROWS = {  # what is counted of which run, by its column in the report's table
    "maj": ("majority of N samples", "bon", "maj_m"),
    "wmaj": ("weighted majority of N samples", "bon", "wmaj_m"),
    "bon": ("best of N samples by value", "bon", "bon_m"),
    "vgs": ("value-guided search", "vgs", "wmaj_m"),
    "random": ("search, random choice", "random", "wmaj_m"),
}


def collect_results(folder: Path) -> dict[str, Any]:
    """Accuracies (0 .. 1) by budget, from the report's table; the value model's AUC within problems; and what stopping would
    have saved, from the replay's table."""
    tables = {
        Path(run["path"]).stem: {row["N"]: row for row in run["table"]}
        for run in json.loads((folder / "report" / "table.json").read_text())["runs"]
    }
    results: dict[str, Any] = {
        str(budget): {key: tables[run][budget][column] for key, (_, run, column) in ROWS.items()}
        for budget in (NUM_BLOCKS, NUM_BLOCKS * REPETITIONS)
    }
    lines, name = read_rows(folder / "value_model" / "metrics.jsonl"), "eval/within_auc_at_75"
    results["within_auc_75"] = [line[name] for _, line in lines if name in line][-1]
    replayed = json.loads((folder / "what_if" / "table.json").read_text())["runs"][0]["what_if"]
    row = next(row for row in replayed if row["policy"] == POLICY)
    results["what_if"] = {key: row[key] for key in ("policy", "saved", "same_answer", "repetitions", "accuracy")}
    return results


def stopping_words(row: Mapping[str, Any]) -> str:
    """What a replayed stop answered and saved."""
    same = "the same answers" if row["same_answer"] == 1 else f"the same answer on {row['same_answer']:.1%} of them"
    return (
        f"Stopped as soon as its vote cannot change any more (--stop sure), a search of {FEW_PROBLEMS} of these problems needs "
        f"{row['repetitions']:.1f} of {MANY_REPETITIONS} repetitions: {same} with {100 * row['saved']:.0f} % fewer tokens."
    )


def tell(results: dict[str, Any], folder: Path, search: str) -> None:
    """search: the command of the value-guided one."""
    budgets = [key for key in results if key.isdigit()]
    say("\nAccuracy on problems that neither model has seen, %")
    say(f"  {'':32}" + "".join(f"{'N = ' + budget:>10}" for budget in budgets))
    for key, (name, *_) in ROWS.items():
        say(f"  {name:32}" + "".join(f"{100 * results[budget][key]:>10.1f}" for budget in budgets))
    small = results[budgets[0]]
    found = (
        f"At N = {budgets[0]}, weighting votes by value adds {100 * (small['wmaj'] - small['maj']):.0f} points to the majority's, "
        f"and searching by value {100 * (small['vgs'] - small['wmaj']):.0f} more. Three quarters through a trace the value "
        f"model ranks a right one above a wrong one of the same problem {results['within_auc_75']:.0%} of the time."
    )
    say("\n" + textwrap.fill(found, 79))
    say("\n" + textwrap.fill(stopping_words(results["what_if"]), 79))
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    page = shlex.quote(str(folder / "report" / "report.html"))
    say(f"\nLook inside: tables, plots, every search tree\n    {opener} {page}")
    say(f"Numbers: {folder / 'results.json'}; what each command said: {folder / 'logs'}")
    say("\nFor a real model on a GPU, change three flags of the search,")
    say("    --benchmark aime-24 --piref_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \\")
    say("    --classifier_ckpt_path VGS-AI/DeepSeek-VM-1.5B")
    say("and leave out those of size and machine: their defaults are the paper's. It was")
    say(textwrap.indent(wrapped(search), "    "))


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of everything; each has a folder of its own")
    parser.add_argument("--fast", action="store_true", help="a smaller run with the same outcome, for CI")
    parser.add_argument("--clean", action="store_true", help="remove the folder of this run, and start from nothing")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "quickstart_out", help="the runs' folders lie there")
    args = parser.parse_args(argv)
    check_rules(args, [("seed", args.seed >= 0, "must be 0 or more")])
    return args


def run_folder(args: argparse.Namespace) -> Path:
    """The run's folder, made; relative to the checkout where it lies inside. Raises UserError."""
    folder = args.output_dir.resolve() / f"seed{args.seed}{'-fast' if args.fast else ''}"
    first_log = folder / "logs" / "make_generator.txt"
    if args.clean and folder.exists():
        if not first_log.is_file() and any(folder.iterdir()):
            raise UserError(
                f"--clean: {folder} was not made by the quickstart (it has no {first_log}); remove it by hand"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} cannot be made ({error.strerror})") from error
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    folder, size, begin = run_folder(args), FAST if args.fast else FULL, time.monotonic()
    os.chdir(ROOT)
    say(f"The paper in miniature, in {folder}\nCtrl-C stops it; the same command goes on.")
    try:
        run_steps(STEPS, folder, args.seed, size)
    except Stopped as stop:
        say("\nStopped. Nothing is lost: the same command goes on from here.")
        return stop.status
    results = collect_results(folder)
    write_json(folder / "results.json", results)
    tell(results, folder, fill_in(STEPS[3].commands["search_vgs"], folder, args.seed, size))
    say(f"\nTook {format_seconds(time.monotonic() - begin)}.")
    return 0


if __name__ == "__main__":
    run_script(main)
