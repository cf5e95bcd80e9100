"""The report against another computation of the same figures, and against the same run numbered otherwise."""

import itertools
import json
import math
from fractions import Fraction

import pytest
from handmade_runs import close, random_lines, read_data, write_run
from synthetic_runs import make_pair, make_run, rows_of, write_rows

import report
from eval_utils import pass_at_k
from report_lib.data import read_run, run_names
from search_lib.run_reader import RunPaths

T_95 = {2: 4.302653, 3: 3.182446, 4: 2.776445, 5: 2.570582}  # Student's t by degrees of freedom
METRICS = ("pass1", "pass", "bon", "maj", "wmaj")


def write_report(paths, out, num_blocks=None):
    """Everything but plots; returns table.json."""
    runs = [read_run(path, name, num_blocks) for path, name in zip(paths, run_names(paths), strict=True)]
    report.write_report(out, runs, None, lambda folder, analyses: [])
    return json.loads((out / "table.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Votes and intervals, in exact fractions


def class_of(answer):
    return int(float(answer)) if answer else None


def exact(fractions, total=0):
    return sum(fractions, Fraction(total))


def share_of_heaviest(beams, weigh):
    """beams: (class, is it right, value). Share of right among the heaviest classes, each by its own weight."""
    groups = {}
    for number, right, value in beams:
        if number is not None:
            groups.setdefault(number, []).append((right, weigh(value)))
    weights = {number: exact(weight for _, weight in members) for number, members in groups.items()}
    heaviest = max(weights.values(), default=Fraction(0))
    if not heaviest:
        return None
    won = [number for number, weight in weights.items() if weight == heaviest]
    return exact(exact(weight for right, weight in groups[n] if right) / heaviest for n in won) / len(won)


def votes(beams):
    """Every metric of some beams."""
    majority = share_of_heaviest(beams, lambda value: Fraction(1))
    weighted = share_of_heaviest(beams, Fraction)
    values = [value for number, _, value in beams if number is not None]
    best = [right for number, right, value in beams if number is not None and value == max(values)]
    return {
        "pass1": Fraction(sum(right for _, right, _ in beams), len(beams)),
        "pass": Fraction(any(right for _, right, _ in beams)),
        "bon": Fraction(sum(best), len(best)) if best else Fraction(0),
        "maj": majority or Fraction(0),
        "wmaj": (majority if weighted is None else weighted) or Fraction(0),
    }


def pooled(searches, m, starts):
    """Votes of the windows that begin there: m repetitions on, round and round."""
    return [
        votes([beam for k in range(m) for beam in searches[(start + k) % len(searches)]]) for start in starts
    ]  # fmt: skip


def spread(values):
    """Standard deviation, n - 1 below."""
    mean = exact(values) / len(values)
    return math.sqrt(exact((value - mean) ** 2 for value in values) / (len(values) - 1))


def searches_of(lines):
    """By problem, the beams of each repetition in order."""
    found = {}
    for line in sorted(lines, key=lambda line: (line["data_idx"], line["repeat_idx"])):
        beams = zip(map(class_of, line["processed_answer"]), line["reward"], line["generated_scores"], strict=True)
        found.setdefault(line["data_idx"], []).append(list(beams))
    return found


def expected_row(by_problem, m):
    """Means, half-widths over problems, and half-widths over disjoint groups of repetitions."""
    having = [searches for searches in by_problem.values() if len(searches) >= m]
    groups = min(len(searches) // m for searches in having)
    row = {}
    for metric in METRICS:
        means, by_group = [], []
        for searches in having:
            starts = range(len(searches)) if m < len(searches) else [0]
            scores = [found[metric] for found in pooled(searches, m, starts)]
            means.append(exact(scores) / len(scores))
            by_group.append([found[metric] for found in pooled(searches, m, [g * m for g in range(groups)])])
        noise = [exact(scores) / len(scores) for scores in zip(*by_group, strict=True)]
        row[f"{metric}_m"] = float(exact(means) / len(means))
        row[f"{metric}_ci"] = T_95[len(means) - 1] * spread(means) / math.sqrt(len(means))
        row[f"{metric}_ci_repeat"] = 1.96 * spread(noise) / math.sqrt(groups) if groups > 1 else None
    return row


@pytest.mark.parametrize("seed", range(4))
def test_votes_and_intervals_are_those_of_exact_fractions(tmp_path, seed):
    """Six repetitions: two and three pooled make three and two disjoint groups, which are not windows that overlap."""
    lines = random_lines(seed, repetitions=6)
    rows = write_report([write_run(tmp_path / "run.jsonl", lines)], tmp_path / "out", num_blocks=7)["runs"][0]["table"]
    assert [(row["N"], row["pooled"], row["problems"]) for row in rows] == [(7 * m, m, 6) for m in range(1, 7)]
    searches = searches_of(lines)
    for m, row in enumerate(rows, start=1):
        expected = expected_row(searches, m)
        close({key: row[key] for key in expected}, expected, f"pooled {m}", rel=1e-6)
    assert all(row["maj_ci_repeat"] is not None for row in rows[:3])
    assert rows[3]["maj_ci_repeat"] is None


def test_problems_that_lack_repetitions_count_where_they_have_them(tmp_path):
    lines = [
        line for line in random_lines(7, problems=6, repetitions=5) if line["repeat_idx"] < (5, 3, 5, 2, 5, 4)[line["data_idx"]]
    ]  # fmt: skip
    found = write_report([write_run(tmp_path / "run.jsonl", lines)], tmp_path / "out", num_blocks=3)["runs"][0]
    assert [row["problems"] for row in found["table"]] == [6, 6, 5, 4, 3]
    assert (found["partial"], found["searches"], found["planned"]) == (True, 24, 30)
    searches = searches_of(lines)
    for m, row in enumerate(found["table"], start=1):
        expected = expected_row(searches, m)
        close({key: row[key] for key in expected}, expected, f"pooled {m}", rel=1e-6)


def test_pass_at_k_of_single_beams_is_the_unbiased_estimate_where_all_windows_count(tmp_path):
    """With one beam a search and all repetitions pooled but one, the windows are all subsets of that size."""
    lines = random_lines(3, repetitions=5, beams=1)
    rows = write_report([write_run(tmp_path / "run.jsonl", lines)], tmp_path / "out")["runs"][0]["table"]
    right = [sum(right for beams in searches for _, right, _ in beams) for searches in searches_of(lines).values()]
    for k in (1, 4, 5):
        assert rows[k - 1]["pass_m"] == pytest.approx(sum(pass_at_k(5, count, k) for count in right) / 6)
        subsets = [
            any(beams[0][1] for beams in chosen)
            for searches in searches_of(lines).values()
            for chosen in itertools.combinations(searches, k)
        ]
        assert rows[k - 1]["pass_m"] == pytest.approx(sum(subsets) / len(subsets))


def test_the_list_and_the_page_have_the_votes_of_all_repetitions(tmp_path):
    lines = random_lines(5, beams=4)
    found = write_report([write_run(tmp_path / "run.jsonl", lines)], tmp_path / "out")["runs"][0]
    searches = searches_of(lines)
    for row in found["problems"]:
        beams = [beam for search in searches[row["id"]] for beam in search]
        expected = votes(beams)
        assert {name: row[name] for name in ("maj", "wmaj", "bon", "pass1")} == pytest.approx(
            {name: float(expected[name]) for name in ("maj", "wmaj", "bon", "pass1")}
        )
        assert row["any"] == (expected["pass"] == 1)
        pairs = list(itertools.combinations([number for number, _, _ in beams], 2))
        assert row["disagreement"] == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))
        assert row["empty"] == sum(number is None for number, _, _ in beams) / len(beams)
        assert row["value"] == pytest.approx(sum(value for _, _, value in beams) / len(beams))
        weights = sorted(
            (sum(v for n, _, v in beams if n == number) for number in {n for n, _, _ in beams} - {None}), reverse=True
        )
        margin = (weights[0] - ([*weights, 0.0])[1]) / sum(weights) if sum(weights) else 0.0
        assert row["margin"] == pytest.approx(margin)
        page = read_data(tmp_path / f"out/report_data/run0/p{row['id']}.js")
        for vote, among in [
            (page["vote"], beams),
            *((search["vote"], searches[row["id"]][search["repeat"]]) for search in page["searches"]),
        ]:
            check_page_vote(vote, among)


def check_page_vote(vote, beams):
    """Rows, sums and winners that the page draws, against a count of the beams."""
    expected = votes(beams)
    assert {name: vote[name] for name in ("maj", "wmaj", "bon")} == pytest.approx(
        {name: float(expected[name]) for name in ("maj", "wmaj", "bon")}
    )
    groups = {}
    for number, right, value in beams:
        if number is not None:
            groups.setdefault(number, []).append((right, value))
    assert (vote["beams"], vote["empty"]) == (len(beams), len(beams) - sum(map(len, groups.values())))
    shown = {class_of(row["answer"]): row for row in vote["rows"]}
    assert set(shown) == set(groups)
    weights = {number: sum(value for _, value in members) for number, members in groups.items()}
    assert vote["weight"] == pytest.approx(sum(weights.values()))
    assert [row["weight"] for row in vote["rows"]] == sorted(weights.values(), reverse=True)
    most, heaviest = max(map(len, groups.values()), default=0), max(weights.values(), default=0)
    best = max((value for members in groups.values() for _, value in members), default=0)
    for number, members in groups.items():
        row, values = shown[number], [value for _, value in members]
        assert (row["count"], row["weight"], row["best"]) == (len(members), weights[number], max(values))
        assert row["right"] == pytest.approx(sum(right for right, _ in members) / len(members))
        assert row["wins"] == {
            "maj": len(members) == most,
            "wmaj": weights[number] == heaviest if heaviest else len(members) == most,
            "bon": max(values) == best,
        }


# ---------------------------------------------------------------------------------------------------------------------
# The same run, numbered otherwise


def renumber(path, other, problem_of, repeat_of, num_problems):
    """Write a run with its problems and repetitions numbered anew, lines in another order, beside the old settings."""
    old, new = RunPaths.of(path), RunPaths.of(other)
    for source, target in ((old.results, new.results), (old.tree, new.tree)):
        rows = rows_of(source)
        for row in rows:
            row["data_idx"], row["repeat_idx"] = problem_of[row["data_idx"]], repeat_of[row["repeat_idx"]]
            if "global_idx" in row:
                row["global_idx"] = row["repeat_idx"] * num_problems + row["data_idx"]
        rows.sort(key=lambda row: (row.get("round", 0), -row["data_idx"], row["repeat_idx"]))
        write_rows(target, rows)
    new.meta.write_bytes(old.meta.read_bytes())
    return other


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("runs"))


def test_numbering_problems_and_repetitions_otherwise_changes_no_figure(pair, tmp_path):
    """Repetitions backwards and turned by two: the same windows, and the same disjoint groups of two."""
    vgs, bon = pair
    problem_of, repeat_of = [3, 0, 5, 1, 4, 2], [1, 0, 3, 2]
    other = renumber(vgs, tmp_path / "vgs.jsonl", problem_of, repeat_of, 6)
    plain = write_report([vgs, bon], tmp_path / "plain")
    moved = write_report([other, bon], tmp_path / "moved")
    names = ("table", "value_model", "searches_rescuable_by_a_rejected_candidate", "tokens_per_second", "planned")
    assert plain["runs"][0]["searches_rescuable_by_a_rejected_candidate"] > 0
    for name in names:
        close(moved["runs"][0][name], plain["runs"][0][name], name)
    close(moved["comparisons"], plain["comparisons"])
    by_id = {row["id"]: row for row in moved["runs"][0]["problems"]}
    for row in plain["runs"][0]["problems"]:
        close(by_id[problem_of[row["id"]]] | {"id": row["id"]}, row)


def test_any_order_of_repetitions_gives_the_same_votes_of_one_and_of_all(pair, tmp_path):
    vgs, _ = pair
    plain = write_report([vgs], tmp_path / "plain")["runs"][0]["table"]
    other = renumber(vgs, tmp_path / "vgs.jsonl", range(6), [2, 0, 1, 3], 6)
    moved = write_report([other], tmp_path / "moved")["runs"][0]["table"]
    close([moved[0], moved[3]], [plain[0], plain[3]])


def test_another_run_gives_other_figures(pair, tmp_path):
    """So that the two tests above cannot pass on figures that say nothing."""
    vgs, _ = pair
    other = make_run(tmp_path, "vgs", early_stop=0.1, seed=1)
    tables = [write_report([path], tmp_path / str(i))["runs"][0] for i, path in enumerate((vgs, other))]
    for metric in METRICS:
        assert tables[0]["table"][0][f"{metric}_m"] != tables[1]["table"][0][f"{metric}_m"]
    assert tables[0]["value_model"]["groups"][0]["auc"] != tables[1]["value_model"]["groups"][0]["auc"]
