"""Grading and classes of equal answers; the worker processes that grade, and how they fail."""

import asyncio
import itertools
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from eval_lib.grading import Grader, GradingError
from eval_lib.normalise import as_integer, normalize_answer
from eval_utils import extract_answer, majority_vote


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=2) as grader:
        yield grader


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
        assert grader.worker_pids == []


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
        "in a box": (255, lambda pred: rf"\boxed{{{pred}}}"),
        "boxed in a response, extracted": (262, lambda pred: extract_answer(response.replace("%s", pred))),
        "the response's own box if it has one, extracted": (
            245,
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
def test_equal_answers_are_never_set_apart_by_their_numbers(grader, one, other):
    classes = grader.answer_classes([one, other])
    assert (classes[0] == classes[1]) == any(grader.grade([(one, other), (other, one)]))


def test_thousands_of_distinct_numbers_cost_little(grader):
    answers = [str(i) for i in range(2000)] + [rf"\frac{{{i}}}{{7}}" for i in range(1, 60)] + ["0.5", r"\frac{1}{2}"]
    start = time.monotonic()
    classes = grader.answer_classes(answers)
    assert time.monotonic() - start < 60
    assert classes[-1] == classes[-2]
    assert len(set(classes)) == 2000 + 59 - 8 + 1  # 7/7 .. 56/7 are integers


def test_too_many_comparisons_are_cut_in_an_order_of_their_own(caplog):
    answers = ["x+1", "1+x", "x+1", "1+x", "x+2", "2+x", "y+2", "2+y"]
    sizes = set()
    with Grader(num_workers=2, max_comparisons=3) as grader:
        for seed in range(3):
            shuffled = random.Random(seed).sample(answers, len(answers))
            classes = dict(zip(shuffled, grader.answer_classes(shuffled), strict=True))
            assert classes["x+1"] == classes["1+x"]  # the frequent ones are compared first
            sizes.add(tuple(sorted(Counter(classes.values()).values())))
    assert len(sizes) == 1
    assert "only 3 pairs were compared" in caplog.text


# ------------------------------------------------------------------------------------------------- workers that fail


@pytest.fixture
def mean_worker(tmp_path):
    """The real worker loop around answers that kill, hang or exhaust it."""
    program = f"""
        import ctypes, os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
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

        grading_worker.serve(equal, numbers=lambda text: [])
    """
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(program))
    return path


def test_a_worker_that_dies_or_hangs_costs_one_pair_and_a_bounded_time(mean_worker, caplog):
    with Grader(1, pair_seconds=1, program=mean_worker) as grader:
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


def test_an_answer_that_hangs_twice_is_not_compared_further(mean_worker, caplog):
    with Grader(1, pair_seconds=1, program=mean_worker) as grader:
        answers = ["late", *(f"wrong {i}" for i in range(30))]
        classes = grader.answer_classes(answers)
        assert len(set(classes)) == len(answers)
    failed = [record for record in caplog.records if "'late' with" in record.message or "with 'late'" in record.message]
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
        return ticks, await grading

    with Grader(1, pair_seconds=5, program=mean_worker) as grader:
        ticks, verdicts = asyncio.run(run())
    assert ticks > 20
    assert verdicts == [False, True, True]


def test_closing_ends_workers_and_pending_pairs_are_no_verdicts(mean_worker):
    grader = Grader(1, pair_seconds=60, program=mean_worker)
    assert grader.grade([("gold", "right")]) == [True]
    (pid,) = grader.worker_pids
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(grader.grade, [("gold", answer)]) for answer in ("hang", "wrong")]
        time.sleep(0.2)
        start = time.monotonic()
        grader.close()
        grader.close()
        assert time.monotonic() - start < 5
        for verdict in waiting:
            with pytest.raises(GradingError, match="closed before"):
                verdict.result()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_cannot_start_is_an_error_that_says_why(tmp_path):
    (tmp_path / "worker.py").write_text("raise ImportError('No module named math_verify')")
    with (
        Grader(1, program=tmp_path / "worker.py") as grader,
        pytest.raises(GradingError, match="No module named math_verify"),
    ):
        grader.grade([("x", "y")])
