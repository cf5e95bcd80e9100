"""Parts of the check of a GPU: nine minutes are enough for what they state to need, and engines leave nothing behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from gpu_parts import drawing, memory, models, released, scoring, search, servers, training, values
from gpu_parts import report as report_module
from gpu_parts.needs import ASKED_FOR, EXTRA, NEEDS
from gpu_parts.report import Report

from common_lib.files import LineFile
from engine_lib import sampling


@dataclass
class Clock:
    """Seconds that have passed, for those who ask it."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    for module in (report_module, training, search, models, gpu_check):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic, sleep=found.spend))
    return found


@pytest.fixture
def new_report(tmp_path):
    """Makes a report of a GPU and the full size, with `rows(kind)` of it."""
    made = []

    def make(seconds: float, device: str = "cuda", size: str = "full") -> Report:
        made.append(LineFile(path := tmp_path / f"{len(made)}.jsonl"))
        report = Report(made[-1], device, size, seconds)
        report.rows = lambda key: [row for row in map(json.loads, path.read_text().splitlines()) if key in row]
        return report

    yield make
    for lines in made:
        lines.close()


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_each_part_has_the_time_that_it_states_where_all_use_theirs_up(monkeypatch, clock):
    """At the default of nine minutes."""
    given = {}

    def use_it_up(part, args, seconds):
        given[part] = seconds
        clock.spend(seconds)

    monkeypatch.setattr(gpu_check, "run_part", use_it_up)
    list(gpu_check.run_parts(gpu_check.parse([])))
    assert list(given) == list(NEEDS) and sum(given.values()) == pytest.approx(540)
    for part, seconds in given.items():
        assert max(seconds - gpu_check.LEAVE_S, 0.8 * seconds) >= sum(NEEDS[part].values())


@contextmanager
def nothing(*_, **__):
    yield


def set_up_scoring(monkeypatch, spend):
    ways = [
        (torch.float32, "sdpa"),
        *((torch.bfloat16, name) for name in ("sdpa", "flash_attention_2", "flash_attention_4")),
    ]
    monkeypatch.setattr(scoring, "value_model", lambda *_: None)
    monkeypatch.setattr(scoring, "kernels", lambda report: ways)
    monkeypatch.setattr(scoring, "difference", lambda report, name, *_: spend(name))
    monkeypatch.setattr(scoring, "speed", lambda *_: spend("speed", "speed, 8 trees"))
    for name in ("out_of_memory", "memory", "copies"):
        monkeypatch.setattr(scoring, name, lambda *_, name=name: spend(name.replace("_", " ")))


def set_up_training(monkeypatch, spend):
    monkeypatch.setattr(training, "StepBench", lambda report: SimpleNamespace(seconds={}))
    monkeypatch.setattr(training, "what_packing_saves", lambda report: None)
    monkeypatch.setattr(training, "measure", lambda bench, case: spend(case.name))
    monkeypatch.setattr(released, "value_model", lambda *_: SimpleNamespace(save_pretrained=lambda folder: None))
    monkeypatch.setattr(released, "free_memory", lambda device: None)
    monkeypatch.setattr(released, "one_step", lambda report, case, table, folder: spend(case) or 1.0)


def set_up_memory(monkeypatch, spend):
    monkeypatch.setattr(memory, "find_spec", lambda name: True)
    monkeypatch.setattr(memory, "inspect_model", lambda *_: None)
    monkeypatch.setattr(memory, "memory_given_back", nothing)
    monkeypatch.setattr(memory, "save_generator", lambda *_: spend("generator"))
    monkeypatch.setattr(memory, "promise_and_use", lambda report, kind, info: spend(kind))


def set_up_search(monkeypatch, spend):
    def compare(report, kind, sizes, folder, keep=0.0):
        spend("transformers, tiny") if sizes.model == "tiny" else spend(kind, f"{kind}, first block")

    monkeypatch.setattr(search, "find_spec", lambda name: True)
    monkeypatch.setattr(search, "memory_given_back", nothing)
    monkeypatch.setattr(search, "save_generator", lambda size, *_: size == "full" and spend("generator"))
    monkeypatch.setattr(search, "drawing", lambda report: spend("drawing"))
    monkeypatch.setattr(search, "compare", compare)


def set_up_values(monkeypatch, spend):
    model = SimpleNamespace(save_pretrained=lambda folder: None)
    info = SimpleNamespace(path="", vocab_size=9, num_labels=3)
    monkeypatch.setattr(values, "find_spec", lambda name: True)
    monkeypatch.setattr(values, "memory_given_back", nothing)
    monkeypatch.setattr(values, "value_model", lambda *_: model)
    monkeypatch.setattr(values, "inspect_model", lambda *_: info)
    monkeypatch.setattr(values, "one_kind", lambda report, kind, *_: spend(kind))


SET_UP = {"scoring": set_up_scoring, "training": set_up_training, "memory": set_up_memory, "search": set_up_search,
          "values": set_up_values}  # fmt: skip
MODULES = {"scoring": scoring, "training": training, "memory": memory, "search": search, "values": values}
STATED = NEEDS | ASKED_FOR


def run_with(monkeypatch, clock, report, part, slow=1.0):
    """The part, where each thing takes what is stated, times `slow`; what was done, in order."""
    done = ["start"]

    def spend(*names):
        done.extend(names)
        clock.spend(slow * sum(STATED[part].get(name) or EXTRA.get(part, {}).get(name, 40.0) for name in names))

    SET_UP[part](monkeypatch, spend)
    clock.spend(STATED[part]["start"])
    MODULES[part].run(report)
    return done


@pytest.mark.parametrize("part", list(STATED))
def test_a_part_does_all_that_it_states_in_the_time_that_it_states(monkeypatch, clock, new_report, part):
    """And asks for it: with half a second less something is left out."""
    for less, count in ((0.0, 0), (0.5, 1)):
        report = new_report(sum(STATED[part].values()) - less)
        done = run_with(monkeypatch, clock, report, part)
        left_out = {row["left_out"].removeprefix("search through ") for row in report.rows("left_out")}
        assert len(left_out & set(STATED[part])) == count and (count or set(STATED[part]) <= set(done))


def test_a_slow_machine_leaves_the_last_things_out_and_is_not_killed(monkeypatch, clock, new_report):
    for part in ("scoring", "search"):
        seconds = sum(NEEDS[part].values())
        report = new_report(seconds)
        begin = clock.now
        done = run_with(monkeypatch, clock, report, part, slow=1.5)
        assert set(done) < set(NEEDS[part]) and report.rows("left_out") and clock.now - begin < 1.25 * seconds
    assert "out of memory" in run_with(monkeypatch, clock, new_report(60.0), "scoring", slow=1.2)


@pytest.mark.parametrize(
    ("keep", "blocks"), [(0.0, [256, 512, 1024]), (80.0, [256, 512]), (150.0, [256]), (1000.0, [256])]
)
def test_longer_blocks_leave_the_next_engines_their_time(monkeypatch, clock, new_report, keep, blocks):
    """A block of 256 takes 25 s here, of 512 50 s, of 1024 100 s; 200 s are left."""
    seen, report = [], new_report(200.0)

    async def measure(order, bench):
        if len(bench.prompts) > 1:
            clock.spend(12.5 * bench.config.block_size / 256)
            seen.append(bench.config.block_size)
        return {}

    async def close():
        pass

    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "figures", lambda *_: None)
    sizes, bench = search.Sizes("full", 2, search.BLOCKS, 5), search.Bench(SimpleNamespace(close=close), None, None, [])
    asyncio.run(search.measure_blocks(report, "sglang", sizes, bench, 100, keep))
    assert sorted(set(seen)) == blocks and len(seen) == 2 * len(blocks)


def test_an_engine_that_took_all_the_time_to_start_begins_no_block(monkeypatch, clock, new_report):
    async def measure(order, bench):
        assert len(bench.prompts) == 1  # the warm-up
        clock.spend(50.0)

    async def close():
        pass

    monkeypatch.setattr(search, "measure", measure)
    report, bench = new_report(110.0), search.Bench(SimpleNamespace(close=close), None, None, [])
    asyncio.run(search.measure_blocks(report, "sglang", search.Sizes("full", 2, (256,), 5), bench, 100, 0.0))
    assert len(report.rows("left_out")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize(("device", "off", "bound"), [("cuda", 3e-5, 6e-5), ("cuda", 1e-6, 1e-5), ("cpu", 3e-5, 1e-5)])
def test_the_bound_in_float32_is_what_batching_alone_does_on_a_gpu(monkeypatch, new_report, device, off, bound):
    monkeypatch.setattr(scoring, "full_value", lambda model, ids, rows: 0.5 + off * (rows - 1) * len(ids) / 2)
    report = new_report(10.0, device)
    assert scoring.exact_bound(report, "float32", None, [[1], [1, 2]], [0.5, 0.5]) == pytest.approx(bound)
    (row,) = report.rows("figure")
    assert (row["value"], row["at_most"]) == (pytest.approx(off), 1e-4)
    assert len(report.rows("note")) == (device == "cuda")


def test_the_peak_is_held_against_the_budget(monkeypatch, new_report):
    """Of each growing tree."""
    report, budget = new_report(100.0, "cpu", "tiny"), 50_000_000
    monkeypatch.setattr(scoring, "auto_limit", lambda *_: budget)
    monkeypatch.setattr(scoring, "allocated_gb", lambda device: 1.0)
    monkeypatch.setattr(scoring, "peak_gb", lambda device: 1.06)
    scoring.speed(report, models.value_model("tiny", "cpu", torch.float32))
    rows = [row for row in report.rows("figure") if row["figure"] == "peak over the weights"]
    assert [(row["at_most"], row["good"]) for row in rows] == [(0.05, False)] * 2


def test_drawing_is_timed_with_the_shortlist_and_with_all(monkeypatch, new_report):
    looked_at, kept_of = [], sampling._kept_of
    monkeypatch.setattr(sampling, "_kept_of", lambda ids, *rest: looked_at.append(ids.shape[1]) or kept_of(ids, *rest))
    report = new_report(10.0, "cpu", "tiny")
    drawing.drawing(report)
    assert looked_at == [1024] * 11 + [1024, 4096] * 11
    assert all(row["value"] > 0 for row in report.rows("figure"))


def test_values_are_measured_of_all_that_is_here_and_the_rest_is_told(new_report):
    report = new_report(100.0, "cpu", "tiny")
    values.run(report)
    figures = {row["figure"]: row for row in report.rows("figure")}
    assert {row["case"] for row in figures.values()} == {"local"}
    assert (figures["tokens computed a new one"]["value"], figures["tokens computed a new one"]["at_most"]) == (
        1.0,
        1.01,
    )
    assert [row["left_out"] for row in report.rows("left_out")] == ["values, sglang", "values, sglang-server"]


def test_served_values_that_are_off_or_are_read_again_are_faults(monkeypatch, new_report):
    told, report = {"tokens computed a new one": 1.5}, new_report(10.0, "cpu", "small")
    found = {"local": {(1,): 0.5}, "sglang": {(1,): 0.6}}
    monkeypatch.setattr(values, "run_kind", lambda kind, bench: (told, found[kind]))
    bench, local = SimpleNamespace(values=SimpleNamespace(dtype="fp32")), {}
    for kind in found:
        local = values.one_kind(report, kind, bench, local)
    bad = [(row["case"], row["figure"]) for row in report.rows("figure") if not row["good"]]
    assert bad == [
        ("local", "tokens computed a new one"),
        ("sglang", "tokens computed a new one"),
        ("sglang", "off local values"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind


def test_a_model_in_bfloat16_leaves_none_in_float32(monkeypatch):
    made, from_config, freed = [], models.Qwen2ForClassifier._from_config, []

    def note(*args, **kwargs):
        made.append(weakref.ref(model := from_config(*args, **kwargs)))
        return model

    monkeypatch.setattr(models.Qwen2ForClassifier, "_from_config", note)
    monkeypatch.setattr(models, "free_memory", lambda device: freed.append(made[0]() is None))
    models.value_model("tiny", "cpu", torch.bfloat16)
    assert freed == [True]


@pytest.mark.parametrize(("free", "notes", "waited"), [([90, 40, 40, 89], 0, 0.4), ([90] + [40] * 1000, 1, 20.0)])
def test_the_next_engine_waits_for_the_memory_of_the_last(monkeypatch, clock, new_report, free, notes, waited):
    looks = iter(free)
    monkeypatch.setattr(models, "free_memory", lambda device: None)
    monkeypatch.setattr(models, "memory_of", lambda device: (next(looks), 100))
    report = new_report(100.0)
    with models.memory_given_back(report, "sglang"):
        pass
    assert len(report.rows("note")) == notes and clock.now == pytest.approx(waited, abs=0.5)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


SERVER = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1] + ".new", "w").write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
if sys.argv[2] == "stays":
    time.sleep(600)
"""  # the new process of SGLang holds the GPU, not the one that was started


@pytest.mark.parametrize("server", ["stays", "is gone"])
def test_a_server_is_ended_with_what_it_started(tmp_path, server):
    told = tmp_path / "pids"
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(told), server], process_group=0)
    wait_until(told.exists)
    _, child = map(int, told.read_text().split())
    servers.end_group(process, patience_s=0.5)
    try:
        assert process.poll() is not None
        wait_until(lambda: not alive(child))
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def test_a_server_ends_with_a_part_that_is_killed(tmp_path):
    """It has a group of its own, which the part's end does not reach."""
    told = tmp_path / "pids"
    part = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(sys.argv[1:], process_group=0)\n"
        "time.sleep(600)\n"
    )  # fmt: skip
    server = [sys.executable, "-c", servers.WITH_PARENT, sys.executable, "-c", SERVER, str(told), "stays"]
    process = subprocess.Popen([sys.executable, "-c", part, *server], start_new_session=True)
    wait_until(told.exists)
    leader, child = map(int, told.read_text().split())
    try:
        assert os.getpgid(leader) == leader == os.getpgid(child)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not alive(leader))
    finally:
        os.killpg(leader, signal.SIGKILL)  # SGLang's own other processes end with their parent


def test_a_part_without_a_figure_is_a_fault(tmp_path):
    """Whatever it says of itself, and if each was left unmeasured too."""
    lines = tmp_path / "lines"
    row = {"table": "t", "figure": "f", "value": None, "good": True}
    for rows, status in (
        ([], "ran, but measured nothing"),
        ([row], "ran, but measured nothing"),
        ([row, row | {"value": 0.0}], "done"),
    ):
        lines.write_text("".join(json.dumps(told) + "\n" for told in [*rows, {"done": True}]))
        found = gpu_check.read_part(lines, 0, 5.0)
        assert found["status"] == status
        faults = gpu_check.faults({"parts": {"p": found}})
        assert faults == ([] if status == "done" else [f"p {status}"])
