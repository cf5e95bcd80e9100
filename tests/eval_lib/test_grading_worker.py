"""The grading worker's own reading of answers, and a worker that is disturbed."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from eval_lib import grading_worker
from eval_lib.grading import Grader


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1/2", [0.5]), (r"\frac{3}{4}", [0.75]), ("(3, 1)", [1.0, 3.0]), (r"\{2, -1, 5\}", [-1.0, 2.0, 5.0]),
        ("[0, 4)", [0.0, 4.0]), (r"2\pi", [6.283185307]), ("x", []), ("x + 1", []), (r"42\%", []), (r"\infty", []),
        ("1,5", []), ("", []), (r"i", []), (r"\text{word}", []),
    ],
)  # fmt: skip
def test_the_numbers_of_an_answer(text, numbers):
    assert grading_worker._numbers(text) == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1,5", "1.5", True), ("1,5", "15", False), (r"1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}", True),
        (r"\frac{1 \pm \sqrt{2}}{2}", r"\frac{1+\sqrt{2}}{2}, \frac{1-\sqrt{2}}{2}", True),
        (r"\frac{1 \pm \sqrt{2}}{2}", r"\frac{1+\sqrt{2}}{2}", False), ("the answer is $5$", "5", True),
        (r"8\sqrt{10}", "8", False), ("(1,2)", "(2,1)", False), ("[1,2]", "(1,2)", False),
    ],
)  # fmt: skip
def test_readings_that_are_equal(gold, answer, equal):
    assert grading_worker._equal(gold, answer) is equal


def test_a_worker_is_deaf_to_ctrl_c_and_prints_of_libraries_do_not_mix_with_its_replies(tmp_path):
    """Its parent handles signals; math-verify or SymPy may print what they like."""
    path = tmp_path / "worker.py"
    path.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from eval_lib import grading_worker
        def equal(gold, answer):
            print('{{"result": true}}', flush=True)
            print("warning", file=sys.stderr, flush=True)
            return answer == "right"
        grading_worker.serve(equal, numbers=lambda text: [1.5])
    """)
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, path], stdin=pipe, stdout=pipe, stderr=pipe) as worker:
        assert worker.stdout.readline() == b'"ready"\n'
        for number in (signal.SIGINT, signal.SIGTERM):
            worker.send_signal(number)
        requests = [("equal", ["g", "wrong"], False), ("numbers", ["x"], [1.5]), ("equal", ["g", "right"], True)]
        for do, answers, result in requests:
            worker.stdin.write(json.dumps({"do": do, "answers": answers, "seconds": 20}).encode() + b"\n")
            worker.stdin.flush()
            assert json.loads(worker.stdout.readline()) == {"result": result}
        worker.stdin.close()
        assert worker.wait(20) == 0
        assert worker.stderr.read() == b""


def test_verdicts_of_the_real_worker_are_those_of_the_functions():
    cases = [
        ("1,5", "1.5"),
        ("[1,2]", "(1,2)"),
        (r"\frac{1 \pm \sqrt{2}}{2}", r"\frac{1-\sqrt{2}}{2}, \frac{1+\sqrt{2}}{2}"),
    ]
    with Grader(1) as grader:
        assert grader.grade(cases) == [grading_worker._equal(*case) for case in cases] == [True, False, True]
