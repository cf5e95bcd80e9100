"""Which attention a layout gets, what it asks of the batch, and the dropout that a model has under it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import save_generator
from torch.utils.data import DataLoader

from training_lib.arguments import parse_args
from training_lib.attention import ATTENTIONS, FLASH, FLEX, SDPA, choose_attention
from training_lib.batch_order import RankBatches
from training_lib.packing import Trace, empty_batch, packed_row, padded_batch, tree_row
from training_lib.ranks import World
from training_lib.step import load_model

CPU = torch.device("cpu")
TRACES = [Trace(np.arange(1, 1 + length), 1, 1, (0, length)) for length in (5, 3)]


def test_each_layout_gets_the_fastest_attention_that_can_run(monkeypatch, caplog):
    layouts = ("none", "pack", "tree")
    assert [choose_attention(packing, "cpu", True) for packing in layouts] == [SDPA] * 3
    assert not caplog.records
    assert [choose_attention(packing, "cuda", True) for packing in layouts] == [SDPA, FLEX, FLEX]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        f"attention: {name}, since for flash_attention_2 there is no GPU" for name in ("sdpa", "packed_flex")
    ]
    monkeypatch.setattr(
        "training_lib.attention.flash_missing", lambda name, dtype: None if dtype == torch.bfloat16 else "no"
    )
    assert [choose_attention(packing, "cuda", True) for packing in layouts] == [FLASH, FLASH, FLEX]
    assert [choose_attention(packing, "cuda", False) for packing in layouts] == [SDPA, FLEX, FLEX]
    assert [choose_attention(packing, "cpu", True) for packing in layouts] == [SDPA] * 3


def test_attention_is_known_by_its_name():
    assert {name: (a.row_multiple, a.has_dropout) for name, a in ATTENTIONS.items()} == {
        "sdpa": (8, True),
        "flash_attention_2": (8, True),
        "packed_flex": (128, False),
    }


def test_flash_attention_is_told_of_padding_and_of_where_traces_begin():
    padded = FLASH.inputs(padded_batch(TRACES, 16), CPU)
    assert padded["attention_mask"].tolist() == [[True] * 5 + [False] * 3, [True] * 3 + [False] * 5]
    assert "position_ids" not in padded
    packed = FLASH.inputs(packed_row(TRACES), CPU)
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 5, 8]
    assert (packed["max_length_q"], packed["max_length_k"]) == (5, 5)
    assert "attention_mask" not in packed


def test_sdpa_is_given_a_mask_for_packed_rows_only():
    assert "attention_mask" not in SDPA.inputs(padded_batch(TRACES, 16), CPU)
    mask = SDPA.inputs(packed_row(TRACES), CPU)["attention_mask"][0, 0]
    assert not mask[5:, :5].any() and torch.equal(mask[:5, :5], torch.ones(5, 5).tril().bool())


class TwoTraces(RankBatches):
    """Item 0 is one row of 400 tokens."""

    def __init__(self, prepare):
        self.packing, self.micro_batch_size, self.multiple, self.row_tokens = "tree", 1, 128, 512
        self.table, self.prepare = SimpleNamespace(max_length=512, trace=long_trace), prepare

    def rank_units(self, step):
        return np.array([[250], [249]])


def long_trace(length: int) -> Trace:
    return Trace(np.append(np.arange(100), np.arange(length, 2 * length - 100)), 100, 1, (0, length))


def blocks_read(end: np.ndarray, block: int = 128) -> np.ndarray:
    """int32 [n, n]: the blocks of the mask of which something is read, found in the whole mask."""
    place = np.arange(len(end))
    mask = (place[None] <= place[:, None]) & (place[:, None] < end[None])
    n = len(end) // block
    return mask.reshape(n, block, n, block).any(axis=(1, 3)).astype(np.int32)


def test_block_lists_come_from_the_loaders_worker_and_make_the_mask_of_end(monkeypatch):
    """Between steps nothing of them is computed."""
    [[batch]] = DataLoader(TwoTraces(FLEX.prepare), batch_size=None, sampler=[0], num_workers=1)
    alone = FLEX.mask_inputs(tree_row([long_trace(250), long_trace(249)], 128), CPU)["attention_mask"]
    monkeypatch.setattr("training_lib.attention.block_lists", None)
    mask = FLEX.mask_inputs(batch, CPU)["attention_mask"]
    assert mask.shape == (1, 1, 512, 512)
    assert torch.equal(mask.to_dense()[0, 0], torch.from_numpy(blocks_read(batch.end[0])))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(mask, name), getattr(alone, name)), name
    with pytest.raises(TypeError):
        FLEX.mask_inputs(empty_batch(True, 128), CPU)


@pytest.mark.parametrize("attention", [SDPA, FLEX])
def test_the_model_has_attention_dropout_only_where_the_kernel_has_it(tmp_path, attention, caplog):
    save_generator(tmp_path)
    plan = SimpleNamespace(has_head=False, model_dir=tmp_path, attention=attention)
    with caplog.at_level("INFO"):
        model = load_model(parse_args(["--p_dropout", "0.2"]), plan, World(0, 1, CPU))
    expected = 0.2 if attention.has_dropout else 0.0
    assert model.config.attention_dropout == model.model.layers[0].self_attn.attention_dropout == expected
    assert model.config.score_dropout == 0.2
    assert model.config._attn_implementation == attention.name
    assert ("attention dropout is 0: packed_flex has none" in caplog.text) == (attention is FLEX)
