"""Grading again: the present extraction and grader over a run's stored samples, into a new file."""

import json
from pathlib import Path
from typing import BinaryIO

from common_lib.cli import UserError
from common_lib.files import write_json, write_whole
from eval_lib.grading import Grader
from report_lib.data import RunRecord, read_run, run_names
from report_lib.problem import trace_answer
from search_lib.run_reader import Journal, Key, RunPaths

MOST_TOLD = 20  # changes that are listed one by one


def regrade(source: Path, target: Path) -> str:
    """Write `target` with answers and rewards made anew, all else as in `source`; returns what changed, in words.

    Answers are extracted again where a journal has the text, else the stored ones are graded again. The settings are
    copied, with where the journal is. Raises UserError where `target` exists: nothing is overwritten.
    """
    check_target(source, target)
    run = read_run(source, run_names([source])[0])
    journal = Journal(run.journal_path)
    with Grader() as grader:
        graded = regrade_all(run, journal, grader)

    def copy(out: BinaryIO) -> None:
        with source.open("rb") as samples:
            for line in sorted(run.lines, key=lambda line: line["offset"]):
                answers, rewards = graded[line["data_idx"], line["repeat_idx"]]
                samples.seek(line["offset"])
                record = json.loads(samples.readline()) | {"processed_answer": answers, "reward": rewards}
                text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                out.write(text.encode("utf-8", "surrogatepass") + b"\n")

    if run.meta is not None:
        write_json(
            RunPaths.of(target).meta, run.meta | {"regraded_from": source.name, "journal": run.journal_path.name}, True
        )
    write_whole(target, copy)
    how = (
        "extracted again from the journal's text" if journal.searches else "as stored (no journal to extract them from)"
    )
    return "\n".join([*run.notes, *changes(run, graded, f"answers {how}", target)])


def changes(run: RunRecord, graded: dict[Key, tuple[list[str], list[bool]]], how: str, target: Path) -> list[str]:
    """How many rewards changed, and the first of them one by one."""
    told = []
    now_right = beams = 0
    for line in sorted(run.lines, key=lambda line: line["offset"]):
        answers, rewards = graded[line["data_idx"], line["repeat_idx"]]
        place = f"problem {line['data_idx']}, repetition {line['repeat_idx']}"
        for beam, (was, now) in enumerate(zip(line["reward"], rewards, strict=True)):
            beams += 1
            if was != now:
                now_right += now
                word = "wrong -> right" if now else "right -> wrong"
                told.append(
                    f"{place}, beam {beam}: {word} (answer {answers[beam]!r:.60}, truth {line['gt_answer']!r:.60})"
                )
    head = f"{target}: {len(told)} of {beams} rewards changed ({now_right} now right, {len(told) - now_right} now wrong); {how}"
    more = len(told) - MOST_TOLD
    return [head, *told[:MOST_TOLD], *([f"... and {more} more"] if more > 0 else [])]


def check_target(source: Path, target: Path) -> None:
    if target.exists() or RunPaths.of(target).meta.exists():
        raise UserError(f"--regrade {target} exists; samples and earlier grades are never overwritten, give a new name")
    if not target.name.endswith(".jsonl") or target.name.endswith(".tree.jsonl"):
        raise UserError(f"--regrade {target} must be a file name that ends in .jsonl")
    if target.parent.resolve() != source.parent.resolve():
        raise UserError(f"--regrade {target} must lie in the folder of {source.name}, whose journal it refers to")


def regrade_all(run: RunRecord, journal: Journal, grader: Grader) -> dict[Key, tuple[list[str], list[bool]]]:
    """Answers and rewards of the final beams of each search."""
    found = {}
    for line in run.lines:
        search, answers = (line["data_idx"], line["repeat_idx"]), line["processed_answer"]
        if search[1] in journal.searches.get(search[0], {}):
            tree, text = journal.read(*search)
            if len(tree.beams) == len(answers):
                answers = [trace_answer(tree, text, node) for node in tree.beams]
        found[search] = answers, grader.grade([(line["gt_answer"], answer) for answer in answers])
    return found
