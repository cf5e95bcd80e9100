"""Intervals that cover, tests that reject as often as they say."""

import math
import random
from fractions import Fraction
from itertools import product

import coverage_study
import numpy as np
import pytest

from eval_lib.intervals import (
    clustered_interval,
    paired_difference,
    paired_test,
    repeat_noise_half_width,
    sign_flip_p,
    student_t_quantile,
    student_t_tail,
    variance_warning,
)


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


def test_repeat_noise_is_that_of_the_released_code():
    """Repetitions x problems; the smallest case, and one worked by hand for each of the two formulas."""
    assert repeat_noise_half_width([[1, 0], [0, 1]]) == pytest.approx(0.693, abs=5e-4)
    values = [[1.0, 0.0, 0.5], [0.0, 0.0, 0.25], [0.5, 0.0, 0.75]]  # variances of the columns: 1/4, 0, 1/16
    assert repeat_noise_half_width(values) == pytest.approx(1.96 * math.sqrt((1 / 4 + 0 + 1 / 16) / 3 / 9))
    assert repeat_noise_half_width([[1.0, 0.0, 0.5, 0.5]]) == pytest.approx(1.96 * math.sqrt((1 / 4 + 1 / 4) / 3 / 4))
    assert repeat_noise_half_width([[0.25], [0.75]]) == pytest.approx(1.96 * math.sqrt(0.125 / 2))
    assert np.isnan(repeat_noise_half_width([[0.25]]))


def test_repeat_noise_is_blind_to_differences_between_problems_unless_there_is_one_repetition():
    values = np.array([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    assert repeat_noise_half_width(values) == 0.0
    assert repeat_noise_half_width(values[:1]) > 0.5
    assert repeat_noise_half_width(np.zeros((5, 2, 3))).shape == (5,)
    assert np.isnan(repeat_noise_half_width(np.zeros((5, 1, 1)))).all()


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
    assert coverage_study.main(["--simulations", "1500"]) == 0
    table = [row.split() for row in capsys.readouterr().out.splitlines() if row.startswith("Beta(0.5,0.5)")]
    shown = {(row[1], row[2]): row[4:] for row in table}
    by_problem, repeat_noise = (float(share.rstrip("%*")) for share in shown["majority", "4"][:2])
    assert by_problem > 93
    assert repeat_noise < 60


def test_the_exact_p_value_is_the_share_of_all_signs():
    """Against every choice of signs, in exact fractions."""
    rng = random.Random(3)
    for size in (0, 1, 2, 5, 9):
        differences = [Fraction(rng.randrange(-4, 5), 4) for _ in range(size)]
        sums = [
            abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
            for signs in product((1, -1), repeat=size)
        ]
        share = Fraction(sum(value >= abs(sum(differences)) for value in sums), len(sums))
        assert sign_flip_p([*map(float, differences), 0.0]) == pytest.approx(float(share), abs=1e-12)
    assert sign_flip_p([0.1] * 5 + [0.0] * 40) == 0.0625
    assert sign_flip_p([0.1] * 15) == 2**-14 and sign_flip_p([0.1] * 16) is None
