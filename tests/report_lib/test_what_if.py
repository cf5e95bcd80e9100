"""A what-if of a run: what is refused, what a replay is given of its files, rows and tables, marks, the plot."""

import csv
import json
import math

import numpy as np
import pytest
from handmade_runs import journal_row, random_lines, result, settings, write_run
from synthetic_runs import make_run

from common_lib.cli import UserError
from eval_lib.calibration import cross_fitted_log_odds, fit_log_odds, log_odds
from eval_lib.grading import Grader
from report_lib.analysis import analyse
from report_lib.answer import first_screen
from report_lib.compare import compare
from report_lib.data import read_run
from report_lib.plots import figures
from report_lib.policies import EXPLORED, VOTES, Policy, all_policies, parse_policy
from report_lib.replay import orders_of
from report_lib.tables import all_tables, comparison_table, terminal_text, write_tables
from report_lib.value import MARK
from report_lib.what_if import (
    EXPLORED_NOTE,
    answer_kinds,
    check_what_if,
    interval_notes,
    mark_frontier,
    recorded_problems,
    what_if,
)
from report_lib.what_if_plots import COLOURS, what_if_figure

CHOSEN = list(map(parse_policy, ["weighted:sure", "majority:2", "majority:certified:0.4@3"]))


def what_if_of(path, policies=()):
    run = read_run(path, "run")
    check_what_if([run], policies)
    with Grader() as grader:
        analysis = analyse(run, grader)
        analysis.what_if = what_if(analysis, policies, grader)
    return analysis


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of a small synthetic run with a journal, so with FLOPs."""
    return what_if_of(make_run(tmp_path_factory.mktemp("run"), problems=8, repetitions=6), CHOSEN)


# ---------------------------------------------------------------------------------------------------------------------
# Policies


@pytest.mark.parametrize(
    ("text", "policy", "again"),
    [
        ("weighted", Policy("weighted"), "weighted"),
        ("log-odds:8", Policy("log-odds", most=8), "log-odds:8"),
        ("bootstrap@8", Policy("bootstrap", most=8), "bootstrap:8"),
        ("majority:none", Policy("majority"), "majority"),
        ("majority:sure@12", Policy("majority", "sure", None, 12), "majority:sure@12"),
        ("weighted:certified", Policy("weighted", "certified", 0.05), "weighted:certified:0.05"),
        ("weighted:certified:0.2@9", Policy("weighted", "certified", 0.2, 9), "weighted:certified:0.2@9"),
        ("best-of-n:beta", Policy("best-of-n", "beta", 0.95), "best-of-n:beta:0.95"),
        ("majority:esc:3", Policy("majority", "esc", 3), "majority:esc:3"),
    ],
)
def test_a_policy_is_read_as_it_is_written(text, policy, again):
    assert parse_policy(text) == policy
    assert policy.text == again and parse_policy(again) == policy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mayority", "there is no vote 'mayority'"), ("", "there is no vote ''"), ("majority:shure", "there is no stop 'shure'"),
        ("majority:0", "'0' is no number|there is no stop '0'"), ("majority:sure@x", "'x' is no number of repetitions"),
        ("majority:8@4", "it has two numbers of repetitions"), ("majority:sure:3", "sure has no parameter"),
        ("majority:sure@", "'' is no number of repetitions"), ("weighted:certified:1", "ALPHA of certified is '1', .* between 0 and 1"),
        ("weighted:certified:x", "ALPHA of certified is 'x'"), ("weighted:beta:nan", "POSTERIOR of beta is 'nan'"),
        ("weighted:esc:2.5", "WINDOW of esc is '2.5', .* whole number"), ("weighted:esc:0", "WINDOW of esc is '0'"),
        ("log-odds:sure", "sure is not known of the vote log-odds"), ("majority:certified:0.1:0.2", "certified has one parameter"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_policy_is_one_line_with_what_is_possible(text, words):
    with pytest.raises(UserError, match=words) as refused:
        parse_policy(text)
    said = str(refused.value)
    assert "\n" not in said and said.startswith(f"--policy {text}: ")
    assert all(name in said for name in (*VOTES, "sure", "certified:ALPHA", "beta:POSTERIOR", "esc:WINDOW"))


def test_explored_are_every_vote_at_every_number_and_all_stops_each_once():
    policies = all_policies([Policy("majority", most=4), Policy("majority", "sure"), Policy("majority", "sure")], 4)
    assert policies[:2] == [Policy("majority"), Policy("majority", "sure")]  # 4 of 4 repetitions is all of them
    assert len(policies) == len(set(policies)) == 5 * 4 + 2 * len(EXPLORED)
    numbers = {(p.vote, p.most or 4) for p in policies if p.stop == "none"}
    assert numbers == {(vote, m) for vote in VOTES for m in range(1, 5)}
    assert {p.stop for p in policies if p.vote == "weighted"} == {"none", "sure", "certified", "beta", "esc"}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def lines_of(counts, **more):
    return [
        result(i, r, len(counts), ["1"], [True], [0.5], **more) for i, count in enumerate(counts) for r in range(count)
    ]


@pytest.mark.parametrize(
    ("lines", "meta", "words"),
    [
        (lines_of([3, 2]), settings(2, 3, 1, 1, 1), "needs a finished run; .* has 5 of 6 searches"),
        (lines_of([3, 2]), None, "needs a finished run; .* has 5 of 6 searches"),
        (lines_of([1, 1]), settings(2, 1, 1, 1, 1), "needs at least 2 repetitions, .* has 1"),
        (
            lines_of([3, 2]),
            settings(2, 3, 1, 1, 1, stop="sure", stop_vote="weighted", alpha=0.05) | {"stopped": {"1": 2}, "stopped_by": {"1": "sure"}},
            "of a run|run of --stop none; problems of .* were stopped early",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_replayed_is_refused_in_one_line(tmp_path, lines, meta, words):
    run = read_run(write_run(tmp_path / "run.jsonl", lines, meta=meta), "run")
    with pytest.raises(UserError, match=words) as refused:
        check_what_if([run], [])
    assert "\n" not in str(refused.value) and str(refused.value).startswith("--what_if ")


def test_several_runs_and_more_repetitions_than_there_are_are_refused(tmp_path):
    run = read_run(write_run(tmp_path / "run.jsonl", lines_of([3, 3])), "run")
    with pytest.raises(UserError, match="--what_if replays one run, and 2 are given"):
        check_what_if([run, run], [])
    with pytest.raises(UserError, match="--policy majority:sure@4: the run has 3 repetitions of each problem"):
        check_what_if([run], [parse_policy("majority:3"), parse_policy("majority:sure@4")])
    check_what_if([run], [parse_policy("majority:sure@3")])


# ---------------------------------------------------------------------------------------------------------------------
# What a replay is given


def test_answers_that_are_equal_only_by_way_of_others_are_kinds_of_their_own():
    answers = [["42", "7", ""], ["42\\%", "0.42", "7.0"], ["07", "7", "42"]]
    with Grader() as grader:
        classes = iter(grader.answer_classes([word for row in answers for word in row]))
        numbers = [[next(classes) for _ in row] for row in answers]
        kinds, equal = answer_kinds(answers, numbers, grader)
    number, seven, percent, share = kinds[0][0], kinds[0][1], kinds[1][0], kinds[1][1]
    assert kinds == [[number, seven, -1], [percent, share, seven], [seven, seven, number]]
    assert len({number, seven, percent, share}) == 4 == len(equal)
    related = {frozenset((i, j)) for i in range(4) for j in range(4) if i != j and equal[i, j]}
    assert related == {frozenset((number, percent)), frozenset((percent, share))}
    assert (equal == equal.T).all() and equal.diagonal().all()


def test_a_search_costs_what_its_line_and_its_tree_say(tmp_path):
    lines = [
        result(0, r, 1, ["1"], [True], [0.5], tokens_generated=10 + r, tokens_scored=20 + r, tokens_cached=0,
               generated_ids=[[5] * 2])
        for r in range(2)
    ]  # fmt: skip
    journal = [journal_row(0, r, 0, [0], [2], [0.5], [True], ["stop"], ["text"]) for r in range(2)]
    path = write_run(tmp_path / "run.jsonl", lines, journal, settings(1, 2, 1, 1, 1, search_type="bon"))
    with Grader() as grader:
        analysis = analyse(read_run(path, "run"), grader)
        (problem,) = recorded_problems(analysis, grader)
    assert problem.costs[:2].tolist() == [[10, 11], [20, 21]]
    assert problem.costs[2].tolist() == [sum(costs.values()) for costs in analysis.flops_by_problem[0]]
    assert problem.costs[2, 0] < problem.costs[2, 1]  # more was scored
    bare = what_if_of(write_run(tmp_path / "bare.jsonl", lines_of([2, 2])))
    assert bare.what_if.basis == "repetitions"
    assert {(row["tokens_generated"], row["flops"], row["saved"]) for row in bare.what_if.rows} == {(None, None, None)}


def test_log_odds_are_learnt_from_other_problems_only():
    rng = np.random.default_rng(0)
    problems = np.repeat(np.arange(7), 30)
    values = rng.uniform(0.02, 0.98, len(problems))
    right = rng.random(len(problems)) < 1 / (1 + np.exp(-(0.5 - 1.5 * log_odds(values))))  # the values are upside down
    found = cross_fitted_log_odds(right, values, problems)
    folds = {}
    for problem in range(7):
        own = problems == problem
        slopes = np.diff(found[own]) / np.diff(log_odds(values[own]))
        assert np.ptp(slopes) < 1e-6 and slopes.mean() < -0.8
        folds.setdefault(round(slopes.mean(), 9), []).append(problem)
        # Its own answers change nothing of it, and those of a problem in another fold do.
        assert (cross_fitted_log_odds(right ^ own, values, problems)[own] == found[own]).all()
        assert (cross_fitted_log_odds(right ^ ~own, values, problems)[own] != found[own]).all()
    assert sorted(map(len, folds.values())) == [1, 1, 1, 2, 2]


def test_the_fit_is_where_the_penalised_likelihood_is_highest():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=80)
    labels = rng.random(80) < 1 / (1 + np.exp(-(1 + 2 * scores)))

    def loss(a, b):
        odds = [a + b * x for x in scores]
        return (
            sum(math.log(1 + math.exp(x)) - label * x for x, label in zip(odds, labels, strict=True))
            + (a**2 + (b - 1) ** 2) / 2
        )

    best = fit_log_odds(labels, scores)
    for step in (0.01, -0.01):
        assert loss(*best) < min(loss(best[0] + step, best[1]), loss(best[0], best[1] + step))
    assert fit_log_odds([], []) == (0.0, 1.0)
    alone = fit_log_odds([True] * 50, log_odds([0.0] * 50))  # far off, and one kind of label
    assert np.isfinite(alone).all() and abs(alone[0]) < 10
    assert log_odds([0.0, 0.5, 1.0]).tolist() == pytest.approx([-math.log(9999), 0.0, math.log(9999)])


# ---------------------------------------------------------------------------------------------------------------------
# Rows, tables, first screen


def test_rows_are_means_over_problems_of_means_over_orders(found):
    """At two repetitions: cost and majority of every seeded order, from the lines."""
    what, run, row = found.what_if, found.run, found.what_if.row("majority:2")
    assert (row["chosen"], row["most"], row["stopped_early"], row["false_stops"]) == (True, 2, None, None)
    tokens, right = [], []
    for data_idx, lines in run.by_problem.items():
        pairs = orders_of(data_idx, 6)[1:, :2]
        tokens.append(np.mean([sum(lines[r]["tokens_generated"] for r in pair) for pair in pairs]))
        votes = []
        for pair in pairs:
            beams = [
                (a, r) for i in pair for a, r in zip(lines[i]["processed_answer"], lines[i]["reward"], strict=True) if a
            ]
            counts = {a: sum(b == a for b, _ in beams) for a, _ in beams}  # whole numbers: strings are classes
            won = [a for a in counts if counts[a] == max(counts.values())]
            votes.append(np.mean([dict(beams)[a] for a in won]) if won else 0.0)
        right.append(np.mean(votes))
    assert row["tokens_generated"] == pytest.approx(np.mean(tokens))
    assert row["accuracy"] == pytest.approx(np.mean(right))
    assert row["ci"] == pytest.approx(2.364624 * np.std(right, ddof=1) / math.sqrt(8), rel=1e-5)
    whole = what.row("majority")
    assert row["saved"] == pytest.approx(1 - row["tokens_generated"] / whole["tokens_generated"])
    assert whole["recorded"]["generated"] == sum(line["tokens_generated"] for line in run.lines)
    assert row["recorded"]["scored"] == sum(line["tokens_scored"] for line in run.lines if line["repeat_idx"] < 2)
    assert whole["flops"] == pytest.approx(6 * found.flops["flops"])
    assert row["against_all"]["difference"] == pytest.approx(row["accuracy"] - whole["accuracy"])
    assert row["against_all"]["problems"] == 8
    assert [r["policy"] for r in what.rows if "against_all" in r] == [p.text for p in CHOSEN]
    for vote, metric in (("majority", "maj"), ("weighted", "wmaj"), ("best-of-n", "bon")):
        assert what.row(vote)["accuracy"] == pytest.approx(found.rows[-1][f"{metric}_m"])
        assert what.row(vote)["same_answer"] == 1


def test_the_frontier_is_what_nothing_cheaper_is_as_right_as():
    points = [(1, 0.5), (1, 0.6), (2, 0.6), (3, 0.9), (3, 0.9), (4, 0.8), (5, 0.95)]
    rows = [{"cost": cost, "accuracy": accuracy} for cost, accuracy in points]
    mark_frontier(rows, "cost")
    assert [row["frontier"] for row in rows] == [False, True, False, True, False, False, True]


def test_chosen_and_exploratory_policies_are_told_apart_in_tables_text_and_files(found, tmp_path):
    tables = {table.title.split(":")[0]: table for table in all_tables([found], [])}
    chosen, explored = tables["What if, chosen beforehand"], tables["What if, exploratory"]
    names = [[cells[0].rstrip("*") for cells in table.rows] for table in (chosen, explored)]
    assert names[0] == [policy.text for policy in CHOSEN]
    assert set(names[0]).isdisjoint(names[1]) and {"weighted", "majority:sure", "weighted:beta:0.95"} <= set(names[1])
    assert EXPLORED_NOTE in explored.notes and EXPLORED_NOTE not in chosen.notes
    every = {table.title.split(":")[0]: table for table in all_tables([found], [], all_rows=True)}
    assert len(every["What if, exploratory"].rows) == len(found.what_if.rows) - 3
    assert f"{len(explored.rows)} of {len(found.what_if.rows) - 3} exploratory policies are shown" in explored.notes[-1]
    write_tables(tmp_path, [found], [])
    rows = list(csv.DictReader((tmp_path / "what_if.csv").open()))
    assert [row["policy"] for row in rows] == [row["policy"] for row in found.what_if.rows]
    assert [row["policy"] for row in rows if row["chosen"] == "True"] == names[0]
    saved = json.loads((tmp_path / "table.json").read_text())["runs"][0]["what_if"]
    assert saved == json.loads(json.dumps(found.what_if.rows))
    what, found.what_if = found.what_if, None
    write_tables(tmp_path, [found], [])
    found.what_if = what
    assert not (tmp_path / "what_if.csv").exists()


def test_intervals_that_deserve_little_trust_are_told_of(found, monkeypatch):
    first, second = found.what_if.chosen[0] | {"warning": "3 of 8 problems carry it"}, found.what_if.chosen[1]
    assert second["warning"] is None
    assert interval_notes([first, second]) == [f"{first['policy']}: few of 8 problems carry it."]
    assert interval_notes([first, second | {"warning": "2 of 8 problems carry it"}]) == [
        "all rows: few of 8 problems carry it."
    ]
    monkeypatch.setitem(found.what_if.chosen[0], "warning", first["warning"])
    shown = next(table for table in all_tables([found], []) if table.title.startswith("What if, chosen"))
    assert interval_notes([first, second])[0] in shown.notes


def test_the_first_screen_says_what_was_chosen_or_that_nothing_was(found, tmp_path):
    answer = next(part for part in first_screen([found], []) if part.title == "What if run had been stopped earlier?")
    assert answer.plot == "what_if" and len(answer.sentences) == 3
    sure = found.what_if.row("weighted:sure")
    assert answer.sentences[0] == (
        f"weighted:sure answers as all 6 repetitions do on every problem, with {100 * sure['saved']:.0f} % fewer tokens generated "
        f"({sure['repetitions']:.1f} repetitions): {100 * sure['accuracy']:.1f}% right against {100 * sure['accuracy']:.1f}%."
    )
    two = found.what_if.row("majority:2")
    against = two["against_all"]
    assert 0 < two["same_answer"] < 1
    assert f"on {100 * two['same_answer']:.1f}% of the problems" in answer.sentences[1]
    assert f"{100 * against['difference']:.1f} points (95 % interval " in answer.sentences[1]
    assert answer.chosen.startswith(
        "Chosen beforehand (--policy): weighted:sure, majority:2, majority:certified:0.4@3. The other "
    )
    assert (
        f"The other {len(found.what_if.rows) - 3} policies of the table and the plot are exploratory" in answer.chosen
    )
    none = what_if_of(write_run(tmp_path / "run.jsonl", random_lines(3)))
    text = " ".join(terminal_text([none], []).split())
    assert "None was chosen beforehand (--policy). All 34 policies of the table and the plot are exploratory" in text
    assert "weighted:sure answers as all 4 repetitions do on every problem (" in text
    assert "What if, chosen beforehand" not in text
    few = what_if_of(write_run(tmp_path / "run.jsonl", random_lines(3, 3, 4)), [parse_policy("weighted:sure")])
    assert first_screen([few], [])[1].mind == [
        "For weighted:sure, only 3 problems: the interval is no more than a hint."
    ]


def test_the_plot_has_a_point_a_policy_and_numbers_those_chosen_beforehand(found, monkeypatch):
    figure = what_if_figure(found)
    (axis,) = figure.axes
    points = {}
    for line in axis.lines:
        if line.get_linestyle() == "None" and len(line.get_xdata()) == 1 and line.get_marker() in "osD^v":
            points.setdefault((line.get_xdata()[0], line.get_ydata()[0]), []).append(line)
    for row in found.what_if.rows:
        at = points[row["tokens_generated"], row["accuracy"]]
        hollow = {line.get_markerfacecolor() == "white" for line in at if line.get_color() == COLOURS[row["vote"]]}
        assert (not row["chosen"]) in hollow, row["policy"]
    numbers = {text.get_text(): text.xy for text in axis.texts}
    assert numbers == {
        str(n): (row["tokens_generated"], row["accuracy"]) for n, row in enumerate(found.what_if.chosen, 1)
    }
    words = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert words[1] == ["1 weighted:sure", "2 majority:2", "3 majority:certified:0.4@3"]
    assert "frontier (exploratory)" in words[0]
    steps = next(line for line in axis.lines if line.get_drawstyle() == "steps-post")
    assert list(steps.get_ydata()) == sorted({row["accuracy"] for row in found.what_if.rows if row["frontier"]})
    monkeypatch.setattr(found, "what_if", None)
    assert what_if_figure(found) is None
    assert {stem: draw() for stem, _, draw in figures([found]) if stem == "what_if"} == {"what_if": None}


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def test_votes_by_values_without_evidence_are_marked_in_tables_and_answers(tmp_path):
    """The same answers with values that know which are right, and with values that do not."""
    rng = np.random.default_rng(0)
    runs = {}
    for name, informed in (("known", 0.8), ("noise", 0.0)):
        lines = []
        for i in range(12):
            for r in range(4):
                right = rng.random(4) < 0.5
                values = np.round(rng.uniform(0, 0.2, 4) + informed * right, 3)
                lines.append(result(i, r, 12, ["1" if x else "2" for x in right], right.tolist(), values.tolist()))
        runs[name] = write_run(tmp_path / f"{name}.jsonl", lines, meta=settings(12, 4, 4, 4, 1, search_type="bon"))
    for name, marks in (("known", False), ("noise", True)):
        analysis = what_if_of(runs[name], [parse_policy("weighted:sure"), parse_policy("majority:sure")])
        text = terminal_text([analysis], [])
        assert (MARK in text) == marks
        tables = all_tables([analysis], [])
        assert [("weighted" + MARK in table.columns, "majority" in table.columns) for table in tables[:1]] == [
            (marks, True)
        ]
        cells = [row[0].rstrip("*") for table in tables if table.title.startswith("What if") for row in table.rows]
        assert [MARK in cell for cell in cells] == [marks and not cell.startswith("majority") for cell in cells]
        note = f"{MARK} run: no evidence that its values tell right from wrong on these problems"
        assert any(part.startswith(note) for part in first_screen([analysis], [])[0].mind) == marks
        found = first_screen([analysis], [])
        assert sum(part.startswith(note) for answer in found for part in answer.mind) == marks
        runs[name] = analysis
    comparison = compare(runs["known"], runs["noise"])
    labels = {row[2] for row in comparison_table(comparison, False, {"noise run"}).rows}
    assert {"weighted", "best-of-N", "majority"} <= labels
    labels = {row[2] for row in comparison_table(comparison | {"other": "noise run"}, False, {"noise run"}).rows}
    assert {f"weighted / weighted{MARK}", f"best-of-N / best-of-N{MARK}", "majority", "pass@k"} <= labels
