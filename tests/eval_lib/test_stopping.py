"""Stopping early: rules held against plain exact ones, every way in which a small problem can go on, and random runs."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from stopping_study import Equality, class_sums, random_problem, same_vote, winning

from eval_lib.stopping import LAMBDAS, Stopping, StopTest, is_sure, log_evidence, stopping_point
from eval_utils import weighted_vote

# ------------------------------------------------------------------------------------------------------ plain reference


def plain_kind(stopping, searches, equal):
    """What `StopTest` is to say of these searches, from the definition."""
    sums = class_sums(searches, equal, stopping.vote)
    leader = max(sums, key=lambda members: sum(sums[members]), default=None)
    if leader is None:
        return None
    rivals = [row for members, row in sums.items() if members != leader] or [[Fraction(0)] * len(searches)]
    evidence = []
    for rival in rivals if stopping.kind == "certified" else ():
        products = [
            math.prod(1 + la * float(a - b) / stopping.beams for a, b in zip(sums[leader], rival, strict=True))
            for la in np.linspace(0.02, 0.98, 25)
        ]
        evidence.append(sum(products) / 25)
    if stopping.kind == "certified" and min(evidence) >= 2 / stopping.alpha:
        return "certified"
    left = stopping.repetitions - len(searches)
    others = sum(sum(row) for row in rivals) + left * stopping.beams
    return "sure" if left and sum(sums[leader]) > others else None


# --------------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("kind", ["sure", "certified"])
@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_random_runs_stop_where_the_definition_says_and_sure_ones_keep_the_vote(kind, vote):
    rng = random.Random(f"{kind} {vote}")
    seen = {"sure": 0, "certified": 0, "full": 0}
    for _ in range(1000 if kind == "sure" else 150):
        trees, beams = rng.randint(1, 14), rng.randint(1, 4)
        stopping = Stopping(kind, vote, rng.choice([0.2, 0.9]), trees, beams)
        searches, equal = random_problem(rng, trees, beams)
        kinds = [plain_kind(stopping, searches[:t], equal) for t in range(1, trees + 1)]
        first = next(((t, k) for t, k in enumerate(kinds, 1) if k), (trees, "full"))
        assert stopping_point(stopping, searches, equal) == first
        test = StopTest(stopping, equal)
        assert [test.add(*search) for search in searches] == kinds
        seen[first[1]] += 1
        if first[1] == "sure":
            now = winning(searches[: first[0]], equal, vote)
            assert len(now) == 1 and same_vote(now, winning(searches, equal, vote))
    assert min(seen["full"], seen["sure"]) > 5 and (seen["certified"] > 5) == (kind == "certified")


@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_sure_is_said_exactly_where_no_way_to_go_on_changes_the_vote(vote):
    """Every way in which two answers can still come: any answer so far, none, a new one, or one that is equal to all but
    the leader (so that all its rivals merge), with a weight of 0, a half or 1."""
    rng = random.Random(vote)
    said = 0
    for _ in range(20):
        trees, beams = rng.choice([(1, 2), (2, 1)])  # that are to come
        searches = [
            (
                [rng.choice(["a", "a", "a", "a", "b", "c", ""]) for _ in range(beams)],
                [rng.choice([0.0, 0.75, 1.0])] * beams,
            )
            for _ in range(rng.randint(2, 7))
        ]
        totals = class_sums(searches, Equality([]), vote)
        if not totals:
            continue
        (leader,) = max(totals, key=lambda members: sum(totals[members]))
        equal = Equality([("bridge", name) for name in "abcd" if name != leader])
        stopping = Stopping("sure", vote, 0.05, len(searches) + trees, beams)
        sure = plain_kind(stopping, searches, equal) == "sure"
        test = StopTest(stopping, equal)
        assert ([test.add(*search) for search in searches][-1] == "sure") == sure
        changed = False
        for pair in itertools.product(["", *"abcd", "bridge"], repeat=2):
            for scores in itertools.product([0.0, 0.5, 1.0], repeat=2):
                last = [([a], [s]) for a, s in zip(pair, scores, strict=True)] if trees == 2 else [(pair, scores)]
                won = winning(searches + last, equal, vote)
                changed |= not (len(won) == 1 and leader in next(iter(won)))
        assert sure != changed, (searches, leader)
        said += sure
    assert said >= 3


# ---------------------------------------------------------------------------------------------------------------- rules


def never(answers):
    raise AssertionError("classes are not needed")


def test_a_run_that_is_not_to_stop_asks_for_no_classes():
    stopping = Stopping("none", "weighted", 0.05, 3, 1)
    assert stopping_point(stopping, [(["a"], [1.0])] * 3, never) == (3, "full")


def test_classes_are_asked_for_where_an_answer_is_new():
    equal = Equality([])
    test = StopTest(Stopping("sure", "majority", 0.05, 9, 2), equal)
    for answers in (["a", ""], ["a", "a"], ["", ""], ["a", "b"], ["b", "a"]):
        test.add(answers, [0.5, 0.5])
    assert equal.asked == 2


def test_no_search_is_read_beyond_the_point():
    searches = iter([(["a"], [1.0])] * 5)
    assert stopping_point(Stopping("sure", "majority", 0.05, 5, 1), searches, Equality([])) == (3, "sure")
    assert len(list(searches)) == 2


def test_a_tie_within_rounding_is_not_sure():
    assert is_sure(np.array([3.0, 1.0]), 1.0)
    assert not is_sure(np.array([3.0, 2.0]), 1.0)
    assert not is_sure(np.array([3.0, 2.0 - 3e-9]), 1.0)  # would win a vote as well
    assert is_sure(np.array([3.0, 2.0 - 1e-8]), 1.0)
    assert not is_sure(np.array([]), 1.0) and not is_sure(np.zeros(2), 1.0)
    almost = 2.0 - 2e-9
    assert weighted_vote([0, 1], [True, False], [3.0, almost + 1.0]) == 0.5  # the vote calls it a tie


def test_nobody_leads_while_all_weights_are_zero():
    """The count would decide, but the first value above 0 turns the vote."""
    stopping, tree = Stopping("certified", "weighted", 0.05, 40, 2), (["a", "a"], [0.0, 0.0])
    assert stopping_point(stopping, [tree] * 40, Equality([])) == (40, "full")
    assert weighted_vote([0] * 78 + [1, -1], [False] * 78 + [True, False], [0.0] * 78 + [1e-12, 0.0]) == 1.0


def test_the_last_repetition_may_certify_but_is_not_called_sure():
    trees = [(["a"], [1.0])] * 9
    alone = next(t for t in range(1, 20) if log_evidence(np.ones(t)) >= math.log(40))
    certified = Stopping("certified", "weighted", 0.05, alone, 1)
    assert StopTest(certified, Equality([])).add(*trees[0]) is None
    (t, kind) = stopping_point(Stopping("certified", "weighted", 0.05, 99, 1), trees, Equality([]))
    assert (t, kind) == (alone, "certified")  # alone: a rival of weight 0
    test = StopTest(Stopping("sure", "weighted", 0.05, 1, 1), Equality([]))
    assert test.add(*trees[0]) is None
    assert stopping_point(Stopping("sure", "weighted", 0.05, 1, 1), trees, Equality([])) == (1, "full")


def test_a_tree_is_one_observation_however_many_beams_agree():
    one = stopping_point(Stopping("certified", "majority", 0.05, 99, 1), [(["a"], [0.5])] * 99, Equality([]))
    eight = stopping_point(Stopping("certified", "majority", 0.05, 99, 8), [(["a"] * 8, [0.5] * 8)] * 99, Equality([]))
    assert one == eight


def test_certified_comes_before_sure_where_both_hold():
    trees = [(["a"], [1.0])] * 20
    (first, _) = stopping_point(Stopping("certified", "weighted", 0.05, 99, 1), trees, Equality([]))
    both = Stopping("certified", "weighted", 0.05, 2 * first - 1, 1)
    (sure, _) = stopping_point(Stopping("sure", "weighted", 0.05, 2 * first - 1, 1), trees, Equality([]))
    assert sure == first and stopping_point(both, trees, Equality([])) == (first, "certified")


def test_evidence_of_many_trees_neither_overflows_nor_vanishes():
    series = np.array([np.ones(4000), -np.ones(4000), np.zeros(4000)])
    up, down, even = log_evidence(series)
    assert up == pytest.approx(4000 * math.log(1.98) - math.log(25))
    assert down == pytest.approx(4000 * math.log(0.98) - math.log(25), rel=1e-6)
    assert even == pytest.approx(0.0)
    few = np.array([0.5, -1.0, 0.25])
    plain = np.mean([math.prod(1 + la * x for x in few) for la in LAMBDAS])
    assert math.exp(log_evidence(few)) == pytest.approx(plain)


def test_late_merging_counts_from_the_first_repetition():
    """b and c are rivals until d is equal to both; then they are one, heavier than the leader."""
    equal = Equality([("b", "d"), ("c", "d")])
    trees = [(["a"] * 4 + ["b"] * 2 + ["c"] * 2, [1.0] * 8)] * 30
    test = StopTest(Stopping("certified", "majority", 0.9, 99, 8), equal)
    said = [test.add(*tree) for tree in trees]
    assert "certified" in said
    assert test.add(["d"] * 8, [1.0] * 8) is None
    assert test.class_weights().sum(0).tolist() == [120.0, 128.0]


@pytest.mark.parametrize(
    ("answers", "scores"),
    [(["a", "b", "c"], [0.5] * 3), (["a"], [0.5, 0.5]), (["a"], [1.5]), (["a"], [-0.1]), (["a"], [math.nan])],
)
def test_what_the_rules_do_not_hold_for_is_refused(answers, scores):
    with pytest.raises(ValueError):
        StopTest(Stopping("sure", "weighted", 0.05, 4, 2), Equality([])).add(answers, scores)


def test_more_repetitions_than_planned_are_refused():
    test = StopTest(Stopping("sure", "weighted", 0.05, 1, 2), Equality([]))
    test.add(["a"], [0.5])
    with pytest.raises(ValueError, match="more repetitions"):
        test.add(["a"], [0.5])
    for wrong in (dict(kind="certain"), dict(vote="bon"), dict(alpha=0.0), dict(alpha=1.0), dict(beams=0)):
        with pytest.raises(ValueError):
            Stopping(**(dict(kind="sure", vote="weighted", alpha=0.05, repetitions=1, beams=1) | wrong))
