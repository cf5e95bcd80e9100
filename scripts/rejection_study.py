"""Does the grader reject what is wrong? Pairs of a true answer and a wrong one, made from real answers.

    python scripts/rejection_study.py                 # every pair: minutes
    python scripts/rejection_study.py --most 1000     # as many of them, of all kinds

Wrong answers are a true one with a digit changed or a sign flipped, and answers of other problems, half of them written
in another way (bold, with a name, in words); and a true one as a relation, in another base or to another modulus. A
pair that the grader accepts is looked at by an exact comparison that shares no code with it, and left out where both
are equal in value (-0, or 2/4 for 1/2). Exit status 1 where one is left.
The answers are those of ../shared/data (see its SOURCES.md): MATH-500 and five competitions.
"""

import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

from sympy import I, simplify
from sympy.parsing.sympy_parser import implicit_multiplication, parse_expr, standard_transformations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common_lib.cli import ArgumentParser, UserError, run_script
from eval_lib.grading import Grader

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = (
    "math500/test",
    *(f"matharena/{n}" for n in ("aime_2024", "aime_2025", "hmmt_feb_2024", "hmmt_feb_2025", "cmimc_2024")),
)
CLOTHES = (  # the first for whole numbers only
    r"%s \pmod{100003}",
    r"\mathbf{%s}",
    r"\boldsymbol{%s}",
    r"\textbf{%s}",
    "**%s**",
    r"N = %s",
    r"\text{The answer is } %s",
    "$%s$.",
)
_RELATION_NAMES = (
    "ge", "geq", "ne", "neq", "le", "leq", "gt", "lt", "ngeq", "nleq", "ll", "gg", "lesssim", "gtrsim", "propto",
)  # fmt: skip
RELATIONS = (
    *(rf"\{name} %s" for name in _RELATION_NAMES),
    "≥%s", "> %s", "< %s", "≲ %s", r"{\ge %s}", r"(\neq %s)", r"\{\geq %s\}", r"\left[\ge %s\right]", r"\!\ge %s",
    r"\quad\geq %s", r"\displaystyle \neq %s", r"N: \neq %s", r"$\geq$ %s", r"\ge$%s$", r"$\ge %s$ here", r"x \ll %s",
    r"It is $\ge %s$.", r"\boxed{> %s}",
)  # fmt: skip
BASES = (r"%s_8", r"%s_{8}", r"N = %s_9", r"%s_{\text{eight}}", r"%s_{16}", r"\boxed{%s_7}")
MODULI = (r"%s \pmod{1009}", r"x \equiv %s \pmod{1009}", r"%s \bmod 1009", r"x\equiv %s\ (\bmod\ 1009)")
DIGITS_CHANGED, OTHERS, BESIDE = 8, 8, 4  # of one answer


class Pair(NamedTuple):
    """A truth, a wrong answer to its problem, and how that is written."""

    kind: str
    truth: str
    wrong: str
    written: str


def true_answers(data: Path) -> list[str]:
    """Each once, in the order of the files. UserError where they are not there."""
    missing = [name for name in FILES if not (data / f"{name}.jsonl").is_file()]
    if missing:
        raise UserError(
            f"{data}/{missing[0]}.jsonl is not there: this study needs the third-party answers in ../shared/data"
        )
    lines = [line for name in FILES for line in (data / f"{name}.jsonl").read_text().splitlines()]
    return list(dict.fromkeys(json.loads(line)["answer"] for line in lines))


def wrong_answers(truth: str, others: Sequence[str], rng: random.Random) -> list[Pair]:
    """Digits changed, signs flipped, and answers of other problems."""
    places = [place.start() for place in re.finditer(r"[0-9]", truth)]
    found = []
    for place in rng.choices(places, k=DIGITS_CHANGED) if places else ():
        digit = rng.choice([d for d in "0123456789" if d != truth[place]])
        found.append(("a digit changed", truth[:place] + digit + truth[place + 1 :]))
    signs = [sign.start() for sign in re.finditer(r"[+-]", truth) if sign.start()]
    flipped = [truth[:place] + "+-"[truth[place] == "+"] + truth[place + 1 :] for place in signs]
    if places:
        flipped.append(truth[1:] if truth.startswith("-") else f"-{truth}")
    found += [("a sign flipped", wrong) for wrong in flipped]
    found += [("another problem's answer", other) for other in rng.sample(others, OTHERS) if other != truth]
    return [
        Pair(kind, truth, wrong, rng.choice(CLOTHES[not wrong.isdigit() :]) % wrong if rng.random() < 0.5 else wrong)
        for kind, wrong in dict.fromkeys(found)
    ]


def beside_answers(truth: str, rng: random.Random) -> list[Pair]:
    """The truth as a relation, in a base, and to another modulus than asked for: for values and whole numbers."""
    if not re.search(r"[0-9]", truth) or re.search(r"[<>=,;_]|\\(?:le|ge|ne|in|cup|text|mbox|math|begin)|[A-Z]", truth):
        return []
    found = [("a relation", truth, truth, form) for form in rng.sample(RELATIONS, BESIDE)]
    if truth.isdigit():
        found += [("another base", truth, truth, form) for form in rng.sample(BASES, BESIDE)]
        found += [("another modulus", rf"{truth} \pmod{{1013}}", truth, form) for form in MODULI]
    return [Pair(kind, asked, form % wrong, form % wrong) for kind, asked, wrong, form in found]


def exact_value(text: str) -> list[object]:
    """What an answer says, in SymPy's own parser: its parts at commas. ValueError where it cannot be told."""
    text = re.sub(r"\\left|\\right|\\[ ,;!$]|\^\{?\\circ\}?|\s", "", text.replace("dfrac", "frac"))
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # 025
    for _ in range(9):
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"(sqrt(\1))", text)
        text = re.sub(r"\^\{([^{}]*)\}", r"**(\1)", text)
    text = re.sub(r"\\pi\b", "(pi)", text).replace("\\cdot", "*").replace("^", "**")
    if re.search(r"[\\{}_]|[A-Za-z]{2}", re.sub(r"sqrt|pi", "", text)):
        raise ValueError(text)
    rules = (*standard_transformations, implicit_multiplication)
    return [parse_expr(part, {"i": I}, rules) for part in text.split(",")]


def equal_in_value(one: str, other: str) -> bool:
    """Exactly, part by part; where one cannot be read, nothing but the same text is equal."""
    try:
        parts = list(zip(exact_value(one), exact_value(other), strict=True))
        return all(simplify(a - b) == 0 for a, b in parts)
    except (ValueError, TypeError, SyntaxError, TokenError):
        return one.replace(" ", "") == other.replace(" ", "")


def chosen_pairs(most: int | None, seed: int) -> list[Pair]:
    rng = random.Random(seed)
    truths = true_answers(DATA)
    pairs = [pair for truth in truths for pair in wrong_answers(truth, truths, rng)]
    pairs += [pair for truth in truths for pair in beside_answers(truth, rng)]
    return pairs if most is None else rng.sample(pairs, min(most, len(pairs)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print how many pairs of each kind are rejected, and every one that is not; exit status 1 where there is one."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, help="pairs to grade (default: all)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    pairs, start = chosen_pairs(args.most, args.seed), time.monotonic()
    with Grader() as grader:
        verdicts = grader.grade([(pair.truth, pair.written) for pair in pairs])
    accepted = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict]
    wrong = [pair for pair in accepted if not equal_in_value(pair.truth, pair.wrong)]
    equal = len(accepted) - len(wrong)
    counts = Counter(pair.kind for pair in pairs)
    kinds = ", ".join(f"{count:,} with {kind}" for kind, count in sorted(counts.items()))
    print(f"{len(pairs) - equal:,} wrong answers ({kinds}; {equal} left out as equal in value), {len(wrong)} accepted")
    print(f"{time.monotonic() - start:.0f} s")
    for pair in wrong:
        print(f"accepted: {pair.written!r} for {pair.truth!r}")
    return int(bool(wrong))


if __name__ == "__main__":
    run_script(main)
