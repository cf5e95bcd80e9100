"""The table of a run: votes over pooled repetitions against plain ones, costs, what is missing, how it is shown."""

import json
import math
import random

import numpy as np
import pytest

from eval_lib.grading import Grader
from eval_lib.intervals import clustered_interval, paired_difference
from eval_lib.stopped import format_run
from eval_lib.summary import pooled_scores, run_tables, summarize
from eval_lib.tables import thin
from eval_utils import best_of_n, majority_vote, problem_classes, weighted_vote


def line(problem, repeat, answers, rewards, scores, **more):
    keys = {"data_idx": problem, "repeat_idx": repeat, "processed_answer": answers, "reward": rewards}
    return keys | {"generated_scores": scores, "dt": 2.0} | more


def test_pooled_votes_are_the_plain_votes_of_every_window():
    rng = random.Random(3)
    repetitions, beams = 6, 3
    lines, classes = [], {0: {}}
    for repeat in range(repetitions):
        classes[0][repeat] = [rng.randint(-1, 2) for _ in range(beams)]
        # The third class is right in part: math-verify's equality is not transitive.
        rewards = [c == 0 or (c == 2 and rng.random() < 0.5) for c in classes[0][repeat]]
        scores = [rng.choice([0.0, 0.25, 0.5]) for _ in range(beams)]
        lines.append(line(0, repeat, ["?"] * beams, rewards, scores))
    pooled = pooled_scores(lines, classes)[0]
    for m in range(1, repetitions + 1):
        for start in range(repetitions if m < repetitions else 1):
            window = [(start + k) % repetitions for k in range(m)]
            group = [c for r in window for c in classes[0][r]]
            rewards = [x for r in window for x in lines[r]["reward"]]
            scores = [x for r in window for x in lines[r]["generated_scores"]]
            expected = {
                "pass1": np.mean(rewards),
                "pass": float(any(rewards)),
                "bon": best_of_n(group, rewards, scores),
                "maj": majority_vote(group, rewards),
                "wmaj": weighted_vote(group, rewards, scores),
            }
            assert {name: pooled[name][m - 1][start] for name in expected} == pytest.approx(expected)
        assert all(len(pooled[name][m - 1]) == (repetitions if m < repetitions else 1) for name in pooled)


def classes_of(lines):
    """Equal strings are equal answers."""
    classes = {}
    for entry in lines:
        numbers = [["", "1", "2", "7"].index(answer) - 1 for answer in entry["processed_answer"]]
        classes.setdefault(entry["data_idx"], {})[entry["repeat_idx"]] = numbers
    return classes


def table_of(lines, num_blocks=8, **settings):
    lines = list(lines)
    return summarize(lines, num_blocks, classes_of(lines), **settings)


def run_lines(problems=6, repetitions=5, seed=0):
    rng = random.Random(seed)
    lines = []
    for repeat in range(repetitions):
        for problem in range(problems):
            rewards = [rng.random() < (problem + 1) / (problems + 1) for _ in range(4)]
            answers = ["7" if right else rng.choice(["", "1", "2"]) for right in rewards]
            costs = {
                "tokens_generated": 1000 * (problem + 1),
                "tokens_scored": 1100,
                "finish_reasons": ["stop"] * 3 + ["length"],
            }
            lines.append(line(problem, repeat, answers, rewards, [rng.random() for _ in rewards], **costs))
    return lines


def test_a_row_for_every_pooled_number_of_repetitions():
    rows = table_of(run_lines())
    assert [(row["N"], row["pooled"], row["problems"], row["missing"]) for row in rows] == [
        (8 * m, m, 6, 0) for m in range(1, 6)
    ]
    lines = run_lines()
    for row in rows:
        assert row["pass1_m"] == pytest.approx(np.mean([np.mean(entry["reward"]) for entry in lines]))
        assert row["bon_m"] <= row["pass_m"]
        assert row["maj_m"] <= row["pass_m"]
        assert row["tokens_generated"] == pytest.approx(3500 * row["pooled"])
        assert row["tokens_scored"] == pytest.approx(1100 * row["pooled"])
        assert row["seconds"] == pytest.approx(2.0 * row["pooled"])
        assert row["truncated"] == 0.25
        assert 0 < row["empty"] < 0.3
        assert json.loads(json.dumps(row)) == row
    assert [row["repeat_groups"] for row in rows] == [5, 2, 1, 1, 1]
    means = {i: np.mean([np.mean(entry["reward"]) for entry in lines if entry["data_idx"] == i]) for i in range(6)}
    assert rows[0]["pass1_ci"] == pytest.approx(float(clustered_interval(list(means.values()))[1]))
    by_problem = [[np.mean(entry["reward"]) for entry in lines if entry["data_idx"] == i] for i in range(6)]
    noise = np.mean([np.var(scores, ddof=1) for scores in by_problem])
    assert rows[0]["pass1_ci_repeat"] == pytest.approx(1.96 * math.sqrt(noise / (6 * 5)))
    between = np.var([np.mean(scores) for scores in by_problem], ddof=1)
    assert rows[4]["pass1_ci_repeat"] == pytest.approx(1.96 * math.sqrt(between / 6))


def test_a_half_width_that_is_no_repeat_noise_is_marked():
    """Of one group of repetitions it is between problems; of one problem it cannot be told."""
    _, noise, _ = run_tables(table_of(run_lines(problems=6, repetitions=3)))
    assert [["*" in cell for cell in row[2:]] for row in noise.rows] == [[False] * 5, [True] * 5, [True] * 5]
    assert "*: fewer than two disjoint groups" in noise.notes[0]
    rows = table_of(run_lines(problems=1, repetitions=2))
    assert (rows[0]["maj_ci_repeat"] is None, rows[1]["maj_ci_repeat"]) == (False, None)
    assert run_tables(rows)[1].rows[1][2:] == ["–"] * 5


def test_two_runs_are_compared_at_any_pooled_number():
    runs = run_lines(seed=0), run_lines(seed=1)
    one, other = (pooled_scores(lines, classes_of(lines)) for lines in runs)
    means = [{i: float(scores["wmaj"][1].mean()) for i, scores in run.items()} for run in (one, other)]
    rows = [table_of(lines) for lines in runs]
    assert paired_difference(*means)["difference"] == pytest.approx(rows[0][1]["wmaj_m"] - rows[1][1]["wmaj_m"])


def test_the_order_of_the_lines_does_not_matter():
    lines = run_lines()
    assert table_of(reversed(lines)) == table_of(lines)


def test_missing_repetitions_are_said():
    lines = [entry for entry in run_lines() if not (entry["repeat_idx"] >= 3 and entry["data_idx"] < 2)]
    rows = table_of(lines, num_problems=7)
    assert [(row["problems"], row["missing"]) for row in rows] == [(6, 1)] * 3 + [(4, 3)] * 2
    assert "1 of 7 problems lack 1 repetition;" in rows[0]["note"] + ";"
    assert "3 of 7 problems lack 5 repetitions" in rows[4]["note"]
    said = "Not yet there: 1 of 7 problems lack 1, 2 repetitions; 3 of 7 problems lack 4, 5 repetitions."
    assert " ".join(format_run(rows).split()).count("problems lack") == 2
    assert said in " ".join(format_run(rows).split())


def test_a_warning_is_said_once_with_its_columns_and_rows():
    """However many rows it holds for, and however many problems it is that carry the variance there."""
    rows = table_of(line(i, r, ["1"], [i > 5 or (r > 2 and i == 5)], [0.5]) for i in range(12) for r in range(4))
    for row, few in zip(rows, (1, 2, 3, 4), strict=True):
        row["note"] = f"pass@k, majority: {few} of 12 problems carry 90 % of the variance: the interval is too narrow"
    rows[3]["note"] += "; weighted: only 4 problems: the interval is no more than a hint"
    accuracy, *_ = run_tables(rows, "vgs")
    assert accuracy.notes[1:] == [
        "pass@k, majority at 1, 2, 4 pooled (vgs): few of 12 problems carry 90 % of the variance: the interval is too narrow.",
        "weighted at 4 pooled (vgs): only 4 problems: the interval is no more than a hint.",
        "3 of 4 budgets are shown (vgs).",
    ]


def test_lines_of_the_released_code_leave_out_what_they_do_not_tell():
    keys = ("data_idx", "repeat_idx", "processed_answer", "reward", "generated_scores", "dt")
    rows = table_of(({key: entry[key] for key in keys} for entry in run_lines()), num_blocks=None)
    assert rows[0]["N"] is rows[0]["tokens_generated"] is rows[0]["truncated"] is None
    assert rows[0]["maj_m"] == table_of(run_lines())[0]["maj_m"]
    assert format_run(rows).splitlines()[2].split()[:2] == ["–", "1"]


def test_lines_that_cannot_be_are_refused():
    entry = line(3, 0, ["1"], [True], [0.5])
    with pytest.raises(ValueError, match="problem 3 has two lines of repetition 0"):
        table_of([entry, entry])
    with pytest.raises(ValueError, match="differ in number"):
        table_of([entry | {"reward": [True, False]}])
    for score in (math.nan, -1.0):
        with pytest.raises(ValueError, match="score"):
            table_of([entry | {"generated_scores": [score]}])


def test_a_run_without_lines_or_answers_has_a_table():
    assert table_of([]) == []
    assert "Accuracy" in format_run([])
    rows = table_of([line(0, 0, ["", ""], [False, False], [0.5, 0.5]), line(1, 0, [], [], [])])
    assert [rows[0][f"{metric}_m"] for metric in ("pass1", "pass", "bon", "maj", "wmaj")] == [0.0] * 5
    assert rows[0]["empty"] == 1.0
    assert "only 2 problems" in rows[0]["note"]


def test_the_table_fits_80_columns_and_stays_short():
    rows = table_of(run_lines(problems=30, repetitions=20), num_blocks=128)
    text = format_run(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "6 of 20 budgets are shown." in text
    assert [row.split()[1] for row in text.splitlines()[2:8]] == ["1", "2", "4", "8", "16", "20"]
    assert [row["pooled"] for row in thin(rows)] == [1, 2, 4, 8, 16, 20]
    assert [row["pooled"] for row in thin(rows[:7])] == [1, 2, 4, 7]
    (accuracy, *_) = run_tables(rows, all_rows=True)
    assert [row[1] for row in accuracy.rows] == [str(m) for m in range(1, 21)]
    assert "budgets are shown" not in " ".join(accuracy.notes)
    first = text.splitlines()[2]
    assert f"{100 * rows[0]['maj_m']:.1f}" in first
    assert f"±{100 * rows[0]['maj_ci']:.1f}" in first


def test_the_table_shows_the_half_widths_that_it_names():
    """Of problems beside the mean, and those of repeat noise in a table of their own; costs in a third."""
    row = table_of(run_lines(problems=6, repetitions=6))[1]  # three groups of two
    accuracy, noise, cost = (table.rows[1] for table in run_tables(table_of(run_lines(problems=6, repetitions=6))))
    metrics = ("pass1", "pass", "bon", "maj", "wmaj")
    assert [float(cell.split("±")[0]) for cell in accuracy[2:]] == [round(100 * row[f"{m}_m"], 1) for m in metrics]
    assert [float(cell.split("±")[1]) for cell in accuracy[2:]] == [round(100 * row[f"{m}_ci"], 1) for m in metrics]
    assert [float(cell.strip("±")) for cell in noise[2:]] == [round(100 * row[f"{m}_ci_repeat"], 1) for m in metrics]
    assert accuracy[:2] == noise[:2] == cost[:2] == ["16", "2"]
    assert cost[2:] == ["6", "7,000", "2,200", "4.0", "25.0%", f"{row['empty']:.1%}"]


@pytest.mark.parametrize("as_repetitions", [False, True])
def test_published_votes_come_out_of_the_table(shared, as_repetitions):
    cases = [json.loads(x) for x in shared("data/qwen25math/math_cot_100_n8_rm.jsonl").read_text().splitlines()]
    lines = []
    for i, case in enumerate(cases):
        flat = [score[0] if isinstance(score, list) else score for score in case["pred_score"]]
        values = [1 / (1 + math.exp(-score)) for score in flat]
        columns = (case["pred"], case["score"], values)
        if as_repetitions:
            lines += [line(i, r, *([column[r]] for column in columns)) for r in range(8)]
        else:
            lines.append(line(i, 0, *columns))
    with Grader() as grader:
        row = summarize(lines, 1, problem_classes(lines, grader))[-1]
    found = [row[f"{metric}_m"] for metric in ("pass1", "maj", "bon", "wmaj", "pass")]
    assert found == pytest.approx([0.91, 0.925, 0.94, 0.94, 0.96])
