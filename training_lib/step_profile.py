"""--profile N: a trace of N steps, and where their time went."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

SKIPPED = 2  # steps that compile
# By words in the name of a kernel, or on a CPU of an operation; the first that fits counts.
KINDS = {
    "attention": ("flash", "attention", "flex", "fmha", "sdpa"),
    "exchange between ranks": ("nccl", "gloo", "all_gather", "allgather", "reduce_scatter", "allreduce", "all_reduce", "c10d"),
    "matrix products": ("gemm", "mm", "matmul", "linear", "cutlass", "cublas", "nvjet"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "copies": ("memcpy", "memset", "copy", "aten::to", "aten::cat"),
}  # fmt: skip
OTHER = "norms, other kernels"
IDLE = "Python, waiting"


class StepProfile:
    """Of one rank's steps `first` .. `first + count - 1`, of which a trace is written and a table told."""

    def __init__(self, count: int, first: int, folder: Path, device: torch.device, say: Callable[[str], None]):
        self.numbers = range(first, first + count)
        self.folder, self.device, self.say = folder, device, say
        self.profiler: profile | None = None
        self.steps, self.seconds = 0, 0.0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a training step."""
        if number not in self.numbers:
            yield
            return
        if self.profiler is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.profiler = profile(activities=activities)
            self.profiler.start()
        begin = time.perf_counter()
        with record_function(f"training step {number}"):
            yield
            if self.device.type == "cuda":  # what it launched belongs to it
                torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - begin
        self.steps += 1
        if number == self.numbers[-1]:
            self.close()

    def close(self) -> None:
        """Write and tell, also where the run ends before all steps were seen."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        path = self.folder / f"profile-step-{self.numbers[0]:08d}.json"
        profiler.export_chrome_trace(str(path))
        self.say(
            "\n".join([f"trace of {self.steps} steps: {path} (chrome://tracing, perfetto.dev)", *self.table(profiler)])
        )

    def table(self, profiler: profile) -> list[str]:
        """A line for each kind of work: milliseconds a step, and its share of the step."""
        on_gpu = self.device.type == "cuda"
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        spent = dict.fromkeys([*KINDS, OTHER], 0.0)
        for event in profiler.key_averages():
            if event.device_type == kind and not event.is_user_annotation and not event.key.startswith("training step"):
                spent[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        whole = 1e6 * self.seconds
        spent[IDLE] = max(0.0, whole - sum(spent.values()))
        return [f"  {name:24} {us / 1e3 / self.steps:10.1f} ms  {us / whole:6.1%}" for name, us in spent.items() if us]


def kind_of(name: str) -> str:
    """What kind of work a kernel or operation does."""
    name = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), OTHER)
