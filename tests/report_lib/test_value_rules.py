"""What a run's values may be said to show, for each way to search and to select; and from which beams it is said."""

import json

import numpy as np
import pytest
from synthetic_runs import analysis_of, make_run, rows_of

from report_lib.data import read_run
from report_lib.tables import BIAS_NOTE, all_tables, to_json, value_cells
from report_lib.value import OBSERVATION, bias_words, groups_of, quality, value_along_trace
from search_lib.run_reader import RunPaths

# search type, selection -> biased by it, only final beams count, are there rejected candidates
RULES = {
    ("beam2", "value"): (True, False, True),
    ("beam2", "random"): (False, True, True),
    ("bfs", "value"): (True, False, True),
    ("bfs", "random"): (False, True, True),
    ("beam1", "value"): (False, False, False),
    ("beam1", "random"): (False, False, False),
    ("bon", "value"): (False, False, False),
    ("bon", None): (False, False, False),
    ("beam2", None): (True, False, True),  # a run that was made before there was a choice
    (None, None): (None, False, True),  # a run without settings
}
WORDS = {True: "under search, biased", False: "no selection by value: unbiased", None: "settings unknown"}


@pytest.mark.parametrize(("search_type", "selection"), RULES)
def test_who_is_biased_and_what_is_counted(tmp_path, search_type, selection):
    biased, final_only, rejected = RULES[search_type, selection]
    path = make_run(tmp_path, search_type=search_type or "beam2", early_stop=0.2, problems=4, repetitions=3)
    paths = RunPaths.of(path)
    meta = json.loads(paths.meta.read_text())
    meta["arguments"]["selection"] = selection
    if selection is None:
        del meta["arguments"]["selection"]
    paths.meta.write_text(json.dumps(meta))
    if search_type is None:
        paths.meta.unlink()
    analysis = analysis_of(path)
    assert analysis.values["biased"] is biased
    ends, pruned = counted_by_hand(path, final_only)
    assert analysis.values["groups"][0]["count"] == ends
    assert analysis.pruned_right == (pruned if rejected else None)
    assert [row["rescued"] is None for row in analysis.problems] == [not rejected] * 4
    assert to_json(analysis)["searches_rescuable_by_a_rejected_candidate"] == analysis.pruned_right
    table = all_tables([analysis], [])[-1]
    assert WORDS[biased] in table.title
    assert (BIAS_NOTE in table.notes) == (biased is not False)
    assert any("a rejected, finished" in note for note in table.notes) == rejected


def counted_by_hand(path, final_only):
    """Observations at the end of a trace, and searches in which only a rejected candidate was right."""
    ends = pruned = 0
    truth = {line["data_idx"]: line["gt_answer"] for line in rows_of(path)}
    rounds = rows_of(RunPaths.of(path).tree)
    for line in rows_of(path):
        mine = [r for r in rounds if (r["data_idx"], r["repeat_idx"]) == (line["data_idx"], line["repeat_idx"])]
        rejected = [
            text.rpartition("\\boxed{")[2].rstrip("}") if "\\boxed{" in text else ""
            for row in mine
            for text, kept, finish in zip(row["text"], row["kept"], row["finish"], strict=True)
            if finish and not kept
        ]
        ends += len(line["reward"]) + (0 if final_only else len(rejected))
        pruned += truth[line["data_idx"]] in rejected and not any(line["reward"])
    return ends, pruned


def test_a_run_that_prunes_has_searches_where_only_a_rejected_candidate_was_right(tmp_path):
    """So that counting none at all is not what the test above passes on."""
    path = make_run(
        tmp_path, early_stop=0.4, problems=12, repetitions=4, noise=4.0, beta=(1.0, 4.0), search_type="beam4"
    )
    assert analysis_of(path).pruned_right == counted_by_hand(path, False)[1] > 1


def test_unfinished_searches_are_not_counted(tmp_path):
    path = make_run(tmp_path, early_stop=0.2, problems=4, repetitions=3)
    kept = [line for line in path.read_text().splitlines(keepends=True) if '"repeat_idx":2' not in line]
    path.write_text("".join(kept))
    analysis = analysis_of(path)
    assert len(read_run(path, "run").lines) == 8
    assert analysis.values["groups"][0]["count"] == counted_by_hand(path, False)[0]
    assert [row["searches"] for row in analysis.problems] == [2] * 4


def observations(rows):
    return np.array(rows, OBSERVATION)


def test_groups_by_round_and_by_length_hold_what_they_say():
    """One trace a problem: 60 of three blocks of 10 tokens, 60 of one block of 30 tokens."""
    rows = [(p, block, 10 * block, 0.1 * block, p % 2 == 0, block == 3) for p in range(60) for block in (1, 2, 3)]
    rows += [(100 + p, 1, 30, 0.9, True, True) for p in range(60)]
    groups = {(kind, label): part for kind, label, part in groups_of(observations(rows))}
    assert {key: len(part) for key, part in groups.items()} == {
        ("end", "end of the trace"): 120, ("all", "every block's end"): 240, ("block", "end of round 1"): 120,
        ("block", "end of round 2"): 60, ("block", "end of round 3"): 60, ("length", "23-30 tokens"): 120,
    }  # fmt: skip
    assert set(groups["block", "end of round 2"]["position"]) == {20}
    assert all(groups["length", "23-30 tokens"]["last"])
    assert len(groups_of(observations(rows[:30]))) == 2  # end and all; rounds of ten observations are left out


def test_the_value_along_a_trace_is_told_for_right_and_wrong_apart():
    rows = [
        (p, block, 10 * block + p, 0.01 * p + 0.1 * block, p < 6, block == 2) for p in range(12) for block in (1, 2)
    ]
    rows += [(20 + p, 3, 40, 0.5, True, True) for p in range(4)]  # too few to draw
    found = value_along_trace(observations(rows))
    assert [(row["block"], row["right"], row["count"]) for row in found] == [
        (1, True, 6), (1, False, 6), (2, True, 6), (2, False, 6),
    ]  # fmt: skip
    right, wrong = found[0], found[1]
    assert (right["position"], wrong["position"]) == (12.5, 18.5)
    assert (right["mean"], wrong["mean"]) == (pytest.approx(0.125), pytest.approx(0.185))
    assert (right["low"], right["high"]) == (pytest.approx(0.1125), pytest.approx(0.1375))


def test_the_brier_score_of_the_base_rate():
    """Of always saying the share that is right: here 3 of 4."""
    part = observations([(p, 1, 10, 0.5, p < 3, True) for p in range(4)])
    found = quality(part)
    assert (found["share_right"], found["brier_base_rate"], found["brier"]) == (0.75, 0.1875, 0.25)


def test_an_interval_over_few_problems_is_not_shown():
    """Four problems with right and wrong answers say how they did, and no interval; five say it."""
    for problems, shown in ((4, False), (5, True)):
        rows = [(p, 1, 10, 0.1 * (k + p), k > 1, True) for p in range(problems) for k in range(4)]
        rows += [(100, 1, 10, 0.5, True, True)]  # of which none is wrong
        cells = value_cells({"label": "all"} | quality(observations(rows)))
        assert ("±" in cells[5]) == shown
        assert cells[5].endswith(f"({problems})")


def test_measures_are_shown_under_their_names():
    group = {"label": "here", "count": 1234, "share_right": 0.125, "mean_value": 0.2, "auc": 0.3, "auc_within": 0.4,
             "auc_within_ci": 0.05, "auc_within_problems": 9, "brier": 0.6, "brier_base_rate": 0.7, "ece": 0.8}  # fmt: skip
    assert value_cells(group) == [
        "here", "1,234", "12.5%", "0.200", "0.300", "0.400 ±0.050 (9)", "0.600", "(0.700)", "0.800",
    ]  # fmt: skip


def test_words():
    assert len({bias_words(biased) for biased in (True, False, None)}) == 3
