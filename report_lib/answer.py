"""What was asked, answered first: which run is better, by how much and how surely; or how good one run is.

What a sentence is about is chosen before any figure is seen: each run by `vote_of`, at the largest budget that both
reach; a single run at all the repetitions that every problem has.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval_lib.intervals import paired_difference, variance_warning
from eval_lib.stopped import saved_words
from eval_lib.tables import short
from report_lib.analysis import Analysis
from report_lib.compare import BASES, chosen_rows, difference_warning, vote_of
from report_lib.replay import WhatIf
from report_lib.value import MIN_CLUSTERS, mark_note, no_evidence, value_sentence

VOTES = {"wmaj": "the weighted vote", "maj": "the majority vote", "pass1": "pass@1"}
LEVEL = 0.05  # where the p-value is smaller, the 95 % interval leaves out 0


@dataclass
class Answer:
    """One question of the first screen. chosen: what it is about; mind: warnings; plot: its file stem, if it has one."""

    title: str
    sentences: list[str]
    chosen: str = ""
    mind: list[str] = field(default_factory=list)
    plot: str | None = None


def first_screen(analyses: Sequence[Analysis], comparisons: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Of each comparison, or of a single run; of a what-if; then of the values."""
    answers = list(map(comparison_answer, comparisons)) or [run_answer(analyses[0])]
    if len(comparisons) > 1:
        answers[0].mind.append(f"No p-value is corrected for there being {len(comparisons)} comparisons.")
    for number, answer in enumerate(answers, start=1):
        if answer.plot and len(comparisons) > 1:
            answer.plot += f"_{number}"
    asked: list[Collection[str]] = [(part["one"], part["other"]) for part in comparisons]
    asked = asked or [[analyses[0].run.name]]
    for analysis in filter(lambda analysis: no_evidence(analysis.values), analyses):
        for answer, names in zip(answers, asked, strict=True):
            answer.mind += [mark_note(analysis.run.name)] * (analysis.run.name in names)
    what_ifs = [what_if_answer(analysis, analysis.what_if) for analysis in analyses if analysis.what_if]
    return [*answers, *what_ifs, values_answer(analyses)]


# ---------------------------------------------------------------------------------------------------------------------
# Two runs


def comparison_answer(comparison: Mapping[str, Any]) -> Answer:
    """One sentence for equal N, equal tokens and equal FLOPs each, or why there is none."""
    names = comparison["one"], comparison["other"]
    last = {row["basis"]: row for row in chosen_rows(comparison)}.values()  # budgets ascend: the largest stays
    one, other = (VOTES[metric] for metric in comparison["chosen"])
    votes = f"{one} of both" if one == other else f"{one} of {names[0]}, {other} of {names[1]}"
    so_far = ", so far," if comparison["unfinished"] else ""
    problems = f"; paired over {comparison['problems']} problems, intervals clustered by problem"
    return Answer(
        f"{names[0]} against {names[1]}",
        [difference_sentence(*names, row, so_far) for row in last]
        + [f"Not compared: {missing}." for missing in comparison["missing"]],
        f"Chosen beforehand: {votes}, at the largest budget that both reach{problems}." if last else "",
        remarks([*comparison["unfinished"], *(row["warning"] for row in last)]),
        "difference" if last else None,
    )


def difference_sentence(one: str, other: str, row: Mapping[str, Any], so_far: str = "") -> str:
    """Which is better at this budget, by how much, with interval and p-value, as far as the figures say so.

    so_far: words for runs that are not finished.
    """
    amount = f"{row['budget']:.0f}" if row["basis"] == "N" else short(row["budget"])
    at = f"At equal {BASES[row['basis']]} ({amount}){so_far}"
    scores = f"{share(row['one'])} against {share(row['other'])}"
    if no_width(row) and abs(row["difference"]) < 1e-9:
        return f"{at} both score {share(row['one'])}, the same on every problem."
    if not shown(row):
        difference = f"{one} minus {other} {points(row['difference'])}"
        return f"{at} neither is shown to be better: {scores}, {difference}{in_brackets(surety(row))}."
    if row["difference"] < 0:
        one, other, scores = other, one, f"{share(row['other'])} against {share(row['one'])}"
    by = points(abs(row["difference"]))
    surely = in_brackets(surety(row, row["difference"] < 0))
    return f"{at} {one} is better than {other} by {by}: {scores}{surely}."


def shown(row: Mapping[str, Any]) -> bool:
    """Is there a difference? Only where the t-test says so, its interval can be trusted, and trying all signs agrees.

    Where all problems differ by the same there is no interval to trust, and the signs alone decide.
    """
    if row["p_value"] is None or (row["warning"] and not no_width(row)):
        return False
    return row["p_value"] < LEVEL and (row["p_exact"] is None or row["p_exact"] < LEVEL)


def no_width(row: Mapping[str, Any]) -> bool:
    """Is its interval a point? Then it says nothing, and neither does the t-test's p-value."""
    return row["ci"] is not None and row["ci"] < 1e-9


def surety(row: Mapping[str, Any], turned: bool = False) -> str:
    """Interval, in points, and p-value, also the exact one where that alone is too large; "" where there is none.

    turned: of the other difference.
    """
    if row["ci"] is None or no_width(row):
        return ""
    middle = -row["difference"] if turned else row["difference"]
    low, high = 100 * (middle - row["ci"]), 100 * (middle + row["ci"])
    p_value = "p < 0.001" if row["p_value"] < 0.001 else f"p = {row['p_value']:.3f}"
    if row["p_exact"] is not None and row["p_value"] < LEVEL <= row["p_exact"]:
        p_value += f" by the t-test, {row['p_exact']:.3f} by trying all signs"
    return f"95 % interval {signed(low)} to {signed(high)}, {p_value}"


def in_brackets(words: str) -> str:
    return f" ({words})" if words else ""


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def points(difference: float) -> str:
    return f"{signed(100 * difference)} points"


def signed(value: float) -> str:
    """One decimal, never -0.0."""
    return f"{round(value, 1) + 0.0:.1f}"


def remarks(warnings: Iterable[str | None]) -> list[str]:
    """Each once, as sentences."""
    return [f"{sentence(warning)}." for warning in dict.fromkeys(warnings) if warning]


def sentence(words: str) -> str:
    return words[0].upper() + words[1:]


# ---------------------------------------------------------------------------------------------------------------------
# One run, and its values


def run_answer(analysis: Analysis) -> Answer:
    """What its vote reaches, against the other vote and against one answer alone."""
    run, vote = analysis.run, vote_of(analysis.run)
    if not analysis.scores:  # of a stopped run: repetitions are counted in their order
        return Answer(run.name, ["Nothing can be said yet: no problem has its first repetition."])
    most = min(len(metrics[vote]) for metrics in analysis.scores.values())
    row = analysis.rows[most - 1]
    known = [m for m in VOTES if all(len(metrics[m]) >= most for metrics in analysis.scores.values())]
    scores = {m: {i: metrics[m][most - 1] for i, metrics in analysis.scores.items()} for m in known}
    others = [metric for metric in known if metric != vote]
    budget = f"N = {row['N']}, " if row["N"] else ""
    pooled = f"{budget}{most} repetition{'s' * (most > 1)} pooled"
    if run.stopping:
        pooled = f"{budget}at most {most} repetition{'s' * (most > 1)}, {row['repetitions_m']:.1f} on average"
    reached = f"{share(row[f'{vote}_m'])} of the problems{interval_words(row[f'{vote}_m'], row[f'{vote}_ci'])}"
    against = "; ".join(against_words(scores[vote], scores[metric], VOTES[metric]) for metric in others)
    warnings = [run.unfinished, variance_warning(list(scores[vote].values()))]
    if row["problems"] >= MIN_CLUSTERS:  # else one warning says it for all
        doubts = ((VOTES[metric], difference_warning(scores[vote], scores[metric])) for metric in others)
        warnings += [f"against {other}, {warning}" for other, warning in doubts if warning]
    over = "by which problems are stopped" if run.stopping else "over all repetitions that every problem has"
    said = f"{sentence(VOTES[vote])} ({pooled}) is{' so far' * run.partial} right on {reached}{': ' * bool(against)}{against}."
    return Answer(
        run.name,
        [said, *(saved_words(analysis.outcome) if analysis.outcome else [])],
        f"Chosen beforehand: {VOTES[vote]}, {over}; {row['problems']} problem{'s' * (row['problems'] > 1)}, intervals clustered "
        "by problem.",
        remarks(warnings),
        "accuracy_n" if row["N"] else None,
    )


def interval_words(mean: float, half: float | None) -> str:
    """Of a share, so within 0 and 100."""
    if half is None or half < 1e-9:
        return ""
    return f" (95 % interval {100 * max(0.0, mean - half):.1f} to {100 * min(1.0, mean + half):.1f})"


def against_words(first: Mapping[int, float], second: Mapping[int, float], other: str) -> str:
    """How far a vote is above or below another metric of the same run. Arguments: score by problem; the other's name."""
    found = paired_difference(first, second) | {"warning": difference_warning(first, second)}
    by = f"{points(abs(found['difference']))} {'above' if found['difference'] > 0 else 'below'}"
    mean = share(sum(second.values()) / len(second))
    if no_width(found) and abs(found["difference"]) < 1e-9:
        return f"the same as {other} ({mean})"
    surely = surety(found, found["difference"] < 0)
    doubt = "" if shown(found) else "; no difference is shown"
    return f"{by if found['difference'] else 'the same as'} {other} ({mean}{', ' * bool(surely)}{surely}{doubt})"


def what_if_answer(analysis: Analysis, found: WhatIf) -> Answer:
    """What the policies chosen beforehand would have saved; without any, `sure` of the run's vote, whose answers cannot
    differ from those of all repetitions."""
    vote = {"maj": "majority", "wmaj": "weighted"}[vote_of(analysis.run)]
    rows = found.chosen or [found.row(f"{vote}:sure")]
    others = f"{len(found.rows) - len(found.chosen)} policies of the table and the plot are exploratory"
    looks = "the best of many looks at one set of data looks better than it is, and is no test"
    if found.chosen:
        chosen = (
            f"Chosen beforehand (--policy): {', '.join(row['policy'] for row in rows)}. The other {others}: {looks}."
        )
    else:
        chosen = f"None was chosen beforehand (--policy). All {others}: {looks}."
    return Answer(
        f"What if {analysis.run.name} had been stopped earlier?",
        [policy_sentence(row, found) for row in rows],
        chosen,
        remarks(
            f"for {row['policy']}, {row['against_all']['warning']}"
            for row in found.chosen
            if row["against_all"]["warning"]
        ),
        "what_if",
    )


def policy_sentence(row: Mapping[str, Any], found: WhatIf) -> str:
    """What a policy costs and answers, against its vote of all repetitions."""
    whole = found.row(row["vote"])
    everywhere = "on every problem" if row["same_answer"] == 1 else f"on {share(row['same_answer'])} of the problems"
    tokens = "" if row["saved"] is None else f", with {100 * row['saved']:.0f} % fewer tokens generated"
    said = (
        f"{row['policy']} answers as all {found.repetitions} repetitions do {everywhere}{tokens} "
        f"({row['repetitions']:.1f} repetitions): {share(row['accuracy'])} right against {share(whole['accuracy'])}"
    )
    if row["false_stops"]:
        said += f"; stopped with another answer on {share(row['false_stops'])}"
    against = row.get("against_all")
    if against and row["same_answer"] < 1:
        doubt = "" if shown(against) else "; no difference is shown"
        said += f"; {points(against['difference'])}{in_brackets(surety(against))}{doubt}"
    return f"{said}."


def values_answer(analyses: Sequence[Analysis]) -> Answer:
    """What the values of runs that did not select by them are worth; else why nothing certain can be said."""
    said = [value_sentence(analysis.run.name, analysis.values) for analysis in analyses]
    sentences = [sentence for sentence in said if sentence]
    if not sentences:
        sentences = [
            "Nothing certain: these values chose, or may have chosen, what is seen here. Report a bon or beam1 run."
        ]
    return Answer("Is the value model any good here?", sentences)
