"""How good values are as predictions of success: AUC (pooled, within problems), Brier score, calibration. No torch."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eval_lib.intervals import Floats, clustered_interval, or_none


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """P(a right one scores above a wrong one), ties counting half (Mann & Whitney 1947).

    labels: bool [n]; scores: float [n]. None where all labels are the same.
    """
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    right = int(labels.sum())
    wrong = len(labels) - right
    if not right or not wrong:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2  # ranks from 1, equal scores share theirs
    return float((mean_rank[inverse][labels].sum() - right * (right + 1) / 2) / (right * wrong))


def auc_within(labels: ArrayLike, scores: ArrayLike, problems: ArrayLike) -> dict[str, Any]:
    """Mean over problems of the AUC inside each: does the value tell right from wrong answers to the same problem?

    labels: bool [n]; scores: float [n]; problems: int [n]. Returns auc, ci (95 %, clustered by problem) and problems
    (those with right and wrong answers, the only ones that can tell); auc and ci are None where there is none.
    """
    labels, scores, problems = np.asarray(labels, dtype=bool), np.asarray(scores), np.asarray(problems)
    by_problem = [auc(labels[problems == p], scores[problems == p]) for p in np.unique(problems)]
    values = [value for value in by_problem if value is not None]
    if not values:
        return {"auc": None, "ci": None, "problems": 0}
    mean, half = clustered_interval(values)
    return {"auc": float(mean), "ci": or_none(half), "problems": len(values)}


def brier_score(labels: ArrayLike, values: ArrayLike) -> float:
    """Mean of (value - label)^2 (Brier 1950). labels: bool [n]; values: probabilities [n]."""
    return float(np.mean((np.asarray(values, dtype=np.float64) - np.asarray(labels, dtype=np.float64)) ** 2))


def reliability_bins(labels: ArrayLike, values: ArrayLike, num_bins: int = 10) -> list[dict[str, float]]:
    """Equally wide bins of the value that are not empty: low, high, count, mean_value, share_right.

    labels: bool [n]; values: probabilities [n]; 1.0 belongs to the last bin. ValueError for a value outside [0, 1].
    """
    labels, values = np.asarray(labels, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError("a value is not a probability: calibration needs values in [0, 1]")
    index = np.minimum((values * num_bins).astype(int), num_bins - 1)
    bins = []
    for b in np.unique(index):
        inside = index == b
        bins.append(
            {
                "low": b / num_bins,
                "high": (b + 1) / num_bins,
                "count": int(inside.sum()),
                "mean_value": float(values[inside].mean()),
                "share_right": float(labels[inside].mean()),
            }
        )
    return bins


def expected_calibration_error(labels: ArrayLike, values: ArrayLike, num_bins: int = 10) -> float:
    """Sum over bins of count / n x |mean value - share right| (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    bins = reliability_bins(labels, values, num_bins)
    gaps = sum(b["count"] * abs(b["mean_value"] - b["share_right"]) for b in bins)
    return gaps / max(1, sum(b["count"] for b in bins))


def log_odds(values: ArrayLike) -> Floats:
    """log(v / (1 - v)), of values held off 0 and 1 by 1e-4."""
    held = np.clip(np.asarray(values, dtype=np.float64), 1e-4, 1 - 1e-4)
    return np.log(held) - np.log1p(-held)


def fit_log_odds(labels: ArrayLike, scores: ArrayLike, steps: int = 100) -> tuple[float, float]:
    """(a, b) of P(right) = 1 / (1 + exp(-(a + b score))) by logistic regression (Platt 1999).

    labels: bool [n]; scores: float [n]. Penalised by (a^2 + (b - 1)^2) / 2: where there is little to learn from the scores
    stay what they are, and where one kind of label is alone a and b stay finite. Newton's method; the penalised loss is
    strictly convex, and a step that does not lower it is halved.
    """
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    design = np.stack([np.ones_like(scores), scores])
    prior = found = np.array([0.0, 1.0])

    def loss(at: Floats) -> float:
        odds = at @ design
        return float(np.logaddexp(0, odds).sum() - labels @ odds + ((at - prior) ** 2).sum() / 2)

    for _ in range(steps):
        likely = 1 / (1 + np.exp(-np.clip(found @ design, -500, 500)))
        gradient = design @ (likely - labels) + found - prior
        curvature = (design * (likely * (1 - likely))) @ design.T + np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(found - step) > loss(found) and np.abs(step).max() > 1e-12:
            step = step / 2
        found = found - step
        if np.abs(step).max() < 1e-10:
            break
    return float(found[0]), float(found[1])


def cross_fitted_log_odds(
    labels: ArrayLike, values: ArrayLike, problems: ArrayLike, folds: int = 5, seed: int = 0
) -> Floats:
    """The log-odds of being right that each value stands for, float64 [n], as learnt from other problems only.

    labels: bool [n]; values: in [0, 1] [n]; problems: int [n]. Problems are dealt to `folds` at random (seeded); each fold's
    log-odds are a + b log(v / (1 - v)), with (a, b) of `fit_log_odds` on all others. A single problem keeps those of its
    values.
    """
    labels, problems, scores = np.asarray(labels, dtype=bool), np.asarray(problems), log_odds(values)
    names, place = np.unique(problems, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(names))[place] % folds
    found = scores.copy()
    for number in np.unique(fold):
        own = fold == number
        a, b = fit_log_odds(labels[~own], scores[~own])
        found[own] = a + b * scores[own]
    return found
