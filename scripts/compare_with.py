"""Do the same commands write the same bytes as they did at another revision?

    python scripts/compare_with.py REV                    # a commit, branch or tag of this checkout
    python scripts/compare_with.py REV --keep outputs     # keep what was made, to look at differences
    python scripts/compare_with.py REV --to REV2          # two revisions, where a later change was meant to change outputs

Both trees (REV in a worktree of its own, and this one as it stands) run the same commands on the same inputs, which REV's
tree makes once: collection, training (one rank and two, every packing, resumed, with attention dropout), searches (one
resumed in mid-search), a report, and SGLang's run at temperature 0 where it is installed. Then every file is compared,
byte for byte, but for the values of KEYS (through SGLang also of `tokens_cached`: when requests meet decides what its
cache holds). Searches run one at a time: what stands in one batch decides rounding.
Prints a line a kind of file; exit status 1 if anything differs.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Times and rates, dates, versions, and what is new: left out wherever they stand.
KEYS = (
    "dt", "seconds", "seconds_generate", "seconds_score", "started", "ended", "versions", "tokens_per_s",
    "real_tokens_per_s", "loss_tokens_per_s", "tokens_per_second", "wall_clock_seconds", "attention",
)  # fmt: skip
VALUE = r'(?:"(?:[^"\\]|\\.)*"|\{[^{}]*\}|\[[^][]*\]|[\w.+-]+)'
LEFT_OUT = re.compile(rf'(?:,\s*)?"(?:{"|".join(KEYS)})":\s*{VALUE}'.encode())
CACHED = re.compile(rf'(?:,\s*)?"tokens_cached":\s*{VALUE}'.encode())
KINDS = (
    "table.json", "metrics.jsonl", "trainer.json", "config.json", "settings.json", "README.md", ".tree.jsonl",
    ".meta.json", ".jsonl", ".parquet", ".safetensors", "optimizer.pt", "rng.pt", ".json", ".jinja",
)  # fmt: skip

# Runs train_classifier.py of a tree with dropout in attention alone, whatever its `set_dropout` looks like.
ATTENTION_DROPOUT = """
import inspect, sys
sys.path.insert(0, sys.argv[1])
from classifier_lib import Qwen2ForClassifier
before = Qwen2ForClassifier.set_dropout
def set_dropout(self, p_dropout=0.0, attention=None, head=0.0):
    if "head" in inspect.signature(before).parameters:
        return before(self, attention=p_dropout if attention is None else attention, head=0.0)
    before(self, p_dropout)
    self.score[1][1].p = 0.0
Qwen2ForClassifier.set_dropout = set_dropout
import train_classifier
sys.exit(train_classifier.main(sys.argv[2:]))
"""


# ---------------------------------------------------------------------------------------------------------------------
# The commands. {tree} is a checkout; they run in a folder beside `inputs`, so that all paths are the same in both trees.

SAMPLING = "--prompt_format bare --temperature 0.6 --top_p 1.0 --engine transformers --device cpu --seed 1"
COLLECT = (
    "python {tree}/collect_rollouts.py --piref_model ../inputs/generator --num_roll_ins 0 --rollouts_per_prefix 4 "
    f"--keep_unsolved --max_length 60 {SAMPLING} "
)
TRAIN = (
    "--model_path ../inputs/generator --data_num_response 4 --small_group_size 2 --max_length 80 --total_batch_size 16 "
    "--micro_batch_size 4 --max_lr 3e-3 --num_steps 6 --eval_every 3 --eval_size 8 --save_every 2 --max_keep_ckpts 2 "
    "--device cpu --seed 1 --save_dir training "
)
SEARCH = (
    "python {tree}/inference_eval.py --benchmark ../inputs/problems_test.jsonl --piref_model ../inputs/generator "
    "--classifier_ckpt_path ../inputs/value_model/latest --num_repetitions 2 --num_blocks 8 --max_length 60 "
    f"--batch_size 1 --attention_impl auto {SAMPLING} "
)
BEAM = f"{SEARCH} --search_type beam2 --block_size 6 "


def make_inputs(tree: Path, folder: Path) -> None:
    """A generator that has just begun to learn, problems, roll-outs, and a value model, by the tree's own scripts."""
    for steps, output in ((150, folder), (100, folder / "other")):  # the other one writes roll-ins
        make_generator = f"python -m examples.miniature.make_generator --num_steps {steps} --num_train 40 --num_test 4"
        run(f"{make_generator} --output_dir {output}", tree, tree)
    work = folder.parent / "work"
    work.mkdir()
    run(COLLECT + "--problems ../inputs/problems_train.jsonl --output_dir ../inputs/rollouts", tree, work)
    train = f"python {{tree}}/train_classifier.py {TRAIN} --eval_every -1 --p_dropout 0 --run_name value_model"
    run(f"{train} --data_path ../inputs/rollouts --save_dir ../inputs", tree, work)


def run_all(tree: Path, folder: Path) -> None:
    """Everything that is compared, run in `folder` by the scripts of `tree`."""
    folder.mkdir()
    collect = COLLECT + "--problems ../inputs/problems_train.jsonl --max_problems 12 --shard_size 5 "
    run(f"{collect} --output_dir rollouts", tree, folder)
    collect += (
        "--num_roll_ins 3 --prefixes_per_roll_in 2 --roll_in_models ../inputs/generator ../inputs/other/generator "
    )
    run(f"{collect} --output_dir roll_ins", tree, folder)
    max((folder / "roll_ins/data").iterdir()).unlink()  # the last shard is collected again
    run(f"{collect} --output_dir roll_ins", tree, folder)
    train_data, data = f"{TRAIN} --data_path ../inputs/rollouts", "--p_dropout 0 --run_name"
    for packing in ("none", "pack", "tree"):
        for ranks, launcher in ((1, "python"), (2, "torchrun --standalone --nproc_per_node=2")):
            name = f"{packing}-{ranks}"
            command = f"{launcher} {{tree}}/train_classifier.py {train_data} --packing {packing} {data} {name}"
            run(command, tree, folder)
            if packing == "none":  # as if killed after the checkpoint before the last
                (folder / f"training/{name}/latest/trainer.json").unlink()
                run(command, tree, folder)
    dropout = f"python -c {shlex.quote(ATTENTION_DROPOUT)} {{tree}} {train_data} --p_dropout 0.2 --packing"
    for packing in ("none", "pack"):
        run(f"{dropout} {packing} --save_dir dropout --run_name {packing}", tree, folder)
    run(f"{BEAM} --output_path beam.jsonl", tree, folder)
    run(f"{SEARCH} --search_type bon --output_path bon.jsonl", tree, folder)
    run(f"{BEAM} --selection random --output_path random.jsonl", tree, folder)
    cut(folder / "beam", folder / "resumed")
    run(f"{BEAM} --output_path resumed.jsonl", tree, folder)
    if importlib.util.find_spec("sglang"):
        engine = "--engine sglang --temperature 0 --sglang_args max_total_tokens=16384 max_running_requests=64"
        run(f"{BEAM} {engine} --output_path sglang.jsonl", tree, folder)
    run("python {tree}/report.py beam.jsonl bon.jsonl random.jsonl --out report", tree, folder)


def cut(whole: Path, part: Path) -> None:
    """The files of a run as a kill would have left them: a third of the results, half of the journal, torn lines."""
    for suffix, share in ((".jsonl", 1 / 3), (".tree.jsonl", 1 / 2), (".meta.json", 1)):
        content = whole.with_name(whole.name + suffix).read_bytes()
        part.with_name(part.name + suffix).write_bytes(content[: int(share * len(content))])


def run(line: str, tree: Path, folder: Path) -> None:
    """Run a command in `folder`; it must end well."""
    program, *arguments = shlex.split(line.replace("{tree}", shlex.quote(str(tree))))
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[program]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = os.environ | quiet | {"HF_DATASETS_CACHE": str(folder.parent / "cache")}
    done = subprocess.run([*start, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{line}\nended with status {done.returncode} in {tree}:\n{done.stdout}{done.stderr}")


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(before: Path, after: Path) -> bool:
    """Print a line a kind of file. Returns whether all are equal."""
    found: dict[str, dict[str, str | None]] = {kind: {} for kind in KINDS}
    for name in sorted({*compared_files(before), *compared_files(after)}):
        kind = next(kind for kind in KINDS if name.endswith(kind))
        found[kind][name] = difference(before / name, after / name)
    for kind, files in found.items():
        different = [f"    {name}, {where}" for name, where in files.items() if where]
        if files:
            counts = f"{kind:14} {len(files) - len(different):3} equal, {len(different)} differ"
            print("\n".join([counts, *different]), flush=True)
    return not any(where for files in found.values() for where in files.values())


def compared_files(folder: Path) -> Iterator[str]:
    """Outputs; of the report its numbers, of dropout in attention alone the losses."""
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        only = {"report": "table.json", "dropout": "metrics.jsonl"}.get(name.split("/")[0], KINDS)
        if path.is_file() and name.endswith(only):
            yield name


def difference(before: Path, after: Path) -> str | None:
    """Where two files differ first; None where they are equal but for KEYS."""
    if not before.exists() or not after.exists():
        return f"is there {'after' if after.exists() else 'before'} only"
    texts = [before.read_bytes(), after.read_bytes()]
    if before.suffix in (".json", ".jsonl"):
        texts = [LEFT_OUT.sub(b"", text) for text in texts]
    if before.name.startswith("sglang"):
        texts = [CACHED.sub(b"", text) for text in texts]
    if texts[0] == texts[1]:
        return None
    place = len(os.path.commonprefix(texts))  # noqa: RUF071 (of texts, not of paths)
    line = texts[0][:place].count(b"\n") + 1
    return f"line {line}: {' | '.join(repr(text[max(0, place - 40) : place + 60]) for text in texts)}"


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """That revision, checked out for the time being."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--to", metavar="REV2", help="compare with that revision (default: this tree as it stands)")
    parser.add_argument("--keep", type=Path, help="new folder for inputs and outputs (default: a temporary one)")
    args = parser.parse_args(argv)
    with (
        worktree(args.revision) as tree,
        worktree(args.to) if args.to else nullcontext(ROOT) as other,
        tempfile.TemporaryDirectory() as temporary,
    ):
        folder = args.keep.resolve() if args.keep else Path(temporary)
        (folder / "inputs").mkdir(parents=True)
        make_inputs(tree, folder / "inputs")
        for name, source in (("before", tree), ("after", other)):
            run_all(source, folder / name)
        shutil.rmtree(folder / "work")
        return 0 if compare(folder / "before", folder / "after") else 1


if __name__ == "__main__":
    sys.exit(main())
