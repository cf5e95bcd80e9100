"""Progress of long work: one line that is redrawn in a terminal, a line now and then in a file."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_SECONDS = 0.5
FILE_SECONDS = 30.0


def format_seconds(seconds: float) -> str:
    """73 -> '1m13s', 3700 -> '1h01m'."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(number: float) -> str:
    """1234 -> '1.2k', 3400000 -> '3.4M'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


class Progress:
    """Shows `text()` on a stream: redrawn in place in a terminal, else every 30 seconds on a line of its own."""

    def __init__(self, text: Callable[[], str], stream: TextIO | None = None):
        self._text, self._stream = text, stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._shown = time.monotonic()

    def update(self, now: bool = False) -> None:
        """Show the text if it is time, or `now`."""
        wait = TERMINAL_SECONDS if self._in_place else FILE_SECONDS
        if not now and time.monotonic() - self._shown < wait:
            return
        self._shown = time.monotonic()
        text = self._text()
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + text[:width].ljust(width))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """The last state, on a line that stays."""
        self.update(now=True)
        if self._in_place:
            self._stream.write("\n")
            self._stream.flush()
