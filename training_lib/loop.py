"""The loop of a training run: steps, evaluations and checkpoints, to the last step or a signal, and what is told of them."""

import argparse
import contextlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from classifier_lib import Qwen2ForClassifier
from common_lib.files import LineFile, OutputError, read_rows
from common_lib.progress import Progress, format_count, format_seconds
from common_lib.signals import StopSignal
from common_lib.tracking import Tracker
from training_lib.batch_order import RankBatches
from training_lib.checkpoints import save_checkpoint
from training_lib.compiling import graphs_compiled
from training_lib.evaluation import evaluate, format_evaluation
from training_lib.hub_push import HubPusher
from training_lib.packing import MicroBatch
from training_lib.plan import TrainingPlan
from training_lib.ranks import PATIENT, STEPPING, World, clear_gradients, clip_gradients
from training_lib.step import TrainStep, learning_rate, peak_flops, step_flops
from training_lib.step_profile import SKIPPED, StepProfile


@dataclass
class TrainingRun:
    """The loop and what it writes: metrics.jsonl, the tracker, checkpoints, the hub."""

    args: argparse.Namespace
    world: World
    plan: TrainingPlan
    model: Qwen2ForClassifier  # as it is saved; `step.model` is how it is called
    step: TrainStep
    optimizer: torch.optim.Optimizer
    tracker: Tracker
    pusher: HubPusher | None

    def __post_init__(self):
        self.metrics, self.progress = None, None
        with self.world.together():
            if self.world.rank == 0:
                self.metrics = open_metrics(self.plan.run_dir / "metrics.jsonl", self.plan.step)
                self.progress = Progress(self.progress_line)
        self.tracker.log_configs(vars(self.args) | {"attention": self.plan.attention.name, "versions": versions()})
        self.record: dict[str, float] = {}  # of the last step
        self.graphs = graphs_compiled()  # before this run
        first, count = self.plan.step + SKIPPED + 1, self.args.profile if self.world.rank == 0 else 0
        self.profile = StepProfile(count, first, self.plan.run_dir, self.world.device, self.say)
        self.begun = self.clock = time.perf_counter()
        self.waited = 0.0  # for the data of the last step

    def train(self, stop: StopSignal) -> int:
        """Every step that is left. Returns the exit status."""
        args, first = self.args, self.plan.step
        steps = timed(read_steps(args, self.plan.train, first, self.world))
        for done, (batches, self.waited) in enumerate(steps, first + 1):
            with self.profile.step(done):
                self.train_step(done, batches)
            signals = max(self.world.gather(stop.received or 0))
            if done == first + 1:  # all has been compiled
                self.world.wait_at_most(STEPPING)
            if args.eval_every > 0 and (done % args.eval_every == 0 or done == args.num_steps):
                with self.world.patient():
                    self.evaluate(done)
            if done % args.save_every == 0 or done == args.num_steps or signals:
                with self.world.patient():
                    self.save(done)
            if signals and done < args.num_steps:
                name = signal.Signals(signals).name
                self.say(f"stopped by {name} after step {done}, which is saved; the same command goes on")
                return 0 if signals == signal.SIGTERM else 128 + signals
            self.clock = time.perf_counter()  # a step's seconds include waiting for its data, not evaluating and saving
        self.say(f"done: {args.num_steps} steps; the value model is {self.plan.run_dir / 'latest'}")
        return 0

    def train_step(self, number: int, batches: list[MicroBatch]) -> None:
        """One optimizer step, numbered from 1.

        A loss or gradient that is not finite is a UserError, before the weights change.
        """
        args = self.args
        batches = self.step.pad_to_same_count(batches)
        with torch.autograd.set_detect_anomaly(args.debug, check_nan=False):
            losses = self.step.backward(batches)
        counts = [(b.input_ids.size, b.num_tokens, len(b.token_index), b.num_pairs) for b in batches]
        loss, computed, real, owned, pairs = self.world.sum([sum(losses), *map(sum, zip(*counts, strict=True))])
        lr = args.max_lr if args.disable_lr_schedule else learning_rate(number - 1, args.num_steps, args.max_lr)
        norm = clip_gradients(self.step.model, args.grad_norm_clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.stop_not_finite(number, loss, norm, losses, batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        clear_gradients(self.step.model, self.optimizer)

        seconds = time.perf_counter() - self.clock
        self.record = {
            "step": number, "loss": loss, "lr": lr, "grad_norm": norm, "seconds": seconds,
            "data_seconds": self.waited, "tokens_per_s": computed / seconds, "real_tokens_per_s": real / seconds,
            "loss_tokens_per_s": owned / seconds, "graphs": graphs_compiled() - self.graphs,
        }  # fmt: skip
        if peak := peak_flops(self.world.device):
            self.record["mfu"] = step_flops(self.model, real, pairs) / seconds / (peak * self.world.size)
        if (most := peak_memory(self.world)) is not None:
            self.record["peak_memory_gb"] = most
        self.log(number, self.record, attention=self.plan.attention.name)
        if self.progress:
            self.progress.update(now=number == self.plan.step + 1)

    def stop_not_finite(
        self, step: int, loss: float, norm: float, losses: list[float], batches: list[MicroBatch]
    ) -> None:
        """Raise on all ranks what the first rank with a loss that is not finite has to say."""
        sample = self.step.find_nonfinite_sample(batches)
        message = None
        if math.isfinite(loss):
            message = f"step {step}: the gradient's norm is {norm} (loss {loss:.4g})"
        elif not all(map(math.isfinite, losses)):
            message = f"step {step}, rank {self.world.rank}: the loss is {loss}; sample {sample}"
        advice = "; nothing was updated and the last checkpoint is whole: lower --max_lr, or look at that sample"
        self.world.raise_together(message and message + advice)

    def evaluate(self, done: int) -> None:
        metrics = evaluate(self.step, self.plan.validation)
        self.say(f"step {done} {format_evaluation(metrics)}")
        self.log(done, {f"eval/{name}": value for name, value in metrics.items()})

    def save(self, done: int) -> None:
        """Write the checkpoint of the steps done, and push it."""
        trainer = {
            "format": 1, "arguments": vars(self.args), "data": self.plan.data, "world_size": self.world.size,
            "attention": self.plan.attention.name, "tracker": self.tracker.id, "versions": versions(),
            "record": self.record,
        }  # fmt: skip
        path = save_checkpoint(
            self.plan.run_dir, done, self.model, self.optimizer, self.world, trainer, self.plan.model_dir,
            self.args.max_keep_ckpts, in_use=self.pusher.in_use if self.pusher else (),
        )  # fmt: skip
        if self.pusher:
            self.pusher.push(path, done)

    def log(self, step: int, metrics: dict[str, float], **words: str) -> None:
        """A line of metrics.jsonl, which is the local record of truth, and the numbers to the tracker."""
        with self.world.together():
            if self.metrics:
                self.metrics.append({"step": step} | metrics | words)
        self.tracker.log_metrics({name: value for name, value in metrics.items() if name != "step"}, step=step)

    def say(self, message: str) -> None:
        """A line that stays, behind the last state of the progress line."""
        if self.progress:
            if self.record:
                self.progress.close()
            print(message, file=sys.stderr, flush=True)

    def progress_line(self) -> str:
        """The last step's numbers in words."""
        record, num_steps = self.record, self.args.num_steps
        seconds_a_step = (time.perf_counter() - self.begun) / (record["step"] - self.plan.step)
        mfu = f" MFU {record['mfu']:.1%}" if "mfu" in record else ""
        return (
            f"step {record['step']}/{num_steps} loss {record['loss']:.4f} lr {record['lr']:.1e} norm {record['grad_norm']:.2f}"
            f" tokens/s {format_count(record['tokens_per_s'])} (real {format_count(record['real_tokens_per_s'])},"
            f" loss {format_count(record['loss_tokens_per_s'])}){mfu}"
            f" ETA {format_seconds(seconds_a_step * (num_steps - record['step']))}"
        )

    def close(self) -> None:
        """Every rank calls it: rank 0 may push for long, and then the ranks leave together."""
        self.world.wait_at_most(PATIENT)
        self.profile.close()
        if self.metrics:
            with contextlib.suppress(OutputError):  # told already, by the line or the checkpoint that did not fit
                self.metrics.close()
        if self.pusher:
            self.pusher.close()
        self.tracker.close()


def read_steps(args: argparse.Namespace, batches: RankBatches, first: int, world: World) -> Iterator[list[MicroBatch]]:
    """This rank's micro batches of steps `first` .. num_steps - 1; a data error of one rank is raised on all."""
    workers = args.num_workers if args.num_workers is not None else 2 if world.device.type == "cuda" else 0
    loader = DataLoader(
        batches, batch_size=None, sampler=range(first, args.num_steps), num_workers=workers,
        generator=torch.Generator(),  # starting a loader draws a seed, which must not move the dropout's noise
    )  # fmt: skip
    for found in loader:
        world.raise_together(found if isinstance(found, str) else None)
        yield found


def timed(steps: Iterator[list[MicroBatch]]) -> Iterator[tuple[list[MicroBatch], float]]:
    """Each with the seconds that it was waited for, by this rank or by another that it waited for."""
    while True:
        begin = time.perf_counter()
        found = next(steps, None)
        if found is None:
            return
        yield found, time.perf_counter() - begin


def peak_memory(world: World) -> float | None:
    """GB of tensors on a GPU at most since this was last asked, of the rank that had most; None on a CPU."""
    if world.device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)
    return max(world.gather(peak)) / 1e9


def open_metrics(path: Path, last_step: int) -> LineFile:
    """metrics.jsonl, to go on after `last_step`: later lines belong to steps that a stop has undone, and are removed."""
    metrics = LineFile(path, separators=(", ", ": "))
    if (end := next((offset for offset, row in read_rows(path) if row["step"] > last_step), None)) is not None:
        os.truncate(path, end)
    return metrics


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("torch", "transformers", "datasets", "numpy")
    }
