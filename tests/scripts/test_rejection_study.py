"""Wrong answers stay rejected: pairs made from real answers, and the comparison that is to find what is equal after all."""

import random

import pytest
import rejection_study

from common_lib.cli import UserError


def test_wrong_answers_to_real_problems_are_rejected(shared, capsys):
    """Some pairs of all kinds; `python scripts/rejection_study.py` takes all."""
    shared("data/math500/test.jsonl")
    shared("data/matharena/aime_2024.jsonl")
    status = rejection_study.main(["--most", "500"])
    assert (status, "0 accepted" in (printed := capsys.readouterr().out)) == (0, True), printed


def test_pairs_are_of_every_kind_and_wrong():
    truths = ["12", r"\frac{3}{4}", "-5+x", "7", "8", "9", "10", "11", "13", "14"]
    pairs = [pair for truth in truths for pair in rejection_study.wrong_answers(truth, truths, random.Random(0))]
    assert {pair.kind for pair in pairs} == {"a digit changed", "a sign flipped", "another problem's answer"}
    assert all(pair.wrong != pair.truth and pair.wrong in pair.written for pair in pairs)
    assert {"5+x", "-5-x", "-12"} <= {pair.wrong for pair in pairs}
    assert any(pair.wrong != pair.written for pair in pairs)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("0", "-0", True), ("055", r"55^\circ", True), ("505", "55", False), ("0.05", "0.5", False),
        (r"\frac{2}{4}", r"\dfrac{1}{2}", True), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        (r"\$36", r"36^\circ", True), ("1,2", "1, 2", True), (r"0,i\sqrt{6}", r"-0,i\sqrt{6}", True), (r"2\pi", r"\pi\cdot2", True),
        ("1,2", "2,1", False), ("1,2", "12", False), (r"\frac{1}{3}", "0.333333", False), ("x+1", "1+x", True), ("x+1", "x+2", False),
        (r"\text{east}", r"\text{east}", True), (r"\text{east}", r"\text{west}", False), ("204_8", "204", False), ("(1,2", "1,2", False),
    ],
)  # fmt: skip
def test_the_exact_comparison(one, other, equal):
    assert rejection_study.equal_in_value(one, other) is equal


def test_without_the_answers_it_says_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="needs the third-party answers"):
        rejection_study.true_answers(tmp_path)


def test_an_accepted_wrong_answer_is_shown_and_is_the_exit_status(monkeypatch, capsys):
    pairs = [
        rejection_study.Pair("a sign flipped", "5", "-5", "5"),
        rejection_study.Pair("a sign flipped", "0", "-0", "-0"),
    ]
    monkeypatch.setattr(rejection_study, "chosen_pairs", lambda most, seed: pairs)
    assert rejection_study.main([]) == 1
    printed = capsys.readouterr().out
    assert "1 wrong answers (2 with a sign flipped; 1 left out as equal in value), 1 accepted" in printed
    assert "accepted: '5' for '5'" in printed
