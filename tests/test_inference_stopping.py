"""--stop in a whole run: which lines count whatever finishes first, what is aborted, and how a stopped run goes on."""

import asyncio
import itertools
import json
import math
import os
import random
import shutil
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import kill_test
import pytest
import simulated_eval

import inference_eval
from common_lib.cli import UserError
from common_lib.virtual_time import run_virtual
from engine_lib.base import EngineError
from eval_lib.grading import Grader
from eval_lib.stopping import Stopping, StopTest, stopping_point
from report_lib.analysis import analyse
from report_lib.data import read_run
from report_lib.policies import Policy
from report_lib.regrade import regrade
from report_lib.what_if import what_if
from search_lib import run_files, run_stopping
from search_lib.arguments import parse_args
from search_lib.run_reader import RunPaths, read_meta
from search_lib.run_stopping import RunStops

PROBLEMS, REPETITIONS, BEAMS = 6, 8, 4
ONCE = ["--stop", "sure", "--stop_vote", "majority"]
RULES = {
    "sure, majority": ONCE,
    "sure, weighted": ["--stop", "sure"],
    "certified": ["--stop", "certified", "--alpha", "0.3"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """Flags that name tiny models and a benchmark; eight repetitions of four beams."""
    flags = kill_test.make_inputs(tmp_path_factory.mktemp("inputs"), PROBLEMS)
    return [*flags, "--num_repetitions", str(REPETITIONS), "--device", "cpu"]


class Engine(simulated_eval.SimEngine):
    """Notes what it is asked, by search and time; dies after so many calls; takes `slow` seconds longer for some searches, at
    which it dies where that is for ever."""

    def __init__(self, fail_after: int | None, slow: dict[str, float]):
        self.left, self.slow, self.asked = fail_after, slow, []

    async def generate(self, requests):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise EngineError("it died")
        self.asked.append((requests[0].group, asyncio.get_running_loop().time()))
        seconds = self.slow.get(requests[0].group, 0.0)
        await asyncio.sleep(min(seconds, 1e6))
        if seconds == math.inf:
            raise EngineError("it died")
        return await super().generate(requests)


class AtOnce(ThreadPoolExecutor):
    """No thread: the clock of virtual time goes on while one works, and what finishes meanwhile is chance."""

    def submit(self, work, /, *arguments, **keywords):
        done = Future()
        done.set_result(work(*arguments, **keywords))
        return done


@pytest.fixture(scope="module")
def run(inputs):
    """main(), in virtual time, with simulated models; returns its status and its engines (none where none was loaded).
    timing: seed of how long blocks take."""

    def run(output: Path, *more, timing: int = 0, fail_after: int | None = None, slow=None, threads=AtOnce):
        engines = []

        def engine(args, plan):
            engines.append(Engine(fail_after, slow or {}))
            return engines[-1]

        random.seed(timing)
        loaders = inference_eval.Loaders(engine, simulated_eval.LOADERS.scorer, simulated_eval.LOADERS.tokenizer)
        with (
            mock.patch.object(asyncio, "run", run_virtual),
            mock.patch.object(run_stopping, "ThreadPoolExecutor", threads),
        ):
            return inference_eval.main([*inputs, "--output_path", str(output), *more], loaders), engines

    return run


@pytest.fixture(scope="module")
def full(run, tmp_path_factory) -> Path:
    """A run without --stop."""
    output = tmp_path_factory.mktemp("full") / "out.jsonl"
    assert run(output)[0] == 0
    return output


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory) -> Path:
    """A finished run with --stop, of which some searches are aborted and some finished in vain."""
    output = tmp_path_factory.mktemp("stopped") / "out.jsonl"
    assert run(output, *ONCE, "--batch_size", "24")[0] == 0
    paths = RunPaths.of(output)
    finished = {key(row) for path in (paths.results, paths.uncounted) for row in rows_of(path)}
    assert rows_of(paths.uncounted) and {key(row) for row in rows_of(paths.tree)} - finished
    return output


def rows_of(path: Path) -> list[dict]:
    """Without what depends on time."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k not in kill_test.FREE_KEYS | {"seconds"}} for row in rows]


def key(row: dict) -> tuple[int, int]:
    return row["data_idx"], row["repeat_idx"]


def expected_stops(full: Path, flags: list[str]) -> dict[int, tuple[int, str]]:
    """T and its reason by problem, from the lines of all repetitions."""
    args = parse_args(flags)
    stopping = Stopping(args.stop, args.stop_vote, args.alpha, REPETITIONS, BEAMS)
    answers = {key(row): (row["processed_answer"], row["generated_scores"]) for row in rows_of(full)}
    with Grader() as grader:
        return {
            i: stopping_point(stopping, [answers[i, r] for r in range(REPETITIONS)], grader.answer_classes)
            for i in range(PROBLEMS)
        }


def check_stopped(output: Path, full: Path, flags: list[str]) -> None:
    """A finished run with these flags of --stop, against one without them."""
    points, paths = expected_stops(full, flags), RunPaths.of(output)
    decided = {i: point for i, point in points.items() if point[1] != "full"}
    meta, lines, aside = read_meta(paths.meta), rows_of(paths.results), rows_of(paths.uncounted)
    assert meta["stopped"] == {str(i): t for i, (t, _) in decided.items()}
    assert meta["stopped_by"] == {str(i): kind for i, (_, kind) in decided.items()}
    assert lines == [row for row in rows_of(full) if row["repeat_idx"] < points[row["data_idx"]][0]]
    every = {key(row): row for row in rows_of(full)}
    assert aside == [every[key(row)] for row in aside]
    assert not {key(row) for row in lines} & {key(row) for row in aside}
    rounds, journal = rows_of(paths.tree), {(*key(row), row["round"]): row for row in rows_of(RunPaths.of(full).tree)}
    assert Counter((*key(row), row["round"]) for row in rounds).most_common(1)[0][1] == 1
    assert all(journal[(*key(row), row["round"])] == row for row in rounds)
    beyond = [row for row in rounds if row["repeat_idx"] >= points[row["data_idx"]][0]]
    generated = sum(len(tokens) for row in beyond for tokens in row["tokens"])
    assert meta["tokens_uncounted"] == {
        "generated": generated,
        "scored": generated,
    }  # the simulated scorer reads each once


# ------------------------------------------------------------------------------------------------------------ which count


@pytest.mark.parametrize("rule", RULES)
def test_exactly_the_repetitions_before_t_count_whatever_finishes_first(rule, run, full, tmp_path):
    """Two timings, one search after the other or all at once: the same lines and the same word of each problem; what is
    spent beyond differs."""
    spent, finished_too = set(), set()
    for timing, batch_size in ((1, 1), (2, 48), (3, 13)):
        output = tmp_path / f"{timing}.jsonl"
        assert run(output, *RULES[rule], "--batch_size", str(batch_size), timing=timing)[0] == 0
        check_stopped(output, full, RULES[rule])
        paths = RunPaths.of(output)
        spent.add(read_meta(paths.meta)["tokens_uncounted"]["generated"])
        finished_too.add(len(rows_of(paths.uncounted)))
    assert 0 in spent and len(spent) == 3  # one after the other nothing is spent in vain
    assert max(finished_too) > 0
    points = expected_stops(full, RULES[rule])
    assert len({t for t, _ in points.values()}) > 1 and min(t for t, _ in points.values()) < REPETITIONS - 1


def test_nothing_is_aborted_or_said_without_stop(full):
    paths = RunPaths.of(full)
    assert len(rows_of(full)) == PROBLEMS * REPETITIONS and not paths.uncounted.exists()
    assert not {"stopped", "stopped_by", "tokens_uncounted"} & read_meta(paths.meta).keys()


def test_a_decided_problems_searches_are_aborted_and_their_places_taken_at_once(run, full, tmp_path, monkeypatch):
    """The repetitions of one problem that do not count would take for ever."""
    points = expected_stops(full, ONCE)
    problem, (t, _) = min(points.items(), key=lambda item: item[1][0])
    slow = {f"{problem}/{r}": 1e6 for r in range(t, REPETITIONS)}
    look, decided_at = RunStops.look, {}

    async def watched(self, data_idx):
        if decided := await look(self, data_idx):
            decided_at[data_idx] = asyncio.get_running_loop().time()
        return decided

    monkeypatch.setattr(RunStops, "look", watched)
    status, (engine,) = run(tmp_path / "out.jsonl", *ONCE, "--batch_size", "8", timing=5, slow=slow)
    assert status == 0
    check_stopped(tmp_path / "out.jsonl", full, ONCE)
    assert max(at for _, at in engine.asked) < 1000  # nobody waited for them
    begun = dict(reversed(engine.asked))
    aborted = [group for group in slow if group in begun]
    assert aborted and all(begun[group] <= decided_at[problem] for group in aborted)
    at_once = [group for group, at in begun.items() if at == decided_at[problem]]
    assert len(at_once) >= min(len(aborted) + 1, sum(at >= decided_at[problem] for at in begun.values())) > 1
    for data_idx, at in decided_at.items():  # and none of a decided problem begins
        assert all(began <= at for group, began in begun.items() if group.startswith(f"{data_idx}/"))


def test_first_repetitions_of_all_problems_go_first(run, tmp_path):
    _, (engine,) = run(tmp_path / "out.jsonl", *ONCE, "--batch_size", "1")
    order = list(dict.fromkeys(group for group, _ in engine.asked))
    assert order == sorted(order, key=lambda group: tuple(map(int, group.split("/")[::-1])))


def test_other_searches_go_on_while_classes_are_asked_for(run, full, tmp_path, monkeypatch):
    """A grader that takes its time: rounds of other searches are written meanwhile."""
    classes, within, written, asked = Grader.answer_classes, [], [], []
    add = run_files.RunFiles.add_round

    def slowly(self, answers):
        asked.append(answers)
        if len(asked) == 3:
            before = len(written)
            time.sleep(0.5)
            within.append(len(written) - before)
        return classes(self, answers)

    monkeypatch.setattr(Grader, "answer_classes", slowly)
    monkeypatch.setattr(run_files.RunFiles, "add_round", lambda *a: written.append(a) or add(*a))
    assert run(tmp_path / "out.jsonl", *ONCE, "--batch_size", "12", threads=ThreadPoolExecutor)[0] == 0
    assert within[0] > 10
    check_stopped(tmp_path / "out.jsonl", full, ONCE)


def test_two_that_finish_while_classes_are_asked_for_are_looked_at_once_each(run, full, tmp_path, monkeypatch):
    """Each repetition once, in order, whoever finishes while another is looked at."""
    classes, told = Grader.answer_classes, []
    add = StopTest.add
    monkeypatch.setattr(Grader, "answer_classes", lambda *a: time.sleep(0.02) or classes(*a))
    monkeypatch.setattr(StopTest, "add", lambda self, *a: told.append((self, self.trees)) or add(self, *a))
    assert run(tmp_path / "out.jsonl", *ONCE, "--batch_size", "48", threads=ThreadPoolExecutor)[0] == 0
    for test in {one for one, _ in told}:
        assert [count for one, count in told if one is test] == list(range(test.trees))
    check_stopped(tmp_path / "out.jsonl", full, ONCE)


# --------------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("rule", ["sure, majority", "certified"])
def test_an_engine_that_dies_again_and_again_changes_nothing(rule, run, full, tmp_path):
    """No round is done twice, and aborted searches are not gone on with."""
    output, starts = tmp_path / "out.jsonl", 0
    while True:
        more = RULES[rule]
        status, _ = run(output, *more, "--batch_size", "10", timing=starts, fail_after=60)
        if status == 0:
            break
        starts += 1
        meta = read_meta(RunPaths.of(output).meta)
        points = expected_stops(full, more)
        assert all(points[int(i)][0] == t for i, t in meta["stopped"].items())
        assert starts < 30
    assert starts >= 3
    check_stopped(output, full, more)


def test_a_finished_run_is_left_as_it_is(run, stopped, tmp_path):
    """Nothing is loaded, no line moves."""
    output = copied(stopped, tmp_path)
    paths = RunPaths.of(output)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in (paths.results, paths.uncounted, paths.tree)}
    status, engines = run(output, *ONCE)
    assert (status, engines) == (0, [])
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in before} == before
    for key in ("stopped", "stopped_by", "tokens_uncounted"):
        assert read_meta(paths.meta)[key] == read_meta(RunPaths.of(stopped).meta)[key]


def copied(run: Path, folder: Path) -> Path:
    for path in run.parent.glob("*"):
        shutil.copy(path, folder)
    return folder / run.name


def test_without_stop_a_stopped_run_becomes_the_full_one(run, full, stopped, tmp_path):
    """Uncounted lines are taken back, aborted searches gone on with from their rounds: nothing is written twice."""
    output = copied(stopped, tmp_path)
    known = {(*key(row), row["round"]) for row in rows_of(RunPaths.of(output).tree)}
    status, (engine,) = run(output)
    assert status == 0
    paths = RunPaths.of(output)
    assert rows_of(output) == rows_of(full) and not paths.uncounted.exists()
    assert not {"stopped", "stopped_by", "tokens_uncounted"} & read_meta(paths.meta).keys()
    rounds = [(*key(row), row["round"]) for row in rows_of(paths.tree)]
    assert len(set(rounds)) == len(rounds) and set(rounds) == {
        (*key(row), row["round"]) for row in rows_of(RunPaths.of(full).tree)
    }
    assert known < set(rounds)
    assert not {f"{i}/{r}" for i, r in map(key, rows_of(RunPaths.of(stopped).uncounted))} & {
        group for group, _ in engine.asked
    }


def test_a_full_run_is_cut_without_a_model(run, full, tmp_path):
    """Its lines are in order already; those that do not count any more are moved."""
    output = copied(full, tmp_path)
    assert run(output, *ONCE) == (0, [])
    check_stopped(output, full, ONCE)
    every = len(rows_of(output)) + len(rows_of(RunPaths.of(output).uncounted))
    assert every == PROBLEMS * REPETITIONS > len(rows_of(output))


@pytest.mark.parametrize(
    "then", [RULES["sure, weighted"], RULES["certified"], ["--stop", "certified", "--alpha", "0.9"]], ids=" ".join
)
def test_another_rule_counts_other_lines_of_the_same_searches(then, run, full, stopped, tmp_path):
    output = copied(stopped, tmp_path)
    assert run(output, *then, timing=9)[0] == 0
    check_stopped(output, full, then)


def test_more_repetitions_take_back_what_lies_aside(run, stopped, tmp_path, inputs):
    """`sure` of more repetitions needs more of them; the lines are those of a run that was begun with so many."""
    output, more = copied(stopped, tmp_path), ["--num_repetitions", "10"]
    uncounted = RunPaths.of(output).uncounted
    aside = {key(row) for row in rows_of(uncounted)}
    rows = [json.loads(line) | {"dt": 12345.0} for line in uncounted.read_text().splitlines()]  # to be known by
    uncounted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, (engine,) = run(output, *ONCE, *more)
    assert status == 0
    again = [json.loads(line) for path in (output, uncounted) for line in path.read_text().splitlines()]
    assert {key(row) for row in again if row["dt"] == 12345.0} == aside
    assert not {f"{i}/{r}" for i, r in aside} & {group for group, _ in engine.asked}
    assert run(tmp_path / "new.jsonl", *ONCE, *more)[0] == 0
    assert rows_of(output) == rows_of(tmp_path / "new.jsonl")
    assert aside & {key(row) for row in rows_of(output)}  # some of them count now
    metas = [read_meta(RunPaths.of(path).meta) for path in (output, tmp_path / "new.jsonl")]
    assert metas[0]["stopped"] == metas[1]["stopped"] != read_meta(RunPaths.of(stopped).meta)["stopped"]


class Killed(BaseException):
    """The process ends here."""


# How the files were found: all lines in X.jsonl as at the end of a search, also those aside as after a kill, as finished.
@pytest.mark.parametrize(
    ("found", "then", "step"),
    [
        *(("searched", ONCE, step) for step in (1, 2)),  # write X.uncounted.jsonl, write X.jsonl
        *(("both", ONCE, step) for step in (1, 2)),  # the same
        *(("finished", [], step) for step in (1, 2, 3)),  # write X.jsonl, remove the other; sort X.jsonl
    ],
)
def test_killed_while_lines_are_moved(found, then, step, run, full, stopped, tmp_path, monkeypatch):
    """After each step: a line is in both files, never in none, readers see what counts, and the next start mends it."""
    output = copied(stopped, tmp_path)
    paths = RunPaths.of(output)
    kept, aside = (path.read_text().splitlines(True) for path in (paths.results, paths.uncounted))
    if found != "finished":
        paths.results.write_text("".join(random.Random(1).sample([*kept, *aside], len(kept + aside))))
    if found == "searched":
        paths.uncounted.unlink()
    steps = itertools.count(1)

    def killed(function):
        def work(path, *rest, **more):
            function(path, *rest, **more)
            if path in (paths.results, paths.uncounted) and next(steps) == step:
                raise Killed

        return work

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "write_whole", killed(run_files.write_whole))
        patch.setattr(Path, "unlink", killed(Path.unlink))
        with pytest.raises(Killed):
            run(output, *then)
    there = [path.read_text().splitlines(True) for path in (paths.results, paths.uncounted) if path.exists()]
    assert {line for lines in there for line in lines} >= {*kept, *aside}
    if then:
        assert sorted(map(key, read_run(output, "out").lines)) == sorted(map(key, rows_of(stopped)))
    assert run(output, *then)[0] == 0
    if then:
        check_stopped(output, full, then)
        assert [path.read_text().splitlines(True) for path in (paths.results, paths.uncounted)] == [kept, aside]
    else:
        assert rows_of(output) == rows_of(full) and not paths.uncounted.exists()


# ------------------------------------------------------------------------------------------------------------ around it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stop certified --alpha 0", r"--alpha 0\.0 must be above 0 and below 1: it is a probability of error$"),
        ("--stop certified --alpha 1", r"--alpha 1\.0 must be above 0 and below 1"),
        ("--stop certified --alpha nan", r"--alpha nan must be above 0 and below 1"),
        ("--alpha 0.05", r"--alpha 0\.05 needs --stop certified, not none$"),
        ("--stop sure --alpha 0.1", r"--alpha 0\.1 needs --stop certified, not sure$"),
        ("--stop_vote weighted", r"--stop_vote weighted needs --stop sure or --stop certified"),
        ("--stop maybe", r"--stop: invalid choice: 'maybe'"),
        ("--stop sure --stop_vote best", r"--stop_vote: invalid choice: 'best'"),
    ],
)
def test_mistakes_are_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args(flags.split())


def test_defaults():
    args = parse_args([])
    assert (args.stop, args.stop_vote, args.alpha) == ("none", "weighted", 0.05)


def test_an_uncounted_file_that_cannot_be_written_is_told_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "out.uncounted.jsonl").mkdir()
    with pytest.raises(UserError, match=r"out\.uncounted\.jsonl is not a file that can be written to$"):
        run(tmp_path / "out.jsonl", *ONCE)


def test_a_run_that_ends_early_says_how_many_problems_are_decided(run, full, tmp_path, capsys):
    """And a report of it reads only what counts."""
    output = tmp_path / "out.jsonl"
    slow = {f"1/{r}": math.inf for r in range(REPETITIONS)}
    status, _ = run(output, *ONCE, "--batch_size", "48", timing=4, slow=slow)
    assert status == 1
    meta = read_meta(RunPaths.of(output).meta)
    found, lines = read_run(output, "out"), rows_of(output)
    assert 0 < len(meta["stopped"]) < PROBLEMS and len(found.lines) < len(lines)
    decided = len(meta["stopped"]) + sum(
        str(i) not in meta["stopped"] and sum(row["data_idx"] == i for row in lines) == REPETITIONS
        for i in range(PROBLEMS)
    )
    assert f"({decided} of 6 problems are decided, {len(found.lines)} searches finished; the same command goes on)" in (
        capsys.readouterr().err
    )
    assert found.planned == sum(meta["stopped"].get(str(i), REPETITIONS) for i in range(PROBLEMS))
    regrade(output, tmp_path / "again.jsonl")
    assert sorted(map(key, rows_of(tmp_path / "again.jsonl"))) == sorted(map(key, found.lines))


def test_killed_at_random_moments(tmp_path):
    assert kill_test.kill_trials(2, "simulated", problems=4, seed=os.getpid(), folder=tmp_path, stop="sure") == 0


@pytest.mark.parametrize("rule", RULES)
def test_a_what_if_of_the_recorded_order_has_the_counted_tokens_of_a_real_run(run, full, tmp_path, rule):
    """Lines are what a stopped run keeps, and their tokens are the replay's, to the token."""
    flags, output = RULES[rule], tmp_path / "out.jsonl"
    assert run(output, *flags)[0] == 0
    counted, args = rows_of(output), parse_args(flags)
    policy = Policy(args.stop_vote, args.stop, args.alpha if args.stop == "certified" else None)
    with Grader() as grader:
        analysis = analyse(read_run(full, "full"), grader)
        recorded = what_if(analysis, [policy], grader).chosen[0]["recorded"]
    assert recorded["repetitions"] == len(counted) < PROBLEMS * REPETITIONS
    assert recorded["generated"] == sum(row["tokens_generated"] for row in counted)
