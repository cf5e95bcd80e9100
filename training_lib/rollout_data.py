"""Training data in OpenR1-VM's schema: checked at start, read one roll-out at a time as arrow slices.

A row is one problem: `roll_in_ids` [n][tokens] (prompt plus a prefix of a trace), `roll_outs_ids` [n][tokens] (what the
generator then wrote), `labels` [n] (0 incorrect, 1 correct, 2 length-limited), and text columns of which only
`problem` is used, to hold out whole problems. Decoding a row of 56 x 16k ids to Python costs about 100 ms; the slice of
one roll-out is a view on the memory-mapped file and costs microseconds.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from common_lib.cli import UserError
from data_utils import open_dataset
from training_lib.rollout_files import check_all_there
from training_lib.rollout_table import ROLL_INS, ROLL_OUTS, RolloutTable, ids_outside, outside_words, place_in_run

logger = logging.getLogger(__name__)

NUM_CLASSES = 3  # labels are classes 0, 1, 2 also where the model has one output: its target is `label == 1`


def load_rollouts(
    path: str,
    *,
    vocab_size: int,
    max_length: int,
    num_response: int,
    label_key: str = "labels",
    skip_bad_rows: bool = False,
    max_rows: int | None = None,
    ids_checked_at_start: int = 200_000_000,  # a second or two
) -> RolloutTable:
    """Open a data set, check it, and index the first `num_response` roll-outs of each row.

    Checked for all rows: lists of one row agree in length, labels are classes, no roll-out is empty, and ids lie in the
    vocabulary (beyond the first `ids_checked_at_start` ids only when a roll-out is read). The first fault is a UserError
    with its row and column, or names missing files; `skip_bad_rows` checks every id, leaves such rows out and logs how many.
    """
    check_all_there(path)
    dataset = _select(open_dataset(path), path, label_key, max_rows)
    parts, start, seen, num_bad, first_fault = [], 0, 0, 0, ""
    problems: dict[object, int] = {}
    for batch in (batch for table in dataset.iter(1000) for batch in table.to_batches()):  # views, nothing is copied
        columns = _read_columns(batch, label_key, path)
        seen += sum(len(column.tokens) for column in columns.values())
        check_ids = skip_bad_rows or seen <= ids_checked_at_start
        bad, words = _find_faults(columns, label_key, num_response, vocab_size, check_ids)
        if bad.any():
            num_bad += int(bad.sum())
            first_fault = first_fault or f"row {start + int(bad.argmax())}, {words}"
        if num_bad and not skip_bad_rows:
            raise UserError(f"{path}: {first_fault}; mend the data, or pass --skip_bad_rows to leave such rows out")
        named = "problem" in dataset.column_names
        texts = batch.column("problem").to_pylist() if named else range(start, start + batch.num_rows)
        numbers = np.array([problems.setdefault(text, len(problems)) for text in texts])
        counts = np.minimum(columns[label_key].counts[~bad], num_response)
        values = (column.values[column.first_items(~bad, num_response)] for column in columns.values())
        parts.append((start + np.flatnonzero(~bad), counts, *values, numbers[~bad]))
        start += batch.num_rows
    if num_bad:
        logger.warning("%s: left out %d of %d rows that are faulty; the first is %s", path, num_bad, start, first_fault)
    rows, counts, ins, outs, labels, numbers = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(labels) == 0:
        raise UserError(f"{path} has no roll-out to train on ({num_bad} of {start} rows are faulty)")
    first = np.concatenate([[0], np.cumsum(counts)])
    return RolloutTable(dataset, rows, first, labels, ins, outs, numbers, vocab_size, max_length)


def _select(dataset, path: str, label_key: str, max_rows: int | None) -> Any:
    """The rows and columns that training reads, in arrow format. Raises UserError."""
    wanted = [ROLL_INS, ROLL_OUTS, label_key]
    if missing := [name for name in wanted if name not in dataset.column_names]:
        raise UserError(
            f"{path} lacks column {', '.join(missing)}; it has {', '.join(dataset.column_names)} "
            "(--label_key names the labels' column)"
        )
    if len(dataset) == 0:
        raise UserError(f"{path} has no rows")
    texts = ["problem"] if "problem" in dataset.column_names else []
    first = range(len(dataset))[:max_rows]
    return dataset.select_columns(wanted + texts).select(first).with_format("arrow")


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of lists in a batch. counts [rows]: items of each row; values [items]: the labels, or how many tokens
    each list of ids has; tokens: those of all lists one behind the other, a view."""

    counts: np.ndarray
    values: np.ndarray
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def first_items(self, keep: np.ndarray, most: int) -> np.ndarray:
        """Numbers of the first `most` items of each row that is kept. keep: bool [rows]."""
        return np.flatnonzero((place_in_run(self.counts) < most) & np.repeat(keep, self.counts))

    def outside(self, vocab_size: int) -> dict[int, int]:
        """Of each list that holds an id outside the vocabulary: its number, and the first such id."""
        places = ids_outside(self.tokens, vocab_size)
        lists, first = np.unique(np.searchsorted(np.cumsum(self.values), places, side="right"), return_index=True)
        return dict(zip(lists.tolist(), self.tokens[places[first]].tolist(), strict=True))


def _read_columns(batch: pa.RecordBatch, label_key: str, path: str) -> dict[str, _Column]:
    """Roll-ins, roll-outs and labels of a batch. Raises UserError for a column of another type."""

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
        return _Column(_lengths(outer), _lengths(inner), tokens.to_numpy())

    outer = column(label_key)
    kind = outer.type.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{path}: column {label_key} is {outer.type}; labels must be whole numbers 0, 1, 2")
    labels = outer.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return {ROLL_INS: lists(ROLL_INS), ROLL_OUTS: lists(ROLL_OUTS), label_key: _Column(_lengths(outer), labels)}


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _lengths(array) -> np.ndarray:
    return np.diff(array.offsets.to_numpy()).astype(np.int64)


_Rule = tuple[str, np.ndarray, Callable[[int], str]]  # column, which roll-outs break the rule, how one of them does


def _find_faults(
    columns: dict[str, _Column], label_key: str, num_response: int, vocab_size: int, check_ids: bool
) -> tuple[np.ndarray, str]:
    """Which rows of a batch are faulty, bool [rows], and the first fault of the first of them in words.

    The columns of a row must agree in length, and its first `num_response` roll-outs keep the rules.
    """
    counts = np.stack([column.counts for column in columns.values()])
    countable = (counts == counts[0]).all(axis=0) & (counts[0] > 0)
    # The roll-outs in use of all countable rows: the row of each, and its number among the items of each column.
    row = np.repeat(np.arange(len(countable)), np.where(countable, np.minimum(counts[0], num_response), 0))
    at = {name: column.first_items(countable, num_response) for name, column in columns.items()}
    labels, lengths = columns[label_key].values[at[label_key]], columns[ROLL_OUTS].values[at[ROLL_OUTS]]

    def outside(name: str) -> _Rule:
        found = columns[name].outside(vocab_size)
        return name, np.isin(at[name], list(found)), lambda i: outside_words(found[at[name][i]], vocab_size)

    rules: list[_Rule] = [
        (label_key, (labels < 0) | (labels >= NUM_CLASSES),
         lambda i: f"label {labels[i]} is none of 0 (incorrect), 1 (correct), 2 (length-limited)"),
        (ROLL_OUTS, lengths == 0, lambda i: "the roll-out is empty"),
        *map(outside, (ROLL_INS, ROLL_OUTS) if check_ids else ()),
    ]  # fmt: skip
    broken = np.any([mask for _, mask, _ in rules], axis=0)
    bad = ~countable
    bad[row[broken]] = True
    first = int(bad.argmax())
    if not bad[first]:
        return bad, ""
    if countable[first]:
        i = int(broken.argmax())
        name, _, words = next(rule for rule in rules if rule[1][i])
        return bad, f"column {name}[{i - int(np.searchsorted(row, first))}]: {words(i)}"
    if not counts[:, first].any():
        return bad, f"column {ROLL_OUTS}: no roll-outs"
    shown = ", ".join(f"{name} {count}" for name, count in zip(columns, counts[:, first], strict=True))
    return bad, f"columns disagree in length: {shown}"
