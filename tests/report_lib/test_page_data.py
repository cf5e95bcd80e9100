"""The page's data files against the run's own: trees, verdicts, texts in parts, and what the list says."""

import json

import pytest
from handmade_runs import journal_row, read_data, result, settings, write_run
from synthetic_runs import make_run, rows_of

import report
from report_lib import page
from report_lib.data import read_run
from search_lib.run_reader import RunPaths


def write_report(out, *paths, decode=None):
    report.write_report(
        out, [read_run(path, path.stem) for path in paths], decode, lambda folder, analyses: []
    )  # fmt: skip
    return out / "report_data"


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), early_stop=0.2, problems=4, repetitions=3)


def check_search(data, texts, line, rows, truth):
    """One search of a data file against its lines."""

    def column(name):
        return [value for row in rows for value in row[name]]

    assert (data["over"], data["flat"], data["ids"]) == (True, False, False)
    assert data["parent"] == [-1, *column("parent")]
    assert data["round"] == [-1, *(row["round"] for row in rows for _ in row["parent"])]
    assert data["length"] == [0, *map(len, column("tokens"))]
    assert data["value"] == pytest.approx([0.0, *column("value")], abs=6e-6)
    assert data["kept"] == [1, *map(int, column("kept"))]
    assert data["finish"] == ["", *column("finish")]
    assert texts == ["", *column("text")]
    ends = [data["start"][node] + data["length"][node] for node in range(len(data["parent"]))]
    assert data["start"] == [0, *(ends[parent] for parent in data["parent"][1:])]
    assert [data["value"][node] for node in data["beams"]] == pytest.approx(line["generated_scores"], abs=6e-6)
    assert [ends[node] for node in data["beams"]] == list(map(len, line["generated_ids"]))
    finished = [node for node, finish in enumerate(data["finish"]) if finish]
    assert sorted(map(int, data["graded"])) == finished
    for node in finished:
        box = texts[node].rpartition("\\boxed{")[2].rstrip("}") if "\\boxed{" in texts[node] else ""
        assert data["graded"][str(node)] == [box, int(box == truth)]


@pytest.mark.parametrize("part_characters", [1, 3_000_000])
def test_trees_verdicts_and_texts_are_those_of_the_run(run_path, tmp_path, monkeypatch, part_characters):
    """With parts as small as can be there is a file of text for each search, and it is found again."""
    monkeypatch.setattr(page, "PART_CHARACTERS", part_characters)
    data = write_report(tmp_path / "out", run_path)
    rounds = rows_of(RunPaths.of(run_path).tree)
    assert len(list((data / "run0").glob("*-text*.js"))) == (12 if part_characters == 1 else 4)
    for line in rows_of(run_path):
        found = read_data(data / f"run0/p{line['data_idx']}.js")
        assert (found["id"], found["problem"], found["truth"]) == (line["data_idx"], line["problem"], line["gt_answer"])
        assert [search["repeat"] for search in found["searches"]] == [0, 1, 2]
        search = found["searches"][line["repeat_idx"]]
        texts = read_data(data / f"{search['texts']}.js")[search["at"]]
        mine = [r for r in rounds if (r["data_idx"], r["repeat_idx"]) == (line["data_idx"], line["repeat_idx"])]
        check_search(search, texts, line, mine, line["gt_answer"])


def test_the_index_has_the_list_the_tables_and_what_each_run_was(run_path, tmp_path):
    other = make_run(tmp_path, "bon", search_type="bon", problems=4, repetitions=2)
    data = write_report(tmp_path / "out", run_path, other)
    index, table = read_data(data / "index.js"), json.loads((tmp_path / "out/table.json").read_text())
    assert [run["problems"] for run in index["runs"]] == [run["problems"] for run in table["runs"]]
    assert [run["folder"] for run in index["runs"]] == ["run0", "run1"]
    assert [table["title"].rpartition(": ")[2] for table in index["tables"][:2]] == ["run", "bon"]
    settings_of = [dict(run["settings"]) for run in index["runs"]]
    assert [(s["search_type"], s["num_repetitions"], s["searches"]) for s in settings_of] == [
        ("beam2", "3", "12 of 12"), ("bon", "2", "8 of 8"),
    ]  # fmt: skip
    assert settings_of[0]["file"] == str(run_path)
    assert (settings_of[0]["generator"], settings_of[0]["value model"]) == ("synthetic-3584", "synthetic-1536")
    assert settings_of[0]["seed"] == "0"
    for i, path in enumerate((run_path, other)):
        line = rows_of(path)[1]
        page_of = read_data(data / f"run{i}/p1.js")
        assert [page_of["searches"][0]["value"][node] for node in page_of["searches"][0]["beams"]] == pytest.approx(
            line["generated_scores"], abs=6e-6
        )


def test_the_list_counts_tokens_and_how_beams_ended(tmp_path):
    """The counts of all repetitions; None where a line does not tell."""
    lines = [
        result(0, 0, 2, ["1", ""], [True, False], [0.5, 0.25], finish_reasons=["stop", "length"], tokens_generated=50),
        result(
            0, 1, 2, ["2", "1"], [False, True], [1.0, 0.25], finish_reasons=["length", "length"], tokens_generated=70
        ),
        result(1, 0, 2, ["", ""], [False, False], [0.0, 0.0], generated_ids=[[1] * 3, [1] * 4]),
    ]
    write_report(tmp_path / "out", write_run(tmp_path / "run.jsonl", lines))
    first, second = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]["problems"]
    assert {key: first[key] for key in ("tokens", "truncated", "empty", "searches", "vote", "any", "pass1", "value")} == {
        "tokens": 120, "truncated": 0.75, "empty": 0.25, "searches": 2, "vote": "2", "any": True, "pass1": 0.5, "value": 0.5,
    }  # fmt: skip
    assert first["margin"] == pytest.approx((1.0 - 0.75) / 1.75)
    assert (second["tokens"], second["truncated"], second["rescued"]) == (None, None, None)
    assert (second["vote"], second["margin"], second["any"]) == ("", 0.0, False)
    assert (second["maj"], second["wmaj"], second["bon"]) == (0.0, 0.0, 0.0)
    assert second["disagreement"] == 0.0  # two beams without an answer do not differ


def test_where_all_values_are_0_the_list_shows_the_answer_that_won(tmp_path):
    """By count, as the vote does, with its own verdict, and its margin."""
    lines = [
        result(0, 0, 1, ["7", "1", "1", ""], [False, True, True, False], [0.0] * 4),
        result(0, 1, 1, ["8", "8", "1", "7"], [False, False, True, False], [0.0] * 4),
    ]
    write_report(tmp_path / "out", write_run(tmp_path / "run.jsonl", lines))
    (row,) = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]["problems"]
    assert (row["vote"], row["wmaj"], row["maj"]) == ("1", 1.0, 1.0)
    assert row["margin"] == pytest.approx((3 - 2) / 7)


def test_a_search_that_the_journal_lacks_leaves_open_what_was_rejected(tmp_path):
    """In the list, the table and its JSON: not 0, and none of it where only the journals of some problems are whole."""
    more = {"generated_ids": [[5] * 4], "finish_reasons": ["stop"]}
    lines = [result(i, r, 2, ["2"], [False], [0.5], **more) for i, r in ((0, 0), (0, 1), (1, 0), (1, 1))]
    journal = [
        journal_row(i, r, 0, [0, 0], [4, 4], [0.5, 0.25], [1, 0], ["stop", "stop"], ["\\boxed{2}", "\\boxed{1}"])
        for i, r in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    found = {}
    for name, rows in (("whole", journal), ("part", journal[:3]), ("none", [])):
        path = write_run(tmp_path / f"{name}.jsonl", lines, rows, settings(2, 2, 2, 1, 2))
        write_report(tmp_path / name, path)
        found[name] = json.loads((tmp_path / name / "table.json").read_text())["runs"][0]
    key = "searches_rescuable_by_a_rejected_candidate"
    assert {name: ([row["rescued"] for row in run["problems"]], run[key]) for name, run in found.items()} == {
        "whole": ([2, 2], 4), "part": ([2, None], None), "none": ([None, None], None),
    }  # fmt: skip


def test_a_long_answer_and_a_long_problem_are_cut_where_they_are_listed(tmp_path):
    answer, text = "9" * 5000, "p" * 5000
    lines = [result(0, 0, 1, [answer], [True], [0.5]) | {"gt_answer": answer, "problem": text}]
    data = write_report(tmp_path / "out", write_run(tmp_path / "run.jsonl", lines))
    row = read_data(data / "index.js")["runs"][0]["problems"][0]
    assert (len(row["problem"]), len(row["truth"]), len(row["vote"])) == (400, 200, 200)
    found = read_data(data / "run0/p0.js")
    assert (len(found["truth"]), len(found["vote"]["rows"][0]["answer"]), len(found["problem"])) == (1000, 1000, 5000)
    assert len(found["searches"][0]["graded"]["1"][0]) == 1000


def test_a_search_under_way_has_its_tree_and_no_vote(tmp_path):
    """Beside a finished one; its finished, rejected candidate is graded, and shares the numbering of the classes."""
    lines = [result(0, 0, 1, ["1"], [True], [0.5], generated_ids=[[5] * 4], finish_reasons=["stop"])]
    journal = [
        journal_row(0, 0, 0, [0, 0], [4, 4], [0.5, 0.25], [1, 0], ["stop", ""], ["\\boxed{1}", "x"]),
        journal_row(0, 1, 0, [0, 0], [4, 4], [0.5, 0.25], [1, 0], ["", "stop"], ["y", "\\boxed{01}"]),
    ]
    path = write_run(tmp_path / "run.jsonl", lines, journal, settings(1, 2, 2, 1, 2))
    data = read_data(write_report(tmp_path / "out", path) / "run0/p0.js")
    done, under_way = data["searches"]
    assert (done["over"], under_way["over"], under_way["vote"], under_way["beams"]) == (True, False, None, [])
    assert under_way["graded"] == {"2": ["01", 1]}
    assert data["vote"]["beams"] == 1


def test_what_is_not_a_number_never_reaches_the_page(tmp_path):
    """JSON has no NaN: the prompt, which has no value, is written as 0."""
    path = write_run(tmp_path / "run.jsonl", [result(0, 0, 1, ["1"], [True], [0.5])])
    data = write_report(tmp_path / "out", path)
    for file in data.rglob("*.js"):
        if "assets" not in file.parts:
            json.dumps(read_data(file), allow_nan=False)
    assert "NaN" not in (tmp_path / "out/table.json").read_text()
