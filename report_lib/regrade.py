"""Grading again: the present extraction and grader over a run's stored samples, into a new file."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from common_lib.cli import UserError
from common_lib.files import write_json, write_whole
from eval_lib.grading import Grader
from eval_utils import extract_answer
from report_lib.data import read_run, run_names
from report_lib.page import Decode
from report_lib.problem import trace_answer
from search_lib.run_reader import Journal, RunPaths, read_token_ids
from search_lib.run_shards import find_shards

MOST_TOLD = 20  # changes that are listed one by one
ORIGINS = {
    "text": "extracted again from the journal's text",
    "ids": "extracted again from the token ids",
    "stored": "as stored (no journal to extract them from; --tokenizer extracts them from the token ids)",
}


def regrade(source: Path, target: Path, load_decoder: Callable[[], Decode | None] = lambda: None) -> str:
    """Write `target` with answers and rewards made anew, all else as in `source`; returns what changed, in words.

    Answers are extracted again from the journal's text, where it has none from the token ids, if there is a decoder
    (ids to text), else the stored ones are graded again. The settings are copied, with where the journal is. Raises
    UserError where `target` exists: nothing is overwritten.
    """
    check_target(source, target)
    run = read_run(source, run_names([source])[0])
    journal, decode = Journal(*run.journal_paths), load_decoder()
    changes: list[str] = []
    now_right = 0
    origins: Counter[str] = Counter()

    def write(out: BinaryIO) -> None:
        nonlocal now_right
        with source.open("rb") as samples, Grader() as grader:
            for line in sorted(run.lines, key=lambda line: line["offset"]):
                origin, answers = answers_again(source, line, journal, decode)
                rewards = grader.grade([(line["gt_answer"], answer) for answer in answers])
                origins[origin] += 1
                place = f"problem {line['data_idx']}, repetition {line['repeat_idx']}"
                for beam, (was, now) in enumerate(zip(line["reward"], rewards, strict=True)):
                    if was != now:
                        now_right += now
                        word = "wrong -> right" if now else "right -> wrong"
                        answer = f"answer {answers[beam]!r:.60}, truth {line['gt_answer']!r:.60}"
                        changes.append(f"{place}, beam {beam}: {word} ({answer})")
                samples.seek(line["offset"])
                record = json.loads(samples.readline()) | {"processed_answer": answers, "reward": rewards}
                text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                out.write(text.encode("utf-8", "surrogatepass") + b"\n")
        if run.meta is not None:  # before the run's own file, which without it would look like the released code's
            meta = run.meta | {"regraded_from": source.name, "journal": run.journal_paths[0].name}
            write_json(RunPaths.of(target).meta, meta, ensure_ascii=True)

    write_whole(target, write)
    beams = sum(len(line["reward"]) for line in run.lines)
    counts = f"{len(changes)} of {beams} rewards changed ({now_right} now right, {len(changes) - now_right} now wrong)"
    more = [f"... and {len(changes) - MOST_TOLD} more"] if len(changes) > MOST_TOLD else []
    return "\n".join([*run.notes, f"{target}: {counts}; answers {in_words(origins)}", *changes[:MOST_TOLD], *more])


def check_target(source: Path, target: Path) -> None:
    if shards := find_shards(source):
        shard, paths = next(iter(shards.items()))
        new = RunPaths.of(target, shard).results.name
        raise UserError(f"--regrade takes shards one by one: {paths.results} into {new}, and so on")
    if target.exists() or RunPaths.of(target).meta.exists():
        raise UserError(f"--regrade {target} exists; samples and earlier grades are never overwritten, give a new name")
    if not target.name.endswith(".jsonl") or target.name.endswith((".tree.jsonl", ".uncounted.jsonl")):
        raise UserError(f"--regrade {target} must be a file name that ends in .jsonl")
    if target.parent.resolve() != source.parent.resolve():
        raise UserError(f"--regrade {target} must lie in the folder of {source.name}, whose journal it refers to")


def answers_again(source: Path, line: dict[str, Any], journal: Journal, decode: Decode | None) -> tuple[str, list[str]]:
    """The answers of the final beams of a search, and from what they are: one of ORIGINS."""
    if line["repeat_idx"] in journal.searches.get(line["data_idx"], {}):
        tree, text = journal.read(line["data_idx"], line["repeat_idx"])
        if len(tree.beams) == len(line["processed_answer"]):
            return "text", [trace_answer(tree, text, node) for node in tree.beams]
    if decode is not None:
        return "ids", [extract_answer(decode(list(ids))) for ids in read_token_ids(line)]
    return "stored", line["processed_answer"]


def in_words(origins: Counter[str]) -> str:
    """Of how many searches the answers are from what, the number where it is not all."""
    parts = [
        words + f" (of {origins[name]} searches)" * (len(origins) > 1)
        for name, words in ORIGINS.items()
        if origins[name]
    ]
    return ", ".join(parts)
