"""Intervals that cover, tests that reject as often as they say, votes over pooled repetitions, and the table."""

import importlib.util
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from eval_lib.intervals import student_t_quantile, student_t_tail
from eval_lib.summary import (
    auc,
    auc_within,
    brier_score,
    clustered_interval,
    expected_calibration_error,
    format_table,
    paired_difference,
    paired_test,
    pooled_best,
    pooled_scores,
    pooled_sums,
    pooled_votes,
    problem_means,
    reliability_bins,
    repeat_noise_half_width,
    summarize,
    variance_warning,
)
from eval_utils import best_of_n, majority_vote, weighted_vote

ROOT = Path(__file__).resolve().parents[2]


def line(problem, repeat, answers, rewards, scores, **more):
    keys = {"data_idx": problem, "repeat_idx": repeat, "processed_answer": answers, "reward": rewards}
    return keys | {"generated_scores": scores, "dt": 2.0} | more


# ------------------------------------------------------------------------------------------------ intervals and tests


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.70620), (2, 4.302653), (15, 2.131450), (29, 2.045230), (100, 1.983972), (499, 1.964729)],
)
def test_student_t_as_in_the_tables(degrees, quantile):
    assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, rel=1e-6)
    assert student_t_tail(quantile, degrees) == pytest.approx(0.05, rel=1e-5)
    assert student_t_tail(0.0, degrees) == 1.0


def test_clustered_interval_is_t_times_the_standard_error_over_problems():
    mean, half = clustered_interval([0.0, 1.0, 0.5, 0.5])
    assert float(mean) == 0.5
    assert float(half) == pytest.approx(3.182446 * np.std([0, 1, 0.5, 0.5], ddof=1) / 2, rel=1e-6)
    means, halves = clustered_interval(np.zeros((5, 3, 4)))
    assert means.shape == halves.shape == (5, 3)
    assert np.isnan(clustered_interval([0.3])[1])


def test_repeat_noise_is_blind_to_differences_between_problems():
    values = np.array([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])  # two repetitions of four problems, mean 0.5 each
    assert repeat_noise_half_width(values) == 0.0
    assert clustered_interval(values.mean(0))[1] > 0.5
    assert repeat_noise_half_width([[0.0, 0.0], [1.0, 1.0]]) == pytest.approx(1.96 * 0.5)
    assert np.isnan(repeat_noise_half_width(values[:1]))


def test_paired_difference_compares_common_problems_only():
    one, other = {1: 0.5, 2: 1.0, 3: 0.75, 9: 0.0}, {1: 0.25, 2: 0.5, 3: 0.5, 7: 1.0}
    result = paired_difference(one, other)
    assert result["difference"] == pytest.approx(1 / 3)
    assert (result["problems"], result["only_one"], result["only_other"]) == (3, 1, 1)
    back = paired_difference(other, one)
    assert back["difference"] == -result["difference"]
    assert back["p_value"] == result["p_value"] == pytest.approx(0.0571910, rel=1e-5)  # t = 4, 2 degrees
    assert result["ci"] == pytest.approx(4.302653 * np.std([0.25, 0.5, 0.25], ddof=1) / math.sqrt(3), rel=1e-6)
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference({1: 0.5}, {2: 0.5})


def test_paired_difference_at_its_limits():
    same = paired_difference({1: 0.5, 2: 1.0}, {1: 0.5, 2: 1.0})
    assert (same["difference"], same["ci"], same["p_value"]) == (0.0, 0.0, 1.0)
    assert paired_difference({1: 0.5, 2: 1.0}, {1: 0.25, 2: 0.75})["p_value"] == 0.0
    single = paired_difference({1: 0.5}, {1: 0.25})
    assert (single["ci"], single["p_value"]) == (None, None)
    _, _, p_values = paired_test([[0.0, 0.0], [1.0, -1.0]])
    assert p_values.tolist() == [1.0, 1.0]


def test_a_warning_where_few_problems_carry_the_variance():
    assert variance_warning([0.0, 1.0] * 15) is None
    assert "1 of 30 problems carry 90 %" in str(variance_warning([1.0] + [0.0] * 29))
    assert "3 of 30 problems carry 90 %" in str(variance_warning([0.0] * 3 + [1.0] * 27))
    assert "may still be 10 %" in str(variance_warning([1.0] * 30))
    assert "only 4 problems" in str(variance_warning([0.0, 1.0, 0.0, 1.0]))


def test_intervals_cover_and_the_paired_test_rejects_as_often_as_they_say(capsys):
    """The study of 5,000 runs per distribution with fewer of them; it returns 1 if a gated figure leaves its band."""
    spec = importlib.util.spec_from_file_location("coverage_study", ROOT / "scripts/coverage_study.py")
    assert spec is not None
    assert spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    assert study.main(["--simulations", "1500"]) == 0
    table = [row.split() for row in capsys.readouterr().out.splitlines() if row.startswith("Beta(0.5,0.5)")]
    shown = {(row[1], row[2]): row[4:] for row in table}
    by_problem, repeat_noise = (float(share.rstrip("%")) for share in shown["majority", "4"][:2])
    assert by_problem > 93
    assert repeat_noise < 60


# ------------------------------------------------------------------------------------------ how good the value model is


def test_auc_counts_pairs_and_ties_as_half():
    rng = random.Random(0)
    labels = [rng.random() < 0.4 for _ in range(60)]
    scores = [rng.choice([0.1, 0.2, 0.3, 0.4]) for _ in labels]
    pairs = [(r, w) for r, right in zip(scores, labels) if right for w, other in zip(scores, labels) if not other]  # noqa: B905
    expected = sum((r > w) + 0.5 * (r == w) for r, w in pairs) / len(pairs)
    assert auc(labels, scores) == pytest.approx(expected)
    assert auc([True, True], [0.1, 0.2]) is None
    assert auc([], []) is None


def test_auc_within_problems_ignores_which_problem_is_easy():
    labels = [True, True, True, False, False, False, False, True, True, True]
    scores = [0.9, 0.9, 0.8, 0.95, 0.1, 0.2, 0.1, 0.05, 0.5, 0.6]
    problems = [0] * 4 + [1] * 4 + [2] * 2
    assert auc(labels, scores) == pytest.approx(15 / 24)
    assert auc_within(labels, scores, problems) == {"auc": 0.0, "ci": 0.0, "problems": 2}
    assert auc_within(labels[8:], scores[8:], problems[8:]) == {"auc": None, "ci": None, "problems": 0}


def test_calibration_by_hand():
    labels, values = [True, False, True, True], [0.15, 0.15, 0.95, 1.0]
    assert brier_score(labels, values) == pytest.approx((0.85**2 + 0.15**2 + 0.05**2) / 4)
    low, high = reliability_bins(labels, values)
    assert (low["low"], low["high"], low["count"]) == (0.1, 0.2, 2)
    assert low["share_right"] == 0.5
    assert (high["low"], high["count"], high["share_right"]) == (0.9, 2, 1.0)
    assert expected_calibration_error(labels, values) == pytest.approx(0.5 * 0.35 + 0.5 * 0.025)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reliability_bins([True], [1.5])


# --------------------------------------------------------------------------------------------------------- pooled votes


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


def test_pooling_works_on_stacks_of_runs():
    rng = np.random.default_rng(0)
    weights = rng.random((2, 5, 4, 3))
    right = weights * np.array([1.0, 0.0, 0.5])
    stacked = list(pooled_votes(weights, right))
    for i, j in np.ndindex(2, 5):
        for whole, alone in zip(stacked, pooled_votes(weights[i, j], right[i, j]), strict=True):
            np.testing.assert_array_equal(whole[i, j], alone)
    assert [votes.shape for votes in pooled_votes(weights, right, sizes=(2, 4))] == [(2, 5, 4), (2, 5, 1)]
    np.testing.assert_array_equal(next(pooled_votes(weights, right, sizes=(2,))), stacked[1])
    assert [sums.shape for sums in pooled_sums(weights[..., 0])] == [(2, 5, 4)] * 3 + [(2, 5, 1)]


def test_pooled_best_without_any_answer_is_wrong():
    nothing = np.full(2, -np.inf)
    assert [best.tolist() for best in pooled_best(nothing, np.zeros(2), np.zeros(2))] == [[0.0, 0.0], [0.0]]


# ------------------------------------------------------------------------------------------------------------ the table


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
    rows = summarize(run_lines(), num_blocks=8)
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
    assert rows[0]["maj_ci_repeat"] > 0
    assert rows[1]["maj_ci_repeat"] is not None  # two disjoint groups of two
    assert rows[2]["maj_ci_repeat"] is None
    means = {i: np.mean([np.mean(entry["reward"]) for entry in lines if entry["data_idx"] == i]) for i in range(6)}
    assert rows[0]["pass1_ci"] == pytest.approx(float(clustered_interval(list(means.values()))[1]))
    by_repeat = [np.mean([np.mean(entry["reward"]) for entry in lines if entry["repeat_idx"] == r]) for r in range(5)]
    assert rows[0]["pass1_ci_repeat"] == pytest.approx(1.96 * np.std(by_repeat, ddof=1) / math.sqrt(5))


def test_two_runs_are_compared_at_any_pooled_number():
    one, other = pooled_scores(run_lines(seed=0)), pooled_scores(run_lines(seed=1))
    result = paired_difference(problem_means(one, "wmaj", 2), problem_means(other, "wmaj", 2))
    rows = summarize(run_lines(seed=0), 8), summarize(run_lines(seed=1), 8)
    assert result["difference"] == pytest.approx(rows[0][1]["wmaj_m"] - rows[1][1]["wmaj_m"])
    assert problem_means(one, "maj", 6) == {}


def test_the_order_of_the_lines_does_not_matter():
    lines = run_lines()
    assert summarize(reversed(lines), 8) == summarize(lines, 8)


def test_missing_repetitions_are_said():
    lines = [entry for entry in run_lines() if not (entry["repeat_idx"] >= 3 and entry["data_idx"] < 2)]
    rows = summarize(lines, num_blocks=8, num_problems=7)
    assert [(row["problems"], row["missing"]) for row in rows] == [(6, 1)] * 3 + [(4, 3)] * 2
    assert "1 of 7 problems lack 1 repetition;" in rows[0]["note"] + ";"
    assert "3 of 7 problems lack 5 repetitions" in rows[4]["note"]
    assert "3 of 7 problems lack 5 repetitions" in " ".join(format_table(rows).split())


def test_lines_of_the_released_code_leave_out_what_they_do_not_tell():
    keys = ("data_idx", "repeat_idx", "processed_answer", "reward", "generated_scores", "dt")
    rows = summarize(({key: entry[key] for key in keys} for entry in run_lines()), num_blocks=None)
    assert rows[0]["N"] is rows[0]["tokens_generated"] is rows[0]["truncated"] is None
    assert rows[0]["maj_m"] == summarize(run_lines(), 8)[0]["maj_m"]
    assert "?" in format_table(rows)


def test_lines_that_cannot_be_are_refused():
    entry = line(3, 0, ["1"], [True], [0.5])
    with pytest.raises(ValueError, match="problem 3 has two lines of repetition 0"):
        summarize([entry, entry], 8)
    with pytest.raises(ValueError, match="differ in number"):
        summarize([entry | {"reward": [True, False]}], 8)
    for score in (math.nan, -1.0):
        with pytest.raises(ValueError, match="score"):
            summarize([entry | {"generated_scores": [score]}], 8)


def test_a_run_without_lines_or_answers_has_a_table():
    assert summarize([], 8) == []
    assert "Accuracy" in format_table([])
    rows = summarize([line(0, 0, ["", ""], [False, False], [0.5, 0.5]), line(1, 0, [], [], [])], 2)
    assert [rows[0][f"{metric}_m"] for metric in ("pass1", "pass", "bon", "maj", "wmaj")] == [0.0] * 5
    assert rows[0]["empty"] == 1.0
    assert "only 2 problems" in rows[0]["note"]


def test_the_table_fits_80_columns_and_stays_short():
    rows = summarize(run_lines(problems=30, repetitions=20), num_blocks=128)
    text = format_table(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "6 of 20 budgets are shown." in text
    assert [row.split()[1] for row in text.splitlines()[2:8]] == ["1", "2", "4", "8", "16", "20"]
    first = text.splitlines()[2]
    assert f"{100 * rows[0]['maj_m']:.1f}" in first
    assert f"±{100 * rows[0]['maj_ci']:.1f}" in first


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
    row = summarize(lines, num_blocks=1)[-1]
    found = [row[f"{metric}_m"] for metric in ("pass1", "maj", "bon", "wmaj", "pass")]
    assert found == pytest.approx([0.91, 0.925, 0.94, 0.94, 0.96])
