"""The plot of a what-if: accuracy against cost, a point a policy."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval_lib.tables import short
from report_lib.analysis import Analysis
from report_lib.plot_parts import LINES
from report_lib.policies import VOTES

WHAT_IF_CAPTION = (
    "What if: accuracy against cost, a point a policy, replayed on this run. Filled, with interval and number: chosen "
    "beforehand. Hollow: exploratory, as the frontier is; the best of many looks better than it is."
)
AXIS = {
    "tokens_generated": "tokens generated per problem, mean",
    "repetitions": "repetitions per problem, mean",
}
COLOURS = {
    "majority": LINES["maj"][0], "weighted": LINES["wmaj"][0], "best-of-n": LINES["bon"][0],
    "bootstrap": "#8a6bbf", "log-odds": "#888888",
}  # fmt: skip
STOPS = {"none": ("o", "number"), "sure": ("s", "sure"), "certified": ("D", "certified"), "beta": ("^", "beta"),
         "esc": ("v", "esc")}  # fmt: skip
HOLLOW: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "white", "markersize": 4.2, "markeredgewidth": 0.9}
FILLED: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "white", "markersize": 8}


def what_if_figure(analysis: Analysis) -> Figure | None:
    """Exploratory policies are small and hollow; those chosen beforehand are large and filled, with interval and number."""
    found = analysis.what_if
    if found is None:
        return None
    figure, axis = plt.subplots(figsize=(5.6, 5.0), layout="constrained")
    order = list(VOTES)[::-1]  # of drawing: log-odds lie below weights, which they often agree with
    for row in sorted(found.rows, key=lambda row: (row["stop"] != "none", order.index(row["vote"]))):
        if not row["chosen"]:
            style = HOLLOW | {"marker": STOPS[row["stop"]][0], "color": COLOURS[row["vote"]]}
            axis.plot(row[found.basis], row["accuracy"], zorder=2, **style)
    for number, row in enumerate(found.chosen, start=1):
        x, y, half = row[found.basis], row["accuracy"], row["ci"]
        ends = None if half is None else [[min(half, y)], [min(half, 1 - y)]]
        style = FILLED | {"marker": STOPS[row["stop"]][0], "color": COLOURS[row["vote"]]}
        axis.errorbar(x, y, yerr=ends, capsize=3, elinewidth=1.6, zorder=5, **style)
        place = (0, 8) if number % 2 else (0, -16)  # in turns, since they are often side by side
        axis.annotate(str(number), (x, y), xytext=place, textcoords="offset points", ha="center", zorder=6)
    frontier = sorted((row[found.basis], row["accuracy"]) for row in found.rows if row["frontier"])
    axis.step(*zip(*frontier, strict=True), where="post", color="0.45", linewidth=1.0, zorder=1)
    axis.set(xlabel=AXIS[found.basis], ylabel="accuracy (mean over problems)")
    axis.margins(y=0.08)
    axis.set_xlim(left=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
    add_legend(figure, [row["policy"] for row in found.chosen])
    return figure


def add_legend(figure: Figure, chosen: list[str]) -> None:
    """Votes by colour, stops by marker, the frontier; and in a second legend the numbers of chosen policies."""
    grey: dict[str, Any] = {"color": "0.35"}
    votes = [("o", COLOURS[vote], words.replace("majority of ", "")) for vote, (words, _) in VOTES.items()]
    handles: list[Any] = [
        plt.Line2D([], [], **FILLED, marker=m, color=colour, label=words) for m, colour, words in votes
    ]
    handles += [plt.Line2D([], [], **HOLLOW, **grey, marker=m, label=words) for m, words in STOPS.values()]
    handles.append(plt.Line2D([], [], color="0.45", label="frontier (exploratory)"))
    settings: dict[str, Any] = {"fontsize": 8, "handlelength": 1.4}
    figure.legend(handles=handles, loc="outside lower center", ncols=3, **settings)
    if chosen:
        names = [f"{number} {policy}" for number, policy in enumerate(chosen, start=1)]
        blank = [plt.Line2D([], [], linestyle="none", label=name) for name in names]
        title = "chosen beforehand"
        figure.legend(
            handles=blank,
            loc="outside upper center",
            ncols=2,
            title=title,
            title_fontsize=8,
            **settings | {"handlelength": 0},
        )
