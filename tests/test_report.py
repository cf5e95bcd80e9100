"""What a report says: tables, plots, the released code's files, regrading, and the memory that it takes."""

import csv
import json
import subprocess
import sys

import kill_test
import pytest
import tiny
from conftest import ROOT
from synthetic_runs import make_pair, make_run, rows_of, write_rows

import inference_eval
import report
from common_lib.cli import UserError
from eval_lib.grading import Grader
from eval_lib.summary import summarize
from eval_utils import problem_classes
from report_lib.plots import LINES, RUN_LINES
from search_lib.run_reader import RunPaths


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pruned run and the baseline on the same problems, both reported together; (folder, vgs path, bon path)."""
    folder = tmp_path_factory.mktemp("runs")
    vgs, bon = make_pair(folder)
    assert report.main([str(vgs), str(bon), "--out", str(folder / "out")]) == 0
    return folder, vgs, bon


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_are_those_of_the_plain_summary(runs):
    """All figures of table.json and table.csv against `summarize` on the file as `json` reads it."""
    folder, vgs, _ = runs
    rows = rows_of(vgs)
    with Grader() as grader:
        expected = summarize(rows, 8, problem_classes(rows, grader))
    table = json.loads((folder / "out/table.json").read_text())["runs"][0]["table"]
    assert len(table) == 4
    for row, want in zip(table, expected, strict=True):
        assert {key: row[key] for key in want} == want
    with (folder / "out/table.csv").open() as file:
        written = [row for row in csv.DictReader(file) if row["run"] == "vgs"]
    assert [float(row["wmaj_m"]) for row in written] == [row["wmaj_m"] for row in expected]
    markdown = (folder / "out/table.md").read_text()
    assert f"{100 * expected[-1]['wmaj_m']:.1f} ±{100 * expected[-1]['wmaj_ci']:.1f}" in markdown
    assert "repeat noise" in markdown


def test_the_terminal_table_names_everything(runs, capsys):
    _, vgs, bon = runs
    assert report.main([str(vgs), str(bon)]) == 0
    printed = capsys.readouterr().out
    for words in ("pass@1", "pass@k", "best-of-N", "majority", "weighted", "clustered by problem", "repeat noise only",
                  "FLOPs", "Kaplan et al. 2020", "decode", "prefill", "value model", "wall-clock 14,400 s", "per second",
                  "vgs against bon", "under search, biased", "no selection by value: unbiased", "weighted / majority",
                  "of 24 searches a rejected, finished candidate was right"):  # fmt: skip
        assert words in printed.replace("\n", " "), words
    assert max(map(len, printed.splitlines())) <= 100


# ---------------------------------------------------------------------------------------------------------------- plots


def test_every_plot_is_there_twice_with_labels(runs):
    folder, _, _ = runs
    names = {path.stem for path in (folder / "out").glob("*.png") if not path.stem.endswith("_narrow")}
    assert names == {path.stem for path in (folder / "out").glob("*.svg")}
    assert names == {"accuracy_n", "accuracy_tokens", "accuracy_flops", "comparison", "reliability_block_1",
                     "reliability_length_1", "reliability_length_2", "value_trace", "time", "difference", "clones"}  # fmt: skip
    for path in (folder / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    # matplotlib keeps each drawn text as a comment in the SVG
    assert "tokens generated per problem" in (folder / "out/accuracy_tokens.svg").read_text()
    assert "under search, biased" in (folder / "out/value_trace.svg").read_text()


@pytest.mark.parametrize("styles", [list(LINES.values()), RUN_LINES])
def test_lines_differ_without_their_colour(styles):
    assert len({str(dash) for _, dash, _ in styles}) == len(styles)
    assert len({marker for _, _, marker in styles}) == len(styles)


# -------------------------------------------------------------------------------------------- the released code's files


def test_the_released_codes_files(tmp_path, capsys):
    path = make_run(tmp_path, "released", released=True)
    assert set(rows_of(path)[0]) == {"repeat_idx", "data_idx", "global_idx", "problem", "gt_answer", "generated_ids",
                                     "generated_scores", "processed_answer", "reward", "dt"}  # fmt: skip
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in ("no settings beside it", "budget N is not known", "no journal", "settings unknown"):
        assert words in printed
    table = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]["table"]
    assert [row["N"] for row in table] == [None] * 4
    assert {row[key] for row in table for key in ("flops", "tokens_generated", "truncated")} == {None}
    ids = rows_of(path)[0]["generated_ids"][1]
    text = (tmp_path / "out/report_data/run0/p0-text0.js").read_text()
    assert " ".join(map(str, ids)) in text
    assert report.main([str(path), "--num_blocks", "8"]) == 0
    assert "budget N is not known" not in capsys.readouterr().out


def test_released_files_show_text_with_a_tokenizer(tmp_path):
    path = make_run(tmp_path, "released", released=True, problems=1, repetitions=1)
    rows = rows_of(path)
    rows[0]["generated_ids"] = [tiny.tiny_tokenizer()(f"beam {i} </think> é").input_ids for i in range(4)]
    write_rows(path, rows)
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert report.main([str(path), *flags]) == 0
    data = (tmp_path / "out/report_data/run0/p0-text0.js").read_text()
    assert "beam 3 \\u003c/think> \\u00e9" in data


def test_files_of_the_search_script(tmp_path, capsys):
    """End to end with tiny models: the search's own table and the report's are one; the tree file is whole."""
    inputs = kill_test.make_inputs(tmp_path, problems=2)
    output = tmp_path / "run.jsonl"
    assert inference_eval.main([*inputs, "--engine", "transformers", "--output_path", str(output)]) == 0
    printed = capsys.readouterr().out
    assert report.main([str(output), "--out", str(tmp_path / "out")]) == 0
    reported = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.strip().startswith(("8 ", "16 ", "24 "))]
    assert len(table) >= 3
    assert all(line in reported for line in table)
    data = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]
    assert (data["partial"], data["searches"]) == (False, 6)
    assert all(row["flops"] > 0 for row in data["table"])
    assert data["wall_clock_seconds"] > 0
    assert not [note for note in data["notes"] if "no FLOPs" in note or "journal" in note]


# ------------------------------------------------------------------------------------------------------------ regrading


def test_regrading_mends_rewards_and_leaves_samples_alone(runs, tmp_path, capsys):
    _, vgs, _ = runs
    spoilt = tmp_path / "spoilt.jsonl"
    rows = rows_of(vgs)
    rows[3]["reward"][1] = not rows[3]["reward"][1]
    rows[5]["processed_answer"][0], rows[5]["reward"][0] = "77777", False
    write_rows(spoilt, rows)
    there, here = RunPaths.of(vgs), RunPaths.of(spoilt)
    here.meta.write_bytes(there.meta.read_bytes())
    here.tree.write_bytes(there.tree.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert report.main([str(spoilt), "--regrade", str(tmp_path / "new.jsonl")]) == 0
    printed = capsys.readouterr().out
    truth = rows_of(vgs)
    changed = sum(a != b for new, old in zip(truth, rows, strict=True)
                  for a, b in zip(new["reward"], old["reward"], strict=True))  # fmt: skip
    assert f"{changed} of 96 rewards changed" in printed
    assert "problem 3, repetition 0, beam 1" in printed
    assert rows_of(tmp_path / "new.jsonl") == truth
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="never overwritten, give a new name"):
        report.main([str(spoilt), "--regrade", str(tmp_path / "new.jsonl")])
    assert report.main([str(tmp_path / "new.jsonl")]) == 0  # with the samples' journal
    assert "no journal" not in capsys.readouterr().out


def test_regrading_without_a_journal_grades_the_stored_answers(tmp_path, capsys):
    path = make_run(tmp_path, "released", released=True)
    rows = rows_of(path)
    good = [row["reward"] for row in rows]
    for row in rows:
        row["reward"] = [False] * len(row["reward"])
    write_rows(path, rows)
    assert report.main([str(path), "--regrade", str(tmp_path / "new.jsonl")]) == 0
    assert [row["reward"] for row in rows_of(tmp_path / "new.jsonl")] == good
    printed = capsys.readouterr().out
    assert f"{sum(map(sum, good))} of 96 rewards changed ({sum(map(sum, good))} now right, 0 now wrong)" in printed
    assert "as stored (no journal" in printed


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_a_large_run_is_reported_in_bounded_memory(tmp_path):
    """Traces of 16k tokens, 8 candidates, 16 repetitions (110 MB): far less memory than the files have."""
    path = make_run(tmp_path, "large", problems=4, repetitions=16, max_length=16_384, block_size=4096)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 80e6
    code = (  # VmHWM: the peak of this program alone, where ru_maxrss would inherit that of its parent
        f"import report; report.main([{str(path)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout.split()[-1]) * 1024 < 300e6
    largest = max(file.stat().st_size for file in (tmp_path / "out/report_data/run0").iterdir())
    assert largest < 6e6
