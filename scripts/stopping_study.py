"""What stopping rules promise and what they cost, simulated; and that `sure` never changes a vote.

    python scripts/stopping_study.py                        # 5,000 simulations of each case, 256 trees: minutes
    python scripts/stopping_study.py --simulations 500
    python scripts/stopping_study.py --run runs/vgs.jsonl   # the recorded order of a finished run of --stop none

A tree has one answer, which all its beams agree on (the hardest case: its answers say no more than one), and a value for
each beam, Beta(2, 2) where nothing else is said. Rules are looked at after every tree. A certificate is false on an
exact tie whomever it names, elsewhere where it names an answer that is not the heaviest in expectation.
Tables: false certificates of *certified* by value and by count, of the same test on single answers (which is wrong:
answers of one tree are not independent), and stops of Adaptive-Consistency's Beta posterior and of ESC that would count
as false if they were certificates; then what each saves. Random runs (ties, empty answers, merging classes, zero
weights): is the vote of a stopped problem that of all repetitions? Exit status 1 where a figure is not as it must be
(false certificates: above alpha by more than two standard errors of so many simulations).
"""

import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common_lib.cli import ArgumentParser, UserError, run_script
from eval_lib.intervals import Floats
from eval_lib.stopping import LAMBDAS, STOP_VOTES, ClassesOf, Stopping, log_mean_exp, stopping_point
from eval_lib.stopping_peers import POSTERIOR, WINDOW, posterior_needs
from eval_lib.tables import Table, as_text, percent
from eval_lib.votes import TIE, winners
from eval_utils import Grader
from search_lib.run_reader import RunPaths, read_meta, read_results

Ints = NDArray[np.int64]
BUDGETS = (16, 64, 256)
BEAMS = (1, 4, 8)
SAVED_BEAMS = 4

# ---------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Population:
    """A problem. shares: of its answers; values: Beta parameters of each answer's values, (2, 2) for all if none are given."""

    name: str
    shares: Sequence[float]
    values: Sequence[tuple[float, float]] = ()

    @property
    def betas(self) -> Sequence[tuple[float, float]]:
        return self.values or [(2, 2)] * len(self.shares)

    def heaviest(self, counted: bool) -> int:
        """The answer that is heaviest in expectation (counted: by number), -1 on a tie."""
        weights = [p * (1 if counted else a / (a + b)) for p, (a, b) in zip(self.shares, self.betas, strict=True)]
        won = winners(weights)
        return int(won.argmax()) if won.sum() == 1 else -1


def tie(answers: int) -> Population:
    return Population(f"tie of {answers}", [1 / answers] * answers)


FALSE_CASES = (
    *map(tie, (2, 3, 5, 40)),
    Population("0.51, 0.49", [0.51, 0.49]),
    Population("0.34, 0.33, 0.33", [0.34, 0.33, 0.33]),
    Population("0.05, 39 x 0.0244", [0.05, *[0.95 / 39] * 39]),
    Population("0.6, 0.4 of equal weight", [0.6, 0.4], [(2, 4), (2, 2)]),
)
SAVED_CASES = (
    Population("0.9", [0.9, 0.05, 0.05]),
    Population("0.7", [0.7, 0.15, 0.1, 0.05]),
    Population("0.5", [0.5, 0.25, 0.15, 0.1]),
    Population("0.4, 0.3", [0.4, 0.3, 0.2, 0.1]),
)


def draw(case: Population, trees: int, beams: int, simulations: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Answers [simulations, trees] and values [simulations, trees, beams]."""
    answers = rng.choice(len(case.shares), (simulations, trees), p=case.shares)
    a, b = np.array(case.betas, dtype=np.float64)[answers].transpose(2, 0, 1)
    return answers, rng.beta(a[..., None], b[..., None], (simulations, trees, beams))


# ---------------------------------------------------------------------------------------------------------------------
# Rules, on all simulations at once. Each gives (T, leader) by simulation; T = 0 where it never stops.

Stops = tuple[Ints, Ints]


def totals_by_tree(answers: Ints, weights: Floats, names: int) -> Iterator[Floats]:
    """After each tree the weight of every answer, [simulations, names]: one array, which grows."""
    totals, rows = np.zeros((len(answers), names)), np.arange(len(answers))
    for t in range(answers.shape[1]):
        totals[rows, answers[:, t]] += weights[:, t]
        yield totals


def first_stops(answers: Ints, weights: Floats, names: int, holds: Callable[[int, Floats, Ints], NDArray]) -> Stops:
    """holds(t, totals, which) says of the simulations `which` whether the rule holds after t trees."""
    stops, leader = np.zeros((2, len(answers)), dtype=np.int64)
    for t, totals in enumerate(totals_by_tree(answers, weights, names), start=1):
        which = np.flatnonzero(stops == 0)
        which = which[holds(t, totals[which], which)]
        stops[which], leader[which] = t, totals[which].argmax(-1)
    return stops, leader


def certified(answers: Ints, observations: Floats, names: int, alpha: float) -> Stops:
    """The test of `eval_lib.stopping.is_certified`. observations: [simulations, trees, n], each a factor of E.

    A tree has one answer, so a factor is the leader's or a rival's and logarithms add up answer by answer.
    """
    simulations, bar = len(answers), math.log(2 / alpha)
    for_it, against_it = np.zeros((2, simulations, names, len(LAMBDAS)))

    def holds(t: int, totals: Floats, which: Ints) -> NDArray:
        x, answer = observations[which, t - 1, :, None] * LAMBDAS, answers[which, t - 1]
        for_it[which, answer] += np.log1p(x).sum(1)
        against_it[which, answer] += np.log1p(-x).sum(1)
        ranked = np.partition(totals, -2)
        found = (ranked[:, -1] - ranked[:, -2]) * LAMBDAS[-1] >= bar
        near, leader = which[found], totals[found].argmax(-1)
        evidence = log_mean_exp(for_it[near, leader][:, None] + against_it[near])
        evidence[np.arange(len(near)), leader] = np.inf
        found[found] = evidence.min(-1) >= bar
        return found

    return first_stops(answers, observations.sum(-1), names, holds)


def sure(answers: Ints, weights: Floats, names: int, budget: int, beams: int) -> Stops:
    """weights: [simulations, trees], of each tree."""

    def holds(t: int, totals: Floats, which: Ints) -> NDArray:
        top = totals.max(-1)
        return top * (1 - 2 * TIE) > totals.sum(-1) - top + (budget - t) * beams

    return first_stops(answers[:, : budget - 1], weights, names, holds)


def beta_posterior(answers: Ints, beams: int, names: int) -> Stops:
    needs = posterior_needs(answers.shape[1] * beams)

    def holds(t: int, totals: Floats, which: Ints) -> NDArray:
        second, first = np.partition(totals, -2)[:, -2:].T.astype(np.int64)
        return first >= needs[first + second]

    return first_stops(answers, np.full(answers.shape, float(beams)), names, holds)


def equal_windows(answers: Ints, beams: int, names: int) -> Stops:
    windows = answers[:, : answers.shape[1] // WINDOW * WINDOW].reshape(len(answers), -1, WINDOW)
    ends = (windows == windows[..., :1]).all(-1)

    def holds(t: int, totals: Floats, which: Ints) -> NDArray:
        return ends[which, t // WINDOW - 1] & (t % WINDOW == 0)

    return first_stops(answers, np.full(answers.shape, float(beams)), names, holds)


# ---------------------------------------------------------------------------------------------------------------------
# False certificates


def false_share(stops: Stops, heaviest: int) -> float:
    return float(((stops[0] > 0) & (stops[1] != heaviest)).mean())


def false_certificates(case: Population, beams: int, args) -> dict[str, float]:
    """Share of the simulations in which a rule stops for an answer that is not the heaviest, by rule."""
    rng = np.random.default_rng([args.seed, beams, *case.name.encode()])
    answers, values = draw(case, args.trees, beams, args.simulations, rng)
    names, ones = len(case.shares), np.ones((*answers.shape, 1))
    of_tree = values.mean(-1, keepdims=True)
    by_value, by_count = case.heaviest(False), case.heaviest(True)
    return {
        "certified": false_share(certified(answers, of_tree, names, args.alpha), by_value),
        "by count": false_share(certified(answers, ones, names, args.alpha), by_count),
        "singly": false_share(certified(answers, values, names, args.alpha), by_value),
        "Beta": false_share(beta_posterior(answers, beams, names), by_count),
        "ESC": false_share(equal_windows(answers, beams, names), by_count),
    }


def false_table(args) -> tuple[Table, list[str]]:
    """The table, and in words what is not as it must be."""
    cells, wrong = [], []
    chance = 2 * math.sqrt(args.alpha * (1 - args.alpha) / args.simulations)  # two standard errors
    for case, beams in itertools.product(FALSE_CASES, BEAMS):
        found = false_certificates(case, beams, args)
        cells.append([case.name, str(beams), *map(percent, found.values())])
        wrong += [
            f"{case.name}, {beams} beams: {rule} is false in {found[rule]:.1%} of the simulations"
            for rule in ("certified", "by count")
            if found[rule] > args.alpha + chance
        ]
        if (case.name, beams) == ("tie of 2", max(BEAMS)) and found["singly"] <= args.alpha:
            wrong.append("answers that are counted singly do no harm: this study would not see a wrong test")
    notes = [
        f"certified: by value, one observation a tree; by count: --stop_vote majority; singly: each answer an "
        f"observation. Beta: posterior {POSTERIOR:g} on single answers. ESC: {WINDOW} trees alike."
    ]
    title = f"False certificates, % of {args.simulations:,} simulations, up to {args.trees} trees, alpha {args.alpha:g}"
    columns = ["answers", "beams", "certified", "by count", "singly", "Beta", "ESC"]
    return Table(title, columns, cells, notes, words=["answers"]), wrong


# ---------------------------------------------------------------------------------------------------------------------
# What it saves


def saved(case: Population, budget: int, beams: int, args) -> dict[str, tuple[float, float]]:
    """By rule: share of the repetitions that it saves, and share of the problems whose vote is not that of all of them."""
    rng = np.random.default_rng([args.seed, budget, *case.name.encode()])
    answers, values = draw(case, budget, beams, args.simulations, rng)
    names, of_tree, ones = len(case.shares), values.mean(-1, keepdims=True), np.ones((*answers.shape, 1))
    rules: dict[str, tuple[Floats, Stops]] = {}
    for words, observations in (("", of_tree), (" by count", ones)):
        weights = observations[..., 0] * beams
        at_once = sure(answers, weights, names, budget, beams)
        tested = certified(answers, observations, names, args.alpha)
        rules[f"sure{words}"] = weights, at_once
        rules[f"certified{words}"] = weights, earlier(tested, at_once)
    rules["Beta"] = ones[..., 0], beta_posterior(answers, 1, names)
    rules["ESC"] = ones[..., 0], equal_windows(answers, 1, names)
    found = {}
    for rule, (weights, (stops, leader)) in rules.items():
        for totals in totals_by_tree(answers, weights, names):
            last = totals
        kept = winners(last)[np.arange(len(answers)), leader] | (stops == 0)
        found[rule] = float(1 - np.where(stops == 0, budget, stops).mean() / budget), float(1 - kept.mean())
    return found


def earlier(one: Stops, other: Stops) -> Stops:
    """Of two rules the one that stops first."""
    first = (one[0] > 0) & ((other[0] == 0) | (one[0] <= other[0]))
    return np.where(first, one[0], other[0]), np.where(first, one[1], other[1])


def saved_table(args) -> tuple[Table, list[str]]:
    cells, wrong = [], []
    rules: list[str] = []
    for case, budget in itertools.product(SAVED_CASES, (b for b in BUDGETS if b <= args.trees)):
        found = saved(case, budget, SAVED_BEAMS, args)
        rules = list(found)
        cells.append([case.name, str(budget), *(f"{100 * s:.0f} ({100 * c:.1f})" for s, c in found.values())])
        wrong += [
            f"{case.name}, {budget} repetitions: {rule} changed a vote"
            for rule in ("sure", "sure by count")
            if found[rule][1]
        ]
    note = (
        f"In brackets, % of problems whose vote (by value; Beta and ESC by count) is not that of all repetitions. "
        f"certified stops where sure would, too. {SAVED_BEAMS} beams that agree; for Beta they count as one answer, since "
        "counted singly the first tree would end all."
    )
    return Table("Saved repetitions, %", ["leader", "of", *rules], cells, [note], words=["leader"]), wrong


# ---------------------------------------------------------------------------------------------------------------------
# Random runs, and a run that is given: is the vote the same?

Search = tuple[Sequence[str], Sequence[float]]  # answers and scores of a repetition


class Equality:
    """Classes of answers by listed pairs of equal ones: as of `Grader.answer_classes`, one answer can merge others."""

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self.pairs, self.asked = pairs, 0

    def __call__(self, answers: Sequence[str]) -> list[int]:
        self.asked += 1
        of = {answer: number for number, answer in enumerate(dict.fromkeys(answer for answer in answers if answer))}
        for one, other in self.pairs:
            if one in of and other in of:
                old, new = of[one], of[other]
                of = {answer: new if number == old else number for answer, number in of.items()}
        return [of[answer] if answer else -1 for answer in answers]


def class_sums(searches: Sequence[Search], classes_of: ClassesOf, vote: str) -> dict[frozenset[str], list[Fraction]]:
    """Each set of equal answers: its exact weight in each repetition. Shares no code with the rules."""
    answers = [answer for beams, _ in searches for answer in beams]
    sums: dict[int, list[Fraction]] = {}
    members: dict[int, set[str]] = {}
    numbers = iter(classes_of(answers))
    for tree, (beams, scores) in enumerate(searches):
        for answer, score in zip(beams, scores, strict=True):
            if (number := next(numbers)) >= 0:
                row = sums.setdefault(number, [Fraction(0)] * len(searches))
                row[tree] += 1 if vote == "majority" else Fraction(score)
                members.setdefault(number, set()).add(answer)
    return {frozenset(members[number]): row for number, row in sums.items()}


def winning(searches: Sequence[Search], classes_of: ClassesOf, vote: str) -> set[frozenset[str]]:
    """The sets of equal answers that win: the heaviest, by number where all weights are 0."""
    totals = {members: sum(row) for members, row in class_sums(searches, classes_of, vote).items()}
    if vote == "weighted" and totals and not any(totals.values()):
        return winning(searches, classes_of, "majority")
    bar = max(totals.values(), default=Fraction(0)) * (1 - Fraction(TIE))
    return {members for members, total in totals.items() if total >= bar}


def same_vote(some: set[frozenset[str]], whole: set[frozenset[str]]) -> bool:
    """Are the winning classes the same? Since then they may have grown, and merged."""
    return all(any(one <= other for other in whole) for one in some) and all(
        any(one <= other for one in some) for other in whole
    )


def random_problem(rng: random.Random, trees: int, beams: int) -> tuple[list[Search], Equality]:
    """Ties, zeros, empty answers, classes that merge when an answer comes. Values are eighths: every sum is exact."""
    names = ["a", "b", "c", "d"][: rng.randint(1, 4)]
    favourite = rng.choice(["", *names])
    values = rng.choice([[0.0], [0.0, 1.0], [k / 8 for k in range(9)], [0.5]])
    agree = rng.random() < 0.3  # the beams of a tree
    searches: list[Search] = []
    for _ in range(trees):
        drawn = [favourite if rng.random() < 0.5 else rng.choice(["", *names]) for _ in range(rng.randint(0, beams))]
        answers = drawn[:1] * len(drawn) if agree else drawn
        searches.append((answers, [rng.choice(values) for _ in answers]))
    return searches, Equality([pair for pair in itertools.combinations(names, 2) if rng.random() < 0.25])


def check_random_runs(runs: int, problems: int, seed: int) -> tuple[int, int, int]:
    """(problems, of them stopped early, of them with another vote) of random runs under `sure`, by both votes."""
    rng, counts = random.Random(seed), [0, 0, 0]
    for _ in range(runs):
        trees, beams = rng.randint(1, 16), rng.randint(1, 4)
        for vote, _ in itertools.product(STOP_VOTES, range(problems)):
            searches, classes_of = random_problem(rng, trees, beams)
            T, _ = stopping_point(Stopping("sure", vote, 0.05, trees, beams), searches, classes_of)
            changed = not same_vote(winning(searches[:T], classes_of, vote), winning(searches, classes_of, vote))
            counts = [counts[0] + 1, counts[1] + int(trees > T), counts[2] + changed]
    return counts[0], counts[1], counts[2]


def run_table(path: Path, alpha: float) -> tuple[Table, list[str]]:
    """The recorded order of a finished run."""
    meta = read_meta(RunPaths.of(path).meta)
    lines, _ = read_results(path, meta["num_problems"] if meta else None)
    problems: dict[int, list[dict]] = {}
    for line in sorted(lines, key=lambda line: (line["data_idx"], line["repeat_idx"])):
        problems.setdefault(line["data_idx"], []).append(line)
    repetitions = len(next(iter(problems.values()), []))
    if not repetitions or any(
        [line["repeat_idx"] for line in found] != list(range(repetitions)) for found in problems.values()
    ):
        raise UserError(f"{path}: --run takes a finished run, with the same repetitions of every problem")
    beams = max(len(line["reward"]) for line in lines)
    cells, wrong = [], []
    with Grader() as grader:
        for kind, vote in itertools.product(("sure", "certified"), STOP_VOTES):
            stopping, used, spent, same = Stopping(kind, vote, alpha, repetitions, beams), 0, 0, 0
            for found in problems.values():
                searches = [(line["processed_answer"], line["generated_scores"]) for line in found]
                T, _ = stopping_point(stopping, searches, grader.answer_classes)
                used, spent = used + T, spent + sum(line.get("tokens_generated", 0) for line in found[:T])
                votes = (winning(some, grader.answer_classes, vote) for some in (searches[:T], searches))
                same += same_vote(*votes)
            tokens = sum(line.get("tokens_generated", 0) for line in lines)
            cells.append([kind, vote, f"{used / len(problems):.2f}", percent(1 - used / len(lines)),
                          percent(1 - spent / tokens if tokens else None), f"{same} of {len(problems)}"])  # fmt: skip
            if kind == "sure" and same < len(problems):
                wrong.append(f"{path}: sure changed the {vote} vote of {len(problems) - same} problems")
    columns = ["stop", "vote", "repetitions", "saved, %", "tokens saved, %", "same vote"]
    title = f"{path.name}: {len(problems)} problems x {repetitions} repetitions x {beams} beams"
    return Table(title, columns, cells, words=["stop", "vote"]), wrong


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=5000, help="of each case")
    parser.add_argument("--trees", type=int, default=256, help="the most that a problem gets")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--random_runs", type=int, default=1000, help="of 5 problems, by each vote")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--run", type=Path, metavar="X.jsonl", help="a finished run, instead of simulations")
    args = parser.parse_args(argv)
    start = time.monotonic()
    tables = (
        [lambda: run_table(args.run, args.alpha)]
        if args.run
        else [lambda: false_table(args), lambda: saved_table(args)]
    )
    wrong: list[str] = []
    for make in tables:
        table, more = make()
        print(f"{as_text(table, 100)}\n", flush=True)
        wrong += more
    if not args.run:
        problems, stopped, changed = check_random_runs(args.random_runs, 5, args.seed)
        print(
            f"{args.random_runs:,} random runs: {problems:,} problems, {stopped:,} stopped early, {changed} with another vote"
        )
        wrong += [f"sure changed {changed} votes of random runs"] * (changed > 0)
    print("\n".join([*(f"NOT AS IT MUST BE: {words}" for words in wrong), f"{time.monotonic() - start:.0f} s"]))
    return int(bool(wrong))


if __name__ == "__main__":
    run_script(main)
