"""Grading again: what is extracted from where, what is kept, what is told."""

import json

import pytest
from handmade_runs import journal_row, result, settings, write_run
from synthetic_runs import rows_of

import report
from common_lib.cli import UserError
from search_lib.run_reader import RunPaths


def run_of_two(tmp_path, name="run"):
    """Two searches, the later one first in the file; the stored answers are not those of the journal's text."""
    more = {"finish_reasons": ["stop", "stop"], "generated_ids": [[5] * 6, [5] * 6], "colour": "kept too"}
    lines = [
        result(0, 1, 1, ["8", "9"], [True, True], [0.5, 0.25], **more),
        result(0, 0, 1, ["8", "9"], [False, False], [0.5, 0.25], **more),
    ]
    journal = [
        row
        for repeat in (0, 1)
        for row in (
            journal_row(0, repeat, 0, [0, 0], [4, 4], [0.1, 0.2], [1, 1], ["", ""], ["so \\box", "x"]),
            journal_row(0, repeat, 1, [1, 2], [2, 2], [0.5, 0.25], [1, 1], ["stop"] * 2,
                        [f"ed{{{1 + repeat}}}", "\\boxed{1.0}"]),
        )
    ]  # fmt: skip
    return write_run(tmp_path / f"{name}.jsonl", lines, journal, settings(1, 2, 2, 2, 1))


def test_answers_come_from_the_whole_trace_and_all_else_stays(tmp_path, capsys):
    path, new = run_of_two(tmp_path), tmp_path / "new.jsonl"
    assert report.main([str(path), "--regrade", str(new)]) == 0
    old, graded = rows_of(path), rows_of(new)
    assert [(row["processed_answer"], row["reward"]) for row in graded] == [
        (["2", "1.0"], [False, True]), (["1", "1.0"], [True, True]),
    ]  # fmt: skip
    for before, after in zip(old, graded, strict=True):
        assert after == before | {key: after[key] for key in ("processed_answer", "reward")}
    printed = capsys.readouterr().out.splitlines()
    assert f"{new}: 3 of 4 rewards changed (2 now right, 1 now wrong); answers extracted again" in printed[-4]
    assert printed[-3:] == [
        "problem 0, repetition 1, beam 0: right -> wrong (answer '2', truth '1')",
        "problem 0, repetition 0, beam 0: wrong -> right (answer '1', truth '1')",
        "problem 0, repetition 0, beam 1: wrong -> right (answer '1.0', truth '1')",
    ]
    meta = json.loads(RunPaths.of(new).meta.read_text())
    assert (meta["regraded_from"], meta["journal"]) == ("run.jsonl", "run.tree.jsonl")
    assert {key: meta[key] for key in ("search", "arguments", "num_problems")} == {
        key: json.loads(RunPaths.of(path).meta.read_text())[key] for key in ("search", "arguments", "num_problems")
    }


def test_a_regraded_run_can_be_graded_again_from_the_same_journal(tmp_path, capsys):
    path = run_of_two(tmp_path)
    for source, target in (("run", "second"), ("second", "third")):
        assert report.main([str(tmp_path / f"{source}.jsonl"), "--regrade", str(tmp_path / f"{target}.jsonl")]) == 0
    meta = json.loads((tmp_path / "third.meta.json").read_text())
    assert (meta["regraded_from"], meta["journal"]) == ("second.jsonl", "run.tree.jsonl")
    assert rows_of(tmp_path / "third.jsonl") == rows_of(tmp_path / "second.jsonl")
    assert "0 of 4 rewards changed (0 now right, 0 now wrong)" in capsys.readouterr().out
    assert path.exists()


def test_many_changes_are_counted_and_the_first_are_told(tmp_path, capsys):
    lines = [result(i, 0, 25, ["1"], [False], [0.5]) for i in range(25)]
    path = write_run(tmp_path / "run.jsonl", lines)
    assert report.main([str(path), "--regrade", str(tmp_path / "new.jsonl")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum("wrong -> right" in line for line in printed) == 20
    assert printed[-1] == "... and 5 more"
    assert not (tmp_path / "new.meta.json").exists()


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("new.json", "must be a file name that ends in .jsonl"),
        ("new.tree.jsonl", "must be a file name that ends in .jsonl"),
        ("sub/new.jsonl", "must lie in the folder of run.jsonl"),
        ("taken.jsonl", "exists; samples and earlier grades are never overwritten"),
        ("half.jsonl", "exists; samples and earlier grades are never overwritten"),
        ("run.jsonl", "exists; samples and earlier grades are never overwritten"),
    ],
)
def test_where_it_may_not_be_written(tmp_path, target, told):
    path = run_of_two(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "taken.jsonl").write_text("mine")
    (tmp_path / "half.meta.json").write_text("mine")  # settings of a run of that name
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(UserError, match=told):
        report.main([str(path), "--regrade", str(tmp_path / target)])
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


# ------------------------------------------------------------------------------------------------ from the token ids


def test_without_a_journal_a_tokenizer_gives_the_text(tmp_path, capsys, shared):
    """DeepSeek's own: what is after `</think>` counts, and its special tokens do not."""
    folder = shared("tokenizer_r1_distill")
    from transformers import AutoTokenizer

    texts = [r"<think> \boxed{7} </think> It is \boxed{1}.", r"<think> \boxed{1}", r"<think>\n</think> \boxed{2}"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [[*tokenizer.encode(text, add_special_tokens=False), 151643] for text in texts]
    lines = [result(0, 0, 1, ["7", "1", ""], [False, True, False], [0.5] * 3, generated_ids=ids)]
    path, new = write_run(tmp_path / "run.jsonl", lines), tmp_path / "new.jsonl"
    assert report.main([str(path), "--tokenizer", str(folder), "--regrade", str(new)]) == 0
    (row,) = rows_of(new)
    assert (row["processed_answer"], row["reward"]) == (["1", "1", "2"], [True, True, False])
    printed = capsys.readouterr().out
    assert "1 of 3 rewards changed (1 now right, 0 now wrong); answers extracted again from the token ids" in printed
    assert "as stored" not in printed


def test_the_journals_text_goes_before_the_token_ids(tmp_path, monkeypatch, capsys):
    """Of each search on its own, and how many are from what is said."""
    path, new = run_of_two(tmp_path), tmp_path / "new.jsonl"
    journal = RunPaths.of(path).tree
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))  # of repetition 0
    monkeypatch.setattr(report, "load_decoder", lambda name: lambda ids: rf"\boxed{{{len(ids)}}} by {name}")
    assert report.main([str(path), "--tokenizer", "T", "--regrade", str(new)]) == 0
    answers = {row["repeat_idx"]: row["processed_answer"] for row in rows_of(new)}
    assert answers == {0: ["1", "1.0"], 1: ["6", "6"]}
    printed = capsys.readouterr().out
    assert "the journal's text (of 1 searches), extracted again from the token ids (of 1 searches)" in printed
    monkeypatch.setattr(report, "load_decoder", lambda name: None)
    assert report.main([str(path), "--regrade", str(tmp_path / "third.jsonl")]) == 0
    answers = {row["repeat_idx"]: row["processed_answer"] for row in rows_of(tmp_path / "third.jsonl")}
    assert answers == {0: ["1", "1.0"], 1: ["8", "9"]}
    assert "as stored (no journal to extract them from; --tokenizer extracts them" in capsys.readouterr().out


def test_a_tokenizer_is_loaded_after_what_costs_nothing_was_checked(tmp_path, monkeypatch):
    path = run_of_two(tmp_path)
    monkeypatch.setattr(report, "load_decoder", lambda name: pytest.fail("loaded"))
    with pytest.raises(UserError, match="must be a file name"):
        report.main([str(path), "--tokenizer", "T", "--regrade", str(tmp_path / "new.json")])
