"""One problem of a run: its output lines and its trees joined, graded, with the classes of equal answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common_lib.cli import UserError
from eval_utils import Grader, best_of_n, extract_answer, majority_vote, weighted_vote
from report_lib.data import Run
from report_lib.trees import ROOT, SearchTree, TreeFile

Grades = dict[int, tuple[str, bool]]  # finished node -> (answer, is it right)


@dataclass
class ProblemView:
    """All searches of one problem, finished or not, ready to be shown. Lists run in parallel, by repetition.

    lines: None for a search in progress. classes: of the beams' answers, -1 for none. journal: is the tree a real one?
    """

    data_idx: int
    lines: list[dict | None]
    trees: list[SearchTree]
    grades: list[Grades]
    classes: list[list[int]]
    journal: list[bool]

    @property
    def over(self) -> list[int]:
        """Which of the searches are finished."""
        return [i for i, line in enumerate(self.lines) if line is not None]


def problem_view(run: Run, trees: TreeFile | None, data_idx: int, grader: Grader) -> ProblemView:
    """Join output lines and journal of one problem; grade what is not graded; find the classes of equal answers."""
    lines = {line["repeat_idx"]: line for line in run.by_problem.get(data_idx, [])}
    journal = {tree.repeat_idx: tree for tree in trees.trees(data_idx)} if trees else {}
    repeats = sorted(lines.keys() | journal.keys())
    found = [journal.get(r) or tree_of_line(lines[r]) for r in repeats]
    for repeat, tree in zip(repeats, found, strict=True):
        if repeat in lines and repeat in journal:
            check_same_search(run, lines[repeat], tree)
    gold = next(iter(lines.values()))["gt_answer"] if lines else ""
    grades = [grade_finished(tree, lines.get(r), gold, grader) for r, tree in zip(repeats, found, strict=True)]
    answers = [
        [grade[node][0] if node in grade else "" for node in tree.beams]
        for tree, grade in zip(found, grades, strict=True)
    ]
    numbers = iter(grader.answer_classes([answer for beams in answers for answer in beams]))
    classes = [[next(numbers) for _ in beams] for beams in answers]
    return ProblemView(
        data_idx, [lines.get(r) for r in repeats], found, grades, classes, [r in journal for r in repeats]
    )


def tree_of_line(line: dict) -> SearchTree:
    """A tree of one round for a search of which only the output line is known: the final beams, under the prompt."""
    beams = len(line["reward"])
    finish = line.get("finish_reasons") or ["end"] * beams
    return SearchTree(
        data_idx=line["data_idx"],
        repeat_idx=line["repeat_idx"],
        prompt_tokens=int(line.get("prompt_tokens", 0)),
        parent=[-1] + [ROOT] * beams,
        round=[-1] + [0] * beams,
        start=[0] * (beams + 1),
        length=[0, *line["lengths"]],
        value=[0.0, *line["generated_scores"]],
        kept=[True] * (beams + 1),
        finish=["", *finish],
        text=[""] * (beams + 1),
        beams=list(range(1, beams + 1)),
    )


def check_same_search(run: Run, line: dict, tree: SearchTree) -> None:
    """Raises UserError where a journal is not of the same run as the output file."""
    lengths = [tree.start[node] + tree.length[node] for node in tree.beams]
    if tree.is_over and lengths == line["lengths"]:
        return
    raise UserError(
        f"{run.tree_path}: problem {line['data_idx']}, repetition {line['repeat_idx']} ends with beams of {lengths} "
        "tokens, "
        f"in {run.path.name} with {line['lengths']}; the journal is of another run, or not whole: restore it or move "
        "it away"
    )


def grade_finished(tree: SearchTree, line: dict | None, gold: str, grader: Grader) -> Grades:
    """Answer and verdict of every finished candidate: final beams as stored, rejected ones graded from their text."""
    grades: Grades = {}
    if line is not None:
        grades = dict(zip(tree.beams, zip(line["processed_answer"], line["reward"], strict=True), strict=True))
    rest = [node for node in tree.finished if node not in grades]
    answers = [extract_answer(tree.trace_text(node)) for node in rest]
    verdicts = grader.grade([(gold, answer) for answer in answers])
    return grades | dict(zip(rest, zip(answers, verdicts, strict=True), strict=True))


def search_votes(view: ProblemView, searches: Sequence[int]) -> dict[str, float]:
    """maj, wmaj, bon over the final beams of some searches (indices into the view), pooled."""
    classes, rewards, values = [], [], []
    for i in searches:
        tree, grades = view.trees[i], view.grades[i]
        classes += view.classes[i]
        rewards += [grades[node][1] for node in tree.beams]
        values += [tree.value[node] for node in tree.beams]
    return {
        "maj": majority_vote(classes, rewards),
        "wmaj": weighted_vote(classes, rewards, values),
        "bon": best_of_n(classes, rewards, values),
    }


def problem_row(view: ProblemView, rescued: int | None) -> dict[str, Any]:
    """What the list of problems says of one: JSON-able, long texts cut."""
    over = view.over
    lines = [line for line in view.lines if line is not None]
    classes = [number for i in over for number in view.classes[i]]
    values = [value for line in lines for value in line["generated_scores"]]
    answers = [answer for line in lines for answer in line["processed_answer"]]
    rewards = [reward for line in lines for reward in line["reward"]]
    finish = [reason for line in lines for reason in line.get("finish_reasons", [])]
    weight: dict[int, float] = {}
    count: dict[int, int] = {}
    for number, value in zip(classes, values, strict=True):
        if number >= 0:
            weight[number] = weight.get(number, 0.0) + value
            count[number] = count.get(number, 0) + 1
    ranked = sorted(weight, key=lambda number: -weight[number])
    total, beams = sum(weight.values()), len(classes)
    shares = [weight[number] / total for number in ranked] if total else []
    pairs = beams * (beams - 1)
    same = sum(n * (n - 1) for n in count.values()) + (beams - sum(count.values())) * (beams - sum(count.values()) - 1)
    return {
        "id": view.data_idx,
        "problem": lines[0]["problem"][:400],
        "truth": lines[0]["gt_answer"][:200],
        "vote": answers[classes.index(ranked[0])][:200] if ranked else "",
        "margin": shares[0] - (shares[1] if len(shares) > 1 else 0.0) if shares else 0.0,
        "pass1": float(np.mean([np.mean(line["reward"]) for line in lines])),
        "any": any(rewards),
        "disagreement": 1 - same / pairs if pairs else 0.0,
        "truncated": finish.count("length") / beams if finish else 0.0,
        "empty": sum(number < 0 for number in classes) / beams,
        "value": float(np.mean(values)),
        "rescued": rescued,
        "tokens": sum(line.get("tokens_generated", sum(line["lengths"])) for line in lines),
        "searches": len(lines),
    } | search_votes(view, over)


def read_token_ids(run: Run, line: dict) -> list[list[int]]:
    """The token ids of a line, read again from the file: [beams][tokens]."""
    with run.path.open("rb") as file:
        file.seek(line["offset"])
        return json.loads(file.read(line["size"]))["generated_ids"]
