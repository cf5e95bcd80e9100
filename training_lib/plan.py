"""Where a training run starts, and on what data: everything that can be checked before the model is loaded."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common_lib.cli import UserError
from common_lib.models import ModelInfo, inspect_model, resolve_model
from training_lib.arguments import IDENTITY, ROUNDING, go_on_with
from training_lib.attention import ATTENTIONS, Attention, choose_attention
from training_lib.batch_order import RankBatches, hold_out
from training_lib.checkpoints import checkpoints, newest_resumable, read_trainer
from training_lib.fitting import settle_memory
from training_lib.layout import pair_cost, settle_layout
from training_lib.memory import TrainingMemory
from training_lib.precision import Precision, settle_precision
from training_lib.ranks import World
from training_lib.rollout_data import load_rollouts
from training_lib.rollout_table import RolloutTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """What `make_plan` found."""

    run_dir: Path
    checkpoint: Path | None
    trainer: dict[str, Any]  # what its trainer.json says
    model_dir: Path  # the weights to start from
    has_head: bool  # or they are a backbone, which gets a fresh one
    precision: Precision
    attention: Attention
    memory: TrainingMemory | None  # that a step will hold; None where there is none
    saved: float | None  # share of the tokens that shared prefixes save, where that was asked for
    train: RankBatches
    validation: RankBatches | None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.trainer.get("step", 0)

    @property
    def layout(self) -> str:
        """The rows that are read, in words."""
        batches = self.train
        if batches.packing == "none":
            return f"packing none, {batches.micro_batch_size} roll-outs a micro batch"
        saved = "" if self.saved is None else f" (shared prefixes are {self.saved:.1%} of the tokens)"
        return f"packing {batches.packing}{saved}, rows of {batches.row_tokens} tokens"

    @property
    def data(self) -> dict[str, int]:
        """What is noted of the training data, to know them again."""
        table = self.train.table
        return {"rows": len(table.rows), "rollouts": len(table), "rollout_tokens": int(table.roll_out_lengths.sum())}


def make_plan(args: argparse.Namespace, world: World) -> TrainingPlan:
    """Find the checkpoint to go on from, and read and check model folder and data. Raises UserError.

    Fills in what the flags leave to the run: packing, row_tokens, fsdp, gradient_checkpointing and activation_budget, as the
    checkpoint was trained, or as data and device ask for.
    """
    run_dir = Path(args.save_dir) / args.run_name
    checkpoint = find_checkpoint(args, world, run_dir)
    trainer = read_trainer(checkpoint) if checkpoint else {}
    going_on, attention = checkpoint and not args.eval_only, None
    old = go_on_with(args, trainer["arguments"]) if going_on else {}
    precision = settle_precision(args, world.device.type)
    if going_on:
        attention = choose_attention(
            args.packing, world.device.type, precision.half_attention, args.p_dropout > 0, kept=ATTENTIONS.get(trainer.get("attention")),
        )  # fmt: skip
        check_same_run(args, old, trainer.get("attention"), run_dir, attention)
    has_head = bool(checkpoint or args.init_from)
    if args.eval_only and not has_head:
        raise UserError(f"--eval_only: {run_dir} has no checkpoint; give --run_name of a trained run, or --init_from")
    info = find_model(args, world)
    tables = read_tables(args, world, info.vocab_size)
    saved = settle_layout(args, tables[0], world)
    attention = attention or choose_attention(
        args.packing, world.device.type, precision.half_attention, args.p_dropout > 0
    )
    train, validation = (
        RankBatches(
            table, args.seed, args.total_batch_size, args.micro_batch_size, args.packing, args.small_group_size,
            args.train_bt_model, world.rank, world.size, attention.row_multiple, args.row_tokens, attention.prepare, pair_cost(info),
        ) if table else None
        for table in tables
    )  # fmt: skip
    check_enough(args, train, validation)
    memory = None if args.eval_only else settle_memory(args, info, precision, attention, tables[0], world)
    plan = TrainingPlan(
        run_dir, checkpoint, trainer, checkpoint or Path(info.path), has_head, precision, attention, memory, saved, train,
        validation,
    )  # fmt: skip
    if going_on and trainer["data"] != plan.data:
        then, now = trainer["data"], plan.data
        raise UserError(
            f"{args.data_path} is not what {run_dir} was trained on ({then} then, {now} now); give another --run_name"
        )
    return plan


def find_checkpoint(args: argparse.Namespace, world: World, run_dir: Path) -> Path | None:
    """The checkpoint that all ranks start from, if there is one. Raises UserError."""
    with world.together():
        newest = checkpoints(run_dir)[-1:] if args.eval_only else [newest_resumable(run_dir)]
    found = world.gather([str(path) for path in newest if path])
    if any(other != found[0] for other in found):
        raise UserError(f"--save_dir {args.save_dir}: the ranks see different checkpoints; every node must see it")
    return Path(found[0][0]) if found[0] else None


def check_enough(args: argparse.Namespace, train: RankBatches, validation: RankBatches | None) -> None:
    """The data must fill a step and an evaluation. Raises UserError."""
    if train.steps_per_epoch == 0:
        kind = "pairs of a correct and an incorrect roll-out" if args.train_bt_model else "roll-outs"
        raise UserError(
            f"{args.data_path} has fewer {kind} ({train.units_per_epoch}) than a step of --total_batch_size {args.total_batch_size} takes"
        )
    if validation and not validation.units_per_epoch:
        raise UserError(
            "the validation data have no pair of a correct and an incorrect roll-out; hold more problems out"
        )


def check_same_run(
    args: argparse.Namespace, old: dict[str, Any], old_attention: str | None, run_dir: Path, attention: Attention
) -> None:
    """Arguments that decide what is computed must be those that the run was started with; others are told. `old`: those,
    and the name of the attention."""
    if changed := [name for name in IDENTITY if old.get(name) != getattr(args, name)]:
        flags = {"held_out": "what is held out (--eval_every, --eval_size, --validation_data_path)"}
        shown = "; ".join(
            f"{flags.get(name, f'--{name}')} was {old.get(name)}, is {getattr(args, name)}" for name in changed
        )
        raise UserError(
            f"{run_dir} holds a run of another configuration: {shown}; give the old values, or another --run_name"
        )
    before = ATTENTIONS.get(old_attention, attention)  # older checkpoints do not say
    if args.p_dropout > 0 and before.has_dropout != attention.has_dropout:
        raise UserError(
            f"{run_dir} was trained with attention {before.name} and would go on with {attention.name}, but only one of "
            f"them has attention dropout; give the --packing and --device of before, or another --run_name"
        )
    if before is not attention:
        logger.info("attention was %s at the checkpoint and is %s now", before.name, attention.name)
    if changed := [name for name in ROUNDING if old.get(name) != getattr(args, name)]:
        logger.info("changed since the checkpoint, equal to rounding (dropout apart): %s", ", ".join(changed))


def find_model(args: argparse.Namespace, world: World) -> ModelInfo:
    """The model to start from, whose head and positions fit the run."""
    source, name = (args.init_from, "--init_from") if args.init_from else (args.model_path, "--model_path")
    info = inspect_model(world.rank0_first(lambda: resolve_model(source, name)), name)
    if args.max_length > info.max_position_embeddings:
        raise UserError(
            f"--max_length {args.max_length} is beyond the {info.max_position_embeddings} positions of {info.path}; "
            f"give {info.max_position_embeddings} at most"
        )
    if args.init_from and info.num_labels != args.num_labels:
        has = "no value head" if info.num_labels is None else f"a head of {info.num_labels} labels"
        raise UserError(f"{name} {info.path} has {has}, --num_labels is {args.num_labels}; they must agree")
    return info


def read_tables(args: argparse.Namespace, world: World, vocab_size: int) -> tuple[RolloutTable, RolloutTable | None]:
    """(training, validation); None where nothing is evaluated."""

    def read(path: str, max_rows: int | None) -> RolloutTable:
        return world.rank0_first(lambda: load_rollouts(
            path, vocab_size=vocab_size, max_length=args.max_length, num_response=args.data_num_response,
            label_key=args.label_key, skip_bad_rows=args.skip_bad_rows, max_rows=max_rows,
        ))  # fmt: skip

    table = read(args.data_path, 256 if args.debug else None)
    if args.eval_every <= 0:
        return table, None
    if args.validation_data_path:
        return table, read(args.validation_data_path, args.eval_size)
    return hold_out(table, args.eval_size, args.seed)
