"""When further repetitions of a problem are not needed: rules on the repetitions 0 .. t - 1, in their order. No torch.

*sure*: the vote of all repetitions cannot have another winning class than the vote of these t, whatever is still to come:
the leader outweighs all other answers together plus all that the remaining repetitions could add. Rivals may then turn
out to be equal to each other (equality of answers is not transitive, so a new answer can merge classes), and the leader
may only grow. This rests on values of at most 1 and on classes that never come apart; where `Grader.answer_classes` warns
that it did not compare all pairs, or that a comparison failed, they may.

*certified*: a test that may be looked at after every repetition. Repetitions are independent, answers of one tree are
not, so a tree is one observation: x = (weight of the leader - weight of a rival in the tree) / beams, in [-1, 1]. Where the
rival is at least as heavy in expectation, prod_t (1 + lambda x_t) is a non-negative supermartingale for every lambda in
(0, 1), and so is the mean E over LAMBDAS: it ever reaches 2 / alpha with probability at most alpha / 2 (Ville 1939). Two
answers can lead, hence the 2; that it covers more of them is simulated (scripts/stopping_study.py). In the manner of CITE
(arXiv 2605.05873) and of martingale majority certificates (arXiv 2510.17472). A certificate is about the answer that is
heaviest in expectation. It says nothing of being right, and the vote of all repetitions may, rarely, differ.

Where both rules hold at once the word is `certified`: it is the claim that the other word does not make.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from eval_lib.intervals import Floats
from eval_lib.votes import TIE

STOPS = ("none", "sure", "certified")
STOP_VOTES = ("weighted", "majority")
LAMBDAS: Floats = np.linspace(0.02, 0.98, 25)
ClassesOf = Callable[[Sequence[str]], Sequence[int]]  # `Grader.answer_classes`: a class an answer, -1 for none


@dataclass(frozen=True)
class Stopping:
    """What is asked. repetitions: the most that a problem may get; beams: the most answers that a tree has."""

    kind: str  # one of STOPS
    vote: str  # one of STOP_VOTES
    alpha: float
    repetitions: int
    beams: int

    def __post_init__(self) -> None:
        if self.kind not in STOPS or self.vote not in STOP_VOTES:
            raise ValueError(f"no such rule: {self.kind}, {self.vote}")
        if not 0 < self.alpha < 1 or self.repetitions < 1 or self.beams < 1:
            raise ValueError(f"alpha must lie between 0 and 1, repetitions and beams must be at least 1: {self}")


class StopTest:
    """The rules for one problem, told of its repetitions one by one."""

    def __init__(self, stopping: Stopping, classes_of: ClassesOf):
        self.stopping, self.classes_of = stopping, classes_of
        self.trees = 0  # added
        self._answers: list[str] = []
        self._tree_of: list[int] = []  # by answer
        self._weights: list[float] = []  # by answer
        self._class_of: dict[str, int] = {}

    def add(self, answers: Sequence[str], scores: Sequence[float]) -> str | None:
        """The next repetition in order. 'certified' or 'sure' where that rule holds on all that were added, else None;
        `sure` is not said of the last one, which leaves nothing to save.

        answers, scores: of its beams; '' is no answer. Classes are asked for where an answer is new, of all answers so far.
        Raises ValueError for more repetitions or beams than there may be, and for scores outside [0, 1].
        """
        stopping = self.stopping
        if self.trees == stopping.repetitions or len(answers) > stopping.beams:
            raise ValueError(f"more repetitions or answers than there may be: {self.trees}, {len(answers)}; {stopping}")
        if len(answers) != len(scores) or not all(0 <= score <= 1 for score in scores):
            raise ValueError(f"a score in [0, 1] for each answer: {answers}, {scores}")
        self.trees += 1
        self._answers += answers
        self._tree_of += [self.trees - 1] * len(answers)
        self._weights += scores if stopping.vote == "weighted" else [1.0] * len(answers)
        if stopping.kind == "none":
            return None
        if not self._class_of.keys() >= set(answers):
            self._class_of = dict(zip(self._answers, self.classes_of(self._answers), strict=True))
        weights = self.class_weights()
        if stopping.kind == "certified" and is_certified(weights, stopping.beams, stopping.alpha):
            return "certified"
        left = stopping.repetitions - self.trees
        return "sure" if left and is_sure(weights.sum(0), left * stopping.beams) else None

    def class_weights(self) -> Floats:
        """Weight of each class in each tree, float64 [trees, classes]; classes are those of all answers so far."""
        found = [self._class_of[answer] for answer in self._answers]
        numbers = {number: k for k, number in enumerate(dict.fromkeys(n for n in found if n >= 0))}
        weights = np.zeros((self.trees, len(numbers)))
        for tree, number, weight in zip(self._tree_of, found, self._weights, strict=True):
            if number >= 0:
                weights[tree, numbers[number]] += weight
        return weights


def stopping_point(
    stopping: Stopping, searches: Iterable[tuple[Sequence[str], Sequence[float]]], classes_of: ClassesOf
) -> tuple[int, str]:
    """(T, kind): the repetitions of a problem that count, 0 .. T - 1, and 'certified' or 'sure', or 'full' where it needs
    all `stopping.repetitions`, as far as those given say.

    searches: (answers, scores) of the repetitions 0, 1, ... without gaps; read only as far as the rule needs them,
    and of more than `stopping.repetitions` the first.
    """
    test = StopTest(stopping, classes_of)
    for answers, scores in islice(searches, stopping.repetitions):
        if kind := test.add(answers, scores):
            return test.trees, kind
    return stopping.repetitions, "full"


def is_sure(totals: Floats, room: float) -> bool:
    """Does the heaviest class win whatever weight, up to `room` in all, goes to whichever others, which may merge?

    totals: float64 [classes]. One TIE for the vote's, and one since sums in another order are rounded otherwise.
    """
    if not len(totals):
        return False
    leader = int(totals.argmax())
    return bool(totals[leader] * (1 - 2 * TIE) > np.delete(totals, leader).sum() + room)


def is_certified(weights: Floats, beams: int, alpha: float) -> bool:
    """Is the class that is heaviest now certified to be so in expectation? weights: float64 [trees, classes]."""
    if not weights.any():
        return False
    totals = weights.sum(0)
    leader = int(totals.argmax())
    # An answer that was not seen has weight 0: it asks for less than any that was, and is the rival where there is none.
    rivals = np.delete(weights, leader, axis=1) if len(totals) > 1 else np.zeros((len(weights), 1))
    margin, bar = (totals[leader] - rivals.sum(0).max()) / beams, math.log(2 / alpha)
    if LAMBDAS[-1] * margin < bar:  # log(1 + x) <= x: no need to look closer
        return False
    return bool(log_evidence((weights[:, leader, None] - rivals).T / beams).min() >= bar)


def log_evidence(series: Floats) -> Floats:
    """log E of [..., trees] observations in [-1, 1]: float64 [...]. In logarithms, since E has a factor a tree."""
    return log_mean_exp(np.log1p(LAMBDAS[:, None] * series[..., None, :]).sum(-1))


def log_mean_exp(logs: Floats) -> Floats:
    """log of the mean over the last axis of exp(logs), without overflow."""
    top = logs.max(-1, keepdims=True)
    return top[..., 0] + np.log(np.exp(logs - top).mean(-1))
