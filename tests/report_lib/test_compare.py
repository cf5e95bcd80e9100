"""Two runs at equal N, tokens and FLOPs, paired by problem."""

import numpy as np
import pytest
from synthetic_runs import analysis_of, make_pair, make_run, rows_of, write_rows

import report
from common_lib.cli import UserError
from eval_lib.summary import METRICS
from report_lib.compare import compare, equal_cost_budgets, equal_n_budgets, score_at, spread
from report_lib.data import read_run
from search_lib.run_reader import RunPaths


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("runs"))


def test_a_run_against_itself_differs_by_nothing(pair, tmp_path):
    """Also when problems are numbered and repetitions ordered otherwise: problems are paired by their text."""
    vgs, _ = pair
    rows = rows_of(vgs)
    for row in rows:
        row["data_idx"] = (row["data_idx"] + 2) % 6
        row["global_idx"] = row["repeat_idx"] * 6 + row["data_idx"]
    other = tmp_path / "other.jsonl"
    write_rows(other, rows)
    RunPaths.of(other).meta.write_bytes(RunPaths.of(vgs).meta.read_bytes())
    result = compare(analysis_of(vgs), analysis_of(other))
    assert {row["basis"] for row in result["rows"]} == {"N", "tokens"}
    for row in result["rows"]:
        assert row["difference"] == pytest.approx(0, abs=1e-12)
        assert row["ci"] == pytest.approx(0, abs=1e-12)  # so does every problem, not only their mean
        assert row["problems"] == 6
    assert any("FLOPs" in missing for missing in result["missing"])


def test_equal_tokens_and_equal_n_are_what_they_say(pair):
    """The baseline's budgets: difference of per-problem scores at the stated pooled numbers, paired over problems."""
    vgs, bon = pair
    one, other = analysis_of(vgs), analysis_of(bon)
    result = compare(one, other)
    tokens = [np.mean(list(side.costs["tokens"].values())) for side in (one, other)]
    flops = [np.mean(list(side.costs["flops"].values())) for side in (one, other)]
    seen = set()
    for row in result["rows"]:
        seen.add((row["basis"], row["metric_one"], row["metric_other"]))
        scale = {"N": (8, 8), "tokens": tokens, "flops": flops}[row["basis"]]
        assert row["pooled_one"] * scale[0] == pytest.approx(row["budget"])
        assert row["pooled_other"] * scale[1] == pytest.approx(row["budget"])
        assert 1 <= row["pooled_one"] <= 4
        differences = [
            score_at(one.scores[i][row["metric_one"]], row["pooled_one"])
            - score_at(other.scores[i][row["metric_other"]], row["pooled_other"])
            for i in range(6)
        ]
        assert row["difference"] == pytest.approx(np.mean(differences))
        assert row["ci"] == pytest.approx(2.570582 * np.std(differences, ddof=1) / 6**0.5, rel=1e-5)
    assert seen == {
        (basis, *pair)
        for basis in ("N", "tokens", "flops")
        for pair in [*((metric, metric) for metric in METRICS), ("wmaj", "maj")]
    }


def test_scores_between_whole_repetitions_are_linear():
    scores = [0.0, 0.4, 1.0]
    assert [score_at(scores, m) for m in (1, 1.5, 2, 2.25, 3)] == pytest.approx([0, 0.2, 0.4, 0.55, 1.0])


def test_budgets_stay_within_what_both_runs_reach(pair):
    vgs, bon = pair
    one, other = read_run(vgs, "vgs"), read_run(bon, "bon")
    assert equal_n_budgets(one, other, (4, 4)) == [(8, 1, 1), (16, 2, 2), (32, 4, 4)]
    other.num_blocks = 16
    assert equal_n_budgets(one, other, (4, 4)) == [(16, 2, 1), (32, 4, 2)]
    other.num_blocks = None
    assert equal_n_budgets(one, other, (4, 4)) == []
    assert equal_cost_budgets(1.0, 5.0, (4, 4)) == []
    assert equal_cost_budgets(1.0, 2.0, (4, 4)) == [(2.0, 2.0, 1.0), (4.0, 4.0, 2.0)]
    assert spread(3.0, 3.0) == [3.0]
    assert len(spread(1.0, 1e6)) == 5


def test_runs_on_other_problems_are_refused_or_compared_on_the_common_ones(pair, tmp_path, capsys):
    vgs, _ = pair
    strange = make_run(tmp_path, "strange", seed=5)
    with pytest.raises(UserError, match="have no problem in common; report them one by one"):
        report.main([str(vgs), str(strange), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    half = make_run(tmp_path, "half", problem_texts=["?", "??", "???"])
    assert report.main([str(vgs), str(half)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "paired over 3 common problems, clustered by problem; 6 that only one of them has are left out" in printed
