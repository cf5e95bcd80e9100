"""What is measured of a step beside its loss: a trace of some, seconds waiting for data, peak memory, compiled graphs."""

import json
import time

import pytest
import torch
from rollouts import losses
from train_spy import small_run, write_small_inputs

from training_lib import loop
from training_lib.batch_order import RankBatches
from training_lib.ranks import World
from training_lib.step_profile import StepProfile, kind_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_small_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs, tmp_path, **changes):
    seen = small_run(inputs, tmp_path, **{"num_steps": 6, "p_dropout": 0.2} | changes)
    assert seen.status == 0, seen.error
    return seen


def traced(path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted(event["name"] for event in events if event["name"].startswith("training step") and event.get("dur"))


def test_a_trace_of_some_steps_is_written_and_told_and_changes_no_loss(inputs, tmp_path, capsys):
    plain = run(inputs, tmp_path / "plain")
    assert not list(plain.run_dir.glob("profile*"))
    capsys.readouterr()
    seen = run(inputs, tmp_path / "profiled", profile=2)
    assert losses(seen.run_dir) == losses(plain.run_dir)
    [path] = seen.run_dir.glob("profile*")
    assert traced(path) == ["training step 3", "training step 4"] and path.name == "profile-step-00000003.json"
    told = capsys.readouterr().err
    assert f"trace of 2 steps: {path}" in told
    table = told[told.index("trace of 2 steps") :].split("step 5/6")[0].splitlines()[1:]
    rows = {line.split("  ")[1]: line for line in table if line.endswith("%")}
    assert {"matrix products", "attention", "optimizer", "Python, waiting"} <= set(rows)
    shares = [float(line.split()[-1].rstrip("%")) for line in rows.values()]
    assert sum(shares) == pytest.approx(100, abs=1.0)
    spent = sum(float(line.split()[-3]) for line in rows.values()) / 1000
    assert spent < 2 * sum(seen.values("seconds")[2:4]), "milliseconds a step"


def test_a_run_that_ends_early_has_the_trace_so_far(inputs, tmp_path):
    seen = run(inputs, tmp_path, profile=9, num_steps=4)
    assert traced(seen.run_dir / "profile-step-00000003.json") == ["training step 3", "training step 4"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ampere_bf16_s16816gemm_bf16_128x256", "matrix products"), ("aten::addmm", "matrix products"),
     ("flash_fwd_kernel", "attention"), ("triton_tem_fused_flex_attention_backward_3", "attention"),
     ("ncclDevKernel_ReduceScatter_Sum_f32", "exchange between ranks"), ("Memcpy HtoD", "copies"),
     ("multi_tensor_apply_kernel<fused adamw>", "optimizer"), ("triton_red_fused_mul_rsqrt_1", "norms, other kernels")],
)  # fmt: skip
def test_work_is_told_apart_by_names(name, kind):
    assert kind_of(name) == kind


def test_on_a_gpu_kernels_are_counted_once_and_not_what_launched_them():
    class Event:
        def __init__(self, key, kind, device_us, note=False):
            self.key, self.device_type, self.is_user_annotation = key, kind, note
            self.self_device_time_total, self.self_cpu_time_total = device_us, 77

    kinds = torch.autograd.DeviceType
    events = [
        Event("gemm", kinds.CUDA, 3000.0),
        Event("aten::mm", kinds.CPU, 3000.0),
        Event("x", kinds.CUDA, 9e9, True),
    ]

    class Profiler:
        def key_averages(self):
            return events

    found = StepProfile(2, 3, None, torch.device("cuda", 0), print)
    found.steps, found.seconds = 2, 0.004
    assert [line.split() for line in found.table(Profiler())] == [
        ["matrix", "products", "1.5", "ms", "75.0%"], ["Python,", "waiting", "0.5", "ms", "25.0%"],
    ]  # fmt: skip


def test_waiting_for_data_graphs_and_peak_memory_are_logged(inputs, tmp_path, monkeypatch):
    """The third step's data come late; the peak, on what says it is a GPU, is that of the rank with most."""
    read = RankBatches.__getitem__

    def late(batches, step):
        time.sleep(0.3 if step == 2 else 0)
        return read(batches, step)

    monkeypatch.setattr(RankBatches, "__getitem__", late)
    compiled = iter([5, *range(5, 20)])
    monkeypatch.setattr(loop, "graphs_compiled", lambda: next(compiled))
    seen = run(inputs, tmp_path, num_steps=4)
    waited = seen.values("data_seconds")
    assert waited[2] >= 0.3 and max(waited[:2] + waited[3:]) < 0.15
    assert all(w <= s for w, s in zip(waited, seen.values("seconds"), strict=True))
    assert seen.values("graphs") == [0, 1, 2, 3] and not seen.values("peak_memory_gb")


def test_the_peak_is_that_of_the_step_and_of_the_rank_with_most(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    device = torch.device("cuda", 1)

    class TwoRanks(World):
        def gather(self, item):
            return [item, 2_000_000_000]

    assert loop.peak_memory(TwoRanks(0, 2, device)) == 2.0 and asked == [device]
    assert loop.peak_memory(World(0, 1, device)) == 7e-9
    assert loop.peak_memory(World(0, 1, CPU)) is None
