"""The table of a search run: every vote at every pooled number of repetitions, with intervals and costs. No torch.

Also hands on the statistics that it is made of (eval_lib.intervals, eval_lib.calibration).
"""

import math
import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from eval_lib.calibration import auc, auc_within, brier_score, expected_calibration_error, reliability_bins
from eval_lib.intervals import (
    Floats,
    clustered_interval,
    paired_difference,
    paired_test,
    repeat_noise_half_width,
    variance_warning,
)
from eval_utils import as_integer, normalize_answer

__all__ = [
    "METRICS",
    "auc",
    "auc_within",
    "brier_score",
    "clustered_interval",
    "expected_calibration_error",
    "format_table",
    "paired_difference",
    "paired_test",
    "pooled_best",
    "pooled_scores",
    "pooled_sums",
    "pooled_votes",
    "problem_means",
    "reliability_bins",
    "repeat_noise_half_width",
    "summarize",
    "variance_warning",
]

METRICS = {
    "pass1": "pass@1",
    "pass": "pass@k",
    "bon": "best-of-N",
    "maj": "majority",
    "wmaj": "weighted",
}

# --------------------------------------------------------------------------------------------------------- pooled votes
# The accuracy of m pooled repetitions is estimated from every cyclic window of m consecutive ones, or once from all of
# them where m is their number. Repetitions are exchangeable, so each window is unbiased; windows overlap, so all data
# count, and the interval stays valid because it compares problems, not windows.


def pooled_sums(values: Floats) -> Iterator[Floats]:
    """Sum over every window, for m = 1 .. R. values: [..., R]; yields float64 [..., windows]."""
    repetitions = values.shape[-1]
    total = np.zeros_like(values)
    for m in range(1, repetitions + 1):
        total = total + np.roll(values, 1 - m, axis=-1)  # where values are >= 0 no cancellation: an exact 0 stays 0
        yield total[..., : 1 if m == repetitions else repetitions]


def pooled_votes(weights: Floats, right: Floats, sizes: Collection[int] | None = None) -> Iterator[Floats]:
    """Vote of every window, for m = 1 .. R or those of them in `sizes`: float64 [..., windows].

    weights: [..., R, classes], sum of each class's weights in a repetition; right: the part of it that is right. The
    vote is the share of the heaviest class that is right, as in `eval_utils.weighted_vote`; 0 without any weight.
    """
    repetitions = weights.shape[-2]
    total, good = np.zeros_like(weights), np.zeros_like(right)
    for m in range(1, repetitions + 1):
        total += np.roll(weights, 1 - m, axis=-2)
        good += np.roll(right, 1 - m, axis=-2)
        if sizes is not None and m not in sizes:
            continue
        last = 1 if m == repetitions else repetitions
        heaviest = total[..., :last, :].max(-1, keepdims=True, initial=0.0)
        winner = (total[..., :last, :] >= heaviest * (1 - 1e-9)) & (heaviest > 0)
        share = np.divide(good[..., :last, :], total[..., :last, :], out=np.zeros_like(winner, float), where=winner)
        yield share.sum(-1) / np.maximum(winner.sum(-1), 1)


def pooled_best(top: Floats, ties: Floats, right: Floats) -> Iterator[Floats]:
    """Best-of-N of every window, for m = 1 .. R: float64 [..., windows]. All arguments [..., R].

    top: highest score in a repetition, -inf without an answer; ties: how many answers have it; right: how many of them
    are right. Ties share; 0 where a window has no answer.
    """
    repetitions = top.shape[-1]
    best, count, good = np.full_like(top, -np.inf), np.zeros_like(top), np.zeros_like(top)
    for m in range(1, repetitions + 1):
        new_top, new_ties, new_right = (np.roll(x, 1 - m, axis=-1) for x in (top, ties, right))
        higher, equal = new_top > best, new_top == best
        count = np.where(higher, new_ties, count + np.where(equal, new_ties, 0))
        good = np.where(higher, new_right, good + np.where(equal, new_right, 0))
        best = np.maximum(best, new_top)
        yield (good / np.maximum(count, 1))[..., : 1 if m == repetitions else repetitions]


# ------------------------------------------------------------------------------------------------------------ the table


def pooled_scores(
    lines: Iterable[Mapping[str, Any]], classes: Mapping[int, Mapping[int, Sequence[int]]] | None = None
) -> dict[int, dict[str, list[Floats]]]:
    """By problem (data_idx) and metric (METRICS): entry m - 1 is float64 [windows], the scores at m pooled repetitions.

    lines: the lines of an output file (processed_answer, reward, generated_scores are read). classes: by data_idx and
    repeat_idx the class of each beam's answer, one numbering for a problem (`eval_utils.problem_classes`); None takes
    equal integers and equal strings as one class. Raises ValueError for two lines of one search, and for a score that
    is not a number >= 0.
    """
    return {i: _score_problem(searches) for i, searches in sorted(_read_searches(lines, classes).items())}


def problem_means(scores: Mapping[int, Mapping[str, Sequence[Floats]]], metric: str, pooled: int) -> dict[int, float]:
    """One metric at one pooled number of repetitions, by problem (those that have as many): for `paired_difference`."""
    return {i: float(found[metric][pooled - 1].mean()) for i, found in scores.items() if len(found[metric]) >= pooled}


def summarize(
    lines: Iterable[Mapping[str, Any]],
    num_blocks: int | None,
    classes: Mapping[int, Mapping[int, Sequence[int]]] | None = None,
    num_problems: int | None = None,
) -> list[dict[str, Any]]:
    """One row per pooled number of repetitions m = 1 .. R, of problems that have m; see `pooled_scores` for arguments.

    num_blocks: blocks in parallel of one search, None where unknown. num_problems: problems of the run, where lines may
    be missing. A row has N = num_blocks x m, pooled = m, problems, missing (problems without m repetitions); for each
    of METRICS `_m` (mean over problems), `_ci` (half-width of the problem-clustered 95 % interval) and `_ci_repeat`
    (the released repeat-noise-only one); tokens_generated, tokens_scored, seconds (mean over problems of the sum over
    the pooled searches); truncated, empty (shares of answers); note ('' or what to mind). None: cannot be told.
    """
    searches = _read_searches(lines, classes)
    scores = {i: _score_problem(runs) for i, runs in sorted(searches.items())}
    total = max(num_problems or 0, len(scores))
    repetitions = max((len(runs) for runs in searches.values()), default=0)
    rows = []
    for m in range(1, repetitions + 1):
        problems = [i for i in scores if len(searches[i]) >= m]
        row: dict[str, Any] = {"N": num_blocks and num_blocks * m, "pooled": m, "problems": len(problems)}
        row |= {"missing": total - len(problems)}
        notes = [f"{row['missing']} of {total} problems lack {m} repetition{'s' * (m > 1)}"] if row["missing"] else []
        warnings: dict[str, list[str]] = defaultdict(list)
        for metric in METRICS:
            windows = [scores[i][metric][m - 1] for i in problems]
            means = [float(window.mean()) for window in windows]
            groups = min(len(searches[i]) // m for i in problems)  # disjoint ones, for the noise of repetitions
            disjoint = np.array([window[: groups * m : m] for window in windows]).T
            mean, half = clustered_interval(means)
            repeat = repeat_noise_half_width(disjoint)
            row |= {f"{metric}_m": float(mean), f"{metric}_ci": _known(half), f"{metric}_ci_repeat": _known(repeat)}
            if warning := variance_warning(means):
                warnings[warning].append(METRICS[metric])
        notes += [f"{', '.join(names)}: {warning}" for warning, names in warnings.items()]
        rows.append(row | _costs([searches[i] for i in problems], m) | {"note": "; ".join(notes)})
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `summarize` as text of at most 80 columns. More than 16 rows: the powers of two and the last."""
    shown = rows if len(rows) <= 16 else [r for r in rows if r["pooled"] & (r["pooled"] - 1) == 0 or r is rows[-1]]
    heads = "".join(f"{name:>13}" for name in METRICS.values())
    text = [
        "Accuracy, %, and the half-width of its 95 % interval, clustered by problem",
        f"{'N':>6} {'pooled':>7}{heads}",
    ]
    text += [_budget(r) + "".join(_percent(r[f"{k}_m"], r[f"{k}_ci"]) for k in METRICS) for r in shown]
    text += ["", "Half-width from repeat noise only, as released (needs two groups of repetitions)"]
    text += [f"{'N':>6} {'pooled':>7}{heads}"]
    text += [_budget(r) + "".join(_percent(None, r[f"{k}_ci_repeat"]) for k in METRICS) for r in shown]
    text += ["", "Cost of one problem; shares of answers cut off by max_length, and without a box"]
    text += [
        f"{'N':>6} {'pooled':>7}{'problems':>9}{'generated':>12}{'scored':>12}{'seconds':>10}{'cut off':>9}{'empty':>9}"
    ]
    for r in shown:
        costs = _number(r["tokens_generated"], 12, ",.0f") + _number(r["tokens_scored"], 12, ",.0f")
        shares = _number(r["truncated"], 9, ".1%") + _number(r["empty"], 9, ".1%")
        text.append(f"{_budget(r)}{r['problems']:>9}{costs}{_number(r['seconds'], 10, ',.1f')}{shares}")
    at: dict[str, list[str]] = defaultdict(list)
    for r in shown:
        for note in filter(None, r["note"].split("; ")):
            at[note].append(str(r["pooled"]))
    notes = [f"At {', '.join(pooled)} pooled: {note}." for note, pooled in at.items()]
    text += [""] * bool(notes) + [line for note in notes for line in textwrap.wrap(note, 80, subsequent_indent="  ")]
    if len(shown) < len(rows):
        text.append(f"{len(shown)} of {len(rows)} budgets are shown.")
    return "\n".join(text)


def _read_searches(
    lines: Iterable[Mapping[str, Any]], classes: Mapping[int, Mapping[int, Sequence[int]]] | None
) -> dict[int, list[dict[str, Any]]]:
    """By problem its searches in the order of repeat_idx, without the bulk of a line."""
    found: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        problem, repeat = line["data_idx"], line["repeat_idx"]
        if repeat in found[problem]:
            raise ValueError(f"problem {problem} has two lines of repetition {repeat}")
        kept = ("reward", "dt", "tokens_generated", "tokens_scored", "finish_reasons")
        search: dict[str, Any] = {key: line.get(key) for key in kept} | {
            "scores": np.array(line["generated_scores"], dtype=np.float64)
        }
        answers = [normalize_answer(answer) for answer in line["processed_answer"]]
        search["classes"] = classes[problem][repeat] if classes else [as_integer(a) or a or None for a in answers]
        search["classes"] = [None if c == -1 else c for c in search["classes"]]
        if not len(search["classes"]) == len(search["reward"]) == len(search["scores"]):
            raise ValueError(f"problem {problem}, repetition {repeat}: answers, rewards and scores differ in number")
        if not np.isfinite(search["scores"]).all() or (search["scores"] < 0).any():
            raise ValueError(f"problem {problem}, repetition {repeat}: a score is not a finite number >= 0")
        found[problem][repeat] = search
    return {problem: [runs[r] for r in sorted(runs)] for problem, runs in found.items()}


def _score_problem(searches: Sequence[Mapping[str, Any]]) -> dict[str, list[Floats]]:
    """The scores of one problem at every pooled number of repetitions: metric -> [m - 1] -> float64 [windows]."""
    names = {c: k for k, c in enumerate(dict.fromkeys(c for s in searches for c in s["classes"] if c is not None))}
    count, weight = np.zeros((2, len(searches), len(names)))
    right_count, right_weight = np.zeros((2, len(searches), len(names)))
    top = np.full(len(searches), -np.inf)
    ties, right_ties, any_right, mean_right = np.zeros((4, len(searches)))
    for r, search in enumerate(searches):
        rewards = np.array(search["reward"], dtype=np.float64)
        any_right[r], mean_right[r] = rewards.max(initial=0.0), rewards.mean() if len(rewards) else 0.0
        for c, reward, score in zip(search["classes"], rewards, search["scores"], strict=True):
            if c is None:
                continue
            count[r, names[c]] += 1
            right_count[r, names[c]] += reward
            weight[r, names[c]] += score
            right_weight[r, names[c]] += reward * score
        answered = np.array([c is not None for c in search["classes"]], dtype=bool)
        if answered.any():
            top[r] = search["scores"][answered].max()
            at_top = answered & (search["scores"] == top[r])
            ties[r], right_ties[r] = at_top.sum(), rewards[at_top].sum()
    majority = list(pooled_votes(count, right_count))
    total_weight = pooled_sums(weight.sum(-1))
    weighted = zip(pooled_votes(weight, right_weight), majority, total_weight, strict=True)
    return {
        "pass1": [total / m for m, total in enumerate(pooled_sums(mean_right), start=1)],
        "pass": [(total > 0).astype(np.float64) for total in pooled_sums(any_right)],
        "bon": list(pooled_best(top, ties, right_ties)),
        "maj": majority,
        "wmaj": [np.where(total > 0, by_weight, by_count) for by_weight, by_count, total in weighted],
    }


def _costs(searches_by_problem: Sequence[Sequence[Mapping[str, Any]]], m: int) -> dict[str, float | None]:
    """Mean cost of m pooled searches, each problem counting the same; shares over all answers. None: not recorded."""

    def cost(key: str) -> float | None:
        means = [
            np.mean([s[key] for s in runs]) for runs in searches_by_problem if all(s[key] is not None for s in runs)
        ]
        return m * float(np.mean(means)) if len(means) == len(searches_by_problem) else None

    searches = [search for runs in searches_by_problem for search in runs]
    answers = sum(len(search["classes"]) for search in searches) or 1
    cut_off: float | None = None
    if all(search["finish_reasons"] is not None for search in searches):
        cut_off = sum(reason == "length" for search in searches for reason in search["finish_reasons"]) / answers
    return {
        "tokens_generated": cost("tokens_generated"),
        "tokens_scored": cost("tokens_scored"),
        "seconds": cost("dt"),
        "truncated": cut_off,
        "empty": sum(c is None for search in searches for c in search["classes"]) / answers,
    }


def _known(value: ArrayLike) -> float | None:
    number = float(np.asarray(value))
    return None if math.isnan(number) else number


def _budget(row: Mapping[str, Any]) -> str:
    return f"{'?' if row['N'] is None else row['N']:>6} {row['pooled']:>7}"


def _percent(mean: float | None, half: float | None) -> str:
    """`45.8 ±15.2` in 13 columns; either part may be unknown."""
    interval = "-" if half is None else f"±{100 * half:.1f}"
    return f"{'' if mean is None else f'{100 * mean:.1f}':>7}{interval:>6}"


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
