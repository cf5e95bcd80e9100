"""Reading a run's files at the sizes they really have: lines of more than 64 KiB and of more than 1 MiB, many rounds."""

import json
import random

import pytest
from handmade_runs import journal_row, random_lines, result, settings, write_run

from common_lib.cli import UserError
from report_lib.data import read_run
from search_lib.run_files import RunFiles
from search_lib.run_reader import RESULT, ROUND, Journal, RunPaths, read_results, read_token_ids
from search_lib.tree import Round, SearchTask

SIZES = {"short": 20, "more than 64 KiB": 30_000, "more than 1 MiB": 300_000}  # tokens of a beam; 3 bytes and more each


def long_lines(tokens, count=4):
    """Lines whose ids all differ from one to the next, so that a wrong offset is seen."""
    rng = random.Random(tokens)
    return [
        result(i, 0, count, ["1", "2"], [True, False], [0.5, 0.25], problem=f"é {i} " * (1 + tokens // 20),
               generated_ids=[[i, *rng.choices(range(100, 1000), k=tokens)], [7] * i])
        for i in range(count)
    ]  # fmt: skip


def write(path, rows, ending="\n"):
    path.write_bytes(
        b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)[:-1] + ending.encode()
    )
    return path


@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("newline", ["\n", ""])
def test_long_lines_are_read_and_their_ids_found_again(tmp_path, tokens, newline):
    rows = long_lines(tokens)
    path = write(tmp_path / "run.jsonl", rows, newline)
    lines, notes = read_results(path, 4)
    assert notes == []
    assert [line["lengths"] for line in lines] == [[tokens + 1, i] for i in range(4)]
    for line in reversed(lines):  # in any order
        found = read_token_ids(line)
        assert [list(ids) for ids in found] == rows[line["data_idx"]]["generated_ids"]
        assert line["problem"] == rows[line["data_idx"]]["problem"]


@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
def test_a_torn_last_line_of_any_length_is_left_out_and_no_other(tmp_path, tokens):
    path = write(tmp_path / "run.jsonl", long_lines(tokens))
    data = path.read_bytes()
    start = data.rindex(b"\n", 0, len(data) - 1) + 1
    for cut in (start + 1, (start + len(data)) // 2, len(data) - 2):
        path.write_bytes(data[:cut])
        lines, notes = read_results(path, 4)
        assert [line["data_idx"] for line in lines] == [0, 1, 2]
        assert notes == ["run.jsonl: its last line is torn (a run in progress, or killed) and was left out"]
        run = read_run(path, "run")
        assert (len(run.lines), run.planned) == (3, 3)


@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
def test_the_next_start_goes_on_behind_a_torn_line_of_any_length(tmp_path, tokens):
    """Whole lines, longer than any block that is read at a time, stay as they are in both files."""
    paths = RunPaths.of(tmp_path / "run.jsonl")
    ids = random.Random(0).choices(range(100, 1000), k=tokens)

    def meta():
        return settings(4, 1, 2, 1, 2) | {"started": "now", "problems_sha256": "p", "numerics": {}}

    with RunFiles(paths, meta()) as files:
        for i in range(3):
            task = SearchTask(i, 0, (1, 2))
            files.add_round(task, Round(0, [0, 0], [ids, [i]], [0.5, 0.25], [True, False], ["", "stop"]), ["a", "b"])
            files.add_round(task, Round(1, [1, 1], [[i], ids], [0.5, 0.25], [True, False], ["", ""]), ["", "é"])
        for row in long_lines(tokens)[:2]:
            files.add_result(row)
    whole = {path: path.read_bytes() for path in (paths.results, paths.tree)}
    for path, data in whole.items():
        last = data.rstrip(b"\n").rpartition(b"\n")[2]
        path.write_bytes(data + last[: len(last) - 1])
    with RunFiles(paths, meta()) as files:
        assert sorted(files.finished) == [(0, 0), (1, 0)]
        lengths = {key: [list(map(len, part.tokens)) for part in rounds] for key, rounds in files.rounds.items()}
        assert lengths == {(2, 0): [[tokens, 1], [1, tokens]]}
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
def test_the_journal_of_long_interleaved_rounds_is_read_search_by_search(tmp_path, tokens):
    """Three searches of five rounds, whose lines lie in a random order that keeps each search's own."""
    rng, rows = random.Random(1), []
    waiting = {search: list(range(5)) for search in range(3)}
    while waiting:
        search = rng.choice(sorted(waiting))
        number = waiting[search].pop(0)
        parent = 2 * number - 1 if number else 0
        last = number == 4
        rows.append(
            journal_row(search, 0, number, [parent] * 2, [0, 0], [0.1 * number, 0.05], [1, 0], ["stop" if last else "", ""],
                        [f"{search}.{number}", "é"], seconds_generate=float(number), tokens_cached=search)
            | {"tokens": [[search, number, *rng.choices(range(100, 1000), k=tokens // 5)], [number]]}
        )  # fmt: skip
        if not waiting[search]:
            del waiting[search]
    path = tmp_path / "run.tree.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    journal = Journal(path)
    for search in (2, 0, 1):
        tree, text = journal.read(search, 0)
        mine = [row for row in rows if row["data_idx"] == search]
        assert text == ["", *(part for row in mine for part in row["text"])]
        assert [list(ids) for ids in tree.tokens[1:]] == [ids for row in mine for ids in row["tokens"]]
        assert tree.beams == [9] and tree.prompt_ids == [1, 2, 3] and not tree.open_slots
        assert [(r.round, r.seconds_generate, r.tokens_cached) for r in tree.rounds] == [
            (i, i, search) for i in range(5)
        ]


# ------------------------------------------------------------------------------------------------------ a run with --stop

STOPPED = {"stopped": {"0": 1, "2": 3}, "stopped_by": {"0": "sure", "2": "certified"}}


def test_what_does_not_count_is_left_out_while_the_run_goes_on(tmp_path):
    """Of four problems one is decided after one repetition, one with its last: 10 of 12 searches are to come, 2 miss."""
    lines = [line for line in random_lines(5, 4, 3) if (line["data_idx"], line["repeat_idx"]) not in ((1, 2), (2, 2))]
    path = write_run(tmp_path / "run.jsonl", lines, (), settings(4, 3, 2, 1, 2) | STOPPED)
    run = read_run(path, "run")
    keys = [(line["data_idx"], line["repeat_idx"]) for line in run.lines]
    assert keys == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert (run.planned, run.partial) == (10, True)
    assert [list(read_token_ids(line)[0]) for line in run.lines] == [[5, 6]] * 8
    assert len(read_results(path, 4)[0]) == 10
    write_run(path, random_lines(5, 4, 3))
    assert not read_run(path, "run").partial


@pytest.mark.parametrize("stopped", [[1], {"0": 0}, {"0": True}, {"one": 1}, {"0": {"T": 1}}, None])
def test_settings_that_say_something_else_of_stopped_problems_are_refused(tmp_path, stopped):
    path = write_run(tmp_path / "run.jsonl", random_lines(5), (), settings(6, 4, 2, 1, 2) | {"stopped": stopped})
    with pytest.raises(UserError, match=r"run\.meta\.json: not a run's settings"):
        read_run(path, "run")


def test_lines_that_do_not_count_are_no_run(tmp_path):
    path = write_run(tmp_path / "run.uncounted.jsonl", random_lines(5))
    with pytest.raises(UserError, match="that is a run's journal, settings or uncounted lines"):
        read_run(path, "run")


@pytest.mark.parametrize("number", range(4))
def test_a_journal_must_have_each_round_once(tmp_path, number):
    """Twice, at once or later, or not at all while a later one is there; the last one may be missing still."""
    rows = [
        journal_row(0, 0, i, [2 * i - 1 if i else 0] * 2, [1, 1], [0.5, 0.25], [1, 0], ["", ""], ["a", "b"])
        for i in range(4)
    ]
    path = tmp_path / "run.tree.jsonl"
    for place in {number, 3}:
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows[: place + 1], rows[number], *rows[place + 1 :]])
        )
        with pytest.raises(
            UserError, match=rf"round {number} of problem 0, repetition 0 is there twice \(line {place + 2}\)"
        ):
            Journal(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["round"] != number))
    if number < 3:
        with pytest.raises(UserError, match=rf"round {number + 1} of .* is there .*, and a round before it is missing"):
            Journal(path)
    else:
        assert Journal(path).read(0, 0)[0].round == [-1, 0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Whose lines they are


def change(lines, number, **keys):
    return [line | keys if i == number else line for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda lines: [*lines, lines[7]], "line 25 is repetition 1 of problem 1 again, after line 8"),
        (lambda lines: change(lines, 9, problem="?"), "line 10 has another problem under data_idx 3 than line 4"),
        (lambda lines: change(lines, 9, gt_answer="2"), "line 10 has another problem under data_idx 3 than line 4"),
        (
            lambda lines: change(lines, 9, global_idx=10),
            "line 10 has global_idx 10, which in a run of 6 problems is not",
        ),
    ],
)
def test_lines_of_two_runs_in_one_file_are_refused(tmp_path, spoil, told):
    """Also without settings: how many problems the run has then follows from its lines."""
    for meta in (None, settings(6, 4, 2, 1, 2)):
        path = write_run(tmp_path / "run.jsonl", spoil(random_lines(0)), meta=meta)
        with pytest.raises(UserError, match=told):
            read_run(path, "run")


def test_the_settings_say_how_many_problems_there_are(tmp_path):
    """A file that fits itself is refused where the settings say another number."""
    path = write_run(tmp_path / "run.jsonl", random_lines(0), meta=settings(7, 4, 2, 1, 2))
    with pytest.raises(UserError, match="global_idx 6, which in a run of 7 problems is not repetition 1 of problem 0"):
        read_run(path, "run")


def test_the_released_codes_lines_may_hold_numbers_where_ours_hold_truth_values(tmp_path):
    lines = [line | {"reward": list(map(int, line["reward"])), "gt_answer": 1} for line in random_lines(0)]
    run = read_run(write_run(tmp_path / "run.jsonl", lines), "run", num_blocks=5)
    assert all(type(value) is bool for line in run.lines for value in line["reward"])
    assert {line["gt_answer"] for line in run.lines} == {"1"}
    assert (run.num_blocks, run.planned, run.partial, run.prunes, run.biased, run.search_type) == (
        5,
        24,
        False,
        *[None] * 3,
    )


GOOD = {
    "repeat_idx": 0, "data_idx": 3, "global_idx": 3, "dt": 1, "prompt_tokens": 5, "tokens_generated": 6,
    "tokens_scored": 7, "tokens_reread": 0, "tokens_cached": 1, "seconds_generate": 0.5, "seconds_score": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("key", GOOD)
@pytest.mark.parametrize("value", [-1, True, "1", None, float("inf"), float("nan")])
def test_numbers_that_cannot_be_are_named(key, value):
    row = result(3, 0, 6, ["1"], [True], [0.5]) | GOOD
    RESULT.check(row)
    with pytest.raises(ValueError, match=f"has {key} "):
        RESULT.check(row | {key: value})


@pytest.mark.parametrize("key", ROUND.parallel)
def test_lists_of_a_round_run_side_by_side(key):
    row = journal_row(0, 0, 0, [0, 0], [1, 1], [0.5, 0.5], [1, 0], ["", "stop"], ["a", "b"])
    ROUND.check(row)
    with pytest.raises(ValueError, match="do not belong together"):
        ROUND.check(row | {key: row[key][:1]})
    with pytest.raises(ValueError, match=f"has no {key}"):
        ROUND.check({name: value for name, value in row.items() if name != key})


@pytest.mark.parametrize("key", sorted(RESULT.required.keys() - {"gt_answer"}))
def test_a_result_without_a_key_is_refused_and_its_line_told(tmp_path, key):
    lines = random_lines(0)
    del lines[4][key]
    with pytest.raises(UserError, match=f"line 5 has no {key}"):
        read_run(write_run(tmp_path / "run.jsonl", lines), "run")
