"""The page's first screen in headless Chromium: answers before all else, folded tables, a window as narrow as a phone."""

import json
from contextlib import contextmanager

import pytest
from chromium import BINARY, SKIP_REASON
from synthetic_runs import make_pair, make_run

import report
from report_lib.data import read_run
from report_lib.policies import parse_policy

pytestmark = pytest.mark.skipif(BINARY is None, reason=SKIP_REASON)

READY = "document.querySelectorAll('section.table').length > 2"
TITLES = "[...document.querySelectorAll('section.table h3')].filter((h) => h.offsetParent).map((h) => h.textContent)"


def plots(folder, analyses):
    """As `write_plots` tells them; one stands beside the answers."""
    names = {"png": "none.png", "svg": "none.svg", "title": "t", "inches": 14.4}
    names |= {"narrow": "narrow.png", "narrow_inches": 4.8}
    for name in (names["png"], names["narrow"]):
        (folder / name).write_bytes(bytes.fromhex("89504e470d0a1a0a"))
    return [names | {"stem": stem, "caption": stem} for stem in ("accuracy_n", "difference")]


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    runs = [read_run(path, path.stem) for path in make_pair(folder)]
    report.write_report(folder / "out", runs, None, plots)
    return folder / "out/report.html"


@contextmanager
def window(page, width):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 1000}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    try:
        yield
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_it_begins_with_the_answers_and_their_plot(page, html):
    page.open(html)
    page.wait(READY)
    answers = json.loads((html.parent / "table.json").read_text())["answers"]
    assert [answer["title"] for answer in answers] == ["vgs against bon", "Is the value model any good here?"]
    first = page.run(
        "[...document.getElementById('main').children[0].querySelectorAll('h2, .sentence')].map((e) => e.textContent)"
    )
    assert first == [words for answer in answers for words in (answer["title"], *answer["sentences"])]
    assert len(answers[0]["sentences"]) == 3
    assert answers[0]["chosen"] in page.run("document.querySelector('.answers').textContent")
    captions = "[...document.querySelectorAll('%s figcaption')].map((e) => e.textContent)"
    assert page.run(captions % ".answers") == ["difference"]
    assert page.run(captions % ".plots") == ["accuracy_n"]
    markdown = (html.parent / "table.md").read_text()
    assert markdown.index(answers[0]["sentences"][0]) < markdown.index("## Accuracy")


def test_repeat_noise_is_folded_away_until_it_is_asked_for(page, html):
    page.open(html)
    page.wait(READY)
    noise = "Half-width from repeat noise only"

    def shown():
        return sum(title.startswith(noise) for title in page.run(TITLES))

    def pressed():
        return page.run("document.getElementById('fold').getAttribute('aria-pressed')")

    whole = len(page.run(TITLES))
    assert (shown(), pressed()) == (0, "false")
    page.click("#fold")
    assert (shown(), pressed(), len(page.run(TITLES))) == (2, "true", whole + 2)
    page.run("VGS.go({ view: 'problems' })")
    page.wait("document.querySelectorAll('.list tbody tr').length === 6")
    page.run("VGS.go({ view: 'overview' })")
    page.wait(READY)
    assert shown() == 2  # as it was left
    page.click("#fold")
    assert (shown(), pressed()) == (0, "false")


def test_the_list_has_clones(page, html):
    page.open(html, "#view=problems")
    page.wait("document.querySelectorAll('.list tbody tr').length === 6")
    found = json.loads((html.parent / "table.json").read_text())["runs"][0]["problems"]
    at = page.run("[...document.querySelectorAll('.list th')].findIndex((th) => th.textContent.startsWith('Clones'))")
    cells = page.run(f"[...document.querySelectorAll('.list tbody tr')].map((row) => row.cells[{at}].textContent)")
    assert [float(cell) for cell in cells] == pytest.approx([row["clones"] for row in found], abs=0.0501)


@pytest.mark.parametrize("width", [390, 1400])
def test_no_view_is_wider_than_its_window(page, html, width):
    with window(page, width):
        for fragment, ready in (
            ("", READY),
            ("#view=problems", "document.querySelectorAll('.list tbody tr').length === 6"),
            ("#view=problem&problem=2", "!!document.querySelector('#block-text')"),
        ):
            page.open(html, fragment)
            page.wait(ready)
            assert page.run("document.documentElement.scrollWidth") == width, fragment
            buttons = page.run(
                "[...document.querySelectorAll('header button')].map((b) => b.getBoundingClientRect().right)"
            )
            assert max(buttons) <= width


@pytest.mark.parametrize("width", [390, 1100, 1400])
def test_long_answers_scroll_in_the_vote_and_the_chosen_block_is_seen(page, html, width):
    """Answers of 60 letters without a space, and a block of the last round, which its tree has no room for."""
    change = (
        "VGS.load(VGS.shownProblem.name).then((data) => { for (const vote of [data.vote, ...data.searches.map((s) => s.vote)])"
        "for (const row of vote.rows) row.answers = row.answers.flatMap(() => ['7'.repeat(60), '8'.repeat(60)]);"
        "VGS.drawProblem(data); return VGS.textShown; })"
    )
    seen = (
        "(() => { const [room, node] = ['.tree-holder', '.tree .chosen'].map((name) =>"
        "document.querySelector(name).getBoundingClientRect());"
        "return [room.left <= node.left, node.right <= room.right, window.scrollY]; })()"
    )
    with window(page, width):
        page.open(html, "#view=problem&problem=2")
        page.wait("!!document.querySelector('#block-text')")
        assert page.run(seen) == [True, True, 0]
        heads = "[...document.querySelectorAll('.column-head')].map((h) => h.getBoundingClientRect().%s)"
        assert all(
            right < left for right, left in zip(page.run(heads % "right"), page.run(heads % "left")[1:], strict=False)
        )
        page.run(change)
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.run(
            "(() => { const b = document.querySelector('.vote .scroll'); return b.scrollWidth > b.clientWidth; })()"
        )


@pytest.mark.parametrize(("width", "name"), [(390, "narrow.png"), (1400, "none.png")])
def test_a_phone_is_shown_plots_of_one_column(page, html, width, name):
    with window(page, width):
        page.open(html)
        page.wait(READY)
        page.wait("[...document.querySelectorAll('figure img')].every((img) => img.currentSrc)")
        shown = page.run("[...document.querySelectorAll('figure img')].map((img) => img.currentSrc.split('/').pop())")
        assert shown == [name] * 2
        boxes = "[...document.querySelectorAll('figure a')].map((a) => a.scrollWidth <= a.clientWidth)"
        assert width > 1000 or page.run(boxes) == [True, True]


@pytest.mark.parametrize("width", [390, 1400])
def test_a_what_if_has_its_answer_its_plot_beside_it_and_its_tables(page, tmp_path, width):
    path = make_run(tmp_path, problems=5, repetitions=4)
    policies = [parse_policy("weighted:certified:0.05@3")]
    draw = lambda folder, analyses: [plot | {"stem": "what_if"} for plot in plots(folder, analyses)[:1]]  # noqa: E731
    report.write_report(tmp_path / "out", [read_run(path, "run")], None, draw, policies=policies)
    with window(page, width):
        page.open(tmp_path / "out/report.html")
        page.wait(READY)
        first = page.run("document.querySelector('.answers').textContent")
        assert (
            "What if run had been stopped earlier?" in first and "weighted:certified:0.05@3 answers as all 4" in first
        )
        assert "Chosen beforehand (--policy): weighted:certified:0.05@3." in first and "are exploratory" in first
        assert page.run("document.querySelectorAll('.answers figure').length") == 1
        titles = [title for title in page.run(TITLES) if title.startswith("What if")]
        assert titles == ["What if, chosen beforehand: run, 4 repetitions", "What if, exploratory: run, 4 repetitions"]
        assert page.run("document.documentElement.scrollWidth") == width
    assert not page.log
