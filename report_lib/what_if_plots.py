"""The plot of a what-if: accuracy against cost, a point a policy."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval_lib.tables import short
from report_lib.analysis import Analysis
from report_lib.plot_parts import LINES
from report_lib.policies import VOTES

AXIS = {
    "tokens_generated": "tokens generated per problem, mean",
    "repetitions": "repetitions per problem, mean",
}
COLOURS = {
    "majority": LINES["maj"][0], "weighted": LINES["wmaj"][0], "best-of-n": LINES["bon"][0],
    "bootstrap": "#8a6bbf", "log-odds": "#777777",
}  # fmt: skip
STOPS = {"none": ("o", "number"), "sure": ("s", "sure"), "certified": ("D", "certified"), "beta": ("^", "beta"),
         "esc": ("v", "esc")}  # fmt: skip
WHAT_IF_CAPTION = (
    "What if: accuracy against cost, a point a policy, replayed on this run. Filled, with interval: chosen beforehand. "
    "Hollow: exploratory, as the frontier is; the best of many looks better than it is."
)
NAMED = 6  # chosen policies that have their name beside them: more cannot be read


def what_if_figure(analysis: Analysis) -> Figure | None:
    """Exploratory policies are small and hollow, those chosen beforehand large and filled, with interval and name."""
    found = analysis.what_if
    if found is None:
        return None
    figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    for row in found.rows:
        marker, colour = STOPS[row["stop"]][0], COLOURS[row["vote"]]
        style: dict[str, Any] = {"marker": marker, "linestyle": "none", "color": colour, "markersize": 4.2}
        if row["chosen"]:
            style |= {"markersize": 8, "zorder": 5, "markeredgecolor": "white"}
            half = None if row["ci"] is None else [[row["ci"]], [min(row["ci"], 1 - row["accuracy"])]]
            axis.errorbar(row[found.basis], row["accuracy"], yerr=half, capsize=3, elinewidth=1.6, **style)
        else:
            axis.plot(row[found.basis], row["accuracy"], markerfacecolor="white", markeredgewidth=0.9, **style)
    line = sorted((row[found.basis], row["accuracy"]) for row in found.rows if row["frontier"])
    axis.step(*zip(*line, strict=True), where="post", color="0.45", linewidth=1.0, zorder=1)
    for row in sorted(found.chosen, key=lambda row: row[found.basis])[:NAMED]:
        place: dict[str, Any] = {"xytext": (7, -11), "textcoords": "offset points", "fontsize": 8, "zorder": 6}
        axis.annotate(row["policy"], (row[found.basis], row["accuracy"]), **place)
    axis.set(xlabel=AXIS[found.basis], ylabel="accuracy (mean over problems)")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(lambda value, _: short(value) if value else "0")
    add_legend(figure, bool(found.chosen))
    return figure


def add_legend(figure: Figure, chosen: bool) -> None:
    """Votes by colour, stops by marker, and how the two kinds of policy differ."""
    handles: list[Any] = [
        plt.Line2D([], [], color=COLOURS[vote], marker="o", linestyle="none", label=words.replace("majority of ", ""))
        for vote, (words, _) in VOTES.items()
    ]
    plain: dict[str, Any] = {"color": "0.35", "linestyle": "none"}
    handles += [
        plt.Line2D([], [], marker=marker, markerfacecolor="white", label=words, **plain)
        for marker, words in STOPS.values()
    ]
    handles.append(plt.Line2D([], [], color="0.45", label="frontier of these"))
    handles.append(
        plt.Line2D([], [], marker="o", markerfacecolor="white", markersize=4.2, label="exploratory", **plain)
    )
    if chosen:
        handles.append(plt.Line2D([], [], marker="o", markersize=8, label="chosen beforehand", **plain))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, handlelength=1.6)
