"""Two runs on the same problems, compared at the same N, the same tokens generated, the same FLOPs.

Scores are paired by problem and the interval is clustered by problem (`paired_difference`). Costs grow in proportion to
the pooled repetitions m, so "the same tokens" is a fractional m of each run; a problem's score there is interpolated
linearly between the whole numbers around it. Budgets that one run does not reach are not extrapolated to.

A run whose problems were stopped early has no score at a given m that another run's could be compared with, but it has
tokens: what its problems' first min(m, T) repetitions took, and in proportion what was spent on searches that do not count.
So it is compared at equal tokens only, by the vote that stopping looked at.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common_lib.cli import UserError
from eval_lib.intervals import Floats, paired_difference, variance_warning
from eval_lib.summary import METRICS
from report_lib.analysis import Analysis
from report_lib.data import RunRecord

MAX_BUDGETS = 5  # rows per basis and metric
BASES = {"N": "N", "tokens": "tokens", "flops": "FLOPs"}
Budget = tuple[float, float, float]  # how much, repetitions pooled in the one run, and in the other


def compare(one: Analysis, other: Analysis) -> dict[str, Any]:
    """All rows of a comparison (first minus second), and what it rests on. Raises UserError without common problems."""
    # Of a stopped run in progress a problem may have later repetitions only, which do not count yet.
    pairs = [(a, b) for a, b in common_problems(one.run, other.run) if a in one.scores and b in other.scores]
    # repetitions that every common problem has
    most = tuple(
        min((len(side.scores[pair[k]][vote_of(side.run)]) for pair in pairs), default=0)
        for k, side in enumerate((one, other))
    )
    stopped = one.run.stopping or other.run.stopping
    budgets, missing = stopped_budgets(one, other, pairs, most) if stopped else shared_budgets(one, other, pairs, most)
    rows = []
    for basis, (amount, pooled_one, pooled_other) in budgets:
        for metric_one, metric_other in metric_pairs(one.run, other.run):
            first = {a: score_at(one.scores[a][metric_one], pooled_one) for a, _ in pairs}
            second = {a: score_at(other.scores[b][metric_other], pooled_other) for a, b in pairs}
            row = {
                "basis": basis,
                "budget": amount,
                "pooled_one": pooled_one,
                "pooled_other": pooled_other,
                "metric_one": metric_one,
                "metric_other": metric_other,
                "one": float(np.mean(list(first.values()))),
                "other": float(np.mean(list(second.values()))),
            }
            rows.append(row | paired_difference(first, second) | {"warning": difference_warning(first, second)})
    note = comparison_note(one.run, other.run, pairs)
    head = {"one": one.run.name, "other": other.run.name, "chosen": [vote_of(one.run), vote_of(other.run)]}
    unfinished = [words for run in (one.run, other.run) if (words := run.unfinished)]
    return head | {"problems": len(pairs), "note": note, "unfinished": unfinished, "missing": missing, "rows": rows}


def chosen_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that the first screen is about: those of the votes chosen beforehand."""
    return [row for row in comparison["rows"] if [row["metric_one"], row["metric_other"]] == comparison["chosen"]]


def difference_warning(first: Mapping[int, float], second: Mapping[int, float]) -> str | None:
    """A sentence where the interval of a difference deserves little trust, else None. Arguments: score by problem."""
    differences = [score - second[i] for i, score in first.items()]
    if len(differences) >= 5 and np.ptp(differences) < 1e-9:  # there is no variance that a few could carry
        alike = abs(differences[0]) < 1e-9
        return None if alike else f"all {len(differences)} problems differ by the same, so the interval has no width"
    return variance_warning(differences)


def shared_budgets(
    one: Analysis, other: Analysis, pairs: Sequence[tuple[int, int]], most: tuple[int, ...]
) -> tuple[list[tuple[str, Budget]], list[str]]:
    """(basis, budget) of all that both runs reach; and in words why a basis has none."""
    budgets = [("N", budget) for budget in equal_n_budgets(one.run, other.run, most)]
    missing = []
    if not budgets:
        known = one.run.num_blocks and other.run.num_blocks
        missing.append("the runs have no N in common" if known else "N is not known of both runs")
    for basis in ("tokens", "flops"):
        words = BASES[basis]
        costs = [analysis.costs[basis] or {} for analysis in (one, other)]
        if not all(costs):
            missing.append(f"{words} are not known of both runs")
            continue
        first, second = (float(np.mean([cost[pair[i]] for pair in pairs])) for i, cost in enumerate(costs))
        found = equal_cost_budgets(first, second, most)
        budgets += [(basis, budget) for budget in found]
        if not found:
            reach = [f"{cost:.3g} to {cost * pooled:.3g}" for cost, pooled in zip((first, second), most, strict=True)]
            missing.append(f"no budget of {words} that both runs reach: {reach[0]} against {reach[1]} a problem")
    return budgets, missing


def stopped_budgets(
    one: Analysis, other: Analysis, pairs: Sequence[tuple[int, int]], most: tuple[int, ...]
) -> tuple[list[tuple[str, Budget]], list[str]]:
    """`shared_budgets` where a run stopped problems early: of tokens alone."""
    names = " and ".join(side.run.name for side in (one, other) if side.run.stopping)
    missing = [f"equal N and FLOPs: {names} stopped problems early, and such runs are compared at equal tokens only"]
    if not pairs:
        return [], [*missing, "no problem has its first repetition in both runs yet"]
    sides = zip((one, other), zip(*pairs, strict=True), most, strict=True)
    known = [tokens_by_pooled(side, problems, reach) for side, problems, reach in sides]
    curves = [curve for curve in known if curve is not None]
    if len(curves) < 2:
        return [], [*missing, "tokens are not known of both runs"]
    first, second = curves
    budgets = spread(max(first[0], second[0]), min(first[-1], second[-1]))
    if not budgets:
        reach = " against ".join(f"{curve[0]:.3g} to {curve[-1]:.3g}" for curve in curves)
        missing.append(f"no budget of tokens that both runs reach: {reach} a problem")
    pooled = [[float(np.interp(budget, curve, range(1, len(curve) + 1))) for curve in curves] for budget in budgets]
    return [("tokens", (budget, a, b)) for budget, (a, b) in zip(budgets, pooled, strict=True)], missing


def tokens_by_pooled(side: Analysis, problems: Sequence[int], most: int) -> Floats | None:
    """Mean over problems of the tokens that m = 1 .. most pooled repetitions took; None where they are not known."""
    record, means = side.run.stopping, side.costs["tokens"]
    if means is None:
        return None
    if record is None:
        return float(np.mean([means[i] for i in problems])) * np.arange(1.0, most + 1)
    rows = []
    for i in problems:
        sums = np.cumsum([line["tokens_generated"] for line in record.first(side.run.by_problem[i])])
        used = (record.used(i, len(sums), m) for m in range(1, most + 1))
        rows.append([sums[n - 1] for n in used if n])
    return np.mean(rows, axis=0) * (1 + uncounted_share(side.run))


def uncounted_share(run: RunRecord) -> float:
    """Tokens spent on searches that do not count, by those that were counted."""
    counted = sum(line["tokens_generated"] for line in run.lines)
    return run.stopping.uncounted.get("generated", 0) / counted if run.stopping and counted else 0.0


def common_problems(one: RunRecord, other: RunRecord) -> list[tuple[int, int]]:
    """(data_idx in one, data_idx in other) of problems with the same text, white space apart. UserError: none is."""
    places: dict[str, list[int]] = {}
    for data_idx, lines in other.by_problem.items():
        places.setdefault(" ".join(lines[0]["problem"].split()), []).append(data_idx)
    pairs = []
    for data_idx, lines in one.by_problem.items():
        if same := places.get(" ".join(lines[0]["problem"].split())):
            pairs.append((data_idx, same.pop(0)))
    if not pairs:
        raise UserError(f"{one.path} and {other.path} have no problem in common; report them one by one")
    return pairs


def comparison_note(one: RunRecord, other: RunRecord, pairs: Sequence[tuple[int, int]]) -> str:
    """Which problems are compared, and whether the reference answers agree."""
    note = f"{one.name} against {other.name}: paired over {len(pairs)} common problems, clustered by problem"
    if left_out := len(one.by_problem) + len(other.by_problem) - 2 * len(pairs):
        note += f"; {left_out} that only one of them has are left out"
    if differing := sum(one.by_problem[a][0]["gt_answer"] != other.by_problem[b][0]["gt_answer"] for a, b in pairs):
        note += f"; WARNING: {differing} of them have different reference answers in the two runs"
    for run in (one, other):
        if run.stopping and (share := uncounted_share(run)):
            note += f"; tokens of {run.name} include {share:.1%} more for searches that do not count"
    return note


def vote_of(run: RunRecord) -> str:
    """The metric that a run is judged by, chosen before any figure is seen: a search's value-weighted vote, and the
    majority vote of `bon`, the baseline without values; of a run that stopped problems early, the vote that decided."""
    if run.stopping:
        return run.stopping.metric
    return "maj" if run.search_type == "bon" else "wmaj"


def metric_pairs(one: RunRecord, other: RunRecord) -> list[tuple[str, str]]:
    """Each metric with itself; where one run is `bon`, also the other's weighted vote with its plain majority vote. Of a
    run that stopped problems early only the vote that decided, with the other's own and with the same one."""
    first, second = vote_of(one), vote_of(other)
    if one.stopping or other.stopping:
        same = [first] * (other.stopping is None) + [second] * (one.stopping is None)
        return list(dict.fromkeys([(first, second), *((metric, metric) for metric in same)]))
    return [(metric, metric) for metric in METRICS] + [(first, second)] * (first != second)


def score_at(scores: Sequence[float], pooled: float) -> float:
    """Score at a fractional number of pooled repetitions, 1 <= pooled <= len(scores), linear between whole numbers."""
    return float(np.interp(pooled, range(1, len(scores) + 1), scores))


def spread(low: float, high: float) -> list[float]:
    """At most MAX_BUDGETS budgets from low to high in equal ratios, about doubling."""
    if low > high * (1 + 1e-9):
        return []
    steps = min(MAX_BUDGETS - 1, max(1, round(math.log2(high / low)))) if high > low else 0
    return [low * (high / low) ** (i / max(1, steps)) for i in range(steps + 1)]


def equal_n_budgets(one: RunRecord, other: RunRecord, most: tuple[int, ...]) -> list[Budget]:
    """The N that both runs have, thinned to MAX_BUDGETS."""
    if not one.num_blocks or not other.num_blocks:
        return []
    first = {one.num_blocks * m: m for m in range(1, most[0] + 1)}
    second = {other.num_blocks * m: m for m in range(1, most[1] + 1)}
    both = sorted(first.keys() & second.keys())
    targets = spread(both[0], both[-1]) if both else []
    wanted = {min(both, key=lambda n: abs(math.log(n / target))) for target in targets}
    return [(n, first[n], second[n]) for n in sorted(wanted)]


def equal_cost_budgets(one: float, other: float, most: tuple[int, ...]) -> list[Budget]:
    """Costs that both runs reach, where a repetition costs `one` and `other`."""
    budgets = spread(max(one, other), min(one * most[0], other * most[1]))
    return [(budget, min(budget / one, most[0]), min(budget / other, most[1])) for budget in budgets]
