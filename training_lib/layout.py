"""The layout of a run's rows, where the flags leave it to the run: chosen from the data and the device."""

import argparse
import logging
from collections.abc import Sequence

import numpy as np

from common_lib.cli import check_rules
from common_lib.models import ModelInfo
from training_lib.arguments import AUTO, division_rules, longest_unit
from training_lib.batch_order import first_groups
from training_lib.packing import trie_size
from training_lib.ranks import World
from training_lib.rollout_table import RolloutTable

logger = logging.getLogger(__name__)

ENOUGH = 0.05  # share of the tokens that shared prefixes must save for a trie
LOOKED_AT = 1_000  # groups
ROW_TOKENS = 32_768  # on a GPU: longer rows are no faster and take more memory


def settle_layout(args: argparse.Namespace, table: RolloutTable, world: World) -> float | None:
    """Fill in `packing` and `row_tokens` where they are left to the run, the same on all ranks.

    Returns the share of tokens that shared prefixes save, None where it was not asked for. Raises UserError.
    """
    saved = None
    if args.packing == AUTO:
        with world.together():
            if world.rank == 0:  # the others need not read
                args.packing, saved = choose_packing(args, table, world.device.type)
        args.packing, saved = world.from_rank0((args.packing, saved))
    check_rules(args, division_rules(args))
    if args.packing == "none":
        if args.row_tokens is not None:
            logger.info("--row_tokens has no effect with --packing none")
    elif args.row_tokens is None:
        rows = ROW_TOKENS if world.device.type == "cuda" else args.micro_batch_size * args.max_length
        args.row_tokens = max(rows, longest_unit(args))
    return saved


def choose_packing(args: argparse.Namespace, table: RolloutTable, device: str) -> tuple[str, float | None]:
    """(packing, share of the first groups' tokens that shared prefixes save) on a device: cpu or cuda.

    On a CPU, where a dense mask costs more than packing saves, nothing is read and the share is None. UserError where a
    roll-out cannot be read.
    """
    if device == "cpu":
        return "none", None
    saved = shared_tokens(table, first_groups(table, args.small_group_size, args.train_bt_model, args.seed, LOOKED_AT))
    return "tree" if saved >= ENOUGH else "pack", saved


def shared_tokens(table: RolloutTable, groups: Sequence[np.ndarray]) -> float:
    """Share of the tokens of all groups (roll-outs) that a trie of each group need not compute."""
    tokens = computed = 0
    for group in groups:
        traces = [table.trace(rollout) for rollout in group.tolist()]
        tokens += sum(len(trace.tokens) for trace in traces)
        computed += trie_size(traces)
    return 1 - computed / max(tokens, 1)


def pair_cost(info: ModelInfo) -> float:
    """FLOPs of an attended (query, key) pair in those of a token, counted as in `step.step_flops`; head left out."""
    attention = info.num_attention_heads * info.head_dim
    keys_and_values = 2 * info.num_key_value_heads * info.head_dim
    weights = info.hidden_size * (2 * attention + keys_and_values + 3 * info.intermediate_size)  # of a layer
    return 2 * attention / weights
