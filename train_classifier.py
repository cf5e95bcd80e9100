"""Train the value model on roll-outs: a Qwen2 with a head that predicts, at every token, how the roll-out will end.

    # the released command, on a node of 4 GPUs
    torchrun --standalone --nproc_per_node=4 train_classifier.py --eval_every -1 --save_every 486 --num_steps 12170 \
        --max_lr 0.0001 --data_path VGS-AI/OpenR1-VM --data_num_response 56 \
        --model_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --total_batch_size 64 --micro_batch_size 8 \
        --small_group_size 2 --run_name single_node_run --track --compile --push_to_hub
    # two CPU ranks, a model and data of your own (collect_rollouts.py makes the data)
    torchrun --standalone --nproc_per_node=2 train_classifier.py --model_path GENERATOR --data_path ROLLOUTS \
        --max_length 256 --total_batch_size 32 --micro_batch_size 16 --num_steps 500 --save_dir runs --run_name first

Everything lies in SAVE_DIR/RUN_NAME: metrics.jsonl and the checkpoints, `latest` among them, which inference_eval.py
takes as --classifier_ckpt_path. Stopped at any moment, the same command goes on from the newest checkpoint.
"""

# ruff: noqa: E402 (two lines must run before the slow imports)

import argparse
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common_lib.cli import UserError, enable_fast_transfers, run_script, set_up_logging
from training_lib.launch import follow_parent

if __name__ == "__main__":
    follow_parent()  # before the slow imports
enable_fast_transfers()  # before anything imports huggingface_hub

import torch
from torch.utils.data import DataLoader

from common_lib.models import ModelInfo, inspect_model, resolve_model
from common_lib.progress import Progress
from common_lib.tracking import Tracker, make_tracker
from training_lib.arguments import IDENTITY, ROUNDING, parse_args
from training_lib.attention import choose_attention, row_multiple
from training_lib.batch_order import RankBatches, hold_out
from training_lib.checkpoints import checkpoints, lock_run, read_trainer, restore, save_checkpoint
from training_lib.evaluation import evaluate, format_evaluation
from training_lib.hub_push import HubPusher
from training_lib.loop import (
    MetricsLog,
    StopSignal,
    World,
    clip_gradients,
    distribute,
    learning_rate,
    make_optimizer,
    peak_flops,
    progress_line,
    start_ranks,
    step_flops,
)
from training_lib.packing import MicroBatch
from training_lib.rollout_data import RolloutTable, load_rollouts
from training_lib.step import Step, load_model

logger = logging.getLogger("train_classifier")

# ---------------------------------------------------------------------------------------------------------------------
# Everything that can be checked before the model is loaded


@dataclass
class Plan:
    """Where to start, and with what data."""

    run_dir: Path
    checkpoint: Path | None
    trainer: dict[str, Any]  # what its trainer.json says
    step: int
    model_dir: Path  # the weights to start from
    info: ModelInfo
    train: RankBatches
    validation: RankBatches | None


def make_plan(args: argparse.Namespace, world: World, attention: str) -> Plan:
    """Find the checkpoint to go on from, and read and check model folder and data. Raises UserError."""
    run_dir = Path(args.save_dir) / args.run_name
    found = world.gather([str(path) for path in checkpoints(run_dir)][-1:])
    if any(other != found[0] for other in found):
        raise UserError(f"--save_dir {args.save_dir}: the ranks see different checkpoints; every node must see it")
    checkpoint = Path(found[0][0]) if found[0] else None
    trainer = read_trainer(checkpoint) if checkpoint else {}
    if checkpoint and not args.eval_only:
        check_same_run(args, trainer, run_dir)
    source, name = (args.init_from, "--init_from") if args.init_from else (args.model_path, "--model_path")
    start_dir = world.first_alone(lambda: resolve_model(source, name))
    info = inspect_model(start_dir, name)
    check_model(args, info, name)
    data = {"vocab_size": info.vocab_size, "max_length": args.max_length, "num_response": args.data_num_response,
            "label_key": args.label_key, "skip_bad_rows": args.skip_bad_rows}  # fmt: skip
    debug_rows = 256 if args.debug else None
    table = world.first_alone(lambda: load_rollouts(args.data_path, max_rows=debug_rows, **data))
    held_out = None
    if args.eval_every > 0 and args.validation_data_path:
        held_out = world.first_alone(lambda: load_rollouts(args.validation_data_path, max_rows=args.eval_size, **data))
    elif args.eval_every > 0:
        table, held_out = hold_out(table, args.eval_size, args.seed)
    train, validation = (part and make_batches(args, part, world, attention) for part in (table, held_out))
    if train.steps_per_epoch == 0:
        kind = "pairs of a correct and an incorrect roll-out" if args.train_bt_model else "roll-outs"
        raise UserError(
            f"{args.data_path} has fewer {kind} ({train.units_per_epoch}) than a step of --total_batch_size {args.total_batch_size} takes"
        )
    plan = Plan(run_dir, checkpoint, trainer, trainer.get("step", 0), checkpoint or start_dir, info, train, validation)
    if checkpoint and not args.eval_only and trainer["data"] != describe_data(plan):
        then, now = trainer["data"], describe_data(plan)
        raise UserError(
            f"{args.data_path} is not what {run_dir} was trained on ({then} then, {now} now); give another --run_name"
        )
    return plan


def make_batches(args: argparse.Namespace, table: RolloutTable, world: World, attention: str) -> RankBatches:
    return RankBatches(
        table, args.seed, args.total_batch_size, args.micro_batch_size, args.packing, args.small_group_size,
        args.train_bt_model, world.rank, world.size, row_multiple(attention),
    )  # fmt: skip


def describe_data(plan: Plan) -> dict[str, int]:
    table = plan.train.table
    return {"rows": len(table.rows), "rollouts": len(table), "rollout_tokens": int(table.roll_out_lengths.sum())}


def check_same_run(args: argparse.Namespace, trainer: dict[str, Any], run_dir: Path) -> None:
    """Arguments that decide what is computed must be those that the run was started with."""
    old = trainer["arguments"]
    if changed := [name for name in IDENTITY if old.get(name) != getattr(args, name)]:
        shown = "; ".join(f"--{name} was {old.get(name)}, is {getattr(args, name)}" for name in changed)
        raise UserError(
            f"{run_dir} holds a run of another configuration: {shown}; give the old values, or another --run_name"
        )
    if changed := [name for name in ROUNDING if old.get(name) != getattr(args, name)]:
        logger.info("changed since the checkpoint, equal to rounding (dropout apart): %s", ", ".join(changed))


def check_model(args: argparse.Namespace, info: ModelInfo, name: str) -> None:
    if args.max_length > info.max_position_embeddings:
        raise UserError(
            f"--max_length {args.max_length} is beyond the {info.max_position_embeddings} positions of {info.path}; "
            f"give {info.max_position_embeddings} at most"
        )
    if args.init_from and info.num_labels != args.num_labels:
        has = "no value head" if info.num_labels is None else f"a head of {info.num_labels} labels"
        raise UserError(f"{name} {info.path} has {has}, --num_labels is {args.num_labels}; they must agree")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def read_steps(args: argparse.Namespace, batches: RankBatches, first: int, world: World) -> Iterator[list[MicroBatch]]:
    """This rank's micro batches of steps `first` .. num_steps - 1; a data error of one rank is raised on all."""
    workers = args.num_workers if args.num_workers is not None else 2 if world.device.type == "cuda" else 0
    loader = DataLoader(
        batches, batch_size=None, sampler=range(first, args.num_steps), num_workers=workers, collate_fn=as_it_is,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator(),  # starting a loader draws a seed, which must not move the dropout's noise
    )  # fmt: skip
    for found in loader:
        world.raise_together(found if isinstance(found, str) else None)
        yield found


def as_it_is(item):
    return item


def train(args: argparse.Namespace, world: World) -> int:
    """Train to `num_steps`, or to a signal. Returns the exit status."""
    autocast = world.device.type == "cuda" if args.autocast is None else args.autocast
    attention = choose_attention(args.packing, world.device.type, autocast or args.param_dtype == "bf16")
    plan = make_plan(args, world, attention)
    lock = world.first_alone(lambda: lock_run(plan.run_dir) if world.rank == 0 and not args.eval_only else None)
    logger.info(
        "=> %d roll-outs a step = %d ranks x %d of %d roll-outs; %d steps an epoch; packing %s, attention %s, on %s",
        args.total_batch_size, world.size, args.total_batch_size // (world.size * args.micro_batch_size),
        args.micro_batch_size, plan.train.steps_per_epoch, args.packing, attention, world.device,
    )  # fmt: skip
    if args.use_dora:
        logger.info("--use_dora has no effect (it had none in the released code): all weights are trained")
    if plan.step >= args.num_steps and not args.eval_only:
        logger.info("%s: all %d steps are done; nothing is left to do", plan.run_dir, plan.step)
        return 0

    if args.eval_only and not (plan.checkpoint or args.init_from):
        raise UserError(
            f"--eval_only: {plan.run_dir} has no checkpoint; give --run_name of a trained run, or --init_from"
        )
    tracker, pusher = world.first_alone(lambda: open_services(args, plan, world))
    model = load_model(args, plan.model_dir, bool(plan.checkpoint or args.init_from), world, attention)
    distributed = distribute(model, world, args.fsdp)
    step = Step(args, distributed, world, attention, autocast)
    if args.eval_only:
        report_evaluation(evaluate(step, model, plan.validation), plan.step, world, [])
        return 0
    optimizer = make_optimizer(distributed, args.max_lr, (args.beta1, args.beta2), args.weight_decay)
    if plan.checkpoint:
        restore(plan.checkpoint, model, optimizer, world)
        logger.info("going on from %s", plan.checkpoint)
    run = Run(args, world, plan, model, distributed, optimizer, step, tracker, pusher)
    try:
        with StopSignal() as stop:
            return run.loop(stop)
    finally:
        run.close()
        if lock:
            lock.close()


def open_services(args: argparse.Namespace, plan: Plan, world: World) -> tuple[Tracker, HubPusher | None]:
    """Tracker and hub, on rank 0 only. Raises UserError where one is asked for and not set up."""
    if world.rank or args.eval_only:
        return make_tracker("none"), None
    pusher = HubPusher(args.run_name) if args.push_to_hub else None
    name, tags = args.run_name, args.logger_tags
    tracker = make_tracker(args.tracker, args.neptune_project, name, tags, plan.trainer.get("tracker"))
    if args.tracker != "none":
        logger.info("tracker: %s", tracker.where)
    return tracker, pusher


def report_evaluation(metrics: dict[str, float], step: int, world: World, sinks: Sequence[Any]) -> None:
    if world.rank == 0:
        print(f"step {step} {format_evaluation(metrics)}", file=sys.stderr, flush=True)
    for log in sinks:
        log(step, {f"eval/{name}": value for name, value in metrics.items()})


class Run:
    """The loop and what it writes: metrics.jsonl, the tracker, checkpoints, the hub."""

    def __init__(self, args, world, plan, model, distributed, optimizer, step, tracker, pusher):
        self.args, self.world, self.plan, self.step = args, world, plan, step
        self.model, self.distributed, self.optimizer = model, distributed, optimizer
        self.tracker, self.pusher = tracker, pusher
        main = world.rank == 0
        self.metrics = MetricsLog(plan.run_dir / "metrics.jsonl", plan.step) if main else None
        self.tracker.log_configs(vars(args) | {"versions": versions()})
        self.weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None
        self.record: dict[str, float] = {}
        self.begun, self.clock, self.first = 0.0, 0.0, plan.step
        self.saved = plan.step if plan.checkpoint else -1
        self.progress = Progress(lambda: progress_line(self.record, args.num_steps, self.eta())) if main else None

    def loop(self, stop: StopSignal) -> int:
        args, world, done = self.args, self.world, self.plan.step
        self.begun = self.clock = time.perf_counter()
        for batches in read_steps(args, self.plan.train, done, world):
            self.train_step(done, batches)
            done += 1
            signals = world.max([stop.received or 0])[0]
            if args.eval_every > 0 and (done % args.eval_every == 0 or done == args.num_steps):
                self.evaluate(done)
            if done % args.save_every == 0 or done == args.num_steps or signals:
                self.save(done)
            if signals and done < args.num_steps:
                self.say(
                    f"stopped by {signal.Signals(signals).name} after step {done}, which is saved; the same command goes on"
                )
                return 0 if signals == signal.SIGTERM else 128 + signals
            self.clock = time.perf_counter()  # a step's seconds include waiting for its data, not evaluating and saving
        self.say(f"done: {args.num_steps} steps; the value model is {self.plan.run_dir / 'latest'}")
        return 0

    def train_step(self, done: int, batches: list[MicroBatch]) -> None:
        """One optimizer step. `done`: steps before it. A loss or gradient that is not finite is a UserError, before the weights change."""
        args, world = self.args, self.world
        batches = self.step.in_step(batches)
        with torch.autograd.set_detect_anomaly(args.debug, check_nan=False):
            losses = self.step.backward(batches)
        counts = [
            sum(losses),
            sum(batch.input_ids.size for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(len(batch.token_index) for batch in batches),
            sum(batch.num_pairs for batch in batches),
        ]
        loss, computed, real, owned, pairs = world.sum(counts)
        lr = args.max_lr if args.disable_lr_schedule else learning_rate(done, args.num_steps, args.max_lr)
        norm = clip_gradients(self.distributed, args.grad_norm_clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.stop_not_finite(done + 1, loss, norm, losses, batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - self.clock
        self.record = {
            "step": done + 1, "loss": loss, "lr": lr, "grad_norm": norm, "seconds": seconds,
            "tokens_per_s": computed / seconds, "real_tokens_per_s": real / seconds, "loss_tokens_per_s": owned / seconds,
        }  # fmt: skip
        if self.peak:
            self.record["mfu"] = step_flops(self.model.config, self.weights, real, pairs) / seconds / self.peak
        self.log(done + 1, self.record)
        if self.progress:
            self.progress.update(now=done == self.first)

    def stop_not_finite(
        self, step: int, loss: float, norm: float, losses: list[float], batches: list[MicroBatch]
    ) -> None:
        """Raise on all ranks what the first rank with a loss that is not finite has to say."""
        sample = self.step.blame(batches)
        message = None
        if math.isfinite(loss):
            message = f"step {step}: the gradient's norm is {norm} (loss {loss:.4g})"
        elif not all(map(math.isfinite, losses)):
            message = f"step {step}, rank {self.world.rank}: the loss is {loss}; sample {sample}"
        advice = "; nothing was updated and the last checkpoint is whole: lower --max_lr, or look at that sample"
        self.world.raise_together(message and message + advice)

    def evaluate(self, done: int) -> None:
        self.say()
        report_evaluation(evaluate(self.step, self.model, self.plan.validation), done, self.world, [self.log])

    def save(self, done: int) -> None:
        if self.saved == done:
            return
        trainer = {
            "format": 1, "arguments": vars(self.args), "data": describe_data(self.plan), "world_size": self.world.size,
            "tracker": self.tracker.id, "versions": versions(), "record": self.record,
        }  # fmt: skip
        in_use = self.pusher.in_use if self.pusher else ()
        path = save_checkpoint(
            self.plan.run_dir, done, self.model, self.optimizer, self.world, trainer, self.plan.model_dir,
            self.args.max_keep_ckpts, in_use,
        )  # fmt: skip
        self.saved = done
        if self.pusher:
            self.pusher.push(path, done)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.metrics:
            self.metrics.write({"step": step} | metrics)
        self.tracker.log_metrics({name: value for name, value in metrics.items() if name != "step"}, step=step)

    def say(self, message: str = "") -> None:
        """A line that stays, behind the last state of the progress line."""
        if self.progress and self.record:
            self.progress.close()
        if message and self.world.rank == 0:
            print(message, file=sys.stderr, flush=True)

    def eta(self) -> float:
        """Seconds to go at the rate since this process began to train."""
        done = self.record["step"]
        return (time.perf_counter() - self.begun) / (done - self.first) * (self.args.num_steps - done)

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        if self.pusher:
            self.pusher.close()
        self.tracker.close()


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in ("torch", "transformers", "datasets", "numpy")
    }


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("classifier_lib").setLevel(logging.ERROR)  # what it says of the model, rank 0 says
    try:
        args = parse_args(argv, __doc__)
        return train(args, start_ranks(args.device, args.fsdp))
    except UserError:
        if rank:  # rank 0 tells it; the first to exit would make torchrun end the others before they spoke
            time.sleep(10)
            return 2
        raise
    finally:
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None and torch.distributed.get_world_size() == 1:
            torch.distributed.destroy_process_group()


def run_rank() -> None:
    """Run, and as one rank of several leave without the interpreter's teardown, in which gloo's threads now and then
    abort the process ("terminate called without an active exception"). Everything has been written and closed by then.
    """
    try:
        run_script(main)
    except SystemExit as end:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            if not end.code:
                torch.distributed.barrier()  # the first to go would take away the store that the others still use
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


if __name__ == "__main__":
    run_rank()
