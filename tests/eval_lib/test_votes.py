"""Who wins a vote: classes of answers with their weights, and stacks of runs."""

from collections import Counter

import numpy as np
import pytest

from eval_lib.votes import pooled_best, pooled_sums, pooled_votes, vote_rows, winners
from eval_utils import best_of_n, majority_vote, weighted_vote


def test_the_heaviest_win_ties_share_and_nothing_wins_nothing():
    assert winners([0.3, 0.1 + 0.1 + 0.1, 0.2]).tolist() == [True, True, False]
    assert winners([1.0, 0.9999999]).tolist() == [True, False]  # near is no tie; only rounding is forgiven
    assert winners([[0.0, 1e-30], [0.0, 0.0]]).tolist() == [[False, True], [False, False]]
    assert winners([]).tolist() == []


def test_a_row_for_each_class_says_what_it_wins():
    classes, answers = [0, -1, 1, 1, 0, 1], ["1/2", "", "3", "3", "0.5", "03"]
    rewards, values = [True, False, False, True, True, False], [0.9, 0.99, 0.2, 0.3, 0.4, 0.1]
    half, three = vote_rows(classes, answers, rewards, values)
    assert half.answers == Counter({"1/2": 1, "0.5": 1})
    assert (half.count, half.weight, half.best, half.right) == (2, pytest.approx(1.3), 0.9, 2)
    assert half.wins == {"maj": False, "wmaj": True, "bon": True}
    shown = three.to_json(characters=1)
    assert (shown["answers"], shown["answer"], shown["right"]) == (["3", "0"], "3", 1 / 3)
    assert (three.count, three.weight, three.best, three.right) == (3, pytest.approx(0.6), 0.3, 1)
    assert three.wins == {"maj": True, "wmaj": False, "bon": False}
    shares = {"maj": majority_vote(classes, rewards), "wmaj": weighted_vote(classes, rewards, values)}
    assert shares == {"maj": three.right / three.count, "wmaj": 1.0}
    assert best_of_n(classes, rewards, values) == 1.0


def test_without_any_weight_the_most_frequent_win():
    rows = vote_rows([0, 1, 1, -1], ["a", "b", "b", ""], [False] * 4, [0.0] * 4)
    assert [row.wins["wmaj"] for row in rows] == [False, True]
    assert vote_rows([-1], [""], [False], [0.5]) == []


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
