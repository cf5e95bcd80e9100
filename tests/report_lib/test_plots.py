"""What plots draw: the points of each line are figures of the table."""

import json
from itertools import pairwise

import numpy as np
import pytest
from handmade_runs import close
from matplotlib import pyplot
from synthetic_runs import analysis_of, make_run

from eval_lib.summary import METRICS
from report_lib import plots
from report_lib.compare import compare
from search_lib.run_reader import RunPaths


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def analyses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder, "vgs", early_stop=0.1, repetitions=5), make_run(folder, "bon", search_type="bon")]
    return [analysis_of(path) for path in runs]


def lines_of(axis):
    """label -> (x, y) of the lines that the legend names."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def points(analysis, key, metric):
    return [row[key] for row in analysis.rows], [row[f"{metric}_m"] for row in analysis.rows]


@pytest.mark.parametrize("basis", plots.AXES)
def test_accuracy_is_drawn_against_its_budget(analyses, basis):
    key = {"n": "N", "tokens": "tokens_generated", "flops": "flops"}[basis]
    figure = plots.accuracy_figure(analyses, basis)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["vgs", "bon"]
    for axis, analysis in zip(panels, analyses, strict=True):
        assert lines_of(axis) == {words: points(analysis, key, metric) for metric, words in METRICS.items()}
        assert axis.get_xscale() == "log"
        # bands of the two votes and of nothing else; their edges are drawn
        assert len(axis.collections) == 2
        for metric in ("wmaj", "maj"):
            colour = plots.LINES[metric][0]
            edges = [line.get_ydata() for line in axis.lines if line.get_color() == colour and line.get_linewidth() < 1]
            mean, half = (np.array([row[f"{metric}_{end}"] for row in analysis.rows]) for end in ("m", "ci"))
            band = [list(np.clip(mean - half, 0, None)), list(np.clip(mean + half, None, 1))]
            close([list(edge) for edge in edges], band)
        # a tick at each point that has a marker (5 repetitions: 1, 2, 4 and all), and nowhere else
        points_there = [row[key] for row in analysis.rows if row["pooled"] in (1, 2, 4, len(analysis.rows))]
        assert axis.get_xticks().tolist() == points_there
        assert axis.get_xticks(minor=True).tolist() == []
        assert axis.xaxis.get_tick_params()["labelbottom"]
        assert axis.get_xlim() == panels[0].get_xlim()  # one scale
        assert axis.get_xlim()[0] < min(points_there) and axis.get_xlim()[1] > max(points_there)


def test_the_comparison_has_each_run_and_the_baselines_majority(analyses):
    figure = plots.comparison_figure(analyses)
    for axis, key in zip(figure.axes, ("N", "tokens_generated", "flops"), strict=True):
        assert lines_of(axis) == {
            "vgs: weighted": points(analyses[0], key, "wmaj"),
            "bon: weighted": points(analyses[1], key, "wmaj"),
            "bon: majority": points(analyses[1], key, "maj"),
        }
        assert len(axis.collections) == 2  # bands of the votes that are compared
        there = {row[key] for analysis in analyses for row in analysis.rows if row["pooled"] in (1, 2, 4, 5)}
        assert {*axis.get_xticks()} <= there
        assert max(axis.get_xticks()) == max(there)
        gaps = np.diff(np.log2(axis.get_xticks())) / np.log2(max(there) / min(there))
        assert (gaps >= 0.1).all()  # so that labels do not touch
    assert plots.comparison_figure(analyses[:1]) is None


def test_reliability_has_the_bins_of_the_report(analyses):
    analysis = analyses[1]
    figure = plots.reliability_figure(analysis, "length")
    groups = [group for group in analysis.values["groups"] if group["kind"] in ("end", "length")]
    for axis, group in zip(figure.axes, groups, strict=True):
        label, figures = axis.get_title().split("\n")
        assert label == group["label"]
        assert f"n {group['count']:,}, ECE {group['ece']:.3f}, Brier {group['brier']:.3f}" in figures
        assert len(axis.texts) == 0  # nothing lies on a curve
        drawn = axis.collections[0].get_offsets().tolist()
        close(drawn, [[b["mean_value"], b["share_right"]] for b in group["bins"]])
    assert "unbiased" in figure._suptitle.get_text()


def test_the_lowest_panel_of_each_column_has_x_labels(analyses):
    """Five panels in two rows of three: the last of the first row has none below it."""
    figure = plots.reliability_figure(analyses[0], "block")
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 5 and len(figure.axes) == 6
    assert [axis.xaxis.get_tick_params()["labelbottom"] for axis in shown] == [False, False, True, True, True]


def test_the_difference_is_drawn_at_every_budget_and_what_is_said_is_filled(analyses):
    comparison = compare(*analyses)
    rows = [row for row in comparison["rows"] if (row["metric_one"], row["metric_other"]) == ("wmaj", "maj")]
    (axis,) = plots.difference_figure(comparison).axes
    close(
        [container.lines[0].get_xdata().item() for container in axis.containers], [100 * r["difference"] for r in rows]
    )
    for container, row in zip(axis.containers, rows, strict=True):
        ((low, _), (high, _)) = container.lines[2][0].get_segments()[0].tolist()
        close([low, high], [100 * (row["difference"] - row["ci"]), 100 * (row["difference"] + row["ci"])])
    filled = [container.lines[0].get_markerfacecolor() != "white" for container in axis.containers]
    assert filled == [a["basis"] != b["basis"] for a, b in pairwise([*rows, {"basis": "end"}])]
    assert sum(filled) == 3
    labels = [label.get_text().split()[0] for label in axis.get_yticklabels()]
    assert labels == [{"flops": "FLOPs"}.get(row["basis"], row["basis"]) for row in rows]


def test_clones_are_drawn_as_a_share_of_the_beams_with_a_tick_a_round(analyses):
    (axis,) = plots.clones_figure(analyses).axes  # samples have one round: no clones
    rows = analyses[0].clones
    assert lines_of(axis) == {"vgs (4 beams)": ([1, 2, 3, 4], [row["clones"] / 4 for row in rows])}
    assert axis.get_xticks().tolist() == [1, 2, 3, 4]
    assert plots.clones_figure(analyses[1:]) is None


def test_values_along_the_trace_are_those_of_right_and_wrong(analyses):
    figure = plots.trace_figure(analyses)
    (axis,) = [axis for axis in figure.axes if axis.get_visible()]  # samples have one block: nothing along it
    trace = analyses[0].values["trace"]
    for label, right in (("right", True), ("wrong", False)):
        rows = [row for row in trace if row["right"] == right]
        assert lines_of(axis)[label] == ([row["position"] for row in rows], [row["mean"] for row in rows])
    assert {*axis.get_xticks()} <= {row["position"] for row in trace}
    assert axis.get_legend() is None and len(figure.legends) == 1  # beside the panels, not on a curve


def test_time_is_stacked_round_by_round(analyses):
    """Runs from above; each bar begins where the one before it ends."""
    figure = plots.time_figure(analyses)
    (axis,) = figure.axes
    bars = [bar for bar in axis.patches if bar.get_width()]
    for y, analysis in ((1, analyses[0]), (0, analyses[1])):
        mine = [bar for bar in bars if round(bar.get_y() + bar.get_height() / 2) == y]
        expected = [seconds for row in analysis.rounds for seconds in (row["generate"], row["score"])]
        close([bar.get_width() for bar in mine], [s for s in [*expected, analysis.waiting] if s])
        close([bar.get_x() for bar in mine[1:]], list(np.cumsum([bar.get_width() for bar in mine])[:-1]))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["bon", "vgs"]


def test_what_a_run_does_not_tell_is_not_drawn(tmp_path):
    path = make_run(tmp_path, "released", released=True)
    analysis = analysis_of(path)
    assert [plots.accuracy_figure([analysis], basis) for basis in plots.AXES] == [None] * 3
    assert plots.trace_figure([analysis]) is None
    assert not RunPaths.of(path).meta.exists()
    assert json.dumps(analysis.rows)


def test_a_wide_figure_is_also_drawn_for_a_phone(analyses, tmp_path, monkeypatch):
    """Its panels stand below one another, and its lines are the same."""
    for name in ("reliability_figure", "trace_figure", "time_figure"):  # each takes a second
        monkeypatch.setattr(plots, name, lambda *_: None)
    monkeypatch.setattr(plots, "AXES", {basis: plots.AXES[basis] for basis in ("n", "tokens")})
    drawn = {plot["stem"]: plot for plot in plots.write_plots(tmp_path, analyses)}
    assert {stem for stem, plot in drawn.items() if "narrow" in plot} == {f"accuracy_{a}" for a in plots.AXES} | {
        "comparison"
    }
    for plot in drawn.values():
        assert plot.get("narrow_inches", plot["inches"]) <= plots.NARROW
        assert (tmp_path / plot.get("narrow", plot["png"])).exists()
    wide, narrow = plots.comparison_figure(analyses), plots.comparison_figure(analyses, columns=1)
    assert [lines_of(axis) for axis in narrow.axes] == [lines_of(axis) for axis in wide.axes]
    assert len({axis.get_position().x0 for axis in narrow.axes}) == 1
