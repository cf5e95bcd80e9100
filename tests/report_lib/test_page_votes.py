"""The page in headless Chromium, on a run by hand: votes of all repetitions and of one, ties, marks, filters, siblings."""

import pytest
from chromium import BINARY, SKIP_REASON
from handmade_runs import journal_row, result, settings, write_run

import report
from report_lib.data import read_run

pytestmark = pytest.mark.skipif(BINARY is None, reason=SKIP_REASON)

CELLS = """[...document.querySelectorAll('.vote tbody tr')].map((tr) => [...tr.cells].map(
    (td) => td.textContent.trim() + (td.classList.contains('top') ? ' *' : '')))"""
ROWS = "[...document.querySelectorAll('.list tbody tr')].map((row) => Number(row.dataset.problem))"
NOTE = "document.querySelector('.vote .note').textContent"


def search(data_idx, repeat_idx, answers, rewards, values, rejected=("", 0.05)):
    """Three beams of one block each, and three rejected candidates, of which the last has stopped."""
    text = [f"\\boxed{{{answer}}}" if answer else "none" for answer in answers]
    reasons = ["stop", "stop", "length"]
    line = result(data_idx, repeat_idx, 3, answers, rewards, values, generated_ids=[[5] * 4] * 3, finish_reasons=reasons,
                  tokens_generated=24, tokens_scored=27, tokens_cached=0)  # fmt: skip
    row = journal_row(data_idx, repeat_idx, 0, [0] * 6, [4] * 6, [*values, 0.01, 0.02, rejected[1]], [1, 1, 1, 0, 0, 0],
                      [*reasons, "", "", "stop"], [*text, "x", "y", f"\\boxed{{{rejected[0]}}}"])  # fmt: skip
    return line, row


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byhand")
    searches = [
        # Problem 0: by count 2 wins, by weight 1 and 2 tie, the best value is that of 2; 01 is 1, and once right only.
        search(0, 0, ["1", "2", ""], [True, False, False], [0.25, 0.75, 0.9]),
        search(0, 1, ["01", "2", "2"], [False, False, False], [0.75, 0.125, 0.125]),
        # Problem 1: nothing right but a rejected candidate.
        search(1, 0, ["7", "8", "9"], [False] * 3, [0.5, 0.25, 0.125], rejected=("1", 0.05)),
        search(1, 1, ["7", "7", "7"], [False] * 3, [0.5, 0.25, 0.125]),
        # Problem 2: right, but outvoted.
        search(2, 0, ["3", "3", "1"], [False, False, True], [0.5, 0.5, 0.25]),
        search(2, 1, ["3", "1", "3"], [False, True, False], [0.5, 0.25, 0.5]),
    ]
    meta = settings(3, 2, 6, 3, 2)
    path = write_run(folder / "run.jsonl", *([pair[i] for pair in searches] for i in (0, 1)), meta)
    report.write_report(folder / "out", [read_run(path, "run")], None, lambda out, analyses: [])
    return folder / "out/report.html"


def open_problem(page, html, rest):
    page.open(html, f"#view=problem&{rest}")
    page.wait("!!document.querySelector('#block-text')")


def test_the_vote_of_all_repetitions_and_of_one(page, html):
    """Counts, sums of values and best values with their shares; what wins is marked, ties twice."""
    open_problem(page, html, "problem=0&search=0")
    assert page.run(CELLS) == [
        ["✗ 2", "3 (60%) *", "1.00 (50%) *", "0.750 *"],
        ["½ 1 = 01", "2 (40%)", "1.00 (50%) *", "0.750 *"],
    ]
    # by weight 1 and 2 share; a quarter of the weight of 1 is right
    assert page.run(NOTE) == (
        "1 beams without an answer. Majority: wrong. Value-weighted: right to 13% (tie, or a mixed answer). "
        "Best of N: wrong."
    )
    page.run("[...document.querySelectorAll('.vote button')][1].click()")
    page.wait("document.querySelectorAll('.vote button')[1].getAttribute('aria-pressed') === 'true'")
    assert page.run(CELLS) == [
        ["✗ 2", "1 (50%) *", "0.75 (75%) *", "0.750 *"],
        ["✓ 1", "1 (50%) *", "0.25 (25%)", "0.250"],
    ]
    assert "Majority: right to 50%" in page.run(NOTE)
    page.press("]")
    page.wait("document.querySelectorAll('.vote button')[1].textContent === 'repetition 1'")
    assert [row[0] for row in page.run(CELLS)] == ["✗ 01", "✗ 2"]
    page.run("document.querySelector('.vote button').click()")
    page.wait("document.querySelector('.vote button').getAttribute('aria-pressed') === 'true'")


def test_filters_find_what_went_wrong(page, html):
    page.open(html, "#view=problems")
    page.wait("document.querySelectorAll('.list tbody tr').length === 3")
    found = {}
    for name in ("wrong", "lost", "close", "pruned", "truncated", "all"):
        page.click(f"[data-filter={name}]")
        found[name] = page.run(ROWS)
    assert found == {
        "wrong": [0, 1, 2],
        "lost": [0, 2],
        "close": [0],
        "pruned": [1],
        "truncated": [0, 1, 2],
        "all": [0, 1, 2],
    }
    cells = page.run(
        "[...document.querySelectorAll('.list tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert [row[3].split()[0] for row in cells] == ["½", "✗", "✗"]
    assert [row[5] for row in cells] == ["17%", "0%", "33%"]
    assert [row[7] for row in cells] == ["33%"] * 3
    assert [row[9] for row in cells] == ["0", "1", "0"]


def test_what_a_released_file_does_not_tell_is_a_dash(page, tmp_path):
    """No finish reasons, no journal, no counts of tokens: not 0, in the columns and in the filters' counts."""
    lines = [result(i, 0, 2, ["1", answer], [True, False], [0.5, 0.25]) for i, answer in enumerate(("2", ""))]
    run = read_run(write_run(tmp_path / "run.jsonl", lines), "run")
    report.write_report(tmp_path / "out", [run], None, lambda out, analyses: [])
    page.open(tmp_path / "out/report.html", "#view=problems")
    page.wait("document.querySelectorAll('.list tbody tr').length === 2")
    heads = page.run("[...document.querySelectorAll('.list th')].map((th) => th.textContent.trim())")
    cells = page.run("[...document.querySelector('.list tbody tr').cells].map((td) => td.textContent)")
    shown = dict(zip(heads, cells, strict=True))
    assert [shown[name] for name in ("Length-limited", "Pruned right", "Tokens")] == ["–"] * 3
    count = "document.querySelector('[data-filter=%s] small').textContent"
    assert [page.run(count % name) for name in ("pruned", "truncated", "wrong")] == ["–", "≥ 1", "0"]


def test_a_block_says_its_rank_its_fate_and_how_it_ended(page, html):
    open_problem(page, html, "problem=1&search=0&node=6")
    facts = page.run("[...document.querySelectorAll('.facts dd')].map((dd) => dd.textContent)")
    assert facts == ["0.0500 (rank 4 of 6 in round 1)", "rejected", "4, from 0 to 4", "stop token", "1 ✓ right"]
    siblings = page.run(
        "[...document.querySelectorAll('.chips')[1].querySelectorAll('button')].map((b) => b.textContent)"
    )
    assert siblings == ["#1 0.50 ✗", "#2 0.25 ✗", "#3 0.13 …", "#6 0.05 ✓", "#5 0.02", "#4 0.01"]
    assert page.run("document.querySelectorAll('.tree .node.kept').length") == 3
    strip = page.run("[...document.querySelectorAll('.strip button')].map((b) => b.textContent)")
    assert [" ".join(words.split()) for words in strip] == ["0 ✗✗…", "1 ✗✗…"]
    open_problem(page, html, "problem=1&search=0")
    block = "document.querySelector('.block').dataset.block"
    assert page.run(block) == "1"  # the best of the final beams
    for key, node in (("ArrowDown", "2"), ("ArrowDown", "3"), ("ArrowUp", "2"), ("ArrowUp", "1"), ("ArrowUp", "1")):
        page.press(key)
        assert page.run(block) == node, key


def test_keys_lead_from_problem_to_problem(page, html):
    open_problem(page, html, "problem=1&search=1")
    for key, problem in (("p", "0"), ("p", "0"), ("n", "1"), ("n", "2"), ("n", "2")):
        page.press(key)
        page.wait(f"document.querySelector('.crumbs').textContent.includes('Problem {problem} ')")
        assert page.run("(VGS.address().problem || '1')") == problem
    page.press("Escape")
    page.wait("document.querySelectorAll('.list tbody tr').length === 3")
