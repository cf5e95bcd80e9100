"""Policies that a finished run may be asked about: which vote, when to stop, and how many repetitions at most.

A policy is written VOTE, VOTE:NUMBER, or VOTE:STOP[:PARAMETER][@NUMBER]:

    weighted               the value-weighted vote of all repetitions
    weighted:8             of 8 repetitions
    majority:sure          until the vote cannot change any more
    weighted:certified:0.1 until it is certified, at alpha 0.1
    majority:beta@8        until the Beta posterior of Adaptive-Consistency is 0.95, at most 8 repetitions
    majority:esc:5         until all answers of a window of 5 repetitions are equal (ESC), windows following each other
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from common_lib.cli import UserError
from eval_lib.stopping_peers import POSTERIOR, WINDOW

VOTES = {  # as written -> in words, and whether it uses values
    "majority": ("majority", False),
    "weighted": ("weighted", True),
    "best-of-n": ("best-of-N", True),
    "bootstrap": ("majority of bootstrapped best-of-N", True),
    "log-odds": ("log-odds weights", True),
}
GUARDED = ("majority", "weighted")  # the votes that `sure` and `certified` are about


class Parameter(NamedTuple):
    """name: in the text's place; default; read: from text; rule: what it must be, in words, and as a test."""

    name: str
    default: float
    read: Callable[[str], float]
    words: str
    holds: Callable[[float], bool]


def _share(name: str, default: float) -> Parameter:
    return Parameter(name, default, float, "between 0 and 1", lambda value: 0 < value < 1)


STOPS: dict[str, Parameter | None] = {
    "none": None,
    "sure": None,
    "certified": _share("ALPHA", 0.05),
    "beta": _share("POSTERIOR", POSTERIOR),
    "esc": Parameter("WINDOW", WINDOW, int, "a whole number of at least 1", lambda value: value >= 1),
}
GUARANTEED = ("none", "sure", "certified")
EXPLORED = ["sure", *(f"certified:{alpha:g}" for alpha in (0.01, 0.05, 0.1, 0.2)), "beta", "esc"]
GRAMMAR = (
    f"VOTE, VOTE:NUMBER or VOTE:STOP[:PARAMETER][@NUMBER]; votes: {', '.join(VOTES)}; stops: none, sure, certified:ALPHA, "
    "beta:POSTERIOR, esc:WINDOW (sure and certified: of the majority or the weighted vote)"
)


@dataclass(frozen=True)
class Policy:
    """parameter: of the stop, None where it has none; most: repetitions at most, None for all that a run has."""

    vote: str
    stop: str = "none"
    parameter: float | None = None
    most: int | None = None

    @property
    def text(self) -> str:
        """As it is written; a parameter is always said."""
        if self.stop == "none":
            return self.vote + (f":{self.most}" if self.most else "")
        parameter = "" if self.parameter is None else f":{self.parameter:g}"
        return f"{self.vote}:{self.stop}{parameter}" + (f"@{self.most}" if self.most else "")

    @property
    def uses_values(self) -> bool:
        return VOTES[self.vote][1]


def parse_policy(text: str) -> Policy:
    """Raises UserError, one line that says what is possible."""

    def refuse(words: str) -> UserError:
        return UserError(f"--policy {text}: {words}; give {GRAMMAR}")

    def whole(number: str) -> int:
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise refuse(f"{number!r} is no number of repetitions")
        return int(number)

    body, at, number = text.partition("@")
    most = whole(number) if at else None
    vote, *rest = body.split(":")
    if vote not in VOTES:
        raise refuse(f"there is no vote {vote!r}")
    if len(rest) == 1 and rest[0].isascii() and rest[0].isdigit():
        if at:
            raise refuse("it has two numbers of repetitions")
        return Policy(vote, most=whole(rest[0]))
    stop, *values = rest or ["none"]
    if stop not in STOPS:
        raise refuse(f"there is no stop {stop!r}")
    if stop in ("sure", "certified") and vote not in GUARDED:
        raise refuse(f"{stop} is not known of the vote {vote}")
    parameter = STOPS[stop]
    if len(values) > (parameter is not None):
        raise refuse(f"{stop} has {'one parameter' if parameter else 'no parameter'}")
    if parameter is None:
        return Policy(vote, stop, None, most)
    try:
        value = parameter.read(values[0]) if values else parameter.default
    except ValueError:
        value = float("nan")
    if not parameter.holds(value):
        raise refuse(f"{parameter.name} of {stop} is {values[0]!r}, and must be {parameter.words}")
    return Policy(vote, stop, value, most)


def check_policies(policies: Sequence[Policy], repetitions: int) -> None:
    """Raises UserError where one asks for more repetitions than the run has."""
    for policy in policies:
        if policy.most and policy.most > repetitions:
            raise UserError(
                f"--policy {policy.text}: the run has {repetitions} repetitions of each problem; give at most that many"
            )


def settled(policy: Policy, repetitions: int) -> Policy:
    """Without `most` where that is all repetitions, so that one policy has one name."""
    return replace(policy, most=None) if policy.most == repetitions else policy


def all_policies(chosen: Sequence[Policy], repetitions: int) -> list[Policy]:
    """Those chosen beforehand, then the explored ones: every vote at every number, and EXPLORED stops. Each once."""
    explored = [Policy(vote, most=m) for vote in VOTES for m in range(1, repetitions + 1)]
    explored += [parse_policy(f"{vote}:{stop}") for vote in GUARDED for stop in EXPLORED]
    return list(dict.fromkeys(settled(policy, repetitions) for policy in [*chosen, *explored]))
