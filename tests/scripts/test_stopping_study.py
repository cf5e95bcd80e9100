"""The study of stopping rules: its rules, made for many simulations at once, are those of the library; its short form."""

import json
from types import SimpleNamespace

import handmade_runs
import numpy as np
import pytest
import stopping_study
from parser_flags import flags_of
from plain_stops import equal_window
from stopping_study import Population, tie

from common_lib.cli import UserError
from eval_lib.stopping import Stopping, stopping_point
from eval_lib.stopping_peers import WINDOW, posterior_needs


def test_rules_on_many_simulations_are_those_on_one():
    trees, beams, cases = 40, 2, [Population("clear", [0.8, 0.1, 0.1]), tie(3), Population("close", [0.6, 0.4])]
    kinds = []
    for case in cases:
        names = len(case.shares)
        answers, values = stopping_study.draw(case, trees, beams, 12, np.random.default_rng(7))
        words = [
            [(["abc"[a]] * beams, list(v)) for a, v in zip(*one, strict=True)]
            for one in zip(answers, values, strict=True)
        ]
        of_tree = values.mean(-1, keepdims=True)
        for vote, observations in (("weighted", of_tree), ("majority", np.ones_like(of_tree))):
            at_once = stopping_study.sure(answers, observations[..., 0] * beams, names, trees, beams)
            tested = stopping_study.certified(answers, observations, names, 0.3)
            first = stopping_study.earlier(tested, at_once)
            for kind, (stops, leader) in (("sure", at_once), ("certified", first)):
                for i, searches in enumerate(words):
                    T, word = stopping_point(
                        Stopping(kind, vote, 0.3, trees, beams), searches, stopping_study.Equality([])
                    )
                    if trees > T:  # at the last one the study's certificate is a stop as well
                        assert (T, word != "full") == (stops[i] or trees, bool(stops[i]))
                        (best,) = stopping_study.winning(searches[:T], stopping_study.Equality([]), vote)
                        assert best == {"abc"[leader[i]]}
                    else:
                        assert stops[i] in (0, trees)
                    kinds.append(word)
        needs = posterior_needs(trees * beams)
        posterior, _ = stopping_study.beta_posterior(answers, beams, names)
        windows, _ = stopping_study.equal_windows(answers, beams, names)
        for i, row in enumerate(answers):
            counts = [sorted(np.bincount(row[:t], minlength=3) * beams)[-2:] for t in range(1, trees + 1)]
            stops = [t for t, (second, first) in enumerate(counts, 1) if first >= needs[first + second]]
            assert posterior[i] == (stops[0] if stops else 0)
            assert windows[i] == (equal_window([[a] * beams for a in row], WINDOW) or 0)
    assert set(kinds) == {"sure", "certified", "full"}


def test_a_short_study_is_as_it_must_be(capsys):
    assert stopping_study.main(["--simulations", "100", "--trees", "40", "--random_runs", "10"]) == 0
    printed = capsys.readouterr().out
    assert "of 100 simulations, up to 40 trees, alpha 0.05" in printed
    assert "10 random runs: 100 problems" in printed and "0 with another vote" in printed
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("tie of 2                      8")]
    certified, by_count, singly = map(float, row[4:7])
    assert max(certified, by_count) < 10 < 30 < singly


def test_what_is_not_as_it_must_be_is_said_and_is_the_exit_status(monkeypatch, capsys):
    right = stopping_study.certified
    monkeypatch.setattr(stopping_study, "FALSE_CASES", [tie(2)])
    monkeypatch.setattr(stopping_study, "SAVED_CASES", [tie(3)])
    monkeypatch.setattr(
        stopping_study, "certified", lambda answers, values, *rest: right(answers, values.repeat(8, -1), *rest)
    )
    monkeypatch.setattr(stopping_study, "sure", lambda answers, *rest: (np.ones_like(answers[:, 0]), answers[:, 0]))
    monkeypatch.setattr(stopping_study, "check_random_runs", lambda *_: (9, 8, 7))
    assert stopping_study.main(["--simulations", "50", "--trees", "20"]) == 1
    printed = capsys.readouterr().out
    assert "NOT AS IT MUST BE: tie of 2, 1 beams: certified is false in" in printed
    assert "NOT AS IT MUST BE: tie of 3, 16 repetitions: by count" not in printed
    assert "NOT AS IT MUST BE: tie of 3, 16 repetitions: sure by count changed a vote" in printed
    assert "NOT AS IT MUST BE: sure changed 7 votes of random runs" in printed
    monkeypatch.setattr(stopping_study, "certified", lambda answers, *_: (0 * answers[:, 0], 0 * answers[:, 0]))
    assert (
        "counted singly do no harm"
        in stopping_study.false_table(SimpleNamespace(simulations=5, trees=5, alpha=0.05, seed=1))[1].pop()
    )


def test_whom_a_certificate_may_name():
    assert tie(3).heaviest(False) == tie(3).heaviest(True) == -1
    assert Population("", [0.49, 0.51]).heaviest(False) == Population("", [0.49, 0.51]).heaviest(True) == 1
    by_value = Population("", [0.6, 0.4], [(2, 4), (2, 2)])
    assert (by_value.heaviest(False), by_value.heaviest(True)) == (-1, 0)


def test_the_same_vote_may_have_grown_and_merged():
    a, b, ab, c = (frozenset(word) for word in ("a", "b", "ab", "c"))
    assert stopping_study.same_vote({a}, {ab}) and stopping_study.same_vote({a, b}, {ab})
    assert not stopping_study.same_vote({a}, {c}) and not stopping_study.same_vote({a}, {a, c})
    assert not stopping_study.same_vote({a, c}, {ab})


def test_flags_of_the_stopping_study(monkeypatch, tmp_path, capsys):
    seen = []

    def table(args):
        seen.append((args.simulations, args.trees, args.alpha, args.seed))
        return stopping_study.Table("", [], []), []

    monkeypatch.setattr(stopping_study, "false_table", table)
    monkeypatch.setattr(stopping_study, "saved_table", table)
    monkeypatch.setattr(stopping_study, "check_random_runs", lambda *args: seen.append(args) or (1, 1, 0))
    monkeypatch.setattr(stopping_study, "as_text", lambda table, width: "")
    flags = ["--simulations", "11", "--trees", "12", "--alpha", "0.13", "--random_runs", "14", "--seed", "15"]
    assert stopping_study.main(flags) == 0
    assert seen == [(11, 12, 0.13, 15)] * 2 + [(14, 5, 15)]
    assert flags_of(stopping_study.main, monkeypatch) == {"simulations", "trees", "alpha", "random_runs", "seed", "run"}


def test_a_run_that_is_given_is_replayed_in_its_order(tmp_path, capsys):
    lines = [
        handmade_runs.result(
            i, r, 2, ["1", "1.0"] if i else [f"{r}", ""], [True, False], [0.5, 1.0], tokens_generated=r
        )
        for r in range(6)
        for i in range(2)
    ]
    path = handmade_runs.write_run(tmp_path / "run.jsonl", lines, meta=handmade_runs.settings(2, 6, 2, 2, 1))
    assert stopping_study.main(["--run", str(path), "--alpha", "0.6"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("sure", "certified"))]
    # problem 0 needs all 6; problem 1, all alike, is sure of 1.5 t > 2 (6 - t) after 4 and of 2 t > 2 (6 - t) after 4 too,
    # certified of x = 0.75 and of x = 1 after 4 and 3
    assert [row[:4] for row in rows] == [
        ["sure", "weighted", "5.00", "16.7"], ["sure", "majority", "5.00", "16.7"],
        ["certified", "weighted", "5.00", "16.7"], ["certified", "majority", "4.50", "25.0"],
    ]  # fmt: skip
    assert rows[0][4:] == ["30.0", "2", "of", "2"] and rows[3][4] == "40.0"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    with pytest.raises(UserError, match="--run takes a finished run"):
        stopping_study.main(["--run", str(path)])
