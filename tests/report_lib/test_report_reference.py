"""The report against another computation of the same figures, and against the same run numbered otherwise."""

import itertools
import json
import math
import random
from fractions import Fraction

import pytest
from handmade_runs import close, random_lines, read_data, write_run
from synthetic_runs import make_pair, make_run, rows_of, write_rows

import report
from eval_utils import pass_at_k
from report_lib import page
from report_lib.data import read_run, run_names
from search_lib.run_reader import RunPaths

# Student's t by degrees of freedom
T_95 = {
    1: 12.7062047361747046,
    2: 4.30265272974946385,
    3: 3.18244630528370959,
    4: 2.77644510519779436,
    5: 2.57058183563631551,
}
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


def variance(values):
    """With n - 1 below."""
    mean = exact(values) / len(values)
    return exact((value - mean) ** 2 for value in values) / (len(values) - 1)


def half_width(factor, square):
    return None if square is None else factor * math.sqrt(square)


def searches_of(lines):
    """By problem, the beams of each repetition in order."""
    found = {}
    for line in sorted(lines, key=lambda line: (line["data_idx"], line["repeat_idx"])):
        beams = zip(map(class_of, line["processed_answer"]), line["reward"], line["generated_scores"], strict=True)
        found.setdefault(line["data_idx"], []).append(list(beams))
    return found


def expected_row(by_problem, m):
    """Means, half-widths over problems, and the released half-widths over disjoint groups of repetitions."""
    having = [searches for searches in by_problem.values() if len(searches) >= m]
    groups, count = min(len(searches) // m for searches in having), len(having)
    beams = [beam for searches in having for search in searches for beam in search]
    row = {"pooled": m, "problems": count, "missing": len(by_problem) - count, "repeat_groups": groups}
    row["empty"] = sum(number is None for number, _, _ in beams) / len(beams)
    for metric in METRICS:
        means, by_group = [], []
        for searches in having:
            starts = range(len(searches)) if m < len(searches) else [0]
            scores = [found[metric] for found in pooled(searches, m, starts)]
            means.append(exact(scores) / len(scores))
            by_group.append([found[metric] for found in pooled(searches, m, [g * m for g in range(groups)])])
        if groups > 1:
            noise = exact(map(variance, by_group)) / count / (count * groups)
        else:
            noise = variance([score for (score,) in by_group]) / count if count > 1 else None
        row[f"{metric}_m"] = float(exact(means) / count)
        row[f"{metric}_ci"] = half_width(T_95[count - 1], variance(means) / count) if count > 1 else None
        row[f"{metric}_ci_repeat"] = half_width(1.96, noise)
    return row


def expected_problem(searches):
    """What the list says of a problem, of all its repetitions together."""
    beams = [beam for search in searches for beam in search]
    found, numbers = votes(beams), [number for number, _, _ in beams]
    pairs = list(itertools.combinations(numbers, 2))
    sums = {n: exact(Fraction(v) for number, _, v in beams if number == n) for n in set(numbers) - {None}}
    if not any(sums.values()):
        sums = {number: Fraction(numbers.count(number)) for number in sums}
    first, second = sorted([*sums.values(), Fraction(0), Fraction(0)], reverse=True)[:2]
    return {
        **{metric: float(found[metric]) for metric in METRICS[:1] + METRICS[2:]},
        "any": found["pass"] == 1, "searches": len(searches), "truncated": None, "rescued": None, "tokens": None,
        "disagreement": sum(a != b for a, b in pairs) / len(pairs) if pairs else 0.0,
        "empty": numbers.count(None) / len(beams), "value": float(exact(Fraction(v) for _, _, v in beams) / len(beams)),
        "margin": float((first - second) / (exact(sums.values()) or 1)),
    }, [number for number, weight in sums.items() if weight == first]  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_votes_and_intervals_are_those_of_exact_fractions(tmp_path, monkeypatch, part):
    """200 random runs with ties, zeros, empty answers and searches that are missing. Pages are another test's."""
    monkeypatch.setattr(page.PageWriter, "add", lambda *_: None)
    for seed in range(50 * part, 50 * part + 50):
        rng = random.Random(seed)
        problems, repetitions = rng.randint(1, 6), rng.randint(1, 6)
        lines = random_lines(seed, problems, repetitions, rng.randint(1, 4))
        kept = [rng.randint(1, repetitions) if rng.random() < 0.2 else repetitions for _ in range(problems)]
        lines = [line for line in lines if line["repeat_idx"] < kept[line["data_idx"]]]
        path = write_run(tmp_path / f"{seed}.jsonl", lines)
        found = write_report([path], tmp_path / "out", num_blocks=7)["runs"][0]
        searches = searches_of(lines)
        assert [row["N"] for row in found["table"]] == [7 * m for m in range(1, max(kept) + 1)]
        for m, row in enumerate(found["table"], start=1):
            expected = expected_row(searches, m)
            close({key: row[key] for key in expected}, expected, f"seed {seed}, pooled {m}", rel=1e-12)
        for row in found["problems"]:
            expected, winners = expected_problem(searches[row["id"]])
            close({key: row[key] for key in expected}, expected, f"seed {seed}, problem {row['id']}", rel=1e-12)
            assert class_of(row["vote"]) in (winners or [None])


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
        data = read_data(tmp_path / f"out/report_data/run0/p{row['id']}.js")
        for vote, among in [
            (data["vote"], beams),
            *((search["vote"], searches[row["id"]][search["repeat"]]) for search in data["searches"]),
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
    for run in (plain, moved):  # three of four leave one group, the first three, which are others now
        row = run["runs"][0]["table"][2]
        row |= {f"{metric}_ci_repeat": None for metric in METRICS}
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
