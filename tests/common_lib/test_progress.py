"""What is shown of long work, and how often."""

import io
import os

from common_lib import progress
from common_lib.progress import Progress, format_count, format_seconds


def test_numbers_in_words():
    assert [format_seconds(s) for s in (0, 59.4, 59.6, 73, 3599, 3600, 3700, 36_060)] == [
        "0s", "59s", "1m00s", "1m13s", "59m59s", "1h00m", "1h01m", "10h01m",
    ]  # fmt: skip
    assert [format_count(n) for n in (7, 999, 1000, 1234, 3.4e6, 2e9)] == ["7", "999", "1.0k", "1.2k", "3.4M", "2.0G"]


def test_a_file_gets_a_line_every_30_seconds_and_a_terminal_one_line(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = []
    for stream in (io.StringIO(), Terminal()):
        clock[0] = 0.0
        line = Progress(lambda: f"at {clock[0]:.0f}", stream)
        for clock[0] in (0.2, 20.0, 40.0, 60.0, 75.0):
            line.update()
        line.close()
        shown.append([text.rstrip() for text in stream.getvalue().replace("\r", "\n").strip().split("\n")])
    assert shown == [["at 40", "at 75", "at 75"], ["at 20", "at 40", "at 60", "at 75", "at 75"]]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_fits_the_terminal_and_covers_the_one_before(monkeypatch):
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((11, 5)))
    texts, stream = ["a long line of text", "short"], Terminal()
    line = Progress(lambda: texts.pop(0), stream)
    line.update(now=True)
    line.close()
    assert stream.getvalue() == "\ra long lin\rshort     \n"


def test_it_is_shown_on_stderr_and_now_where_asked(capsys):
    line = Progress(lambda: "text")
    line.update()
    assert capsys.readouterr() == ("", "")
    line.update(now=True)
    assert capsys.readouterr() == ("", "text\n")
