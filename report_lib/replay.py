"""Policies replayed on the problems of a finished run: where each would have stopped, at what cost, with what answer.

Every problem has the recorded order of its repetitions and NUM_ORDERS random ones, seeded, the same for every policy. A
repetition's place in the order is all that changes: the trees are the recorded ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval_lib.intervals import Floats
from report_lib.policies import VOTES, Policy
from report_lib.prefix_votes import Answers, Integers, Prefixes, look_at_prefixes

NUM_ORDERS = 100
COSTS = ("generated", "scored", "flops")  # of a search: tokens generated, tokens scored, FLOPs
# repetitions: T; right: of the vote at T; same: has it the winning class of all repetitions?; early: was it stopped before
# its last repetition?; false: with another winning class than that one would have given?
FIGURES = ("repetitions", *COSTS, "right", "same", "early", "false")


@dataclass(frozen=True)
class RecordedProblem:
    """costs: float64 [COSTS, R], NaN where not known."""

    data_idx: int
    answers: Answers
    costs: Floats


@dataclass(frozen=True)
class Replayed:
    """By figure (FIGURES), float64 [policies, problems]: mean over the random orders, and of the recorded order."""

    mean: dict[str, Floats]
    recorded: dict[str, Floats]


def orders_of(data_idx: int, repetitions: int, num_orders: int = NUM_ORDERS) -> Integers:
    """int [1 + num_orders, R]: the recorded order, then random ones, which depend on the problem's number alone."""
    rng = np.random.default_rng([data_idx, 1])
    drawn = rng.permuted(np.tile(np.arange(repetitions), (num_orders, 1)), axis=1)
    return np.concatenate([np.arange(repetitions)[None], drawn])


def replay(policies: Sequence[Policy], problems: Iterable[RecordedProblem], num_orders: int = NUM_ORDERS) -> Replayed:
    """Each problem is read once, and what is held of it are figures."""
    rows = [
        replay_problem(policies, problem, num_orders) for problem in problems
    ]  # [problems] of [figures, policies, 2]
    found = np.stack(rows, axis=-1)
    mean, recorded = ({name: found[i, :, kind] for i, name in enumerate(FIGURES)} for kind in range(2))
    return Replayed(mean, recorded)


def replay_problem(policies: Sequence[Policy], problem: RecordedProblem, num_orders: int) -> Floats:
    """float64 [FIGURES, policies, (mean over random orders, recorded order)]."""
    repetitions, beams = problem.answers.kinds.shape
    orders = orders_of(problem.data_idx, repetitions, num_orders)
    prefixes = look_at_prefixes(problem.answers, orders)
    costs = np.cumsum(problem.costs[:, orders], axis=-1)  # [COSTS, O, R]
    most = np.array([policy.most or repetitions for policy in policies])
    fires = (stop_fires(policy, prefixes, n, beams) for policy, n in zip(policies, most, strict=True))
    # T - 1, int [policies, O]: at `most` each stops
    last = np.array([np.where(held.any(-1), held.argmax(-1), held.shape[1] - 1) for held in fires])
    vote = np.array([list(VOTES).index(policy.vote) for policy in policies])[:, None]
    row = np.arange(len(orders))
    winner, score = (np.array([found[name] for name in VOTES]) for found in (prefixes.winner, prefixes.score))
    final = np.array([prefixes.final[name] for name in VOTES], np.uint64)
    won, early = winner[vote, row, last], last < most[:, None] - 1
    figures = np.array(
        [
            last + 1.0,
            *costs[:, row, last],
            score[vote, row, last],
            won == final[vote],
            early,
            early & (won != winner[vote, row, most[:, None] - 1]),
        ]
    )
    mean = figures[..., 1:].mean(-1) if num_orders else np.full(figures.shape[:2], np.nan)
    return np.stack([mean, figures[..., 0]], axis=-1)


def stop_fires(policy: Policy, prefixes: Prefixes, most: int, beams: int) -> NDArray[np.bool_]:
    """Does the stop hold on the first t = 1 .. most repetitions? bool [O, most]."""
    t = np.arange(1, most + 1)
    stops = {name: values[:, :most] for name, values in prefixes.stops.items()}
    if policy.stop == "none":
        return np.zeros(stops["alike"].shape, bool)
    parameter = policy.parameter or 0.0
    if policy.stop == "beta":
        return stops["posterior"] >= parameter
    if policy.stop == "esc":
        return (stops["alike"] >= parameter) & (t % parameter == 0)
    sure = (stops[f"lead_{policy.vote}"] > (most - t) * beams) & (t < most)
    if policy.stop == "sure":
        return sure
    return sure | (stops[f"evidence_{policy.vote}"] >= 2 / parameter)


@dataclass(frozen=True)
class WhatIf:
    """What a report says of replays. rows: of `report_lib.what_if.policy_rows`; repetitions: of each problem; basis: the
    row's key that costs are compared by."""

    rows: list[dict[str, Any]]
    repetitions: int
    basis: str

    @property
    def chosen(self) -> list[dict[str, Any]]:
        """The rows of policies that were chosen beforehand."""
        return [row for row in self.rows if row["chosen"]]

    def row(self, policy: str) -> dict[str, Any]:
        """That of a policy as it is written."""
        return next(row for row in self.rows if row["policy"] == policy)
