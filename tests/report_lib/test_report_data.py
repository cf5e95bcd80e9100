"""A run's files as a report reads them: runs in progress, foreign files, and one clear line for bad input."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from synthetic_runs import make_run, rows_of, write_rows

import report
from common_lib.cli import UserError
from report_lib.data import read_run, run_names
from search_lib.run_reader import Journal, RunPaths, read_token_ids
from search_lib.tree import Round, Tree

SMALL = dict(problems=4, repetitions=3, early_stop=0.15)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), **SMALL)


@pytest.fixture
def run_path(original, tmp_path):
    """A copy of a small run, to be spoilt."""
    paths = RunPaths.of(original)
    for path in (paths.results, paths.meta, paths.tree):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / original.name


# ------------------------------------------------------------------------------------------------------------- reading


def test_trees_of_an_interleaved_journal_are_those_of_the_search(original):
    """The journal's trees, with their ids in 4 bytes each, against those that the search's own rounds make."""
    path = RunPaths.of(original).tree
    rows = rows_of(path)
    order = [(row["data_idx"], row["repeat_idx"]) for row in rows]
    assert any(order[i] != order[i + 1] and order[i] in order[i + 1 :] for i in range(len(order) - 1)), (
        "not interleaved"
    )
    journal = Journal(path)
    assert {i: sorted(runs) for i, runs in sorted(journal.searches.items())} == {i: [0, 1, 2] for i in range(4)}
    for search in set(order):
        rounds = [row for row in rows if (row["data_idx"], row["repeat_idx"]) == search]
        expected = Tree(rounds[0]["prompt_ids"], num_beams=4)
        for row in rounds:
            expected.add(Round(**{name: row[name] for name in Round.__dataclass_fields__ if name in row}))
        tree, text = journal.read(*search)
        for name in ("prompt_ids", "beams", "parent", "round", "start", "kept", "finish", "open_slots", "finished"):
            assert getattr(tree, name) == getattr(expected, name), name
        assert tree.value[1:] == expected.value[1:]
        assert list(map(list, tree.tokens)) == expected.tokens
        assert text == ["", *(text for row in rounds for text in row["text"])]
        assert tree.open_slots == []
        for node in range(1, len(tree.parent)):
            assert tree.end(node) == len(tree.response(node)) == tree.start[node] + len(tree.tokens[node])


def test_hostile_lines_are_read_as_json_does_it(run_path):
    """Whatever order and form the keys have; ids are counted, and read again where they are asked for."""
    hostile = ['"generated_ids":[[1,2]]', "\\", '\\"', "]]", "[[", "é\u2028\ud800"]
    rows = [dict(reversed(row.items())) | {"problem": "".join(hostile)} for row in rows_of(run_path)]
    lines = [
        json.dumps(row, ensure_ascii=i % 2 == 0, indent=None, separators=((", ", " : "), (",", ":"))[i % 2])
        for i, row in enumerate(rows)
    ]
    run_path.write_bytes("\n\n".join(lines).encode("utf-8", "surrogatepass"))
    run = read_run(run_path, "run")
    assert {line["problem"] for line in run.lines} == {"".join(hostile)}
    for line in run.lines:
        row = next(r for r in rows if (r["data_idx"], r["repeat_idx"]) == (line["data_idx"], line["repeat_idx"]))
        assert line["lengths"] == list(map(len, row["generated_ids"]))
        assert list(map(list, read_token_ids(line))) == row["generated_ids"]


def test_lines_in_any_order_give_the_same_run(run_path):
    lines = run_path.read_text().splitlines(keepends=True)
    before = read_run(run_path, "run").lines
    random.Random(1).shuffle(lines)
    run_path.write_text("".join(lines))
    after = read_run(run_path, "run").lines
    place = {"offset", "line"}
    assert [{k: v for k, v in row.items() if k not in place} for row in after] == [
        {k: v for k, v in row.items() if k not in place} for row in before
    ]


def test_names_of_runs_differ(tmp_path):
    assert run_names([tmp_path / "a/x.jsonl", tmp_path / "a/y.jsonl"]) == ["x", "y"]
    assert run_names([tmp_path / "a/x.jsonl", tmp_path / "b/x.jsonl"]) == ["a/x", "b/x"]
    with pytest.raises(UserError, match="given twice"):
        run_names([tmp_path / "x.jsonl", tmp_path / "a/../x.jsonl"])


# ---------------------------------------------------------------------------------------------------- runs in progress


def test_a_torn_last_line_is_left_out_and_the_run_is_partial(run_path, capsys):
    data = run_path.read_bytes()
    run_path.write_bytes(data[:-200])
    tree_path = RunPaths.of(run_path).tree
    tree_path.write_bytes(tree_path.read_bytes()[:-50])
    assert report.main([str(run_path)]) == 0
    printed = capsys.readouterr().out
    assert "run.jsonl: its last line is torn (a run in progress, or killed) and was left out" in printed
    assert "run: PARTIAL, 11 of 12 searches finished; 4 problems, 2 to 3 repetitions of each" in printed
    assert "run.tree.jsonl: its last line is torn (a run in progress, or killed) and was left out" in printed
    assert "1 of 4 problems lack 3 repetitions" in " ".join(printed.split())


def test_a_run_in_progress_shows_its_unfinished_searches(run_path, tmp_path, capsys):
    write_rows(run_path, rows_of(run_path)[:5])  # repetition 0 of all problems, repetition 1 of the first
    tree_path = RunPaths.of(run_path).tree
    rows = rows_of(tree_path)
    write_rows(tree_path, [row for row in rows if (row["repeat_idx"], row["round"]) < (2, 1)])
    assert report.main([str(run_path), "--out", str(tmp_path / "out")]) == 0
    assert "PARTIAL, 5 of 12 searches finished; 4 problems, 1 to 2 repetitions" in capsys.readouterr().out
    page = (tmp_path / "out/report_data/run0/p3.js").read_text()
    data = json.loads(page[page.index(",") + 1 : page.rindex(");")])
    assert [search["over"] for search in data["searches"]] == [True, False, False]
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert table["runs"][0]["partial"] is True
    assert [row["problems"] for row in table["runs"][0]["table"]] == [4, 1]


def test_a_finished_line_without_its_newline_counts(run_path):
    run_path.write_bytes(run_path.read_bytes().rstrip())
    run = read_run(run_path, "run")
    assert len(run.lines) == 12
    assert not run.partial


def test_unknown_keys_are_ignored_and_named(run_path):
    rows = [row | {"colour": 3} for row in rows_of(run_path)]
    write_rows(run_path, rows)
    assert read_run(run_path, "run").notes == ["run.jsonl: keys that are not known here were ignored: colour"]


# ----------------------------------------------------------------------------------------------------------- bad input


def spoil(change):
    """A way to spoil a run: `change` is applied to the rows of its output file."""

    def apply(path):
        rows = rows_of(path)
        change(rows)
        write_rows(path, rows)

    return apply


def first_of(rows):
    """The first round of problem 0, repetition 0: searches run side by side."""
    return next(row for row in rows if row["data_idx"] == row["repeat_idx"] == row["round"] == 0)


def spoil_tree(change):
    return lambda path: spoil(change)(RunPaths.of(path).tree)


def spoil_meta(text):
    return lambda path: RunPaths.of(path).meta.write_text(text)


BAD = {
    "no file": (lambda path: path.unlink(), "no such file; give the --output_path of a run"),
    "empty": (lambda path: path.write_text(""), "no finished search in it yet: the run is in progress; nothing to report"),
    "not JSON": (lambda path: path.write_text("hello\nyou\n"), "line 1 is not JSON"),
    "torn inside": (
        lambda path: path.write_bytes(path.read_bytes()[:500] + b"\n" + path.read_bytes()[500:]),
        "line 1 is not JSON",
    ),
    "another file": (lambda path: path.write_text('{"question": "?"}\n'), "has no repeat_idx, data_idx, global_idx"),
    "a missing key": (spoil(lambda rows: rows[3].pop("reward")), "line 4 has no reward; is it a file of a run, and whole?"),
    "two runs": (spoil(lambda rows: rows.append(rows[0])), "line 13 is repetition 0 of problem 0 again, after line 1"),
    "other problems": (spoil(lambda rows: rows[5].update(problem="?")), "has another problem under data_idx 1 than line "),
    "another size": (spoil(lambda rows: rows[9].update(global_idx=31)), "in a run of 4 problems"),
    "uneven lists": (spoil(lambda rows: rows[0]["reward"].pop()), "has lists that do not belong together"),
    "no beams": (
        spoil(lambda rows: rows[0].update(reward=[], generated_ids=[], generated_scores=[], processed_answer=[])),
        "has lists that do not belong together",
    ),
    "NaN": (spoil(lambda rows: rows[0].update(generated_scores=[float("nan")] * 4)), "it must be a list of values from 0 to 1"),
    "a logit": (spoil(lambda rows: rows[0].update(generated_scores=[1.5] * 4)), "it must be a list of values from 0 to 1"),
    "a text number": (spoil(lambda rows: rows[0].update(data_idx="3")), "data_idx '3', it must be a whole number"),
    "ids that are none": (
        spoil(lambda rows: rows[2]["generated_ids"][0].append("5")),
        "line 3 has generated_ids",
    ),
    "negative ids": (spoil(lambda rows: rows[2]["generated_ids"].append([-1])), "it must be lists of token ids"),
    "a list": (lambda path: path.write_text("[1]\n"), "line 1 is not a JSON object"),
    "deep JSON": (lambda path: path.write_text('{"a":' + "[" * 100_000 + "\n"), "line 1 is not JSON"),
    "the journal": (lambda path: path, "that is a run's journal, settings or uncounted lines"),
    "other settings": (spoil_meta('{"format": 7}'), "format 7 is not known; this version knows format 1"),
    "broken settings": (spoil_meta("{"), "not a run's settings"),
    "another journal": (
        spoil_tree(lambda rows: [row["tokens"][0].append(5) for row in rows]),
        "the journal is of another run, or not whole",
    ),
    "two journals": (spoil_tree(lambda rows: rows.append(first_of(rows))), "round 0 of problem 0, repetition 0 is there twice (line "),
    "a lost round": (
        spoil_tree(lambda rows: rows.pop(next(i for i, row in enumerate(rows) if row["round"] == 1))),
        "a round before it is missing",
    ),
    "a wild parent": (
        spoil_tree(lambda rows: first_of(rows).update(parent=[99] * 8)),
        "round 0 of problem 0, repetition 0 does not fit the rounds before it",
    ),
    "a broken journal": (
        lambda path: RunPaths.of(path).tree.write_text('{"data_idx": 1}\n'),
        "line 1 has no repeat_idx, round",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_touches_nothing(case, run_path, tmp_path):
    apply, expected = BAD[case]
    apply(run_path)
    out = tmp_path / "out"
    (out / "report_data/assets").mkdir(parents=True)
    (out / "report_data/assets/core.js").write_text("an earlier report")
    given = RunPaths.of(run_path).tree if case == "the journal" else run_path
    with pytest.raises(UserError) as caught:
        report.main([str(given), "--out", str(out)])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert (out / "report_data/assets/core.js").read_text() == "an earlier report"
    assert sorted(path.name for path in out.iterdir()) == ["report_data"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_blocks", "0"], "--num_blocks is 0; it must be at least 1"),
        (["--regrade", "x.jsonl", "--out", "y"], "--regrade takes one run and no --out"),
        (["--oout", "y"], "unknown argument --oout; did you mean --out?"),
        (["--tokenizer", "./nowhere"], "--tokenizer ./nowhere is no folder"),
    ],
)
def test_wrong_flags_are_one_line(run_path, flags, expected):
    with pytest.raises(UserError, match=expected.replace("?", r"\?").replace(".", r"\.")):
        report.main([str(run_path), *flags])


def test_the_script_ends_with_status_2_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "report.py"), str(tmp_path / "no.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: {tmp_path}/no.jsonl: no such file; give the --output_path of a run"]


def test_foreign_folders_are_not_overwritten(run_path, tmp_path):
    (tmp_path / "report_data").mkdir()
    (tmp_path / "report_data/precious.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no report's"):
        report.main([str(run_path), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is a file; give a folder"):
        report.main([str(run_path), "--out", str(run_path)])
    assert (tmp_path / "report_data/precious.txt").read_text() == "mine"
