"""What collect_rollouts.py reads and writes: problems, where roll-ins are cut, journals, parquet shards, the data card."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common_lib.cli import UserError
from data_utils import FILE_KINDS, read_local
from training_lib.rollout_data import open_dataset

WORK = ".collect"  # journals and settings; hidden, so that a data loader does not take them for data
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
    rows: Iterable[dict[str, Any]] = read_local(local) if local.is_file() else open_dataset(path, split)
    found: list[SourceProblem] = []
    for number, row in enumerate(rows):
        if max_problems is not None and number == max_problems:
            break
        for column in ("problem", "answer"):
            if not isinstance(row, dict) or row.get(column) in (None, ""):
                has = ", ".join(row) if isinstance(row, dict) else "no columns"
                raise UserError(f"--problems {path}: row {number} has no {column} (it has {has})")
        text = str(row["problem"])
        name = next((row[key] for key in ("message_id", "uuid", "id") if row.get(key) is not None), None)
        name = str(name) if name is not None else hashlib.sha256(text.encode()).hexdigest()[:16]
        found.append(SourceProblem(name, text, str(row.get("solution") or ""), str(row["answer"])))
    if not found:
        raise UserError(f"--problems {path} has no problems")
    return found


def draw_seed(*key: int) -> int:
    """A request's seed, 0 .. 2**31 - 1, a function of (seed, problem, roll-in, prefix, roll-out)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


CUT_WEIGHTS = ("sqrt", "uniform", "inverse_sqrt")


def cut_positions(length: int, count: int, weight: str, seed: int) -> list[int]:
    """Where a roll-in of `length` response tokens is cut: `count` prefix lengths in 1 .. length - 1, ascending.

    Distinct where there are enough, drawn with P(t) proportional to sqrt(t), 1, or 1 / sqrt(t). A roll-in of one token
    or none gives the bare prompt: [0] * count.
    """
    places = np.arange(1, length)
    if len(places) == 0:
        return [0] * count
    power = {"sqrt": 0.5, "uniform": 0.0, "inverse_sqrt": -0.5}[weight]
    weights = places.astype(np.float64) ** power
    rng = np.random.default_rng(seed)
    drawn = rng.choice(places, count, replace=len(places) < count, p=weights / weights.sum())
    return sorted(int(t) for t in drawn)


# ---------------------------------------------------------------------------------------------------------------------
# Journals and shards


class Journal:
    """Lines of {"i": problem, ...}, one for each finished problem; a torn last line is dropped and done again."""

    def __init__(self, path: Path):
        self.path = path
        self.done: set[int] = set()
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                path.write_bytes(whole)
            self.done = {json.loads(line)["i"] for line in whole.splitlines()}
        self._file = path.open("a", encoding="utf-8")

    def add(self, number: int, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"i": number} | record) + "\n")
        self._file.flush()
        self.done.add(number)

    def records(self) -> list[dict[str, Any]]:
        """All lines, in the order of the problems."""
        with self.path.open(encoding="utf-8") as file:
            return sorted(map(json.loads, file), key=lambda record: record["i"])

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()

    def close(self) -> None:
        self._file.close()


class Output:
    """The output folder: parquet shards under data/, each written whole once all of its problems are done."""

    def __init__(self, folder: Path, settings: dict[str, Any], num_problems: int, shard_size: int, keep_unsolved: bool):
        """Open or go on. UserError where the folder holds something else, or another process writes it."""
        self.folder, self.work = folder, folder / WORK
        self.num_problems, self.shard_size, self.keep_unsolved = num_problems, shard_size, keep_unsolved
        self.num_shards = -(-num_problems // shard_size)
        self._lock = self._open(settings)
        (folder / "data").mkdir(exist_ok=True)
        for leftover in self.work.glob("*.tmp"):
            leftover.unlink()
        self.journals = {
            shard: Journal(self.work / f"rows-{shard:05d}.jsonl")
            for shard in range(self.num_shards)
            if self.written(shard) is None
        }

    def _open(self, settings: dict[str, Any]) -> TextIO:
        if self.folder.exists() and not self.work.exists() and any(self.folder.iterdir()):
            raise UserError(f"--output_dir {self.folder} is not empty and not of this script; give another folder")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = (self.work / "lock").open("w")
        except OSError as error:
            raise UserError(f"--output_dir {self.folder} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is collecting into {self.folder}; give another --output_dir") from None
        path = self.work / "settings.json"
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if changed := [name for name in settings if old.get(name) != settings[name]]:
                shown = "; ".join(f"{name} was {old.get(name)}, is {settings[name]}" for name in changed)
                raise UserError(f"{self.folder} was begun with other settings: {shown}; give another --output_dir")
        else:
            _write_whole(path, json.dumps(settings, indent=1).encode())
        return lock

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"data/train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def written(self, shard: int) -> Path | None:
        """Where a finished shard is; one of which every problem was left out is kept apart, since no loader reads it."""
        places = self.shard_path(shard), self.work / f"{shard:05d}.empty"
        return next((path for path in places if path.exists()), None)

    def missing(self) -> list[int]:
        """Problems that are still to be done."""
        return [
            number
            for shard, journal in self.journals.items()
            for number in range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_problems))
            if number not in journal.done
        ]

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.journals[number // self.shard_size].add(number, row)
        self.write_whole_shards([number // self.shard_size])

    def write_whole_shards(self, shards: Iterable[int] | None = None) -> None:
        """Turn journals of which every problem is done into parquet."""
        for shard in list(self.journals if shards is None else shards):
            journal = self.journals[shard]
            size = min(self.shard_size, self.num_problems - shard * self.shard_size)
            if len(journal.done) < size:
                continue
            rows = [{name: record[name] for name in SCHEMA.names} for record in journal.records()]
            kept = [row for row in rows if self.keep_unsolved or 1 in row["labels"]]
            table = pa.Table.from_pylist(kept, schema=SCHEMA)
            table = table.replace_schema_metadata({"problems": str(size)})
            beside = self.work / f"{shard:05d}.tmp"
            # Small row groups: a reader of one row decodes no more than that.
            pq.write_table(table, beside, compression="zstd", row_group_size=64)
            _publish(beside, self.shard_path(shard) if kept else self.work / f"{shard:05d}.empty")
            journal.remove()
            del self.journals[shard]

    def close(self) -> None:
        for journal in self.journals.values():
            journal.close()
            if not journal.done:
                with contextlib.suppress(FileNotFoundError):
                    journal.path.unlink()
        self._lock.close()


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_bytes(content)
    _publish(beside, path)


def _publish(beside: Path, path: Path) -> None:
    """Make a written file durable, then visible under its name."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Data card


def count(output: Output) -> dict[str, Any]:
    """Problems, roll-outs, label shares, and lengths in tokens, from the finished shards."""
    columns: dict[str, list[np.ndarray]] = {"labels": [], "roll_in_ids": [], "roll_outs_ids": []}
    problems = kept = 0
    for shard in range(output.num_shards):
        table = pq.read_table(output.written(shard), columns=list(columns))
        problems += int((table.schema.metadata or {}).get(b"problems", table.num_rows))
        kept += table.num_rows
        for batch in table.to_batches():
            for name, parts in columns.items():
                inner = batch.column(name).flatten()
                parts.append(inner.to_numpy() if name == "labels" else np.diff(inner.offsets.to_numpy()))
    labels, roll_ins, roll_outs = (np.concatenate(parts) if parts else np.empty(0, int) for parts in columns.values())
    shares = np.bincount(labels, minlength=3) / max(len(labels), 1)
    return {
        "problems": problems, "rows": kept, "dropped": problems - kept, "rollouts": len(labels),
        "labels": {"incorrect": shares[0], "correct": shares[1], "length-limited": shares[2]},
        "roll_in_tokens": _lengths(roll_ins), "rollout_tokens": _lengths(roll_outs),
    }  # fmt: skip


def _lengths(lengths: np.ndarray) -> dict[str, float]:
    if len(lengths) == 0:
        return {}
    low, middle, high = np.percentile(lengths, (5, 50, 95))
    return {"mean": lengths.mean(), "5 %": low, "median": middle, "95 %": high, "longest": lengths.max()}


def write_card(output: Output, figures: dict[str, Any], settings: dict[str, Any], formula: str) -> None:
    """README.md: what the data is, how it was made, and how it looks; a hub or `load_dataset(folder)` finds the files."""
    lengths = "\n".join(
        f"| {name} | " + " | ".join(f"{value:,.0f}" for value in figures[key].values()) + " |"
        for name, key in (("roll-in, prompt included", "roll_in_tokens"), ("roll-out", "rollout_tokens"))
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in figures["labels"].items())
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
{"(none would be: --keep_unsolved)" if output.keep_unsolved else ""}; {figures["rows"]:,} rows, {figures["rollouts"]:,} roll-outs.
Labels: {shares}.

| tokens | mean | 5 % | median | 95 % | longest |
|---|---|---|---|---|---|
{lengths}

{formula}

## Settings

{_table(settings)}
"""
    beside = output.work / "card.tmp"
    beside.write_text(text, encoding="utf-8")
    _publish(beside, output.folder / "README.md")


def _table(settings: dict[str, Any]) -> str:
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items())])


def labels_of(finish_reasons: Sequence[str], right: Sequence[bool]) -> list[int]:
    """2 where the token limit ended a roll-out, whatever it says so far; else 1 where its answer is right, else 0."""
    return [2 if reason == "length" else int(good) for reason, good in zip(finish_reasons, right, strict=True)]
