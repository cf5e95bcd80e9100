"""What a part of gpu_check.py is given: the device, the sizes, the time that is left, and where its figures go.

A part is a module with `run(report)`, and `before_cuda()` where something must be set before the GPU is used. Each figure
is a line of a file as soon as it is known, so that a part that dies keeps what it had.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from common_lib.files import LineFile


class Report:
    def __init__(self, lines: LineFile, device: str, size: str, seconds: float):
        """device: cpu or cuda. size: `tiny` (seconds on a CPU), `small` (a CPU) or `full` (the 1.5B shapes). seconds:
        what the part may take from now on."""
        self._lines, self.device, self.size = lines, device, size
        self._deadline = time.monotonic() + seconds

    def figure(
        self, table: str, name: str, value: float | None, unit: str = "", *, case: str = "", at_most: float | None = None,
        at_least: float | None = None, why: str = "",
    ) -> None:  # fmt: skip
        """A number that was measured, or None and `why` it was not. A `table` has a row a case, a column a name, or one
        row for all where there are no cases. A number beyond its bound fails the check."""
        good = value is None or ((at_most is None or value <= at_most) and (at_least is None or value >= at_least))
        row = {"table": table, "figure": name, "value": value, "unit": unit, "case": case, "at_most": at_most,
               "at_least": at_least, "good": bool(good), "why": why}  # fmt: skip
        always = ("table", "figure", "value", "good")
        self._lines.append({key: given for key, given in row.items() if key in always or given not in (None, "")})

    def say(self, text: str) -> None:
        """What ran, where the numbers do not say it."""
        self._lines.append({"note": text})

    def leave_out(self, what: str, why: str) -> None:
        """Nothing is left out without a word."""
        self._lines.append({"left_out": what, "why": why})

    def has_time(self, seconds: float, what: str, keep: float = 0.0) -> bool:
        """Whether about that many seconds are left; where not, it is said that `what` is left out. keep: seconds that
        what comes later needs, and that matters more."""
        left = self._deadline - time.monotonic() - keep
        if left < seconds:
            self.leave_out(what, f"no time: it takes about {seconds:.0f} s, and {max(left, 0):.0f} s are left")
        return left >= seconds

    def machine(self, **facts: str) -> None:
        self._lines.append({"machine": facts})

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """What fails in here is told, and the part goes on with the next."""
        try:
            yield
        except Exception as error:  # whatever a kernel or library raises is a finding
            self._lines.append({"failed": what, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
