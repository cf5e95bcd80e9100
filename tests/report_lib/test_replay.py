"""Replayed policies against plain loops: the rules of eval_lib/stopping.py, votes of eval_utils, groups counted one by one."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from plain_stops import equal_window

from eval_lib.stopping import Stopping, log_evidence, stopping_point
from eval_lib.stopping_peers import lead_posterior, posterior_needs
from eval_utils import best_of_n, majority_vote, weighted_vote
from report_lib.policies import VOTES, Policy, parse_policy
from report_lib.prefix_votes import Answers, look_at_prefixes
from report_lib.replay import COSTS, FIGURES, RecordedProblem, orders_of, replay

# Which words are equal beside themselves: b joins a and c, and e joins d and f only where it stands.
EQUAL = {frozenset(pair) for pair in ("ab", "bc", "de", "ef")}
WORDS = ["", "a", "b", "c", "d", "e", "f", "g"]


def classes_of(words):
    """Connected components among these words alone, numbered by first appearance; -1 for ''."""
    groups = []
    for word in filter(None, words):
        near = [group for group in groups if any(word == other or frozenset((word, other)) in EQUAL for other in group)]
        groups = [group for group in groups if group not in near] + [{word}.union(*near)]
    numbers = {}
    found = []
    for word in words:
        group = next((tuple(sorted(group)) for group in groups if word in group), None)
        found.append(-1 if group is None else numbers.setdefault(group, len(numbers)))
    return found


def draw_problem(seed, repetitions=7, beams=2, words=WORDS):
    """Answers with ties, empty ones, merging classes and values of 0; a few problems have no value above 0."""
    rng = np.random.default_rng(seed)
    answers = rng.choice(words, (repetitions, beams), p=rng.dirichlet(np.full(len(words), 0.6)))
    values = rng.integers(0, 5, (repetitions, beams)) / 4 * (seed % 5 > 0)
    right = (answers == "a") | ((answers == "b") & (rng.random((repetitions, beams)) < 0.5)) | (answers == "d")
    odds = rng.integers(-3, 4, (repetitions, beams)) / 2
    costs = rng.integers(1, 100, (len(COSTS), repetitions)).astype(float)
    return answers, RecordedProblem(seed, Answers(*kinds_of(answers), values, odds, right), costs)


def kinds_of(answers):
    """(kinds, equal): each word is a kind."""
    there = sorted(set(answers.flat) - {""})
    kinds = np.array([[there.index(word) if word else -1 for word in row] for row in answers.tolist()])
    equal = np.array([[a == b or frozenset((a, b)) in EQUAL for a in there] for b in there], bool)
    return kinds, equal.reshape(len(there), len(there))


def plain_vote(vote, words, values, odds, right):
    """(score, winning words) of a vote among some answers."""
    classes = classes_of(words)
    if vote == "best-of-n":
        top = max((v for v, c in zip(values, classes, strict=True) if c >= 0), default=None)
        won = {c for v, c in zip(values, classes, strict=True) if c >= 0 and v == top}
        return best_of_n(classes, right, values), members(won, classes, words)
    if vote == "log-odds":
        sums = {c: math.fsum(x for x, k in zip(odds, classes, strict=True) if k == c) for c in classes if c >= 0}
        won = {c for c in sums if sums[c] >= max(sums.values()) - 1e-9}
        parts = [np.mean([r for r, k in zip(right, classes, strict=True) if k == c]) for c in won]
        return float(np.mean(parts)) if parts else 0.0, members(won, classes, words)
    weights = {"majority": [1.0] * len(words), "weighted": values}.get(vote) or group_shares(classes, values)
    if not any(w for w, c in zip(weights, classes, strict=True) if c >= 0):
        weights = [1.0] * len(words)
    sums = {c: math.fsum(w for w, k in zip(weights, classes, strict=True) if k == c) for c in classes if c >= 0}
    won = {c for c in sums if sums[c] >= max(sums.values()) * (1 - 1e-9)}
    by_eval_utils = majority_vote(classes, right) if vote == "majority" else weighted_vote(classes, right, weights)
    return by_eval_utils, members(won, classes, words)


def members(won, classes, words):
    return {word for word, c in zip(words, classes, strict=True) if c in won}


def group_shares(classes, values):
    """How often each answer is the best of a group of ceil(sqrt(n)), drawn with replacement; n^m times as a share."""
    answered = [i for i, c in enumerate(classes) if c >= 0]
    size = math.isqrt(max(0, len(answered) - 1)) + 1
    shares = [0.0] * len(values)
    for i in answered:
        upto, below = (sum(test(values[j]) for j in answered) for test in (values[i].__ge__, values[i].__gt__))
        shares[i] = (upto**size - below**size) / (upto - below)
    return shares


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.25], [0.5, 0.5, 1.0, 0.25, 0.25], [0.0] * 4, [0.1, 0.9, 0.9, 0.9, 0.2, 0.4]]
)
def test_shares_of_bootstrap_groups_are_those_of_all_groups(values):
    """Each group's best, ties shared, counted over all groups; and the vote weighs by that."""
    n = len(values)
    groups = list(itertools.product(range(n), repeat=math.ceil(math.sqrt(n))))
    counted = np.zeros(n)
    for group in groups:
        top = [i for i in group if values[i] == max(values[j] for j in group)]
        for i in top:
            counted[i] += 1 / len(top)
    assert group_shares(range(n), values) == pytest.approx(counted.tolist())
    right = np.arange(n)[:, None] == 0
    kinds = np.zeros((n, 1), int)  # all are equal: the vote is right to the share of the first one
    answers = Answers(kinds, np.ones((1, 1), bool), np.array(values)[:, None], np.zeros((n, 1)), right)
    assert look_at_prefixes(answers, np.arange(n)[None]).score["bootstrap"][0, -1] == pytest.approx(
        counted[0] / len(groups)
    )


def plain_stop(policy, words, values, repetitions, beams):
    """T by a loop over t."""
    most = policy.most or repetitions
    if policy.stop in ("sure", "certified"):
        stopping = Stopping(policy.stop, policy.vote, policy.parameter or 0.05, most, beams)
        searches = zip(words[:most], values[:most], strict=True)
        return stopping_point(stopping, ((list(w), list(v)) for w, v in searches), classes_of)[0]
    for t in range(1, most):
        classes = classes_of([word for row in words[:t] for word in row])
        if policy.stop == "beta":
            counts = sorted(([classes.count(c) for c in set(classes) if c >= 0] + [0, 0]), reverse=True)
            if beta_tail(counts[0] + 1, counts[1] + 1) >= policy.parameter:
                return t
        trees = [classes[i : i + beams] for i in range(0, len(classes), beams)]
        if policy.stop == "esc" and equal_window(trees, policy.parameter) == t:
            return t
    return most


@cache
def beta_tail(a, b):
    """P(p > 1/2), p ~ Beta(a, b), by summing its density."""
    p = (np.arange(200_000) + 0.5) / 200_000
    density = np.exp((a - 1) * np.log(p) + (b - 1) * np.log1p(-p))
    return density[p > 0.5].sum() / density.sum()


POLICIES = [
    *(Policy(vote) for vote in VOTES),
    *(Policy(vote, most=m) for vote in VOTES for m in (1, 3)),
    *map(parse_policy, ["majority:sure", "weighted:sure", "majority:sure@4", "weighted:sure@5", "majority:certified:0.3",
                        "weighted:certified:0.6", "weighted:certified:0.5@6", "majority:beta:0.8", "weighted:beta:0.9@5",
                        "bootstrap:beta:0.7", "majority:esc:1", "best-of-n:esc:2", "log-odds:esc:2@6"]),
]  # fmt: skip


def plain_figures(policy, words, problem, order):
    """FIGURES of one policy on one order."""
    answers, (repetitions, beams) = problem.answers, words.shape
    words, values, odds, right = (x[order].tolist() for x in (words, answers.values, answers.log_odds, answers.right))

    def vote(t):
        flat = [[entry for row in rows[:t] for entry in row] for rows in (words, values, odds, right)]
        return plain_vote(policy.vote, *flat)

    def in_all(won):  # winning words as classes of all repetitions
        return {c for word, c in zip(all_words, classes_of(all_words), strict=True) if word in won}

    all_words = [word for row in words for word in row]
    most, last = policy.most or repetitions, plain_stop(policy, words, values, repetitions, beams)
    (score, won), final, at_most = vote(last), vote(repetitions)[1], vote(most)[1]
    costs = [math.fsum(cost[order[:last]]) for cost in problem.costs]
    false = last < most and in_all(won) != in_all(at_most)
    return [last, *costs, score, in_all(won) == in_all(final), last < most, false]


@pytest.fixture(scope="module")
def drawn():
    return [
        *map(draw_problem, range(10)),
        draw_problem(100, beams=1, repetitions=9),
        draw_problem(101, words=["", "g", "a"]),
        draw_problem(102, words=[""]),
        *(draw_problem(seed, words=["a", "b", "c", "g"], beams=1) for seed in range(103, 111)),
        draw_problem(111, words=["a", "c", "a", "b", "g"], beams=3, repetitions=6),
    ]


def test_every_policy_on_every_order_is_what_a_plain_loop_finds(drawn):
    found = replay(POLICIES, [problem for _, problem in drawn], num_orders=3)
    stopped = set()
    for column, (words, problem) in enumerate(drawn):
        orders = orders_of(problem.data_idx, len(words), 3)
        for row, policy in enumerate(POLICIES):
            plain = np.array([plain_figures(policy, words, problem, order) for order in orders], dtype=float)
            for i, name in enumerate(FIGURES):
                where = f"{policy.text} on problem {problem.data_idx}: {name}"
                assert found.recorded[name][row, column] == pytest.approx(plain[0, i], abs=1e-9), where
                assert found.mean[name][row, column] == pytest.approx(plain[1:, i].mean(), abs=1e-9), where
            stopped |= {(policy.stop, last) for last in plain[:, 0]}
    assert {stop for stop, last in stopped if last < 5} == {"none", "sure", "certified", "beta", "esc"}


def test_sure_never_has_another_answer_and_stops_as_early_as_the_rule(drawn):
    found = replay(
        [parse_policy("weighted:sure"), parse_policy("majority:sure")], [problem for _, problem in drawn], 20
    )
    assert (found.mean["same"] == 1).all() and (found.mean["false"] == 0).all()
    assert found.mean["early"].mean() > 0.3


def test_classes_that_merge_later_are_apart_before():
    """a and c are equal by way of b, which comes last: c leads only after it."""
    words = np.array([["a"], ["c"], ["g"], ["g"], ["b"]])
    answers = Answers(*kinds_of(words), np.ones((5, 1)), np.zeros((5, 1)), words != "g")
    seen = look_at_prefixes(answers, np.array([[0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]))
    assert seen.score["majority"].tolist() == [[1.0, 1.0, pytest.approx(2 / 3), 0.0, 1.0], [1.0] * 5]
    assert seen.stops["alike"].tolist() == [[1, 1, 1, 2, 1], [1, 2, 3, 1, 2]]


@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_the_evidence_of_every_prefix_is_the_least_over_its_rivals(vote):
    """By `log_evidence` of the rule; where it is below 2, which certifies nothing, 0 will do."""
    rng, repetitions, orders = np.random.default_rng(5), 24, orders_of(0, 24, 5)
    words = rng.choice(["a", "d", "g", ""], (repetitions, 2), p=[0.66, 0.2, 0.08, 0.06])
    values = rng.uniform(0.2, 1, words.shape)
    answers = Answers(*kinds_of(words), values, np.zeros(words.shape), words == "a")
    found = look_at_prefixes(answers, orders).stops[f"evidence_{vote}"]
    weights = values if vote == "weighted" else np.ones(words.shape)
    by_class = np.stack([(weights * (words == word)).sum(-1) for word in "adg"] + [np.zeros(repetitions)], -1)
    certain = 0
    for order, row in zip(orders, found, strict=True):
        for t in range(1, repetitions + 1):
            seen = by_class[order[:t]]
            leader = seen.sum(0).argmax()
            expected = math.exp(log_evidence((seen[:, leader, None] - np.delete(seen, leader, 1)).T / 2).min())
            assert row[t - 1] == pytest.approx(expected) or (row[t - 1] == 0 and expected < 2)
            certain += row[t - 1] > 2
    assert certain > 20


def test_orders_are_permutations_the_recorded_one_first_and_seeded():
    one, again, other = orders_of(5, 16), orders_of(5, 16), orders_of(6, 16)
    assert (one == again).all() and (one[1:] != other[1:]).any()
    assert one.shape == (101, 16) and one[0].tolist() == list(range(16))
    assert (np.sort(one, axis=1) == np.arange(16)).all()
    assert len({tuple(order) for order in one.tolist()}) == 101
    first = np.bincount(np.concatenate([orders_of(i, 4)[1:, 0] for i in range(40)]), minlength=4)
    assert abs(first / 4000 - 0.25).max() < 0.03  # each repetition comes first as often


def test_what_is_held_at_a_time_changes_no_figure(drawn, monkeypatch):
    _, problem = drawn[3]
    orders = orders_of(3, 7, 11)
    whole = look_at_prefixes(problem.answers, orders)
    monkeypatch.setattr("report_lib.prefix_votes.CHUNK", 500)
    parts = look_at_prefixes(problem.answers, orders)
    for one, other in ((whole.score, parts.score), (whole.winner, parts.winner), (whole.stops, parts.stops)):
        assert all((one[name] == other[name]).all() for name in one)


def test_the_posterior_is_that_of_a_beta_distribution():
    for first, second in itertools.product(range(5), repeat=2):
        assert lead_posterior(first, second) == pytest.approx(beta_tail(first + 1, second + 1), abs=1e-4)
    assert lead_posterior(4, 0) == 1 - 2**-5
    needs = posterior_needs(40, 0.95)
    for both, first in itertools.product(range(41), repeat=2):
        if first <= both <= 2 * first:
            assert (lead_posterior(first, both - first) >= 0.95) == (first >= needs[both])
