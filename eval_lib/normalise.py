r"""The form in which an answer is compared: how it is written is taken away, what it says stays. Pure Python.

Done before math-verify sees an answer, for verdicts and votes alike. Each step is about one way of writing; none guesses:
what is not recognised is left to math-verify as it is.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from eval_lib.grading_worker import MATH_MARK

_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_INTEGER = re.compile(r"([+-]?)(\d+|[1-9]\d{0,2}(?:(?:,\\!\s*|\{,\}|\\,|\\ |,| )\d{3})+)(?:\.0*)?", re.ASCII)
_MOST_LAYERS = 8  # of fonts, delimiters and stars around an answer
_MOST_CHARACTERS = 2000  # of a longer text, which is no answer, only what surrounds it is taken off

# ------------------------------------------------------------------------------------------------------ fonts and words

_TEXT_FONTS = "text|textbf|textit|textrm|textnormal|textsf|texttt|mathrm|mbox|emph"
_MATH_FONTS = "mathbf|mathit|mathsf|boldsymbol|bm|pmb|underline"
_FONT = re.compile(rf"\\(?:(?P<text>{_TEXT_FONTS})|{_MATH_FONTS})\s*(?=\{{)")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ANSWER_IS = re.compile(
    rf"\\(?:{_TEXT_FONTS})\{{[^\w{{}}]{{0,20}}(?:so|thus|hence|therefore)?[^\w{{}}]{{0,20}}(?:the|our|my)?\s*"
    r"(?:final|correct)?\s*answer\s*(?:is|equals)?[\s:=]*\}",
    re.IGNORECASE,
)
_NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
_MEASURED = re.compile(
    rf"\\(?:{_TEXT_FONTS})\{{\s*([+-]?\d+(?:\.\d+)?)(?:\\[,;: ]|[\s~])+([cmk]m|kg|ml|mL|ft|mi|min|sec|hr)\s*\}}",
    re.ASCII,
)
_NUMBER_WORD = re.compile(rf"(?:\\(?:{_TEXT_FONTS})\{{\s*)?([A-Za-z]{{3,9}})\s*(\}}?)", re.ASCII)


def _closing(text: str, start: int) -> int:
    """The index after the brace that closes the one at `start`; -1 where none does."""
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return brace.end()
    return -1


def _without_fonts(text: str) -> str:
    r"""Numbers and formulas without their font: `x=\mathbf{2}` -> `x=2`. Words keep it: math-verify needs it."""
    position = 0
    while font := _FONT.search(text, position):
        position, end = font.end(), _closing(text, font.end())
        if end < 0:
            break
        inside = text[font.end() + 1 : end - 1].strip()
        bare = _COMMAND.sub("", inside)
        words = re.search("[A-Za-z]" if font["text"] else "[A-Za-z]{2}", bare)
        whole = end - font.start() == len(text)
        formula = re.search(r"[0-9]", bare) or (inside != bare and not _FONT.search(inside))
        if inside and not words and (formula or (whole and not font["text"])) and text[end : end + 1] not in ("^", "_"):
            text, position = text[: font.start()] + inside + text[end:], font.start()
    return text


def _number_word(text: str) -> str:
    r"""`\text{five}` -> `5`, up to twenty; `\mathrm{204\,cm}` -> `204\text{ cm}`."""
    if measured := _MEASURED.fullmatch(text):
        return rf"{measured[1]}\text{{ {measured[2]}}}"
    match = _NUMBER_WORD.fullmatch(text)
    if match is None or bool(match[2]) != text.startswith("\\") or match[1].lower() not in _NUMBER_WORDS:
        return text
    return str(_NUMBER_WORDS.index(match[1].lower()))


# -------------------------------------------------------------------------------------------------- numbers and formulas

_UNICODE = str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{GREEK SMALL LETTER PI}": r"\pi ", "\N{INFINITY}": r"\infty ", "\N{LESS-THAN OR EQUAL TO}": r"\le ",
     "\N{GREATER-THAN OR EQUAL TO}": r"\ge ", "\N{NOT EQUAL TO}": r"\ne ", "\N{PLUS-MINUS SIGN}": r"\pm ",
     "\N{MULTIPLICATION SIGN}": r"\times ", "\N{DOT OPERATOR}": r"\cdot "}
)  # fmt: skip
_ROOT = re.compile(r"\N{SQUARE ROOT}\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]|\\pi\b))")
_GROUPS = re.compile(r"(?<![\d.,}])[1-9]\d{0,2}(?:(?:,\\!\s*|\{,\}|\\,|\\ )\d{3})+(?!\d|(?:\{,\}|\\,)\d)", re.ASCII)
# One number whose commas set thousands apart, and nothing beside it that is not its unit. `x = 100,200` may be two
# solutions too: the grading worker reads both.
_COMMAS = re.compile(
    r"([+-]?(?:\\\$)?)([1-9]\d{0,2}(?:,\d{3})+)"
    rf"((?:\.\d+)?(?:\\[,;: ]|\s|~)*(?:\\(?:{_TEXT_FONTS})\{{[^{{}}]*\}})?)",
    re.ASCII,
)
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*")
_LETTER_COMMANDS = re.compile(
    r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|pi|phi|sigma|omega)(?![A-Za-z])|[0-9A-Za-z]"
)
_NOT_EQUAL = re.compile(r"\\not\s*=|!=")
_MINUS = re.compile(r"(?<![^=(\[{,])\N{EN DASH}\s*(?=[\d\\.])")
_RELATION = (
    r"(?:\\(?:n?[gl]eq{0,2}|n?[gl]e|n?[gl]eqslant|neq?|[gl]neqq?|gt|lt|ngtr|nless|ll|gg|lll|ggg|[gl]esssim|[gl]trsim|propto|n?prec"
    r"|n?succ)(?![A-Za-z])|\\not(?![A-Za-z])|<(?![^<]*>\W*$)=?|>=?|[≪≫≮≯≰≱≲≳∝])"
)
# What may stand before a relation that makes it no part of a formula: brackets, spaces, a style, a word with a colon.
_OPENING = r"(?:\\(?:left|[Bb]igg?l?|q?quad|displaystyle|textstyle)(?![A-Za-z])|\\[,;:! ({\[]|\{\}|[({\[$&~\s]|[A-Za-z]{1,20}\s?:(?!=))*+"
_NO_LEFT_SIDE = re.compile(rf"(?P<before>{_OPENING})(?P<right>{_RELATION}.*\w.*)", re.DOTALL)
_LED = re.compile(rf"{_OPENING}(?:(?:[A-Za-z]|\\[a-z]{{2,7}}(?![A-Za-z]))(?:_\w)?[\s$]*)?{_RELATION}")
_LAST_BRACKET = re.compile(r"\s*(?:\\(?:right|[Bb]igg?r?)(?![A-Za-z]))?\s*\\?[)}\]]$")
_MANY_VALUES = re.compile(
    rf"{_RELATION}|[,;]|\\(?:in|infty|cup|cap|setminus|mathbb|mathbf|emptyset|varnothing)(?![A-Za-z])"
)
_MATHEMATICS = re.compile(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def _joined_digits(text: str) -> str:
    r"""Thousands without what sets them apart: `N = 2{,}304` -> `N = 2304`; a comma only where it can be nothing else."""
    text = _GROUPS.sub(lambda match: re.sub(r"[^0-9]", "", match[0]), text)
    match = _COMMAS.fullmatch(text)
    return match[1] + match[2].replace(",", "") + match[3] if match else text


def _braced_fractions(text: str) -> str:
    r"""`\frac\pi2` -> `\frac{\pi}{2}`: an argument without braces is one letter, digit or Greek letter."""
    done, position = "", 0
    while fraction := _FRACTION.search(text, position):
        place, arguments = fraction.end(), []
        for _ in range(2):
            letter = _LETTER_COMMANDS.match(text, place)
            end = _closing(text, place) if text[place : place + 1] == "{" else letter.end() if letter else -1
            if end < 0:
                break
            arguments.append(text[place:end] if letter is None else f"{{{letter[0]}}}")
            place = end + len(text[end:]) - len(text[end:].lstrip())
        if len(arguments) < 2:
            done, position = done + text[position : fraction.end()], fraction.end()
            continue
        head = text[position : fraction.end()].rstrip()
        done, position = done + head + "".join(map(_braced_fractions, arguments)), end
    return done + text[position:]


# ------------------------------------------------------------------------------------------------------------- relations


def _with_left_side(text: str) -> str:
    r"""`\geq 2`, `(\geq 2)` -> `x \geq 2`: without a left side math-verify reads the number alone."""
    match = _NO_LEFT_SIDE.match(text)
    if match is None or MATH_MARK.search(text):
        return text
    right = match["right"]
    for _ in re.findall(r"[({\[]", match["before"])[: _MOST_LAYERS + 1]:
        right, found = _LAST_BRACKET.subn("", right)
        if not found:
            return text
    return f"x {right}"


def _is_relation(text: str) -> bool:
    r"""Is it a relation, that is one with nothing or a name on its left? Of text around mathematics, is that one?

    `\approx` is none: an approximation of the truth, where math-verify finds it equal, stays right.
    """
    if not MATH_MARK.search(text):
        return bool(_LED.match(text))
    if (box := text.rfind(r"\boxed{")) >= 0:
        return bool(_LED.match(text, box + len(r"\boxed{")))
    pieces = list(_MATHEMATICS.finditer(text))
    lone = len(pieces) == 1 and _NO_LEFT_SIDE.match(text)  # `$\geq$ 73`
    return bool(lone or (pieces and _LED.match(next(filter(None, pieces[-1].groups())))))


# ------------------------------------------------------------------------------------------------------ the whole answer


def _unboxed(text: str) -> str:
    """The inside of a box that is all of the text."""
    whole = text.startswith(r"\boxed{") and _closing(text, len(r"\boxed")) == len(text)
    return text[len(r"\boxed{") : -1].strip() if whole else text


def _layer_off(text: str) -> str:
    """Without one layer of what only surrounds an answer: spaces, a box, stars, delimiters, a final full stop."""
    text = " ".join(text.split())
    text = _unboxed(text)
    stars = re.fullmatch(r"(?:\*\*((?:(?!\*\*).)+)\*\*|\*([^*]+)\*)\.?", text)
    text = (stars[1] or stars[2]).strip() if stars else text
    for left, right in _DELIMITERS:
        inner = _unboxed(text.removeprefix(left).removesuffix(right).strip())
        if text == left + text[len(left) : -len(right)] + right and not MATH_MARK.search(inner):
            text = inner
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def normalize_answer(text: str) -> str:
    """The form in which answers are compared as strings, and given to math-verify."""
    if len(text) > _MOST_CHARACTERS:
        return _layer_off(text.replace("\N{MINUS SIGN}", "-"))
    text = text.translate(_UNICODE)
    for _ in range(_MOST_LAYERS):
        before = text
        text = _number_word(_without_fonts(_layer_off(text)))
        text = _ANSWER_IS.sub("", text, count=1) if _ANSWER_IS.match(text) else text
        if text == before:
            break
    text = _MINUS.sub("-", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3]}}}", text)
    text = _NOT_EQUAL.sub(lambda _: r"\ne ", _braced_fractions(_joined_digits(text)))
    return _with_left_side(" ".join(text.split()))


def as_integer(text: str) -> str | None:
    r"""The digits of a normalised integer answer, or None: '025' -> '25', '-1{,}000' -> '-1000', '7.0' -> '7'."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = re.sub(r"[^0-9]", "", match[2]).lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


# -------------------------------------------------------------------------------------------- base, modulus, unit's power

_GAP = r"(?:\\[,;:! ]|[\s~])*+"
_DIGITS = r"(?:[0-9][0-9A-Fa-f]*+(?:\.[0-9A-Fa-f]*+)?|\.[0-9A-Fa-f]++)(?:\\overline\s*\{[0-9A-Fa-f]+\})?"
_NUMBER = re.compile(rf"(?<![0-9A-Za-z.]){_DIGITS}")
_BASE_NAME = rf"(?:\\(?:{_TEXT_FONTS})\s*\{{\s*)?(?:base\s*\}}?\s*)?\(?(\d+|{'|'.join(_NUMBER_WORDS)})\)?\s*\}}?"
_BASE = re.compile(
    rf"(?<![0-9A-Za-z.])(?P<digits>{_DIGITS})\s*_\s*"
    rf"(?:(\d)(?!\d)|\{{\s*{_BASE_NAME}\s*\}}|(?=\\){_BASE_NAME})",
    re.ASCII | re.IGNORECASE,
)
_MODULUS = re.compile(
    rf"(?:[A-Za-z]\s*(?:=|\\equiv)\s*|\\equiv\s*)?(?P<digits>[+-]?\d+){_GAP}"
    rf"\(?{_GAP}\\?(?:pmod|bmod|mod|(?:text|mathrm)\{{\s*\(?mod\s*\}}){_GAP}\{{?{_GAP}(?P<modulus>\d+)\s*\)?\}}?\)?",
    re.ASCII,
)
_UNIT_POWER = re.compile(rf".*\\(?:{_TEXT_FONTS})\{{[^{{}}]*\}}\s*\^\s*\{{?(\d)\}}?", re.DOTALL | re.ASCII)


class Parts(NamedTuple):
    """A normalised answer: what to compare, and what stands beside it; "" for what it has not."""

    text: str
    base: str | None = ""  # None where it cannot be told: of text that has the answer somewhere in it
    beside: str = ""  # a modulus, or the power of a unit
    relation: bool = False  # `\geq 204`, and not a value


def _bases(text: str) -> tuple[str, str]:
    r"""(text without the bases of its numbers, bases): `52_{\text{eight}}` -> `52`, `8`. Ten is the base of a number without.

    Where one of several numbers has a base, each such number is told with it: `12_8,3_8`.
    """
    found: list[tuple[str, str]] = []

    def bare(match: re.Match[str]) -> str:
        name = (match[2] or match[3] or match[4]).lower()
        base = str(_NUMBER_WORDS.index(name) if name in _NUMBER_WORDS else int(name[:4]))
        if re.search("[A-Fa-f]", match["digits"].replace(r"\overline", "")) and int(base) <= 10:  # 10C_3
            return match[0]
        found.append((match["digits"], base))
        return match["digits"]

    text = _BASE.sub(bare, text)
    if all(base == "10" for _, base in found):
        return text, ""
    alone = len(found) == 1 and len(_NUMBER.findall(text)) == 1
    return text, found[0][1] if alone else ",".join(sorted(map("_".join, found)))


@lru_cache(maxsize=4096)
def answer_parts(text: str) -> Parts:
    """What is compared of a normalised answer, and what stands beside it."""
    if len(text) > _MOST_CHARACTERS:
        return Parts(text, None)
    if MATH_MARK.search(text):
        return Parts(text, None, relation=_is_relation(text))
    if modulus := _MODULUS.fullmatch(text):
        return Parts(modulus["digits"], beside=f"mod {modulus['modulus']}")
    bare, base = _bases(text)
    power = _UNIT_POWER.fullmatch(bare)
    return Parts(bare, base, power[1] if power else "", _is_relation(bare))


def compared(gold: str, answer: str) -> tuple[str, str] | None:
    r"""What is left to compare of two normalised answers; None where what stands beside the number tells them apart.

    `204_8` is not 204, nor the other way round, as in MATH's own grader. `73 \pmod{1000}` is 73, and not
    `73 \pmod{999}`; cm^2 may be left out, and is not cm^3. A relation is no value: `(\geq 204)` is not 204.
    """
    one, other = answer_parts(gold), answer_parts(answer)
    if None not in (one.base, other.base) and one.base != other.base:
        return None
    if one.beside and other.beside and one.beside != other.beside:
        return None
    if one.relation != other.relation and not _MANY_VALUES.search((other if one.relation else one).text):
        return None
    return one.text, other.text
