"""The table of a search run: every vote at every pooled number of repetitions, with intervals and costs. No torch."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from eval_lib.intervals import Floats, clustered_interval, or_none, repeat_noise_half_width, variance_warning
from eval_lib.tables import Table, half_width, number, percent, thin
from eval_lib.votes import pooled_best, pooled_sums, pooled_votes

# data_idx -> repeat_idx -> class of each beam's answer, -1 for none, one numbering for a problem: eval_utils.problem_classes
Classes = Mapping[int, Mapping[int, Sequence[int]]]
METRICS = {"pass1": "pass@1", "pass": "pass@k", "bon": "best-of-N", "maj": "majority", "wmaj": "weighted"}
INTERVAL_NOTE = (
    "± is the half-width of the 95 % interval, clustered by problem: it holds for other problems of the same kind."
)
NOISE_NOTE = (
    "Repeat noise only leaves out the variance between problems, and is too narrow for any claim beyond these very "
    "problems. *: fewer than two disjoint groups of repetitions, so the released formula is between problems instead."
)
COST_NOTE = (
    "Tokens and a search's own wall-clock, summed over the pooled repetitions (searches run side by side), mean over "
    "problems; shares of the answers that are length-limited (reached max_length), and without a box."
)

N_COLUMN: dict[str, tuple[Any, ...]] = {"N": (partial(number, form="d"), "N")}
COST_COLUMNS: dict[str, tuple[Any, ...]] = {  # of `budget_table`
    "problems": (str, "problems"),
    "generated": (partial(number, form=",.0f"), "tokens_generated"),
    "scored": (partial(number, form=",.0f"), "tokens_scored"),
    "seconds": (partial(number, form=",.1f"), "seconds"),
    "length-limited": (partial(number, form=".1%"), "truncated"),
    "empty": (partial(number, form=".1%"), "empty"),
}


def pooled_scores(lines: Iterable[Mapping[str, Any]], classes: Classes) -> dict[int, dict[str, list[Floats]]]:
    """By problem (data_idx) and metric (METRICS): entry m - 1 is float64 [windows], the scores at m pooled repetitions.

    lines: the lines of an output file (reward, generated_scores are read). Raises ValueError for two lines of one search,
    and for a score that is not a number >= 0.
    """
    return {i: score_problem(searches) for i, searches in read_searches(lines, classes).items()}


def summarize(
    lines: Iterable[Mapping[str, Any]],
    num_blocks: int | None,
    classes: Classes,
    num_problems: int | None = None,
) -> list[dict[str, Any]]:
    """One row per pooled number of repetitions m = 1 .. R, of problems that have m; see `pooled_scores` for arguments.

    num_blocks: blocks in parallel of one search, None where unknown. num_problems: problems of the run, where lines may
    be missing. A row has N = num_blocks x m, pooled = m, problems, missing (problems without m repetitions); for each
    of METRICS `_m` (mean over problems), `_ci` (half-width of the problem-clustered 95 % interval) and `_ci_repeat`
    (the released repeat-noise-only one, from repeat_groups disjoint groups; where that is 1 it is between problems);
    tokens_generated, tokens_scored, seconds (mean over problems of the sum over the pooled searches); truncated, empty
    (shares of answers); note ('' or what to mind). None: cannot be told.
    """
    searches = read_searches(lines, classes)
    scores = {i: score_problem(runs) for i, runs in searches.items()}
    total = max(num_problems or 0, len(scores))
    repetitions = max((len(runs) for runs in searches.values()), default=0)
    rows = []
    for m in range(1, repetitions + 1):
        problems = [i for i in scores if len(searches[i]) >= m]
        row: dict[str, Any] = {"N": num_blocks and num_blocks * m, "pooled": m, "problems": len(problems)}
        row |= {"missing": total - len(problems)}
        notes = [f"{row['missing']} of {total} problems lack {m} repetition{'s' * (m > 1)}"] if row["missing"] else []
        groups = row["repeat_groups"] = min(len(searches[i]) // m for i in problems)  # for the noise of repetitions
        warnings: dict[str, list[str]] = defaultdict(list)
        for metric in METRICS:
            windows = [scores[i][metric][m - 1] for i in problems]
            means = [float(window.mean()) for window in windows]
            disjoint = np.array([window[: groups * m : m] for window in windows]).T
            mean, half = clustered_interval(means)
            repeat = repeat_noise_half_width(disjoint)
            row |= {f"{metric}_m": float(mean), f"{metric}_ci": or_none(half), f"{metric}_ci_repeat": or_none(repeat)}
            if warning := variance_warning(means):
                warnings[warning].append(METRICS[metric])
        notes += [f"{', '.join(names)}: {warning}" for warning, names in warnings.items()]
        rows.append(row | mean_of_costs([searches[i] for i in problems], m) | {"note": "; ".join(notes)})
    return rows


def budget_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[Any, ...]], notes: Sequence[str] = ()
) -> Table:
    """A table of some rows of `summarize`. columns: head -> (how it is shown, keys of what is shown)."""
    return rows_table(title, rows, N_COLUMN | {"pooled": (str, "pooled")} | dict(columns), notes)


def rows_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[Any, ...]], notes: Sequence[str] = ()
) -> Table:
    """`budget_table` without the columns that say of which budget a row is."""
    cells = [[form(*map(row.__getitem__, keys)) for form, *keys in columns.values()] for row in rows]
    return Table(title, list(columns), cells, notes)


def run_tables(rows: Sequence[Mapping[str, Any]], run: str = "", all_rows: bool = False) -> list[Table]:
    """The rows of `summarize`, thinned unless `all_rows`, as tables: accuracy, the released code's half-widths, costs.

    run: for the titles.
    """
    shown = rows if all_rows else thin(rows)
    of = f": {run}" if run else ""
    accuracy = {words: (percent, f"{metric}_m", f"{metric}_ci") for metric, words in METRICS.items()}
    noise = {words: (repeat_noise, f"{metric}_ci_repeat", "repeat_groups") for metric, words in METRICS.items()}
    return [
        budget_table(
            f"Accuracy, %{of}", shown, accuracy, [INTERVAL_NOTE, *row_notes(shown, run), *left_out(shown, rows, run)]
        ),
        budget_table(f"Half-width from repeat noise only, %, as released{of}", shown, noise, [NOISE_NOTE]),
        budget_table(f"Cost of one problem{of}", shown, COST_COLUMNS, [COST_NOTE]),
    ]


def left_out(shown: Sequence[Any], rows: Sequence[Any], run: str) -> list[str]:
    """A note where rows are not shown."""
    named = f" ({run})" if run else ""
    return [f"{len(shown)} of {len(rows)} budgets are shown{named}."] * (len(shown) < len(rows))


def repeat_noise(half: float | None, groups: int) -> str:
    """With a mark where it is no noise of repetitions: see `repeat_noise_half_width`."""
    return half_width(half) + "*" * (groups == 1 and half is not None)


def row_notes(rows: Sequence[Mapping[str, Any]], run: str) -> list[str]:
    """What to mind of the rows that are shown: each remark once, with the columns and rows that it is about."""
    missing: dict[str, list[int]] = defaultdict(list)
    about: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["missing"]:
            missing[f"{row['missing']} of {row['missing'] + row['problems']} problems lack"].append(row["pooled"])
        for note in row["note"].split("; "):
            names, _, warning = note.partition(": ")
            if warning:
                about[of_rows(warning)][names].append(row["pooled"])
    place = f" ({run})" if run else ""
    lacking = [f"{who} {_listed(pooled)} repetition{'s' * (pooled[-1] > 1)}" for who, pooled in missing.items()]
    notes = [f"Not yet there{place}: {'; '.join(lacking)}."] * bool(lacking)
    for warning, where in about.items():
        places = "; ".join(f"{names} at {_listed(pooled)} pooled" for names, pooled in where.items())
        notes.append(f"{places}{place}: {warning}.")
    return notes


def of_rows(warning: str) -> str:
    """A `variance_warning` of several rows: how few carry the variance differs, and is not worth a line each."""
    return re.sub(r"^\d+ of", "few of", warning)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def read_searches(lines: Iterable[Mapping[str, Any]], classes: Classes) -> dict[int, list[dict[str, Any]]]:
    """By problem, in order, its searches in the order of repeat_idx, without the bulk of a line."""
    found: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        problem, repeat = line["data_idx"], line["repeat_idx"]
        if repeat in found[problem]:
            raise ValueError(f"problem {problem} has two lines of repetition {repeat}")
        kept = ("reward", "dt", "tokens_generated", "tokens_scored", "finish_reasons")
        search: dict[str, Any] = {key: line.get(key) for key in kept}
        search |= {"classes": classes[problem][repeat], "scores": np.array(line["generated_scores"], dtype=np.float64)}
        if not len(search["classes"]) == len(search["reward"]) == len(search["scores"]):
            raise ValueError(f"problem {problem}, repetition {repeat}: answers, rewards and scores differ in number")
        if not np.isfinite(search["scores"]).all() or (search["scores"] < 0).any():
            raise ValueError(f"problem {problem}, repetition {repeat}: a score is not a finite number >= 0")
        found[problem][repeat] = search
    return {problem: [runs[r] for r in sorted(runs)] for problem, runs in sorted(found.items())}


def score_problem(searches: Sequence[Mapping[str, Any]]) -> dict[str, list[Floats]]:
    """The scores of one problem at every pooled number of repetitions: metric -> [m - 1] -> float64 [windows]."""
    names = {c: k for k, c in enumerate(dict.fromkeys(c for s in searches for c in s["classes"] if c >= 0))}
    count, weight, right_count, right_weight = np.zeros((4, len(searches), len(names)))
    top, ties, right_ties, any_right, mean_right = np.zeros((5, len(searches)))
    for r, search in enumerate(searches):
        rewards = np.array(search["reward"], dtype=np.float64)
        any_right[r], mean_right[r] = rewards.max(initial=0.0), rewards.mean() if len(rewards) else 0.0
        for c, reward, score in zip(search["classes"], rewards, search["scores"], strict=True):
            if c >= 0:
                count[r, names[c]] += 1
                right_count[r, names[c]] += reward
                weight[r, names[c]] += score
                right_weight[r, names[c]] += reward * score
        answered = np.array(search["classes"]) >= 0
        top[r] = search["scores"][answered].max(initial=-np.inf)
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


def mean_of_costs(
    searches_by_problem: Sequence[Sequence[Mapping[str, Any]]], m: int | None = None
) -> dict[str, float | None]:
    """Mean cost of m pooled searches (None: of each problem all), each problem counting the same; shares over all
    answers. None: not recorded."""
    searches = [search for runs in searches_by_problem for search in runs]
    answers = sum(len(search["classes"]) for search in searches) or 1

    def known(key: str) -> bool:
        return all(search[key] is not None for search in searches)

    def cost(key: str) -> float | None:
        if not known(key):
            return None
        means = [np.mean([search[key] for search in runs]) * (1 if m else len(runs)) for runs in searches_by_problem]
        return (m or 1) * float(np.mean(means))

    reasons = [reason for search in searches for reason in search["finish_reasons"] or ()]
    return {
        "tokens_generated": cost("tokens_generated"),
        "tokens_scored": cost("tokens_scored"),
        "seconds": cost("dt"),
        "truncated": reasons.count("length") / answers if known("finish_reasons") else None,
        "empty": sum(c < 0 for search in searches for c in search["classes"]) / answers,
    }
