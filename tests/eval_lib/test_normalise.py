"""Answers that say the same in another way, and answers that only look alike: as verdicts, as votes, and as forms."""

import itertools
import time

import pytest

from eval_lib.grading import Grader
from eval_lib.normalise import answer_parts, as_integer, compared, normalize_answer

RIGHT = [
    ("2304", r"N = 2{,}304"), ("184320", "N=184,320"), ("184320", r"184\,320\text{ ways}"),
    *(("025", rf"\{font}{{025}}") for font in ("textbf", "mathbf", "mathrm", "text")),
    *(("90", rf"\{font}{{90}}") for font in ("boldsymbol", "bm", "underline")),
    (r"\frac49", r"\mathbf{\frac{4}{9}}"), (r"1-\frac{2}{\pi}", r"1-\frac2\pi"), (r"\frac{\pi}{2}", r"\frac\pi2"),
    ("73", r"73 \pmod{1000}"), ("73", r"73 \bmod 1000"), (r"\sqrt{6}", "√6"), (r"3\sqrt{3}", r"\text{The answer is } 3\sqrt{3}"),
    ("204", "**204**"), (r"(-\infty,2)", "x<2"), ("5", r"\text{five}"), ("20", r"\text{twenty}"), ("C", "**C**"),
    ("2304", r"x=\mathbf{2{,}304}"), ("184320", r"184,320\text{ ways}"), ("5", r"**$\textbf{5}$.**"), ("2", r"\mathbf{2}\text{ cm}"),
    (r"3 \pmod 7", r"x \equiv 3 \pmod{7}"), ("52_8", r"52_{8}"), (r"\frac{\sqrt{6}}{3}", r"\frac{√6}3"), (r"x \le 5", r"\leq 5"),
    (r"15\mbox{ cm}^2", "15"), ("204_5", r"\boxed{204_5}"), ("204_5", r"a quotient of $\boxed{204_5}$, so"),
    ("x<2", r"(-\infty,2)"), (r"\begin{pmatrix}3\\4\end{pmatrix}",
     r"\begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}2\\2\end{pmatrix}"),
    ("204", "204_{10}"), ("204", r"N=204_{\text{ten}}"), ("204_8", r"204_{\text{eight}}"), ("110_2", r"110_{\text{two}}"),
    ("204_8", r"204_{8}\text{ coins}"), (r"12_8+3_8", r"3_{8}+12_{\text{eight}}"), ("0.1_2", ".1_{2}"), ("10C_3", "10C_3"),
    ("x=100, 200", "x=100,200"), ("100200", "x=100,200"), ("204", "*204*"), ("204", r"\mathrm{204\,cm}"),
    ("-3", "\N{EN DASH}3"), ("(-3,2)", "(\N{EN DASH}3,2)"), ("73", r"x\equiv 73\ (\bmod\ 1000)"), ("73", r"73\ \mathrm{mod}\ 1000"),
    ("73", r"\approx 73"), ("73", "= 73"), ("73", r"for $\geq 3$ it is \boxed{73}"), ("73", r"if $n$ $\geq 3$, then $73$"),
    (r"[73,\infty)", r"{\ge 73}"), (r"(73,\infty)", "(> 73)"), (r"x\neq 2", r"\left\{\neq 2\right\}"), (r"\ge 73", r"{\ge 73}"),
    ("x<2", "$x<2$ here"),
]  # fmt: skip
_RELATIONS = (
    r"{\ge 73}", r"(\neq 73)", r"\{\geq 73\}", r"\left[\ge 73\right]", r"\!\ge 73", r"\,\neq 73", r"\quad\geq 73",
    r"\displaystyle \neq 73", r"N: \neq 73", r"$\geq$ 73", r"\ge$73$", r"$\ge 73$ here", "$\\ge 73$, so\nyes", "{}\\ge 73",
    r"\not\ge 73", r"x \ll 73", r"It is $\ne 73$.", r"it is \boxed{\geq 73}", r"\bigl(\ge 73\bigr)", "\N{MUCH LESS-THAN} 73",
    r"\{x : x \ll 73\}", "\N{LESS-THAN OR EQUIVALENT TO} 73", r"\geq 7{,}3", r"{\ge 73} here", r"\lambda_1 \gg 73",
    *(rf"\{name} 73" for name in ("ngeq", "nleq", "ll", "gg", "lesssim", "gtrsim", "propto", "ngtr", "nless", "gneq", "prec")),
)  # fmt: skip
WRONG = [
    *(("73", relation) for relation in _RELATIONS), ("N=73", r"{\ge 73}"), (r"\sqrt{3}", r"$\geq$ \sqrt{3}"),
    (r"\sqrt[3]{2}", r"{\ge \sqrt[3]{2}}"), (r"{\le 73}", r"{\ge 73}"), (r"73\text{ cm}", r"N: \ge 73\text{ cm}"),
    ("204", r"204_{\text{eight}}"), ("204", r"204_\text{eight}"), ("204_8", r"204_{\text{nine}}"), ("0.1_2", "0.1"), ("(12_3)", "12"),
    (r"0.\overline{12}_3", r"0.\overline{12}"), ("12_8+3_8", "12_9+3_9"), ("12_8+3_8", "12+3"), ("12_8+3", "12+3_8"),
    ("12_3, 5_3", "12, 5"), ("12_{10}+3_8", "12_8+3_{10}"), ("204", r"\text{204 million}"), ("-2", "3\N{EN DASH}5"), ("3", "\N{EN DASH}3"),
    (r"73 \pmod{999}", r"x\equiv 73\ (\bmod\ 1000)"), ("100, 300", "x=100,200"), ("100300", "x=100,200"), ("204", "*20*4"),
    ("204", r"\geq 204"), ("204", r"\neq 204"), ("204", "204_8"), (".0000672", ".000067"),
    ("204", r"\not= 204"), ("204", "≥ 204"), ("204", "> 204"), ("204", "N = 204_8"), ("204", r"$\boxed{204_8}$"),
    ("204_5", "204_8"), ("40_9", "40"),
    (r"3 \pmod 7", r"x \equiv 3 \pmod{5}"), ("73", r"74 \pmod{1000}"), ("5", r"\text{not } 5"), ("5", r"\text{five hundred}"),
    ("0", "0.0000001"), (r"15\mbox{ cm}^2", r"15\mbox{ cm}^3"), ("3", r"\mathbf{3}^2"), (r"(1,\infty)", "x>2"), ("(1,234)", "1234"),
    ("111", "0,111"), (r"\dfrac{4^{2024}}{\binom{4048}{2024}}-2", r"\dfrac{8^{2024}}{\binom{4048}{2024}}-2"),
    (r"\dfrac{4^{2024}}{\binom{4048}{2024}}-2", r"N = \dfrac{4^{2024}}{\binom{4048}{2424}}-2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grader():
    with Grader(num_workers=1) as grader:
        yield grader


@pytest.mark.parametrize(
    ("cases", "right"), [(RIGHT, True), (WRONG, False)], ids=["written in another way", "only look alike"]
)
def test_verdicts_and_votes_of_answers(grader, cases, right):
    """A vote is among classes: what is right must stand with the truth, what is wrong apart from it. Both directions."""
    both = [*cases, *((answer, gold) for gold, answer in cases)]
    verdicts = grader.grade(both)
    assert [case for case, verdict in zip(both, verdicts, strict=True) if verdict != right] == []
    apart = [case for case in cases if len(set(grader.answer_classes(case))) == 2]
    assert apart == ([] if right else cases)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"x=\mathbf{2}", "x=2"), (r"\mathbf{v}", "v"), (r"\text{C}", r"\text{C}"), (r"\text{even}", r"\text{even}"),
        (r"\mathbf{12}^2", r"\mathbf{12}^2"), (r"\text{1st}", r"\text{1st}"), (r"\textbf{\text{7}}", "7"), (r"\mathbf{7", r"\mathbf{7"),
        (r"\textbf{1} + \mathbf{2}", "1 + 2"), (r"\mathbf{}", r"\mathbf{}"), (r"\text{ cm}^2", r"\text{ cm}^2"),
        ("five", "5"), ("Five.", "5"), (r"\text{ zero }", "0"), (r"\text{five", r"\text{five"), ("fives", "fives"),
        (r"\text{So the final answer is: } x", "x"), (r"\text{answer } 3", "3"),
        (r"\text{an answer to it is } 3", r"\text{an answer to it is } 3"),
        ("1,234", "1234"), ("1,234,567.5", "1234567.5"), ("(1,234)", "(1,234)"), ("1, 234", "1, 234"),
        ("0,111", "0,111"), ("12,34", "12,34"),
        (r"10,\!080", "10080"), (r"1{,}234x", "1234x"), (r"a\,123", r"a\,123"), (r"1\,234\,5", r"1\,234\,5"), (r"\$32,348", r"\$32348"),
        (r"\frac12", r"\frac{1}{2}"), (r"\dfrac\pi{3x}", r"\dfrac{\pi}{3x}"), (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}"),
        (r"\frac1{\frac23}+\tfrac 4 5", r"\frac{1}{\frac{2}{3}}+\tfrac{4}{5}"),
        (r"\frac\sqrt2 3", r"\frac\sqrt2 3"), (r"\frac{1}", r"\frac{1}"),
        (r"2^\frac12x", r"2^\frac{1}{2}x"), ("√(x+1)", r"\sqrt{x+1}"), ("2√{5}", r"2\sqrt{5}"), ("√", "√"), ("2π", r"2\pi"),
        ("2πr", r"2\pi r"),
        (r"(\geq 2)", r"x \geq 2"), (r"(\geq 2", r"(\geq 2"), (r"$\geq$ 2", r"$\geq$ 2"), ("<1,2>", "<1,2>"), ("N=1,234", "N=1,234"),
        (r"\text{3 kg}", r"3\text{ kg}"), (r"\text{3 pi}", r"\text{3 pi}"), ("*a* and *b*", "*a* and *b*"), ("*2*", "2"),
        (r"\geq 2", r"x \geq 2"), ("<= 2", "x <= 2"), (r"\neg 2", r"\neg 2"), (r"\left(1,2\right)", r"\left(1,2\right)"),
        ("x != 2", r"x \ne 2"),
        ("**a** and **b**", "**a** and **b**"), ("2**3", "2**3"), ("**", "**"), ("", ""), ("$**7**$", "7"),
        (r"\boxed{7}", "7"), (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"), (r"\boxed{7} or \boxed{8}", r"\boxed{7} or \boxed{8}"),
    ],
)  # fmt: skip
def test_the_form_of_an_answer_keeps_what_it_says(text, form):
    assert normalize_answer(text) == form == normalize_answer(form)


def test_number_words_go_to_twenty():
    teens = [
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
    ]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", *teens]
    assert [normalize_answer(rf"\text{{{word}}}") for word in words] == [str(number) for number in range(21)]


def test_what_stands_beside_a_number():
    assert answer_parts("52_{8}") == ("52", "8", "", False)
    assert answer_parts(r"-3 \pmod{7}") == answer_parts(r"x \equiv -3 \bmod 7") == ("-3", "", "mod 7", False)
    for text in ("a_1", r"2^{100} \bmod 7", r"x \in \{1\}", "7", "10C_3", r"\log_2 8"):
        assert answer_parts(text) == (text, "", "", False)
    assert answer_parts("12_8 + 3") == ("12 + 3", "12_8", "", False)
    assert answer_parts("x \\ll 5") == ("x \\ll 5", "", "", True)
    assert compared("73", r"73 \pmod{10}") == ("73", "73")
    told_apart = ["5", "5_8", "5_9", r"x \ge 5"]
    assert all(compared(*pair) is None for pair in itertools.permutations(told_apart, 2))


HOSTILE = {
    "braces": "{" * 2000, "fractions": r"\frac" * 400, "open fonts": r"\mathbf{" * 250, "commas": "1," * 1000, "roots": "√" * 2000,
    "nested fonts": r"\bm{" * 390 + "7" + "}" * 390, "nested fractions": r"\frac1{" * 240 + "2" + "}" * 240, "units": r"\text{a" * 300,
    "a long word": r"\text{" + "!" * 1900 + "}x", "bases": "1_8" * 600, "a long base": "1" * 1990 + "_8", "openings": r"\left(" * 300,
    "words": "word:" * 390, "a relation in brackets": "(" * 900 + ">1" + ")" * 900, "less": "<" * 2000, "open mathematics": r"\(" * 1000,
    "pieces": "$1$" * 660, "dots": "1." * 1000, "a long number": "1" * 2000, "unclosed roots": "√(" * 1000, "gaps": r"1\ " * 600,
    "a named number": "x=1" + ",000" * 490 + ".", "a relation's spaces": ">" + "~" * 1990, "overlines": r"1\overline{" * 180,
    "dollars": "$" * 2000, "stars": "**" * 1000, "spaces": r"\text{" + " " * 1900 + "}", "digits": r"1\," * 600,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_no_time(name):
    """As long as it is looked at, and ten times as long. Forms are made in the event loop of a search."""
    start = time.process_time()
    for answer in (HOSTILE[name], HOSTILE[name] * 10):
        as_integer(normalize_answer(answer))
        answer_parts(normalize_answer(answer))
    assert time.process_time() - start < (3 if name.startswith("nested") else 0.3)
