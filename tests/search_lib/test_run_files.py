"""The files of a run: nothing lost, nothing written twice, nobody else's overwritten."""

import errno
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common_lib.cli import UserError
from common_lib.files import LineFile, OutputError, read_rows
from search_lib.run_files import RunFiles, check_output_path
from search_lib.run_reader import RunPaths
from search_lib.tree import Round, SearchTask


def meta(**changes):
    arguments = {"seed": 1, "num_repetitions": 2, "batch_size": 32, "block_size": 8, "tracker": "none"} | changes
    return {
        "format": 1, "arguments": arguments, "started": "2026-01-01T00:00:00+0000", "num_problems": 2,
        "problems_sha256": "p", "generator": {"fingerprint": "g"}, "value_model": {"fingerprint": "v"},
        "numerics": {"engine": "transformers"}, "search": {"width": 1, "branch": 2, "num_blocks": 2},
    }  # fmt: skip


def round_(index: int, finish: str = "") -> Round:
    parent = 2 * index  # the candidate that the round before kept
    return Round(index, [parent, parent], [[1, 2], [3, 4]], [0.25, 0.5], [False, True], ["", finish], 0.1, 0.2, 7)


def result(data_idx: int, repeat_idx: int) -> dict:
    return {
        "repeat_idx": repeat_idx, "data_idx": data_idx, "global_idx": repeat_idx * 2 + data_idx, "problem": "€ \ud800",
        "gt_answer": "7", "generated_ids": [[1, 2]], "generated_scores": [0.5], "processed_answer": ["7"],
        "reward": [True], "dt": 1.5,
    }  # fmt: skip


@pytest.fixture
def paths(tmp_path):
    return RunPaths.of(str(tmp_path / "out.jsonl"))


@pytest.fixture
def written(paths):
    """Two finished searches, and one with two rounds in the journal."""
    files = RunFiles(paths, meta())
    for key in ((1, 0), (0, 0)):
        files.add_round(SearchTask(*key, (5, 6)), round_(0, "stop"), ["a", "b"])
        files.add_result(result(*key))
    files.add_round(SearchTask(0, 1, (5, 6)), round_(0), ["a", "€"])
    files.add_round(SearchTask(0, 1, (5, 6)), round_(1, "stop"), ["", "c"])
    files.close()
    return paths


def state(paths):
    files = RunFiles(paths, meta())
    files.close()
    return sorted(files.finished), {key: list(map(plain, rounds)) for key, rounds in files.rounds.items()}


def contents(paths) -> dict:
    return {path: path.read_bytes() for path in vars(paths).values() if path.exists()}


def plain(record: Round) -> dict:
    """A round with its ids as lists: one that was read holds arrays."""
    return vars(record) | {"tokens": list(map(list, record.tokens))}


def test_everything_written_is_read_back(written):
    finished, rounds = state(written)
    assert finished == [(0, 0), (1, 0)]
    assert rounds == {(0, 1): [plain(round_(0)), plain(round_(1, "stop"))]}
    rows = [json.loads(line) for line in written.tree.read_text(encoding="utf-8").splitlines()]
    assert rows[2]["prompt_ids"] == [5, 6]
    assert "prompt_ids" not in rows[3]
    assert rows[2]["text"] == ["a", "€"]


@pytest.mark.parametrize("which", ["tree", "results"])
def test_a_line_torn_at_any_byte_is_dropped_and_said(written, tmp_path, which, caplog):
    path = getattr(written, which)
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    path.write_bytes(data[:start])
    without = state(written)
    for end in range(start + 1, len(data)):
        path.write_bytes(data[:end])
        caplog.clear()
        assert state(written) == without
        assert "torn" in caplog.text
        assert path.read_bytes() == data[:start]  # the next line starts on a line of its own
    path.write_bytes(data)
    caplog.clear()
    assert state(written) != without
    assert "torn" not in caplog.text


@pytest.mark.parametrize("size", [100_000, 1_500_000])
def test_a_long_torn_line_takes_no_other_line_with_it(paths, size, caplog):
    """Lines of more than 64 KiB and of more than 1 MiB, as real ones are, before it and torn."""
    long = [7] * (size // 2)
    with RunFiles(paths, meta()) as files:
        for key in ((0, 0), (1, 0)):
            files.add_result(result(*key) | {"generated_ids": [long]})
        for index in range(2):
            record = round_(index)
            record.tokens = [[1], long]
            files.add_round(SearchTask(0, 1, (5, 6)), record, ["a", "b"])
    whole = {path: path.read_bytes() for path in (paths.results, paths.tree)}
    before = state(paths)
    for path, data in whole.items():
        last = data[data[:-1].rfind(b"\n") + 1 :]
        assert len(last) > size
        for kept in (1, 65_536, len(last) - 1):  # bytes of one more line
            path.write_bytes(data + last[:kept])
            caplog.clear()
            assert state(paths) == before
            assert f"torn ({kept} bytes)" in caplog.text
            assert path.read_bytes() == data


def test_only_one_torn_line_in_an_otherwise_empty_file(paths, written):
    written.results.write_bytes(b'{"data_idx"')
    assert state(written)[0] == []


def test_damage_in_the_middle_is_named(written):
    lines = written.results.read_text().splitlines()
    written.results.write_text("\n".join(["{broken", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"out.jsonl: line 1 is not JSON"):
        RunFiles(written, meta())


def test_a_journal_that_lacks_a_round_is_refused(written):
    lines = written.tree.read_text().splitlines(keepends=True)
    written.tree.write_text("".join([*lines[:2], lines[3]]))
    with pytest.raises(UserError, match=r"round 1 of problem 0, repetition 1 .* a round before it is missing"):
        RunFiles(written, meta())


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_each_missing_round_of_many_is_noticed(paths, missing):
    """Rounds of two searches by turns; only the last round may be missing: it is done again."""
    with RunFiles(paths, meta()) as files:
        for index in range(4):
            for data_idx in (0, 1):
                files.add_round(SearchTask(data_idx, 0, (5, 6)), round_(index), ["a", "b"])
    lines = paths.tree.read_text().splitlines(keepends=True)
    del lines[2 * missing + 1]
    paths.tree.write_text("".join(lines))
    if missing == 3:
        assert {key: len(rounds) for key, rounds in state(paths)[1].items()} == {(0, 0): 4, (1, 0): 3}
    else:
        with pytest.raises(UserError, match=rf"round {missing + 1} of problem 1, repetition 0 .* before it is missing"):
            RunFiles(paths, meta())


def test_a_journal_without_seconds_is_read(written):
    rows = [json.loads(line) for line in written.tree.read_text().splitlines()]
    assert {row.pop("seconds") for row in rows} == {0.0}  # as it was written before rounds told theirs
    before = state(written)
    written.tree.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert state(written) == before


def test_sorted_by_global_idx_without_losing_a_byte(written):
    before = sorted(written.results.read_bytes().splitlines())
    files = RunFiles(written, meta())
    files.sort_results()
    files.add_result(result(1, 1))  # still the same file to write to
    files.close()
    rows = [row["global_idx"] for _, row in read_rows(written.results)]
    assert rows == [0, 1, 3]
    assert sorted(written.results.read_bytes().splitlines())[: len(before)] != []
    assert set(before) <= set(written.results.read_bytes().splitlines())


def test_a_lone_surrogate_leaves_the_file_readable(written):
    text = written.results.read_text(encoding="utf-8")
    assert json.loads(text.splitlines()[0])["problem"] == "€ \ud800"


# ----------------------------------------------------------------------------------------------------- another's output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (meta(seed=2), "--seed was 1 and is 2"),
        (meta(block_size=9), "--block_size was 8 and is 9"),
        (meta(num_repetitions=1), r"--num_repetitions was 2 and is 1 \(it may only grow\)"),
        (meta() | {"problems_sha256": "q"}, "the benchmark's problems differ"),
        (meta() | {"generator": {"fingerprint": "h"}}, "the generator's weights differ"),
        (meta() | {"value_model": {"fingerprint": "w"}}, "the value model's weights differ"),
        (meta() | {"numerics": {"engine": "sglang"}}, "engine and dtypes differ"),
    ],
)
def test_another_configuration_is_refused_and_named(written, changed, message):
    before = contents(written)
    with pytest.raises(UserError, match=message):
        RunFiles(written, changed)
    assert contents(written) == before


def test_a_start_that_came_to_nothing_binds_nobody(paths):
    RunFiles(paths, meta()).close()
    RunFiles(paths, meta(seed=2)).close()
    assert json.loads(paths.meta.read_text())["arguments"]["seed"] == 2


def test_what_may_change_may_change(written):
    files = RunFiles(written, meta(batch_size=64, num_repetitions=5, tracker="neptune"))
    files.close()
    assert len(files.finished) == 2


def test_results_without_their_meta_file_are_not_touched(written):
    written.meta.unlink()
    before = written.results.read_bytes()
    with pytest.raises(UserError, match="exists, but not its out.meta.json"):
        RunFiles(written, meta())
    assert written.results.read_bytes() == before


def test_uncounted_lines_that_were_left_behind_are_of_no_other_run(written):
    """Whoever deletes a run may forget the file that only --stop makes: its lines must not be taken for this run's."""
    written.results.rename(written.uncounted)
    written.tree.unlink()
    with pytest.raises(UserError, match="--seed was 1 and is 2"):
        RunFiles(written, meta(seed=2))
    written.meta.unlink()
    with pytest.raises(UserError, match=r"out\.uncounted\.jsonl exists, but not its out\.meta\.json"):
        RunFiles(written, meta())


def test_a_second_process_is_told(written):
    held = RunFiles(written, meta())
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from search_lib.run_files import RunFiles, check_output_path\n"
        "RunFiles(check_output_path(sys.argv[2]), json.loads(sys.argv[3])).close(); print('opened')"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(written.results), json.dumps(meta())]

    def run():
        return subprocess.run(command, capture_output=True, text=True)

    assert "another process is writing" in run().stderr
    with pytest.raises(UserError, match="another process is writing"):
        RunFiles(written, meta())
    held.close()
    assert run().stdout == "opened\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out.json", "must be a file name that ends in .jsonl"),
        (".jsonl", "must be a file name"),
        ("out.tree.jsonl", "is the name of another run's journal or uncounted lines"),
        ("out.uncounted.jsonl", "is the name of another run's journal or uncounted lines"),
        ("nowhere/out.jsonl", "folder nowhere does not exist"),
        ("folder.jsonl", "is not a file"),
    ],
)
def test_bad_paths(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=message):
        check_output_path(path)


def test_a_bare_file_name_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(check_output_path("out.jsonl").tree) == "out.tree.jsonl"


# ------------------------------------------------------------------------------------------------------------ disk full


def test_a_line_that_cannot_be_written_whole_is_taken_back(tmp_path, monkeypatch):
    file = LineFile(tmp_path / "x.jsonl")
    file.append({"a": 1})
    write, room = os.write, [5]

    def nearly_full(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done, room[0] = write(fd, bytes(data[: room[0]])), 0
        return done

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OutputError, match=r"x.jsonl: No space left on device"):
        file.append({"b": 2})
    monkeypatch.undo()
    assert (tmp_path / "x.jsonl").read_text() == '{"a":1}\n'
    file.append({"c": 3})
    assert (tmp_path / "x.jsonl").read_text() == '{"a":1}\n{"c":3}\n'


def test_a_full_disk_ends_with_one_line_and_the_same_command_goes_on(small_disk):
    paths = check_output_path(str(small_disk / "out.jsonl"))
    files = RunFiles(paths, meta())
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 150_000)
    with pytest.raises(OutputError, match="No space left on device"):
        for i in range(100_000):
            files.add_round(SearchTask(i, 0, (5,)), round_(0), ["x" * 100, ""])
    with pytest.raises(OutputError, match="No space left on device"):
        for i in range(100_000):
            files.add_result(result(i, 0))
    files.close()
    assert paths.tree.read_bytes().endswith(b"\n")
    filler.unlink()
    again = RunFiles(paths, meta())
    assert [len(rounds) for rounds in again.rounds.values()] == [1] * len(again.rounds)
    assert set(again.rounds) | set(again.finished) >= {(i, 0) for i in range(len(again.rounds))}
    again.add_result(result(1, 1))
    again.close()
