"""Extraction of answers, votes, and the classes of a problem; published votes come out again."""

import itertools
import json
import math
import random
import time

import pytest

from eval_lib.grading import Grader
from eval_utils import best_of_n, extract_answer, majority_vote, pass_at_k, problem_classes, weighted_vote


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=2) as grader:
        yield grader


# ----------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ 025 }", "025"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        (r"$\boxed 5$", "5"),
        (r"\boxed 12.", "12"),
        (r"\(\boxed \frac{1}{2}\)", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\text{so } \boxed{5}}", r"\text{so } \boxed{5}"),
        ("\\boxed{\n7\n}", "7"),
        (r"\\boxed{3}", "3"),
        (r"x {unclosed \boxed{4} text", "4"),
        # nothing to extract
        ("no answer", ""),
        ("", ""),
        (r"\boxed{5", ""),
        (r"\boxed{\frac{1}{2}", ""),
        (r"\boxed{5} and then \boxed{7", ""),
        (r"\boxed{}", ""),
        (r"\boxedness{5}", ""),
        # mentions of the command are no answers
        (r"\boxed{5} in \boxed{} as asked", "5"),
        (r"\boxed{5}, written in \boxed as asked", "5"),
        # thinking
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> the answer is 1", ""),
        (r"<think>is it \boxed{1}?", "1"),
        (r"\boxed{1} </think> \boxed{2} </think>", "2"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("piece", [r"\boxed{", r"\boxed{1}", "{", "}", r"\boxed ", "\\"])
def test_extraction_is_linear_in_a_response_that_repeats_itself(piece):
    start = time.perf_counter()
    extract_answer(piece * 100_000)
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------------------------------------------------------- votes


def test_majority_and_ties():
    assert majority_vote([0, 1, 1], [True, False, False]) == 0.0
    assert majority_vote([0, 0, 1], [True, True, False]) == 1.0
    assert majority_vote([0, 1], [True, False]) == 0.5
    assert majority_vote([0, 1, 2, 3], [True, False, False, False]) == 0.25


def test_weights_turn_a_vote_and_exact_ties_share():
    assert weighted_vote([0, 1, 1], [True, False, False], [0.9, 0.2, 0.3]) == 1.0
    assert (
        weighted_vote([0, 1, 1, 1], [True, False, False, False], [0.3, 0.1, 0.1, 0.1]) == 0.5
    )  # 0.1 + 0.1 + 0.1 > 0.3
    assert weighted_vote([0, 1], [True, False], [0.0, 0.0]) == 0.5
    assert weighted_vote([0, 1], [True, False], [1e-30, 0.0]) == 1.0


def test_an_empty_answer_never_wins():
    assert majority_vote([-1, -1, 0], [False, False, True]) == 1.0
    assert weighted_vote([-1, 0], [False, True], [0.9, 0.0]) == 1.0
    assert best_of_n([-1, 0], [False, True], [0.9, 0.1]) == 1.0
    for vote in (weighted_vote, best_of_n):
        assert vote([-1, -1], [False, False], [0.5, 0.5]) == 0.0
        assert vote([], [], []) == 0.0


def test_a_class_is_right_to_the_share_of_its_weight():
    assert majority_vote([0, 0, 0, 1], [True, False, False, True]) == pytest.approx(1 / 3)
    assert weighted_vote([0, 0, 1], [True, False, True], [0.6, 0.2, 0.1]) == pytest.approx(0.75)


def test_best_of_n_shares_ties():
    assert best_of_n([0, 1, 2], [True, False, True], [0.5, 0.9, 0.1]) == 0.0
    assert best_of_n([0, 1, 2], [True, False, True], [0.9, 0.9, 0.1]) == 0.5


def test_votes_do_not_depend_on_the_order():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 9)
        answers = [
            (rng.randint(-1, 2), rng.random() < 0.5, rng.choice([0.1, 0.2, 0.3, rng.random()])) for _ in range(n)
        ]
        shuffled = rng.sample(answers, n)
        for vote in (weighted_vote, best_of_n, lambda c, r, _: majority_vote(c, r)):
            assert vote(*zip(*answers, strict=True)) == vote(*zip(*shuffled, strict=True))


def test_votes_refuse_weights_that_mean_nothing():
    for weight in (math.nan, math.inf, -0.1):
        with pytest.raises(ValueError, match="finite and not negative"):
            weighted_vote([0], [True], [weight])
    with pytest.raises(ValueError, match="not a number"):
        best_of_n([0], [True], [math.nan])
    with pytest.raises(ValueError, match="zip"):
        majority_vote([0, 1], [True])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, c in [(5, 0), (5, 2), (6, 6)]:
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(4, 2, 5)


def qwen_votes(cases, rewards, classes, order):
    """[mean accuracy, majority, best-of-8, weighted by sigmoid of the reward, any of 8], samples in this order."""
    sums = [0.0] * 5
    for case, right, group in zip(cases, rewards, classes, strict=True):
        right, group, scores = ([row[k] for k in order] for row in (right, group, case["pred_score"]))
        weights = [1 / (1 + math.exp(-score)) for score in scores]
        results = (
            sum(right) / len(right),
            majority_vote(group, right),
            best_of_n(group, right, scores),
            weighted_vote(group, right, weights),
            float(any(right)),
        )
        sums = [total + result for total, result in zip(sums, results, strict=True)]
    return [round(total / len(cases), 6) for total in sums]


@pytest.fixture(scope="module")
def qwen_cases():
    from conftest import SHARED

    path = SHARED / "data/qwen25math/math_cot_100_n8_rm.jsonl"
    if not path.exists():
        pytest.skip("needs third-party data that is not here: ../shared/data/qwen25math")
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    for case in cases:
        case["pred_score"] = [score[0] if isinstance(score, list) else score for score in case["pred_score"]]
    return cases


def test_published_votes_with_the_recorded_scores(qwen_cases, grader):
    classes = [grader.answer_classes(case["pred"]) for case in qwen_cases]
    rewards = [case["score"] for case in qwen_cases]
    orders = [list(range(8)), list(range(7, -1, -1)), random.Random(1).sample(range(8), 8)]
    for order in orders:
        assert qwen_votes(qwen_cases, rewards, classes, order) == [0.91, 0.925, 0.94, 0.94, 0.96]


def test_published_votes_graded_by_math_verify_in_any_order(qwen_cases, grader):
    for order in (list(range(8)), random.Random(2).sample(range(8), 8)):
        # Grouping and grading, too, see the samples in this order.
        shuffled = [{**case, **{k: [case[k][j] for j in order] for k in ("pred", "pred_score")}} for case in qwen_cases]
        classes = [grader.answer_classes(case["pred"]) for case in shuffled]
        rewards = [grader.grade((case["gt"], pred) for pred in case["pred"]) for case in shuffled]
        assert qwen_votes(shuffled, rewards, classes, range(8)) == [0.91125, 0.925, 0.95, 0.95, 0.97]


def test_empty_answers_leave_the_published_votes_as_they_are(qwen_cases, grader):
    padded = [
        {**case, "pred": ["", *case["pred"], ""], "pred_score": [99.0, *case["pred_score"], 99.0]}
        for case in qwen_cases
    ]
    classes = [grader.answer_classes(case["pred"]) for case in padded]
    rewards = [grader.grade((case["gt"], pred) for pred in case["pred"]) for case in padded]
    _, majority, best, weighted, any_right = qwen_votes(padded, rewards, classes, range(10))
    assert (majority, best, weighted, any_right) == (0.925, 0.95, 0.95, 0.97)


def test_repetitions_of_a_problem_share_one_numbering(grader):
    lines = [
        {"data_idx": 4, "repeat_idx": 0, "processed_answer": ["0.5", "1"]},
        {"data_idx": 4, "repeat_idx": 1, "processed_answer": ["", r"\frac12"]},
        {"data_idx": 9, "repeat_idx": 0, "processed_answer": ["2"]},
    ]
    assert problem_classes(lines, grader) == {4: {0: [0, 1], 1: [-1, 0]}, 9: {0: [0]}}
