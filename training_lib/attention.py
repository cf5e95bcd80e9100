"""Attention over the rows that a step reads: which kernel a layout runs on, and what the backbone is given for it.

On a GPU `none` and `pack` run on a flash kernel that is told where each sequence begins (varlen.py), `tree` on
FlexAttention, which is also what `pack` falls back to, as `none` does to SDPA. A CPU runs all on SDPA, packed rows with a
dense mask.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from training_lib.packing import BlockLists, MicroBatch, block_lists
from training_lib.varlen import VARLEN, load_varlen, varlen_inputs, varlen_order

logger = logging.getLogger(__name__)

FLEX_BLOCK = 128
# Both hold by construction: a row's length is a multiple of FLEX_BLOCK, which a compiler of dynamic shapes cannot know, and
# every token sees itself. Without them each load is masked and each row is looked at for having seen nothing.
FLEX_OPTIONS = {"IS_DIVISIBLE": True, "ROWS_GUARANTEED_SAFE": True}
Inputs = dict[str, object]


@dataclass(frozen=True)
class Attention:
    """A kernel, and what it asks of rows and of the forward pass."""

    name: str  # of the transformers library, in whose table ours are entered
    mask_inputs: Callable[[MicroBatch, torch.device], Inputs]
    row_multiple: int = 8  # packed rows are padded to a multiple of this
    has_dropout: bool = True
    prepare: Callable[[MicroBatch], MicroBatch] | None = None  # run where rows are laid out, not between steps
    reason: str = ""  # why it is taken, for the log

    def inputs(self, batch: MicroBatch, device: torch.device) -> Inputs:
        """Keyword arguments of the model's forward for a micro batch; tensors on `device`."""
        inputs = {"input_ids": on_device(batch.input_ids, device), "use_cache": False}
        if batch.end is not None:
            inputs["position_ids"] = on_device(batch.position_ids, device)
        return inputs | self.mask_inputs(batch, device)


def choose_attention(
    packing: str, device: str, half_precision: bool, dropout: bool = False, kept: Attention | None = None
) -> Attention:
    """The fastest attention that can run a layout here, ready to use; its reason is said. `device`: cpu or cuda. `dropout`:
    whether attention weights are to be dropped; see `varlen_order` for what that decides. `kept`: what a run that goes on
    had: if that had no dropout, though it was asked for, no kernel with dropout is taken for it where there is another."""
    if device != "cuda":
        return SDPA
    chosen, missing = FLEX if packing != "none" else SDPA, {}
    if packing != "tree":
        for kernel in varlen_order(dropout, never=dropout and kept is not None and not kept.has_dropout):
            reason = load_varlen(kernel, torch.bfloat16 if half_precision else torch.float32)
            if reason is None:
                chosen = ATTENTIONS[kernel.name]
                break
            missing[kernel.name] = reason
    level = logging.WARNING if missing else logging.INFO
    told = "".join(f"; {name}: {reason}" for name, reason in missing.items())
    logger.log(level, "attention: %s (%s)%s", chosen.name, chosen.reason, told)
    return chosen


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _dense_inputs(batch: MicroBatch, device: torch.device) -> Inputs:
    # Without a mask SDPA is causal, and a causal model never sees right padding.
    return {} if batch.end is None else {"attention_mask": dense_mask(on_device(batch.end, device))}


def dense_mask(end: torch.Tensor) -> torch.Tensor:
    """end int64 [B, S] -> bool [B, 1, S, S]: query q (third axis) may attend to key k where k <= q < end[k]."""
    place = torch.arange(end.shape[1], device=end.device)
    return ((place[None, :] <= place[:, None]) & (place[:, None] < end[:, None, :])).unsqueeze(1)


def _bounds_on_device(batch: MicroBatch, device: torch.device) -> Inputs:
    inputs = varlen_inputs(batch)
    return inputs | {"cu_seq_lens_q": on_device(inputs["cu_seq_lens_q"], device)}


def varlen_attention(name: str, has_dropout: bool, reason: str = "") -> Attention:
    return Attention(name, _bounds_on_device, has_dropout=has_dropout, reason=reason)


def _with_blocks(batch: MicroBatch) -> MicroBatch:
    return replace(batch, blocks=block_lists(batch.end[0], FLEX_BLOCK))


def flex_mask(end: np.ndarray, device: torch.device, blocks: BlockLists | None = None) -> BlockMask:
    """The BlockMask of one row, end int64 [1, S], S a multiple of FLEX_BLOCK. Never builds the S x S mask. blocks: the
    row's block lists, where they are ready."""
    limits = on_device(end[0].astype(np.int32), device)

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx < limits[kv_idx])

    lists = [_indices(part, device) for part in blocks or block_lists(end[0], FLEX_BLOCK)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod)


def _indices(part: np.ndarray, device: torch.device) -> torch.Tensor:
    """Counts [n] as they are, indices [n, most] as [n, n], with the axes of batch and head."""
    found = on_device(part, device)
    whole = found.new_zeros(
        (1, 1, *(len(part),) * part.ndim)
    )  # always made the same way: a compiled layer looks at strides
    whole[0, 0, ..., : found.shape[-1]] = found
    return whole


_compile = functools.cache(torch.compile)  # of FlexAttention at its first use, since that is slow


def _flex_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query [1, heads, S, d]; key, value [1, kv heads, S, d]; attention_mask: the row's BlockMask."""
    if dropout:
        raise ValueError("FlexAttention has no attention dropout; set the model's to 0")
    # Under autocast the rotary embedding leaves query and key in float32; all three must agree.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Inside a compiled layer the call is traced as it is; compiling it twice is what must not happen. Dynamic: rows differ
    # in length, and one kernel serves them all.
    attend = flex_attention if torch.compiler.is_compiling() else _compile(flex_attention, dynamic=True)
    out = attend(
        query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True, kernel_options=dict(FLEX_OPTIONS)
    )
    return out.transpose(1, 2).contiguous(), None


SDPA = Attention("sdpa", _dense_inputs, reason="torch's own choice of a kernel, with attention dropout")
FLEX = Attention(
    "packed_flex", lambda batch, device: {"attention_mask": flex_mask(batch.end, device, batch.blocks)}, FLEX_BLOCK,
    has_dropout=False, prepare=_with_blocks,
    reason="FlexAttention, which skips the blocks that no token may see; no attention dropout",
)  # fmt: skip
VARLEN_ATTENTIONS = [varlen_attention(kernel.name, kernel.has_dropout, kernel.reason) for kernel in VARLEN]
ATTENTIONS = {attention.name: attention for attention in (SDPA, FLEX, *VARLEN_ATTENTIONS)}
ATTENTIONS["flash_attention_2"] = ATTENTIONS["varlen_flash_attention_2"]  # its name in older checkpoints

AttentionInterface.register(FLEX.name, _flex_forward)
AttentionMaskInterface.register(FLEX.name, sdpa_mask)  # only asked for where no ready mask is given
