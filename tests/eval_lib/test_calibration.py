"""How good values are as predictions: against counts by hand."""

import random

import pytest

from eval_lib.calibration import auc, auc_within, brier_score, expected_calibration_error, reliability_bins


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
