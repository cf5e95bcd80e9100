"""The plot of a comparison's answer, and that of clones."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval_lib.tables import short
from report_lib.analysis import Analysis
from report_lib.compare import BASES, chosen_rows
from report_lib.plot_parts import MAX_PANELS, RUN_LINES, brief, set_ticks


def difference_figure(comparison: Mapping[str, Any]) -> Figure | None:
    """The difference of the chosen votes with its interval, a line a budget; the largest of each basis is filled."""
    rows = chosen_rows(comparison)
    if not rows:
        return None
    places = [i + 0.7 * list(BASES).index(row["basis"]) for i, row in enumerate(rows)]  # a gap between the bases
    figure, axis = plt.subplots(figsize=(5.2, 1.2 + 0.2 * places[-1]), layout="constrained")
    for i, (y, row) in enumerate(zip(places, rows, strict=True)):
        largest = i + 1 == len(rows) or rows[i + 1]["basis"] != row["basis"]
        axis.errorbar(
            100 * row["difference"], y, xerr=None if row["ci"] is None else 100 * row["ci"], fmt="o", capsize=2.5,
            color="#0b2a6f", markerfacecolor="#0b2a6f" if largest else "white", markersize=6 if largest else 4.5,
            elinewidth=2.2 if largest else 1.0,
        )  # fmt: skip
    axis.axvline(0, color="0.35", linewidth=1, linestyle=(0, (3, 3)))
    names = [
        f"{BASES[row['basis']]} {row['budget']:.0f}" if row["basis"] == "N" else f"{BASES[row['basis']]} {short(row['budget'])}"
        for row in rows
    ]  # fmt: skip
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    one, other = brief(comparison["one"]), brief(comparison["other"])
    axis.set_xlabel(f"{one} minus {other}, points of accuracy\n← {other} is better      {one} is better →")
    return figure


def clones_figure(analyses: Sequence[Analysis]) -> Figure | None:
    """Clones by round, as a share of the beams, a line a run. Runs of one round or one beam cannot have any."""
    shown = [analysis for analysis in analyses if len(analysis.clones) > 1][:MAX_PANELS]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    for i, analysis in enumerate(shown):
        colour, dash, marker = RUN_LINES[i % len(RUN_LINES)]
        rounds, beams = [row["round"] for row in analysis.clones], analysis.clones[0]["beams"]
        share = [row["clones"] / beams for row in analysis.clones]
        label = f"{brief(analysis.run.name)} ({beams} beams)"
        axis.plot(rounds, share, color=colour, linestyle=dash, marker=marker, markersize=4.5, label=label)
    set_ticks(axis, [row["round"] for analysis in shown for row in analysis.clones])
    axis.set(ylim=(0, 1.02), xlabel="round", ylabel="beams from one first block")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=2, handlelength=3.2)
    return figure
