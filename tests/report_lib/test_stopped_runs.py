"""A report of a run whose problems were stopped early: nothing that stopping would bias, and comparisons at equal tokens."""

import csv
import json
import shutil

import numpy as np
import pytest
from handmade_runs import journal_row, random_lines, settings, write_run
from synthetic_runs import analysis_of

from eval_lib.intervals import paired_difference
from eval_utils import weighted_vote
from report_lib.answer import run_answer
from report_lib.compare import compare, metric_pairs, vote_of
from report_lib.plots import STYLE, accuracy_figure, budget_of, comparison_figure, plt
from report_lib.regrade import regrade
from report_lib.tables import comparison_cells, terminal_text, write_tables

PROBLEMS, REPETITIONS = 6, 4
STOPPED = {0: 2, 2: 3, 5: 2}
SPENT = {"generated": 60, "scored": 0}


def lines_of(seed):
    return [
        line | {"tokens_generated": 10 + 3 * line["data_idx"] + line["repeat_idx"], "finish_reasons": ["stop"] * 3}
        for line in random_lines(seed, PROBLEMS, REPETITIONS)
    ]


def make(folder, name, seed, stopped=None, vote="weighted", spent=SPENT, search_type="beam2"):
    lines = [line for line in lines_of(seed) if line["repeat_idx"] < (stopped or {}).get(line["data_idx"], REPETITIONS)]
    arguments = {"stop": "certified", "stop_vote": vote, "alpha": 0.2} if stopped else {}
    meta = settings(PROBLEMS, REPETITIONS, 4, 3, 2, **arguments) | {"num_problems": PROBLEMS}
    meta["arguments"]["search_type"] = search_type
    if stopped:
        meta["stopped"] = {str(i): T for i, T in stopped.items()}
        meta["stopped_by"] = {str(i): "certified" for i in stopped}
        meta["tokens_uncounted"] = spent
    return write_run(folder / f"{name}.jsonl", lines, meta=meta)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that stopped, and one on the same problems that did not."""
    folder = tmp_path_factory.mktemp("stopped")
    make(folder, "stopped", 1, STOPPED)
    make(folder, "full", 2)
    make(folder, "by_count", 3, STOPPED, "majority")
    return folder


@pytest.fixture(scope="module")
def analyses(folder):
    return {name: analysis_of(folder / f"{name}.jsonl") for name in ("stopped", "full", "by_count")}


def used(i, m):
    return min(m, STOPPED.get(i, REPETITIONS))


def score(seed, i, count):
    mine = [line for line in lines_of(seed) if line["data_idx"] == i and line["repeat_idx"] < count]
    answers, rewards, scores = (
        [x for line in mine for x in line[k]] for k in ("processed_answer", "reward", "generated_scores")
    )
    return weighted_vote([{"": -1, "2": 2, "02": 2, "3": 3}.get(a, 1) for a in answers], rewards, scores)


def test_rows_tables_and_files(folder, analyses):
    runs, out = [analyses["full"], analyses["stopped"]], folder / "out"
    out.mkdir()
    comparisons = [compare(*runs)]
    write_tables(out, runs, comparisons)
    printed = terminal_text(runs, comparisons, all_rows=True)
    words = " ".join(printed.split())
    assert "--stop certified, alpha 0.2, weighted vote, at most 4 repetitions" in words
    assert "Decided votes: stopped" in words and "Half-width from repeat noise only, %, as released: full" in words
    assert "as released: stopped" not in words and "FLOPs of one problem" not in words
    data = json.loads((out / "table.json").read_text())["runs"]
    assert data[0]["stopped"] is None and data[1]["stopped"]["kinds"]["certified"]["problems"] == 3
    rows = [row for row in csv.DictReader((out / "table.csv").open()) if row["run"] == "stopped"]
    assert [float(row["wmaj_m"]) for row in rows] == pytest.approx(
        [np.mean([score(1, i, used(i, m)) for i in range(PROBLEMS)]) for m in range(1, 5)]
    )
    assert [row["pass1_m"] == "" for row in rows] == [False, False, True, True]
    assert float(rows[3]["repetitions_m"]) == pytest.approx(sum(used(i, 4) for i in range(PROBLEMS)) / PROBLEMS)
    plain = [row for row in csv.DictReader((out / "table.csv").open()) if row["run"] == "full"]
    assert plain[0]["saved_m"] == "" and plain[3]["pass1_m"] != ""


def test_the_first_screen_is_about_the_vote_that_decided(analyses):
    answer = run_answer(analyses["stopped"])
    sentence, repetitions, tokens = answer.sentences
    assert repetitions == "19 of 24 repetitions count (20.8% saved)." and tokens.startswith(
        "Tokens generated: counted "
    )
    assert answer.chosen.startswith("Chosen beforehand: the weighted vote, by which problems are stopped; 6 problems, ")
    assert "by which" not in run_answer(analyses["full"]).chosen and len(run_answer(analyses["full"]).sentences) == 1
    at_last = np.mean([score(1, i, used(i, 4)) for i in range(PROBLEMS)])
    assert sentence.startswith(
        f"The weighted vote (N = 16, at most 4 repetitions, 3.2 on average) is right on {at_last:.1%}"
    )
    assert "majority" not in sentence and "pass@1" not in sentence and sentence.endswith(".") and ": ." not in sentence
    assert run_answer(analyses["by_count"]).sentences[0].startswith("The majority vote")


def test_a_comparison_is_at_equal_tokens_only(analyses):
    """Of the stopped run, tokens of each problem's first min(m, T) repetitions, and what was spent in vain in proportion."""
    one, other = analyses["stopped"], analyses["full"]
    found = compare(one, other)
    assert {row["basis"] for row in found["rows"]} == {"tokens"}
    assert "equal N and FLOPs: stopped stopped problems early" in found["missing"][0]
    tokens = {i: [10 + 3 * i + r for r in range(REPETITIONS)] for i in range(PROBLEMS)}
    counted = sum(sum(tokens[i][: used(i, 4)]) for i in tokens)
    curve = [(1 + 60 / counted) * np.mean([sum(tokens[i][: used(i, m)]) for i in tokens]) for m in range(1, 5)]
    of_full = [m * np.mean([np.mean(tokens[i]) for i in tokens]) for m in range(1, 5)]
    budgets = sorted({row["budget"] for row in found["rows"]})
    assert (budgets[0], budgets[-1]) == pytest.approx((max(curve[0], of_full[0]), min(curve[-1], of_full[-1])))
    assert f"tokens of stopped include {60 / counted:.1%} more for searches that do not count" in found["note"]
    for row in found["rows"]:
        assert (row["metric_one"], row["metric_other"]) == ("wmaj", "wmaj")
        assert np.interp(row["pooled_one"], range(1, 5), curve) == pytest.approx(row["budget"])
        assert np.interp(row["pooled_other"], range(1, 5), of_full) == pytest.approx(row["budget"])
        first = {
            i: float(np.interp(row["pooled_one"], range(1, 5), [score(1, i, used(i, m)) for m in range(1, 5)]))
            for i in range(PROBLEMS)
        }
        assert row["one"] == pytest.approx(np.mean(list(first.values())))
        second = {i: float(np.interp(row["pooled_other"], range(1, 5), other.scores[i]["wmaj"])) for i in first}
        assert row["difference"] == pytest.approx(paired_difference(first, second)["difference"])
        assert comparison_cells(row)[0] == "tokens"
    assert compare(other, one)["rows"][-1]["difference"] == pytest.approx(-found["rows"][-1]["difference"])


def test_votes_that_are_compared_with_a_stopped_run(analyses):
    stopped, full, by_count = (analyses[name].run for name in ("stopped", "full", "by_count"))
    assert vote_of(by_count) == "maj" and vote_of(stopped) == vote_of(full) == "wmaj"
    assert metric_pairs(stopped, by_count) == [("wmaj", "maj")]
    assert metric_pairs(full, by_count) == [("wmaj", "maj"), ("maj", "maj")]
    assert metric_pairs(by_count, full) == [("maj", "wmaj"), ("maj", "maj")]
    assert compare(analyses["stopped"], analyses["by_count"])["rows"]


def test_without_token_counts_a_stopped_run_is_not_compared(analyses, tmp_path):
    lines = [{k: v for k, v in line.items() if k != "tokens_generated"} for line in lines_of(2)]
    other = analysis_of(write_run(tmp_path / "old.jsonl", lines, meta=settings(PROBLEMS, REPETITIONS, 4, 3, 2)))
    found = compare(analyses["stopped"], other)
    assert found["rows"] == [] and "tokens are not known of both runs" in found["missing"]


def test_what_does_not_count_is_not_shown_and_values_are_judged_by_what_every_problem_has(folder):
    """Problem 0 stopped at 2: its third search is in the journal, whole or not, and does not count."""
    lines = [
        line | {"generated_ids": [[5, 5]] * 3}
        for line in lines_of(1)
        if line["repeat_idx"] < STOPPED.get(line["data_idx"], 4)
    ]
    searches = [(line["data_idx"], line["repeat_idx"], line["generated_scores"]) for line in lines] + [
        (0, 2, [0.5] * 3)
    ]
    journal = [
        journal_row(i, r, 0, [0] * 3, [2] * 3, values, [1] * 3, ["stop"] * 3, ["x"] * 3) for i, r, values in searches
    ]
    meta = json.loads((folder / "stopped.meta.json").read_text())
    analysis = analysis_of(write_run(folder / "journal.jsonl", lines, journal, meta))
    assert analysis.problems[0]["searches"] == 2
    assert analysis.tokens_generated == 3 * 2 * len(lines) + SPENT["generated"]
    assert analysis.values["groups"][0]["count"] == 3 * 2 * PROBLEMS  # the first two of each
    assert "its values are judged by the first 2 repetitions, before any problem stopped" in analysis.notes[-1]
    assert analysis.flops is None and "no FLOPs (they need" not in " ".join(analysis.notes)


def test_a_run_that_was_graded_again_says_whose_vote_was_decided(folder, tmp_path):
    """Other answers may be equal now, so that "sure" is about the ones before."""
    shutil.copy(folder / "stopped.jsonl", tmp_path)
    shutil.copy(folder / "stopped.meta.json", tmp_path)
    regrade(tmp_path / "stopped.jsonl", tmp_path / "again.jsonl")
    said = "graded again after it was stopped; what was decided, and sure or certified, was the vote of the answers in stopped.jsonl"
    assert said in analysis_of(tmp_path / "again.jsonl").notes[-1]
    assert said not in " ".join(analysis_of(tmp_path / "stopped.jsonl").notes)


def test_plots_show_what_there_is_at_the_n_that_was_used(analyses):
    stopped = analyses["stopped"]
    assert [budget_of(row, "N") for row in stopped.rows] == [4 * row["repetitions_m"] for row in stopped.rows]
    assert [budget_of(row, "N") for row in analyses["full"].rows] == [4, 8, 12, 16]
    with plt.rc_context(STYLE):
        figure = accuracy_figure([stopped], "n")
        by_label = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
        assert len(by_label["weighted"]) == 4 and by_label["weighted"][-1] == pytest.approx(4 * 19 / 6)
        assert len(by_label["majority"]) == len(by_label["pass@1"]) == 2
        both = comparison_figure([stopped, analyses["by_count"]])
        labels = [label for label in (line.get_label() for line in both.axes[0].lines) if not label.startswith("_")]
        assert labels == ["stopped: weighted", "by_count: majority"]
        plt.close("all")


def test_a_run_that_has_later_repetitions_only_is_reported_as_far_as_it_is(analyses, tmp_path):
    lines = [line for line in lines_of(1) if line["repeat_idx"] in (1, 3)]
    meta = settings(PROBLEMS, REPETITIONS, 4, 3, 2, stop="sure", stop_vote="weighted", alpha=0.05)
    begun = analysis_of(write_run(tmp_path / "begun.jsonl", lines, meta=meta))
    assert begun.rows == [] and begun.outcome["kinds"] == {}
    assert run_answer(begun).sentences == ["Nothing can be said yet: no problem has its first repetition."]
    comparisons = [compare(begun, analyses["full"])]
    assert comparisons[0]["rows"] == []
    assert comparisons[0]["missing"][1] == "no problem has its first repetition in both runs yet"
    write_tables(tmp_path, [begun, analyses["full"]], comparisons)
    assert "0 of 0 repetitions count" in terminal_text([begun, analyses["full"]], comparisons)
    assert accuracy_figure([begun], "n") is None and comparison_figure([begun, analyses["full"]]) is None
