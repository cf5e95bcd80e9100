r"""The form in which an answer is compared: how it is written is taken away, what it says stays. Pure Python.

Done before math-verify sees an answer, for verdicts and votes alike. Each step is about one way of writing; none guesses:
what is not recognised is left to math-verify as it is.
"""

import re
from functools import lru_cache

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
    rf"\\(?:{_TEXT_FONTS})\{{[^\w{{}}]{{0,20}}(?:so|thus|hence|therefore)?[^\w{{}}]{{0,20}}(?:the|our|my)?\s*(?:final|correct)?\s*answer\s*"
    r"(?:is|equals)?[\s:=]*\}",
    re.IGNORECASE,
)
_NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
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
    r"""`\text{five}` -> `5`, up to twenty."""
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
# One number whose commas set thousands apart, and nothing beside it that is not its name or unit.
_COMMAS = re.compile(
    r"((?:[A-Za-z]\s*=\s*)?[+-]?(?:\\\$)?)([1-9]\d{0,2}(?:,\d{3})+)"
    rf"((?:\.\d+)?(?:\\[,;: ]|\s|~)*(?:\\(?:{_TEXT_FONTS})\{{[^{{}}]*\}})?)",
    re.ASCII,
)
_FRACTION = re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*")
_LETTER_COMMANDS = re.compile(
    r"\\(?:alpha|beta|gamma|delta|theta|lambda|mu|pi|phi|sigma|omega)(?![A-Za-z])|[0-9A-Za-z]"
)
_NOT_EQUAL = re.compile(r"\\not\s*=|!=")
_RELATION = re.compile(r"(?:\\(?:geq{0,2}|leq{0,2}|[gl]eqslant|neq?|gt|lt)(?![A-Za-z])|[<>]=?)\s*(?=\S)")
_OTHER_RELATION = re.compile(r"\\(?:n[gl]eq|ll|gg|lesssim|gtrsim|propto)(?![A-Za-z])|[≲≳≪≫∝]")  # math-verify reads none
# What may stand before a relation without its left side: brackets, spaces, delimiters, a word and a colon
_BEFORE_RELATION = re.compile(
    r"(?:\\left(?![A-Za-z])|\\[!,;:> ]|\\q?quad(?![A-Za-z])|\\displaystyle(?![A-Za-z])|\\\{|\\[(\[]|[{(\[$~\s]|[A-Za-z]{1,20}:)*"
)


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


# ------------------------------------------------------------------------------------------------------ the whole answer


def _unboxed(text: str) -> str:
    """The inside of a box that is all of the text."""
    whole = text.startswith(r"\boxed{") and _closing(text, len(r"\boxed")) == len(text)
    return text[len(r"\boxed{") : -1].strip() if whole else text


def _layer_off(text: str) -> str:
    """Without one layer of what only surrounds an answer: spaces, a box, stars, delimiters, a final full stop."""
    text = " ".join(text.split())
    text = _unboxed(text)
    stars = re.fullmatch(r"\*\*((?:(?!\*\*).)+)\*\*\.?", text)
    text = stars[1].strip() if stars else text
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
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3]}}}", text)
    text = _NOT_EQUAL.sub(lambda _: r"\ne ", _braced_fractions(_joined_digits(text)))
    text = " ".join(text.split())
    # Without a left side math-verify reads the number alone.
    return f"x {text}" if _RELATION.match(text) and "$" not in text else text


def as_integer(text: str) -> str | None:
    r"""The digits of a normalised integer answer, or None: '025' -> '25', '-1{,}000' -> '-1000', '7.0' -> '7'."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = re.sub(r"[^0-9]", "", match[2]).lstrip("0") or "0"
    return "-" + digits if match[1] == "-" and digits != "0" else digits


# -------------------------------------------------------------------------------------------- base, modulus, unit's power

_NAME = r"(?:[A-Za-z]\s*(?:=|\\equiv)\s*|\\equiv\s*)?"
_BASE = re.compile(
    rf"{_NAME}(?P<digits>[+-]?[0-9][0-9A-Fa-f]*(?:\.[0-9A-Fa-f]*(?:\\overline\{{[0-9A-Fa-f]+\}})?)?)\s*_\s*"
    r"(?:\{\s*(?:\\text\{\s*)?\(?(\d+|[a-z]{3,9})\)?\s*\}?\s*\}|(\d)|\\text\{\s*([a-z]{3,9})\s*\})",
    re.ASCII,
)
_MODULUS = re.compile(
    rf"{_NAME}(?P<digits>[+-]?\d+)\s*(?:\\[,;: ]\s*)?"
    r"\(?\s*\\?(?:pmod|bmod|mod|(?:text|mathrm)\{\s*\(?mod\s*\})\s*\{?\s*(?P<modulus>\d+)\s*\)?\}?\)?",
    re.ASCII,
)
_UNIT_POWER = re.compile(rf".*\\(?:{_TEXT_FONTS})\{{[^{{}}]*\}}\s*\^\s*\{{?(\d)\}}?", re.DOTALL | re.ASCII)


@lru_cache(maxsize=4096)
def answer_parts(text: str) -> tuple[str, str | None, str]:
    """(what to compare, base, modulus or power of the unit) of a normalised answer; '' for what it has not.

    The base is None where it cannot be told: of text that has the answer somewhere in it.
    """
    if len(text) > _MOST_CHARACTERS or MATH_MARK.search(text):
        return text, None, ""
    if base := _BASE.fullmatch(text):
        number = _number_word(base[2] or base[3] or base[4])
        return base["digits"], "" if number == "10" else number, ""
    if modulus := _MODULUS.fullmatch(text):
        return modulus["digits"], "", f"mod {modulus['modulus']}"
    power = _UNIT_POWER.fullmatch(text)
    return text, "", power[1] if power else ""


_NUMBER = re.compile(r"[+-]?\d[\d.,]*", re.ASCII)


def _has_relation(text: str) -> bool:
    """Whether it begins with a relation without its left side, whatever stands before that."""
    if "\\boxed" in text:  # the answer stands there
        return False
    start = _BEFORE_RELATION.match(text).end()  # type: ignore[union-attr]
    return bool(_RELATION.match(text, start) or _OTHER_RELATION.match(text, start))


def compared(gold: str, answer: str) -> tuple[str, str] | None:
    r"""What is left to compare of two normalised answers; None where what stands beside the number tells them apart.

    `204_8` is not 204, nor the other way round, as in MATH's own grader. `73 \pmod{1000}` is 73, and not
    `73 \pmod{999}`; cm^2 may be left out, and is not cm^3.
    """
    related, bare = (gold, answer) if _has_relation(gold) else (answer, gold)
    if _has_relation(related) and _NUMBER.fullmatch(bare):  # `(\ge 73)` is no 73
        return None
    (one, base, beside), (other, other_base, other_beside) = answer_parts(gold), answer_parts(answer)
    if (None not in (base, other_base) and base != other_base) or (beside and other_beside and beside != other_beside):
        return None
    return one, other
