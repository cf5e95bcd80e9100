"""What the grader asks its workers, and how often: a worker that notes every request in the place of math-verify."""

import itertools
import json
import random
import textwrap

import pytest

from eval_lib.grading import Grader
from eval_lib.normalise import normalize_answer


@pytest.fixture
def clerk(tmp_path):
    """A worker program that notes requests in `log`. x and y are equal with x as gold, others that share a word; n5 is a number."""
    program = f"""
        import json, os, sys, time
        print('"ready"', flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            note = request | {{"pid": os.getpid(), "hash_seed": os.environ.get("PYTHONHASHSEED")}}
            with open({str(tmp_path / "log")!r}, "a") as log:
                log.write(json.dumps(note) + "\\n")
            answers = request["answers"]
            if answers[-1].startswith("slow"):
                time.sleep(0.1)
            if request["do"] == "numbers":
                words = answers[0].split()
                reply = {{"result": [float(word[1:]) for word in words if word[0] == "n"]}}
                if answers[0].startswith("many"):
                    reply = {{"result": [0.5] * 50_000}}
            elif "fails" in answers[1]:
                reply = {{"failure": "failed (TestError)"}}
            else:
                reply = {{"result": answers == ["x", "y"] or bool(set(answers[0].split()) & set(answers[1].split()))}}
            print(json.dumps(reply), flush=True)
    """
    path = tmp_path / "clerk.py"
    path.write_text(textwrap.dedent(program))
    return path


@pytest.fixture
def asked(tmp_path):
    """The requests so far; `do`: of one kind."""

    def read(do=None):
        lines = map(json.loads, (tmp_path / "log").read_text().splitlines()) if (tmp_path / "log").exists() else ()
        return [line for line in lines if do in (None, line["do"])]

    return read


def test_a_pair_is_asked_once_with_the_gold_first_and_the_time_it_has(clerk, asked):
    with Grader(2, pair_seconds=7, program=clerk) as grader:
        assert grader.grade([("x", "y"), ("y", "x"), ("x", " y "), ("$x$", "y."), ("x", "z")]) == [
            True, False, True, True, False,
        ]  # fmt: skip
        assert grader.grade([("x", "y")]) == [True]
    requests = asked()
    assert sorted(request["answers"] for request in requests) == [["x", "y"], ["x", "z"], ["y", "x"]]
    assert {(request["do"], request["seconds"], request["hash_seed"]) for request in requests} == {("equal", 7, "0")}


def test_one_direction_is_enough_for_a_class_and_numbers_follow_the_first_appearance(clerk):
    with Grader(2, program=clerk) as grader:
        assert grader.answer_classes(["z", "y", "", "x", "q", "z", "y"]) == [0, 1, -1, 1, 2, 0, 1]
        assert grader.answer_classes(["y", "x"]) == grader.answer_classes(["x", "y"]) == [0, 0]
        assert grader.answer_classes([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_classes_that_a_later_answer_joins_become_one_with_all_their_members(clerk, seed):
    """Two chains, of six and of three, whose ends know nothing of each other; whatever comes first."""
    answers = ["a b", "b c", "c d", "d e", "e f", "f g", "p q", "q r", "r s", "z"]
    expected = dict.fromkeys(answers[:6], 0) | dict.fromkeys(answers[6:9], 1) | {"z": 2}
    order = random.Random(seed).sample(answers, len(answers))
    with Grader(2, program=clerk) as grader:
        classes = grader.answer_classes(order)
    for (i, one), (j, other) in itertools.combinations(enumerate(order), 2):
        assert (classes[i] == classes[j]) == (expected[one] == expected[other]), (one, other)


def test_as_many_workers_as_it_was_given_work_at_once(clerk, asked):
    for workers in (1, 3):
        before = len(asked())
        with Grader(workers, program=clerk) as grader:
            grader.grade([("g", f"slow {i}") for i in range(6)])
            assert len(grader.worker_pids) == workers
        found = asked()[before:]
        assert (len(found), len({request["pid"] for request in found})) == (6, workers)


def test_only_answers_whose_numbers_are_near_are_compared(clerk, asked):
    """math-verify rounds to six decimals; a few units of that, relative to the size, are always compared."""
    far = ["a n1", "b n1.001", "c n1 n1", "d n-1", "e n1000", "f n1000.2"]
    near = ["g n5", "h n5.0001", "i n7000", "j n7000.5"]
    with Grader(2, program=clerk) as grader:
        assert len(set(grader.answer_classes(far + near))) == 10
    pairs = {tuple(sorted(request["answers"])) for request in asked("equal")}
    assert pairs == {("g n5", "h n5.0001"), ("i n7000", "j n7000.5")}


def test_answers_without_numbers_are_compared_with_all_but_integers_never_with_each_other(clerk, asked):
    with Grader(2, program=clerk) as grader:
        grader.answer_classes(["word", "5", "7", "5 n5"])
    assert {tuple(request["answers"]) for request in asked("numbers")} == {("word",), ("5 n5",)}
    pairs = {tuple(sorted(request["answers"])) for request in asked("equal")}
    assert pairs == {("5", "word"), ("7", "word"), ("5", "5 n5"), ("5 n5", "word")}


def test_a_reply_may_be_longer_than_a_pipe(clerk):
    with Grader(1, program=clerk) as grader:
        assert grader.answer_classes(["many-a", "many-b", "many-a"]) == [0, 1, 0]


def test_an_answer_of_endless_length_equals_only_itself(clerk, asked):
    endless = "x" * 20_001
    with Grader(1, program=clerk) as grader:
        assert grader.grade([("x", endless), (endless, endless), ("x", "x" * 20_000)]) == [False, True, False]
        assert grader.answer_classes([endless, "q", endless]) == [0, 1, 0]
    assert max(len(answer) for request in asked() for answer in request["answers"]) == 20_000


def test_a_failed_comparison_is_not_equal_and_said_with_its_answers(clerk, caplog):
    with Grader(1, program=clerk) as grader:
        assert grader.grade([("gold", "fails"), ("gold", "gold")]) == [False, True]
        assert grader.answer_classes(["one", "fails"]) == [0, 1]
    assert "comparing 'gold' with 'fails' failed (TestError); counted as not equal" in caplog.text


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  a \n b ", "a b"), ("$x$", "x"), (r"\(x\)", "x"), (r"\[ x \]", "x"), ("$$x$$", "x"), ("x.", "x"), ("1. .", "1"),
        ("a..", "a.."), ("...", "..."), ("$x$ or $y$", "$x$ or $y$"), ("\N{MINUS SIGN}x", "-x"), ("$", "$"), (".", ""),
        ("$x.$", "x"), ("$x$.", "x"),
    ],
)  # fmt: skip
def test_the_form_of_an_answer(text, form):
    assert normalize_answer(text) == form
