"""How good values are as predictions of success: AUC (pooled, within problems), Brier score, calibration. No torch."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eval_lib.intervals import clustered_interval, or_none


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
