"""Intervals and tests whose clusters are problems, and the repeat-noise-only interval beside them. No torch."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MOST_FLIPPED = 15  # differences whose signs are all tried: 32,768 ways


def student_t_tail(t: float, degrees: int) -> float:
    """P(|T| > t) of Student's t with a whole number of degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    inside = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return min(1.0, max(0.0, 1.0 - inside))


@lru_cache(maxsize=1024)
def student_t_quantile(level: float, degrees: int) -> float:
    """t with P(|T| <= t) = level, by bisection."""
    low, high = 0.0, 1.0
    while student_t_tail(high, degrees) > 1 - level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_tail(middle, degrees) > 1 - level else (low, middle)
    return high


def clustered_interval(values: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Mean over problems and half-width of its interval: t quantile with n - 1 degrees x standard deviation / sqrt(n).

    values: float [..., problems], each problem's own mean over its repetitions. Problems are the clusters: their means
    vary by the noise of the repetitions and from problem to problem, so the interval holds for other problems of the
    same kind. Returns two float64 [...]; the half-width is NaN for a single problem.
    """
    values = np.asarray(values, dtype=np.float64)
    problems = values.shape[-1]
    if problems < 2:
        return values.mean(-1), np.full(values.shape[:-1], np.nan)
    spread = values.std(-1, ddof=1) / math.sqrt(problems)
    return values.mean(-1), student_t_quantile(level, problems - 1) * spread


def repeat_noise_half_width(values: ArrayLike) -> Floats:
    """The released code's 95 % half-width of a benchmark's mean.

    values: float [..., repetitions, problems], Y_ij of problem i in repetition j; variances are unbiased. With M > 1
    repetitions 1.96 x sqrt(mean over i of var_j(Y_ij) / (problems x M)): the noise of repetitions only, which holds for
    these very problems and says nothing of others of the same kind. With M = 1, 1.96 x sqrt(var_i(Y_i) / problems): a
    figure of another kind, between problems; NaN for a single problem. Returns float64 [...].
    """
    values = np.asarray(values, dtype=np.float64)
    repetitions, problems = values.shape[-2:]
    if repetitions > 1:
        variance = values.var(-2, ddof=1).mean(-1) / repetitions
    elif problems > 1:
        variance = values[..., 0, :].var(-1, ddof=1)
    else:
        variance = np.full(values.shape[:-2], np.nan)
    return np.asarray(1.96 * np.sqrt(variance / problems))


def paired_test(differences: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats, Floats]:
    """Paired t-test over problems. differences: float [..., problems], each problem's mean in one run minus the other.

    Returns (mean, half-width, two-sided p-value), each float64 [...]. Where all differences are 0 the p-value is 1; NaN
    half-width and p-value for a single problem.
    """
    differences = np.asarray(differences, dtype=np.float64)
    mean, half = clustered_interval(differences, level)
    degrees = differences.shape[-1] - 1
    if degrees < 1:
        return mean, half, np.full(mean.shape, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / (half / student_t_quantile(level, degrees)))
    return mean, half, np.vectorize(lambda value: student_t_tail(value, degrees), otypes=[np.float64])(t)


def sign_flip_p(differences: ArrayLike) -> float | None:
    """Exact two-sided p-value of paired differences [problems], by the sign-flip test (Fisher 1935, section 21).

    That is the share of all ways to choose the signs whose sum is at least as far from 0, so k problems that differ
    show nothing below 2 ** (1 - k), whatever a t-test says of them. None where more than MOST_FLIPPED differ.
    """
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.abs(values) > 1e-12]
    if len(values) > MOST_FLIPPED:
        return None
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9))


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Two runs compared on their common problems. Arguments: each run's mean score by problem (data_idx).

    Returns difference (one - other), ci (half-width, 95 %), p_value (the last two None for a single problem), p_exact (of
    `sign_flip_p`), problems (common ones), only_one and only_other (numbers of problems left out). Raises ValueError
    without a common problem.
    """
    common = sorted(one.keys() & other.keys())
    if not common:
        raise ValueError("the runs have no problem in common")
    differences = [one[i] - other[i] for i in common]
    mean, half, p_value = paired_test(differences)
    return {
        "difference": float(mean),
        "ci": or_none(half),
        "p_value": or_none(p_value),
        "p_exact": sign_flip_p(differences),
        "problems": len(common),
        "only_one": len(one) - len(common),
        "only_other": len(other) - len(common),
    }


def variance_warning(values: ArrayLike) -> str | None:
    """A sentence where an interval from these problem means [problems] deserves little trust, else None.

    That is where fewer than 5 problems carry 90 % of the variance between problems (the old rule that a share needs at
    least 5 cases on either side), or none does.
    """
    values = np.asarray(values, dtype=np.float64)
    squares = np.sort((values - values.mean()) ** 2)[::-1]
    if len(values) < 5:
        return f"only {len(values)} problem{'s' * (len(values) > 1)}: the interval is no more than a hint"
    if squares.sum() <= 1e-12:
        limit = 100 * (1 - 0.05 ** (1 / len(values)))
        return (
            f"all {len(values)} problems score the same, so the interval has no width: "
            f"problems of another kind may still be {limit:.0f} % of all"
        )
    carriers = int(np.searchsorted(np.cumsum(squares), 0.9 * squares.sum() * (1 - 1e-9))) + 1
    if carriers < 5:
        return f"{carriers} of {len(values)} problems carry 90 % of the variance: the interval is too narrow"
    return None


def or_none(value: ArrayLike) -> float | None:
    """A number for JSON, which has no NaN."""
    number = float(np.asarray(value))
    return None if math.isnan(number) else number
