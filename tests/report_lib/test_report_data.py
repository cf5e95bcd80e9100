"""Reading a run's files: lengths instead of ids, trees from an interleaved journal, and one clear line for bad input."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from make_synthetic_run import Options, make_synthetic_run

import report
from common_lib.cli import UserError
from report_lib.data import read_run, run_names, sibling
from report_lib.lines import loads_without_ids
from report_lib.trees import TreeFile
from search_lib.tree import Round, Tree

SMALL = dict(problems=4, repetitions=3, max_length=160, block_size=40, early_stop=0.15)


def make_run(folder, name="run", **changes):
    path = folder / f"{name}.jsonl"
    make_synthetic_run(path, Options(**(SMALL | changes)))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_path(original, tmp_path):
    """A copy of a small run, to be spoilt."""
    for path in (original, sibling(original, "meta.json"), sibling(original, "tree.jsonl")):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / original.name


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------- one line


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_line_is_parsed_as_json_does_it_with_lengths_for_ids(separators, ascii_only):
    rng = random.Random(0)
    hostile = ['"generated_ids":[[1,2]]', '\\"generated_ids\\": [[7]]', "\\", '\\"', "]]", "[[", "é\u2028\ud800"]
    for _ in range(200):
        ids = [[rng.randrange(150_000) for _ in range(rng.randrange(4))] for _ in range(rng.randrange(4))]
        keys = {"problem": "".join(rng.choices(hostile, k=3)), "generated_ids": ids, "other": [rng.choice(hostile)]}
        row = dict(rng.sample(list(keys.items()), 3))
        raw = json.dumps(row, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        assert loads_without_ids(raw, "generated_ids") == row | {"generated_ids": [len(beam) for beam in ids]}


def test_a_key_that_only_ends_like_it_is_another_key():
    row = {'x"generated_ids': [[1]], "generated_ids": [[5, 6, 7]]}
    assert loads_without_ids(json.dumps(row).encode(), "generated_ids") == row | {"generated_ids": [3]}


@pytest.mark.parametrize(
    "line",
    ['{"generated_ids": [[1, "2"]]}', '{"generated_ids": 5}', '{"generated_ids": [[1, -2]]}', '{"generated_ids": [[1]',
     '{"a": {"generated_ids": [[1]]}}', '{"generated_ids": [[1]]} x', "[1]", '{"generated_ids": {"a": [1]}}'],
)  # fmt: skip
def test_what_is_no_line_raises(line):
    with pytest.raises(ValueError, match=r"."):
        loads_without_ids(line.encode(), "generated_ids")


# -------------------------------------------------------------------------------------------------------------- trees


def test_trees_of_an_interleaved_journal_are_those_of_the_search(original):
    """The reader's trees against `search_utils.Tree`, which the search itself builds."""
    rows = rows_of(sibling(original, "tree.jsonl"))
    order = [(row["data_idx"], row["repeat_idx"]) for row in rows]
    assert any(order[i] != order[i + 1] and order[i] in order[i + 1 :] for i in range(len(order) - 1)), (
        "not interleaved"
    )
    file = TreeFile(sibling(original, "tree.jsonl"))
    assert file.problems == [0, 1, 2, 3]
    for data_idx in file.problems:
        for tree in file.trees(data_idx):
            rounds = [row for row in rows if (row["data_idx"], row["repeat_idx"]) == (data_idx, tree.repeat_idx)]
            expected = Tree(rounds[0]["prompt_ids"], width=4)
            for row in rounds:
                expected.add(Round(**{name: row[name] for name in Round.__dataclass_fields__}))
            assert (tree.beams, tree.parent, tree.finish) == (expected.beams, expected.parent, expected.finish)
            assert tree.length[1:] == [len(tokens) for tokens in expected.tokens[1:]]
            for node in tree.nodes:
                assert tree.path(node) == expected.path(node)
                assert tree.start[node] + tree.length[node] == len(expected.response(node))
            texts = ["", *(text for row in rounds for text in row["text"])]
            leaf = tree.beams[-1]
            assert tree.trace_text(leaf) == "".join(texts[node] for node in tree.path(leaf))
            assert tree.prompt_tokens == len(rounds[0]["prompt_ids"])
            assert tree.is_over


def test_lines_in_any_order_give_the_same_run(run_path):
    lines = run_path.read_text().splitlines(keepends=True)
    before = read_run(run_path, "run").lines
    random.Random(1).shuffle(lines)
    run_path.write_text("".join(lines))
    after = read_run(run_path, "run").lines
    place = {"offset", "size", "line"}
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
    tree_path = sibling(run_path, "tree.jsonl")
    tree_path.write_bytes(tree_path.read_bytes()[:-50])
    assert report.main([str(run_path)]) == 0
    printed = capsys.readouterr().out
    assert "run.jsonl: its last line is torn (a run in progress, or killed) and was left out" in printed
    assert "run: PARTIAL, 11 of 12 searches finished; 4 problems, 2 to 3 repetitions of each" in printed
    assert "the journal's last line is torn" in printed
    assert "1 of 4 problems lack 3 repetitions" in " ".join(printed.split())


def test_a_run_in_progress_shows_its_unfinished_searches(run_path, tmp_path, capsys):
    write_rows(run_path, rows_of(run_path)[:5])  # repetition 0 of all problems, repetition 1 of the first
    tree_path = sibling(run_path, "tree.jsonl")
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


def spoil_tree(change):
    return lambda path: spoil(change)(sibling(path, "tree.jsonl"))


def spoil_meta(text):
    return lambda path: sibling(path, "meta.json").write_text(text)


BAD = {
    "no file": (lambda path: path.unlink(), "no such file; give the --output_path of a run"),
    "empty": (lambda path: path.write_text(""), "no finished search in it yet: the run is in progress; nothing to report"),
    "not JSON": (lambda path: path.write_text("hello\nyou\n"), "line 1 is not a line of a run"),
    "torn inside": (
        lambda path: path.write_bytes(path.read_bytes()[:500] + b"\n" + path.read_bytes()[500:]),
        "line 1 is not a line of a run",
    ),
    "another file": (lambda path: path.write_text('{"question": "?"}\n'), "has no repeat_idx, data_idx, global_idx"),
    "a missing key": (spoil(lambda rows: rows[3].pop("reward")), "line 4 has no reward; is it a run's output file?"),
    "two runs": (spoil(lambda rows: rows.append(rows[0])), "line 13 repeats problem 0, repetition 0 of line 1"),
    "other problems": (spoil(lambda rows: rows[5].update(problem="?")), "different problems under data_idx 1"),
    "another size": (spoil(lambda rows: rows[9].update(global_idx=31)), "in a run of 4 problems"),
    "uneven lists": (spoil(lambda rows: rows[0]["reward"].pop()), "its lists must have one entry a beam"),
    "no beams": (
        spoil(lambda rows: rows[0].update(reward=[], generated_ids=[], generated_scores=[], processed_answer=[])),
        "its lists must have one entry a beam",
    ),
    "NaN": (spoil(lambda rows: rows[0].update(generated_scores=[float("nan")] * 4)), "must be a list of values from 0"),
    "a logit": (spoil(lambda rows: rows[0].update(generated_scores=[1.5] * 4)), "must be a list of values from 0 to 1"),
    "a text number": (spoil(lambda rows: rows[0].update(data_idx="3")), "data_idx is '3', it must be a whole number"),
    "deep JSON": (lambda path: path.write_text('{"a":' + "[" * 100_000 + "\n"), "line 1 is not a line of a run"),
    "the journal": (lambda path: path, "that is a run's journal or settings"),
    "other settings": (spoil_meta('{"format": 7}'), "format 7 is not known; this report.py reads format 1"),
    "broken settings": (spoil_meta("{"), "not a run's settings"),
    "another journal": (
        spoil_tree(lambda rows: [row["tokens"][0].append(5) for row in rows]),
        "the journal is of another run, or not whole",
    ),
    "two journals": (spoil_tree(lambda rows: rows.append(rows[0])), "are both round 0 of problem 0, repetition 0"),
    "a lost round": (
        spoil_tree(lambda rows: rows.pop(next(i for i, row in enumerate(rows) if row["round"] == 1))),
        "a round before it is missing",
    ),
    "a wild parent": (spoil_tree(lambda rows: rows[0].update(parent=[99] * 8)), "a parent is not an earlier node"),
    "a broken journal": (
        lambda path: sibling(path, "tree.jsonl").write_text('{"data_idx": 1}\n'),
        "line 1 is not a round of a search",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_touches_nothing(case, run_path, tmp_path):
    apply, expected = BAD[case]
    apply(run_path)
    out = tmp_path / "out"
    (out / "report_data/assets").mkdir(parents=True)
    (out / "report_data/assets/core.js").write_text("an earlier report")
    given = sibling(run_path, "tree.jsonl") if case == "the journal" else run_path
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
