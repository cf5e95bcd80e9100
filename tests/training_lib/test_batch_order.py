"""Which rank trains on what: every roll-out once an epoch, whatever the ranks, micro batches, layouts and epochs."""

from collections import Counter

import datasets
import numpy as np
import pytest
from rollouts import write_rows
from train_spy import numbered_rows

from training_lib.batch_order import RankBatches, epoch_pairs, epoch_rollouts, hold_out
from training_lib.rollout_data import load_rollouts
from training_lib.rollout_table import RolloutTable


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.with_name(tmp_path.name + "-cache"))


def load(path, rows, num_response=5):
    return load_rollouts(str(write_rows(path, rows)), vocab_size=264, max_length=30, num_response=num_response)


def ragged_rows(num_rows: int) -> list[dict]:
    """1 to 5 roll-outs a row."""
    rows = numbered_rows(0, num_rows, per_row=5)
    for number, row in enumerate(rows):
        for name in ("roll_in_ids", "roll_outs_ids", "labels"):
            row[name] = row[name][: 1 + number % 5]
    return rows


def read_epoch(ranks: list[RankBatches], epoch: int) -> list[list[list[tuple[int, int]]]]:
    """Sources by step and rank, over the micro batches."""
    steps = range(epoch * ranks[0].steps_per_epoch, (epoch + 1) * ranks[0].steps_per_epoch)
    return [[[s for batch in rank[step] for s in batch.sources] for rank in ranks] for step in steps]


@pytest.mark.parametrize("packing", ["none", "pack", "tree"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rollout_once_an_epoch_over_three_ranks(tmp_path, packing, size):
    table = load(tmp_path, ragged_rows(15))  # 45 roll-outs: five steps of nine
    ranks = [RankBatches(table, 7, 9, 3, packing, size, rank=rank, world_size=3) for rank in range(3)]
    epochs = [read_epoch(ranks, epoch) for epoch in range(3)]
    for steps in epochs:
        assert len(steps) == 5 and all(sum(map(len, step)) == 9 and all(step) for step in steps)
        assert Counter(s for step in steps for share in step for s in share) == Counter(
            (row, column) for row in range(15) for column in range(1 + row % 5)
        )
    orders = [[s for step in steps for share in step for s in share] for steps in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # The same steps as one rank has, for none in the same micro batches.
    [alone] = [RankBatches(table, 7, 9, 3, packing, size)]
    for epoch in range(3):
        for number, ([one], three) in enumerate(zip(read_epoch([alone], epoch), epochs[epoch], strict=True)):
            assert sorted(one) == sorted(s for share in three for s in share)
            if packing == "none":
                passes = [sorted(batch.sources for rank in some for batch in rank[number]) for some in ([alone], ranks)]
                assert passes[0] == passes[1]


def test_what_does_not_fill_a_step_is_left_out_another_part_each_epoch(tmp_path):
    table = load(tmp_path, ragged_rows(15))
    batches = RankBatches(table, 7, 10, 5, "none", 1)
    assert batches.steps_per_epoch == 4
    read = [{s for step in read_epoch([batches], epoch) for share in step for s in share} for epoch in range(2)]
    assert [len(part) for part in read] == [40, 40] and read[0] != read[1]


def test_groups_are_neighbours_in_their_order_also_where_a_row_ends(tmp_path):
    table = load(tmp_path, ragged_rows(15))
    order = epoch_rollouts(table, 2, 3, 0)
    rows = table.row_of(order)
    place = order - table.first[rows]
    count = np.diff(table.first)[rows]
    for i in range(len(order)):
        if place[i] % 2:
            assert order[i] == order[i - 1] + 1 and rows[i] == rows[i - 1]
        elif place[i] + 1 < count[i]:
            assert order[i + 1] == order[i] + 1
    assert order.tolist() != sorted(order)


def test_every_pair_once_an_epoch_over_three_ranks(tmp_path):
    table = load(tmp_path, numbered_rows(0, 18))  # four roll-outs each, one or two of them correct
    ranks = [RankBatches(table, 7, 6, 2, "none", 1, pairs=True, rank=rank, world_size=3) for rank in range(3)]
    assert [rank.units_per_epoch for rank in ranks] == [24] * 3
    for epoch in range(2):
        steps = read_epoch(ranks, epoch)
        assert len(steps) == 8 and all(len(share) == 2 for step in steps for share in step)
        pairs = [tuple(share) for step in steps for share in step]
        assert len(set(pairs)) == 24
        for correct, incorrect in pairs:
            assert correct[0] == incorrect[0] and sum(correct) % 3 == 1 != sum(incorrect) % 3
        assert len({trace for pair in pairs for trace in pair}) == 48


def test_packed_shares_keep_groups_together_and_are_balanced(tmp_path):
    table = load(tmp_path, numbered_rows(0, 30, per_row=5))
    ranks = [RankBatches(table, 7, 45, 15, "tree", 5, rank=rank, world_size=3) for rank in range(3)]
    for step in range(2 * ranks[0].steps_per_epoch):
        shares = [rank.rank_units(step).ravel() for rank in ranks]
        rows = [set(table.row_of(share)) for share in shares]
        assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
        loads = [0, 0, 0]  # the largest group to the rank with the least, again and again
        for tokens in sorted(
            (int(table.lengths(table.first[row] + np.arange(5)).sum()) for row in set().union(*rows)), reverse=True
        ):
            loads[loads.index(min(loads))] += tokens
        assert sorted(int(table.lengths(share).sum()) for share in shares) == sorted(loads)


class MadeTable(RolloutTable):
    """Roll-outs whose first tokens, `roll_in_lengths` many, are those of their row, and the rest their own."""

    def ids(self, row, column):
        rollout = self.first[row] + column
        roll_in = np.arange(self.roll_in_lengths[rollout]) + 1000 * row
        return roll_in, np.full(self.roll_out_lengths[rollout], 500_000 + rollout)


def made_table(*rows: list[tuple[int, int]], max_length: int = 16384) -> MadeTable:
    """Rows of roll-outs, (roll-in, roll-out) tokens each."""
    first = np.cumsum([0, *map(len, rows)])
    roll_ins, roll_outs = np.array([lengths for row in rows for lengths in row]).T
    labels = np.zeros(len(roll_ins), dtype=int)
    numbers = np.arange(len(rows))
    return MadeTable(None, numbers, first, labels, roll_ins, roll_outs, numbers, 10**6, max_length)


def test_padded_micro_batches_are_of_a_length_over_all_ranks_and_ranks_do_as_much():
    """Neighbours in length whatever the rank; equally many for each; the dearest goes with the cheapest."""
    lengths = np.random.default_rng(0).integers(10, 1000, 64)
    table = made_table([(1, int(n) - 1) for n in lengths], max_length=1000)
    ranks = [RankBatches(table, 7, 64, 4, "none", 2, rank=rank, world_size=4, pair_cost=1 / 500) for rank in range(4)]
    shares = [lengths[rank.rank_units(0).ravel()] for rank in ranks]
    passes = [share.reshape(4, 4).tolist() for share in shares]
    in_order = np.sort(lengths)[::-1].reshape(16, 4).tolist()
    assert sorted(batch for share in passes for batch in share) == sorted(in_order)
    assert all(share == sorted(share, reverse=True) for share in passes)
    costs = [sum(-(-share[0] // 62) * 62 * (1 + -(-share[0] // 62) * 62 / 1000) for share in rank) for rank in passes]
    assert max(costs) < 1.08 * np.mean(costs)


def test_ranks_have_equally_many_padded_micro_batches_however_dear_one_is():
    table = made_table([(1, 999)] * 4 + [(1, 9)] * 12, max_length=1000)
    ranks = [RankBatches(table, 7, 16, 4, "none", rank=rank, world_size=2) for rank in range(2)]
    assert [len(rank.rank_units(0)) for rank in ranks] == [8, 8]


def test_packed_shares_are_balanced_by_attended_pairs_too():
    """One long trace, which is cut, costs as much as several short ones of more tokens."""
    table = made_table([(1, 999)], [(1, 59)], [(1, 49)], [(1, 49)], max_length=100)

    def shares(pair_cost):
        ranks = [RankBatches(table, 7, 4, 4, "pack", rank=rank, world_size=2, pair_cost=pair_cost) for rank in (0, 1)]
        return sorted(sorted(table.lengths(rank.rank_units(0).ravel()).tolist()) for rank in ranks)

    assert shares(0.0) == [[50, 60], [50, 100]]
    assert shares(1.0) == [[50, 50, 60], [100]]


def test_shares_of_tries_are_balanced_by_what_a_trie_computes():
    """A group whose prefix is shared is cheap, though it has the most tokens."""
    table = made_table([(90, 10)] * 4, [(1, 99)], [(1, 99)], [(1, 29)])

    def shares(packing):
        ranks = [RankBatches(table, 7, 7, 7, packing, 4, rank=rank, world_size=2) for rank in (0, 1)]
        return sorted(sorted(set(table.row_of(rank.rank_units(0).ravel()).tolist())) for rank in ranks)

    assert shares("pack") == [[0], [1, 2, 3]]
    assert shares("tree") == [[0, 3], [1, 2]]


def test_where_a_step_has_fewer_groups_than_ranks_they_are_split(tmp_path):
    table = load(tmp_path, numbered_rows(0, 12, per_row=5))
    ranks = [RankBatches(table, 7, 6, 2, "tree", 5, rank=rank, world_size=3) for rank in range(3)]
    for step in range(ranks[0].steps_per_epoch):
        shares = [rank.rank_units(step).ravel() for rank in ranks]
        assert all(len(share) for share in shares)
        assert sorted(np.concatenate(shares)) == sorted(RankBatches(table, 7, 6, 2, "tree", 5).rank_units(step).ravel())


def test_an_evaluation_reads_every_rollout_in_order_and_a_hold_out_depends_on_the_seed(tmp_path):
    table = load(tmp_path, ragged_rows(15))
    train, held = hold_out(table, 6, 1)
    batches = RankBatches(held, 7, 9, 3, "none", 2, rank=1, world_size=3)
    assert batches.all_units().tolist() == [[i] for i in range(len(held))]
    assert len(held.rows) == 6 and len(train.rows) == 9
    assert sorted(hold_out(table, 6, 2)[1].rows) != sorted(held.rows) == sorted(hold_out(table, 6, 1)[1].rows)


def test_pairs_are_drawn_anew_each_epoch(tmp_path):
    """Of a row with more roll-outs of one kind others are taken; who is paired with whom changes, too."""
    table = load(tmp_path, numbered_rows(0, 18))
    drawn = [{tuple(pair) for pair in epoch_pairs(table, 7, epoch).tolist()} for epoch in range(3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert {x for pair in drawn[0] for x in pair} != {x for pair in drawn[1] for x in pair}
    assert drawn[0] != {tuple(pair) for pair in epoch_pairs(table, 8, 0).tolist()}
