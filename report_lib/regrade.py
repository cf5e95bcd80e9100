"""Grading again: the present extraction and grader over a run's stored samples, into a new file."""

import json
from pathlib import Path

from common_lib.cli import UserError
from eval_utils import Grader, extract_answer
from report_lib.data import read_run, run_names, sibling
from report_lib.trees import TreeFile, open_trees

MOST_TOLD = 20  # changes that are listed one by one


def regrade(source: Path, target: Path) -> str:
    """Write `target` with answers and rewards made anew, all else as in `source`; returns what changed, in words.

    Answers are extracted again where a journal has the text, else the stored ones are graded again. The settings are
    copied, with where the journal is. Raises UserError where `target` exists: nothing is overwritten.
    """
    check_target(source, target)
    run = read_run(source, run_names([source])[0])
    trees = open_trees(run.tree_path)
    changes: list[str] = []
    counts = [0, 0]
    with Grader() as grader:
        verdicts = regrade_all(run, trees, grader)
    beside = target.with_name(target.name + ".tmp")
    with source.open("rb") as samples, beside.open("wb") as out:
        for line in sorted(run.lines, key=lambda line: line["offset"]):
            answers, rewards = verdicts[line["data_idx"], line["repeat_idx"]]
            place = f"problem {line['data_idx']}, repetition {line['repeat_idx']}"
            for beam, (was, now) in enumerate(zip(line["reward"], rewards, strict=True)):
                if was != now:
                    answer = f"answer {answers[beam]!r:.60}, truth {line['gt_answer']!r:.60}"
                    changes.append(f"{place}, beam {beam}: {word(was)} -> {word(now)} ({answer})")
                    counts[now] += 1
            samples.seek(line["offset"])
            record = json.loads(samples.read(line["size"])) | {"processed_answer": answers, "reward": rewards}
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
            out.write(text.encode("utf-8", "surrogatepass") + b"\n")
    if run.meta is not None:
        meta = run.meta | {"regraded_from": source.name, "journal": str(run.tree_path.name)}
        sibling(target, "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    beside.rename(target)
    beams = sum(len(line["reward"]) for line in run.lines)
    how = "extracted again from the journal's text" if trees else "as stored (no journal to extract them from)"
    head = f"{target}: {len(changes)} of {beams} rewards changed ({counts[1]} now right, {counts[0]} now wrong); "
    rest = [f"... and {len(changes) - MOST_TOLD} more"] if len(changes) > MOST_TOLD else []
    return "\n".join([*run.notes, f"{head}answers {how}", *changes[:MOST_TOLD], *rest])


def check_target(source: Path, target: Path) -> None:
    if target.exists() or sibling(target, "meta.json").exists():
        raise UserError(f"--regrade {target} exists; samples and earlier grades are never overwritten, give a new name")
    if not target.name.endswith(".jsonl") or target.name.endswith(".tree.jsonl"):
        raise UserError(f"--regrade {target} must be a file name that ends in .jsonl")
    if target.parent.resolve() != source.parent.resolve():
        raise UserError(f"--regrade {target} must lie in the folder of {source.name}, whose journal it refers to")


def word(reward: bool) -> str:
    return "right" if reward else "wrong"


def regrade_all(run, trees: TreeFile | None, grader: Grader) -> dict[tuple[int, int], tuple[list[str], list[bool]]]:
    """(data_idx, repeat_idx) -> answers and rewards of the final beams."""
    found = {}
    for data_idx, lines in run.by_problem.items():
        journal = {tree.repeat_idx: tree for tree in trees.trees(data_idx)} if trees else {}
        for line in lines:
            answers = line["processed_answer"]
            tree = journal.get(line["repeat_idx"])
            if tree is not None and len(tree.beams) == len(answers):
                answers = [extract_answer(tree.trace_text(node)) for node in tree.beams]
            rewards = grader.grade([(line["gt_answer"], answer) for answer in answers])
            found[data_idx, line["repeat_idx"]] = (answers, rewards)
    return found
