"""The quickstart: its commands, how it is stopped and goes on, and the paper's claim in its results."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import quickstart
from conftest import ROOT

import collect_rollouts
import report
from common_lib.cli import UserError
from common_lib.signals import Stopped, StopSignal
from examples.miniature import make_generator
from search_lib import arguments
from training_lib import arguments as training_args

# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize("size", [quickstart.FULL, quickstart.FAST])
def test_every_command_is_one_that_its_script_takes(tmp_path, monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "with space"
    parsers = {
        "collect_rollouts.py": collect_rollouts.parse_args,
        "inference_eval.py": arguments.parse_args,
        "report.py": report.parse_args,
        "train_classifier.py": training_args.parse_args,
        "examples.miniature.make_generator": make_generator.parse_args,
    }
    seen = set()
    for command in (command for step in quickstart.STEPS for command in step.commands.values()):
        line = quickstart.fill_in(command, folder, 5, size)
        words = shlex.split(line)
        script = next(word for word in words if word in parsers)
        args = parsers[script](words[words.index(script) + 1 :])
        seen.add(script)
        assert any(str(folder) in str(value) for value in vars(args).values())
        shown = quickstart.wrapped(line)
        assert shlex.split(shown.replace(" \\\n", " ")) == ["$", *words]
    assert seen == set(parsers)


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def run(folder: Path, commands: dict[str, str]) -> None:
    quickstart.run_steps([quickstart.QuickstartStep("title", "why", commands)], folder, 1, quickstart.FAST)


def test_a_generator_that_is_there_is_not_made_again(tmp_path, capsys):
    commands = {"make_generator": "python -c 1/0", "next": "python -c 'print(5)'"}
    with pytest.raises(UserError, match="make_generator ended with status 1"):
        run(tmp_path, commands)
    (tmp_path / "generator").mkdir()
    run(tmp_path, commands)
    assert f"reused: {tmp_path}/generator" in capsys.readouterr().out
    run(tmp_path, commands)
    assert (tmp_path / "logs" / "next.txt").read_text() == "5\n5\n"


def test_a_failing_command_is_one_line_with_its_log_and_ends_the_quickstart(tmp_path):
    with pytest.raises(UserError, match=r"bad ended with status 1; .*logs/bad\.txt"):
        run(tmp_path, {"bad": "python -c 'print(1/0)'", "next": "python -c 'print(5)'"})
    assert not (tmp_path / "logs" / "next.txt").exists()


def test_a_signal_ends_the_command_and_then_the_quickstart(tmp_path):
    code = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); signal.pause()"
    with pytest.raises(Stopped) as stopped:
        quickstart.run_command(shlex.join(["python", "-c", code]), tmp_path / "logs" / "log.txt", patience=2)
    assert stopped.value.status == 128 + signal.SIGTERM


class FakeChild:
    """Ends with status 3 at the fifth poll; `told`: the polls at which it was told to end."""

    returncode = 3

    def __init__(self):
        self.polls, self.told = 0, []

    def poll(self):
        self.polls += 1
        return self.returncode if self.polls >= 5 else None

    def terminate(self):
        self.told.append(self.polls)


@pytest.mark.parametrize(
    ("received", "patience", "told"), [(None, 2, []), (signal.SIGINT, 9, []), (signal.SIGINT, 2, [2])]
)
def test_a_command_is_told_of_a_signal_once_and_only_if_it_goes_on(received, patience, told):
    stop, child = StopSignal(), FakeChild()
    stop.received = received
    assert quickstart.wait(child, stop, patience, poll_s=0.0) == 3
    assert child.told == told


def test_clean_removes_only_what_the_quickstart_made(tmp_path):
    mine, other, empty = (tmp_path / f"seed{seed}" for seed in (1, 2, 3))
    for folder in (mine, other):
        (folder / "logs").mkdir(parents=True)
        (folder / "file").write_text("x")
    empty.mkdir()
    (mine / "logs" / "make_generator.txt").write_text("")
    for seed in "13":
        quickstart.run_folder(quickstart.parse_args(["--clean", "--seed", seed, "--output_dir", str(tmp_path)]))
    assert mine.exists() and not (mine / "file").exists()
    with pytest.raises(UserError, match="was not made by the quickstart"):
        quickstart.run_folder(quickstart.parse_args(["--clean", "--seed", "2", "--output_dir", str(tmp_path)]))
    assert (other / "file").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The whole paper, small


def start_quickstart(folder: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "scripts/quickstart.py", "--fast", "--seed", "1", "--output_dir", str(folder)]
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)


def interrupt(child: subprocess.Popen, log: Path, due: Callable[[], bool]) -> None:
    """Ctrl-C as soon as it is due; the quickstart must end in order."""
    deadline = time.monotonic() + 300
    while not due():
        assert child.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(60) == 130, log.read_text()
    assert "Nothing is lost: the same command goes on" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of a fast quickstart that was interrupted in two of its steps."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    run, log = out / "seed1-fast", out.with_name("log.txt")
    interrupt(
        start_quickstart(out, log), log, lambda: any(p.stat().st_size for p in run.glob("rollouts/.collect/rows*"))
    )
    journal = run / "vgs.tree.jsonl"
    interrupt(start_quickstart(out, log), log, lambda: journal.exists() and journal.stat().st_size > 0)
    written = journal.read_bytes()
    assert start_quickstart(out, log).wait(900) == 0, log.read_text()
    assert journal.read_bytes().startswith(written), "the search began anew"
    return run


def test_the_fast_quickstart_shows_the_papers_claim(finished):
    results = json.loads((finished / "results.json").read_text())
    at_8 = results["8"]
    assert at_8["wmaj"] - at_8["maj"] >= 0.15, results
    assert at_8["vgs"] - at_8["wmaj"] >= 0.05, results
    assert at_8["random"] < at_8["wmaj"], results
    assert results["within_auc_75"] >= 0.9, results
    assert set(results["16"]) == set(at_8) == {"maj", "wmaj", "bon", "vgs", "random"}
    assert (finished / "report" / "report.html").is_file()
    assert results["what_if"]["same_answer"] == 1.0 and results["what_if"]["saved"] >= 0.25, results
    assert "Is the value model any good here? bon: its values tell right answers from wrong" in " ".join(
        (finished / "logs" / "report.txt").read_text().split()
    )


def test_a_second_quickstart_does_nothing_twice_and_says_the_same(finished, tmp_path):
    kept = ("results.json", "value_model/metrics.jsonl", "vgs.jsonl", "bon.tree.jsonl", "rollouts/README.md")
    before, log = {name: (finished / name).read_bytes() for name in kept}, tmp_path / "log.txt"
    assert start_quickstart(finished.parent, log).wait(300) == 0, log.read_text()
    assert log.read_text().count("reused: ") == 1
    assert "value-guided search" in log.read_text()
    assert "repetitions: the same answers with " in " ".join(log.read_text().split())
    assert {name: (finished / name).read_bytes() for name in kept} == before
