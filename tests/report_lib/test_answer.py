"""What the report says first, against figures computed otherwise: exact votes, Student's t by integration."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from handmade_runs import result, settings, write_run
from synthetic_runs import analysis_of

from report_lib import answer
from report_lib.answer import comparison_answer, first_screen, run_answer
from report_lib.compare import compare
from report_lib.tables import terminal_text
from report_lib.value import OBSERVATION, value_report, value_sentence

# By problem, the three beams of each of two repetitions: (answer, value in eighths); 1 is right. Values and counts differ.
SEARCH = [
    [[("1", 7), ("2", 1), ("2", 1)], [("1", 6), ("2", 1), ("2", 2)]],
    [[("1", 8), ("1", 7), ("3", 1)], [("1", 8), ("1", 7), ("3", 1)]],
    [[("2", 1), ("1", 6), ("3", 1)], [("2", 2), ("2", 1), ("1", 8)]],
    [[("2", 7), ("2", 7), ("1", 1)], [("2", 7), ("2", 7), ("1", 1)]],
    [[("1", 5), ("1", 5), ("1", 5)], [("1", 5), ("2", 5), ("3", 5)]],
    [[("3", 1), ("3", 1), ("1", 7)], [("3", 1), ("1", 7), ("2", 2)]],
]
SAMPLES = [
    [[("2", 1), ("2", 1), ("1", 7)], [("2", 1), ("2", 1), ("1", 7)]],
    [[("1", 8), ("1", 7), ("3", 1)], [("1", 8), ("1", 7), ("3", 1)]],
    [[("2", 1), ("1", 6), ("3", 1)], [("2", 2), ("2", 1), ("1", 8)]],
    [[("2", 7), ("2", 7), ("1", 1)], [("2", 7), ("2", 7), ("1", 1)]],
    [[("1", 5), ("1", 5), ("2", 5)], [("1", 5), ("2", 5), ("2", 5)]],
    [[("3", 1), ("3", 1), ("1", 7)], [("3", 1), ("3", 7), ("2", 2)]],
]


def make(folder, name, problems, search_type="beam2", tokens=100, planned=None):
    """A run of these beams; the settings say 3 blocks in parallel, and how many problems there are to be."""
    lines = [
        result(i, r, planned or len(problems), [a for a, _ in beams], [a == "1" for a, _ in beams], [v / 8 for _, v in beams],
               tokens_generated=tokens)
        for i, repetitions in enumerate(problems) for r, beams in enumerate(repetitions)
    ]  # fmt: skip
    meta = settings(planned or len(problems), len(problems[0]), 3, 3, 1, search_type=search_type)
    return analysis_of(write_run(folder / f"{name}.jsonl", lines, meta=meta))


def vote(repetitions, weigh):
    """Share of the heaviest answers that is right, over all beams."""
    weights = {}
    for word, value in (beam for beams in repetitions for beam in beams):
        weights[word] = weights.get(word, 0) + weigh(value)
    heaviest = [word for word, weight in weights.items() if weight == max(weights.values())]
    return Fraction("1" in heaviest, len(heaviest))


def tail(t, degrees):
    """P(|T| > t) of Student's t, by integrating its density."""
    x = np.linspace(0, t, 200_001)
    density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    norm = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    return 1 - 2 * norm * float(((density[1:] + density[:-1]) / 2).sum() * (x[1] - x[0]))


def figures(first, second):
    """Difference in points, ends of its 95 % interval, p-value."""
    differences = [float(a - b) for a, b in zip(first, second, strict=True)]
    mean, error = np.mean(differences), np.std(differences, ddof=1) / math.sqrt(len(differences))
    half = QUANTILES[len(differences)] * error
    return 100 * mean, 100 * (mean - half), 100 * (mean + half), tail(abs(mean) / error, len(differences) - 1)


QUANTILES = {6: 2.570582, 12: 2.200985}  # of Student's t, by number of problems


WEIGHTED = [vote(repetitions, lambda value: value) for repetitions in SEARCH]
MAJORITY = [vote(repetitions, lambda value: 1) for repetitions in SEARCH]
BASELINE = [vote(repetitions, lambda value: 1) for repetitions in SAMPLES]
RIGHT = [Fraction(sum(word == "1" for beams in reps for word, _ in beams), 6) for reps in SEARCH]


def mean(votes):
    return f"{100 * float(sum(votes)) / len(votes):.1f}%"


def test_each_basis_has_its_sentence_and_the_figures_are_those_of_the_largest_budget(tmp_path):
    one, other = make(tmp_path, "one", SEARCH * 2), make(tmp_path, "other", SAMPLES * 2, "bon")
    found = comparison_answer(compare(one, other))
    by, low, high, p = figures(WEIGHTED * 2, BASELINE * 2)
    assert p < 0.05 and by > 0
    surely = f"(95 % interval {low:.1f} to {high:.1f}, p = {p:.3f})"
    said = f"one is better than other by {by:.1f} points: {mean(WEIGHTED)} against {mean(BASELINE)} {surely}."
    assert found.title == "one against other"
    assert found.sentences == [
        f"At equal N (6) {said}",
        f"At equal tokens (200) {said}",
        "Not compared: FLOPs are not known of both runs.",
    ]
    assert found.chosen == (
        "Chosen beforehand: the weighted vote of one, the majority vote of other, at the largest budget that both reach; "
        "paired over 12 problems, intervals clustered by problem."
    )
    assert found.mind == []
    # The other way round the same run is better, by as much.
    turned = comparison_answer(compare(other, one))
    assert turned.sentences[:2] == found.sentences[:2]
    assert turned.title == "other against one"


def test_what_is_not_shown_is_not_said(tmp_path):
    """The same runs by another vote: the difference is not significant; and with four problems nothing is."""
    one, other = make(tmp_path, "one", SEARCH), make(tmp_path, "other", SAMPLES)
    second = [vote(repetitions, lambda value: value) for repetitions in SAMPLES]
    by, low, high, p = figures(WEIGHTED, second)
    assert p > 0.05
    found = comparison_answer(compare(one, other))
    assert found.sentences[0] == (
        f"At equal N (6) neither is shown to be better: {mean(WEIGHTED)} against {mean(second)}, one minus other "
        f"{by:.1f} points (95 % interval {low:.1f} to {high:.1f}, p = {p:.3f})."
    )
    assert "the weighted vote of both" in found.chosen
    right = [[[("1", 8), ("1", 8), ("1", 8)]] * 2] * 4
    wrong = [[[("2", 8), ("2", 8), ("2", 8)]] * 2] * 4
    few = comparison_answer(compare(make(tmp_path, "right", right), make(tmp_path, "wrong", wrong)))
    assert "neither is shown to be better: 100.0% against 0.0%" in few.sentences[0]
    assert few.mind == ["Only 4 problems: the interval is no more than a hint."]  # once, not a line a basis
    single = comparison_answer(compare(make(tmp_path, "r", right[:1]), make(tmp_path, "w", wrong[:1])))
    assert single.sentences[0].endswith("100.0% against 0.0%, r minus w 100.0 points.")
    six = comparison_answer(
        compare(*(make(tmp_path, name, [*beams, *beams[:2]]) for name, beams in (("r", right), ("w", wrong))))
    )
    assert six.sentences[0] == "At equal N (6) r is better than w by 100.0 points: 100.0% against 0.0%."
    assert six.mind == ["All 6 problems differ by the same, so the interval has no width."]
    same = comparison_answer(compare(one, make(tmp_path, "again", SEARCH)))
    assert same.sentences[0] == f"At equal N (6) both score {mean(WEIGHTED)}, the same on every problem."


RIGHT_BEAMS, WRONG_BEAMS = ([[(word, 8)] * 3] * 2 for word in "12")


@pytest.mark.parametrize("problems", [5, 12, 20])
def test_five_problems_that_differ_show_nothing_whatever_the_t_test_says(tmp_path, problems):
    """Chosen signs are as far from 0 in 2 of 32 cases: p = 0.0625."""
    agree = [RIGHT_BEAMS] * (problems - 5)
    pair = [make(tmp_path, name, [beams] * 5 + agree) for name, beams in (("r", RIGHT_BEAMS), ("w", WRONG_BEAMS))]
    comparison = compare(*pair)
    assert {row["p_exact"] for row in comparison["rows"] if row["metric_one"] == "wmaj"} == {0.0625}
    said = comparison_answer(comparison).sentences[0]
    assert "neither is shown to be better" in said and "is better than" not in said
    if problems == 5:
        assert said.endswith("100.0% against 0.0%, r minus w 100.0 points.")  # no interval of no width
    else:
        assert said.endswith(" by the t-test, 0.062 by trying all signs).") and "p = 0.0" in said


def test_an_interval_that_deserves_little_trust_shows_no_difference():
    row = {"basis": "N", "budget": 6.0, "one": 0.5, "other": 0.2, "difference": 0.3, "ci": 0.1, "p_value": 0.001,
           "p_exact": None, "problems": 20, "warning": None}  # fmt: skip
    assert answer.shown(row)
    assert not answer.shown(row | {"warning": "3 of 20 problems carry 90 % of the variance"})
    assert not answer.shown(row | {"p_exact": 0.06}) and not answer.shown(row | {"p_value": 0.06})
    assert not answer.shown(row | {"p_value": None, "ci": None})


def test_where_an_interval_has_no_width_neither_it_nor_a_p_value_is_shown(tmp_path):
    found = run_answer(make(tmp_path, "r", [RIGHT_BEAMS] * 6))
    assert found.sentences == [
        "The weighted vote (N = 6, 2 repetitions pooled) is right on 100.0% of the problems: the same as the majority "
        "vote (100.0%); the same as pass@1 (100.0%)."
    ]
    assert found.mind[0].startswith("All 6 problems score the same, so the interval has no width")


def test_of_a_run_that_is_not_finished_it_is_said_that_it_is_no_result_yet(tmp_path):
    one, other = make(tmp_path, "one", SEARCH * 2), make(tmp_path, "other", SAMPLES * 2, "bon", planned=16)
    found = comparison_answer(compare(one, other))
    assert found.sentences[0].startswith("At equal N (6), so far, one is better than other by ")
    assert found.mind[0] == "Not a result yet: other has 24 of 32 searches."
    alone = run_answer(other)
    assert " is so far right on " in alone.sentences[0]
    assert alone.mind[0] == found.mind[0]
    assert not any("so far" in part for part in (*run_answer(one).sentences, *run_answer(one).mind))


def test_of_several_comparisons_it_is_said_once_that_no_p_value_is_corrected(tmp_path):
    runs = [make(tmp_path, name, SEARCH) for name in ("one", "two", "three")]
    comparisons = [compare(runs[0], run) for run in runs[1:]]
    said = "No p-value is corrected for there being 2 comparisons."
    assert terminal_text(runs, comparisons).count(said) == 1
    assert said in first_screen(runs, comparisons)[0].mind
    assert "No p-value" not in terminal_text(runs[:2], comparisons[:1])


def test_each_run_whose_rows_are_thinned_says_so(tmp_path):
    runs = [make(tmp_path, name, [repetitions * 3 for repetitions in SEARCH]) for name in ("one", "two")]
    text = " ".join(terminal_text(runs, []).split())
    assert text.count("4 of 6 budgets are shown (one).") == text.count("4 of 6 budgets are shown (two).") == 1


def test_the_sentence_is_about_the_vote_chosen_beforehand_and_not_the_best_looking_one(tmp_path):
    """Here the majority vote is better, and a budget in between is; neither is what is said."""
    spoilt = [[[("2", 8), ("1", 1), ("1", 1)]] * 2] * 6
    found = run_answer(make(tmp_path, "spoilt", spoilt))
    assert found.sentences[0].startswith(
        "The weighted vote (N = 6, 2 repetitions pooled) is right on 0.0% of the problems"
    )
    assert "100.0 points below the majority vote (100.0%" in found.sentences[0]


def test_a_run_alone_is_set_against_its_other_vote_and_one_answer(tmp_path):
    found = run_answer(make(tmp_path, "one", SEARCH))
    center, half = float(sum(WEIGHTED)) / 6, 2.570582 * np.std(list(map(float, WEIGHTED)), ddof=1) / math.sqrt(6)
    assert center + half > 1  # a share ends at 100
    parts = []
    for other, name in ((MAJORITY, "the majority vote"), (RIGHT, "pass@1")):
        by, low, high, p = figures(WEIGHTED, other)
        doubt = "" if p < 0.05 else "; no difference is shown"
        interval = f"95 % interval {low:.1f} to {high:.1f}, p = {p:.3f}"
        parts.append(f"{by:.1f} points above {name} ({mean(other)}, {interval}{doubt})")
    assert found.sentences == [
        f"The weighted vote (N = 6, 2 repetitions pooled) is right on {mean(WEIGHTED)} of the problems (95 % interval "
        f"{100 * (center - half):.1f} to 100.0): {'; '.join(parts)}."
    ]
    baseline = run_answer(make(tmp_path, "two", SAMPLES, "bon"))
    assert baseline.sentences[0].startswith(
        f"The majority vote (N = 6, 2 repetitions pooled) is right on {mean(BASELINE)}"
    )


def test_the_terminal_begins_with_the_answers_then_what_to_mind_then_tables(tmp_path):
    one, other = make(tmp_path, "one", SEARCH * 2), make(tmp_path, "other", SAMPLES * 2, "bon")
    text = terminal_text([one, other], [compare(one, other)])
    assert text.startswith("one against other\n  At equal N (6) one is better than other by ")
    places = [
        text.index(words) for words in ("At equal tokens", "Is the value model", "one: no journal", "Accuracy, %: one")
    ]
    assert places == sorted(places)
    assert max(map(len, text[: places[2]].splitlines())) <= 80
    three = [one, other, make(tmp_path, "third", SAMPLES)]
    answers = first_screen(three, [compare(one, run) for run in three[1:]])
    assert [(part.title, part.plot) for part in answers] == [
        ("one against other", "difference_1"), ("one against third", "difference_2"),
        ("Is the value model any good here?", None),
    ]  # fmt: skip
    assert next((part.title, part.plot) for part in first_screen([one], [])) == ("one", "accuracy_n")
    assert json.dumps(list(map(vars, answers)))


def test_numbers_are_never_minus_nothing():
    assert [answer.signed(value) for value in (-0.04, 0.0, 0.05, -3.25)] == ["0.0", "0.0", "0.1", "-3.2"]


# ---------------------------------------------------------------------------------------------------------------------
# Values


def observations(rng, problems, informed):
    """Twelve traces of each problem, some right; values that know which, or do not."""
    rows = []
    for problem in range(problems):
        right = rng.random(12) < rng.uniform(0.2, 0.8)
        value = np.clip(rng.uniform(0, 0.7, 12) + 0.3 * right * informed, 0, 1)
        rows += [(problem, 1, 100, v, r, True) for v, r in zip(value, right, strict=True)]
    return np.array(rows, OBSERVATION)


def said_of(seen, biased=False):
    return value_sentence("run", {"biased": biased} | value_report(seen))


def test_values_are_accepted_where_the_interval_of_the_auc_within_problems_lies_above_a_half():
    seen = observations(np.random.default_rng(0), 20, informed=True)
    aucs = []
    for problem in range(20):
        part = seen[seen["problem"] == problem]
        pairs = [(a - b) for a in part["value"][part["right"]] for b in part["value"][~part["right"]]]
        if pairs:
            aucs.append(np.mean([(d > 0) + (d == 0) / 2 for d in pairs]))
    assert len(aucs) == 20
    half = 2.093024 * np.std(aucs, ddof=1) / math.sqrt(20)
    assert said_of(seen) == (
        "run: its values tell right answers from wrong ones of the same problem (AUC within problems "
        f"{np.mean(aucs):.3f}, 95 % interval {np.mean(aucs) - half:.3f} to {np.mean(aucs) + half:.3f} over 20 problems; "
        "0.5 is chance)."
    )


def test_values_that_say_nothing_are_rarely_accepted():
    rng = np.random.default_rng(1)
    said = [said_of(observations(rng, 15, informed=False)) for _ in range(100)]
    assert sum(words.startswith("run: its values tell right") for words in said) <= 5
    assert all(re.match(r"run: (no evidence that|its values tell)", words) for words in said)


def test_of_values_that_chose_what_is_seen_nothing_is_said(tmp_path):
    seen = observations(np.random.default_rng(0), 20, informed=True)
    assert said_of(seen, biased=True) is said_of(seen, biased=None) is None
    few = said_of(observations(np.random.default_rng(0), 4, informed=True))
    assert few == (
        "run: too little to judge its values by: 4 problems with right and with wrong answers, 5 are needed."
    )
    pruned = make(tmp_path, "one", SEARCH)
    pruned.values["biased"] = True
    (_, values) = first_screen([pruned], [])
    assert values.sentences == [
        "Nothing certain: these values chose, or may have chosen, what is seen here. Report a bon or beam1 run."
    ]
