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
from training_lib.compiling import activation_budget, whole_layers
from training_lib.memory import (
    BUDGETS,
    StepShape,
    TrainingMemory,
    check_memory,
    choose_activation_budget,
    estimate_memory,
)
from training_lib.packing import padded_width
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
    choose_what_to_keep(args, info, shape, card)
    shape = step_shape(args, precision, attention, table, world.size)
    if world.device.type == "cuda":
        return check_memory(info, shape, card, f"{world.device} ({total / 1e9:.3g} GB)")
    try:
        return check_memory(info, shape, card, "the RAM")
    except UserError as error:
        logger.warning("%s", error)
        return estimate_memory(info, shape)


def choose_what_to_keep(args: argparse.Namespace, info: ModelInfo, shape: StepShape, card: int) -> None:
    """Of compiled layers as much as a card of `card` bytes has room for; where even the least is too much, whole layers are
    computed again."""
    left_to_the_run = args.gradient_checkpointing is None
    args.gradient_checkpointing = shape.checkpointing
    if shape.checkpointing or not args.compile or args.activation_budget != AUTO:
        return
    budget = choose_activation_budget(info, shape, card)
    if budget is None and left_to_the_run:
        args.gradient_checkpointing = True
    else:
        args.activation_budget = budget or BUDGETS[-1]


def step_shape(
    args: argparse.Namespace, precision: Precision, attention: Attention, table: RolloutTable, ranks: int
) -> StepShape:
    """Of the arguments; no row is longer than the data can fill it."""
    longest = int(table.lengths(np.arange(len(table))).max(initial=1))
    packed = args.packing != "none"
    if packed:
        tokens, shortest = min(args.row_tokens, args.total_batch_size * longest), longest_unit(args)
        tokens = -(-tokens // attention.row_multiple) * attention.row_multiple
    else:
        width = padded_width(longest, args.max_length)
        tokens, shortest = args.micro_batch_size * width, width
    return StepShape(
        tokens, precision, ranks, whole_layers(args), args.compile, activation_budget(args), args.num_labels,
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
