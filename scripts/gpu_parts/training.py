"""Training: the real step on every layout against a plain reference, its speed, and what packing saves."""

import functools
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

from classifier_lib import Qwen2ForClassifier
from gpu_parts.layouts import MICRO_BATCH, synthetic_table, what_packing_saves
from gpu_parts.models import SHAPES, free_memory, timed, value_model
from gpu_parts.needs import need
from gpu_parts.released import released_steps, speed_figures
from gpu_parts.report import Report
from training_lib import attention as attention_module
from training_lib.arguments import parse_args
from training_lib.attention import FLEX, Attention, choose_attention
from training_lib.batch_order import RankBatches
from training_lib.compiling import compile_layers, graphs_compiled
from training_lib.packing import MicroBatch, Trace
from training_lib.ranks import World
from training_lib.rollout_table import RolloutTable
from training_lib.step import TrainStep, make_optimizer, set_up_model

# ---------------------------------------------------------------------------------------------------------------------
# One step


@dataclass(frozen=True)
class Case:
    """A way to run a step."""

    packing: str
    group: int = 4  # roll-outs of one roll-in that stay together
    compiled: bool = False
    attention: Attention | None = None  # None: what a run takes here

    @property
    def name(self) -> str:
        group = f", groups of {self.group}" if self.packing == "tree" else ""
        kernel = f", {self.attention.name}" if self.attention else ""
        return f"{self.packing}{group}{kernel}, {'compiled' if self.compiled else 'eager'}"


CASES = [  # the ones that matter most first: the time may end
    Case("none"), Case("tree"),  # and then the released command's steps
    Case("tree", compiled=True), Case("pack"), Case("none", compiled=True),
    Case("pack", compiled=True), Case("tree", 1), Case("tree", 1, compiled=True),
]  # fmt: skip
COMPARED_FIRST = 2
CHECK = {"tiny": 1 / 128, "small": 1 / 64, "full": 1 / 8}  # scale of the lengths where gradients are compared
SPEED = {"tiny": 1 / 128, "small": 1 / 32, "full": 1.0}
RIGHT, SPEED_TABLE = "relative difference to plain roll-outs one by one, float32", "one step of 8 roll-outs"
SWITCHED = 1e-2  # a unit of the head's ReLU within rounding of 0 may switch: seen in float32, 3e-3 of all gradients
FOUND = 3.0  # a wrong mask must be that many times beyond the bound of a right one


class StepBench:
    """What all cases share: roll-outs, and the reference's loss and gradients on them."""

    def __init__(self, report: Report):
        self.report = report
        self.device = torch.device(report.device, *([0] if report.device == "cuda" else []))
        self.world = World(0, 1, self.device)
        self.autocast = self.device.type == "cuda"  # as train_classifier.py does
        vocab = SHAPES[report.size]["vocab_size"]
        self.check, self.speed = (synthetic_table(4, vocab, scale[report.size]) for scale in (CHECK, SPEED))
        self.seconds: dict[bool, float] = {}  # that a case took, by whether it was compiled
        self._reference: tuple[int, tuple[float, list[torch.Tensor], float]] | None = None

    def batches(
        self, table: RolloutTable, case: Case, attention: Attention, micro: int = MICRO_BATCH
    ) -> list[MicroBatch]:
        """MICRO_BATCH roll-outs, in rows of at most `micro`."""
        order = RankBatches(table, 0, MICRO_BATCH, micro, case.packing, case.group, multiple=attention.row_multiple)
        return order[0]

    def traces(self, case: Case) -> list[Trace]:
        order = RankBatches(self.check, 0, MICRO_BATCH, MICRO_BATCH, "none", case.group)
        return [self.check.trace(rollout) for rollout in order.rank_units(0).ravel().tolist()]

    def reference(self, group: int) -> tuple[float, list[torch.Tensor], float]:
        """(loss, gradients) in float32, and how much of these rounding alone changes under autocast, relative. Those of
        one group's roll-outs are kept, on the CPU: 6 GB at 1.5B."""
        if self._reference is None or self._reference[0] != group:
            loss, model = self.one_by_one(group, False)
            expected = [parameter.grad.cpu() for parameter in model.parameters()]
            if self.device.type == "cuda":
                expected = [gradient.pin_memory() for gradient in expected]
            rounding = distance(self.one_by_one(group, True)[1], expected) if self.autocast else 0.0
            self._reference = group, (loss, expected, rounding)
        return self._reference[1]

    def one_by_one(self, group: int, autocast: bool) -> tuple[float, Qwen2ForClassifier]:
        """(loss, model with its gradients) of one roll-out after the other, without padding: plain causal attention and
        torch's own cross entropy."""
        model = value_model(self.report.size, self.report.device, torch.float32).train()
        total = 0.0
        for trace in self.traces(Case("none", group)):
            ids = torch.tensor(trace.tokens[None].astype(np.int64), device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                logits = model(ids, use_cache=False).logits[0, trace.start :]
            target = torch.full((len(logits),), trace.label, device=self.device)
            loss = F.cross_entropy(logits.float(), target) / MICRO_BATCH
            loss.backward()
            total += loss.item()
        return total, model

    def step(self, case: Case) -> TrainStep:
        """The model of a run, without attention dropout, which would differ, and the run's step."""
        attention = case.attention or choose_attention(case.packing, self.device.type, self.autocast)
        args = parse_args(["--packing", case.packing, "--p_dropout", "0"])
        model = value_model(self.report.size, self.report.device, torch.float32)
        set_up_model(model, args, attention, self.world)
        if case.compiled:
            compile_layers(model, backend="inductor" if self.device.type == "cuda" else "aot_eager")
        return TrainStep(model, self.world, attention, self.autocast, MICRO_BATCH, packed=case.packing != "none")


def distance(model: Qwen2ForClassifier, expected: list[torch.Tensor]) -> float:
    """Of all gradients together, relative (Euclidean norms). The model's are taken away."""
    off = size = 0.0
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        wanted = gradient.to(parameter.device, non_blocking=True)
        off = off + (parameter.grad - wanted).square().sum()
        size = size + wanted.square().sum()
    model.zero_grad(set_to_none=True)
    return (off / size).sqrt().item()


def with_wrong_mask(attention: Attention) -> Attention:
    """An attention whose packed rows see across the borders of their traces."""

    def mask_inputs(batch: MicroBatch, device: torch.device):
        whole = np.full_like(batch.end, batch.end.shape[1])
        places = np.arange(batch.end.shape[1])[None]
        return attention.mask_inputs(replace(batch, end=whole, position_ids=places, blocks=None), device)

    return replace(attention, mask_inputs=mask_inputs)


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """FlexAttention with its backward on a CPU, which torch has not: by the backend aot_eager."""
    by_eager = functools.cache(functools.partial(torch.compile, backend="aot_eager"))
    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *parts: None),
        mock.patch.object(attention_module, "_compile", by_eager),
    ):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def run(report: Report) -> None:
    bench = StepBench(report)
    on_cpu = report.device == "cpu"
    if on_cpu:
        report.say("a CPU runs packed rows on a dense mask, and compiles by aot_eager: right or wrong, not how fast")
    else:
        report.say("attention dropout is 0, so that gradients can be compared")
    with report.going_on("what packing saves"):
        what_packing_saves(report, *((4, 1) if report.size == "tiny" else ()))
    cases = [*CASES, Case("tree", attention=FLEX)] if on_cpu else CASES
    if report.size == "tiny":
        report.leave_out("compiled, but for one layout", "--tiny: compiling takes seconds")
        cases = [case for case in cases if not case.compiled or case == CASES[2]]
    for i, case in enumerate(cases):
        if i == COMPARED_FIRST:
            released_steps(report)
        stated = need("training", case.name, report.size)
        if report.has_time(
            bench.seconds.get(case.compiled) or max(stated, 2 * bench.seconds.get(False, 0.0)), case.name
        ):
            begin = time.monotonic()
            with report.going_on(case.name), flex_on_cpu() if case.attention else nullcontext():
                measure(bench, case)
            bench.seconds[case.compiled] = time.monotonic() - begin
            gc.collect()
            torch._dynamo.reset()


def measure(bench: StepBench, case: Case) -> None:
    report, step = bench.report, bench.step(case)
    before = graphs_compiled()
    compare(bench, case, step)
    made = graphs_compiled() - before
    if case.attention or (
        report.size == "full" and not case.compiled
    ):  # a stand-in for a GPU's, or nobody's way to train
        return
    optimizer = make_optimizer(step.model, 1e-5, (0.9, 0.95), 0.1)
    step.model.dropout.p = 0.05

    def whole_step(batches: list[MicroBatch]) -> None:
        step.backward(batches)
        torch.nn.utils.clip_grad_norm_(step.model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for micro in (MICRO_BATCH, MICRO_BATCH // 2):
        batches = bench.batches(bench.speed, case, step.attention, micro)
        try:
            whole_step(batches)  # warm-up, of longer rows
            free_memory(report.device)
            seconds, _ = timed(report.device, functools.partial(whole_step, batches))
            break
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            free_memory(report.device)
            report.leave_out(f"{case.name}, micro batches of {micro} roll-outs", "out of memory")
    else:
        raise torch.OutOfMemoryError(f"with micro batches of {MICRO_BATCH // 2}, too")
    speed_figures(report, SPEED_TABLE, case.name, step, batches, seconds)
    if case.compiled:
        report.figure(SPEED_TABLE, "graphs", made, case=case.name)
        report.figure(
            SPEED_TABLE,
            "compiled again for longer rows",
            graphs_compiled() - before - made,
            case=case.name,
            at_most=made,
        )


def compare(bench: StepBench, case: Case, step: TrainStep) -> None:
    """Loss and gradients of the real step against the reference's, and of a step with a wrong mask."""
    report, batches = bench.report, bench.batches(bench.check, case, step.attention)
    loss, expected, rounding = bench.reference(case.group)
    bound = max(1.5 * rounding, SWITCHED)
    first, losses = timed(report.device, lambda: step.backward(batches))
    off = distance(step.model, expected)
    if case.compiled or step.attention is FLEX:
        again, _ = timed(report.device, lambda: step.backward(batches))
        step.model.zero_grad(set_to_none=True)
        report.figure(SPEED_TABLE, "compile", first - again, "s", case=case.name)
    if bench.autocast:
        report.figure(RIGHT, "gradients, rounding alone", rounding, case=case.name)
    report.figure(RIGHT, "loss", abs(sum(losses) - loss) / loss, case=case.name, at_most=max(rounding, 1e-4))
    report.figure(RIGHT, "gradients", off, case=case.name, at_most=bound)
    if case.packing != "none" and not case.compiled:
        replace(step, attention=with_wrong_mask(step.attention)).backward(batches)
        wrong = distance(step.model, expected)
        report.figure(RIGHT, "gradients, planted wrong mask", wrong, case=case.name, at_least=FOUND * bound)
