"""Does a run fit its devices? Settles what memory has room for, and refuses what has none, before weights load."""

import argparse
import logging
import os

import numpy as np

from common_lib.cli import UserError
from common_lib.devices import memory_of
from common_lib.models import ModelInfo
from training_lib.arguments import AUTO, longest_unit
from training_lib.attention import SDPA, Attention
from training_lib.memory import (
    BUDGETS,
    StepShape,
    TrainingMemory,
    check_memory,
    choose_activation_budget,
    estimate_memory,
)
from training_lib.precision import Precision
from training_lib.ranks import World
from training_lib.rollout_table import RolloutTable

logger = logging.getLogger(__name__)


def settle_memory(
    args: argparse.Namespace, info: ModelInfo, precision: Precision, attention: Attention, table: RolloutTable, world: World
) -> TrainingMemory:  # fmt: skip
    """Fill in `gradient_checkpointing` and `activation_budget` where they are left to the run, by what the smallest of the
    ranks' cards has room for. Returns what a step will hold.

    Raises UserError where a GPU has no room; a CPU, which may have some elsewhere, is warned of.
    """
    free, total = memory_of(str(world.device))
    if world.device.type == "cpu":  # which the ranks of a machine share
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    card = min(world.gather(free))
    shape = step_shape(args, precision, attention, table, world.size)
    choose_what_to_keep(args, info, shape, attention, card)
    shape = step_shape(args, precision, attention, table, world.size)
    if world.device.type == "cuda":
        return check_memory(info, shape, card, f"{world.device} ({total / 1e9:.3g} GB)")
    try:
        return check_memory(info, shape, card, "the RAM")
    except UserError as error:
        logger.warning("%s", error)
        return estimate_memory(info, shape)


def choose_what_to_keep(
    args: argparse.Namespace, info: ModelInfo, shape: StepShape, attention: Attention, card: int
) -> None:
    """Of compiled layers as much as a card of `card` bytes has room for; whole layers are computed again where even the
    least is too much, or, without a choice of what, all."""
    left = args.gradient_checkpointing is None
    args.gradient_checkpointing = shape.checkpointing
    if shape.checkpointing or not args.compile or args.activation_budget != AUTO:
        return
    compiler_chooses = args.p_dropout == 0 or not attention.has_dropout or attention.noise_known
    budget = choose_activation_budget(info, shape, card, BUDGETS if compiler_chooses else BUDGETS[:1])
    if budget is None and left and not compiler_chooses:
        args.gradient_checkpointing = True
        logger.info("gradient checkpointing of whole layers: %s draws noise that is not to be drawn anew, and all that "
                    "layers compute has no room", attention.name)  # fmt: skip
    args.activation_budget = budget or (BUDGETS[-1] if compiler_chooses else 1.0)


def step_shape(
    args: argparse.Namespace, precision: Precision, attention: Attention, table: RolloutTable, ranks: int
) -> StepShape:
    """Of the arguments; no row is longer than the data can fill it."""
    longest = int(table.lengths(np.arange(len(table))).max(initial=1))
    packed = args.packing != "none"
    whole_layers = not args.compile if args.gradient_checkpointing is None else args.gradient_checkpointing
    if packed:
        tokens, shortest = min(args.row_tokens, args.total_batch_size * longest), longest_unit(args)
        tokens = -(-tokens // attention.row_multiple) * attention.row_multiple
    else:
        tokens, shortest = args.micro_batch_size * longest, longest
    budget = getattr(args, "activation_budget", 1.0)
    return StepShape(
        tokens, precision, ranks, whole_layers, args.compile, 1.0 if budget == AUTO else budget, args.num_labels,
        dense_mask=packed and attention is SDPA, packed=packed, shortest=shortest,
    )  # fmt: skip


def memory_line(memory: TrainingMemory, device: str) -> str:
    """The statement at the start."""
    shape, (free, total) = memory.shape, memory_of(device)
    kept = (
        "checkpointing"
        if shape.checkpointing
        else f"activation budget {shape.budget:g}"
        if shape.compiled
        else "all kept"
    )
    return (
        f"memory of a rank on {device}, {total / 1e9:.3g} GB: {memory}, {kept}; left {(free - memory.total) / 1e9:.3g}"
        f" of {free / 1e9:.3g} free"
    )
