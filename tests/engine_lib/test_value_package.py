"""What a served value model writes and how it is read, and the count over chunks. No SGLang: the model itself is in
test_sglang_value_local.py."""

import math

import pytest
import torch

from classifier_lib import LABEL_CORRECT, success_probs
from engine_lib import value_wire
from engine_lib.base import EngineError
from engine_lib.sglang_value_model.progress import MOST_UNFINISHED, ProgressTable
from engine_lib.value_base import Valued
from engine_lib.value_wire import read_positions, read_row, read_vocabulary, value_of


@pytest.mark.parametrize("labels", [1, 3])
def test_values_are_the_classifiers_to_the_last_bit_but_one(labels):
    logits = torch.randn(2000, labels, generator=torch.Generator().manual_seed(3)) * 20
    expected = success_probs(logits)
    read = torch.tensor([value_of(row) for row in logits.tolist()])
    assert (read - expected).abs().max() <= 1.2e-7
    assert all(value_of(row) == torch.tensor(value_of(row)).item() for row in logits[:20].tolist()), "not in float32"
    assert value_of([-1000.0, 1000.0, 0.0]) == 1.0
    assert value_wire.LABEL_CORRECT == LABEL_CORRECT


def test_a_row_is_logits_and_the_tokens_computed():
    assert read_row([0.0, 0.0, 0.0, 129.0], 3) == Valued(pytest.approx(1 / 3), 129)
    assert read_row([0.0, 7.0], 1) == Valued(0.5, 7)


def test_positions_in_the_cached_prefix_have_no_value():
    rows = [0.0, 0.0, 0.0, 0.0, *[0.0, math.log(2), 0.0, 1.0], 55.0]
    assert read_positions(rows, 2, 3) == ([None, pytest.approx(0.5)], 55)
    assert read_positions([0.0, 0.0, -1.0, 1.0, 3.0], 2, 1) == ([None, pytest.approx(1 / (1 + math.e))], 3)
    assert read_positions([12.0], 0, 3) == ([], 12)


def test_a_position_that_is_not_cached_tells_the_vocabulary():
    assert read_vocabulary([0.0, 1.0, 0.0, 151_936.0, 1.0], 3) == 151_936
    assert read_vocabulary([0.0, 264.0, 24.0], 1) == 264
    with pytest.raises(EngineError, match="has 4 numbers, and a value model of 3 labels writes 5"):
        read_vocabulary([0.0] * 4, 3)


@pytest.mark.parametrize("length", [0, 3, 5, 32])
def test_a_reply_of_another_length_is_another_model(length):
    with pytest.raises(
        EngineError, match=rf"has {length} numbers, and a value model of 3 labels writes 4: it serves anoth"
    ):
        read_row([0.5] * length, 3)
    with pytest.raises(EngineError, match="writes 9"):
        read_positions([0.5] * length, 2, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_no_value(bad):
    with pytest.raises(EngineError, match=r"the value model gave \[0.0, .*, 0.0\], which are no numbers"):
        read_row([0.0, bad, 0.0, 5.0], 3)


# The count over chunks


def test_the_tokens_of_all_chunks_are_added_up():
    table = ProgressTable()
    counts = [table.advance("a", prefix, length, 200).computed for prefix, length in ((40, 64), (104, 64), (168, 32))]
    assert counts == [64, 128, 160]
    assert len(table) == 0
    assert table.advance("b", 0, 10, 10).computed == 10


def test_an_id_that_is_used_again_starts_at_nothing():
    table = ProgressTable()
    table.advance("a", 0, 64, 100)
    table.advance("a", 64, 36, 100)
    assert table.advance("a", 100, 20, 120).computed == 20  # what it asked for before, longer
    table.advance("a", 0, 64, 300)  # aborted here
    assert table.advance("a", 64, 16, 80).computed == 16


def test_what_is_computed_again_counts_again():
    table = ProgressTable()
    table.advance("a", 0, 64, 100)  # retracted, and some of it evicted
    assert table.advance("a", 32, 64, 100).computed == 128
    assert table.advance("a", 96, 4, 100).computed == 132


def test_aborted_requests_do_not_pile_up():
    table = ProgressTable()
    for number in range(3 * MOST_UNFINISHED):
        table.advance(str(number), 0, 64, 100)
    assert len(table) == MOST_UNFINISHED
    assert table.advance(str(3 * MOST_UNFINISHED - 1), 64, 36, 100).computed == 100


def test_a_chunk_without_an_id_counts_itself():
    table = ProgressTable()
    assert [table.advance(None, 0, 64, 100).computed, table.advance(None, 64, 36, 100).computed] == [64, 36]
    assert len(table) == 0
