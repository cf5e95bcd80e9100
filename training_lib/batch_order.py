"""Which roll-outs are in which step: computed from (seed, epoch), never replayed. Pure numpy.

The order is that of a keyed hash, written out here, so that it is the same on every machine and numpy version. A batch
is the same set of roll-outs whatever the number of ranks and loader workers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from common_lib.cli import UserError
from training_lib.packing import MicroBatch, lay_out, padded_width, triangle, trie_counts
from training_lib.rollout_table import RolloutTable, place_in_run

_SHUFFLE, _PAIRS, _HOLD_OUT = 1, 2, 3  # streams of the hash


@dataclass(eq=False)
class RankBatches:
    """A map-style dataset for `torch.utils.data.DataLoader`: item `step` is this rank's micro batches of that step.

    Nothing depends on what was read before, so a loader over `range(step, num_steps)` starts anywhere at once.
    """

    table: RolloutTable
    seed: int
    total_batch_size: int
    micro_batch_size: int
    packing: str
    group_size: int = 1
    pairs: bool = False
    rank: int = 0
    world_size: int = 1
    multiple: int = 8
    row_tokens: int | None = None  # of a packed row; None: micro_batch_size x max_length
    prepare: Callable[[MicroBatch], MicroBatch] | None = None  # what else is made where rows are laid out
    pair_cost: float = 0.0  # FLOPs of an attended pair, in those of a token
    _epoch: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def __post_init__(self):
        self.units_per_epoch = len(self._order(0))
        self.units_per_step = self.total_batch_size // 2 if self.pairs else self.total_batch_size
        self.steps_per_epoch = self.units_per_epoch // self.units_per_step

    def all_units(self) -> np.ndarray:
        """Every roll-out once, row after row, or every pair of the first epoch: what an evaluation reads."""
        return self._order(0) if self.pairs else np.arange(len(self.table))[:, None]

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's roll-outs [R, 1] or pairs [pairs, 2]."""
        if self._epoch is None or self._epoch[0] != epoch:
            if self.pairs:
                order = epoch_pairs(self.table, self.seed, epoch)
            else:
                order = epoch_rollouts(self.table, self.group_size, self.seed, epoch)[:, None]
            self._epoch = (epoch, order)
        return self._epoch[1]

    def rank_units(self, step: int) -> np.ndarray:
        """This rank's share of the step's roll-outs [units, 1], or pairs [units, 2], estimated FLOPs balanced: for `none`
        equally many micro batches of about one length, the longest first; for packed rows whole groups."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        units = self._order(epoch)[batch * self.units_per_step : (batch + 1) * self.units_per_step]
        if self.packing == "none":
            lengths = self.table.lengths(units).max(axis=1)
            units = units[np.argsort(-lengths, kind="stable")]
            parts = np.split(units, range(self.units_per_pass, len(units), self.units_per_pass))
        else:
            parts = np.split(
                units, np.flatnonzero(np.diff(self.table.row_of(units[:, 0]))) + 1
            )  # neighbours of one row
            if len(parts) < self.world_size:
                parts = np.split(units, len(units))
        costs = np.array([self.cost(part) for part in parts])
        most = -(-len(parts) // self.world_size) if self.packing == "none" else None
        return np.concatenate([parts[i] for i in balanced_shares(costs, self.world_size, most)[self.rank]])

    @property
    def units_per_pass(self) -> int:
        """Roll-outs, or pairs, of a micro batch."""
        return self.micro_batch_size // 2 if self.pairs else self.micro_batch_size

    def cost(self, units: np.ndarray) -> int:
        """FLOPs of some units, in those of a token: of a micro batch for `none`, with its padding; of what shares a row for
        packed rows, of which a trie is read. UserError where it cannot be. Whole, so that no rank sums to another end."""
        lengths = self.table.lengths(units.ravel())
        if self.packing == "tree":
            tokens, pairs = trie_counts([self.table.trace(rollout) for rollout in units.ravel().tolist()])
            return round(tokens + self.pair_cost * pairs)
        if self.packing == "none":
            lengths = np.full_like(lengths, padded_width(int(lengths.max()), self.table.max_length))
        return round(int(lengths.sum()) + self.pair_cost * int(triangle(lengths).sum()))

    def __getitem__(self, step: int) -> list[MicroBatch] | str:
        """The step's micro batches, or the message of a fault in its data: exceptions lose their type in a worker."""
        try:
            return self.lay_out(self.rank_units(step))
        except UserError as error:
            return str(error)

    def lay_out(self, units: np.ndarray) -> list[MicroBatch]:
        """Read and lay out some units. int64 [units, 1 or 2]."""
        traces = [[self.table.trace(rollout) for rollout in unit] for unit in units.tolist()]
        batches = lay_out(
            traces, self.packing, self.micro_batch_size, self.table.max_length, self.multiple, self.row_tokens
        )
        return [self.prepare(batch) for batch in batches] if self.prepare else batches


def hold_out(table: RolloutTable, num_problems: int, seed: int) -> tuple[RolloutTable, RolloutTable]:
    """(training, validation): whole problems, drawn by the seed; rows of the same problem text stay together."""
    distinct = np.unique(table.problems)
    if num_problems >= len(distinct):
        raise UserError(
            f"--eval_size {num_problems} would hold out all of the {len(distinct)} problems; "
            f"choose at most {len(distinct) - 1}, or --eval_every -1 to hold out none"
        )
    drawn = distinct[np.argsort(mix(seed, _HOLD_OUT, distinct), kind="stable")[:num_problems]]
    held = np.isin(table.problems, drawn)
    return table.select(~held), table.select(held)


def epoch_rollouts(table: RolloutTable, group_size: int, seed: int, epoch: int) -> np.ndarray:
    """All roll-outs in the epoch's order: groups shuffled, each group together and in its row's order. int64 [R].

    A group is `group_size` neighbouring roll-outs of a row; a row's last group may be smaller.
    """
    begins = place_in_run(np.diff(table.first)) % group_size == 0
    return shuffled(seed, epoch, np.cumsum(begins) - 1)


def first_groups(table: RolloutTable, group_size: int, pairs: bool, seed: int, count: int) -> list[np.ndarray]:
    """The first groups, or pairs, of the first epoch: what stays together in a step. int64 arrays of roll-outs."""
    if pairs:
        return list(epoch_pairs(table, seed, 0)[:count])
    order = epoch_rollouts(table, group_size, seed, 0)[: count * group_size]
    begins = place_in_run(np.diff(table.first))[order] % group_size == 0
    return np.split(order, np.flatnonzero(begins)[1:])[:count]


def epoch_pairs(table: RolloutTable, seed: int, epoch: int) -> np.ndarray:
    """(correct, incorrect) roll-outs of one row, all rows' pairs shuffled. int64 [pairs, 2].

    Label 1 is correct, 0 and 2 are not. A row gives as many pairs as it has of the rarer kind, drawn without
    replacement; a row of one kind gives none.
    """
    rollouts = np.arange(len(table))
    row, correct = table.row_of(rollouts), table.labels == 1
    order = np.lexsort((mix(seed, _PAIRS * 2**32 + epoch, rollouts), correct, row))
    counts = np.bincount(2 * row + correct, minlength=2 * len(table.rows))  # of each row's two kinds
    chosen = order[place_in_run(counts) < counts.reshape(-1, 2).min(axis=1)[row[order]]]
    # Both kinds are in row order and have equally many of each row.
    pairs = np.stack([chosen[correct[chosen]], chosen[~correct[chosen]]], axis=1)
    return pairs[shuffled(seed, epoch, np.arange(len(pairs)))]


def balanced_shares(costs: np.ndarray, ranks: int, most: int | None = None) -> list[list[int]]:
    """Indices of the parts of each rank: the dearest first, to the rank with the least so far, of those that have not yet
    `most` parts."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for i in np.argsort(-costs, kind="stable").tolist():
        free = [share for share in shares if most is None or len(share) < most]
        min(free, key=lambda share: costs[share].sum()).append(i)
    return [sorted(share) for share in shares]


def mix(seed: int, stream: int, values: np.ndarray) -> np.ndarray:
    """A well-mixed uint64 for each value, a function of (seed, stream, value): splitmix64's finalizer, three times."""
    with np.errstate(over="ignore"):
        key: np.ndarray = np.zeros(1, dtype=np.uint64)
        for word in (np.uint64(seed % 2**64), np.uint64(stream), np.asarray(values).astype(np.uint64)):
            key = (key ^ word) + np.uint64(0x9E3779B97F4A7C15)
            key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key = key ^ (key >> np.uint64(31))
    return key


def shuffled(seed: int, epoch: int, numbers: np.ndarray) -> np.ndarray:
    """The order that shuffles some numbers; equal ones stay together and in their order. int64 [len(numbers)]."""
    return np.argsort(mix(seed, _SHUFFLE * 2**32 + epoch, numbers), kind="stable")
