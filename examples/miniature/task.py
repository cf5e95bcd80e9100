"""The miniature task: a running total modulo 100, solved one digit at a time.

A problem is a two-digit start and STEPS labelled digits; its answer is their sum modulo 100. A trace writes six
tokens for each digit: label, digit, carry flag (`^` carry, `=` none), tens, ones, `;`.

    problem   40a2b9c9d7e4f9
    right     a2=42;b9^51;c9^60;d7=67;e4^71;f9^80;</think>\\boxed{80}
    wrong     a2=42;b9=41;c9=40;d7=47;e4^51;f9^60;</think>\\boxed{60}     two carries forgotten

It has what makes value-guided search work on real reasoning: errors happen in mid-trace, can be seen in the partial
trace, and spoil the answer; and wrong traces agree often enough that voting alone picks them. Pure Python, seeded.
"""

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

STEPS = 6  # digits of a problem
TOKENS_PER_STEP = 6  # also the block size of the search
MAX_TRACE_TOKENS = 60  # an undisturbed trace has 42 tokens: 36 of steps, </think>, \boxed{, two digits, }, <eos>


@dataclass(frozen=True, slots=True)
class DigitSum:
    """`start` is 0 .. 99; `digits` are 0 .. 9, one for each step."""

    start: int
    digits: tuple[int, ...]

    @property
    def text(self) -> str:
        """What the model reads, such as "40a2b9c9d7e4f9"."""
        steps = zip(ascii_lowercase, self.digits, strict=False)
        return f"{self.start:02d}" + "".join(f"{label}{digit}" for label, digit in steps)

    @property
    def answer(self) -> str:
        """Two digits, such as "80"."""
        return f"{(self.start + sum(self.digits)) % 100:02d}"


@dataclass(frozen=True, slots=True)
class Noise:
    """How the generator's training traces go wrong; probabilities at each step.

    The generator samples below temperature 1, which makes its own error rates smaller than these.
    """

    forget_carry: float = 0.43  # on a carry step: writes `=` and loses the ten
    skip_step: float = 0.12
    stall: float = 0.06  # writes one step's worth of `?`; every second time it never stops


def draw_problem(rng: Random) -> DigitSum:
    """A problem whose number of carry steps is uniform in 0 .. STEPS, so that easy and hard ones are equally common."""
    wanted = rng.randint(0, STEPS)
    carries = [True] * wanted + [False] * (STEPS - wanted)
    while True:
        rng.shuffle(carries)
        if (problem := _with_carries(carries, rng)) is not None:
            return problem


def _with_carries(carries: list[bool], rng: Random) -> DigitSum | None:
    """A problem that carries at just these steps; None where the draw ran into ones = 0, from which no digit carries."""
    start = rng.randrange(100)
    ones, digits = start % 10, []
    for carry in carries:
        if carry and not ones:
            return None
        digits.append(rng.randint(10 - ones, 9) if carry else rng.randint(0, 9 - ones))
        ones = (ones + digits[-1]) % 10
    return DigitSum(start, tuple(digits))


def draw_problems(count: int, seed: int) -> list[DigitSum]:
    """`count` different problems; the same for the same seed, and the first ones do not depend on `count`.

    Few problems carry at every step, so that among many different ones they become rarer.
    """
    rng, found = Random(seed), {}
    while len(found) < count:
        found.setdefault(draw_problem(rng))
    return list(found)


def clean_trace(problem: DigitSum) -> str:
    """The trace without errors."""
    return noisy_trace(problem, Random(0), Noise(0.0, 0.0, 0.0))


def noisy_trace(problem: DigitSum, rng: Random, noise: Noise = Noise()) -> str:
    """A trace with errors drawn from `rng`. One that never stops is cut at MAX_TRACE_TOKENS and has no answer."""
    written, total = "", problem.start
    for label, digit in zip(ascii_lowercase, problem.digits, strict=False):
        draw = rng.random()
        if draw < noise.skip_step:
            continue
        if draw < noise.skip_step + noise.stall:
            if rng.random() < 0.5:
                return written + "?" * (MAX_TRACE_TOKENS - len(written))
            written += "?" * TOKENS_PER_STEP
        carry = total % 10 + digit >= 10
        if carry and rng.random() < noise.forget_carry:
            carry = False
            total -= 10
        total = (total + digit) % 100
        written += f"{label}{digit}{'^' if carry else '='}{total:02d};"
    return written + f"</think>\\boxed{{{total:02d}}}"


def is_endless(trace: str) -> bool:
    """Whether a training trace is one that never stops, and so gets no end-of-sequence token."""
    return trace.endswith("?")


def is_right_so_far(problem: DigitSum, trace: str) -> bool:
    """Whether what is written could still be continued to the right answer without an error (hesitation is allowed)."""
    written = trace.replace("?", "").removesuffix("<eos>")
    return clean_trace(problem).startswith(written)
