"""The table of a run whose problems were stopped early, against plain votes of each problem's first repetitions."""

import random

import numpy as np
import pytest

from eval_lib.intervals import clustered_interval
from eval_lib.stopped import (
    StopRecord,
    format_run,
    stop_outcome,
    stopped_rows,
    stopped_scores,
    summarize_run,
    tables_of,
)
from eval_lib.summary import METRICS, run_tables, summarize
from eval_utils import best_of_n, majority_vote, weighted_vote

STOPPED = {0: 3, 1: 5, 3: 6}  # of 5 problems; 2 and 4 needed all six
KINDS = {0: "sure", 1: "certified", 3: "certified"}
REPETITIONS = 6


def record_of(vote="weighted", kind="certified", **changes):
    spent = {"generated": 700, "scored": 800}
    return StopRecord(
        kind, vote, 0.1, REPETITIONS, **({"stopped": STOPPED, "kinds": KINDS, "uncounted": spent} | changes)
    )


@pytest.fixture(scope="module")
def run():
    """Lines in the order of a run in progress, and the classes of their answers."""
    rng = random.Random(2)
    lines, classes = [], {}
    for repeat in range(REPETITIONS):
        for problem in range(5):
            if repeat >= STOPPED.get(problem, REPETITIONS):
                continue
            numbers = [rng.randint(-1, 2) for _ in range(3)]
            classes.setdefault(problem, {})[repeat] = numbers
            lines.append({
                "data_idx": problem, "repeat_idx": repeat, "processed_answer": ["?"] * 3, "dt": 1.5 * (problem + 1),
                "reward": [n == 1 for n in numbers], "generated_scores": [rng.choice([0.0, 0.25, 0.5]) for _ in numbers],
                "tokens_generated": 10 * (repeat + 1) + problem, "tokens_scored": repeat, "finish_reasons": ["stop", "length", "stop"],
            })  # fmt: skip
    return lines, classes


def plain(lines, classes, problem, count):
    """Every metric of the first `count` repetitions."""
    mine = [line for line in lines if line["data_idx"] == problem and line["repeat_idx"] < count]
    assert len(mine) == count
    group = [c for line in mine for c in classes[problem][line["repeat_idx"]]]
    rewards, scores = ([x for line in mine for x in line[key]] for key in ("reward", "generated_scores"))
    return {
        "pass1": np.mean(rewards),
        "pass": float(any(rewards)),
        "bon": best_of_n(group, rewards, scores),
        "maj": majority_vote(group, rewards),
        "wmaj": weighted_vote(group, rewards, scores),
    }


@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_a_row_pools_the_first_repetitions_of_each_problem_and_only_for_the_vote_that_decided(run, vote):
    lines, classes = run
    record = record_of(vote)
    rows = stopped_rows(lines, 4, classes, record, 5)
    scores = stopped_scores(lines, classes, record)
    assert [row["pooled"] for row in rows] == list(range(1, REPETITIONS + 1))
    for row in rows:
        m = row["pooled"]
        used = {i: min(m, STOPPED.get(i, REPETITIONS)) for i in range(5)}
        mean = sum(used.values()) / 5
        assert (row["N"], row["problems"], row["missing"]) == (4 * m, 5, 0)
        assert row["repetitions_m"] == pytest.approx(mean) and row["N_used"] == pytest.approx(4 * mean)
        assert row["saved_m"] == pytest.approx(1 - mean / m)
        for metric in METRICS:
            assert row[f"{metric}_ci_repeat"] is None
            if metric == record.metric or m <= 3:
                values = [plain(lines, classes, i, n)[metric] for i, n in used.items()]
                centre, half = clustered_interval(values)
                assert row[f"{metric}_m"] == pytest.approx(float(centre)), (metric, m)
                assert row[f"{metric}_ci"] == pytest.approx(float(half))
                assert [scores[i][metric][m - 1] for i in range(5)] == pytest.approx(values)
            else:
                assert row[f"{metric}_m"] is None and row[f"{metric}_ci"] is None
                assert all(len(scores[i][metric]) == 3 for i in range(5))
        spent = [sum(10 * (r + 1) + i for r in range(n)) for i, n in used.items()]
        assert row["tokens_generated"] == pytest.approx(sum(spent) / 5)
        assert row["seconds"] == pytest.approx(sum(1.5 * (i + 1) * n for i, n in used.items()) / 5)
        first = [c for i in range(5) for r in range(3) for c in classes[i][r]]
        assert row["empty"] == pytest.approx(first.count(-1) / len(first)) and row["truncated"] == pytest.approx(1 / 3)


def test_a_repetition_behind_a_gap_does_not_count_yet(run):
    """Of a run in progress: of problem 4 repetition 1 is under way, problem 2 has two, nothing of problem 1 is decided."""
    lines, classes = run
    there = [
        line
        for line in lines
        if (line["data_idx"], line["repeat_idx"]) != (4, 1) and (line["data_idx"] != 2 or line["repeat_idx"] < 2)
    ]
    record = record_of(stopped={0: 3, 3: 6}, kinds={0: "sure", 3: "certified"})
    rows = stopped_rows(there, 4, classes, record, 7)
    assert [(row["problems"], row["missing"]) for row in rows] == [(5, 2), (4, 3), (3, 4), (3, 4), (3, 4), (2, 5)]
    assert "3 of 7 problems lack 2 repetitions" in rows[1]["note"]
    assert rows[2]["wmaj_m"] == pytest.approx(np.mean([plain(there, classes, i, 3)["wmaj"] for i in (0, 1, 3)]))
    outcome = stop_outcome(there, classes, record)
    assert {kind: group["problems"] for kind, group in outcome["kinds"].items()} == {
        "certified": 1,
        "sure": 1,
        "open": 3,
    }
    assert outcome["saved_repetitions"] is None and outcome["saved_spent"] is None


def test_what_stopping_saved_and_how_decided_votes_fared(run):
    lines, classes = run
    outcome = stop_outcome(lines, classes, record_of())
    counts = {i: STOPPED.get(i, REPETITIONS) for i in range(5)}
    wrong = {i: 1 - plain(lines, classes, i, n)["wmaj"] for i, n in counts.items()}
    assert 0 < sum(wrong.values()) < 5
    for kind, members in {"certified": [1, 3], "sure": [0], "full": [2, 4]}.items():
        group = outcome["kinds"][kind]
        assert group["problems"] == len(members)
        assert group["repetitions"] == pytest.approx(np.mean([counts[i] for i in members]))
        assert group["wrong"] == pytest.approx(np.mean([wrong[i] for i in members]))
    counted = sum(line["tokens_generated"] for line in lines)
    whole = sum(6 * (10 * (1 + n) / 2 + i) for i, n in counts.items())  # from each problem's own mean
    assert (outcome["repetitions"], outcome["most"]) == (26, 30)
    assert outcome["saved_repetitions"] == pytest.approx(4 / 30)
    assert (outcome["counted"], outcome["spent"]) == (counted, counted + 700)
    assert outcome["saved_counted"] == pytest.approx(1 - counted / whole)
    assert outcome["saved_spent"] == pytest.approx(1 - (counted + 700) / whole)


def test_no_share_is_said_to_be_saved_while_problems_have_nothing_yet(run):
    """Those of five that are there are all decided, or have all they may; a sixth has not begun."""
    lines, classes = run
    (_, there), (_, begun) = (summarize_run(lines, 4, classes, record_of(), problems) for problems in (5, 6))
    shares = ("saved_repetitions", "saved_counted", "saved_spent")
    assert [begun[key] for key in shares] == [None] * 3 and None not in [there[key] for key in shares]
    assert begun["counted"] == there["counted"] and "saved" not in " ".join(tables_of([], begun)[1].notes[:2])


def test_the_tables_say_what_is_decided_and_what_is_not_known(run):
    lines, classes = run
    rows, outcome = summarize_run(lines, 4, classes, record_of(), 5)
    text = format_run(rows, outcome)
    words = " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    accuracy = text.splitlines()[: 1 + 1 + 4]
    assert accuracy[0] == "Accuracy, % (--stop certified, alpha 0.1, weighted vote, at most 6 repetitions)"
    assert accuracy[1].split()[:4] == ["N", "N", "used", "saved"]
    assert [line.split()[:3] for line in accuracy[2:]] == [
        ["4", "4.0", "0.0"], ["8", "8.0", "0.0"], ["16", "15.2", "5.0"], ["24", "20.8", "13.3"],
    ]  # fmt: skip
    assert accuracy[-1].count("–") == 4 and accuracy[3].count("–") == 0
    assert (
        '"Decided" is about the vote, not about being right' in words and "Only certified is a certification" in words
    )
    assert "26 of 30 repetitions count (13.3% saved)." in words
    assert f"spent {outcome['spent']:,}" in words and "Tokens saved are estimated" in words
    assert "repeat noise" not in words and "4 of 6 budgets are shown" in words
    decided = {line.split("  ")[0] for line in text.splitlines()}
    assert decided >= {"certified", "sure", "full: all repetitions"}
    assert len(tables_of(rows, outcome, all_rows=True)[0].rows) == 6


def test_a_run_that_was_not_to_stop_is_summarized_as_before(run):
    lines, classes = run
    rows, outcome = summarize_run(lines, 4, classes, None, 5)
    assert outcome is None and rows == summarize(lines, 4, classes, 5)
    assert tables_of(rows, None, "x") == run_tables(rows, "x")


def test_the_settings_of_a_run_say_how_it_was_stopped():
    arguments = {"stop": "sure", "stop_vote": "majority", "alpha": 0.05, "num_repetitions": 8}
    meta = {
        "arguments": arguments,
        "stopped": {"7": 3},
        "stopped_by": {"7": "sure"},
        "tokens_uncounted": {"generated": 4},
    }
    assert StopRecord.of(meta) == StopRecord("sure", "majority", 0.05, 8, {7: 3}, {7: "sure"}, {"generated": 4})
    assert StopRecord.of(meta).smallest == 3 and StopRecord.of(meta).metric == "maj"
    assert StopRecord.of({"arguments": arguments}).smallest == 8
    assert "alpha" not in StopRecord.of(meta).words
    for without in (None, {"arguments": {}}, {"arguments": arguments | {"stop": "none"}}):
        assert StopRecord.of(without) is None


def test_tokens_that_were_not_written_down_are_not_made_up(run):
    lines, classes = run
    lines = [{key: value for key, value in line.items() if key != "tokens_generated"} for line in lines]
    outcome = stop_outcome(lines, classes, record_of())
    assert outcome["counted"] is outcome["spent"] is outcome["saved_spent"] is None
    assert "Tokens generated" not in format_run(stopped_rows(lines, 4, classes, record_of()), outcome)
