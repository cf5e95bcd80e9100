"""What is shown of long work, and how often."""

import io

from common_lib import progress
from common_lib.progress import Progress, format_count, format_seconds


def test_numbers_in_words():
    assert [format_seconds(s) for s in (0, 59.6, 73, 3700)] == ["0s", "1m00s", "1m13s", "1h01m"]
    assert [format_count(n) for n in (7, 1234, 3.4e6, 2e9)] == ["7", "1.2k", "3.4M", "2.0G"]


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
