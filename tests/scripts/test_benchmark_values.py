"""The benchmark of values: the same searches for each kind, what they cost, and flags at their consumers."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import benchmark_values
import pytest
from fake_value import FakeValueEngine
from parser_flags import flags_of, words

from common_lib.cli import UserError
from engine_lib import choose
from engine_lib.base import EngineError

FLAGS = {
    "searches": 5, "rounds": 3, "block_size": 7, "prompt": 11, "num_beams": 2, "beam_width": 3, "kinds": "sglang", "device": "cpu",
    "value_model": "",
}  # fmt: skip


def test_every_kind_gets_the_same_searches_and_computes_each_token_once(monkeypatch, value_folder, capsys):
    """With a fake in the place of SGLang, whose values are its own."""
    engines, programs = [], []

    def made(config):
        engines.append(FakeValueEngine(config))
        return engines[-1]

    monkeypatch.setattr(benchmark_values, "find_spec", lambda name: True)
    monkeypatch.setattr(
        benchmark_values, "server", lambda program: programs.append(program) or nullcontext("http://one:1")
    )
    monkeypatch.setattr(choose, "VALUE_ENGINES", dict.fromkeys(choose.VALUE_ENGINES, made))
    flags = FLAGS | {"value_model": value_folder, "kinds": "sglang sglang-server"}
    assert benchmark_values.main(words(flags)) == 0
    said, new = capsys.readouterr().out, 5 * (11 + 3 * 2 * 3 * 7)
    assert (
        f"5 searches at once of 2 x 3 candidates, 3 blocks of 7 tokens, prompts of 11: {new} tokens; fp32, on a CPU"
        in said
    )
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in rows[0]]
    told = {row[0].strip(): dict(zip(head, map(str.strip, row), strict=True)) for row in rows[2:]}
    assert list(told) == ["local", "sglang", "sglang-server"]
    for row in told.values():
        assert (row["tokens computed"], row["tokens computed a new one"]) == (str(new), "1")
    assert [engine.closed for engine in engines] == [1, 1]
    assert engines[0].config.sglang_args == (f"max_total_tokens={2 * new}",)
    assert engines[1].config.urls == ("http://one:1",)
    assert programs[0][:4] == ["-m", "engine_lib.value_server", "--classifier_ckpt_path", str(value_folder)]
    first = [[traces[0] for traces, group in engine.asked if group == "0/0" and len(traces) == 1] for engine in engines]
    assert first[0] == first[1] and len(first[0][0]) == 11  # the prompt
    assert flags_of(benchmark_values.main, monkeypatch) == set(FLAGS)


def test_sglang_is_needed_for_what_it_serves(monkeypatch):
    monkeypatch.setattr(benchmark_values, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--kinds sglang and sglang-server need sglang"):
        benchmark_values.main([])
    with pytest.raises(UserError, match="--rounds 0 must be at least 1"):
        benchmark_values.main(["--rounds", "0"])


def test_differences_are_of_the_traces_that_both_have():
    assert benchmark_values.largest_difference({(1,): 0.5, (2,): 0.1}, {(1,): 0.25, (3,): 0.9}) == 0.25


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_cpu_seconds_of_children_count_while_they_run_and_after():
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = benchmark_values.cpu_seconds()
    process = subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    process.stdout.readline()
    running = benchmark_values.cpu_seconds() - before
    process.communicate(b"\n")
    assert running >= 0.25
    assert benchmark_values.cpu_seconds() - before >= 0.25


def test_a_server_is_ended_where_the_run_fails(monkeypatch, value_folder):
    """And the engine is closed before it."""
    order = []

    class Server:
        def __enter__(self):
            return "http://one:1"

        def __exit__(self, *_):
            order.append("server")

    class Broken(FakeValueEngine):
        def __init__(self, config):
            super().__init__(config, fail_after=1)

        async def close(self):
            order.append("engine")

    monkeypatch.setattr(benchmark_values, "server", lambda program: Server())
    monkeypatch.setattr(choose, "VALUE_ENGINES", {"sglang-server": Broken})
    config = benchmark_values.ValueConfig(str(value_folder), 264, 3)
    bench = benchmark_values.ValueBench(config, benchmark_values.SearchConfig(1, 1, 2, 4), 1, 3)
    with pytest.raises(EngineError, match="the fake value engine died"):
        benchmark_values.run_kind("sglang-server", bench)
    assert order == ["engine", "server"]
