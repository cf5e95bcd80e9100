"""Roll-outs of stated lengths, and what each layout computes of them: pure counting, the same on every machine.

The lengths are no real data's: in each row 14 roll-ins of 4 nested prefixes, prefix lengths uniform in 4k to 8k, roll-outs
lognormal with mean 6k and standard deviation 4k, traces cut at 16384 (`scale` makes all of them shorter).
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from gpu_parts.models import SHAPES, model_info
from gpu_parts.report import Report
from training_lib.batch_order import RankBatches
from training_lib.layout import pair_cost
from training_lib.memory import StepShape, TrainingMemory, choose_activation_budget, estimate_memory
from training_lib.precision import Precision
from training_lib.rollout_table import RolloutTable

MAX_LENGTH, PER_ROW = 16_384, 56
STEPS, RANKS, MICRO_BATCH, TOTAL_BATCH = 12, 4, 8, 64  # of what is counted: the released command's step
SIGMA = np.sqrt(np.log(1 + (4000 / 6000) ** 2))  # of the lognormal with mean 6000 and standard deviation 4000
GROUPS = (2, 4)  # --small_group_size: the released one, and that of the data's nested roll-ins
LAYOUTS = {"none": ("none", None)} | {
    f"{packing}, rows of {size // 1024}k": (packing, size)
    for packing in ("pack", "tree")
    for size in (32_768, 65_536, 131_072)
}
MODEL = model_info(SHAPES["full"])
CARD = 80 * 10**9  # bytes
MU = np.log(6000) - SIGMA**2 / 2


class SyntheticTable(RolloutTable):
    """Roll-outs of the stated lengths times `scale`; their tokens are drawn when they are read."""

    def ids(self, row: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        rollout = row * PER_ROW + column
        trunk = np.random.default_rng([0, row, column // 4]).integers(0, self.vocab_size, 8000, dtype=np.int32)
        own = np.random.default_rng([1, row, column])
        roll_out = own.integers(0, self.vocab_size, self.roll_out_lengths[rollout], dtype=np.int32)
        return trunk[: self.roll_in_lengths[rollout]], roll_out


def synthetic_table(num_rows: int, vocab_size: int, scale: float = 1.0) -> SyntheticTable:
    """Rows of 14 x 4 roll-outs."""
    rng, count = np.random.default_rng(0), num_rows * PER_ROW
    roll_ins = np.sort(rng.uniform(4000, 8000, (count // 4, 4)), axis=1).ravel()
    roll_outs = np.minimum(rng.lognormal(MU, SIGMA, count), MAX_LENGTH)
    lengths = (np.maximum(part * scale, 1).astype(int) for part in (roll_ins, roll_outs))
    labels, rows = rng.integers(0, 3, count), np.arange(num_rows)
    first = np.arange(num_rows + 1) * PER_ROW
    return SyntheticTable(None, rows, first, labels, *lengths, rows, vocab_size, max(8, int(MAX_LENGTH * scale)))


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@dataclass
class Counts:
    """Of all ranks' steps: tokens computed (padding included), those that are no padding, those with a loss, rows."""

    computed: int = 0
    real: int = 0
    loss: int = 0
    rows: int = 0

    @property
    def per_loss_token(self) -> float:
        return self.computed / self.loss

    @property
    def padded_over_real(self) -> float:
        return self.computed / self.real


def count_tokens(
    table: RolloutTable, packing: str, group: int, row_tokens: int | None = None, steps: int = STEPS
) -> Counts:
    """What the released command's first steps compute."""
    counts = Counts()
    for rank in range(RANKS):
        batches = RankBatches(
            table,
            0,
            TOTAL_BATCH,
            MICRO_BATCH,
            packing,
            group,
            False,
            rank,
            RANKS,
            128,
            row_tokens,
            pair_cost=pair_cost(MODEL),
        )
        for batch in (batch for step in range(steps) for batch in batches[step]):
            counts.computed += batch.input_ids.size
            counts.real += batch.num_tokens
            counts.loss += len(batch.token_index)
            counts.rows += 1
    return counts


def what_packing_saves(report: Report, rows: int = 32, steps: int = STEPS) -> dict[tuple[str, int], Counts]:
    """Tokens computed per loss token, at the full lengths whatever the device, and beside them what a rank of the released
    command holds. Returns what was counted by layout and `--small_group_size`."""
    table, counted = synthetic_table(rows, SHAPES["full"]["vocab_size"]), {}
    for layout, (packing, row_tokens) in LAYOUTS.items():
        figure = functools.partial(report.figure, "tokens computed per loss token", case=layout)
        for group in GROUPS:
            counts = counted[layout, group] = count_tokens(table, packing, group, row_tokens, steps)
            figure(f"groups of {group}", counts.per_loss_token)
        figure("padding", 100 * (1 - 1 / counts.padded_over_real), "%")
        memory = step_memory(row_tokens)
        figure("memory of a rank", memory.total / 1e9, "GB")
        figure("activation budget", memory.shape.budget)
    return counted


def step_memory(row_tokens: int | None) -> TrainingMemory:
    """Of a rank of the released command's four, compiled, by FSDP in bf16, with the activation budget that is chosen for an
    80 GB card. row_tokens: of packed rows, None for padded micro batches."""
    shape = StepShape(
        row_tokens or MICRO_BATCH * MAX_LENGTH, Precision(True, True), RANKS, checkpointing=False, compiled=True,
        packed=row_tokens is not None,
    )  # fmt: skip
    budget = choose_activation_budget(MODEL, shape, CARD)  # None: whole layers are computed again
    shape = replace(shape, checkpointing=True) if budget is None else replace(shape, budget=budget)
    return estimate_memory(MODEL, shape)
