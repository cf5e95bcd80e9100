"""The page in headless Chromium, opened from the file: list, trees, blocks, votes, hostile text, speed."""

import json
import os
import time
from itertools import pairwise

import pytest
from chromium import BINARY, SKIP_REASON
from make_synthetic_run import Options, make_synthetic_run
from synthetic_runs import rows_of

import report
from report_lib.data import read_run, run_names
from report_lib.plots import write_plots
from search_lib.run_reader import RunPaths

pytestmark = pytest.mark.skipif(BINARY is None, reason=SKIP_REASON)

TREE = "!!document.querySelector('svg.tree')"
BLOCK = "!!document.querySelector('#block-text')"
ROWS = "[...document.querySelectorAll('.list tbody tr')].map((row) => Number(row.dataset.problem))"
HOSTILE = [
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "\u202eback\u202c \u2066isolated\u2069 \ud800 \x00 \x1b[31m &lt;b&gt; $x$ \u2028\u2029 ]]> --> <!-- {{x}}",
    "A" * 1_000_000,
    "javascript:alert(1)\"'><svg onload=alert(1)>",
]


def make_report(folder, name, change=None, plots=False, **options):
    """(run file, page). Plots take seconds: they are drawn for one report only."""
    path = folder / f"{name}.jsonl"
    make_synthetic_run(path, Options(**options))
    if change:
        change(path)
    write_report([path], folder / name, plots)
    return path, folder / name / "report.html"


def write_report(paths, out, plots=False):
    runs = [read_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    report.write_report(out, runs, None, write_plots if plots else lambda folder, analyses: [])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(run file, page) of a small pruned run."""
    folder = tmp_path_factory.mktemp("small")
    return make_report(
        folder, "run", plots=True, problems=8, repetitions=3, max_length=400, block_size=100, early_stop=0.1
    )


def keep_screenshot(page, name):
    """Screenshots are kept where REPORT_SCREENSHOTS names a folder, to be looked at."""
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        page.screenshot(report.Path(folder) / f"{name}.png")


def test_the_overview_has_tables_and_plots(page, small):
    page.open(small[1])
    page.wait("document.querySelectorAll('section.table').length >= 3")
    page.wait("[...document.images].length >= 5")
    page.run("document.images[0].scrollIntoView()")
    page.wait("document.images[0].complete && document.images[0].naturalWidth > 300")
    assert page.run("document.querySelector('.card dd').textContent").endswith("run.jsonl")
    keep_screenshot(page, "overview")


def test_the_list_sorts_filters_and_searches(page, small):
    page.open(small[1], "#view=problems")
    page.wait("document.querySelectorAll('.list tbody tr').length === 8")
    table = json.loads((small[1].parent / "table.json").read_text())["runs"][0]["problems"]
    assert page.run(ROWS) == [row["id"] for row in table]
    for key, down in (
        ("disagreement", True),
        ("margin", False),
        ("truncated", True),
        ("wmaj", False),
        ("pass1", False),
    ):
        page.click(f"[data-sort={key}]")
        order = sorted(table, key=lambda row: (-row[key] if down else row[key], row["id"]))
        assert page.run(ROWS) == [row["id"] for row in order]
        page.click(f"[data-sort={key}]")
        order = sorted(table, key=lambda row: (row[key] if down else -row[key], row["id"]))
        assert page.run(ROWS) == [row["id"] for row in order]
    keep_screenshot(page, "list")
    page.click("[data-sort=id]")
    expected = {
        "wrong": [row["id"] for row in table if row["wmaj"] < 1],
        "close": [row["id"] for row in table if row["margin"] < 0.2],
        "truncated": [row["id"] for row in table if row["truncated"] or row["empty"]],
    }
    assert 0 < len(expected["truncated"]) < 8
    for name, ids in expected.items():
        page.click(f"[data-filter={name}]")
        assert page.run(ROWS) == ids
    page.click("[data-filter=all]")
    page.press("/")
    page.type("PROBLEM 3.)")
    assert page.run(ROWS) == [3]
    page.press("Escape")
    assert page.run("document.activeElement.tagName") == "BODY"


def test_a_tree_opens_by_keyboard_and_a_block_shows_its_text(page, small):
    journal = [row for row in rows_of(RunPaths.of(small[0]).tree) if (row["data_idx"], row["repeat_idx"]) == (2, 1)]
    texts = ["", *(text for row in journal for text in row["text"])]
    values = [0.0, *(value for row in journal for value in row["value"])]
    parents = [-1, *(parent for row in journal for parent in row["parent"])]
    kept = [True, *(keep for row in journal for keep in row["kept"])]
    page.open(small[1], "#view=problems&source=1")
    page.wait("document.querySelectorAll('.list tbody tr').length === 8")
    page.run("VGS.listState.sort = 'id', VGS.listState.down = false, VGS.listState.at = 0, VGS.show()")
    page.press("j", "ArrowDown", "Enter")
    page.wait(TREE)
    assert "problem=2" in page.run("location.hash")
    page.press("]")
    page.wait("VGS.address().search === '1' && " + TREE + " && " + BLOCK)
    assert page.run("document.querySelectorAll('.tree .node').length") == len(texts) - 1
    assert page.run("document.querySelectorAll('.tree .node.rejected').length") == kept.count(False)
    for node in (1, 3, len(texts) - 1):
        page.click(f".tree [data-node='{node}'] rect")
        page.wait(f"document.querySelector('.block').dataset.block === '{node}'")
        assert page.run("document.querySelector('#block-text').textContent") == texts[node]
        facts = page.run("[...document.querySelectorAll('.facts dd')].map((dd) => dd.textContent)")
        assert float(facts[0].split()[0]) == pytest.approx(values[node], abs=1e-4)
        assert facts[1] == ("kept" if kept[node] else "rejected")
        siblings = page.run(
            "[...document.querySelectorAll('.chips')[1].querySelectorAll('button')].map((b) => b.dataset.go)"
        )
        assert sorted(map(int, siblings)) == [i for i in range(1, len(texts)) if parents[i] == parents[node]]
    page.press("ArrowLeft")
    parent = parents[len(texts) - 1]
    page.wait(f"document.querySelector('.block').dataset.block === '{parent}'")
    page.press("ArrowRight")
    best = max((i for i in range(1, len(texts)) if parents[i] == parent), key=lambda i: (kept[i], values[i]))
    assert page.run("document.querySelector('.block').dataset.block") == str(best)
    page.press("t")
    path, node = [], best
    while node > 0:
        path, node = [node, *path], parents[node]
    shown = page.run("[...document.querySelectorAll('.block section pre')].map((pre) => pre.textContent)")
    assert shown == [texts[node] for node in path]
    keep_screenshot(page, "tree")
    page.press("t", "n")
    page.wait("VGS.address().problem === '3'")
    page.press("Escape")
    page.wait("!!document.querySelector('.list')")


def test_a_block_can_be_linked_to_and_colours_follow_values(page, small):
    page.open(small[1], "#view=problem&problem=4&search=2&node=5")
    page.wait(BLOCK)
    assert page.run("document.querySelector('.block').dataset.block") == "5"
    rows = [row for row in rows_of(RunPaths.of(small[0]).tree) if (row["data_idx"], row["repeat_idx"]) == (4, 2)]
    values = {i + 1: value for i, value in enumerate(value for row in rows for value in row["value"])}
    brightness = page.run(
        "Object.fromEntries([...document.querySelectorAll('.tree .node')].map((g) => [g.dataset.node, "
        "g.querySelector('rect').getAttribute('fill').match(/\\d+/g).map(Number)]))"
    )
    grey = {int(node): 0.299 * r + 0.587 * g + 0.114 * b for node, (r, g, b) in brightness.items()}
    order = sorted(values, key=values.get)
    assert all(grey[a] <= grey[b] + 1 for a, b in pairwise(order))  # lighter is higher, also in grey


def test_the_vote_shows_answers_weights_and_truth(page, small):
    row = next(
        row
        for row in json.loads((small[1].parent / "table.json").read_text())["runs"][0]["problems"]
        if 0 < row["pass1"] < 1
    )
    weight = {}
    for line in rows_of(small[0]):
        if line["data_idx"] == row["id"]:
            for answer, value in zip(line["processed_answer"], line["generated_scores"], strict=True):
                weight[answer] = weight.get(answer, 0.0) + value
    weight.pop("", None)
    page.open(small[1], f"#view=problem&problem={row['id']}")
    page.wait("!!document.querySelector('.vote tbody tr')")
    shown = page.run(
        "[...document.querySelectorAll('.vote tbody tr')].map((tr) => [...tr.cells].map((td) => td.textContent))"
    )
    expected = sorted(weight.items(), key=lambda item: -item[1])[:8]
    assert [cells[0].split()[1] for cells in shown] == [answer for answer, _ in expected]
    assert [float(cells[2].split()[0]) for cells in shown] == [pytest.approx(w, abs=0.006) for _, w in expected]
    tops = page.run(
        "[...document.querySelectorAll('.vote tbody tr')].map((tr) => tr.cells[2].classList.contains('top'))"
    )
    assert tops == [True] + [False] * (len(expected) - 1)  # what wins the weighted vote is bold
    assert f"Value-weighted: {'right' if row['wmaj'] == 1 else 'wrong'}" in page.run(
        "document.querySelector('.vote .note').textContent"
    )
    assert row["truth"] in page.run("document.querySelector('.truth').textContent")
    keep_screenshot(page, "vote")


def spread_hostility(path):
    """Hostile text in problem, truth, answer and trace."""
    rows = rows_of(path)
    for row in rows:
        bad = HOSTILE[row["data_idx"]]
        row["gt_answer"] = bad
        row["processed_answer"] = [
            answer if right else bad[:50_000]
            for answer, right in zip(row["processed_answer"], row["reward"], strict=True)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = RunPaths.of(path).tree
    rows = rows_of(tree)
    for row in rows:
        bad = HOSTILE[row["data_idx"]]
        row["text"] = [(bad if len(bad) < 1000 or i == 0 else "") + text[-60:] for i, text in enumerate(row["text"])]
    lines = [json.dumps(row, ensure_ascii=row["data_idx"] % 2 == 0) for row in rows]
    tree.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make_report(
        tmp_path_factory.mktemp("hostile"), "hostile", spread_hostility, problems=5, repetitions=2, max_length=400,
        block_size=100, problem_texts=HOSTILE,
    )  # fmt: skip


@pytest.mark.parametrize("problem", range(5))
def test_hostile_text_is_shown_and_nothing_else(page, hostile, problem):
    page.open(hostile[1], f"#view=problem&problem={problem}&node=1")
    page.wait(BLOCK)
    keep_screenshot(page, f"hostile{problem}")
    assert page.run("document.title") == "Search report: hostile"
    assert page.run("document.querySelectorAll('main script, main img, main svg [onload], main a').length") == 0
    text = page.run("document.querySelector('#block-text').textContent")
    if problem in (0, 1, 4):
        assert HOSTILE[problem] in text
    elif problem == 2:
        assert text.startswith("U+202EbackU+202C U+2066isolatedU+2069 U+D800 U+0000 U+001B[31m &lt;b&gt; x ")
        assert page.run("document.querySelectorAll('#block-text .hidden-character').length") >= 7
    else:
        assert text.startswith("A" * 20_000 + "show more (980,0")
        assert page.run("document.documentElement.scrollWidth") <= 1400
        page.click("#block-text .more")
        page.wait("document.querySelector('#block-text').textContent.length > 200000")
    page.press("Escape")
    page.wait("document.querySelectorAll('.list tbody tr').length === 5")
    assert page.run("document.documentElement.scrollWidth") <= 1400
    assert page.run("document.title") == "Search report: hostile"


def test_data_files_are_ascii_without_markup(hostile):
    for path in (hostile[1].parent / "report_data").rglob("*.js"):
        if "assets" not in path.parts:
            text = path.read_bytes().decode("ascii")
            assert "<" not in text
            assert text.startswith("VGS.receive(")


def test_injected_markup_could_not_run_either(page, small):
    """The second line of defence: the page's policy refuses inline scripts and handlers."""
    page.open(small[1])
    page.wait("!!document.querySelector('section.table')")
    page.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'})),"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')"
    )
    time.sleep(0.2)
    assert page.run("typeof window.owned") == "undefined"
    assert any("Content Security Policy" in line for line in page.log)
    page.log.clear()


def test_a_missing_data_file_is_said(page, small):
    hidden = small[1].parent / "report_data/run0/p7.js"
    data = hidden.read_bytes()
    hidden.unlink()
    try:
        page.open(small[1], "#view=problem&problem=7")
        page.wait("!!document.querySelector('.error')")
        assert "p7.js cannot be read" in page.run("document.querySelector('.error').textContent")
    finally:
        hidden.write_bytes(data)
    page.log.clear()


def test_two_runs_and_a_released_one_on_one_page(page, tmp_path):
    paths = [tmp_path / "vgs.jsonl", tmp_path / "released.jsonl"]
    options = dict(problems=3, repetitions=2, max_length=160, block_size=40)
    make_synthetic_run(paths[0], Options(**options))
    make_synthetic_run(paths[1], Options(**options, released=True))
    write_report(paths, tmp_path / "out")
    page.open(tmp_path / "out/report.html", "#view=problems")
    page.wait("document.querySelectorAll('.list tbody tr').length === 3")
    page.run("document.getElementById('run').value = '1'")
    page.run("document.getElementById('run').dispatchEvent(new Event('change'))")
    page.wait("VGS.run().name === 'released' && document.querySelectorAll('.list tbody tr').length === 3")
    page.press("Enter")
    page.wait(BLOCK)
    assert page.run("document.querySelectorAll('.tree .node').length") == 4
    assert "Token ids" in page.run("document.querySelector('.block').textContent")
    page.open(tmp_path / "out/report.html")
    page.wait("!!document.querySelector('.notes li')")
    assert "no journal" in page.run("document.querySelector('.notes').textContent")


def test_problems_of_full_size_open_at_once(page, tmp_path):
    """16 repetitions x 8 candidates x 16k tokens: the page within 2 s, a tree within 1 s."""
    _, html = make_report(tmp_path, "large", problems=3, repetitions=16)

    def open_page():
        page.open(html, "#view=problems")
        page.wait("document.querySelectorAll('.list tbody tr').length === 3")

    def open_tree():
        page.press("Enter")
        page.wait(TREE)

    seconds = {}
    for attempt in range(3):  # the best of three: other tests may run on this machine
        for what in (open_page, open_tree):
            begin = time.monotonic()
            what()
            seconds[what, attempt] = time.monotonic() - begin
        page.wait(BLOCK)
    assert min(seconds[open_page, attempt] for attempt in range(3)) < 2
    assert min(seconds[open_tree, attempt] for attempt in range(3)) < 1
    keep_screenshot(page, "large")
