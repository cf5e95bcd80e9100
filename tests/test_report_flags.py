"""Every flag of report.py at its consumer: what the files that are read, the tokenizer and the written files show of it."""

import json
from types import SimpleNamespace

import pytest
import transformers
from handmade_runs import random_lines, read_data, result, settings, write_run
from parser_flags import flags_of

import report
import report_lib.plots
import report_lib.watch
from common_lib.cli import UserError


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take seconds; `drawn` notes what they are made of."""
    drawn = []
    monkeypatch.setattr(
        report_lib.plots, "write_plots", lambda folder, analyses: drawn.append((folder, analyses)) or []
    )
    return drawn


def table_of(folder):
    return json.loads((folder / "table.json").read_text())


def run_order(tmp_path, monkeypatch, capsys):
    """The first run is what others are compared with; names, files and pages keep the order of the command line."""
    right, wrong = ([result(i, 0, 6, [word], [word == "1"], [0.5]) for i in range(6)] for word in "12")
    paths = [write_run(tmp_path / f"{name}.jsonl", lines) for name, lines in (("z", right), ("a", wrong), ("m", right))]
    assert report.main([*map(str, paths), "--num_blocks", "1", "--out", str(tmp_path / "out")]) == 0
    found = table_of(tmp_path / "out")
    assert [run["run"] for run in found["runs"]] == ["z", "a", "m"]
    assert [(part["one"], part["other"]) for part in found["comparisons"]] == [("z", "a"), ("z", "m")]
    differences = [{row["difference"] for row in part["rows"] if row["basis"] == "N"} for part in found["comparisons"]]
    assert differences == [{1.0}, {0.0}]
    data = [read_data(tmp_path / f"out/report_data/run{i}/p3.js") for i in range(3)]
    assert [part["vote"]["rows"][0]["answer"] for part in data] == ["1", "2", "1"]
    assert [run["name"] for run in read_data(tmp_path / "out/report_data/index.js")["runs"]] == ["z", "a", "m"]


def out(tmp_path, monkeypatch, capsys):
    """All that is written lies there; without the flag nothing is."""
    path = write_run(tmp_path / "run.jsonl", random_lines(0))
    folder = tmp_path / "new/folder"
    assert report.main([str(path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["run.jsonl"]
    printed = capsys.readouterr().out
    assert report.main([str(path), "--out", str(folder)]) == 0
    assert {file.name for file in folder.iterdir()} == {
        "report.html", "report_data", "table.md", "table.csv", "table.json",
    }  # fmt: skip
    assert capsys.readouterr().out.startswith(printed.rstrip())
    assert {file.name for file in tmp_path.iterdir()} == {"run.jsonl", "new"}


def num_blocks(tmp_path, monkeypatch, capsys):
    """N of every run without settings; a run's own settings win, and that is said."""
    bare = write_run(tmp_path / "bare.jsonl", random_lines(1))
    other = write_run(tmp_path / "other.jsonl", random_lines(2))
    known = write_run(tmp_path / "known.jsonl", random_lines(3), meta=settings(6, 4, 3, 3, 1))
    flags = ["--num_blocks", "5", "--out", str(tmp_path / "out")]
    assert report.main([str(bare), str(other), str(known), *flags]) == 0
    found = table_of(tmp_path / "out")
    assert [[row["N"] for row in run["table"]] for run in found["runs"]] == [
        [5, 10, 15, 20], [5, 10, 15, 20], [3, 6, 9, 12],
    ]  # fmt: skip
    assert "known: --num_blocks 5 ignored, the run's settings say 3" in found["runs"][2]["notes"]
    assert not any("--num_blocks" in note for run in found["runs"][:2] for note in run["notes"])
    assert [row["budget"] for row in found["comparisons"][0]["rows"] if row["metric_one"] == "pass1"] == [5, 10, 20]


def tokenizer(tmp_path, monkeypatch, capsys):
    """Named to transformers, and its text, without special tokens and unchanged otherwise, is what the page shows."""
    asked = []

    def decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        asked.append((skip_special_tokens, clean_up_tokenization_spaces))
        return f"text of {list(ids)}"

    def load(name):
        asked.append(name)
        return SimpleNamespace(decode=decode)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    lines = [result(0, 0, 1, ["1", "2"], [True, False], [0.5, 0.4], generated_ids=[[7, 8], [9]])]
    path = write_run(tmp_path / "run.jsonl", lines)
    assert report.main([str(path), "--tokenizer", "some/name", "--out", str(tmp_path / "out")]) == 0
    assert asked == ["some/name", (True, False), (True, False)]
    data = tmp_path / "out/report_data/run0"
    assert read_data(data / "p0-text0.js") == [["", "text of [7, 8]", "text of [9]"]]
    assert read_data(data / "p0.js")["searches"][0]["ids"] is False
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert read_data(data / "p0-text0.js") == [["", "7 8", "9"]]
    assert read_data(data / "p0.js")["searches"][0]["ids"] is True


def regrade(tmp_path, monkeypatch, capsys):
    """Writes that file and no report."""
    lines = [result(0, 0, 1, ["1", "1"], [False, True], [0.5, 0.5])]
    path, new = write_run(tmp_path / "run.jsonl", lines), tmp_path / "graded.jsonl"
    assert report.main([str(path), "--regrade", str(new)]) == 0
    assert json.loads(new.read_text())["reward"] == [True, True]
    assert json.loads(path.read_text())["reward"] == [False, True]
    assert "1 of 2 rewards changed (1 now right, 0 now wrong)" in capsys.readouterr().out


def watch(tmp_path, monkeypatch, capsys):
    """The page is a live one; as no search is missing, it is renewed no more."""
    path, out = write_run(tmp_path / "run.jsonl", random_lines(0)), tmp_path / "out"
    monkeypatch.setattr(report_lib.watch.time, "sleep", lambda seconds: None)
    assert report.main([str(path), "--watch", "--out", str(out)]) == 0
    assert "pass@1" in capsys.readouterr().out
    version = read_data(out / "report_data/index.js")["live"]
    assert read_data(out / "report_data/live.js") == {"version": version, "state": "finished"}
    assert report.main([str(path), "--out", str(out)]) == 0
    assert "live" not in read_data(out / "report_data/index.js")
    assert not (out / "report_data/live.js").exists()
    with pytest.raises(UserError, match="--watch renews a page; give its folder by --out"):
        report.main([str(path), "--watch"])


def all_rows(tmp_path, monkeypatch, capsys):
    """The terminal has a row for every number of repetitions, and every budget and metric of a comparison."""
    paths = [write_run(tmp_path / f"{i}.jsonl", random_lines(i, repetitions=7)) for i in range(2)]
    arguments = [*map(str, paths), "--num_blocks", "5"]
    found = []
    for flags in ([], ["--all_rows"], ["--all_rows", "--out", str(tmp_path / "out")]):
        assert report.main([*arguments, *flags]) == 0
        printed = capsys.readouterr().out
        accuracy = printed.partition("Accuracy, %: 0\n")[2].partition("\n\n")[0]
        rows = [int(words[1]) for words in map(str.split, accuracy.splitlines()[1:]) if words[1].isdigit()]
        comparison = printed.partition("0 against 1: accuracy")[2].partition("Half-width")[0]
        found.append((rows, "pass@k" in comparison, "Left out here" in printed, "budgets are shown" in printed))
    assert found[0] == ([1, 2, 4, 7], True, True, True)  # pass@k is named as left out
    assert found[1] == found[2] == ([1, 2, 3, 4, 5, 6, 7], True, False, False)


def what_if(tmp_path, monkeypatch, capsys):
    """The tables, what_if.csv and table.json have replayed policies; without the flag nothing has. It is refused in one
    line before anything is written."""
    path, out = write_run(tmp_path / "run.jsonl", random_lines(0)), tmp_path / "out"
    assert report.main([str(path), "--what_if", "--out", str(out)]) == 0
    assert "What if, exploratory: run, 4 repetitions" in capsys.readouterr().out
    assert len((out / "what_if.csv").read_text().splitlines()) == 1 + len(table_of(out)["runs"][0]["what_if"]) == 35
    answers = read_data(out / "report_data/index.js")["answers"]
    assert [part["title"] for part in answers][1] == "What if run had been stopped earlier?"
    assert report.main([str(path), "--out", str(out)]) == 0
    assert "What if" not in capsys.readouterr().out
    assert "what_if" not in table_of(out)["runs"][0] and not (out / "what_if.csv").exists()
    other = write_run(tmp_path / "other.jsonl", random_lines(1))
    with pytest.raises(UserError, match="--what_if replays one run, and 2 are given"):
        report.main([str(path), str(other), "--what_if", "--out", str(tmp_path / "new")])
    for flags in (["--watch", "--out", str(tmp_path / "new")], ["--regrade", str(tmp_path / "graded.jsonl")]):
        with pytest.raises(UserError, match="--what_if takes a finished run as it is, without --watch or --regrade"):
            report.main([str(path), "--what_if", *flags])
    assert not (tmp_path / "new").exists()


def policy(tmp_path, monkeypatch, capsys):
    """Each is chosen beforehand, in this order; all others are exploratory."""
    path, out = write_run(tmp_path / "run.jsonl", random_lines(0)), tmp_path / "out"
    flags = ["--policy", "weighted:3", "--policy", "majority:certified:0.3@3"]
    assert report.main([str(path), "--what_if", *flags, "--out", str(out)]) == 0
    assert "Chosen beforehand (--policy): weighted:3, majority:certified:0.3@3." in " ".join(
        capsys.readouterr().out.split()
    )
    rows = table_of(out)["runs"][0]["what_if"]
    assert [row["policy"] for row in rows if row["chosen"]] == ["weighted:3", "majority:certified:0.3@3"]
    for wrong, words in (
        (["--policy", "weighted"], "--policy is of --what_if; give that too"),
        (["--what_if", "--policy", "weighted:5"], "--policy weighted:5: the run has 4 repetitions of each problem"),
        (["--what_if", "--policy", "weighted:soon"], "--policy weighted:soon: there is no stop 'soon'; give VOTE"),
    ):
        with pytest.raises(UserError, match=words):
            report.main([str(path), *wrong])


FLAGS = {
    "runs": run_order, "out": out, "num_blocks": num_blocks, "tokenizer": tokenizer, "all_rows": all_rows,
    "regrade": regrade, "watch": watch, "what_if": what_if, "policy": policy,
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_reaches_its_consumer(flag, tmp_path, monkeypatch, capsys):
    FLAGS[flag](tmp_path, monkeypatch, capsys)


def test_the_table_names_every_flag(monkeypatch):
    assert flags_of(report.main, monkeypatch) == set(FLAGS)


# ---------------------------------------------------------------------------------------------------------------------
# What main does with them


def test_plots_are_drawn_of_all_runs_into_the_folder(tmp_path, no_plots):
    paths = [write_run(tmp_path / f"{name}.jsonl", random_lines(i)) for i, name in enumerate("ab")]
    assert report.main([*map(str, paths), "--out", str(tmp_path / "out")]) == 0
    ((folder, analyses),) = no_plots
    assert (folder, [analysis.run.name for analysis in analyses]) == (tmp_path / "out", ["a", "b"])


def test_every_run_must_share_a_problem_with_the_first_and_nothing_is_written_before(tmp_path):
    lines = [line | {"problem": f"another {line['data_idx']}"} for line in random_lines(2)]
    paths = [write_run(tmp_path / f"{i}.jsonl", random_lines(i)) for i in range(2)]
    strange = write_run(tmp_path / "strange.jsonl", lines)
    with pytest.raises(UserError, match="0.jsonl and .*strange.jsonl have no problem in common"):
        report.main([*map(str, paths), str(strange), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_report_that_fails_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    path, folder = write_run(tmp_path / "run.jsonl", random_lines(0)), tmp_path / "out"
    assert report.main([str(path), "--out", str(folder)]) == 0
    before = {file: file.read_bytes() for file in (folder / "report_data").rglob("*.js")}
    other = write_run(tmp_path / "other.jsonl", random_lines(9))

    def fail(folder, analyses):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_lib.plots, "write_plots", fail)
    with pytest.raises(KeyboardInterrupt):
        report.main([str(other), "--out", str(folder)])
    assert {file: file.read_bytes() for file in (folder / "report_data").rglob("*.js")} == before
    assert not (folder / "report_data.part").exists()
    monkeypatch.setattr(report_lib.plots, "write_plots", lambda folder, analyses: [])
    assert report.main([str(other), "--out", str(folder)]) == 0
    assert read_data(folder / "report_data/index.js")["runs"][0]["name"] == "other"
    assert not (folder / "report_data/run1").exists()


def test_the_terminal_is_brief(tmp_path, capsys):
    """Of a comparison it shows the votes at the extreme budgets; the files have every metric at each."""
    paths = [write_run(tmp_path / f"{i}.jsonl", random_lines(i)) for i in range(2)]
    assert report.main([*map(str, paths), "--num_blocks", "5", "--out", str(tmp_path / "out")]) == 0
    printed, written = capsys.readouterr().out, (tmp_path / "out/table.md").read_text()
    comparison = "0 against 1: accuracy"
    shown, whole = (
        text.partition(comparison)[2].partition("Half-width from repeat noise")[0] for text in (printed, written)
    )
    for budget, words, brief in (
        ("5", "weighted", 1),
        ("10", "weighted", 0),
        ("20", "majority", 1),
        ("20", "pass@k", 0),
    ):
        in_terminal = sum(line.split()[1:3] == [budget, words] for line in shown.splitlines())
        in_file = sum(line.split()[3:6:2] == [budget, words] for line in whole.splitlines())
        assert (in_terminal, in_file) == (brief, 1), (budget, words)


def test_a_pipe_that_is_closed_early_is_no_error(tmp_path, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

        def fileno(self):
            return spare.fileno()

    path = write_run(tmp_path / "run.jsonl", random_lines(0))
    with (tmp_path / "spare").open("w") as spare:
        monkeypatch.setattr("sys.stdout", Closed())
        assert report.main([str(path)]) == 0
        monkeypatch.undo()
