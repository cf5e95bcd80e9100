"""Which attention a layout gets, what it asks of the batch, and the dropout that a model has under it."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stub_varlen import attend
from tiny import save_generator
from torch.utils.data import DataLoader

from training_lib import varlen
from training_lib.arguments import parse_args
from training_lib.attention import ATTENTIONS, FLEX, SDPA, choose_attention
from training_lib.batch_order import RankBatches
from training_lib.packing import Trace, empty_batch, packed_row, padded_batch, tree_row
from training_lib.ranks import World
from training_lib.step import load_model
from training_lib.varlen import VARLEN

CPU = torch.device("cpu")
TRACES = [Trace(np.arange(1, 1 + length), 1, 1, (0, length)) for length in (5, 3)]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of a capability, of whose kernels some are `missing`, as far as a choice can tell."""

    def have(*there: str, capability: tuple[int, int] = (9, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: "varlen_torch" in there)
        found = [
            replace(
                kernel,
                missing=lambda dtype, kernel=kernel: kernel.missing(dtype) if kernel.name == "varlen_torch"
                else None if kernel.name in there and dtype == torch.bfloat16 else "it is not there",
                load=lambda: attend,
            ) for kernel in VARLEN
        ]  # fmt: skip
        monkeypatch.setattr(varlen, "VARLEN", found)

    return have


LAYOUTS = ("none", "pack", "tree")


def chosen(device="cuda", half=True, dropout=False) -> list[str]:
    return [choose_attention(packing, device, half, dropout).name for packing in LAYOUTS]


def test_dropout_that_is_asked_for_is_kept_by_every_layout_that_can(gpu):
    gpu(*(kernel.name for kernel in VARLEN))
    assert chosen(dropout=True) == ["varlen_torch", "varlen_torch", "packed_flex"]
    assert chosen(dropout=False) == ["varlen_flash_attention_4", "varlen_flash_attention_4", "packed_flex"]
    gpu("varlen_flash_attention_4", "varlen_flash_attention_2")
    assert chosen(dropout=True) == ["varlen_flash_attention_2", "varlen_flash_attention_2", "packed_flex"]
    gpu("varlen_flash_attention_4")
    assert chosen(dropout=True) == ["sdpa", "packed_flex", "packed_flex"]
    assert all(ATTENTIONS[kernel.name].has_dropout == kernel.has_dropout for kernel in VARLEN)


def test_a_run_that_goes_on_without_attention_dropout_stays_without(gpu):
    """Packed rows on FlexAttention, where now a kernel has dropout: an older run would else be refused."""
    gpu("varlen_torch", "varlen_flash_attention_2")
    for before, names in (
        (FLEX, ["sdpa", "packed_flex", "packed_flex"]),
        (SDPA, ["varlen_torch"] * 2 + ["packed_flex"]),
    ):
        assert [choose_attention(packing, "cuda", True, True, before).name for packing in LAYOUTS] == names
    assert choose_attention("pack", "cuda", True, False, FLEX).name == "varlen_torch"  # nothing is dropped
    gpu("varlen_torch", "varlen_flash_attention_4")
    assert choose_attention("pack", "cuda", True, True, FLEX).name == "varlen_flash_attention_4"


def test_without_a_flash_kernel_packed_rows_have_flex_and_padded_ones_sdpa(gpu):
    gpu(*(kernel.name for kernel in VARLEN))
    assert chosen(half=False) == ["sdpa", "packed_flex", "packed_flex"]
    assert chosen(device="cpu") == ["sdpa"] * 3
    gpu("varlen_torch", capability=(7, 5))
    assert chosen() == ["sdpa", "packed_flex", "packed_flex"]
    gpu()
    assert chosen() == ["sdpa", "packed_flex", "packed_flex"]


def test_the_choice_is_said_with_its_reason_and_with_what_is_missing(gpu, caplog):
    caplog.set_level("INFO")
    gpu("varlen_torch")
    chosen(dropout=True)
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert caplog.messages[0].startswith("attention: varlen_torch (torch's own flash kernel, with attention dropout")
    assert "no attention dropout" in caplog.messages[2]
    caplog.clear()
    chosen(dropout=False)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
    assert caplog.messages[0].endswith("; varlen_flash_attention_4: it is not there")
    caplog.clear()
    chosen(device="cpu")
    assert not caplog.records


def test_a_kernel_that_does_not_load_is_not_chosen(gpu, caplog, monkeypatch):
    gpu("varlen_torch", "varlen_flash_attention_2")

    def broken():
        raise ImportError("undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(
        varlen, "VARLEN", [replace(k, load=broken) if k.name == "varlen_torch" else k for k in varlen.VARLEN]
    )
    assert chosen(dropout=True)[0] == "varlen_flash_attention_2"
    assert "varlen_torch: it cannot be loaded (ImportError: undefined symbol: _ZN3c10" in caplog.text
    assert "and more" not in caplog.text


@pytest.mark.parametrize(("major", "has"), [(8, False), (9, True), (10, True), (12, False)])
def test_flash_attention_4_runs_where_torch_has_a_bridge_to_it(monkeypatch, major, has):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_4_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace())
    assert (VARLEN[0].missing(torch.bfloat16) is None) == has
    assert VARLEN[0].missing(torch.float32) == "it has no float32 kernel"


def test_attention_is_known_by_its_name():
    assert {name: (a.row_multiple, a.has_dropout) for name, a in ATTENTIONS.items()} == {
        "sdpa": (8, True),
        "packed_flex": (128, False),
        "varlen_torch": (8, True),
        "varlen_flash_attention_4": (8, False),
        "varlen_flash_attention_2": (8, True),
        "flash_attention_2": (8, True),  # of older checkpoints
    }


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
    assert ("--packing none has it" in caplog.text) == (attention is FLEX)
