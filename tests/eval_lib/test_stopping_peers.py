"""Published stops, held against sums of exact fractions and against lists written by hand."""

from fractions import Fraction
from math import comb

import pytest
from plain_stops import equal_window

from eval_lib.stopping_peers import posterior_needs


def leads(first, second):
    """P(p > 1/2), p of Beta(first + 1, second + 1), by integrating the density's polynomial term by term."""
    total = [Fraction(0), Fraction(0)]  # up to 1/2, up to 1
    for k in range(second + 1):  # p^first (1 - p)^second
        power = first + k + 1
        term = Fraction((-1) ** k * comb(second, k), power)
        total[0] += term / 2**power
        total[1] += term
    return 1 - total[0] / total[1]


def test_the_posterior_asks_for_the_least_count_that_reaches_the_level():
    for both, need in enumerate(posterior_needs(40)):
        assert need > both or leads(int(need), both - int(need)) >= Fraction(95, 100)
        assert need == 0 or leads(int(need) - 1, both - int(need) + 1) < Fraction(95, 100)
    assert posterior_needs(6).tolist()[:5] == [1, 2, 3, 4, 4]  # four alike: 1 - 1/32
    assert posterior_needs(2000)[2000] == pytest.approx(1000 + 0.5 * 1.645 * 2000**0.5, abs=1)


def test_a_window_of_equal_answers_ends_the_sampling():
    assert equal_window([[1]] * 5, 5) == 5
    assert equal_window([[0], *[[1]] * 8], 5) is None  # the second window is not over
    assert equal_window([[0], *[[1]] * 9], 5) == 10
    assert equal_window([[1, 1], [1, 1], [1, 2]], 3) is None
    assert equal_window([[1, 1], [1, -1], [1, 1]] + [[-1]] * 3, 3) is None
    assert equal_window([], 3) is None
