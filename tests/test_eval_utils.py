"""Extraction, votes, classes and grading of answers; the worker processes that grade, and how they fail."""

import asyncio
import itertools
import json
import logging
import math
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import Counter

import pytest

from eval_lib import grading as grading_utils
from eval_utils import (
    Grader,
    GradingError,
    as_integer,
    best_of_n,
    extract_answer,
    majority_vote,
    normalize_answer,
    pass_at_k,
    problem_classes,
    weighted_vote,
)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(grading_utils.__file__)))


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


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        ("025", "25"), ("000", "0"), ("-0", "0"), ("-07", "-7"), ("+7", "7"), ("7.0", "7"), ("7.", "7"),
        ("1,000", "1000"), (r"1{,}000", "1000"), (r"1\,000", "1000"), ("1 000 000", "1000000"), (r"11,\! 111", "11111"),
        ("$12$", "12"),        (r"\(12\)", "12"), ("\N{MINUS SIGN}3", "-3"), ("9" * 5000, "9" * 5000),
        ("1, 000", None), ("1,00", None), ("1,2", None), ("7.5", None), ("", None), ("x", None), ("0x10", None),
        ("1e3", None),        ("$1$ and $2$", None), ("٣", None),
    ],
)  # fmt: skip
def test_integers_are_recognised(text, integer):
    assert as_integer(normalize_answer(text)) == integer


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


# -------------------------------------------------------------------------------------------------------------- grading


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("025", "25", True),
        ("025", "025", True),
        ("25", "52", False),
        ("25", "", False),
        ("", "", False),
        (r"\frac{1}{576}", r"\dfrac{1}{576}", True),
        (r"\frac{1}{576}", "1/576", True),
        (r"\frac{1}{576}", "576", False),
        (r"8\sqrt{10}", r"\sqrt{640}", True),
        (r"8\sqrt{10}", "8", False),
        (r"\frac{9 \sqrt{23}}{23}", r"\frac{9}{\sqrt{23}}", True),
        (r"2^{25} \cdot 26!", r"26! \cdot 2^{25}", True),
        (r"1-\frac{2}{\pi}", r"\frac{\pi-2}{\pi}", True),
        (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{-1-\sqrt{17}}{2}, \frac{-1+\sqrt{17}}{2}", True),
        (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{-1 \pm \sqrt{17}}{2}", True),
        (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{-1+\sqrt{17}}{2}", False),
        (r"-\dfrac{13}{96}, \dfrac{13}{40}", r"x = \frac{13}{40} \text{ or } x = -\frac{13}{96}", True),
        (r"-\dfrac{13}{96}, \dfrac{13}{40}", r"\frac{13}{40}", False),
        (r"0,i\sqrt{6},-i\sqrt{6}", r"0, \pm i\sqrt{6}", True),
        (r"0,i\sqrt{6},-i\sqrt{6}", r"0, \sqrt{6}, -\sqrt{6}", False),
        ("$12$", "x = 12", True),
        (r"\text{Evelyn}", "Evelyn", True),
    ],
)
def test_grading(grader, gold, answer, right):
    assert grader.grade([(gold, answer)]) == [right]


@pytest.mark.parametrize(
    "answer", ["\ud800", "\x00", "$" * 999, "{" * 999, r"\sqrt{" * 500 + "2" + "}" * 500, "x" * 30_000]
)
def test_hostile_answers_are_wrong_and_harmless(grader, answer):
    assert grader.grade([(r"\sqrt{2}", answer), (r"\sqrt{8}", r"2\sqrt{2}")]) == [False, True]


def test_integers_and_equal_strings_need_no_worker():
    with Grader(num_workers=1) as grader:
        assert grader.grade([("025", "25"), ("5", "6"), ("x+1", "x+1")]) == [True, False, True]
        assert grader.answer_classes(["7", "07", "8", "", "7.0"]) == [0, 0, 1, -1, 0]
        assert not grader._workers


def test_hmmt_golds_equal_themselves_and_no_other(grader, shared):
    for name in ("hmmt_feb_2024", "hmmt_feb_2025"):
        golds = [json.loads(line)["answer"] for line in shared(f"data/matharena/{name}.jsonl").read_text().splitlines()]
        boxed = [extract_answer(rf"<think> hm </think> It is $\boxed{{{gold}}}$.") for gold in golds]
        assert all(grader.grade(zip(golds, boxed, strict=True)))
        classes = grader.answer_classes(golds)
        for one, other in itertools.combinations(range(len(golds)), 2):
            assert (classes[one] == classes[other]) == (golds[one] == golds[other])


def test_math_verify_cases(grader, shared):
    """A peer's own cases. At most 266 of 268 can be right: two pairs expect opposite verdicts on equal inputs."""
    cases = [json.loads(line) for line in shared("data/grading/math_verify_tests.jsonl").read_text().splitlines()]
    response = r"<think> \boxed{0} </think> The answer is $\boxed{%s}$."
    forms = {
        "raw": (262, lambda pred: pred),
        "in a box": (254, lambda pred: rf"\boxed{{{pred}}}"),
        "boxed in a response, extracted": (240, lambda pred: extract_answer(response.replace("%s", pred))),
        "the response's own box if it has one, extracted": (
            240,
            lambda pred: extract_answer(pred if "boxed" in pred else rf"\boxed{{{pred}}}"),
        ),
    }
    for name, (least, form) in forms.items():
        verdicts = grader.grade((case["gold"], form(case["pred"])) for case in cases)
        misses = [i for i, (case, right) in enumerate(zip(cases, verdicts, strict=True)) if right != case["equal"]]
        print(f"\n{name}: {len(cases) - len(misses)} of {len(cases)} right, wrong on")
        for i in misses:
            print(f"  {i:3} {'=' if cases[i]['equal'] else '!='} {cases[i]['gold'][-60:]!r} {cases[i]['pred'][-60:]!r}")
        assert len(cases) - len(misses) >= least


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


# -------------------------------------------------------------------------------------------------------------- classes


def test_classes_are_components_whatever_the_order(grader):
    answers = ["(1,2)", "(2,1)", r"\{2,1\}", "3", "", "03", "0.42", "42", r"42\%"]
    not_equal = [("(1,2)", "(2,1)"), ("(2,1)", "(1,2)"), ("42", "0.42"), ("0.42", "42"), ("(1,2)", r"\{2,1\}")]
    assert not any(grader.grade(not_equal))  # the first and last three are joined by the third of them
    expected = [0, 0, 0, 1, -1, 1, 2, 2, 2]
    assert grader.answer_classes(answers) == expected
    for seed in range(5):
        order = random.Random(seed).sample(range(len(answers)), len(answers))
        classes = grader.answer_classes([answers[i] for i in order])
        for (i, one), (j, other) in itertools.combinations(zip(order, classes, strict=True), 2):
            assert (one == other) == (expected[i] == expected[j])


def test_a_non_transitive_vote_is_the_same_in_any_order(grader):
    answers, rewards = ["42", "0.42", r"42\%", "7", "7"], [True, False, True, False, False]
    shares = set()
    for order in itertools.permutations(range(5)):
        classes = grader.answer_classes([answers[i] for i in order])
        shares.add(majority_vote(classes, [rewards[i] for i in order]))
    assert shares == {2 / 3}


def test_comparing_by_value_first_changes_no_class(grader):
    answers = [
        r"\frac{1}{3}",
        "0.333333",
        "0.33",
        "33",
        r"33\%",
        "0.333333333",
        r"\sqrt{2}",
        "1.414214",
        r"\frac{2}{\sqrt{2}}",
    ]
    answers += ["x=5", "5", "5.0000000001", "5.001", r"2\pi", "6.283185", "e", r"\text{e}", r"[0,1)", r"10^{3}", "1000"]
    classes = grader.answer_classes(answers)
    joined = {i: {i} for i in range(len(answers))}
    for i, j in itertools.combinations(range(len(answers)), 2):
        if any(grader.grade([(answers[i], answers[j]), (answers[j], answers[i])])):
            union = joined[i] | joined[j]
            joined.update(dict.fromkeys(union, union))
    for i, j in itertools.combinations(range(len(answers)), 2):
        assert (classes[i] == classes[j]) == (j in joined[i]), (answers[i], answers[j])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("(1,2)", "(2,1)"),
        ("[0,2]", r"[0,1] \cup [1,2]"),
        (r"\{1, 2, 2\}", r"\{1,2\}"),
        ("(1, 0.5)", r"(1,\frac{1}{2})"),
    ],
)
def test_the_numbers_of_equal_answers_are_never_far_apart(grader, one, other):
    numbers = [grader._submit("numbers", answer).result() for answer in (one, other)]
    if any(grader.grade([(one, other), (other, one)])):
        assert not grading_utils._far_apart(*numbers)


def test_thousands_of_distinct_numbers_cost_little(grader):
    answers = [str(i) for i in range(2000)] + [rf"\frac{{{i}}}{{7}}" for i in range(1, 60)] + ["0.5", r"\frac{1}{2}"]
    start = time.monotonic()
    classes = grader.answer_classes(answers)
    assert time.monotonic() - start < 60
    assert classes[-1] == classes[-2]
    assert len(set(classes)) == 2000 + 59 - 8 + 1  # 7/7 .. 56/7 are integers


def test_too_many_comparisons_are_cut_in_an_order_of_their_own(grader, monkeypatch, caplog):
    monkeypatch.setattr(grading_utils, "MAX_COMPARISONS", 3)
    answers = ["x+1", "1+x", "x+1", "1+x", "x+2", "2+x", "y+2", "2+y"]
    sizes = set()
    for seed in range(3):
        shuffled = random.Random(seed).sample(answers, len(answers))
        classes = dict(zip(shuffled, grader.answer_classes(shuffled), strict=True))
        assert classes["x+1"] == classes["1+x"]  # the frequent ones are compared first
        sizes.add(tuple(sorted(Counter(classes.values()).values())))
    assert len(sizes) == 1
    assert "only 3 pairs were compared" in caplog.text


def test_repetitions_of_a_problem_share_one_numbering(grader):
    lines = [
        {"data_idx": 4, "repeat_idx": 0, "processed_answer": ["0.5", "1"]},
        {"data_idx": 4, "repeat_idx": 1, "processed_answer": ["", r"\frac12"]},
        {"data_idx": 9, "repeat_idx": 0, "processed_answer": ["2"]},
    ]
    assert problem_classes(lines, grader) == {4: {0: [0, 1], 1: [-1, 0]}, 9: {0: [0]}}


# ------------------------------------------------------------------------------------------------- workers that fail


@pytest.fixture
def mean_worker(tmp_path, monkeypatch):
    """The real worker loop around answers that kill, hang or exhaust it."""
    program = f"""
        import ctypes, os, sys, time
        sys.path.insert(0, {ROOT!r})
        from eval_lib import grading_worker
        from math_verify.errors import TimeoutException

        def equal(gold, answer):
            if answer == "die":
                os._exit(9)
            if answer == "hang":
                ctypes.PyDLL(None).sleep(600)  # in C code, with the interpreter's lock held: no signal handler runs
            if answer == "memory":
                bytearray(1 << 40)
            if answer == "late":
                raise TimeoutException
            if answer == "slow":
                time.sleep(1)
            return answer == "right"

        grading_worker._equal = equal
        grading_worker._numbers = lambda text: []
        grading_worker.serve()
    """
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(program))
    monkeypatch.setattr(grading_utils, "WORKER", path)
    return path


def test_a_worker_that_dies_or_hangs_costs_one_pair_and_a_bounded_time(mean_worker, caplog):
    with Grader(num_workers=1, pair_seconds=1) as grader:
        start = time.monotonic()
        answers = ["right", "die", "right ", "hang", "wrong", "memory", "late", "right"]
        assert grader.grade(("gold", answer) for answer in answers) == [
            True, False, True, False, False, False, False, True
        ]  # fmt: skip
        assert time.monotonic() - start < 30
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 4
    for word, warning in zip(("die", "hang", "memory", "late"), warnings, strict=True):
        assert word in warning
        assert "counted as not equal" in warning


def test_a_hung_worker_ends_itself_when_nobody_is_left_to_end_it(mean_worker):
    worker = subprocess.Popen([sys.executable, mean_worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker:
        assert worker.stdout.readline() == b'"ready"\n'
        worker.stdin.write(json.dumps({"do": "equal", "answers": ["gold", "hang"], "seconds": 1}).encode() + b"\n")
        worker.stdin.flush()
        assert worker.wait(timeout=20) != 0


def test_an_answer_that_hangs_twice_is_not_compared_further(mean_worker):
    with Grader(num_workers=1, pair_seconds=1) as grader:
        answers = ["late", *(f"wrong {i}" for i in range(30))]
        classes = grader.answer_classes(answers)
        assert len(set(classes)) == len(answers)
        failed = [key for key, future in grader._cache.items() if key[0] == "equal" and future.result() is None]
        assert 2 <= len(failed) <= 8  # those of one batch


def test_the_event_loop_goes_on_and_a_cancelled_caller_spoils_nothing(mean_worker):
    async def run():
        ticks = 0
        grading = asyncio.ensure_future(grader.agrade([("gold", "slow"), ("gold", "right"), ("5", "5")]))
        cancelled = asyncio.ensure_future(grader.agrade([("gold", "slow")]))
        await asyncio.sleep(0.2)
        cancelled.cancel()
        while not grading.done():
            await asyncio.sleep(0.01)
            ticks += 1
        classes = await grader.aanswer_classes(["a", "b", "a", ""])
        return ticks, await grading, classes

    with Grader(num_workers=1, pair_seconds=5) as grader:
        ticks, verdicts, classes = asyncio.run(run())
    assert ticks > 20
    assert verdicts == [False, True, True]
    assert classes == [0, 1, 0, -1]


def test_closing_ends_workers_and_pending_pairs_are_no_verdicts(mean_worker):
    grader = Grader(num_workers=1, pair_seconds=60)
    assert grader.grade([("gold", "right")]) == [True]
    (worker,) = grader._workers
    waiting = [grader._verdict("gold", "hang"), grader._verdict("gold", "wrong")]
    time.sleep(0.2)
    start = time.monotonic()
    grader.close()
    grader.close()
    assert time.monotonic() - start < 5
    assert worker.process.poll() is not None
    for verdict in waiting:
        with pytest.raises(GradingError, match="closed before"):
            grading_utils._known(verdict)


def test_a_worker_that_cannot_start_is_an_error_that_says_why(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.setattr(grading_utils, "WORKER", tmp_path / "worker.py")
    with Grader(num_workers=1) as grader, pytest.raises(GradingError, match="No module named math_verify"):
        grader.grade([("x", "y")])
