"""One problem of a run: its output lines and its trees joined, graded, with the classes of equal answers and the votes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common_lib.cli import UserError
from eval_lib.grading import Grader
from eval_lib.votes import vote_rows
from eval_utils import best_of_n, extract_answer, majority_vote, weighted_vote
from report_lib.data import RunRecord
from search_lib.run_reader import Journal, read_token_ids
from search_lib.tree import ROOT, Round, Tree

Grades = dict[int, tuple[str, bool]]  # finished node -> (answer, is it right)
ANSWER_CHARACTERS = 1000  # of an answer are shown; its text has it all


@dataclass
class SearchView:
    """One search, finished or not, ready to be shown.

    line: None where it is in progress. text: by node, empty where there is no journal. classes: of the beams' answers, -1
    for none; one numbering for the problem.
    """

    repeat_idx: int
    line: dict[str, Any] | None
    tree: Tree
    text: list[str]
    in_journal: bool
    grades: Grades
    classes: list[int]


@dataclass
class ProblemView:
    """All searches of one problem, by repetition."""

    data_idx: int
    searches: list[SearchView]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of the finished searches."""
        return [search.line for search in self.searches if search.line is not None]


def problem_view(run: RunRecord, journal: Journal, data_idx: int, grader: Grader) -> ProblemView:
    """Join output lines and journal of one problem; grade what is not graded; find the classes of equal answers."""
    lines = {line["repeat_idx"]: line for line in run.by_problem.get(data_idx, [])}
    recorded = journal.searches.get(data_idx, {})
    gold = next(iter(lines.values()))["gt_answer"] if lines else ""
    searches = []
    last = run.stopping.stopped.get(data_idx, math.inf) if run.stopping else math.inf
    for repeat_idx in sorted(r for r in lines.keys() | recorded.keys() if r < last):
        line, in_journal = lines.get(repeat_idx), repeat_idx in recorded
        tree, text = journal.read(data_idx, repeat_idx) if in_journal else tree_of_line(lines[repeat_idx])
        if line and in_journal:
            check_same_search(journal.path_of(data_idx), line, tree)
        grades = grade_finished(tree, text, line, gold, grader)
        searches.append(SearchView(repeat_idx, line, tree, text, in_journal, grades, []))
    beams = [[s.grades[node][0] if node in s.grades else "" for node in s.tree.beams] for s in searches]
    numbers = iter(grader.answer_classes([answer for answers in beams for answer in answers]))
    for search, answers in zip(searches, beams, strict=True):
        search.classes = [next(numbers) for _ in answers]
    return ProblemView(data_idx, searches)


def tree_of_line(line: dict[str, Any]) -> tuple[Tree, list[str]]:
    """A tree of one round for a search of which only the output line is known: the final beams, under the prompt."""
    beams = len(line["reward"])
    finish = line.get("finish_reasons") or ["end"] * beams
    ids = read_token_ids(line)
    tree = Tree([], beams)
    seconds = line.get("seconds_generate", 0.0), line.get("seconds_score", 0.0)
    tree.add(Round(0, [ROOT] * beams, ids, line["generated_scores"], [True] * beams, finish, *seconds))
    return tree, [""] * (beams + 1)


def check_same_search(journal_path: Path, line: dict[str, Any], tree: Tree) -> None:
    """Raises UserError where a journal is not of the same run as the output file."""
    lengths = [tree.end(node) for node in tree.beams]
    if tree.open_slots or lengths != line["lengths"]:
        raise UserError(
            f"{journal_path}: problem {line['data_idx']}, repetition {line['repeat_idx']} ends with beams of "
            f"{lengths} tokens, in {line['path'].name} with {line['lengths']}; the journal is of another run, or not whole: "
            "restore it or move it away"
        )


def trace_answer(tree: Tree, text: Sequence[str], node: int) -> str:
    """The answer in the response up to the end of `node`."""
    return extract_answer("".join(text[above] for above in tree.path(node)))


def grade_finished(tree: Tree, text: Sequence[str], line: dict[str, Any] | None, gold: str, grader: Grader) -> Grades:
    """Answer and verdict of every finished candidate: final beams as stored, rejected ones graded from their text."""
    grades: Grades = {}
    if line is not None:
        grades = dict(zip(tree.beams, zip(line["processed_answer"], line["reward"], strict=True), strict=True))
    rest = [node for node in tree.finished if node not in grades]
    answers = [trace_answer(tree, text, node) for node in rest]
    verdicts = grader.grade([(gold, answer) for answer in answers])
    return grades | dict(zip(rest, zip(answers, verdicts, strict=True), strict=True))


def only_pruned_right(search: SearchView) -> bool:
    """Was a rejected, finished candidate of a search that is over right, and no final beam?"""
    right = {node for node, (_, verdict) in search.grades.items() if verdict}
    return not search.tree.open_slots and bool(right) and right.isdisjoint(search.tree.beams)


def count_vote(searches: Sequence[SearchView]) -> dict[str, Any]:
    """The vote among the final beams of the finished ones of some searches, as the page draws it.

    rows: of the classes, the heaviest first; weight: sum of all values; beams, and how many are empty; maj, wmaj, bon:
    share of the vote that is right.
    """
    over = [(search.line, search.classes) for search in searches if search.line is not None]
    classes = [number for _, numbers in over for number in numbers]
    answers, rewards, values = (
        [entry for line, _ in over for entry in line[key]] for key in ("processed_answer", "reward", "generated_scores")
    )
    rows = vote_rows(classes, answers, rewards, values)
    ranked = sorted(rows, key=lambda row: (-row.weight, -row.count))
    return {
        "rows": [row.to_json(ANSWER_CHARACTERS) for row in ranked],
        "weight": sum(row.weight for row in rows),
        "beams": len(classes),
        "empty": sum(number < 0 for number in classes),
        "maj": majority_vote(classes, rewards),
        "wmaj": weighted_vote(classes, rewards, values),
        "bon": best_of_n(classes, rewards, values),
    }


def problem_row(view: ProblemView, pruned_right: int | None) -> dict[str, Any]:
    """What the list of problems says of one: JSON-able, long texts cut; None for what is not known."""
    vote, lines = count_vote(view.searches), view.lines
    values = [value for line in lines for value in line["generated_scores"]]
    finish = [reason for line in lines for reason in line.get("finish_reasons") or ()]
    tokens = [line["tokens_generated"] for line in lines if line.get("tokens_generated") is not None]
    known = all(line.get("finish_reasons") is not None for line in lines)
    rows, beams = vote["rows"], vote["beams"]
    by = "weight" if vote["weight"] else "count"  # where all values are 0 the vote counts them as equal
    shares = [row[by] / sum(row[by] for row in rows) for row in rows]
    pairs = beams * (beams - 1)
    same = sum(n * (n - 1) for n in [vote["empty"], *(row["count"] for row in rows)])
    return {
        "id": view.data_idx,
        "problem": lines[0]["problem"][:400],
        "truth": lines[0]["gt_answer"][:200],
        "vote": rows[0]["answer"][:200] if rows else "",
        "margin": shares[0] - (shares[1] if len(shares) > 1 else 0.0) if shares else 0.0,
        "pass1": float(np.mean([np.mean(line["reward"]) for line in lines])),
        "any": any(any(line["reward"]) for line in lines),
        "disagreement": 1 - same / pairs if pairs else 0.0,
        "truncated": finish.count("length") / beams if known and beams else None,
        "empty": vote["empty"] / beams,
        "value": float(np.mean(values)),
        "rescued": pruned_right,
        "tokens": sum(tokens) if len(tokens) == len(lines) else None,
        "searches": len(lines),
    } | {metric: vote[metric] for metric in ("maj", "wmaj", "bon")}
