"""README's recipes and the script for Slurm, as a shell expands them: who starts where, and that all find each other."""

import signal
import subprocess

import pytest
from conftest import ROOT
from recipes import Call, Stubs, recipe
from sglang_host import wait_until

from search_lib.arguments import parse_args

SLURM = ROOT / "examples/slurm_search.sh"
GENERATOR, VALUES, SEARCH = "sglang.launch_server", "engine_lib.value_server", "inference_eval.py"


def of(calls: list[Call], program: str) -> list[Call]:
    return [call for call in calls if program in call.argv and call.what == "started"]


def check_node(calls: list[Call]) -> list[str]:
    """A GPU and a port for each server, and a search that knows them all; its flags."""
    generators, values, (search,) = (of(calls, program) for program in (GENERATOR, VALUES, SEARCH))
    assert len(generators) + len(values) + 1 == len([call for call in calls if call.what == "started"])
    assert sorted(call.gpus for call in generators + values) == [str(gpu) for gpu in range(8)]
    assert search.gpus is None
    flags = search.argv[search.argv.index(SEARCH) + 1 :]
    shard = flags.index("--shard") if "--shard" in flags else None
    args = parse_args(flags if shard is None else flags[:shard] + flags[shard + 2 :])
    ports = [sorted(f"http://localhost:{call.value('--port')}" for call in group) for group in (generators, values)]
    assert [sorted(args.sglang_url), sorted(args.value_url)] == ports
    assert (args.engine, args.value_engine) == ("sglang-server", "sglang-server")
    assert {call.value("--model-path") for call in generators} == {args.piref_model}
    assert {call.value("--classifier_ckpt_path") for call in values} == {args.classifier_ckpt_path}
    assert {call.value("--mem-fraction-static") for call in generators + values} == {"0.85"}
    assert args.batch_size == 24 * len(generators) >= 8 * 8
    return flags


def test_a_node_of_eight_in_servers(tmp_path):
    calls = recipe("node", tmp_path)
    check_node(calls)
    assert [len(of(calls, program)) for program in (GENERATOR, VALUES)] == [6, 2]


def test_a_node_of_eight_in_one_process(tmp_path):
    (call,) = recipe("process", tmp_path)
    args = parse_args(call.argv[call.argv.index(SEARCH) + 1 :])
    assert (args.engine, args.sglang_args, args.value_device) == ("sglang", ["dp_size=6"], ["cuda:6", "cuda:7"])
    assert (args.batch_size, args.value_engine, args.device) == (144, "local", "auto")


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


def task(stubs: Stubs, index: int, count: int, *flags: str, **environment: str) -> subprocess.Popen:
    slurm = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": str(count)}
    return stubs.start(["bash", str(SLURM), *flags], **slurm, **environment)


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


def test_bash_takes_the_script_and_slurm_its_settings():
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    head = SLURM.read_text().split("set -euo", 1)[0].splitlines()
    assert head[0] == "#!/bin/bash"
    settings = [line for line in head if line.startswith("#SBATCH ")]
    assert settings and head.index("") > head.index(settings[-1]), "Slurm reads them up to the first command"


@pytest.mark.parametrize("index", [0, 3])
def test_each_task_of_the_array_is_a_node_of_its_own(stubs, index):
    given = ["--benchmark", "problems.jsonl", "--num_repetitions", "64", "--output_path", "/shared/a run.jsonl"]
    process = task(stubs, index, 4, *given, WAITS=f"{GENERATOR} {VALUES}")
    assert process.wait(timeout=60) == 0
    wait_until(lambda: len(stubs.calls()) == 17, 20)
    calls = stubs.calls()
    flags = check_node(calls)
    assert flags[:2] == ["--shard", f"{index}/4"]
    assert flags[-len(given) :] == given
    ended = [call for call in calls if call.what == "told to end"]
    assert len(ended) == 8 and not of(ended, SEARCH), "the servers, when the search is over"


def test_models_and_shares_of_the_gpus_come_from_the_environment(stubs):
    settings = {"GENERATOR": "g", "VALUE_MODEL": "v", "GENERATORS": "2", "GPUS": "3", "SEARCHES": "9", "PORT": "41000"}
    process = task(stubs, 1, 2, **settings, WAITS=f"{GENERATOR} {VALUES}")
    assert process.wait(timeout=60) == 0
    calls = stubs.calls()
    assert sorted((call.gpus, call.value("--port")) for call in of(calls, GENERATOR)) == [
        ("0", "41000"),
        ("1", "41001"),
    ]
    assert [(call.gpus, call.value("--port")) for call in of(calls, VALUES)] == [("2", "41002")]
    assert {call.value("--model-path") for call in of(calls, GENERATOR)} == {"g"}
    (search,) = of(calls, SEARCH)
    wanted = {
        "--piref_model": "g",
        "--classifier_ckpt_path": "v",
        "--batch_size": "18",
        "--value_url": "http://localhost:41002",
    }
    assert {flag: search.value(flag) for flag in wanted} == wanted


def test_some_tasks_of_a_run_are_started_again_with_its_number_of_shards(stubs):
    process = task(stubs, 7, 2, SHARDS="64", WAITS=f"{GENERATOR} {VALUES}")
    assert process.wait(timeout=60) == 0
    (search,) = of(stubs.calls(), SEARCH)
    assert search.value("--shard") == "7/64"


def test_a_task_that_is_none_of_the_shards_starts_no_server(stubs):
    process = task(stubs, 2, 2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and not stubs.calls()
    assert said.startswith("task 2 of 2: tasks count from 0, as in --array=0-1; SHARDS=N says how many there are")


def test_the_status_is_that_of_the_search(stubs):
    process = task(stubs, 0, 2, STATUS="3", WAITS=f"{GENERATOR} {VALUES}")
    assert process.wait(timeout=60) == 3


def test_a_server_that_does_not_start_ends_the_task_with_a_line(tmp_path):
    stubs = Stubs(tmp_path, curl_status=7)
    process = task(stubs, 0, 2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the server of GPU 0 has ended; its lines are above" in said
    assert not of(stubs.calls(), SEARCH)


def test_when_its_time_is_over_the_search_is_told_and_waited_for(stubs):
    process = task(stubs, 0, 2, WAITS=f"{GENERATOR} {VALUES} {SEARCH}")
    wait_until(lambda: of(stubs.calls(), SEARCH), 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0, "the search's own"
    wait_until(lambda: len(stubs.calls()) == 18, 20)
    told = [call for call in stubs.calls() if call.what == "told to end"]
    assert SEARCH in told[0].argv and len(told) == 9


def test_when_servers_still_start_it_ends_at_once(tmp_path):
    stubs = Stubs(tmp_path, curl_status=7)
    process = task(stubs, 0, 2, WAITS=f"{GENERATOR} {VALUES}")
    wait_until(lambda: len(stubs.calls()) == 8, 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    wait_until(lambda: len(stubs.calls()) == 16, 20)
