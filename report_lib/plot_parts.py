"""What the plots of a report have in common: style, panels, ticks. Lines differ in dash and marker as well as in shade."""

from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval_lib.tables import printable, short

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "text.parse_math": False,  # a run's name may hold a dollar sign
    "svg.hashsalt": "report",  # the same input gives the same file
    "savefig.dpi": 150,
}
# metric -> colour (of different lightness), dash, marker
LINES = {
    "pass": ("#9a9a9a", (0, (1, 1.2)), "^"),
    "wmaj": ("#0b2a6f", "-", "o"),
    "bon": ("#b3541e", (0, (5, 1.5)), "s"),
    "maj": ("#2f8f83", (0, (4, 1.5, 1, 1.5)), "D"),
    "pass1": ("#111111", (0, (2, 2)), "x"),
}
RUN_LINES = [
    ("#0b2a6f", "-", "o"),
    ("#c4661f", (0, (5, 1.5)), "s"),
    ("#5f9e8f", (0, (1, 1.2)), "^"),
    ("#777777", (0, (4, 1.5, 1, 1.5)), "D"),
]
MAX_PANELS = 6
NARROW = 6.0  # inches: the letters of a wider figure cannot be read on a phone
LEAST_GAP = 0.12  # of an axis, between two ticks: less, and their labels touch


def grid(count: int, width: float, height: float, columns: int = 3, **settings: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `columns` side by side; each that is the lowest of its column has x labels."""
    columns = min(count, columns)
    rows = -(-count // columns)
    size = width * columns, height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **settings)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    shown = list(axes.flat[:count])
    for axis in shown[-columns:]:
        axis.tick_params(labelbottom=True)
    return figure, shown


def set_ticks(axis: Axes, points: Iterable[float], log: bool = False, reach: Iterable[float] = ()) -> None:
    """Ticks of x where points are, and nowhere else: from the largest down, those whose labels have room.

    reach: points of panels side by side, which are to have one scale.
    """
    place: Any = np.log2 if log else float
    ordered = sorted(set(points), reverse=True)
    held = [*map(place, [*ordered, *reach])]
    low, high = min(held), max(held)
    gap = LEAST_GAP * (high - low)
    ticks = ordered[:1]
    for point in ordered[1:]:
        if place(ticks[-1]) - place(point) >= gap:
            ticks.append(point)
    if log:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks[::-1], map(short, ticks[::-1]))
    axis.minorticks_off()
    if high > low:
        ends = low - (high - low) / 20, high + (high - low) / 20
        axis.set_xlim(*(2**end for end in ends) if log else ends)


def brief(name: str, most: int = 20) -> str:
    """A run's name where there is little room: its end, which tells runs of one kind apart."""
    name = printable(name)
    return name if len(name) <= most else f"…{name[1 - most :]}"
