"""What if a finished run had been stopped earlier, or voted otherwise? Policies replayed on it, without models.

A run of `--stop none` has every repetition, so that what any policy would have seen, spent and answered can be read off
it. Policies that are tried on one set of data and then picked by their result look better than they are; so only those
named beforehand (--policy) are set against all repetitions with an interval and a p-value.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common_lib.cli import UserError
from eval_lib.calibration import cross_fitted_log_odds
from eval_lib.grading import Grader
from eval_lib.intervals import clustered_interval, or_none, paired_difference, variance_warning
from eval_lib.summary import of_rows
from eval_lib.tables import Table, number, percent, short
from report_lib.analysis import Analysis
from report_lib.compare import difference_warning
from report_lib.data import RunRecord
from report_lib.policies import GUARANTEED, VOTES, Policy, all_policies, check_policies, settled
from report_lib.prefix_votes import Answers
from report_lib.replay import COSTS, NUM_ORDERS, RecordedProblem, Replayed, WhatIf, replay
from report_lib.value import MARK, mark_note, no_evidence

TOKENS = {"generated": "tokens_generated", "scored": "tokens_scored"}  # cost -> key of a line
NOTE = (
    f"Means over {NUM_ORDERS} random orders of the recorded repetitions. Generated: tokens of a problem (table.json has those "
    "scored); saved: share of those of all repetitions. Same: the winning class of all repetitions. False: stopped early, "
    "with another winning class than the last repetition allowed would have given. *: no policy tried costs less, or as "
    "much, and is right more often."
)
GUARANTEE_NOTE = (
    "sure: cannot differ from all repetitions. certified: the leader is ahead in expectation, at error alpha a problem. beta, "
    "esc: no guarantee."
)
EXPLORED_NOTE = (
    "Exploratory: not named beforehand by --policy. The best of many looks at one set of data looks better than it is: a "
    "choice made here is to be tested on other problems."
)


def check_what_if(runs: Sequence[RunRecord], policies: Sequence[Policy]) -> None:
    """Raises UserError, one line, for what cannot be replayed."""
    run = runs[0]
    if len(runs) > 1:
        raise UserError(f"--what_if replays one run, and {len(runs)} are given; report them one by one")
    if run.stopping:
        raise UserError(
            f"--what_if needs all repetitions, a run of --stop none; problems of {run.path} were stopped early "
            f"({run.stopping.words})"
        )
    if run.partial:
        raise UserError(f"--what_if needs a finished run; {run.path} has {len(run.lines)} of {run.planned} searches")
    counts = {len(lines) for lines in run.by_problem.values()}
    if len(counts) > 1 or counts == {1}:
        words = "1 of each problem" if counts == {1} else f"{min(counts)} to {max(counts)} of the problems"
        raise UserError(f"--what_if needs at least 2 repetitions, as many of each problem; {run.path} has {words}")
    check_policies(policies, counts.pop())


def what_if(analysis: Analysis, policies: Sequence[Policy], grader: Grader) -> WhatIf:
    """Replay `policies` (chosen beforehand) and those that are explored. analysis: of a run that `check_what_if` passes."""
    repetitions = len(next(iter(analysis.run.by_problem.values())))
    every = all_policies(policies, repetitions)
    problems = list(recorded_problems(analysis, grader))
    replayed = replay(every, problems)
    chosen = {settled(policy, repetitions).text for policy in policies}
    rows = policy_rows(every, replayed, chosen, [problem.data_idx for problem in problems])
    basis = "tokens_generated" if rows[0]["tokens_generated"] is not None else "repetitions"
    mark_frontier(rows, basis)
    return WhatIf(rows, repetitions, basis)


# ---------------------------------------------------------------------------------------------------------------------
# The run as a replay sees it


def recorded_problems(analysis: Analysis, grader: Grader) -> Iterator[RecordedProblem]:
    run = analysis.run
    beams = max(len(line["reward"]) for line in run.lines)
    answered = [(line, b) for line in run.lines for b, answer in enumerate(line["processed_answer"]) if answer]
    odds = cross_fitted_log_odds(
        [line["reward"][b] for line, b in answered],
        [line["generated_scores"][b] for line, b in answered],
        [line["data_idx"] for line, _ in answered],
    )
    odds_of = {(line["data_idx"], line["repeat_idx"], b): x for (line, b), x in zip(answered, odds, strict=True)}
    for data_idx, lines in run.by_problem.items():
        classes = [analysis.classes[data_idx][line["repeat_idx"]] for line in lines]
        kinds, equal = answer_kinds([line["processed_answer"] for line in lines], classes, grader)
        table = np.full((3, len(lines), beams), np.nan)
        for r, line in enumerate(lines):
            for b in range(len(line["reward"])):
                key = data_idx, line["repeat_idx"], b
                table[:, r, b] = line["generated_scores"][b], odds_of.get(key, 0.0), line["reward"][b]
        padded = np.array([[*row, *[-1] * (beams - len(row))] for row in kinds])
        values, log_odds, right = np.nan_to_num(table)
        costs = [[line.get(TOKENS[cost], np.nan) for line in lines] for cost in TOKENS]
        flops = analysis.flops_by_problem.get(data_idx) if analysis.flops else None
        costs.append([sum(search.values()) for search in flops] if flops else [np.nan] * len(lines))
        answers = Answers(padded, equal, values, log_odds, right > 0)
        yield RecordedProblem(data_idx, answers, np.array(costs, dtype=np.float64))


def answer_kinds(
    answers: Sequence[Sequence[str]], classes: Sequence[Sequence[int]], grader: Grader
) -> tuple[list[list[int]], NDArray[np.bool_]]:
    """The kind of each answer (-1: empty), and which kinds are equal, bool [K, K]: see report_lib/prefix_votes.py.

    Answers of one class are one kind where each is equal to each, and a kind each where some are only by way of others.
    classes: of `Grader.answer_classes`, asked of all answers.
    """
    members: dict[int, list[str]] = {}
    for words, numbers in zip(answers, classes, strict=True):
        for word, class_ in zip(words, numbers, strict=True):
            if class_ >= 0 and word not in members.setdefault(class_, []):
                members[class_].append(word)
    kind_of: dict[str, int] = {}
    blocks: list[NDArray[np.bool_]] = []
    for words in members.values():
        same = np.eye(len(words), dtype=bool)
        if len(words) > 2:  # two answers are in one class only because they are equal
            for i, word in enumerate(words):
                for j in range(i):
                    same[i, j] = same[j, i] = len(set(grader.answer_classes([word, words[j]]))) == 1
        whole = len(words) <= 2 or bool(same.all())
        first = sum(len(block) for block in blocks)
        kind_of |= {word: first + (0 if whole else k) for k, word in enumerate(words)}
        blocks.append(np.ones((1, 1), bool) if whole else same)
    equal = np.zeros((sum(len(block) for block in blocks),) * 2, bool)
    at = 0
    for block in blocks:
        equal[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    kinds = [
        [kind_of[word] if class_ >= 0 else -1 for word, class_ in zip(words, numbers, strict=True)]
        for words, numbers in zip(answers, classes, strict=True)
    ]
    return kinds, equal


# ---------------------------------------------------------------------------------------------------------------------
# Rows and table


def policy_rows(
    policies: Sequence[Policy], replayed: Replayed, chosen: set[str], problems: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a policy: costs and figures are means over problems of the mean over random orders; `recorded`: of the
    recorded order, sums over problems (accuracy: mean). Chosen ones have `against_all`: of `paired_difference` with the
    same vote of all repetitions."""
    means = {name: values.mean(-1) for name, values in replayed.mean.items()}
    sums = {name: values.sum(-1) for name, values in replayed.recorded.items()}
    full = {policy.vote: i for i, policy in enumerate(policies) if policy == Policy(policy.vote)}
    rows = []
    for i, policy in enumerate(policies):
        right = replayed.mean["right"][i]
        accuracy, half = clustered_interval(right)
        spent = means["generated"][i], means["generated"][full[policy.vote]]
        row: dict[str, Any] = {
            "policy": policy.text,
            "vote": policy.vote,
            "stop": policy.stop,
            "parameter": policy.parameter,
            "most": policy.most,
            "chosen": policy.text in chosen,
            "guaranteed": policy.stop in GUARANTEED,
            "repetitions": float(means["repetitions"][i]),
            "tokens_generated": or_none(spent[0]),
            "tokens_scored": or_none(means["scored"][i]),
            "flops": or_none(means["flops"][i]),
            "saved": or_none(1 - spent[0] / spent[1]),
            "accuracy": float(accuracy),
            "ci": or_none(half),
            "same_answer": float(means["same"][i]),
            "stopped_early": None if policy.stop == "none" else float(means["early"][i]),
            "false_stops": None if policy.stop == "none" else float(means["false"][i]),
            "warning": variance_warning(right),
            "recorded": {name: or_none(sums[name][i]) for name in ("repetitions", *COSTS)}
            | {"accuracy": float(replayed.recorded["right"][i].mean())},
        }
        if row["chosen"]:
            one = dict(zip(problems, right.tolist(), strict=True))
            other = dict(zip(problems, replayed.mean["right"][full[policy.vote]].tolist(), strict=True))
            row["against_all"] = paired_difference(one, other) | {"warning": difference_warning(one, other)}
        rows.append(row)
    return rows


def mark_frontier(rows: list[dict[str, Any]], basis: str) -> None:
    """Sets `frontier`: is no other at most as costly and right more often, or cheaper and right as often?"""
    best = -1.0
    for row in sorted(rows, key=lambda row: (row[basis], -row["accuracy"])):
        row["frontier"] = row["accuracy"] > best + 1e-12
        best = max(best, row["accuracy"])


def what_if_tables(analysis: Analysis, all_rows: bool = False) -> list[Table]:
    """The policies chosen beforehand; and of all others the stops, each vote of all repetitions, and the frontier, or every
    row. None without a what-if."""
    found = analysis.what_if
    if found is None:
        return []
    rest = [row for row in found.rows if not row["chosen"]]
    shown = [
        row for row in rest if all_rows or row["frontier"] or row["stop"] != "none" or row["most"] is None
    ]  # fmt: skip
    marked = no_evidence(analysis.values)
    of = f"{analysis.run.name}, {found.repetitions} repetitions"
    looks = [EXPLORED_NOTE]
    if len(shown) < len(rest):
        looks.append(
            f"{len(shown)} of {len(rest)} exploratory policies are shown; --all_rows shows all, so does what_if.csv."
        )
    parts = [
        (f"What if, chosen beforehand: {of}", found.chosen, []),
        (f"What if, exploratory: {of}", shown, looks),
    ]
    columns = ["policy", "repetitions", "generated", "FLOPs", "saved", "accuracy", "same", "false"]
    notes = [NOTE, GUARANTEE_NOTE, *[mark_note(analysis.run.name)] * marked]
    return [
        Table(
            title,
            columns,
            [what_if_cells(row, marked) for row in rows],
            [*notes, *interval_notes(rows), *more],
            words=["policy"],
        )
        for title, rows, more in parts
        if rows
    ]


def interval_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which intervals of accuracy deserve little trust, and why."""
    policies: dict[str, list[str]] = {}
    for row in rows:
        if row["warning"]:
            policies.setdefault(of_rows(row["warning"]), []).append(row["policy"])
    return [
        f"{'all rows' if len(names) == len(rows) else ', '.join(names)}: {warning}."
        for warning, names in policies.items()
    ]


def what_if_cells(row: dict[str, Any], marked: bool) -> list[str]:
    return [
        row["policy"] + "*" * row["frontier"] + MARK * (marked and VOTES[row["vote"]][1]),
        f"{row['repetitions']:.1f}",
        number(row["tokens_generated"], ",.0f"),
        short(row["flops"]),
        percent(row["saved"]) + "%" * (row["saved"] is not None),
        percent(row["accuracy"], row["ci"]),
        percent(row["same_answer"]) + "%",
        "–" if row["false_stops"] is None else percent(row["false_stops"]) + "%",
    ]
