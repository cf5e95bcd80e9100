"""What collect_rollouts.py reads and writes: problems, places to cut, the data set's folder as it grows, its data card."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common_lib.cli import UserError
from common_lib.files import LineFile, lock, read_rows, write_text, write_whole
from data_utils import FILE_KINDS, open_dataset, read_file
from engine_lib.arguments import LATER_ARGUMENTS

WORK = ".collect"  # unfinished rows and settings; hidden, so that a data loader does not take them for data
IDS = pa.list_(pa.list_(pa.int32()))
SCHEMA = pa.schema(
    {
        "message_id": pa.string(), "problem": pa.string(), "solution": pa.string(), "answer": pa.string(),
        "reward": pa.list_(pa.float32()), "roll_in_ids": IDS, "roll_outs_ids": IDS,
        "processed_answer": pa.list_(pa.string()), "labels": pa.list_(pa.int8()),
    }
)  # fmt: skip


@dataclass(frozen=True)
class SourceProblem:
    message_id: str
    problem: str
    solution: str
    answer: str


def load_problems(path: str, split: str, max_problems: int | None) -> list[SourceProblem]:
    """Problems with answers: a .jsonl/.json/.parquet file, a dataset folder, or a hub data set. Raises UserError.

    Columns problem and answer are needed; solution and message_id (or uuid, or id) are kept where there are any.
    """
    local = Path(path)
    if local.is_file() and local.suffix not in FILE_KINDS:
        raise UserError(f"--problems {path} must end in {', '.join(FILE_KINDS)}, or be a folder or a hub name")
    rows = read_file(local) if local.is_file() else open_dataset(path, split)
    found = []
    for number, row in enumerate(islice(rows, max_problems)):
        columns = row if isinstance(row, dict) else {}
        for column in ("problem", "answer"):
            if columns.get(column) in (None, ""):
                has = ", ".join(columns) or "no columns"
                raise UserError(f"--problems {path}: row {number} has no {column} (it has {has})")
        text = str(row["problem"])
        names = [str(row[key]) for key in ("message_id", "uuid", "id") if row.get(key) is not None]
        name = names[0] if names else hashlib.sha256(text.encode()).hexdigest()[:16]
        found.append(SourceProblem(name, text, str(row.get("solution") or ""), str(row["answer"])))
    if not found:
        raise UserError(f"--problems {path} has no problems")
    return found


def draw_seed(*key: int) -> int:
    """A request's seed, 0 .. 2**31 - 1, a function of (seed, problem, roll-in, prefix, roll-out)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


CUT_WEIGHTS = {"sqrt": 0.5, "uniform": 0.0, "inverse_sqrt": -0.5}  # powers of the place


def cut_positions(length: int, count: int, weight: str, seed: int) -> list[int]:
    """Where a roll-in of `length` response tokens is cut: `count` prefix lengths in 1 .. length - 1, ascending.

    Distinct where there are enough, drawn with P(t) proportional to sqrt(t), 1, or 1 / sqrt(t). A roll-in of one token
    or none gives the bare prompt: [0] * count.
    """
    places = np.arange(1, length)
    if len(places) == 0:
        return [0] * count
    weights = places.astype(np.float64) ** CUT_WEIGHTS[weight]
    rng = np.random.default_rng(seed)
    drawn = rng.choice(places, count, replace=len(places) < count, p=weights / weights.sum())
    return sorted(drawn.tolist())


def labels_of(finish_reasons: Sequence[str], right: Sequence[bool]) -> list[int]:
    """2 where the token limit ended a roll-out, whatever it says so far; else 1 where its answer is right, else 0."""
    return [2 if reason == "length" else int(good) for reason, good in zip(finish_reasons, right, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def check_output_dir(folder: Path) -> None:
    """Raises UserError for a folder that holds something else."""
    if folder.exists() and not (folder / WORK).exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} is not empty and not of this script; give another folder")


class CollectionFolder:
    """The output folder: parquet shards under data/, each written whole once all of its problems are done.

    Methods that write raise OutputError; what was written stays whole.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Open or go on. UserError where it was begun with other settings, or another process writes it."""
        self.folder, self.work, self.settings = folder, folder / WORK, settings
        self.num_problems, self.shard_size = settings["num_problems"], settings["shard_size"]
        self.num_shards = -(-self.num_problems // self.shard_size)
        try:
            for path in (self.work, folder / "data"):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written ({error.strerror})") from error
        busy = f"another process is collecting into {folder}; give another --output_dir"
        self._rows: dict[int, ProblemLines] = {}  # of the shards that are not written yet
        with contextlib.ExitStack() as self._at_close:
            self._at_close.callback(lock(self.work / "lock", busy).release)
            self._check_settings()
            for shard in range(self.num_shards):
                if self.written(shard) is None:
                    self._rows[shard] = self.open_lines(f"rows-{shard:05d}")
                    self._write_if_whole(shard)
            self._at_close = self._at_close.pop_all()

    def _check_settings(self) -> None:
        path, settings = self.work / "settings.json", self.settings
        if not path.exists():
            write_text(path, json.dumps(settings, indent=1))
            return
        old = LATER_ARGUMENTS | json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in settings if old.get(name) != settings[name]]:
            shown = "; ".join(f"{name} was {old.get(name)}, is {settings[name]}" for name in changed)
            raise UserError(f"{self.folder} was begun with other settings: {shown}; give another --output_dir")

    def written(self, shard: int) -> Path | None:
        """Where a finished shard is; one of which every problem was left out is kept apart, since no loader reads it."""
        return next((path for path in self._places(shard) if path.exists()), None)

    def missing(self) -> list[int]:
        """Problems that are still to be done."""
        return [i for shard, rows in self._rows.items() for i in self._numbers(shard) if i not in rows.done]

    @property
    def num_done(self) -> int:
        return self.num_problems - len(self.missing())

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Keep a finished problem's row; the last one of a shard makes the shard."""
        shard = number // self.shard_size
        self._rows[shard].add(number, row)
        self._write_if_whole(shard)

    def open_lines(self, name: str) -> "ProblemLines":
        """A file of lines in the hidden folder, durable at the end."""
        return self._at_close.enter_context(contextlib.closing(ProblemLines(self.work / f"{name}.jsonl")))

    def close(self) -> None:
        """Make all lines durable, and unlock."""
        self._at_close.close()

    def _places(self, shard: int) -> tuple[Path, Path]:
        name = f"data/train-{shard:05d}-of-{self.num_shards:05d}.parquet"
        return self.folder / name, self.work / f"{shard:05d}.empty"

    def _numbers(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_problems))

    def _write_if_whole(self, shard: int) -> None:
        """Turn the rows of a shard of which every problem is done into parquet."""
        lines, numbers = self._rows[shard], self._numbers(shard)
        if len(lines.done) < len(numbers):
            return
        kept = [row for row in lines.records() if self.settings["keep_unsolved"] or 1 in row["labels"]]
        table = pa.Table.from_pylist(kept, schema=SCHEMA).replace_schema_metadata({"problems": str(len(numbers))})
        write_whole(
            self._places(shard)[0 if kept else 1],
            # Small row groups: a reader of one row decodes no more than that.
            lambda stream: pq.write_table(table, stream, compression="zstd", row_group_size=64),
            beside=self.work / f"{shard:05d}.tmp",
        )
        lines.close()
        lines.path.unlink()
        del self._rows[shard]


class ProblemLines(LineFile):
    """A file of one line for each finished problem, {"i": problem, ...}: from it a stopped collection goes on."""

    def __init__(self, path: Path):
        super().__init__(path, separators=(", ", ": "))
        self.done: set[int] = {record["i"] for _, record in read_rows(path)}

    def add(self, number: int, record: dict[str, Any]) -> None:
        self.append({"i": number} | record)
        self.done.add(number)

    def records(self) -> list[dict[str, Any]]:
        """All lines, in the order of the problems."""
        return sorted((record for _, record in read_rows(self.path)), key=lambda record: record["i"])


# ---------------------------------------------------------------------------------------------------------------------
# Data card


def count(output: CollectionFolder) -> dict[str, Any]:
    """Problems, roll-outs, shares of the labels in words, and lengths in tokens, from the finished shards."""
    columns: dict[str, list[np.ndarray]] = {"labels": [], "roll_in_ids": [], "roll_outs_ids": []}
    rows = 0
    for shard in range(output.num_shards):
        table = pq.read_table(output.written(shard), columns=list(columns))
        rows += table.num_rows
        for name, parts in columns.items():
            items = pc.list_flatten(table[name])
            parts.append((items if name == "labels" else pc.list_value_length(items)).to_numpy())
    labels, roll_ins, roll_outs = (np.concatenate(parts) for parts in columns.values())
    shares = np.bincount(labels, minlength=3) / max(len(labels), 1)
    return {
        "problems": output.num_problems, "rows": rows, "dropped": output.num_problems - rows, "rollouts": len(labels),
        "labels": f"incorrect {shares[0]:.1%}, correct {shares[1]:.1%}, length-limited {shares[2]:.1%}",
        "roll_in_tokens": _lengths(roll_ins), "rollout_tokens": _lengths(roll_outs),
    }  # fmt: skip


def _lengths(lengths: np.ndarray) -> list[float]:
    """Mean, 5 %, median, 95 %, longest; nothing of nothing."""
    return [lengths.mean(), *np.percentile(lengths, (5, 50, 95)), lengths.max()] if len(lengths) else []


def write_card(output: CollectionFolder, figures: dict[str, Any]) -> None:
    """README.md: what the data is, how it was made, and how it looks; a hub or `load_dataset(folder)` finds the files."""
    lengths = "\n".join(
        f"| {name} | " + " | ".join(f"{value:,.0f}" for value in figures[key]) + " |"
        for name, key in (("roll-in, prompt included", "roll_in_tokens"), ("roll-out", "rollout_tokens"))
    )
    settings = output.settings
    cuts = (
        f"Roll-ins are cut after t response tokens with probability proportional to {settings['cut_weight']} of t, without "
        "repetition (the paper says only that positions are square-root weighted; this reading is an assumption)."
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    text = f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

# Roll-outs for training a value model

Made by `collect_rollouts.py`; read by `train_classifier.py --data_path FOLDER`. A row is one problem: `message_id, problem,
solution, answer`, and one entry for each roll-out of `roll_in_ids` (prompt plus a prefix of a trace), `roll_outs_ids` (what
the fixed policy then wrote, its end token included), `processed_answer`, `reward` (1 right, 0 not) and `labels`
(0 incorrect, 1 correct, 2 stopped by the token limit).

{figures["problems"]:,} problems; {figures["dropped"]:,} of them are left out because no roll-out succeeded
{"(none would be: --keep_unsolved)" if settings["keep_unsolved"] else ""}; {figures["rows"]:,} rows, {figures["rollouts"]:,} roll-outs.
Labels: {figures["labels"]}.

| tokens | mean | 5 % | median | 95 % | longest |
|---|---|---|---|---|---|
{lengths}

{cuts if settings["num_roll_ins"] else "Every roll-out starts at the bare prompt."}

## Settings

| setting | value |
|---|---|
{table}
"""
    write_text(output.folder / "README.md", text, beside=output.work / "card.tmp")
