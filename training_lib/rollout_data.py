"""Training data in OpenR1-VM's schema: opened lazily, checked at start, read one roll-out at a time as arrow slices.

A row is one problem: `roll_in_ids` [n][tokens] (prompt plus a prefix of a trace), `roll_outs_ids` [n][tokens] (what the
fixed policy then wrote), `labels` [n] (0 incorrect, 1 correct, 2 length-limited), and text columns of which only
`problem` is used, to hold out whole problems. Decoding a row of 56 x 16k ids to Python costs about 100 ms; the slice of
one roll-out is a view on the memory-mapped file and costs microseconds.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common_lib.cli import UserError, hub_errors
from training_lib.packing import Trace

logger = logging.getLogger(__name__)

ROLL_INS, ROLL_OUTS = "roll_in_ids", "roll_outs_ids"
NUM_CLASSES = 3  # labels are classes 0, 1, 2 also where the model has one output: its target is `label == 1`
# Up to here every id is checked at start (a second or two); in a larger data set each is when its roll-out is read.
IDS_CHECKED_AT_START = 200_000_000


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_dataset(path: str, split: str = "train"):
    """A `datasets.Dataset` from the hub, a folder or file of parquet, or a `save_to_disk` folder; memory-mapped."""
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    if not local.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(f"{path} does not exist; give a folder, a parquet file, or a hub name such as owner/name")
        with hub_errors(f"data set {path}"):
            return _split(datasets.load_dataset(path), path, split)
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            return _split(datasets.load_from_disk(str(local)), path, split)
        if local.is_file():
            return datasets.load_dataset("parquet", data_files=str(local), split="train")
        if not any(local.rglob("*.parquet")):
            raise UserError(f"{path} holds neither parquet files nor a dataset made by save_to_disk")
        return _split(datasets.load_dataset("parquet", data_dir=str(local)), path, split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"data set {path} cannot be read: {error.__cause__ or error}") from error


def _split(loaded, path: str, split: str):
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UserError(f"data set {path} has no split {split}; it has {', '.join(loaded)}")
    return loaded[split]


# ---------------------------------------------------------------------------------------------------------------------
# The table of roll-outs


@dataclass(frozen=True, eq=False)
class RolloutTable:
    """What is known of every roll-out without reading its tokens. Roll-outs are numbered 0 .. R-1, row after row.

    rows [N]: rows of `dataset` in use. first [N + 1]: row i owns roll-outs first[i] .. first[i + 1] - 1. labels [R];
    roll_in_lengths, roll_out_lengths [R] tokens. problems [N]: the same number for rows of the same problem text.
    """

    dataset: Any  # a datasets.Dataset in arrow format
    rows: np.ndarray
    first: np.ndarray
    labels: np.ndarray
    roll_in_lengths: np.ndarray
    roll_out_lengths: np.ndarray
    problems: np.ndarray
    vocab_size: int
    max_length: int

    def __len__(self) -> int:
        return len(self.labels)

    def row_of(self, rollouts: np.ndarray) -> np.ndarray:
        """Index into `rows` of each roll-out."""
        return np.searchsorted(self.first, rollouts, side="right") - 1

    def lengths(self, rollouts: np.ndarray) -> np.ndarray:
        """Tokens of each roll-out's trace, cut at `max_length`."""
        return np.minimum(self.roll_in_lengths[rollouts] + self.roll_out_lengths[rollouts], self.max_length)

    def trace(self, rollout: int) -> Trace:
        """Read one roll-out's trace, cut at `max_length`. UserError where an id is outside the vocabulary."""
        i = int(np.searchsorted(self.first, rollout, side="right")) - 1
        row, column = int(self.rows[i]), int(rollout - self.first[i])
        record = self.dataset[row : row + 1]
        roll_in = _tokens(record.column(ROLL_INS), column)
        roll_out = _tokens(record.column(ROLL_OUTS), column)
        tokens = np.concatenate([roll_in[: self.max_length], roll_out[: max(self.max_length - len(roll_in), 0)]])
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            name, ids = (
                (ROLL_OUTS, roll_out) if roll_in.size == 0 or _inside(roll_in, self.vocab_size) else (ROLL_INS, roll_in)
            )
            raise UserError(_bad_ids(row, name, column, ids, self.vocab_size))
        return Trace(tokens, len(roll_in), int(self.labels[rollout]), (row, column))

    def select(self, keep: np.ndarray) -> "RolloutTable":
        """The table of some of the rows. keep: bool [N]."""
        counts = np.diff(self.first)
        rollouts = np.repeat(keep, counts)
        return RolloutTable(
            dataset=self.dataset,
            rows=self.rows[keep],
            first=np.concatenate([[0], np.cumsum(counts[keep])]),
            labels=self.labels[rollouts],
            roll_in_lengths=self.roll_in_lengths[rollouts],
            roll_out_lengths=self.roll_out_lengths[rollouts],
            problems=self.problems[keep],
            vocab_size=self.vocab_size,
            max_length=self.max_length,
        )


def _tokens(column: pa.ChunkedArray, place: int) -> np.ndarray:
    """List number `place` of a one-row list<list<int>> column, as a view on the arrow buffer."""
    outer = column.chunk(0)
    inner = outer.values
    at = outer.offsets[0].as_py() + place
    return inner.values[inner.offsets[at].as_py() : inner.offsets[at + 1].as_py()].to_numpy()


def _inside(ids: np.ndarray, vocab_size: int) -> bool:
    return bool(ids.min() >= 0 and ids.max() < vocab_size)


def _bad_ids(row: int, name: str, place: int, ids: np.ndarray, vocab_size: int) -> str:
    bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
    return f"row {row}, column {name}[{place}]: token id {bad} is outside the model's vocabulary of {vocab_size}"


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def load_rollouts(
    path: str,
    *,
    vocab_size: int,
    max_length: int,
    num_response: int,
    label_key: str = "labels",
    skip_bad_rows: bool = False,
    max_rows: int | None = None,
) -> RolloutTable:
    """Open a data set, check it, and index the first `num_response` roll-outs of each row.

    Checked for all rows: lists of one row agree in length, labels are classes, no roll-out is empty, and (see
    IDS_CHECKED_AT_START) ids lie in the vocabulary. The first fault is a UserError with its row and column;
    `skip_bad_rows` leaves such rows out and logs how many there were.
    """
    dataset = open_dataset(path)
    wanted = [ROLL_INS, ROLL_OUTS, label_key]
    if missing := [name for name in wanted if name not in dataset.column_names]:
        raise UserError(
            f"{path} lacks column {', '.join(missing)}; it has {', '.join(dataset.column_names)} "
            "(--label_key names the labels' column)"
        )
    texts = ["problem"] if "problem" in dataset.column_names else []
    dataset = dataset.select_columns(wanted + texts).with_format("arrow")
    total = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    if total == 0:
        raise UserError(f"{path} has no rows")

    parts, faults, seen = [], [], 0
    problems: dict[object, int] = {}
    for start, batch in _record_batches(dataset, total):
        columns = _batch_columns(batch, label_key, path)
        seen += len(columns.roll_ins.tokens) + len(columns.roll_outs.tokens)
        check_ids = skip_bad_rows or seen <= IDS_CHECKED_AT_START
        found = dict(_faults(columns, label_key, vocab_size if check_ids else None, num_response))
        faults += [(start + row, fault) for row, fault in found.items()]
        if faults and not skip_bad_rows:
            row, fault = faults[0]
            raise UserError(
                f"{path}: row {row}, {fault}; mend the data, or pass --skip_bad_rows to leave such rows out"
            )
        text = batch.column("problem").to_pylist() if texts else range(start, start + batch.num_rows)
        numbers = np.array([problems.setdefault(key, len(problems)) for key in text])
        good = np.array([row for row in range(batch.num_rows) if row not in found], dtype=np.int64)
        parts.append(_index(columns, start, good, numbers, num_response))
    if faults:
        row, fault = faults[0]
        logger.warning(
            "%s: left out %d of %d rows that are faulty; the first is row %d, %s", path, len(faults), total, row, fault
        )
    rows, counts, labels, ins, outs, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    if len(labels) == 0:
        raise UserError(f"{path} has no roll-out to train on ({len(faults)} of {total} rows are faulty)")
    first = np.concatenate([[0], np.cumsum(counts)])
    return RolloutTable(dataset, rows, first, labels, ins, outs, numbers, vocab_size, max_length)


@dataclass(frozen=True, eq=False)
class _Lists:
    """A list<list<int>> column: list counts per row, token counts per list, all tokens (a view)."""

    counts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, eq=False)
class _Columns:
    roll_ins: _Lists
    roll_outs: _Lists
    label_counts: np.ndarray
    labels: np.ndarray


def _record_batches(dataset, total: int, rows: int = 1000) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, arrow record batch) over the first `total` rows; views, nothing is copied."""
    for start in range(0, total, rows):
        for batch in dataset[start : min(start + rows, total)].to_batches():
            yield start, batch
            start += batch.num_rows


def _batch_columns(batch: pa.RecordBatch, label_key: str, path: str) -> _Columns:
    def column(name):
        array = batch.column(name)
        if not _is_list(array.type):
            raise UserError(f"{path}: column {name} is {array.type}; it must be a list for each row")
        if array.null_count:
            raise UserError(
                f"{path}: column {name} has {array.null_count} null values; it must have a list in each row"
            )
        return array

    def lists(name):
        outer = column(name)
        inner = outer.flatten()
        if not _is_list(inner.type) or not pa.types.is_integer(inner.type.value_type):
            raise UserError(f"{path}: column {name} is {outer.type}; it must be lists of lists of token ids")
        tokens = inner.flatten()
        if tokens.null_count:
            raise UserError(f"{path}: column {name} has {tokens.null_count} null token ids")
        return _Lists(_lengths(outer), _lengths(inner), tokens.to_numpy())

    outer = column(label_key)
    kind = outer.type.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{path}: column {label_key} is {outer.type}; labels must be whole numbers 0, 1, 2")
    labels = outer.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return _Columns(lists(ROLL_INS), lists(ROLL_OUTS), _lengths(outer), labels)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _lengths(array) -> np.ndarray:
    return np.diff(array.offsets.to_numpy())


def _faults(columns: _Columns, label_key: str, vocab_size: int | None, num_response: int) -> Iterator[tuple[int, str]]:
    """(row, first fault) of each faulty row of a batch, in row order. Ids are checked where `vocab_size` is given."""
    ins, outs = columns.roll_ins, columns.roll_outs
    in_first, out_first = (np.concatenate([[0], np.cumsum(lists.counts)]) for lists in (ins, outs))
    label_first = np.concatenate([[0], np.cumsum(columns.label_counts)])
    token_first = {ROLL_INS: np.concatenate([[0], np.cumsum(ins.lengths)])}
    token_first[ROLL_OUTS] = np.concatenate([[0], np.cumsum(outs.lengths)])

    suspects = (ins.counts != outs.counts) | (ins.counts != columns.label_counts) | (outs.counts == 0)
    suspects[_owner(label_first, (columns.labels < 0) | (columns.labels >= NUM_CLASSES))] = True
    suspects[_owner(out_first, outs.lengths == 0)] = True
    if vocab_size is not None:
        for name, lists, first in ((ROLL_INS, ins, in_first), (ROLL_OUTS, outs, out_first)):
            if lists.tokens.size and not _inside(lists.tokens, vocab_size):
                outside = (lists.tokens < 0) | (lists.tokens >= vocab_size)
                bad_lists = np.zeros(len(lists.lengths), dtype=bool)
                bad_lists[_owner(token_first[name], outside)] = True
                suspects[_owner(first, bad_lists)] = True

    for row in np.flatnonzero(suspects):
        counts = int(ins.counts[row]), int(outs.counts[row]), int(columns.label_counts[row])
        if len(set(counts)) > 1:
            yield (
                int(row),
                f"columns disagree in length: {ROLL_INS} {counts[0]}, {ROLL_OUTS} {counts[1]}, {label_key} {counts[2]}",
            )
            continue
        if counts[0] == 0:
            yield int(row), f"column {ROLL_OUTS}: no roll-outs"
            continue
        for place in range(min(counts[0], num_response)):
            if fault := _rollout_fault(
                columns,
                label_key,
                vocab_size,
                token_first,
                in_first[row] + place,
                out_first[row] + place,
                label_first[row] + place,
                place,
            ):
                yield int(row), fault
                break


def _rollout_fault(columns, label_key, vocab_size, token_first, in_list, out_list, label_at, place) -> str | None:
    label = int(columns.labels[label_at])
    if not 0 <= label < NUM_CLASSES:
        return f"column {label_key}[{place}]: label {label} is none of 0 (incorrect), 1 (correct), 2 (length-limited)"
    if columns.roll_outs.lengths[out_list] == 0:
        return f"column {ROLL_OUTS}[{place}]: the roll-out is empty"
    if vocab_size is not None:
        for name, lists, at in ((ROLL_INS, columns.roll_ins, in_list), (ROLL_OUTS, columns.roll_outs, out_list)):
            ids = lists.tokens[token_first[name][at] : token_first[name][at + 1]]
            if ids.size and not _inside(ids, vocab_size):
                return _bad_ids(0, name, place, ids, vocab_size).removeprefix("row 0, ")
    return None


def _owner(first: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """Owners of the flagged items, where owner i has items first[i] .. first[i + 1] - 1."""
    return np.searchsorted(first, np.flatnonzero(flags), side="right") - 1


def _index(columns: _Columns, start: int, good: np.ndarray, problems: np.ndarray, num_response: int):
    """Row numbers, roll-out counts, labels, token counts and problem numbers of the good rows of a batch."""
    keep = np.zeros(len(columns.label_counts), dtype=bool)
    keep[good] = True

    def first_ones(counts):
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return (place < num_response) & np.repeat(keep, counts)

    ins, outs = columns.roll_ins, columns.roll_outs
    return (
        start + good,
        np.minimum(columns.label_counts[good], num_response),
        columns.labels[first_ones(columns.label_counts)],
        ins.lengths[first_ones(ins.counts)].astype(np.int64),
        outs.lengths[first_ones(outs.counts)].astype(np.int64),
        problems[good],
    )
