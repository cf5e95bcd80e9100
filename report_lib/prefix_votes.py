"""What the first t repetitions say of a problem, for every t and many orders at once: votes, and what stops look at.

Classes of equal answers merge as answers come, because equality is not transitive: two answers may be equal only by way
of a third. So the answers of a problem are given as kinds and a relation among kinds, and the classes of a prefix are the
connected components among the kinds that stand in it. Where the relation is transitive, as nearly always, these are the
same at every prefix; else the figures are made once for each way in which the kinds fall together.

Shapes: O orders, R repetitions, B beams, K kinds of answer, C classes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval_lib.intervals import Floats
from eval_lib.stopping import LAMBDAS
from eval_lib.stopping_peers import lead_posterior
from eval_lib.votes import TIE, winners
from report_lib.policies import GUARDED, VOTES

Integers = NDArray[np.int64]
CHUNK = 4_000_000  # numbers held at a time, more or less


@dataclass(frozen=True)
class Answers:
    """All answers of one problem. kinds: int [R, B], -1 for an empty answer; equal: bool [K, K], symmetric and reflexive, of
    the kinds that stand there; values, log_odds: float [R, B]; right: bool [R, B]."""

    kinds: Integers
    equal: NDArray[np.bool_]
    values: Floats
    log_odds: Floats
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class Prefixes:
    """By vote (of VOTES), float64 and uint64 [O, R]: how far the vote of the first t = 1 .. R repetitions is right, and a
    number for the set of its winning classes, as classes of all repetitions (`final`: that of all R).

    stops, float64 [O, R]: `lead_V` is what the leader of vote V has more than all others together, `evidence_V` its
    certificate E, `posterior` Adaptive-Consistency's, `alike` how many of the latest repetitions have one answer.
    """

    score: dict[str, Floats]
    winner: dict[str, NDArray[np.uint64]]
    final: dict[str, int]
    stops: dict[str, Floats]


def look_at_prefixes(answers: Answers, orders: Integers) -> Prefixes:
    """orders: int [O, R], each a permutation of the repetitions."""
    everything = components(answers.equal)
    found: Prefixes | None = None
    size = answers.kinds.size * answers.kinds.shape[0] + len(LAMBDAS) * len(answers.kinds)
    for part in np.array_split(orders, max(1, min(len(orders), size * len(orders) // CHUNK))):
        more = look_at_orders(answers, part, everything)
        found = more if found is None else joined(found, more)
    assert found is not None
    return found


def joined(one: Prefixes, other: Prefixes) -> Prefixes:
    def both(first: Mapping[str, NDArray], second: Mapping[str, NDArray]) -> dict[str, NDArray]:
        return {name: np.concatenate([first[name], second[name]]) for name in first}

    return Prefixes(
        both(one.score, other.score), both(one.winner, other.winner), one.final, both(one.stops, other.stops)
    )


def look_at_orders(answers: Answers, orders: Integers, everything: Integers) -> Prefixes:
    """everything: the class of each kind [K] among all repetitions."""
    score = {vote: np.zeros(orders.shape) for vote in VOTES}
    winner = {vote: np.zeros(orders.shape, np.uint64) for vote in VOTES}
    stops: dict[str, Floats] = {}
    names = np.random.default_rng(0).integers(1, 2**63, len(everything) + 1).astype(np.uint64)  # of classes
    for labels, where in partitions(answers, orders, everything):
        whole = np.zeros((labels.max(initial=-1) + 1, everything.max(initial=-1) + 1), bool)
        whole[labels, everything] = True  # which class of all repetitions one of this prefix is part of
        for vote, (right, won) in count_votes(answers, labels, orders).items():
            score[vote][where] = right[where]
            in_all = (won[where] @ whole) > 0
            winner[vote][where] = (in_all * names[: whole.shape[1]]).sum(-1, dtype=np.uint64)
        for name, found in look_for_stops(answers, labels, orders).items():
            stops.setdefault(name, np.zeros(orders.shape))[where] = found[where]
    every = count_votes(answers, everything, np.arange(orders.shape[1])[None])
    final = {vote: int((won[0, -1] * names[: won.shape[-1]]).sum(dtype=np.uint64)) for vote, (_, won) in every.items()}
    return Prefixes(score, winner, final, stops)


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def components(equal: NDArray[np.bool_]) -> Integers:
    """The connected component of each kind [K], numbered from 0 by first appearance. equal: bool [K, K]."""
    labels = np.arange(len(equal))
    while True:
        least = np.where(equal, labels, len(equal)).min(-1, initial=len(equal))
        if (least == labels).all():
            return np.unique(labels, return_inverse=True)[1]
        labels = least


def partitions(
    answers: Answers, orders: Integers, everything: Integers
) -> Iterator[tuple[Integers, NDArray[np.bool_]]]:
    """(the class of each kind [K], at which prefixes these are the classes: bool [O, R]); each prefix is in one.

    Kinds that are not in a prefix weigh nothing in it, so that they may be in any class.
    """
    together = everything[:, None] == everything
    apart = (together & ~answers.equal).any(-1)  # from some kind of its class
    loose = np.flatnonzero((together & apart).any(-1))
    if not len(loose):
        yield everything, np.ones(orders.shape, bool)
        return
    in_tree = (answers.kinds[:, :, None] == loose).any(1)  # [R, loose]
    present = np.logical_or.accumulate(in_tree[orders], axis=1)
    patterns, place = np.unique(present.reshape(-1, len(loose)), axis=0, return_inverse=True)
    made: list[tuple[Integers, NDArray[np.bool_]]] = []
    for number in np.argsort(-patterns.sum(-1), kind="stable"):  # most kinds first: fewer often fall together alike
        there = np.ones(len(everything), bool)
        there[loose] = patterns[number]
        labels = components(answers.equal & there & there[:, None] | np.eye(len(there), dtype=bool))
        where = (place == number).reshape(orders.shape)
        alike = labels[there][:, None] == labels[there]
        for earlier, mask in made:
            if ((earlier[there][:, None] == earlier[there]) == alike).all():
                mask |= where
                break
        else:
            made.append((labels, where))
    yield from made


# ---------------------------------------------------------------------------------------------------------------------
# Votes


def per_tree(answers: Answers, labels: Integers, weights: Floats) -> Floats:
    """Sum of each class's weights in each repetition: float64 [R, C]. weights: float [R, B]."""
    found = np.zeros((len(weights), labels.max(initial=-1) + 1))
    tree, beam = np.nonzero(answers.kinds >= 0)
    np.add.at(found, (tree, labels[answers.kinds[tree, beam]]), weights[tree, beam])
    return found


def count_votes(answers: Answers, labels: Integers, orders: Integers) -> dict[str, tuple[Floats, NDArray[np.bool_]]]:
    """By vote: score [O, R], winning classes bool [O, R, C]."""

    def sums(weights: Floats) -> Floats:
        return np.cumsum(per_tree(answers, labels, weights)[orders], axis=1)

    right, ones = answers.right.astype(np.float64), np.ones(answers.values.shape)
    count, good = sums(ones), sums(right)
    weight, good_weight = sums(answers.values), sums(answers.values * right)
    majority = shared_vote(winners(count), good, count)
    weighted = shared_vote(winners(weight), good_weight, weight)
    nothing = weight.sum(-1) <= 0  # where all weights are 0 they count as equal
    odds = sums(answers.log_odds)
    top = np.where(count > 0, odds, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):  # -inf of a prefix without an answer
        likeliest = (count > 0) & (odds >= top - TIE * np.maximum(1, np.abs(top)))
    return {
        "majority": majority,
        "weighted": (
            np.where(nothing, majority[0], weighted[0]),
            np.where(nothing[..., None], majority[1], weighted[1]),
        ),
        "best-of-n": best_of_prefix(answers, labels, orders),
        "bootstrap": bootstrapped_vote(answers, labels, orders),
        "log-odds": shared_vote(likeliest, good, count),
    }


def shared_vote(won: NDArray[np.bool_], right: Floats, total: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Mean over winners of the part of a class that is right, [O, R]; 0 where nobody wins. Arguments [O, R, C]."""
    share = np.divide(right, total, out=np.zeros_like(total), where=won)
    return share.sum(-1) / np.maximum(won.sum(-1), 1), won


def best_of_prefix(answers: Answers, labels: Integers, orders: Integers) -> tuple[Floats, NDArray[np.bool_]]:
    """The answer of the highest value; ties share."""
    answered = answers.kinds >= 0
    value = np.where(answered, answers.values, -np.inf)
    top = np.maximum.accumulate(value.max(-1, initial=-np.inf)[orders], axis=1)
    classes = np.where(answered, labels[np.where(answered, answers.kinds, 0)] if len(labels) else -1, -1)
    of_class = [np.where(classes == c, value, -np.inf).max(-1) for c in range(labels.max(initial=-1) + 1)]
    best = np.array(of_class).reshape(-1, len(value)).T  # [R, C]
    best = np.maximum.accumulate(best[orders], axis=1)
    won = (best == top[..., None]) & np.isfinite(best)
    ties, good = np.zeros(orders.shape), np.zeros(orders.shape)
    for t in range(orders.shape[1]):
        tree = orders[:, t]
        at_top = value[tree] == np.where(np.isfinite(top[:, t]), top[:, t], np.nan)[:, None]
        ties[:, t], good[:, t] = at_top.sum(-1), (at_top & answers.right[tree]).sum(-1)
        if t:
            same = top[:, t] == top[:, t - 1]
            ties[:, t] += same * ties[:, t - 1]
            good[:, t] += same * good[:, t - 1]
    return good / np.maximum(ties, 1), won


def bootstrapped_vote(answers: Answers, labels: Integers, orders: Integers) -> tuple[Floats, NDArray[np.bool_]]:
    """Majority of the bests of all bootstrap groups (Rakhsha et al. 2025, arXiv 2511.18630), without drawing any.

    A group has m = ceil(sqrt(n)) of the n answers so far, drawn with replacement; the best of a group is its highest value.
    With k answers of at most some value and j of less, the highest value of a group is that one with probability
    (k / n)^m - (j / n)^m, shared by the k - j that have it. The vote weighs every answer by its share.
    """
    tree, beam = np.nonzero(answers.kinds >= 0)
    value = answers.values[tree, beam]
    each = np.zeros((len(value), len(answers.kinds)))  # [n, R]: whose tree is it?
    each[np.arange(len(value)), tree] = 1.0
    upto, below, there = (  # [n, O, R]
        np.cumsum((relation @ each)[:, orders], axis=-1)
        for relation in (value <= value[:, None], value < value[:, None], np.eye(len(value)))
    )
    total = there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.ceil(np.sqrt(total) - 1e-9)
        weight = there * ((upto / total) ** size - (below / total) ** size) / np.maximum(upto - below, 1)
    weight = np.nan_to_num(weight)
    member = np.zeros((len(value), labels.max(initial=-1) + 1))
    member[np.arange(len(value)), labels[answers.kinds[tree, beam]]] = 1.0
    sums = np.tensordot(weight, member, (0, 0))
    good = np.tensordot(weight * answers.right[tree, beam][:, None, None], member, (0, 0))
    return shared_vote(winners(sums), good, sums)


# ---------------------------------------------------------------------------------------------------------------------
# What stops look at


def look_for_stops(answers: Answers, labels: Integers, orders: Integers) -> dict[str, Floats]:
    """See Prefixes. Of the rules in eval_lib/stopping.py, and of two without a guarantee."""
    beams = answers.kinds.shape[1]
    ones = per_tree(answers, labels, np.ones(answers.values.shape))
    trees = {"majority": ones, "weighted": per_tree(answers, labels, answers.values)}
    found: dict[str, Floats] = {}
    for vote in GUARDED:
        totals = np.cumsum(trees[vote][orders], axis=1)
        lead = totals.max(-1, initial=0.0)
        # As in `is_sure`; nobody leads with nothing.
        found[f"lead_{vote}"] = np.where(lead > 0, lead * (1 - 2 * TIE) - (totals.sum(-1) - lead), -np.inf)
        found[f"evidence_{vote}"] = leader_evidence(trees[vote] / beams, orders)
    counts = np.cumsum(ones[orders], axis=1)
    first, second = (np.sort(np.pad(counts, ((0, 0), (0, 0), (2, 0))))[..., -k] for k in (1, 2))
    pairs, place = np.unique(np.stack([first, second], -1).reshape(-1, 2), axis=0, return_inverse=True)
    posterior = np.array([lead_posterior(int(a), int(b)) for a, b in pairs])
    found["posterior"] = posterior[place].reshape(orders.shape)
    only = np.where(ones.max(-1, initial=0.0) == beams, ones.argmax(-1) if ones.shape[1] else 0, -1)[orders]
    found["alike"] = alike = np.zeros(orders.shape)
    for t in range(orders.shape[1]):
        same = (only[:, t] == only[:, t - 1]) * alike[:, t - 1] if t else 0
        alike[:, t] = (only[:, t] >= 0) * (1 + same)
    return found


def leader_evidence(weights: Floats, orders: Integers) -> Floats:
    """The least E of the leader over its rivals, [O, R]; 0 where nobody leads, or E is certainly below 2, which no alpha
    asks for. weights: each class's weight in each repetition, in [0, 1], [R, C].

    A class that has not been seen has weight 0: it asks for less than one that has, and is the rival where there is none.
    A product past all floats is inf.
    """
    least = np.zeros(orders.shape)
    rivals = np.pad(weights, ((0, 0), (0, 1)))
    totals = np.cumsum(rivals[orders], axis=1)
    leader = totals.argmax(-1)
    second, first = np.moveaxis(np.sort(totals, axis=-1)[..., -2:], -1, 0) if weights.size else (least, least)
    able = LAMBDAS[-1] * (first - second) >= math.log(2)  # log(1 + x) <= x
    for a in np.unique(leader[able]):
        mask = able & (leader == a)
        rows = np.flatnonzero(mask.any(-1))
        found = np.full((len(rows), orders.shape[1]), np.inf)
        for x in (weights[:, a, None] - np.delete(rivals, a, axis=1)).T:
            bets = np.cumprod((1 + LAMBDAS[:, None] * x)[:, orders[rows]], axis=-1)  # [lambdas, rows, R]
            found = np.minimum(found, bets.mean(0))
        least[rows] = np.where(mask[rows], found, least[rows])
    return least
