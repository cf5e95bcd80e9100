"""Clones: by hand, and on random searches against a replay of every round that follows each beam to its first block."""

import json
import random
from collections import Counter

from handmade_runs import close, journal_row, result, settings, write_run
from synthetic_runs import analysis_of

from report_lib.clones import clone_rows, families_by_round
from report_lib.tables import all_tables, to_json
from search_lib.tree import Round, Tree


def grow(rng):
    """A random search, and by round (beams of the largest family, families) as a replay finds them."""
    beams, width = rng.randint(2, 5), rng.randint(1, 4)
    tree, found = Tree([1, 2], beams), []
    while tree.open_slots and len(tree.rounds) < 8:
        parent = [tree.beams[slot] for slot in tree.open_slots for _ in range(width)]
        order = rng.sample(range(len(parent)), len(parent))
        kept = [order[i] < len(tree.open_slots) for i in range(len(parent))]
        finish = [rng.choice(["", "", "", "stop", "length"]) for _ in parent]
        tree.add(Round(len(tree.rounds), parent, [[7]] * len(parent), [0.5] * len(parent), kept, finish))
        families = Counter(tree.path(beam)[0] for beam in tree.beams)
        found.append((max(families.values()), len(families)))
    return tree, found


def test_families_are_those_of_a_replay():
    rng = random.Random(5)
    for _ in range(300):
        tree, found = grow(rng)
        assert families_by_round(tree) == found
        assert found[0] == (1, len(tree.beams))  # first blocks have no ancestor but themselves


def test_rounds_count_every_search_and_problems_count_the_same():
    """Of 4 beams. Problem 0: one search that ended after two rounds, one of three; problem 1: one search of one round."""
    by_problem = {0: [[(1, 4), (2, 3)], [(1, 4), (3, 2), (4, 1)]], 1: [[(1, 4)]]}
    close(clone_rows(by_problem, 4), [
        {"round": 1, "beams": 4, "clones": 1.0, "families": 4.0, "collapsed": 0.0},
        {"round": 2, "beams": 4, "clones": (2.5 + 1) / 2, "families": (2.5 + 4) / 2, "collapsed": 0.0},
        {"round": 3, "beams": 4, "clones": (3 + 1) / 2, "families": (2 + 4) / 2, "collapsed": 0.25},
    ])  # fmt: skip
    assert clone_rows({}, 4) == []


def search(data_idx, repeat_idx, second_parents, over=True):
    """Two beams of two candidates. The first round keeps candidates 1 and 4; the second one of each of these parents."""
    line = result(data_idx, repeat_idx, 2, ["1", "1"], [True, True], [0.5, 0.5], generated_ids=[[5] * 4] * 2,
                  finish_reasons=["stop", "stop"])  # fmt: skip
    first = journal_row(data_idx, repeat_idx, 0, [0] * 4, [2] * 4, [0.5] * 4, [1, 0, 0, 1], [""] * 4, ["a"] * 4)
    kept = [1, 1, 0, 0] if second_parents == [1, 1] else [1, 0, 1, 0]
    second = journal_row(data_idx, repeat_idx, 1, [1, 1, 4, 4], [2] * 4, [0.5] * 4, kept, ["stop"] * 4, ["b"] * 4)
    return line if over else None, [first, second]


def test_a_run_by_hand_has_its_column_its_table_and_its_json(tmp_path):
    parts = [search(0, 0, [1, 1]), search(0, 1, [1, 4]), search(1, 0, [1, 4]), search(1, 1, [1, 1], over=False)]
    lines, journal = [line for line, _ in parts if line], [row for _, rows in parts for row in rows]
    analysis = analysis_of(write_run(tmp_path / "run.jsonl", lines, journal, settings(2, 2, 4, 2, 2)))
    expected = [
        {"round": 1, "beams": 2, "clones": 1.0, "families": 2.0, "collapsed": 0.0},
        {"round": 2, "beams": 2, "clones": 1.25, "families": 1.75, "collapsed": 0.25},
    ]
    close(analysis.clones, expected)
    assert to_json(analysis)["clones"] == analysis.clones
    assert [row["clones"] for row in analysis.problems] == [1.5, 1.0]
    (table,) = [table for table in all_tables([analysis], []) if table.title.startswith("Clones")]
    assert table.columns == ["round", "beams", "clones", "first blocks left", "collapsed"]
    assert table.rows == [["1", "2", "1.00", "2.00", "0.0%"], ["2", "2", "1.25", "1.75", "25.0%"]]


def test_without_a_journal_nothing_is_known(tmp_path):
    lines = [search(0, 0, [1, 1])[0]]
    analysis = analysis_of(write_run(tmp_path / "run.jsonl", lines, meta=settings(1, 1, 4, 2, 2)))
    assert analysis.clones == []
    assert [row["clones"] for row in analysis.problems] == [None]
    assert any(note.endswith("no clones") for note in analysis.notes)
    assert not [table for table in all_tables([analysis], []) if table.title.startswith("Clones")]
    assert json.loads(json.dumps(to_json(analysis)))["clones"] == []


def test_one_beam_cannot_have_any():
    tree = Tree([1], 1)
    tree.add(Round(0, [0, 0], [[7], [7]], [0.5, 0.4], [True, False], ["", ""]))
    assert families_by_round(tree) == []
