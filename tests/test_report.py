"""What a report says: tables, FLOPs, the value model's quality, comparisons, plots, the released code's files, regrading."""

import csv
import itertools
import json
import subprocess
import sys

import kill_test
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from make_synthetic_run import Options, make_synthetic_run
from torch.utils.flop_counter import FlopCounterMode

import inference_eval
import report
from common_lib.cli import UserError
from eval_lib.summary import summarize
from eval_utils import Grader, problem_classes
from report_lib.analysis import analyse
from report_lib.compare import compare, equal_cost_budgets, equal_n_budgets, score_at, spread
from report_lib.cost import contexts_of, forward_cost, forward_costs, search_flops
from report_lib.data import read_run, sibling
from report_lib.plots import LINES, RUN_LINES
from report_lib.tables import all_tables, as_markdown, as_text, printable
from report_lib.trees import TreeFile, new_tree
from report_lib.value import Observations, edges, observe_tree, quality, rescued_searches

METRICS = ("pass1", "pass", "bon", "maj", "wmaj")


def make_run(folder, name="run", **changes):
    path = folder / f"{name}.jsonl"
    make_synthetic_run(path, Options(**(dict(problems=6, repetitions=4, max_length=160, block_size=40) | changes)))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def analysis_of(path, **flags):
    with Grader() as grader:
        return analyse(read_run(path, path.stem, **flags), grader)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pruned run and the baseline on the same problems, both reported together; (folder, vgs path, bon path)."""
    folder = tmp_path_factory.mktemp("runs")
    vgs, bon = make_run(folder, "vgs", early_stop=0.1), make_run(folder, "bon", search_type="bon")
    assert report.main([str(vgs), str(bon), "--out", str(folder / "out")]) == 0
    return folder, vgs, bon


# ------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_are_those_of_the_plain_summary(runs):
    """All figures of table.json and table.csv against `summarize` on the file as `json` reads it."""
    folder, vgs, _ = runs
    rows = rows_of(vgs)
    with Grader() as grader:
        expected = summarize(rows, 8, problem_classes(rows, grader))
    table = json.loads((folder / "out/table.json").read_text())["runs"][0]["table"]
    assert len(table) == 4
    for row, want in zip(table, expected, strict=True):
        assert {key: row[key] for key in want} == want
    with (folder / "out/table.csv").open() as file:
        written = [row for row in csv.DictReader(file) if row["run"] == "vgs"]
    assert [float(row["wmaj_m"]) for row in written] == [row["wmaj_m"] for row in expected]
    markdown = (folder / "out/table.md").read_text()
    assert f"{100 * expected[-1]['wmaj_m']:.1f} ±{100 * expected[-1]['wmaj_ci']:.1f}" in markdown
    assert "repeat noise" in markdown


def test_the_terminal_table_names_everything(runs, capsys):
    _, vgs, bon = runs
    assert report.main([str(vgs), str(bon)]) == 0
    printed = capsys.readouterr().out
    for words in ("pass@1", "pass@k", "best-of-N", "majority", "weighted", "clustered by problem", "repeat noise only",
                  "FLOPs", "Kaplan et al. 2020", "decode", "prefill", "value model", "wall-clock 14,400 s", "per second",
                  "vgs against bon", "under search, biased", "no selection by value: unbiased", "weighted / majority",
                  "of 24 searches a rejected, finished candidate was right"):  # fmt: skip
        assert words in printed.replace("\n", " "), words
    assert max(map(len, printed.splitlines())) <= 100


def test_hostile_names_stay_inside_their_cell():
    table = {"title": "a\x1b[31m", "columns": ["x|y", "<b>"], "rows": [["1|2", "\u202e"]], "notes": []}
    assert "\x1b" not in as_text(table) + as_markdown(table)
    assert "| x\\|y | &lt;b> |" in as_markdown(table)
    assert "\u202e" not in as_markdown(table)
    assert printable("é\n") == "é\n"


# -------------------------------------------------------------------------------------------------------------- FLOPs


def test_forward_flops_are_those_that_torch_counts():
    """A whole tiny model under torch's own counter; it attends to all positions, so contexts are tokens squared here."""
    model = tiny.tiny_generator(attn_implementation="eager")
    config, tokens = model.config, 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    shape = config.to_dict() | {"head_dim": config.hidden_size // config.num_attention_heads}
    cost = forward_cost(shape, config.hidden_size * config.vocab_size)
    assert cost.flops(tokens, tokens**2) == counter.get_total_flops()


def test_contexts_count_each_token_and_all_before_it():
    for start, length in itertools.product(range(4), range(5)):
        assert contexts_of(start, length) == sum(start + i + 1 for i in range(length))


def test_search_flops_against_a_token_by_token_count(runs):
    """Every generated token at its position; the prompt tokens of requests that were not cached; every token scored once."""
    _, vgs, _ = runs
    run = read_run(vgs, "vgs")
    generator, value_model = forward_costs(run.meta)
    tree, line = TreeFile(run.tree_path).trees(2)[1], run.by_problem[2][1]
    decode = prefill = 0
    for node in tree.nodes:
        first = tree.prompt_tokens + tree.start[node]
        decode += sum(generator.flops(1, first + i + 1) for i in range(tree.length[node]))
        prefill += sum(generator.flops(1, i + 1) for i in range(first))
    score = sum(value_model.flops(1, i + 1) for i in range(tree.prompt_tokens))
    for node in tree.nodes:
        first = tree.prompt_tokens + tree.start[node]
        score += sum(value_model.flops(1, first + i + 1) for i in range(tree.length[node]))
    cold = search_flops(tree, line | {"tokens_cached": 0}, (generator, value_model))
    assert cold == {
        "flops_decode": pytest.approx(decode),
        "flops_prefill": pytest.approx(prefill),
        "flops_score": pytest.approx(score),
    }
    asked = sum(tree.prompt_tokens + tree.start[node] for node in tree.nodes)
    half = search_flops(tree, line | {"tokens_cached": asked / 2, "tokens_scored": 2 * line["tokens_scored"]},
                        (generator, value_model))  # fmt: skip
    assert half["flops_prefill"] == pytest.approx(prefill / 2)
    assert half["flops_score"] == pytest.approx(2 * score)
    assert search_flops(tree, {"dt": 1.0}, (generator, value_model)) is None


def test_flops_grow_with_pooled_repetitions_and_need_shapes(runs, tmp_path):
    _, vgs, _ = runs
    analysis = analysis_of(vgs)
    assert [row["flops"] / analysis.rows[0]["flops"] for row in analysis.rows] == pytest.approx([1, 2, 3, 4])
    assert analysis.flops["flops"] == pytest.approx(np.mean(list(analysis.flops_by_problem.values())))
    copy = make_run(tmp_path, "copy")
    meta = json.loads(sibling(copy, "meta.json").read_text())
    del meta["generator"]["head_dim"]
    sibling(copy, "meta.json").write_text(json.dumps(meta))
    analysis = analysis_of(copy)
    assert analysis.flops is None
    assert any("no FLOPs" in note for note in analysis.notes)


# -------------------------------------------------------------------------------------------------------- value model


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


def test_quality_against_a_count_over_all_pairs(runs):
    """Pooled and within AUC and Brier at each round's end, from the raw journal by brute force."""
    _, _, bon = runs
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


def test_pruned_runs_are_labelled_and_random_selection_is_not(runs, tmp_path):
    _, vgs, _ = runs
    analysis = analysis_of(vgs)
    assert analysis.values["biased"] is True
    assert any("under search, biased" in table["title"] for table in all_tables([analysis], []))
    path = make_run(tmp_path)
    meta = json.loads(sibling(path, "meta.json").read_text())
    meta["arguments"]["selection"] = "random"
    sibling(path, "meta.json").write_text(json.dumps(meta))
    random = analysis_of(path).values
    assert random["biased"] is False
    assert random["groups"][0]["count"] == 6 * 4 * 4  # the final beams alone


def hand_made_tree():
    """Prompt -> 1, 2; 1 -> 3 (kept, wrong), 4 (rejected, right). 2 is rejected and unfinished."""
    tree = new_tree(0, 0, prompt_tokens=5, width=1)
    tree.parent += [0, 0, 1, 1]
    tree.round += [0, 0, 1, 1]
    tree.start += [0, 0, 10, 10]
    tree.length += [10, 10, 4, 6]
    tree.value += [0.6, 0.2, 0.9, 0.3]
    tree.kept += [True, False, True, False]
    tree.finish += ["", "", "stop", "stop"]
    tree.text += ["a", "b", "c", "d"]
    tree.beams = [3]
    return tree


def test_a_shared_block_counts_once_for_each_finished_candidate():
    observations = Observations()
    observe_tree(observations, hand_made_tree(), {3: False, 4: True}, final_only=False)
    columns = observations.columns()
    seen = sorted(zip(columns["value"], columns["right"], columns["block"], columns["position"], strict=True))
    assert [tuple(map(float, row)) for row in seen] == [
        (0.3, 1, 2, 16),
        (0.6, 0, 1, 10),
        (0.6, 1, 1, 10),
        (0.9, 0, 2, 14),
    ]
    assert quality(columns)["count"] == 4
    final = Observations()
    observe_tree(final, hand_made_tree(), {3: False, 4: True}, final_only=True)
    assert len(final) == 2


def test_rescuable_searches_are_those_where_only_a_rejected_candidate_was_right():
    tree = hand_made_tree()
    assert rescued_searches([tree], [{3: False, 4: True}]) == 1
    assert rescued_searches([tree], [{3: True, 4: True}]) == 0
    assert rescued_searches([tree], [{3: False, 4: False}]) == 0


def test_rejected_candidates_are_graded_from_their_text(runs):
    """Rejected, finished candidates: the journal's last block holds the box; final beams keep their stored reward."""
    _, vgs, _ = runs
    run = read_run(vgs, "vgs")
    views = []
    with Grader() as grader:
        analyse(run, grader, views.append)
    rejected = right = 0
    for view in views:
        for tree, grades, line in zip(view.trees, view.grades, view.lines, strict=True):
            assert set(grades) == set(tree.finished)
            assert [grades[node] for node in tree.beams] == list(
                zip(line["processed_answer"], line["reward"], strict=True)
            )
            for node in set(tree.finished) - set(tree.beams):
                box = tree.text[node].rpartition("\\boxed{")[2].rstrip("}") if "\\boxed{" in tree.text[node] else ""
                assert grades[node] == (box, box == line["gt_answer"])
                rejected, right = rejected + 1, right + (box == line["gt_answer"])
    assert rejected > 20
    assert 0 < right < rejected


def test_ranges_cover_all_whole_numbers_once():
    for top, groups in itertools.product((1, 2, 5, 17, 32), (1, 4, 8)):
        found = edges(np.array([1, top]), groups)
        assert [n for low, high in found for n in range(low + 1, high + 1)] == list(range(1, top + 1))
        assert len(found) <= groups


# --------------------------------------------------------------------------------------------------------- comparison


def test_a_run_against_itself_differs_by_nothing(runs, tmp_path):
    """Also when problems are numbered and repetitions ordered otherwise: problems are paired by their text."""
    _, vgs, _ = runs
    rows = rows_of(vgs)
    for row in rows:
        row["data_idx"] = (row["data_idx"] + 2) % 6
        row["global_idx"] = row["repeat_idx"] * 6 + row["data_idx"]
    other = tmp_path / "other.jsonl"
    write_rows(other, rows)
    sibling(other, "meta.json").write_bytes(sibling(vgs, "meta.json").read_bytes())
    result = compare(analysis_of(vgs).measured, analysis_of(other).measured)
    assert {row["basis"] for row in result["rows"]} == {"N", "tokens"}
    for row in result["rows"]:
        assert row["difference"] == pytest.approx(0, abs=1e-12)
        assert row["problems"] == 6
    assert any("FLOPs" in missing for missing in result["missing"])


def test_equal_tokens_and_equal_n_are_what_they_say(runs):
    """The baseline's budgets: difference of per-problem scores at the stated pooled numbers, paired over problems."""
    _, vgs, bon = runs
    one, other = analysis_of(vgs).measured, analysis_of(bon).measured
    result = compare(one, other)
    tokens = [np.mean(list(side.tokens.values())) for side in (one, other)]
    flops = [np.mean(list(side.flops.values())) for side in (one, other)]
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


def test_budgets_stay_within_what_both_runs_reach(runs):
    _, vgs, bon = runs
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


def test_runs_on_other_problems_are_refused_or_compared_on_the_common_ones(runs, tmp_path, capsys):
    _, vgs, _ = runs
    strange = make_run(tmp_path, "strange", seed=5)
    with pytest.raises(UserError, match="have no problem in common; report them one by one"):
        report.main([str(vgs), str(strange), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    half = make_run(tmp_path, "half", problem_texts=["?", "??", "???"])
    assert report.main([str(vgs), str(half)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "paired over 3 common problems, clustered by problem; 6 that only one of them has are left out" in printed


# -------------------------------------------------------------------------------------------------------------- plots


def test_every_plot_is_there_twice_with_labels(runs):
    folder, _, _ = runs
    names = {path.stem for path in (folder / "out").glob("*.png")}
    assert names == {path.stem for path in (folder / "out").glob("*.svg")}
    assert names == {"accuracy_n", "accuracy_tokens", "accuracy_flops", "comparison", "reliability_block_1",
                     "reliability_length_1", "reliability_length_2", "value_trace", "time"}  # fmt: skip
    for path in (folder / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    # matplotlib keeps each drawn text as a comment in the SVG
    assert "tokens generated per problem" in (folder / "out/accuracy_tokens.svg").read_text()
    assert "under search, biased" in (folder / "out/value_trace.svg").read_text()


@pytest.mark.parametrize("styles", [list(LINES.values()), RUN_LINES])
def test_lines_differ_without_their_colour(styles):
    assert len({str(dash) for _, dash, _ in styles}) == len(styles)
    assert len({marker for _, _, marker in styles}) == len(styles)


# -------------------------------------------------------------------------------------------- the released code's files


def test_the_released_codes_files(tmp_path, capsys):
    path = make_run(tmp_path, "released", released=True)
    assert set(rows_of(path)[0]) == {"repeat_idx", "data_idx", "global_idx", "problem", "gt_answer", "generated_ids",
                                     "generated_scores", "processed_answer", "reward", "dt"}  # fmt: skip
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in ("no settings beside it", "budget N is not known", "no journal", "settings unknown"):
        assert words in printed
    table = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]["table"]
    assert [row["N"] for row in table] == [None] * 4
    assert {row[key] for row in table for key in ("flops", "tokens_generated", "truncated")} == {None}
    ids = rows_of(path)[0]["generated_ids"][1]
    text = (tmp_path / "out/report_data/run0/p0-text0.js").read_text()
    assert " ".join(map(str, ids)) in text
    assert report.main([str(path), "--num_blocks", "8"]) == 0
    assert "budget N is not known" not in capsys.readouterr().out


def test_released_files_show_text_with_a_tokenizer(tmp_path):
    path = make_run(tmp_path, "released", released=True, problems=1, repetitions=1)
    rows = rows_of(path)
    rows[0]["generated_ids"] = [tiny.tiny_tokenizer()(f"beam {i} </think> é").input_ids for i in range(4)]
    write_rows(path, rows)
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert report.main([str(path), *flags]) == 0
    data = (tmp_path / "out/report_data/run0/p0-text0.js").read_text()
    assert "beam 3 \\u003c/think> \\u00e9" in data


def test_files_of_the_search_script(tmp_path, capsys):
    """End to end with tiny models: the search's own table and the report's are one; the tree file is whole."""
    inputs = kill_test.make_inputs(tmp_path, problems=2)
    output = tmp_path / "run.jsonl"
    assert inference_eval.main([*inputs, "--engine", "transformers", "--output_path", str(output)]) == 0
    printed = capsys.readouterr().out
    assert report.main([str(output), "--out", str(tmp_path / "out")]) == 0
    reported = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.strip().startswith(("8 ", "16 ", "24 "))]
    assert len(table) >= 3
    assert all(line in reported for line in table)
    data = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]
    assert (data["partial"], data["searches"]) == (False, 6)
    assert all(row["flops"] > 0 for row in data["table"])
    assert data["wall_clock_seconds"] > 0
    assert not [note for note in data["notes"] if "no FLOPs" in note or "journal" in note]


# ---------------------------------------------------------------------------------------------------------- regrading


def test_regrading_mends_rewards_and_leaves_samples_alone(runs, tmp_path, capsys):
    _, vgs, _ = runs
    spoilt = tmp_path / "spoilt.jsonl"
    rows = rows_of(vgs)
    rows[3]["reward"][1] = not rows[3]["reward"][1]
    rows[5]["processed_answer"][0], rows[5]["reward"][0] = "77777", False
    write_rows(spoilt, rows)
    for ending in ("meta.json", "tree.jsonl"):
        sibling(spoilt, ending).write_bytes(sibling(vgs, ending).read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert report.main([str(spoilt), "--regrade", str(tmp_path / "new.jsonl")]) == 0
    printed = capsys.readouterr().out
    truth = rows_of(vgs)
    changed = sum(a != b for new, old in zip(truth, rows, strict=True)
                  for a, b in zip(new["reward"], old["reward"], strict=True))  # fmt: skip
    assert f"{changed} of 96 rewards changed" in printed
    assert "problem 3, repetition 0, beam 1" in printed
    assert rows_of(tmp_path / "new.jsonl") == truth
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="never overwritten, give a new name"):
        report.main([str(spoilt), "--regrade", str(tmp_path / "new.jsonl")])
    assert report.main([str(tmp_path / "new.jsonl")]) == 0  # with the samples' journal
    assert "no journal" not in capsys.readouterr().out


def test_regrading_without_a_journal_grades_the_stored_answers(tmp_path, capsys):
    path = make_run(tmp_path, "released", released=True)
    rows = rows_of(path)
    good = [row["reward"] for row in rows]
    for row in rows:
        row["reward"] = [False] * len(row["reward"])
    write_rows(path, rows)
    assert report.main([str(path), "--regrade", str(tmp_path / "new.jsonl")]) == 0
    assert [row["reward"] for row in rows_of(tmp_path / "new.jsonl")] == good
    printed = capsys.readouterr().out
    assert f"{sum(map(sum, good))} of 96 rewards changed ({sum(map(sum, good))} now right, 0 now wrong)" in printed
    assert "as stored (no journal" in printed


# --------------------------------------------------------------------------------------------------------------- size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
def test_a_large_run_is_reported_in_bounded_memory(tmp_path):
    """Traces of 16k tokens, 8 candidates, 16 repetitions (110 MB): far less memory than the files have."""
    path = make_run(tmp_path, "large", problems=4, repetitions=16, max_length=16_384, block_size=4096)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 80e6
    code = (  # VmHWM: the peak of this program alone, where ru_maxrss would inherit that of its parent
        f"import report; report.main([{str(path)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout.split()[-1]) * 1024 < 300e6
    largest = max(file.stat().st_size for file in (tmp_path / "out/report_data/run0").iterdir())
    assert largest < 6e6
