"""The table of a run's roll-outs: what is known of each without reading its tokens, and how one is read.

It imports neither arrow nor datasets: a subclass whose `ids` knows another place has its roll-outs from there.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common_lib.cli import UserError
from training_lib.packing import Trace

ROLL_INS, ROLL_OUTS = "roll_in_ids", "roll_outs_ids"


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

    def row_of(self, rollouts: np.ndarray | int) -> np.ndarray:
        """Index into `rows` of each roll-out."""
        return np.searchsorted(self.first, rollouts, side="right") - 1

    def lengths(self, rollouts: np.ndarray) -> np.ndarray:
        """Tokens of each roll-out's trace, cut at `max_length`."""
        return np.minimum(self.roll_in_lengths[rollouts] + self.roll_out_lengths[rollouts], self.max_length)

    def trace(self, rollout: int) -> Trace:
        """Read one roll-out's trace, cut at `max_length`. UserError where an id is outside the vocabulary."""
        i = int(self.row_of(rollout))
        row, column = int(self.rows[i]), int(rollout - self.first[i])
        roll_in, roll_out = self.ids(row, column)
        start, room = len(roll_in), max(self.max_length - len(roll_in), 0)
        parts = {ROLL_INS: roll_in[: self.max_length], ROLL_OUTS: roll_out[:room]}
        for name, ids in parts.items():
            if len(bad := ids_outside(ids, self.vocab_size)):
                words = outside_words(ids[bad[0]], self.vocab_size)
                raise UserError(f"row {row}, column {name}[{column}]: {words}")
        return Trace(np.concatenate(list(parts.values())), start, int(self.labels[rollout]), (row, column))

    def ids(self, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Roll-in and roll-out, as they stand in the data: views on the arrow buffer."""
        record = self.dataset[row : row + 1]
        return _tokens(record.column(ROLL_INS), column), _tokens(record.column(ROLL_OUTS), column)

    def select(self, keep: np.ndarray) -> "RolloutTable":
        """The table of some of the rows. keep: bool [N]."""
        counts = np.diff(self.first)
        rollouts = np.repeat(keep, counts)
        return replace(
            self,
            rows=self.rows[keep],
            first=np.concatenate([[0], np.cumsum(counts[keep])]),
            labels=self.labels[rollouts],
            roll_in_lengths=self.roll_in_lengths[rollouts],
            roll_out_lengths=self.roll_out_lengths[rollouts],
            problems=self.problems[keep],
        )


def _tokens(column: Any, place: int) -> np.ndarray:
    """List number `place` of a one-row list<list<int>> column (pyarrow.ChunkedArray), as a view on the arrow buffer."""
    outer = column.chunk(0)
    inner = outer.values
    at = outer.offsets[0].as_py() + place
    return inner.values[inner.offsets[at].as_py() : inner.offsets[at + 1].as_py()].to_numpy()


def place_in_run(lengths: np.ndarray) -> np.ndarray:
    """The place of each item in its run, for runs of these lengths: [2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def ids_outside(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Where the ids outside the vocabulary are."""
    return np.flatnonzero((ids < 0) | (ids >= vocab_size))


def outside_words(token_id: int, vocab_size: int) -> str:
    return f"token id {token_id} is outside the model's vocabulary of {vocab_size}"
