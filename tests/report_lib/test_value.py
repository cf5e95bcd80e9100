"""The value model's quality: runs whose truth is known, counts by hand, what pruning hides."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import analysis_of, make_pair, make_run, rows_of

from eval_lib.grading import Grader
from report_lib.analysis import analyse
from report_lib.data import read_run
from report_lib.problem import SearchView, only_pruned_right
from report_lib.tables import all_tables
from report_lib.value import (
    OBSERVATION,
    edges,
    observe_search,
    quality,
    value_report,
    value_sentence,
    values_verdict,
)
from search_lib.run_reader import RunPaths
from search_lib.tree import Round, Tree


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("runs"))


def test_calibrated_values_without_selection_are_found_calibrated(tmp_path):
    path = make_run(tmp_path, search_type="beam1", noise=0.0, problems=40, repetitions=8, early_stop=0.1)
    groups = analysis_of(path).values["groups"]
    assert [group["kind"] for group in groups] == ["end", "all"] + ["block"] * 4 + ["length"] * 4
    for group in groups:
        assert group["ece"] < 0.03 + 1 / group["count"] ** 0.5, group["label"]
        assert group["brier"] < group["brier_base_rate"]
        assert group["mean_value"] == pytest.approx(group["share_right"], abs=2 / group["count"] ** 0.5)
    assert groups[0]["count"] == 40 * 8 * 8
    assert analysis_of(path).values["biased"] is False


def test_quality_against_a_count_over_all_pairs(pair):
    """Pooled and within AUC and Brier at each round's end, from the raw journal by brute force."""
    _, bon = pair
    rows = rows_of(bon)
    values = [
        (row["data_idx"], v, r) for row in rows for v, r in zip(row["generated_scores"], row["reward"], strict=True)
    ]
    pairs = [(a, b) for a in values if a[2] for b in values if not b[2]]

    def win(a, b):
        return 1.0 if a[1] > b[1] else 0.5 if a[1] == b[1] else 0.0

    group = analysis_of(bon).values["groups"][0]
    assert group["auc"] == pytest.approx(np.mean([win(a, b) for a, b in pairs]))
    problems = {a[0] for a, b in pairs if a[0] == b[0]}
    within = [np.mean([win(a, b) for a, b in pairs if a[0] == b[0] == problem]) for problem in problems]
    assert group["auc_within"] == pytest.approx(np.mean(within))
    assert group["auc_within_problems"] == len(within)
    assert group["brier"] == pytest.approx(np.mean([(v - r) ** 2 for _, v, r in values]))


def test_pruned_runs_are_labelled_and_random_selection_is_not(pair, tmp_path):
    vgs, _ = pair
    analysis = analysis_of(vgs)
    assert analysis.values["biased"] is True
    assert any("under search, biased" in table.title for table in all_tables([analysis], []))
    path = make_run(tmp_path)
    meta = json.loads(RunPaths.of(path).meta.read_text())
    meta["arguments"]["selection"] = "random"
    RunPaths.of(path).meta.write_text(json.dumps(meta))
    random = analysis_of(path).values
    assert random["biased"] is False
    assert random["groups"][0]["count"] == 6 * 4 * 4  # the final beams alone


def hand_made_search(wrong_and_right=(False, True)):
    """Prompt -> 1, 2; 1 -> 3 (kept), 4 (rejected), both finished. 2 is rejected and unfinished."""
    tree = Tree([7] * 5, num_beams=1)
    tree.add(Round(0, [0, 0], [[7] * 10] * 2, [0.6, 0.2], [True, False], ["", ""]))
    tree.add(Round(1, [1, 1], [[7] * 4, [7] * 6], [0.9, 0.3], [True, False], ["stop", "stop"]))
    grades = {node: ("", right) for node, right in zip((3, 4), wrong_and_right, strict=True)}
    return SearchView(0, None, tree, [""] * 5, True, grades, [])


def test_a_shared_block_counts_once_for_each_finished_candidate():
    seen = observe_search(0, hand_made_search(), final_only=False)
    rows = sorted(zip(seen["value"], seen["right"], seen["block"], seen["position"], strict=True))
    assert [tuple(map(float, row)) for row in rows] == [
        (0.3, 1, 2, 16),
        (0.6, 0, 1, 10),
        (0.6, 1, 1, 10),
        (0.9, 0, 2, 14),
    ]
    assert quality(seen)["count"] == 4
    assert len(observe_search(0, hand_made_search(), final_only=True)) == 2


def test_a_search_is_counted_where_only_a_pruned_candidate_was_right():
    assert only_pruned_right(hand_made_search((False, True)))
    assert not only_pruned_right(hand_made_search((True, True)))
    assert not only_pruned_right(hand_made_search((False, False)))


def test_rejected_candidates_are_graded_from_their_text(pair):
    """Rejected, finished candidates: the journal's last block holds the box; final beams keep their stored reward."""
    vgs, _ = pair
    run = read_run(vgs, "vgs")
    views = []
    with Grader() as grader:
        analyse(run, grader, views.append)
    rejected = right = 0
    for view in views:
        for search in view.searches:
            tree, grades, line = search.tree, search.grades, search.line
            assert set(grades) == set(tree.finished)
            assert [grades[node] for node in tree.beams] == list(
                zip(line["processed_answer"], line["reward"], strict=True)
            )
            for node in set(tree.finished) - set(tree.beams):
                text = search.text[node]
                box = text.rpartition("\\boxed{")[2].rstrip("}") if "\\boxed{" in text else ""
                assert grades[node] == (box, box == line["gt_answer"])
                rejected, right = rejected + 1, right + (box == line["gt_answer"])
    assert rejected > 20
    assert 0 < right < rejected


def test_ranges_cover_all_whole_numbers_once():
    for top, groups in itertools.product((1, 2, 5, 17, 32), (1, 4, 8)):
        found = edges(np.array([1, top]), groups)
        assert [n for low, high in found for n in range(low + 1, high + 1)] == list(range(1, top + 1))
        assert len(found) <= groups


# ---------------------------------------------------------------------------------------------------------------------
# Are they accepted?


@pytest.fixture(scope="module")
def miniature():
    """Observations at the end of the trace of the quickstart's bon run: 16 samples of each of 60 problems."""
    kept = json.loads(Path(__file__).with_name("miniature_values.json").read_text())
    rows = [
        (problem, 1, 42, value, right == "1", True)
        for problem, (values, verdicts) in enumerate(zip(kept["values"], kept["right"], strict=True))
        for value, right in zip(values, verdicts, strict=True)
    ]
    return np.array(rows, OBSERVATION)


def verdict_of(seen):
    return values_verdict({"biased": False, "groups": [quality(seen)]})


def test_the_values_of_the_miniature_are_accepted(miniature):
    assert len(miniature) == 960 and verdict_of(miniature) == "accepted"
    assert value_sentence("bon", {"biased": False} | value_report(miniature)).startswith("bon: its values tell right")
    assert verdict_of(miniature[miniature["problem"] < 20]) == "accepted"


@pytest.mark.parametrize("within", [True, False], ids=["of a problem", "of the run"])
def test_shuffled_values_are_accepted_in_at_most_5_of_100_draws(miniature, within):
    accepted = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        shuffled = miniature.copy()
        key = shuffled["problem"] if within else np.zeros(len(shuffled))
        order = np.lexsort((rng.random(len(shuffled)), key))  # values stay with their problem, or do not
        shuffled["value"] = miniature["value"][order]
        verdict = verdict_of(shuffled)
        assert verdict in ("accepted", "no evidence")
        accepted += verdict == "accepted"
    assert accepted <= 5
