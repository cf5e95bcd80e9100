"""Costs, times and comparisons of runs that are small enough to count by hand."""

import json

import pytest
from handmade_runs import close, journal_row, random_lines, result, settings, write_run
from synthetic_runs import analysis_of

from eval_lib.tables import short
from report_lib.compare import common_problems, compare
from report_lib.data import read_run
from report_lib.tables import all_tables, comparison_cells, comparison_table, terminal_text, to_json

# The generator of `handmade_runs.SHAPE`: 3 layers x (8 x 2 x (2 x 4 + 2 x 2) + 3 x 8 x 16) + 8 x 10 weights; the value
# model has a head of 8 x (8 + 3) in place of the 8 x 10.
PER_TOKEN, VALUE_PER_TOKEN, PER_CONTEXT = 2 * 1808, 2 * 1816, 4 * 3 * 4 * 2
SPENT = {"tokens_generated": 13, "prompt_tokens": 3, "finish_reasons": ["stop"], "tokens_reread": 0}


def two_rounds(data_idx, repeat_idx, scored, cached):
    """Prompt of 3 tokens; two candidates of 4 tokens, the first kept; from it two that stop after 3 and 2, the first kept."""
    line = result(data_idx, repeat_idx, 2, ["1"], [True], [0.75], dt=10.0, generated_ids=[[5] * 7], **SPENT)
    line |= {"tokens_scored": scored, "tokens_cached": cached, "seconds_generate": 3.0, "seconds_score": 0.75}
    rows = [
        journal_row(data_idx, repeat_idx, 0, [0, 0], [4, 4], [0.5, 0.25], [1, 0], ["", ""], ["a", "b"],
                    seconds_generate=1.0, seconds_score=0.5),
        journal_row(data_idx, repeat_idx, 1, [1, 1], [3, 2], [0.75, 0.7], [1, 0], ["stop", "stop"], ["c", "\\boxed{2}"],
                    seconds_generate=2.0, seconds_score=0.25),
    ]  # fmt: skip
    return line, rows


def one_round(data_idx, repeat_idx):
    """Two candidates of 4 tokens that stop at once, of which the second is kept."""
    line = result(data_idx, repeat_idx, 2, ["2"], [False], [0.9], dt=4.0, generated_ids=[[5] * 4],
                  finish_reasons=["length"], tokens_generated=8, tokens_scored=11, tokens_cached=0,
                  seconds_generate=2.0, seconds_score=1.5)  # fmt: skip
    text = ["\\boxed{1}", "\\boxed{2}"]
    rows = [journal_row(data_idx, repeat_idx, 0, [0, 0], [4, 4], [0.1, 0.9], [0, 1], ["stop", "length"], text,
                        seconds_generate=2.0, seconds_score=1.5)]  # fmt: skip
    return line, rows


def sessions(*seconds):
    return [
        {"started": "s", "ended": None if s is None else "e", "seconds": s or 0.0, "hardware": f"machine {i}"}
        for i, s in enumerate(seconds)
    ]


def make(tmp_path, spent_sessions, unfinished=False):
    """Problem 0 searched twice, problem 1 once; 34 tokens generated, and 8 more in a search that is under way."""
    parts = [two_rounds(0, 0, 24, 5), two_rounds(0, 1, 16, 0), one_round(1, 0)]
    lines, journal = [line for line, _ in parts], [row for _, rows in parts for row in rows]
    if unfinished:
        journal += two_rounds(1, 1, 0, 0)[1][:1]
    meta = settings(2, 2, 2, 1, 2) | {"sessions": spent_sessions}
    return analysis_of(write_run(tmp_path / "run.jsonl", lines, journal, meta))


DECODE = 13 * PER_TOKEN + (2 * (4 + 5 + 6 + 7) + (8 + 9 + 10) + (8 + 9)) * PER_CONTEXT
PREFILL = (3 + 3 + 7 + 7) * PER_TOKEN + (6 + 6 + 28 + 28) * PER_CONTEXT
SCORE = (3 + 13) * VALUE_PER_TOKEN + (6 + 88) * PER_CONTEXT
SHORT_DECODE, SHORT_PREFILL = 8 * PER_TOKEN + 44 * PER_CONTEXT, 6 * PER_TOKEN + 12 * PER_CONTEXT
SHORT_SCORE = 11 * VALUE_PER_TOKEN + (6 + 44) * PER_CONTEXT


def test_costs_are_means_over_problems_of_means_over_repetitions(tmp_path):
    rows = make(tmp_path, sessions(30.0)).rows
    expected = {
        "tokens_generated": (13 + 8) / 2,
        "tokens_scored": (20 + 11) / 2,
        "seconds": (10 + 4) / 2,
        "truncated": 1 / 3,
        "empty": 0.0,
        "flops_decode": (DECODE + SHORT_DECODE) / 2,
        # 5 of the 20 prompt tokens of the first search's requests were cached
        "flops_prefill": ((0.75 * PREFILL + PREFILL) / 2 + SHORT_PREFILL) / 2,
        # 24 tokens were scored where the search has 16
        "flops_score": ((1.5 * SCORE + SCORE) / 2 + SHORT_SCORE) / 2,
    }
    close({key: rows[0][key] for key in expected}, expected)
    assert rows[0]["flops"] == pytest.approx(sum(expected[key] for key in expected if key.startswith("flops")))
    # Two pooled: problem 0 alone has them.
    assert (rows[1]["problems"], rows[1]["missing"]) == (1, 1)
    close([rows[1][key] for key in ("tokens_generated", "tokens_scored", "seconds")], [26.0, 40.0, 20.0])


def test_problems_without_a_finished_search_are_missing_in_the_table(tmp_path):
    """The settings say how many problems there are."""
    line, rows = two_rounds(0, 0, 24, 5)
    path = write_run(tmp_path / "run.jsonl", [line], rows, settings(3, 1, 2, 1, 2))
    row = analysis_of(path).rows[0]
    assert (row["problems"], row["missing"]) == (1, 2)
    assert "2 of 3 problems lack 1 repetition" in row["note"]


def test_costs_are_shown_under_their_names(tmp_path):
    analysis = make(tmp_path, sessions(30.0))
    tables = {table.title.partition(":")[0]: table for table in all_tables([analysis], [])}
    cost, flops = (
        tables["Cost of one problem"],
        tables["FLOPs of one problem, generator (decode, prefill) and value model"],
    )
    assert dict(zip(cost.columns, cost.rows[0], strict=True)) == {
        "N": "2", "pooled": "1", "problems": "2", "generated": "10", "scored": "16", "seconds": "7.0",
        "length-limited": "33.3%", "empty": "0.0%",
    }  # fmt: skip
    row = analysis.rows[0]
    assert flops.rows[0][2:] == [short(row[f"flops{name}"]) for name in ("_decode", "_prefill", "_score", "")]
    assert len(set(flops.rows[0][2:])) == 4


def test_flops_by_problem_are_what_a_comparison_is_given(tmp_path):
    given = make(tmp_path, sessions(30.0))
    assert given.costs["tokens"] == {0: 13.0, 1: 8.0}
    close(given.costs["flops"][0], float(DECODE + 0.875 * PREFILL + 1.25 * SCORE))
    close(given.costs["flops"][1], float(SHORT_DECODE + SHORT_PREFILL + SHORT_SCORE))
    assert given.scores[0]["pass1"] == [1.0, 1.0]
    assert given.scores[1]["pass1"] == [0.0]


def test_seconds_go_to_rounds_and_to_waiting(tmp_path):
    analysis = make(tmp_path, sessions(30.0))
    # three searches; the second round has two of them
    close(analysis.rounds, [
        {"generate": (1 + 1 + 2) / 3, "score": (0.5 + 0.5 + 1.5) / 3},
        {"generate": (2 + 2) / 3, "score": 0.5 / 3},
    ])  # fmt: skip
    assert analysis.waiting == pytest.approx((10 + 10 + 4 - 3.75 - 3.75 - 3.5) / 3)


def test_wall_clock_is_that_of_all_sessions_and_tokens_those_of_all_searches(tmp_path):
    analysis = make(tmp_path, sessions(30.0, 12.0), unfinished=True)
    assert analysis.seconds == 42.0
    assert analysis.tokens_generated == 13 + 13 + 8 + 8
    assert analysis.tokens_per_second == 1.0
    text = " ".join(terminal_text([analysis], []).split())
    assert "wall-clock 42 s in 2 session(s) on machine 0, machine 1, 1 tokens generated per second" in text
    killed = make(tmp_path, sessions(30.0, None, 12.0))
    assert (killed.seconds, killed.tokens_per_second) == (None, None)
    assert to_json(killed)["wall_clock_seconds"] is None


def test_an_unfinished_search_costs_nothing_yet_and_the_run_is_partial(tmp_path):
    whole, more = make(tmp_path, sessions(1.0)), make(tmp_path, sessions(1.0), unfinished=True)
    close(more.rows, whole.rows)
    assert "run: PARTIAL, 3 of 4 searches finished; 2 problems, 1 to 2 repetitions of each" in more.notes


def test_a_search_without_journal_leaves_no_flops_and_is_said(tmp_path):
    parts = [two_rounds(0, 0, 24, 5), one_round(1, 0)]
    path = write_run(tmp_path / "run.jsonl", [line for line, _ in parts], parts[0][1], settings(2, 1, 2, 1, 2))
    analysis = analysis_of(path)
    assert analysis.flops is None
    assert [row["flops"] for row in analysis.rows] == [None]
    assert "run: 1 finished searches are not in the journal: only their final beams are shown" in analysis.notes
    assert any(note.startswith("run: no FLOPs (") for note in analysis.notes)


def test_where_only_a_rejected_candidate_was_right(tmp_path):
    """Problem 1: the box of the rejected candidate holds the truth, that of the final beam does not."""
    analysis = make(tmp_path, sessions(1.0))
    assert analysis.pruned_right == 1
    assert [row["rescued"] for row in analysis.problems] == [0, 1]
    assert "in 1 of 3 searches a rejected, finished candidate was right" in " ".join(
        note for table in all_tables([analysis], []) for note in table.notes
    )


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def scored_run(tmp_path, name, num_blocks, tokens, right, **more):
    """A run of 6 problems; `right`: repetitions x problems; each search generates `tokens` x (1 + its problem)."""
    repetitions = len(right)
    lines = [
        result(i, r, 6, [("1" if good else "2")], [good], [0.5], tokens_generated=tokens * (i + 1))
        for r, row in enumerate(right)
        for i, good in enumerate(row)
    ]
    return write_run(tmp_path / f"{name}.jsonl", lines, meta=settings(6, repetitions, num_blocks, 1, 2, **more))


LEFT = [[1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1], [1, 1, 1, 0, 1, 1]]
RIGHT = [[0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 0, 1]]


def test_equal_n_and_equal_tokens_by_hand(tmp_path):
    one = analysis_of(scored_run(tmp_path, "one", 2, 100, [list(map(bool, row)) for row in LEFT]))
    other = analysis_of(scored_run(tmp_path, "other", 4, 150, [list(map(bool, row)) for row in RIGHT]))
    found = compare(one, other)
    assert (found["one"], found["other"]) == ("one", "other")
    budgets = {
        (row["basis"], round(row["budget"], 6), round(row["pooled_one"], 6), round(row["pooled_other"], 6))
        for row in found["rows"]
    }
    # N: 2, 4, 6, 8 against 4, 8. Tokens a problem: 350 x (1 .. 4) against 525 x (1, 2).
    assert budgets == {("N", 4, 2, 1), ("N", 8, 4, 2), ("tokens", 525, 1.5, 1), ("tokens", 1050, 3, 2)}
    pass1 = next(row for row in found["rows"] if row["metric_one"] == "pass1")
    assert pass1["one"] == pytest.approx((1 + 1 + 1 + 0 + 0.5 + 1) / 6)
    assert pass1["other"] == pytest.approx((0 + 0.5 + 1 + 0 + 0 + 1) / 6)
    assert pass1["difference"] == pytest.approx((1 + 0.5 + 0 + 0 + 0.5 + 0) / 6)
    # Any of two of problem 4's four: each window of two holds one right; of one and a half: halfway.
    by_basis = {(row["basis"], row["metric_one"], round(row["budget"])): row for row in found["rows"]}
    assert by_basis["N", "pass", 4]["one"] == pytest.approx(5 / 6)
    assert by_basis["tokens", "pass", 525]["one"] == pytest.approx((4 + 0.75) / 6)
    assert by_basis["tokens", "pass", 525]["difference"] == pytest.approx((4.75 - 2.5) / 6)
    assert any("FLOPs are not known of both runs" in words for words in found["missing"])
    cells = comparison_table(found, brief=False).rows
    assert cells[0][:3] == ["any", "any", "pass@1"]
    assert [row[:2] for row in cells].count(["any", "any"]) == 1
    assert (cells[0][3], cells[0][4]) == ("75.0", "41.7")
    assert cells[0][5].startswith("+33.3")
    assert [row[:3] for row in cells[1:3]] == [["N", "4", "pass@k"], ["N", "4", "best-of-N"]]
    back = compare(other, one)
    assert {row["difference"] for row in back["rows"]} == {-row["difference"] for row in found["rows"]}
    assert comparison_table(back, brief=False).rows[0][5].startswith("-33.3")


def test_budgets_are_costs_of_the_common_problems(tmp_path):
    """Each run's own cost of them, whatever their numbers are there: problems 3, 4, 5 are the other's 2, 1, 0."""
    rewards = [list(map(bool, row)) for row in LEFT]
    paths = [scored_run(tmp_path, name, 2, 100, rewards) for name in ("one", "other")]
    lines = [json.loads(line) for line in paths[1].read_text().splitlines()]
    lines = [
        line | {"problem": f"problem {5 - line['data_idx']}" if line["data_idx"] < 3 else "none"} for line in lines
    ]
    lines = [line | {"problem": f"other {line['data_idx']}"} if line["problem"] == "none" else line for line in lines]
    write_run(paths[1], lines)
    rows = compare(*map(analysis_of, paths))["rows"]
    tokens = [row for row in rows if row["basis"] == "tokens"]
    # 100 x (4 + 5 + 6) / 3 against 100 x (1 + 2 + 3) / 3 a repetition
    assert min(row["budget"] for row in tokens) == pytest.approx(500)
    assert {round(row["pooled_one"], 6): round(row["pooled_other"], 6) for row in tokens}[1.0] == 2.5
    assert {row["problems"] for row in rows} == {3}


def test_a_baseline_of_samples_is_also_compared_by_its_plain_vote(tmp_path):
    rewards = [list(map(bool, row)) for row in LEFT]
    search = analysis_of(scored_run(tmp_path, "search", 2, 100, rewards))
    samples = analysis_of(scored_run(tmp_path, "samples", 2, 100, rewards, search_type="bon"))
    mixed = [{(row["metric_one"], row["metric_other"]) for row in compare(*pair)["rows"]} for pair in
             ((search, samples), (samples, search), (samples, samples))]  # fmt: skip
    plain = {(name, name) for name in ("pass1", "pass", "bon", "maj", "wmaj")}
    assert mixed == [plain | {("wmaj", "maj")}, plain | {("maj", "wmaj")}, plain]


def test_problems_are_paired_by_their_text_each_once(tmp_path):
    lines = [line for line in random_lines(0) if line["repeat_idx"] == 0]
    texts = ["a  b", "twice", "twice", "c", "d", "e"]
    other_texts = ["twice", "e", "a\nb ", "twice", "twice", "f"]
    paths = [
        write_run(tmp_path / f"{name}.jsonl", [line | {"problem": words[line["data_idx"]]} for line in lines])
        for name, words in (("one", texts), ("other", other_texts))
    ]
    assert common_problems(*(read_run(path, path.stem) for path in paths)) == [(0, 2), (1, 0), (2, 3), (5, 1)]


def test_the_terminal_shows_votes_at_the_extreme_budgets_and_the_files_all(tmp_path):
    paths = [scored_run(tmp_path, name, 2, 100, [list(map(bool, row)) for row in LEFT]) for name in ("one", "other")]
    found = compare(*map(analysis_of, paths))
    brief, whole = ([row[:3] for row in comparison_table(found, brief).rows] for brief in (True, False))
    assert brief == [["any", "any", "pass@1"]] + [
        [basis, budget, vote] for basis, budgets in (("N", "28"), ("tokens", ["350", "1.4k"])) for budget in budgets
        for vote in ("majority", "weighted")
    ]  # fmt: skip
    assert [row for row in whole if row[2] == "pass@k"] == [
        ["N", "2", "pass@k"], ["N", "4", "pass@k"], ["N", "8", "pass@k"], ["tokens", "350", "pass@k"],
        ["tokens", "700", "pass@k"], ["tokens", "1.4k", "pass@k"],
    ]  # fmt: skip


def test_small_p_values_are_bounds_and_unknown_ones_dashes():
    row = {"basis": "N", "budget": 8, "metric_one": "maj", "metric_other": "maj", "one": 0.5, "other": 0.25}
    row |= {"difference": 0.25, "ci": 0.1}
    assert [comparison_cells(row | {"p_value": p})[-1] for p in (0.0009, 0.001, None)] == ["<0.001", "0.001", "–"]


def test_other_reference_answers_are_warned_of(tmp_path):
    paths = [write_run(tmp_path / "one.jsonl", random_lines(0)), write_run(tmp_path / "other.jsonl", random_lines(1))]
    rows = [json.loads(line) | {"gt_answer": "1"} for line in paths[1].read_text().splitlines()]
    rows = [row | {"gt_answer": "7"} if row["data_idx"] in (2, 5) else row for row in rows]
    write_run(paths[1], rows)
    note = compare(*(analysis_of(path) for path in paths))["note"]
    assert "WARNING: 2 of them have different reference answers" in note
