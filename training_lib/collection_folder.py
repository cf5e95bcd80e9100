"""The folder of a collected data set as it grows: parquet files, journals, and who may write them."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import BaseFileLock

from common_lib.cli import UserError
from common_lib.files import LineFile, fsync, lock, output_errors, read_rows, write_text, write_whole
from common_lib.shards import WHOLE, Shard
from engine_lib.arguments import LATER_ARGUMENTS
from engine_lib.http_client import allow_open_files
from training_lib.rollout_files import WORK, count_files, file_places, written_file

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # another process looks at the folder, or writes the data card, for a moment
IDS = pa.list_(pa.list_(pa.int32()))
SCHEMA = pa.schema(
    {
        "message_id": pa.string(), "problem": pa.string(), "solution": pa.string(), "answer": pa.string(),
        "reward": pa.list_(pa.float32()), "roll_in_ids": IDS, "roll_outs_ids": IDS,
        "processed_answer": pa.list_(pa.string()), "labels": pa.list_(pa.int8()),
    }
)  # fmt: skip


def check_output_dir(folder: Path) -> None:
    """Raises UserError for a folder that holds something else."""
    if (
        folder.exists() and any(folder.iterdir()) and not (folder / WORK).exists()
    ):  # in this order: others may begin it now
        raise UserError(f"--output_dir {folder} is not empty and not of this script; give another folder")


def check_shard(shard: Shard, num_problems: int, problems_each: int) -> None:
    """Raises UserError where there are more shards than parquet files."""
    count = count_files(num_problems, problems_each)
    if shard.count > count:
        raise UserError(
            f"--shard {shard}: {num_problems} problems make {count} parquet files of --shard_size {problems_each}, too few for "
            f"{shard.count} shards; give N <= {count}, or begin a folder with a smaller --shard_size"
        )


class CollectionFolder:
    """The output folder: parquet files under data/, each written whole once all of its problems are done.

    A process makes the files that its shard holds. Shards share nothing but the folder and its settings: each file has
    journals of its own, so whoever goes on with a file needs no other's. Methods that write raise OutputError; what was
    written stays whole.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shard: Shard = WHOLE):
        """Open or go on. UserError where it was begun with other settings, or another process makes the same files."""
        self.folder, self.work, self.settings, self.shard = folder, folder / WORK, settings, shard
        self.num_problems, self.problems_each = settings["num_problems"], settings["shard_size"]
        self.num_files = count_files(self.num_problems, self.problems_each)
        self.files = [file for file in range(self.num_files) if shard.holds(file)]  # that this process makes
        try:
            for path in (self.work, folder / "data"):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written ({error.strerror})") from error
        allow_open_files(2 * len(self.files))  # journals: of rows, and of one model's roll-ins
        self._rows: dict[int, ProblemLines] = {}  # of those files that are not written yet
        with contextlib.ExitStack() as self._at_close:
            with self._alone():
                self._check_settings()
                self._lock_shard()
            older = self._older_roll_ins()
            for file in self.files:
                if self.written(file) is None:
                    self._rows[file] = self._open_lines(f"rows-{file:05d}")
                    self._write_if_whole(file)
                else:
                    self._remove_journals(file)
            for model, path in older.items():
                self._split_roll_ins(model, path)
            self._at_close = self._at_close.pop_all()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """For a moment, no other process looks at what belongs to all."""
        busy = f"another process has held {self.work / 'lock'} for {PATIENCE_S:g} s; end it"
        held = lock(self.work / "lock", busy, PATIENCE_S)
        try:
            yield
        finally:
            held.release()

    def _check_settings(self) -> None:
        path, settings = self.work / "settings.json", self.settings
        if not path.exists():
            write_text(path, json.dumps(settings, indent=1))
            return
        old = LATER_ARGUMENTS | json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in settings if old.get(name) != settings[name]]:
            shown = "; ".join(f"{name} was {old.get(name)}, is {settings[name]}" for name in changed)
            raise UserError(f"{self.folder} was begun with other settings: {shown}; give another --output_dir")

    def _lock_shard(self) -> None:
        """A lock for this shard's files, until the end. Shards of another N would make some of the same files: none of
        them may be at work."""
        names = re.findall(r"^lock\.shard-(\d+)-of-(\d+)", "\n".join(os.listdir(self.work)), re.MULTILINE)
        for other in sorted({(int(count), int(index)) for index, count in names}):
            if other[0] != self.shard.count:
                self._hold(Shard(other[1], other[0])).release()
        self._at_close.callback(self._hold(self.shard).release)

    def _hold(self, shard: Shard) -> BaseFileLock:
        """The lock of a shard's files. UserError where a process has it."""
        what, instead = f"shard {shard} into", f"give --shard I/{shard.count} with another I"
        if shard == WHOLE:
            what, instead = "into", "give another --output_dir"
        busy = f"another process is collecting {what} {self.folder}; {instead}, or wait for its end"
        return lock(self.work / f"lock{shard.suffix}", busy)

    def written(self, file: int) -> Path | None:
        """Where a finished file is; None: it is not finished."""
        return written_file(self.folder, file, self.num_files)

    def elsewhere(self) -> list[int]:
        """Files of other shards that are not finished."""
        return [file for file in range(self.num_files) if not self.shard.holds(file) and self.written(file) is None]

    def missing(self) -> list[int]:
        """Problems of this shard that are still to be done."""
        return [
            number for file, rows in self._rows.items() for number in self._numbers(file) if number not in rows.done
        ]

    @property
    def num_mine(self) -> int:
        """Problems of this shard."""
        return sum(len(self._numbers(file)) for file in self.files)

    @property
    def num_done(self) -> int:
        """Of them."""
        return self.num_mine - len(self.missing())

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Keep a finished problem's row; the last one of a file makes the file."""
        file = number // self.problems_each
        self._rows[file].add(number, row)
        self._write_if_whole(file)

    def roll_ins(self, model: int) -> "RollIns":
        """What a roll-in model has written for the problems of this shard's unfinished files."""
        return RollIns(
            {file: self._open_lines(f"roll_ins-{model:02d}-{file:05d}") for file in self._rows}, self.problems_each
        )

    def _older_roll_ins(self) -> dict[int, Path]:
        """By model, the journal for the whole folder that a collection from before --shard has. UserError for a shard:
        it is not alone in the folder, so it must not split them."""
        names = [re.fullmatch(r"roll_ins-(\d+)\.jsonl", name) for name in sorted(os.listdir(self.work))]
        found = {int(name[1]): self.work / name[0] for name in names if name}
        if found and self.shard != WHOLE:
            raise UserError(
                f"{next(iter(found.values()))} holds roll-ins of all parquet files, as before there was --shard; start the "
                "command once without --shard, which splits it by file, then give --shard again"
            )
        return found

    def _split_roll_ins(self, model: int, path: Path) -> None:
        """Put an older journal's roll-ins into those of the files, and remove it once they are durable: a process that is
        killed in between does it again, and takes no problem twice."""
        LineFile(path).close()  # without its torn last line
        kept, count = self.roll_ins(model), 0
        for _, record in read_rows(path):
            if record["i"] // self.problems_each in kept.files and not kept.has(record["i"]):
                kept.add(record["i"], record["roll_ins"])
                count += 1
        kept.close()
        with output_errors(path):
            fsync(self.work)
            path.unlink()
        logger.info("%s: of an older version; roll-ins of %d problems are split into journals by file", path, count)

    def write_card(self, text: str) -> None:
        """README.md; the last shards may do so at once, and to the same effect."""
        with self._alone():
            write_text(self.folder / "README.md", text, beside=self.work / "card.tmp")

    def close(self) -> None:
        """Make all lines durable, and unlock."""
        self._at_close.close()

    def _open_lines(self, name: str) -> "ProblemLines":
        """A file of lines in the hidden folder, durable at the end."""
        return self._at_close.enter_context(contextlib.closing(ProblemLines(self.work / f"{name}.jsonl")))

    def _numbers(self, file: int) -> range:
        """Problems of a file."""
        return range(file * self.problems_each, min((file + 1) * self.problems_each, self.num_problems))

    def _write_if_whole(self, file: int) -> None:
        """Turn the rows of a file of which every problem is done into parquet."""
        lines, numbers = self._rows[file], self._numbers(file)
        if len(lines.done) < len(numbers):
            return
        kept = [row for row in lines.records() if self.settings["keep_unsolved"] or 1 in row["labels"]]
        table = pa.Table.from_pylist(kept, schema=SCHEMA).replace_schema_metadata({"problems": str(len(numbers))})
        write_whole(
            file_places(self.folder, file, self.num_files)[0 if kept else 1],
            # Small row groups: a reader of one row decodes no more than that.
            lambda stream: pq.write_table(table, stream, compression="zstd", row_group_size=64),
            beside=self.work / f"{file:05d}.tmp",
        )
        lines.close()
        del self._rows[file]
        self._remove_journals(file)

    def _remove_journals(self, file: int) -> None:
        """Of a finished file; a process that was killed in between has left them."""
        for name in (f"rows-{file:05d}", f"roll_ins-*-{file:05d}"):
            for path in self.work.glob(f"{name}.jsonl"):
                path.unlink()


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


@dataclass(frozen=True)
class RollIns:
    """What one model has written, in a journal of each parquet file."""

    files: dict[int, ProblemLines]
    problems_each: int

    def has(self, number: int) -> bool:
        return number in self.files[number // self.problems_each].done

    def add(self, number: int, traces: Mapping[int, list[int]] | Mapping[str, list[int]]) -> None:
        """traces: response tokens by roll-in number."""
        self.files[number // self.problems_each].add(number, {"roll_ins": traces})

    def read(self) -> dict[int, dict[int, list[int]]]:
        """By problem, response tokens by roll-in number."""
        records = [record for lines in self.files.values() for record in lines.records()]
        return {record["i"]: {int(key): ids for key, ids in record["roll_ins"].items()} for record in records}

    def close(self) -> None:
        for lines in self.files.values():
            lines.close()
