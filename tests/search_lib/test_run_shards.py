"""The shards of a search run: who searches what, what may lie beside what, and how a report reads them as one."""

import json
import os
from pathlib import Path

import kill_test
import pytest
import search_spy
from synthetic_runs import analysis_of, make_run, rows_of, write_rows

import inference_eval
from common_lib.cli import UserError
from common_lib.shards import Shard
from report_lib.data import read_run
from report_lib.regrade import regrade
from report_lib.watch import states
from search_lib.run_reader import RunPaths


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    search_spy.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> search_spy.Seen:
    return search_spy.run(search_spy.base_flags(folder, tmp_path_factory.mktemp("whole") / "out.jsonl"))


def run_shard(folder, output, text, *more) -> search_spy.Seen:
    seen = search_spy.run([*search_spy.base_flags(folder, output), "--shard", text, *more])
    seen.output = RunPaths.of(output, Shard.parse(text, "--shard")).results
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Searching


def timeless(rows):
    return [{key: value for key, value in row.items() if key not in kill_test.FREE_KEYS | {"seconds"}} for row in rows]


def by_search(rows):
    return sorted(timeless(rows), key=lambda row: (row["data_idx"], row["repeat_idx"], row.get("round", 0)))


def test_the_lines_of_all_shards_are_those_of_the_whole_run(folder, whole, tmp_path, capsys):
    seen = [run_shard(folder, tmp_path / "x.jsonl", f"{index}/3", "--tracker", "trackio") for index in range(3)]
    assert {path.name for path in tmp_path.glob("[!.]*")} == {
        f"x.shard-{index}-of-3{ending}" for index in range(3) for ending in (".jsonl", ".meta.json", ".tree.jsonl")
    }
    for index, one in enumerate(seen):
        assert {row["data_idx"] % 3 for row in one.rows} == {index}
        assert (one.meta["num_problems"], one.meta["arguments"]["shard"]) == (4, f"{index}/3")
        assert one.meta["problems_sha256"] == whole.meta["problems_sha256"]
        assert one.config.groups_at_once == len(one.rows)  # searches of this shard
        (tracker,) = one.trackers
        assert tracker.metrics and all(
            name.startswith(f"shard_{index}/problems/") for _, metrics in tracker.metrics for name in metrics
        )
    assert by_search(row for one in seen for row in one.rows) == by_search(whole.rows)
    assert by_search(row for one in seen for row in one.rounds) == by_search(whole.rounds)
    printed = capsys.readouterr().out
    assert "shard 0/3, 2 of 4 problems:\n" in printed and "shard 1/3, 1 of 4 problems:\n" in printed
    assert (
        f"tables of all shards, plots and a page to look inside: python report.py {tmp_path / 'x.jsonl'}\n" in printed
    )


@pytest.mark.parametrize(
    ("there", "given", "message"),
    [
        (["0/2"], ["--shard", "1/3"], r"--shard 1/3: x\.shard-0-of-2\.jsonl beside it are of a run cut in 2; give --shard I/2"),
        (["0/2"], [], r"x\.jsonl: shards of a run have that name \(x\.shard-0-of-2\.jsonl\); give their --shard"),
        (["whole"], ["--shard", "0/2"], r"--shard 0/2: .*x\.jsonl is a whole run; give another --output_path$"),
        (["0/2"], ["--shard", "1/2", "--seed", "4"],
         r"x\.shard-0-of-2\.jsonl is a shard of another configuration: --seed was 1337 and is 4\. Give all shards the same"),
        (["0/2"], ["--shard", "0/2", "--seed", "4"], r"x\.shard-0-of-2\.jsonl holds another configuration: --seed was 1337"),
        (["0/2", "1/3"], ["--shard", "0/2"], r"shards of runs cut in 2 and in 3 \(x\.shard-0-of-2\.jsonl, x\.shard-1-of-3\.jsonl\)"),
        ([], ["--shard", "1/5"], r"--shard 1/5: there are only 4 problems; give an N of at most that many$"),
        ([], ["--shard", "2/2"], r"--shard '2/2' must be I/N with 0 <= I < N"),
        ([], ["--shard", "1/3", "--max_problems", "2"], r"there are only 2 problems"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_before_a_model_is_loaded(folder, whole, tmp_path, there, given, message):
    for text in there:
        source, shard = RunPaths.of(whole.output), None if text == "whole" else Shard.parse(text, "--shard")
        target = RunPaths.of(tmp_path / "x.jsonl", shard)
        meta = json.loads(source.meta.read_text())
        meta["arguments"]["shard"] = None if shard is None else text
        target.meta.write_text(json.dumps(meta))
        target.results.write_text(source.results.read_text().splitlines(keepends=True)[0])
    seen = search_spy.Seen()
    with pytest.raises(UserError, match=message):
        search_spy.run([*search_spy.base_flags(folder, tmp_path / "x.jsonl"), *given], seen=seen)
    assert not seen.engines


def test_a_shard_of_which_nothing_has_come_is_none(folder, whole, tmp_path):
    """As after a start with a wrong flag whose engine did not come up: else two such shards block each other for good."""
    for text in ("0/2", "1/3"):
        paths = RunPaths.of(tmp_path / "x.jsonl", Shard.parse(text, "--shard"))
        meta = json.loads(RunPaths.of(whole.output).meta.read_text())
        paths.meta.write_text(json.dumps(meta | {"arguments": meta["arguments"] | {"seed": 5, "shard": text}}))
        paths.results.touch(), paths.tree.touch()
    assert run_shard(folder, tmp_path / "x.jsonl", "1/2", "--num_repetitions", "1").status == 0
    assert run_shard(folder, tmp_path / "x.jsonl", "0/2", "--num_repetitions", "1").status == 0
    assert not read_run(tmp_path / "x.jsonl", "x").partial


def test_another_shard_that_has_begun_in_the_meantime_is_seen_under_the_lock(folder, whole, tmp_path, monkeypatch):
    plan = inference_eval.make_plan

    def make_plan(*arguments):
        paths = RunPaths.of(tmp_path / "x.jsonl", Shard(0, 2))
        meta = json.loads(RunPaths.of(whole.output).meta.read_text())
        meta |= {"arguments": meta["arguments"] | {"seed": 5, "shard": "0/2"}, "sessions": [{"ended": None}]}
        paths.meta.write_text(json.dumps(meta))
        paths.results.touch(), paths.tree.touch()
        return plan(*arguments)

    monkeypatch.setattr(inference_eval, "make_plan", make_plan)
    seen = search_spy.Seen()
    with pytest.raises(UserError, match="is a shard of another configuration: --seed was 5 and is 1337"):
        search_spy.run([*search_spy.base_flags(folder, tmp_path / "x.jsonl"), "--shard", "1/2"], seen=seen)
    assert not seen.engines
    monkeypatch.undo()  # the refused start is over, and blocks nobody
    for path in tmp_path.glob("x.shard-0-of-2.*"):
        path.unlink()
    assert run_shard(folder, tmp_path / "x.jsonl", "0/2", "--seed", "5", "--num_repetitions", "1").status == 0


def test_a_whole_run_does_not_take_a_shards_name(folder, tmp_path):
    with pytest.raises(UserError, match=r"'\.shard-0-of-2' in the name is for files of shards"):
        search_spy.run(search_spy.base_flags(folder, tmp_path / "x.shard-0-of-2.jsonl"))


def test_repetitions_may_grow_shard_by_shard(folder, tmp_path):
    output = tmp_path / "x.jsonl"
    for text, repetitions in (("0/2", "1"), ("1/2", "1"), ("0/2", "2")):
        assert run_shard(folder, output, text, "--num_repetitions", repetitions).status == 0
    run = read_run(output, "x")
    assert (len(run.lines), run.planned, run.partial) == (6, 8, True)
    assert run_shard(folder, output, "1/2", "--num_repetitions", "2").status == 0
    assert not read_run(output, "x").partial


def test_killed_shards_go_on_and_the_report_is_that_of_one_run(tmp_path):
    assert kill_test.shard_trials(1, "simulated", 4, 4, os.getpid(), tmp_path) == 0


def test_shards_stop_their_own_problems(folder, tmp_path):
    """Their lines are those of the whole run, and so is what is read of them; another rule in one of them is refused."""

    def write(request, nth):
        return search_spy.ENDINGS[request.seed % 3 // 2 if request.group[0] == "3" else 0]

    def run_one(name, *more):
        return search_spy.run([*search_spy.base_flags(folder, tmp_path / name), "--num_repetitions", "6", *more], write)

    stop = ["--stop", "sure", "--stop_vote", "majority", "--batch_size", "3"]
    whole, parts = run_one("whole.jsonl", *stop), [run_one("x.jsonl", *stop, "--shard", f"{i}/2") for i in range(2)]
    for index, part in enumerate(parts):
        part.output = RunPaths.of(tmp_path / "x.jsonl", Shard(index, 2)).results
    assert by_search(row for one in parts for row in one.rows) == by_search(whole.rows)
    assert len(whole.rows) == sum(whole.meta["stopped"].values()) + 6 * (4 - len(whole.meta["stopped"]))
    run, of_whole = read_run(tmp_path / "x.jsonl", "x"), read_run(tmp_path / "whole.jsonl", "whole")
    for key in ("stopped", "stopped_by"):
        assert run.meta[key] == of_whole.meta[key] and run.meta[key].keys() >= {"0", "1", "2"}
        assert all({int(i) % 2 for i in part.meta[key]} == {index} for index, part in enumerate(parts))
    assert (run.planned, run.partial, len(run.lines)) == (of_whole.planned, False, len(whole.rows))
    assert run.meta["tokens_uncounted"] == {
        name: sum(part.meta["tokens_uncounted"][name] for part in parts) for name in ("generated", "scored")
    }
    assert run_one("x.jsonl", "--stop", "sure", "--shard", "1/2").status == 0
    told = r"x\.shard-1-of-2\.jsonl stops by .*--stop_vote weighted.*x\.shard-0-of-2\.jsonl by .*--stop_vote majority"
    with pytest.raises(UserError, match=told):
        read_run(tmp_path / "x.jsonl", "x")
    # `sure` of 6 repetitions is not sure of 7: what is decided in the one shard may be open in the other.
    assert run_one("x.jsonl", *stop, "--num_repetitions", "7", "--shard", "1/2").status == 0
    with pytest.raises(UserError, match=r"--num_repetitions 7, x\.shard-0-of-2\.jsonl by .*--num_repetitions 6"):
        read_run(tmp_path / "x.jsonl", "x")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def cut(path: Path, output: Path, count: int) -> list[RunPaths]:
    """The files of a whole run as shards of `output`."""
    source, parts = RunPaths.of(path), []
    meta = json.loads(source.meta.read_text())
    for shard in (Shard(index, count) for index in range(count)):
        paths = RunPaths.of(output, shard)
        for of_whole, own in ((source.results, paths.results), (source.tree, paths.tree)):
            write_rows(own, [row for row in rows_of(of_whole) if shard.holds(row["data_idx"])])
        paths.meta.write_text(json.dumps(meta | {"arguments": meta["arguments"] | {"shard": str(shard)}}))
        parts.append(paths)
    return parts


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("synthetic"), "run", early_stop=0.1)


@pytest.fixture
def shards(synthetic, tmp_path) -> list[RunPaths]:
    return cut(synthetic, tmp_path / "x.jsonl", 4)


def numbers(analysis):
    return analysis.rows, analysis.values, analysis.problems, analysis.scores, analysis.costs, analysis.pruned_right


def test_all_shards_are_one_run_with_its_sessions(synthetic, shards, tmp_path):
    expected, found = analysis_of(synthetic), analysis_of(tmp_path / "x.jsonl")
    assert numbers(found) == numbers(expected)
    assert expected.seconds and found.seconds is found.tokens_per_second is None  # they may have run side by side
    assert len(found.run.meta["sessions"]) == 4 * len(expected.run.meta["sessions"])
    assert [note for note in found.notes if "shards" in note] == [
        "x: 4 of 4 shards, side by side or not: no wall-clock of the run"
    ]
    assert "shard" not in found.run.meta["arguments"]


def test_a_missing_shard_is_named_and_the_run_is_partial(shards, tmp_path):
    for paths in (shards[1], shards[3]):
        paths.results.unlink()
    run = read_run(tmp_path / "x.jsonl", "x")
    assert "x: MISSING shards 1/4, 3/4: their problems are left out" in run.notes
    assert (run.num_problems, run.partial, set(run.by_problem)) == (6, True, {0, 2, 4})


def test_a_shard_alone_is_a_whole_of_its_problems(shards):
    run = read_run(shards[1].results, "one")
    assert (run.num_problems, run.planned, run.partial, set(run.by_problem)) == (2, 8, False, {1, 5})
    assert run.notes == ["one: shard 1/4 of a run alone; give the name without it for all of them"]


def spoil_meta(change):
    def spoil(shards):
        meta = json.loads(shards[2].meta.read_text())
        change(meta)
        shards[2].meta.write_text(json.dumps(meta))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_meta(lambda meta: meta["arguments"].update(seed=5)),
         r"shard-2-of-4\.jsonl is no shard of the run of x\.shard-0-of-4\.jsonl: --seed was 0 and is 5$"),
        (spoil_meta(lambda meta: meta.update(problems_sha256="other")), r"shard-2-of-4\.jsonl is no shard .*problems differ"),
        (lambda shards: shards[2].meta.unlink(), r"shard-2-of-4\.jsonl: a shard without its settings \(x\.shard-2-of-4\.meta"),
        (lambda shards: write_rows(shards[2].results, rows_of(shards[0].results)),
         r"shard-2-of-4\.jsonl: line 1 has problem 0, which is not of shard 2/4; was the file renamed\?$"),
        (lambda shards: write_rows(shards[2].tree, rows_of(shards[0].tree)), r"is in x\.shard-2-of-4\.tree\.jsonl too"),
        (lambda shards: cut(shards[0].results, shards[0].results.with_name("x.jsonl"), 3),
         r"shards of runs cut in 3 and in 4"),
        (lambda shards: shards[0].results.with_name("x.jsonl").write_text(""), r"a whole run and shards of one under the same"),
    ],
)  # fmt: skip
def test_shards_of_several_runs_are_refused(shards, tmp_path, spoil, message):
    spoil(shards)
    with pytest.raises(UserError, match=message):
        analysis_of(tmp_path / "x.jsonl")


def test_shards_are_graded_again_one_by_one_into_shards_of_another_run(shards, tmp_path):
    with pytest.raises(
        UserError, match=r"one by one: .*x\.shard-0-of-4\.jsonl into y\.shard-0-of-4\.jsonl, and so on$"
    ):
        regrade(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    for index, paths in enumerate(shards):
        regrade(paths.results, RunPaths.of(tmp_path / "y.jsonl", Shard(index, 4)).results)
    again = analysis_of(tmp_path / "y.jsonl")
    assert len(again.run.lines) == len(read_run(tmp_path / "x.jsonl", "x").lines)
    assert again.has_journal and again.run.journal_paths == [paths.tree for paths in shards]


def test_a_watch_sees_a_shard_change(shards, tmp_path):
    before = states([tmp_path / "x.jsonl"])
    with shards[3].tree.open("a") as journal:
        journal.write("\n")
    assert states([tmp_path / "x.jsonl"]) != before
