"""Who wins a vote: stated once, for one set of answers, for every pooled number of repetitions, and for the page.

A vote is among classes of equal answers (`Grader.answer_classes`); an empty answer has none and never wins. No torch.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval_lib.intervals import Floats

TIE = 1e-9  # weights that differ by less, relative to the heaviest, are equal up to rounding


def winners(weights: ArrayLike) -> NDArray[np.bool_]:
    """Which classes win a vote: the heaviest; equal up to rounding is a tie, and nobody wins with nothing.

    weights: float [..., classes], the sum of each class's weights (1 an answer for a majority). Returns bool of the same
    shape.
    """
    weights = np.asarray(weights, dtype=np.float64)
    heaviest = weights.max(-1, keepdims=True, initial=0.0)
    return (weights >= heaviest * (1 - TIE)) & (heaviest > 0)


@dataclass
class VoteRow:
    """One class of equal answers in a vote among beams."""

    answers: Counter[str] = field(default_factory=Counter)  # as they were written
    weight: float = 0.0  # sum of values
    best: float = 0.0  # highest value
    right: int = 0
    wins: dict[str, bool] = field(default_factory=dict)  # maj, wmaj, bon

    @property
    def count(self) -> int:
        return self.answers.total()

    def to_json(self, characters: int) -> dict[str, Any]:
        """For the page: the answer as it was first written, and its most frequent forms, all cut."""
        forms = [answer[:characters] for answer, _ in self.answers.most_common(3)]
        answer = next(iter(self.answers))[:characters]
        return vars(self) | {"answers": forms, "answer": answer, "count": self.count, "right": self.right / self.count}


def vote_rows(
    classes: Sequence[int], answers: Sequence[str], rewards: Sequence[bool], values: Sequence[float]
) -> list[VoteRow]:
    """The classes of some beams (one entry a beam; class -1: no answer), in the order in which they first appear."""
    by_class: dict[int, VoteRow] = {}
    for number, answer, reward, value in zip(classes, answers, rewards, values, strict=True):
        if number >= 0:
            row = by_class.setdefault(number, VoteRow())
            row.answers[answer] += 1
            row.weight += value
            row.best = max(row.best, value)
            row.right += reward
    rows = list(by_class.values())
    by_count, by_weight = winners([row.count for row in rows]), winners([row.weight for row in rows])
    top = max((row.best for row in rows), default=0.0)
    for row, majority, weighted in zip(rows, by_count, by_weight if by_weight.any() else by_count, strict=True):
        row.wins = {"maj": bool(majority), "wmaj": bool(weighted), "bon": row.best == top}
    return rows


# --------------------------------------------------------------------------------------------------- pooled repetitions
# The accuracy of m pooled repetitions is estimated from every cyclic window of m consecutive ones, or once from all of
# them where m is their number. Repetitions are exchangeable, so each window is unbiased; windows overlap, so all data
# count, and the interval stays valid because it compares problems, not windows.


def pooled_sums(values: Floats, axis: int = -1) -> Iterator[Floats]:
    """Sum over every window, for m = 1 .. R. values: R long on `axis`; yields float64 with the windows on `axis`."""
    repetitions = values.shape[axis]
    total = np.zeros_like(values)
    for m in range(1, repetitions + 1):
        total = total + np.roll(values, 1 - m, axis)  # where values are >= 0 no cancellation: an exact 0 stays 0
        yield total if m < repetitions else total.take([0], axis)


def pooled_votes(weights: Floats, right: Floats, sizes: Collection[int] | None = None) -> Iterator[Floats]:
    """Vote of every window, for m = 1 .. R or those of them in `sizes`: float64 [..., windows].

    weights: [..., R, classes], sum of each class's weights in a repetition; right: the part of it that is right. The
    vote is the share of the winners that is right, as in `eval_utils.weighted_vote`; 0 without any weight.
    """
    sums = zip(pooled_sums(weights, -2), pooled_sums(right, -2), strict=True)
    for m, (total, good) in enumerate(sums, start=1):
        if sizes is None or m in sizes:
            won = winners(total)
            share = np.divide(good, total, out=np.zeros_like(total), where=won)
            yield share.sum(-1) / np.maximum(won.sum(-1), 1)


def pooled_best(top: Floats, ties: Floats, right: Floats) -> Iterator[Floats]:
    """Best-of-N of every window, for m = 1 .. R: float64 [..., windows]. All arguments [..., R].

    top: highest score in a repetition, -inf without an answer; ties: how many answers have it; right: how many of them
    are right. Ties share; 0 where a window has no answer.
    """
    repetitions = top.shape[-1]
    for m in range(1, repetitions + 1):
        starts = np.arange(repetitions if m < repetitions else 1)
        window = (starts[:, None] + np.arange(m)) % repetitions
        at_top = top[..., window] == top[..., window].max(-1, keepdims=True)
        yield (right[..., window] * at_top).sum(-1) / np.maximum((ties[..., window] * at_top).sum(-1), 1)
