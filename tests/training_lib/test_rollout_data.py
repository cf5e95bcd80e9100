"""Reading OpenR1-VM's schema: the right slices, the right complaints, and an order that nothing but the seed decides."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollouts import random_rows, write_rows
from torch.utils.data import DataLoader

from common_lib.cli import UserError
from training_lib.batch_order import RankBatches, balanced_shares, epoch_pairs, epoch_rollouts, hold_out, mix, shuffled
from training_lib.rollout_data import load_rollouts


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.with_name(tmp_path.name + "-cache"))


def load(path, **changes):
    settings = {"vocab_size": 8, "max_length": 40, "num_response": 4}
    return load_rollouts(str(path), **(settings | changes))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    "kind", ["parquet folder", "parquet file", "save_to_disk", "save_to_disk with splits", "shuffled"]
)
def test_traces_are_the_rows_lists(tmp_path, kind):
    rows = random_rows(30)
    path = tmp_path / "data"
    dataset = datasets.Dataset.from_list(rows)
    if kind == "parquet folder":
        write_rows(path, rows)
    elif kind == "parquet file":
        path = write_rows(path, rows) / "train-00000-of-00001.parquet"
    elif kind == "save_to_disk":
        dataset.save_to_disk(path)
    elif kind == "save_to_disk with splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(path)
    else:
        dataset = dataset.shuffle(seed=1)
        rows = list(dataset)
        dataset.save_to_disk(path)
    table = load(path, num_response=3, max_length=25)
    assert len(table) == 30 * 3
    for rollout in range(len(table)):
        row, column = divmod(rollout, 3)
        roll_in, roll_out = rows[row]["roll_in_ids"][column], rows[row]["roll_outs_ids"][column]
        trace = table.trace(rollout)
        assert trace.tokens.tolist() == (roll_in + roll_out)[:25]
        assert (trace.start, trace.label, trace.source) == (len(roll_in), rows[row]["labels"][column], (row, column))
    everything = np.arange(len(table))
    assert (table.lengths(everything) == [len(table.trace(r).tokens) for r in everything]).all()


def test_rows_may_have_fewer_rollouts_and_files_may_be_many(tmp_path):
    rows = [
        row | {key: row[key][: 1 + i % 4] for key in ("roll_in_ids", "roll_outs_ids", "labels")}
        for i, row in enumerate(random_rows(21))
    ]
    write_rows(tmp_path, rows, files=3)
    table = load(tmp_path, num_response=2)
    in_order = [row for first in range(3) for row in rows[first::3]]
    assert np.diff(table.first).tolist() == [min(len(row["labels"]), 2) for row in in_order]
    assert table.labels.tolist() == [label for row in in_order for label in row["labels"][:2]]
    assert (
        table.trace(table.first[7]).tokens.tolist()
        == (in_order[7]["roll_in_ids"][0] + in_order[7]["roll_outs_ids"][0])[:40]
    )


def test_integer_types_and_large_lists(tmp_path):
    rows = random_rows(5)
    for kind in (pa.int32(), pa.uint16()):
        for make in (pa.list_, pa.large_list):
            nested = make(make(kind))
            schema = {"roll_in_ids": nested, "roll_outs_ids": nested, "labels": make(pa.int8())}
            table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in schema.items()})
            pq.write_table(table, tmp_path / "rows.parquet")
            found = load(tmp_path / "rows.parquet")
            assert found.trace(6).tokens.tolist() == (rows[1]["roll_in_ids"][2] + rows[1]["roll_outs_ids"][2])[:40]
            assert len(np.unique(found.problems)) == 5  # without problem texts every row is a problem of its own


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def faulty(row, column, change):
    rows = random_rows(12)
    change(rows[row][column])
    return rows


FAULTS = {
    "labels disagree": (
        faulty(5, "labels", lambda c: c.pop()),
        "row 5, columns disagree in length: roll_in_ids 4, roll_outs_ids 4, labels 3",
    ),
    "roll-ins disagree": (
        faulty(5, "roll_in_ids", lambda c: c.append([1])),
        "row 5, columns disagree in length: roll_in_ids 5",
    ),
    "label 3": (faulty(7, "labels", lambda c: c.__setitem__(2, 3)), "row 7, column labels[2]: label 3 is none of 0"),
    "label -1": (faulty(7, "labels", lambda c: c.__setitem__(0, -1)), "row 7, column labels[0]: label -1"),
    "empty roll-out": (
        faulty(0, "roll_outs_ids", lambda c: c.__setitem__(3, [])),
        "row 0, column roll_outs_ids[3]: the roll-out is empty",
    ),
    "id too large": (
        faulty(11, "roll_outs_ids", lambda c: c[1].append(8)),
        "row 11, column roll_outs_ids[1]: token id 8 is outside the model's vocabulary of 8",
    ),
    "id negative": (faulty(3, "roll_in_ids", lambda c: c[0].append(-2)), "row 3, column roll_in_ids[0]: token id -2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_row_is_named_or_skipped(tmp_path, name, caplog):
    rows, message = FAULTS[name]
    write_rows(tmp_path, rows)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert message in str(error.value)
    assert "--skip_bad_rows" in str(error.value)
    table = load(tmp_path, skip_bad_rows=True)
    assert len(table.rows) == 11
    assert "left out 1 of 12 rows" in caplog.text
    bad = int(message.split(",")[0].removeprefix("row "))
    good = [row for number, row in enumerate(rows) if number != bad]
    for rollout in range(len(table)):
        row, column = divmod(rollout, 4)
        assert (
            table.trace(rollout).tokens.tolist()
            == (good[row]["roll_in_ids"][column] + good[row]["roll_outs_ids"][column])[:40]
        )


def test_a_fault_beyond_the_rollouts_in_use_is_no_fault(tmp_path):
    rows = random_rows(6)
    rows[2]["roll_outs_ids"][3] = []
    write_rows(tmp_path, rows)
    assert len(load(tmp_path, num_response=3)) == 18


def test_ids_of_a_large_data_set_are_checked_as_they_are_read(tmp_path):
    write_rows(tmp_path, FAULTS["id too large"][0])
    table = load(tmp_path, ids_checked_at_start=0)
    with pytest.raises(UserError, match=r"row 11, column roll_outs_ids\[1\]: token id 8"):
        table.trace(11 * 4 + 1)
    batches = RankBatches(table, 0, 48, 48, "none")
    assert "row 11, column roll_outs_ids[1]" in batches[0]
    assert len(load(tmp_path, ids_checked_at_start=0, skip_bad_rows=True).rows) == 11


def test_columns_and_types_that_are_missing_or_wrong_are_named(tmp_path):
    rows = random_rows(3)
    without = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    write_rows(tmp_path / "a", without)
    with pytest.raises(UserError, match=r"lacks column labels; it has message_id, problem, roll_in_ids, roll_outs_ids"):
        load(tmp_path / "a")
    write_rows(tmp_path / "b", [row | {"labels": [0.5] * 4} for row in rows])
    with pytest.raises(UserError, match=r"column labels is list<.*double>; labels must be whole numbers"):
        load(tmp_path / "b")
    write_rows(tmp_path / "c", [row | {"roll_in_ids": ["text"] * 4} for row in rows])
    with pytest.raises(UserError, match=r"roll_in_ids is .*; it must be lists of lists of token ids"):
        load(tmp_path / "c")
    write_rows(tmp_path / "d", [*rows, rows[0] | {"labels": None}])
    with pytest.raises(UserError, match="column labels has 1 null values"):
        load(tmp_path / "d")
    (tmp_path / "e").mkdir()
    write_rows(tmp_path / "f", rows)
    (tmp_path / "f/train-00000-of-00001.parquet").write_text("no parquet")
    for path, message in (("e", "holds neither parquet"), ("f", "cannot be read"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / path)
    with pytest.raises(UserError, match="nobody/nothing"):
        load("nobody/nothing")


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_the_hash_does_not_change():
    """Resumed runs rely on it, across machines and library versions."""
    assert mix(1337, 1, np.arange(3)).tolist() == EXPECTED_HASHES
    assert shuffled(1337, 0, np.arange(10)).tolist() == EXPECTED_ORDER


EXPECTED_HASHES = [11909852113512271781, 4275180216896277958, 12755160246684435010]
EXPECTED_ORDER = [9, 4, 0, 6, 5, 3, 8, 1, 2, 7]


def test_an_epoch_is_every_group_once_in_another_order(tmp_path):
    table = load(write_rows(tmp_path, random_rows(50)))
    orders = [epoch_rollouts(table, 2, 7, epoch) for epoch in (0, 1, 0)]
    assert orders[0].tolist() == orders[2].tolist() != orders[1].tolist()
    for order in orders:
        assert sorted(order) == list(range(200))
        assert (order[0::2] % 2 == 0).all() and (order[1::2] == order[0::2] + 1).all()
    assert epoch_rollouts(table, 2, 8, 0).tolist() != orders[0].tolist()


@pytest.mark.parametrize("packing", ["none", "pack", "tree"])
def test_batches_are_the_same_for_any_number_of_ranks(tmp_path, packing):
    table = load(write_rows(tmp_path, random_rows(30)))

    def sources(ranks, step):
        parts = [RankBatches(table, 7, 16, 2, packing, 2, rank=r, world_size=ranks)[step] for r in range(ranks)]
        assert all(parts)
        if packing == "none":
            assert len({len(part) for part in parts}) == 1
        return sorted(source for part in parts for batch in part for source in batch.sources)

    for step in (0, 3, 7, 20):
        assert sources(1, step) == sources(2, step) == sources(4, step) == sources(8, step)
    epoch = [source for step in range(7) for source in sources(2, step)]
    assert len(set(epoch)) == 7 * 16  # 120 roll-outs: seven whole batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["none", "tree"])
def test_a_fresh_loader_at_batch_k_yields_exactly_batches_k_and_on(tmp_path, packing, workers):
    table = load(write_rows(tmp_path, random_rows(30)))

    def stream(rank, first):
        batches = RankBatches(table, 7, 16, 4, packing, 2, rank=rank, world_size=2)
        loader = DataLoader(batches, batch_size=None, sampler=range(first, 20), num_workers=workers, collate_fn=list)
        return [[(b.input_ids.tolist(), b.token_index.tolist(), b.sources) for b in step] for step in loader]

    for rank in range(2):
        whole = stream(rank, 0)
        for first in (1, 7, 13):  # within the first epoch, at its end, in the second
            assert stream(rank, first) == whole[first:]


def test_pairs_are_a_correct_and_an_incorrect_rollout_of_one_row(tmp_path):
    rows = random_rows(40, per_row=8)
    table = load(write_rows(tmp_path, rows), num_response=8)
    pairs = epoch_pairs(table, 7, 0)
    assert (table.labels[pairs[:, 0]] == 1).all() and (table.labels[pairs[:, 1]] != 1).all()
    assert (table.row_of(pairs[:, 0]) == table.row_of(pairs[:, 1])).all()
    assert len(np.unique(pairs)) == pairs.size
    expected = sum(min(row["labels"].count(1), 8 - row["labels"].count(1)) for row in rows)
    assert len(pairs) == expected
    assert epoch_pairs(table, 7, 1).tolist() != pairs.tolist() == epoch_pairs(table, 7, 0).tolist()


def test_hold_out_takes_whole_problems(tmp_path):
    rows = random_rows(30)
    for row in rows[10:20]:
        row["problem"] = rows[0]["problem"]  # eleven rows of one problem
    table = load(write_rows(tmp_path, rows))
    for seed in range(10):
        train, held = hold_out(table, 5, seed)
        assert len(np.unique(held.problems)) == 5
        assert not set(held.problems) & set(train.problems)
        assert sorted([*train.rows, *held.rows]) == list(range(30))
        for part in (train, held):
            assert all(part.trace(int(part.first[i])).source[0] == part.rows[i] for i in range(len(part.rows)))
    with pytest.raises(UserError, match="--eval_size 20 would hold out all of the 20 problems"):
        hold_out(table, 20, 0)


def test_balanced_shares():
    sizes = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    shares = balanced_shares(sizes, 3)
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert max(sizes[share].sum() for share in shares) <= 14
