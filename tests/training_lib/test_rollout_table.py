"""The table of roll-outs beyond one batch of rows, with its limits and columns; which roll-out is which."""

import datasets
import numpy as np
import pytest
from rollouts import random_rows, write_rows

from common_lib.cli import UserError
from training_lib.rollout_data import load_rollouts


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.with_name(tmp_path.name + "-cache"))


def load(path, **changes):
    settings = {"vocab_size": 8, "max_length": 40, "num_response": 4}
    return load_rollouts(str(path), **(settings | changes))


@pytest.fixture(scope="module")
def many():
    """More rows than are read at once, of 1 to 5 roll-outs."""
    rows = random_rows(2300, per_row=5)
    for number, row in enumerate(rows):
        for key in ("roll_in_ids", "roll_outs_ids", "labels"):
            row[key] = row[key][: 1 + number % 5]
        row["problem"] = f"problem {number % 1500}"
    return rows


def expected(rows, most, max_length):
    return [
        ((roll_in + roll_out)[:max_length], len(roll_in), label, (number, place))
        for number, row in enumerate(rows)
        for place, (roll_in, roll_out, label) in enumerate(
            zip(row["roll_in_ids"][:most], row["roll_outs_ids"][:most], row["labels"][:most], strict=True)
        )
    ]


def found(table, numbers):
    traces = [table.trace(int(number)) for number in numbers]
    return [(trace.tokens.tolist(), trace.start, trace.label, trace.source) for trace in traces]


def test_many_rows_are_read_in_order_with_their_own_lists(tmp_path, many):
    table = load(write_rows(tmp_path, many), num_response=3, max_length=35)
    wanted = expected(many, 3, 35)
    numbers = np.arange(0, len(table), 17)
    assert len(table) == len(wanted)
    assert found(table, numbers) == [wanted[number] for number in numbers]
    assert table.lengths(np.arange(len(table))).tolist() == [len(tokens) for tokens, *_ in wanted]
    assert table.row_of(np.arange(len(table))).tolist() == [row for *_, (row, _) in wanted]
    assert table.problems.tolist() == [number % 1500 for number in range(2300)]
    keep = np.arange(2300) % 7 == 3
    part = table.select(keep)
    assert found(part, range(0, len(part), 11)) == [w for w in wanted if keep[w[3][0]]][::11]
    assert part.problems.tolist() == table.problems[keep].tolist()


@pytest.mark.parametrize("most", [1, 999, 1000, 1001, 2300, 9999])
def test_only_the_first_rows_are_read(tmp_path, many, most):
    """And a fault behind them is none."""
    rows = [*many, many[0] | {"labels": [7]}]
    path = write_rows(tmp_path, rows)
    if most < len(rows):
        table = load(path, max_rows=most)
        assert len(table.rows) == most and len(table) == len(expected(many[:most], 4, 40))
    else:
        with pytest.raises(UserError, match=r"row 2300, column labels\[0\]: label 7"):
            load(path, max_rows=most)


def test_a_faulty_row_is_named_by_its_number_in_the_whole_and_only_it_is_left_out(tmp_path, many):
    rows = list(many)
    for bad in (1234, 2001):
        rows[bad] = rows[bad] | {"roll_outs_ids": [*rows[bad]["roll_outs_ids"][:-1], [3, 99]]}
    path = write_rows(tmp_path, rows)
    place = 1234 % 5
    with pytest.raises(UserError, match=rf"row 1234, column roll_outs_ids\[{place}\]: token id 99 is outside"):
        load(path, num_response=5)
    table = load(path, num_response=5, skip_bad_rows=True)
    assert table.rows.tolist() == [number for number in range(2300) if number not in (1234, 2001)]
    wanted = [entry for entry in expected(rows, 5, 40) if entry[3][0] not in (1234, 2001)]
    numbers = np.arange(3300, len(table), 101)
    assert found(table, numbers) == [wanted[number] for number in numbers]


def test_labels_of_another_column(tmp_path):
    rows = [row | {"mine": [2 - label for label in row["labels"]]} for row in random_rows(9)]
    path = write_rows(tmp_path, rows)
    assert load(path, label_key="mine").labels.tolist() == [label for row in rows for label in row["mine"]]
    assert load(path).labels.tolist() == [label for row in rows for label in row["labels"]]
    with pytest.raises(UserError, match="lacks column other"):
        load(path, label_key="other")


def test_a_roll_in_that_fills_the_length_leaves_no_roll_out(tmp_path):
    row = random_rows(1)[0] | {
        "roll_in_ids": [[1] * 3, [1] * 4, [1] * 5],
        "roll_outs_ids": [[2, 3]] * 3,
        "labels": [0, 1, 2],
    }
    table = load(write_rows(tmp_path, [row]), max_length=4)
    assert [(tokens, start) for tokens, start, *_ in found(table, range(3))] == [
        ([1, 1, 1, 2], 3), ([1] * 4, 4), ([1] * 4, 5),
    ]  # fmt: skip
    assert table.lengths(np.arange(3)).tolist() == [4, 4, 4]


def test_the_smallest_and_the_largest_id_and_label_are_well(tmp_path):
    row = random_rows(1)[0] | {"roll_in_ids": [[0, 7]] * 2, "roll_outs_ids": [[7, 0]] * 2, "labels": [0, 2]}
    assert len(load(write_rows(tmp_path, [row]))) == 2
    for column in ("roll_in_ids", "roll_outs_ids"):
        write_rows(tmp_path, [row | {column: [[0, 7], [0, 8, 9]]}])
        with pytest.raises(UserError, match=rf"row 0, column {column}\[1\]: token id 8 is"):
            load(tmp_path)
        late = load(tmp_path, ids_checked_at_start=0)
        late.trace(0)
        with pytest.raises(UserError, match=rf"row 0, column {column}\[1\]: token id 8 is"):
            late.trace(1)
