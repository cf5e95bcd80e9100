"""--watch: what is renewed and when, that the page is whole at every moment, and that an open one stays where it is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chromium import BINARY, SKIP_REASON
from conftest import ROOT
from handmade_runs import read_data
from synthetic_runs import make_run
from test_report_page import BLOCK

import report
import report_lib.plots
from common_lib.cli import UserError
from report_lib import watch
from search_lib.run_reader import RunPaths

PROBLEMS, REPETITIONS = 3, 4


class GrowingRun:
    """A run that lies finished elsewhere and is written here piece by piece: a search is its journal, then its line."""

    def __init__(self, folder):
        self.whole = RunPaths.of(make_run(folder, "whole", problems=PROBLEMS, repetitions=REPETITIONS, early_stop=0.1))
        self.paths = RunPaths.of(folder / "run.jsonl")
        self.paths.tree.write_text("")
        self.paths.results.write_text("")
        self.paths.meta.write_bytes(self.whole.meta.read_bytes())
        self.lines = self.whole.results.read_text().splitlines(keepends=True)
        self.journal = self.whole.tree.read_text().splitlines(keepends=True)

    def rounds(self, number, most=99):
        """Journal lines of a search, by its place in the output."""
        key = [json.loads(self.lines[number])[name] for name in ("data_idx", "repeat_idx")]
        return [row for row in self.journal if [json.loads(row)[name] for name in ("data_idx", "repeat_idx")] == key][
            :most
        ]

    def begin(self, number):
        """The first round of a search."""
        self.append(self.paths.tree, self.rounds(number, 1))

    def finish(self, *numbers, begun=()):
        for number in numbers:
            self.append(self.paths.tree, self.rounds(number)[1 if number in begun else 0 :])
            self.append(self.paths.results, [self.lines[number]])

    @staticmethod
    def append(path, rows):
        with path.open("a") as stream:
            stream.write("".join(rows))


@pytest.fixture
def run(tmp_path):
    return GrowingRun(tmp_path)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    def draw(folder, analyses):
        (folder / "plot.png").write_text("a plot")
        return [{"png": "plot.png", "svg": "plot.svg", "title": "a plot", "caption": "", "wide": False}]

    monkeypatch.setattr(report_lib.plots, "write_plots", draw)


def watch_through(run, out, monkeypatch, *steps):
    """Watch while `steps` happen, one in each rest; then Ctrl-C. Returns how long each rest was to be."""
    rests, todo = [], list(steps)

    def sleep(seconds):
        rests.append(seconds)
        if not todo:
            raise KeyboardInterrupt
        todo.pop(0)()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    assert report.main([str(run.paths.results), "--watch", "--out", str(out)]) == 0
    assert not todo
    return rests


def searches_shown(out):
    return [row["searches"] for row in read_data(out / "report_data/index.js")["runs"][0]["problems"]]


def test_it_waits_for_a_search_renews_when_files_change_and_ends_with_the_run(
    run, tmp_path, monkeypatch, caplog, capsys
):
    out, seen = tmp_path / "out", []

    def look():
        index = out / "report_data/index.js"
        seen.append(
            (read_data(index)["live"], searches_shown(out), (out / "table.json").stat().st_ino)
            if index.exists()
            else None
        )

    def then(*actions):
        return lambda: (look(), *(action() for action in actions))

    caplog.set_level("INFO")
    torn = [run.lines[3][:50], run.lines[3][50:]]
    watch_through(
        run, out, monkeypatch,
        then(lambda: run.begin(0)), then(lambda: run.finish(0, 1, begun=[0])), then(), then(lambda: run.finish(2)),
        then(lambda: run.append(run.paths.results, torn[:1])), then(), then(lambda: run.append(run.paths.results, torn[1:])),
        then(lambda: run.finish(*range(4, len(run.lines)))), then(),
    )  # fmt: skip
    assert [entry and entry[1] for entry in seen] == [
        None, None, [1, 1], [1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [2, 1, 1], [4, 4, 4],
    ]  # fmt: skip
    assert seen[2] == seen[3]  # nothing was written where nothing had changed
    assert seen[4][0] > seen[3][0]
    said = [record.getMessage() for record in caplog.records if record.name == watch.__name__]
    assert "no finished search in it yet" in said[0]
    assert "run 2 of 12 searches" in " ".join(said)
    assert said[-1] == f"finished: no search is missing; {out / 'report.html'} is renewed no more"
    assert read_data(out / "report_data/live.js")["state"] == "finished"
    assert capsys.readouterr().out.count("wrote ") == 1  # the text of the last report, once


def check_whole(out):
    """What the index names is there, and texts are those of the problem's searches."""
    data = out / "report_data"
    if not (data / "index.js").exists():
        return
    index = read_data(data / "index.js")
    for folder, problem in ((run["folder"], problem) for run in index["runs"] for problem in run["problems"]):
        for search in read_data(data / f"{folder}/p{problem['id']}.js")["searches"]:
            texts = read_data(data / f"{search['texts']}.js")[search["at"]]
            assert len(texts) == len(search["parent"])
    json.loads((out / "table.json").read_text())
    assert (out / "plot.png").read_text() == "a plot"
    assert (out / "report.html").read_text().endswith("</html>\n")


def test_the_page_is_whole_at_every_moment(run, tmp_path, monkeypatch):
    out, replace, moments = tmp_path / "out", os.replace, []

    def replace_and_look(source, target):
        replace(source, target)
        if (out / "report.html").exists():
            moments.append(target)
            check_whole(out)

    monkeypatch.setattr(os, "replace", replace_and_look)
    run.begin(4)
    run.finish(0, 2)
    steps = [lambda: run.finish(1), lambda: run.finish(4, begun=[4]), lambda: run.finish(5)]
    watch_through(run, out, monkeypatch, *steps)
    assert len(moments) > 20
    check_whole(out)
    assert searches_shown(out) == [1, 2, 2]
    assert not [path for path in out.iterdir() if path.name.startswith(".plots") or path.name.endswith(".part")]
    assert len(list((out / "report_data/run0").iterdir())) == 2 * PROBLEMS  # no texts of earlier versions


@pytest.mark.parametrize("calls", [1, 3, 12])
def test_ctrl_c_in_a_renewal_leaves_a_whole_page(run, tmp_path, monkeypatch, capsys, calls):
    out, replace, left = tmp_path / "out", os.replace, [None]

    def interrupted(source, target):
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                left[0] = None
                raise KeyboardInterrupt
        replace(source, target)

    def go_on():
        run.finish(3, 4, 5)
        left[0] = calls

    monkeypatch.setattr(os, "replace", interrupted)
    run.finish(0, 1, 2)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: go_on())
    assert report.main([str(run.paths.results), "--watch", "--out", str(out)]) == 0
    monkeypatch.undo()
    assert left == [None]
    check_whole(out) if (out / "plot.png").exists() else None
    assert not (out / "report_data.part").exists()
    index = read_data(out / "report_data/index.js")
    assert read_data(out / "report_data/live.js") == {"version": index["live"], "state": "stopped"}
    assert "pass@1" in capsys.readouterr().out


def test_a_mistake_is_said_at_once_and_a_file_that_breaks_later_leaves_the_page(run, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such file"):
        report.main([str(tmp_path / "none.jsonl"), "--watch", "--out", str(out)])
    assert not out.exists()
    run.finish(0, 1, 2)
    good = run.paths.meta.read_text()
    watch_through(
        run, out, monkeypatch, lambda: run.paths.meta.write_text("{}"),
        lambda: (run.paths.meta.write_text(good), run.finish(3)),
    )  # fmt: skip
    assert [record.getMessage() for record in caplog.records if "stays as it was" in record.getMessage()]
    assert searches_shown(out) == [2, 1, 1]


def test_a_finished_run_that_is_begun_anew_is_waited_for(run, tmp_path, monkeypatch, caplog):
    """Its empty file is no search at all, and damaged settings none that is known: neither is the end."""
    out, states = tmp_path / "out", []
    numbers = range(PROBLEMS * REPETITIONS)
    good = run.paths.meta.read_text()

    def look():
        states.append(read_data(out / "report_data/live.js")["state"])

    run.finish(*numbers)
    watch_through(
        run, out, monkeypatch,
        lambda: (run.paths.results.write_text(""), run.paths.tree.write_text("")), look, look,
        lambda: (look(), run.finish(*numbers)), lambda: run.paths.meta.write_text("{}"), look,
        lambda: (look(), run.paths.meta.write_text(good)), look,
    )  # fmt: skip
    assert set(states) == {"live"} and len(states) == 6
    assert sum("stays as it was" in record.getMessage() for record in caplog.records) == 1  # not at every look
    assert read_data(out / "report_data/live.js")["state"] == "finished"


def test_a_report_that_cannot_be_written_is_tried_again(run, tmp_path, monkeypatch, caplog):
    """As on a full disk, without a change of the run."""
    out, table = tmp_path / "out", tmp_path / "out/table.md"
    run.finish(0)
    watch_through(
        run, out, monkeypatch, lambda: (table.unlink(), table.mkdir(), run.finish(1)), lambda: None, table.rmdir,
        lambda: None,
    )  # fmt: skip
    assert searches_shown(out) == [1, 1]
    (said,) = [record.getMessage() for record in caplog.records if "tried again" in record.getMessage()]
    assert said.startswith(f"cannot write {table}: ")


@pytest.mark.parametrize("watched", [False, True])
def test_a_report_that_cannot_be_written_at_first_is_one_line(run, tmp_path, watched):
    run.finish(0)
    (tmp_path / "out/table.md").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^cannot write .*table\.md"):
        report.main([str(run.paths.results), "--out", str(tmp_path / "out"), *["--watch"] * watched])


def test_however_it_ends_open_pages_are_told(run, tmp_path, monkeypatch):
    """Right after the first page is there, by a fault of its own; and where the disk is full, by removing the file."""
    out = tmp_path / "out"
    live = out / "report_data/live.js"
    run.finish(0)
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with monkeypatch.context() as patch:
            patch.setattr(report, "terminal_text", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(error):
                report.main([str(run.paths.results), "--watch", "--out", str(out)])
        assert read_data(live)["state"] == "stopped"
    watch_through(run, out, monkeypatch, lambda: live.with_name("live.js.tmp").mkdir())
    assert not live.exists()


def test_a_renewal_is_followed_by_a_rest_in_proportion(run, tmp_path, monkeypatch):
    """A run of a gigabyte takes a minute to read: that must not go on and on."""
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    write_report = report.write_report

    def slow(*arguments, **more):
        clock[0] += 40.0
        return write_report(*arguments, **more)

    monkeypatch.setattr(report, "write_report", slow)
    run.finish(0)
    rests = watch_through(run, tmp_path / "out", monkeypatch, lambda: None, lambda: run.finish(1))
    assert rests == [80.0, 80.0, 80.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_script_with_its_page(run, tmp_path, number):
    run.finish(0, 1, 2)
    live = tmp_path / "out/report_data/live.js"
    command = [sys.executable, "report.py", str(run.paths.results), "--watch", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begin = time.monotonic()
        while not live.exists():
            assert process.poll() is None and time.monotonic() < begin + 120
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "pass@1" in printed
    assert "Traceback" not in said and said.rstrip().endswith("(stopped; the same command goes on)")
    assert read_data(live)["state"] == "stopped"


@pytest.mark.skipif(BINARY is None, reason=SKIP_REASON)
def test_an_open_page_is_renewed_and_keeps_its_place(page, run, tmp_path):
    out = tmp_path / "out"
    path = run.paths.results

    def renew(version):
        runs = [report.read_run(path, "run")]
        report.write_report(out, runs, None, lambda folder, analyses: [], version)
        page.wait(f"VGS.index.live === {version}")

    run.finish(0, 1, 2, 3)
    report.write_report(out, [report.read_run(path, "run")], None, lambda folder, analyses: [], 1)
    page.open(out / "report.html", "#view=problem&problem=1&node=3&source=1")
    page.wait(BLOCK)
    assert page.run("document.getElementById('live').textContent").startswith("live · as of 20")
    page.run("VGS.LIVE_SECONDS = 0.05, VGS.ask()")
    page.press("t")
    page.click(".tree [data-node='2'] rect")
    page.run("document.querySelector('.pane').style.maxHeight = '80px'")
    page.run("document.body.style.paddingBottom = '3000px', scrollTo(0, 90)")
    page.run(
        "const holder = document.querySelector('.tree-holder'); holder.style.width = '100px'; holder.scrollLeft = 7"
    )
    page.run("document.querySelector('.search').dataset.mark = 'kept'")
    run.finish(5)
    renew(2)  # another problem: nothing is drawn again
    page.wait("VGS.run().problems[2].searches === 2")
    assert page.run("document.querySelector('.search').dataset.mark") == "kept"
    run.begin(4)
    renew(3)  # a search of this problem has begun
    page.wait("document.querySelectorAll('.strip button').length === 2")
    page.wait("document.querySelectorAll('.block section pre').length > 0")  # the whole trace, still
    assert page.run("[document.querySelector('.block').dataset.block, VGS.address().node, VGS.address().source]") == [
        "2",
        "2",
        "1",
    ]
    page.wait("scrollY === 90")
    assert page.run("document.activeElement.dataset.node") == "2"
    page.press("Escape")
    page.wait("document.querySelectorAll('.list tbody tr').length === 3")
    page.press("/")
    page.type("problem")
    page.press("ArrowLeft")
    page.run("VGS.listState.at = 0, VGS.listState.sort = 'searches', VGS.listed()")
    assert page.run("VGS.order[0]") == 1
    run.finish(7)
    renew(4)
    page.wait("[...document.querySelectorAll('.list tbody tr')].length === 3 && VGS.run().problems[1].searches === 2")
    assert page.run("[document.activeElement.type, document.activeElement.value, document.activeElement.selectionStart]") == [
        "search", "problem", 6,
    ]  # fmt: skip
    assert page.run("[VGS.order, VGS.listState.at]") == [[0, 1, 2], 1]  # the cursor went along with its problem
    watch.end_live(out, "stopped")
    page.wait("document.getElementById('live').textContent.startsWith('no longer renewed')")
