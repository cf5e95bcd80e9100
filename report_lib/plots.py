"""Plots of a report as PNG and SVG."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from eval_lib.summary import METRICS
from eval_lib.tables import printable
from report_lib.analysis import Analysis
from report_lib.answer_plots import clones_figure, difference_figure
from report_lib.compare import compare, vote_of
from report_lib.plot_parts import LINES, MAX_PANELS, NARROW, RUN_LINES, STYLE, brief, grid, set_ticks
from report_lib.value import bias_words
from report_lib.what_if_plots import WHAT_IF_CAPTION, what_if_figure

BANDS = ("wmaj", "maj")  # no more: bands of five lines cannot be told apart
AXES = {  # basis -> key of a row, label of the axis, words of the caption
    "n": ("N", "N (blocks in parallel, all pooled repetitions)", "the budget N"),
    "tokens": ("tokens_generated", "tokens generated per problem", "tokens generated (rejected candidates too)"),
    "flops": ("flops", "FLOPs per problem, generator and value model", "FLOPs of generator and value model"),
}


def marked(rows: Sequence[dict]) -> list[int]:
    """The rows that have a marker and may have a tick: powers of two, and all pooled."""
    return [i for i, row in enumerate(rows) if row["pooled"] & (row["pooled"] - 1) == 0 or row is rows[-1]]


def budget_of(row: dict, key: str) -> float:
    """Where a row stands: of a run that stopped problems early, at the mean N that they used."""
    return row["N_used"] if key == "N" and "N_used" in row else row[key]


def draw_metric(axis: Axes, rows: Sequence[dict], key: str, metric: str, style: tuple, label: str, band: bool) -> None:
    """One line, the mean over problems, and its band: the problem-clustered 95 % interval."""
    colour, dash, marker = style
    rows = [row for row in rows if row[f"{metric}_m"] is not None]  # of a stopped run only one vote has them all
    if not rows:
        return
    x, y = [budget_of(row, key) for row in rows], [row[f"{metric}_m"] for row in rows]
    half = [row[f"{metric}_ci"] for row in rows]
    if band and None not in half:
        low, high = np.clip(np.subtract(y, half), 0, None), np.clip(np.add(y, half), None, 1)
        axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        for edge in (low, high):
            axis.plot(x, edge, color=colour, linewidth=0.8, linestyle=dash, alpha=0.6)
    every: Any = marked(rows)
    axis.plot(x, y, color=colour, ls=dash, marker=marker, markevery=every, markersize=4.5, linewidth=1.7, label=label)


def finish_accuracy(figure: Figure, axes: Sequence[Axes], entry: float) -> Figure:
    """Scale and legend of panels that share their y-axis; an entry of the legend takes `entry` inches."""
    for axis in axes:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[0].set_ylim(top=1.02)  # shared, and only now: it ends the automatic scaling
    axes[0].set_ylabel("accuracy (mean over problems)")
    columns = max(1, int(figure.get_figwidth() / entry))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)
    return figure


def accuracy_figure(analyses: Sequence[Analysis], basis: str, columns: int = 3) -> Figure | None:
    """Accuracy against N, tokens or FLOPs: a panel a run, a line an aggregator."""
    key, label, _ = AXES[basis]
    shown = [a for a in analyses if a.rows and all(row[key] for row in a.rows)][:MAX_PANELS]
    if not shown:
        return None
    figure, axes = grid(len(shown), width=5.4, height=4.0, columns=columns, sharey=True)
    budgets = [budget_of(row, key) for analysis in shown for row in analysis.rows]
    for axis, analysis in zip(axes, shown, strict=True):
        for metric, style in LINES.items():
            draw_metric(axis, analysis.rows, key, metric, style, METRICS[metric], metric in BANDS)
        axis.set(title=printable(analysis.run.name), xlabel=label)
        set_ticks(axis, [budget_of(analysis.rows[i], key) for i in marked(analysis.rows)], log=True, reach=budgets)
    return finish_accuracy(figure, axes, entry=1.8)


def comparison_figure(analyses: Sequence[Analysis], columns: int = 3) -> Figure | None:
    """All runs in one panel, for each basis that all have: value-weighted vote, for `bon` runs also majority."""
    shown = [axis for axis in AXES.values() if all(row[axis[0]] for analysis in analyses for row in analysis.rows)]
    if len(analyses) < 2 or not shown or not all(analysis.rows for analysis in analyses):
        return None
    figure, axes = grid(len(shown), width=4.8, height=4.0, columns=columns, sharey=True)
    for axis, (key, label, _) in zip(axes, shown, strict=True):
        for i, analysis in enumerate(analyses):
            by_both = analysis.run.search_type == "bon" and not analysis.run.stopping
            for metric in ("wmaj", "maj") if by_both else (vote_of(analysis.run),):
                style: tuple = RUN_LINES[i % len(RUN_LINES)]
                style = (style[0], (0, (3, 1, 1, 1, 1, 1)), "x") if metric == "maj" else style
                name = f"{brief(analysis.run.name)}: {METRICS[metric]}"
                band = i < 2 and metric == vote_of(analysis.run)  # more than two bands cannot be told apart
                draw_metric(axis, analysis.rows, key, metric, style, name, band)
        set_ticks(axis, [budget_of(a.rows[i], key) for a in analyses for i in marked(a.rows)], log=True)
        axis.set(xlabel=label)
    return finish_accuracy(figure, axes, entry=3.4)


def reliability_figure(analysis: Analysis, kind: str, columns: int = 3) -> Figure | None:
    """Share that is right against the value, by round or by length; points have the size of their bin."""
    groups = [group for group in analysis.values["groups"] if group["kind"] in ("end", kind)]
    if len(groups) < 2 and kind != "length":
        return None
    shown = np.linspace(0, len(groups) - 1, min(len(groups), MAX_PANELS)).round().astype(int)
    figure, axes = grid(len(shown), width=3.1, height=3.3, columns=columns, sharex=True, sharey=True)
    for axis, group in zip(axes, (groups[i] for i in shown), strict=True):
        bins, count = group["bins"], group["count"]
        x, y = [b["mean_value"] for b in bins], [b["share_right"] for b in bins]
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (3, 3)))
        axis.plot(x, y, color="#0b2a6f", linewidth=1.2)
        size = [12 + 240 * b["count"] / count for b in bins]
        axis.scatter(x, y, s=size, color="#0b2a6f", alpha=0.55, edgecolors="white", clip_on=False)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        auc = "–" if group["auc"] is None else f"{group['auc']:.3f}"
        words = f"n {count:,}, ECE {group['ece']:.3f}, Brier {group['brier']:.3f}, AUC {auc}"
        axis.set_title(f"{group['label']}\n{words}", fontsize=8)  # above the panel: inside, a curve may run through it
    letters = int(13 * figure.get_figwidth())  # of a line, at the title's size
    figure.supxlabel(fill("value (predicted success probability), mean of the bin", letters), fontsize=9)
    figure.supylabel("share that is right", fontsize=9)
    title = f"Reliability, {printable(analysis.run.name)}: {bias_words(analysis.values['biased'])}"
    figure.suptitle(fill(title, letters), fontsize=10)
    return figure


def trace_figure(analyses: Sequence[Analysis], columns: int = 2) -> Figure | None:
    """Value along the trace for right and wrong finished candidates: mean, and the middle half as a band."""
    shown = [a for a in analyses if len({row["block"] for row in a.values["trace"]}) > 1][:MAX_PANELS]
    if not shown:
        return None
    figure, axes = grid(len(shown), width=4.6, height=3.4, columns=columns, sharey=True)
    for axis, analysis in zip(axes, shown, strict=True):
        for right, colour, dash, marker in ((True, "#0b2a6f", "-", "o"), (False, "#c4661f", (0, (5, 1.5)), "s")):
            rows = [row for row in analysis.values["trace"] if row["right"] == right]
            x, mean, low, high = ([row[key] for row in rows] for key in ("position", "mean", "low", "high"))
            axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            label = "right" if right else "wrong"
            axis.plot(x, mean, color=colour, linestyle=dash, marker=marker, markersize=4, label=label)
        axis.set(xlabel="response tokens at the block's end (mean)", ylim=(0, 1))
        axis.set_title(f"{printable(analysis.run.name)}\n({bias_words(analysis.values['biased'])})", fontsize=9)
        set_ticks(axis, [row["position"] for row in analysis.values["trace"]])
    axes[0].set_ylabel("value: mean, middle half")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="finished candidates", loc="outside lower center", ncols=2, handlelength=3.2)
    return figure


def time_figure(analyses: Sequence[Analysis]) -> Figure | None:
    """Where a search's seconds went, round by round: generating, scoring, waiting."""
    shown = [analysis for analysis in analyses if analysis.rounds][:MAX_PANELS]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(5.6, 1.1 + 0.62 * len(shown)), layout="constrained")
    kinds = {
        "generate": ("#0b2a6f", "", "generating"),
        "score": ("#f0b060", "////", "scoring"),
        "wait": ("#e4e4e4", "....", "waiting"),
    }
    for y, analysis in enumerate(reversed(shown)):
        left, rounds = 0.0, analysis.rounds
        sums = {kind: sum(row[kind] for row in rounds) for kind in ("generate", "score")}
        parts = [part for row in rounds for part in row.items()] if len(rounds) <= 8 else list(sums.items())
        for kind, seconds in [*parts, ("wait", analysis.waiting)]:
            colour, hatch, _ = kinds[kind]
            axis.barh(y, seconds, left=left, height=0.6, color=colour, hatch=hatch, edgecolor="white", linewidth=0.8)
            left += seconds
        share = sums["score"] / max(1e-9, sum(sums.values()))
        axis.text(left, y, f"  {left:,.1f} s, scoring {share:.1%}", va="center", fontsize=8)
    axis.set_yticks(range(len(shown)), [brief(analysis.run.name) for analysis in reversed(shown)])
    axis.set(xlabel="seconds of one search, mean over searches; rounds from left to right")
    axis.margins(x=0.4)
    axis.grid(axis="y", visible=False)
    for colour, hatch, words in kinds.values():
        axis.barh(0, 0, color=colour, hatch=hatch, edgecolor="white", label=words)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def figures(analyses: Sequence[Analysis]) -> Iterator[tuple[str, str, Callable[..., Figure | None]]]:
    """(file stem, caption, what draws it) of every plot; it draws None where the runs do not tell enough."""
    comparisons = [compare(analyses[0], other) for other in analyses[1:]]
    for i, comparison in enumerate(comparisons):
        end = f"_{i + 1}" if len(comparisons) > 1 else ""
        caption = f"{comparison['one']} minus {comparison['other']}, with 95 % intervals clustered by problem."
        yield (
            f"difference{end}",
            f"{caption} Filled: what the sentences are about.",
            partial(difference_figure, comparison),
        )
    band = "Mean over problems, with bands of 95 % intervals clustered by problem for"
    for basis, (_, _, words) in AXES.items():
        caption = f"{band} the weighted and the majority vote (the table has all). Accuracy against {words}."
        yield f"accuracy_{basis}", caption, partial(accuracy_figure, analyses, basis)
    for analysis in analyses:
        yield "what_if", WHAT_IF_CAPTION, partial(what_if_figure, analysis)
    whose = "both runs' votes" if len(analyses) == 2 else "the first two runs' votes"
    yield "comparison", f"{band} {whose}. The runs together.", partial(comparison_figure, analyses)
    for i, analysis in enumerate(analyses):
        end = f"_{i + 1}" if len(analyses) > 1 else ""
        for kind, words in (("block", "round"), ("length", "length")):
            caption = (
                f"Reliability of {analysis.run.name}, first at the end of the trace, then by {words}. On the diagonal, "
                "values are calibrated; a point's size is its share of the observations."
            )
            yield f"reliability_{kind}{end}", caption, partial(reliability_figure, analysis, kind)
    trace = "Value along the trace of finished candidates that turned out right or wrong."
    clones = "Clones: beams of a search's largest family, those with the same first block. At the top it has collapsed."
    yield "clones", clones, partial(clones_figure, analyses)
    yield "value_trace", trace, partial(trace_figure, analyses)
    yield "time", "Where the time of a search went.", partial(time_figure, analyses)


def write_plots(folder: Path, analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """Draw every plot into `folder` as PNG and SVG; one wider than a phone also with its panels below one another.

    Returns, for the page: file names, titles and captions, and widths in inches, so that no letters become too small.
    """
    written = []
    with plt.rc_context(STYLE):
        for stem, caption, draw in figures(analyses):
            figure = draw()
            if figure is None:
                continue
            plot: dict[str, Any] = {"stem": stem, "png": f"{stem}.png", "svg": f"{stem}.svg"}
            plot |= {"title": stem.replace("_", " "), "caption": caption, "inches": float(figure.get_figwidth())}
            figure.savefig(folder / plot["png"])
            figure.savefig(folder / plot["svg"], metadata={"Date": None})
            plt.close(figure)
            if plot["inches"] > NARROW and (figure := draw(columns=1)):
                plot |= {"narrow": f"{stem}_narrow.png", "narrow_inches": float(figure.get_figwidth())}
                figure.savefig(folder / plot["narrow"])
                plt.close(figure)
            written.append(plot)
    return written
