"""Formulas on the page: which parts of a text are formulas, that they are drawn, and that hostile ones stay text."""

import hashlib
import json
import re
import time

import pytest
from chromium import BINARY, SKIP_REASON
from handmade_runs import journal_row, result, settings, write_run
from test_report_page import BLOCK, make_report, write_report

from report_lib.page import ASSETS

TEMML = ASSETS / "vendor/temml"
DRAWN = "!!window.temml && document.querySelectorAll('main math').length > 0"
FORMULAS = r"""
we have $x^2 + y$ here                        | x^2 + y
$a$, $b$ and $ c = 1 $.                       | a, b, c = 1
$$a$$ and $a$$b$                              | a, a, b
\(a\), \[b\] and \begin{align*}c&=d\end{align*} | a, b, \begin{align*}c&=d\end{align*}
so it is \boxed{\frac{1}{2}}.                 | \boxed{\frac{1}{2}}
so $x = \boxed{3}$.                           | x = \boxed{3}
costs $\$5$, or \$5 and $5x$                  | \$5, 5x
$2 for an egg, $3 for two; a $5-$10 range     |
$5 and $x$ eggs                               | x
$1.50 x 4 = $6                                |
each costs $80 per dozen and $68 per box      |
pays $80 for the house and US$ 5 more         |
$n \text{ is even and positive}$              | n \text{ is even and positive}
\\(a\\) and \\[2pt] and \$a\$                 |
a stray $ and a stray \( and \boxed{          |
\boxed{a \boxed{b}                            | \boxed{b}
"""
HOSTILE = {
    "link": r"\href{javascript:alert(1)}{x} \url{javascript:alert(1)}",
    "picture": r"\includegraphics{http://example.org/x.png}",
    "attributes": r"\class{pane}{x}\id{main}{x}\style{position:fixed}{x}\htmlId{main}{x}",
    "colour": r"\color{red;background:url(http://example.org)}x",
    "markup": r"\text{</math><script>document.title='owned'</script><img src=x onerror=alert(1)>}",
    "label": r"\begin{align}x\label{main}\end{align}",
    "bomb": r"\def\a{xxxxxxxxxx}\def\b{\a\a\a\a\a\a\a\a\a\a}\def\c{\b\b\b\b\b\b\b\b\b\b}\c\c\c\c\c\c\c\c\c",
    "definition": r"\def\a{x}\a",
    "endless": r"\newcommand{\a}{\a\a}\a",
    "groups": "{" * 1900 + "x" + "}" * 1900,
    "groups that the renderer would take": "{" * 151 + "x" + "}" * 151,
    "fewer groups": "{" * 150 + "x" + "}" * 150,
    "roots": r"\sqrt" * 600 + "x",
    "fractions": r"\frac{1}{" * 350 + "x" + "}" * 350,
    "cells": r"\begin{matrix}" + "&" * 3900 + r"\end{matrix}",
    "huge": r"\rule{9999em}{9999em}x\kern9999em",
    "raised": r"\raisebox{9999em}{x}",
    "raised twice": r"\raise 9999em{\raise 9999em{x}}",
    "bidi": "\u202eabc",
    "long": "x+" * 3000,
}
DRAWN_HOSTILE = {"markup", "label", "huge", "fewer groups"}
BROKEN = r"broken $\frac{1$ and $\nosuchcommand{x}$"
PROBLEM = rf"Let $f(x) = \sqrt{{x}}$ and \[\sum_{{n=1}}^\infty \frac{{1}}{{n^2}} = \pi^2/6.\] It costs \$5 or $6 a day; {BROKEN}."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The page of one problem: two blocks, the second of which begins in the middle of a formula."""
    folder = tmp_path_factory.mktemp("maths")
    texts = ["Let $x = 1", "+ y$, so $z$ is $2$.\n\n" + r"\[a\]" + "\nIt is \\boxed{\\frac{4}{9}}"]
    answers = [r"\frac{4}{9}", r"the answer is x_1"]
    line = result(
        0, 0, 1, answers, [True, False], [0.75, 0.25], problem=PROBLEM, gt_answer=r"\frac49", lengths=[2, 2],
        generated_ids=[[5, 5]] * 2, finish_reasons=["stop"] * 2,
    )  # fmt: skip
    journal = [
        journal_row(0, 0, 0, [0, 0], [1, 1], [0.5, 0.5], [True, True], ["", ""], [texts[0], ""]),
        journal_row(0, 0, 1, [1, 2], [1, 1], [0.75, 0.25], [True, True], ["stop"] * 2, [texts[1], "none"]),
    ]
    path = write_run(folder / "run.jsonl", [line], journal, settings(1, 1, 2, 2, 1))
    write_report([path], folder / "out")
    return folder / "out/report.html"


pytestmark = pytest.mark.skipif(BINARY is None, reason=SKIP_REASON)


def found(page, text):
    return page.run(f"VGS.formulas({json.dumps(text)}).map((formula) => formula.tex)")


def test_formulas_are_what_stands_between_delimiters_and_money_is_none(page, run):
    page.open(run, "#view=problems")
    page.wait(DRAWN)
    for case in FORMULAS.strip().split("\n"):
        text, _, expected = case.partition("|")
        assert ", ".join(map(str.strip, found(page, text.rstrip()))) == expected.strip(), text
    assert found(page, "$a\n\nb$ $c$") == ["c"]
    assert page.run("VGS.formulas('$a$ $$b$$ \\\\[c\\\\]').map((formula) => formula.display)") == [False, True, True]


def test_finding_formulas_takes_time_linear_in_the_text(page, run):
    page.open(run, "#view=problems")
    page.wait(DRAWN)
    for piece in ("$", "\\(", "\\boxed{", "\\begin{align}", "$ab cd ", "$$ $", "$$a $b $$$c"):
        begin = time.monotonic()
        found(page, piece * (300_000 // len(piece)))
        assert time.monotonic() - begin < 10, piece  # a search from each token for its end takes minutes


def test_real_problems_are_drawn_and_none_in_which_dollars_are_money(page, run, shared):
    """Of the formulas of five hundred solutions all but a handful (column alignments by @, \\multicolumn) can be drawn."""
    page.open(run, "#view=problems")
    page.wait(DRAWN)
    money = [json.loads(row) for row in shared("data/gsm8k/test.jsonl").read_text().splitlines()]
    assert found(page, "\n\n".join(row["question"] for row in money)[:250_000]) == []
    rows = [json.loads(row) for row in shared("data/math500/test.jsonl").read_text().splitlines()]
    texts = [row[key] for row in rows for key in ("problem", "solution")]
    plain = [re.sub(r"\\\$", "", re.sub(r"\[asy\].*?\[/asy\]", "", text, flags=re.S)) for text in texts]
    counted = page.run(
        f"{json.dumps(plain)}.map((text) => {{ let rest = ''; let at = 0; let bad = 0; const all = VGS.formulas(text);"
        "for (const f of all) { rest += text.slice(at, f.start); at = f.end; bad += VGS.mathml(f) === null; }"
        "return [all.length, bad, /[$]/.test(rest + text.slice(at))]; })"
    )
    formulas, broken, left = (sum(map(int, column)) for column in zip(*counted, strict=True))
    assert formulas > 4000
    assert broken <= 7
    assert left <= 1  # `$\$$1500`


def test_problem_truth_answers_and_block_are_drawn_and_a_switch_shows_the_source(page, run):
    page.open(run, "#view=problem&problem=0&node=3")
    page.wait(BLOCK)
    page.wait(DRAWN)
    math = "document.querySelectorAll('{} math').length"
    assert page.run(math.format(".problem-text")) == 2
    assert page.run("document.querySelector('.problem-text msqrt').textContent") == "x"
    assert page.run("document.querySelector('.problem-text .display math').getAttribute('display')") == "block"
    text = page.run("document.querySelector('.problem-text').textContent")
    assert r"It costs \$5 or $6 a day; " + BROKEN in text  # what is broken shows its source
    assert page.run("document.querySelectorAll('.problem-text .undrawn').length") == 2
    for place in (".truth", ".vote tbody tr:first-child", ".facts"):
        assert page.run(f"document.querySelector('{place} mfrac').textContent") == "49", place
    assert page.run("document.querySelector('.vote tbody tr:last-child td').textContent") == "✗ the answer is x_1"
    # The block begins inside of `$x = 1+ y$`: that formula's halves are text, and the dollars after it pair as they should.
    assert page.run(math.format("#block-text")) == 4
    assert page.run("document.querySelector('#block-text').textContent").startswith("+ y$, so z is 2.\n")
    page.press("m")
    page.wait("document.querySelectorAll('main math').length === 0")
    assert PROBLEM in page.run("document.querySelector('.problem-text').textContent")
    assert page.run("document.querySelector('.truth').textContent") == r"Truth: \frac49"
    assert page.run("document.querySelector('#block-text').textContent").endswith(
        "\\[a\\]\nIt is \\boxed{\\frac{4}{9}}"
    )
    assert page.run("document.querySelector('.block').dataset.block") == "3"
    page.press("t")
    assert page.run("document.querySelectorAll('.block section pre').length") == 2
    page.click("#source-button")
    page.wait(DRAWN)
    assert page.run("document.querySelectorAll('.block section pre').length") == 2
    page.press("Escape")
    page.wait("!!document.querySelector('.list')")
    assert page.run("document.querySelector('.list td.truth mfrac').textContent") == "49"
    assert page.run("document.querySelector('.list td.problem msqrt').textContent") == "x"


def test_the_renderer_is_read_where_there_is_a_formula_and_its_absence_is_said(page, tmp_path, run):
    _, html = make_report(tmp_path, "plain", problems=1, repetitions=1, max_length=40, block_size=20)
    page.open(html, "#view=problem&problem=0&source=1")
    page.wait(BLOCK)
    assert page.run("!VGS.temmlAsked")
    page.press("m")
    page.wait("!!window.temml")
    hidden = run.parent / "report_data/assets/vendor/temml/temml.min.js"
    aside = hidden.rename(hidden.with_suffix(".aside"))
    try:
        page.open(run, "#view=problem&problem=0")
        page.wait("document.getElementById('source-button')?.textContent.includes('cannot be drawn')")
        page.wait("!!document.querySelector('.problem-text')")
        assert PROBLEM in page.run("document.querySelector('.problem-text').textContent")
    finally:
        aside.rename(hidden)
    page.log.clear()


def test_hostile_formulas_are_harmless_and_cost_little(page, run):
    page.open(run, "#view=problem&problem=0")
    page.wait(DRAWN)
    for name, tex in HOSTILE.items():
        source = f"\\[{tex}\\]"
        begin = time.monotonic()
        drawn, links, height, text = page.run(
            f"(() => {{ const box = VGS.longText({json.dumps(source)}); document.querySelector('.pane').prepend(box);"
            "const found = [box.querySelectorAll('math').length, box.querySelectorAll('a, img, script, [id], [href], [src], "
            '[style*="fixed"], .pane\').length, box.scrollHeight, box.textContent]; box.remove(); return found; })()'
        )
        assert time.monotonic() - begin < 5, name
        assert (drawn, links) == (name in DRAWN_HOSTILE, 0), name
        assert not drawn or height < 100, name
        assert drawn or text == source.replace("\u202e", "U+202E"), name
    assert page.run("document.title") == "Search report: run"
    assert page.run("document.querySelector('main').id") == "main"


def test_a_piece_has_only_so_many_formulas_and_ends_between_them(page, run):
    page.open(run, "#view=problem&problem=0")
    page.wait(DRAWN)
    many = "".join(f"$x_{{{i}}}$ " for i in range(1500))
    page.run(f"document.querySelector('.pane').prepend(VGS.longText({json.dumps(many)}, {{ id: 'many' }}))")
    assert page.run("document.querySelectorAll('#many math').length") == 1000
    page.click("#many .more")
    assert page.run("document.querySelectorAll('#many math').length") == 1500
    straddling = "A" * 19_998 + "$x + y$ and so on"
    page.run(f"document.querySelector('.pane').prepend(VGS.longText({json.dumps(straddling)}, {{ id: 'over' }}))")
    assert page.run("document.querySelector('#over math').textContent") == "x+y"
    assert "10 characters left" in page.run("document.querySelector('#over').textContent")


def test_the_vendored_renderer_is_what_its_note_says(run):
    """Unchanged files, with their licence, also beside the page."""
    noted = re.findall(r"^\| `(\S+)` \|.*`([0-9a-f]{64})` \|$", (TEMML / "SOURCE.md").read_text(), flags=re.M)
    assert {name for name, _ in noted} == {file.name for file in TEMML.iterdir()} - {"SOURCE.md"}
    for name, digest in noted:
        for folder in (TEMML, run.parent / "report_data/assets/vendor/temml"):
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, (folder, name)
    assert "MIT License" in (TEMML / "LICENSE").read_text()
    assert '"0.13.5"' in (TEMML / "temml.min.js").read_text()
