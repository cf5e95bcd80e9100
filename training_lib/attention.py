"""Attention over the rows that a step reads: which kernel a layout runs on, and what the backbone is given for it.

`none` is plain causal attention (SDPA, or flash-attn where installed). Packed rows run on a GPU on FlexAttention, or for
`pack` on flash-attn's varlen kernel where installed; on a CPU on a dense mask through SDPA.
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

from classifier_lib.attention import flash_missing
from training_lib.packing import BlockLists, MicroBatch, block_lists

logger = logging.getLogger(__name__)

FLEX_BLOCK = 128
Inputs = dict[str, object]


@dataclass(frozen=True)
class Attention:
    """A kernel, and what it asks of rows and of the forward pass."""

    name: str  # of the transformers library, in whose table FLEX is entered below
    mask_inputs: Callable[[MicroBatch, torch.device], Inputs]
    row_multiple: int = 8  # packed rows are padded to a multiple of this
    has_dropout: bool = True
    prepare: Callable[[MicroBatch], MicroBatch] | None = None  # run where rows are laid out, not between steps

    def inputs(self, batch: MicroBatch, device: torch.device) -> Inputs:
        """Keyword arguments of the model's forward for a micro batch; tensors on `device`."""
        inputs = {"input_ids": on_device(batch.input_ids, device), "use_cache": False}
        if batch.end is not None:
            inputs["position_ids"] = on_device(batch.position_ids, device)
        return inputs | self.mask_inputs(batch, device)


def choose_attention(packing: str, device: str, half_precision: bool) -> Attention:
    """The fastest attention that can run a layout here. `device`: cpu or cuda."""
    if device != "cuda":
        return SDPA
    chosen = SDPA if packing == "none" else FLEX
    if packing == "tree":
        return chosen
    missing = flash_missing(FLASH.name, torch.bfloat16 if half_precision else torch.float32)
    if missing:
        logger.warning("attention: %s, since for %s %s", chosen.name, FLASH.name, missing)
    return chosen if missing else FLASH


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _dense_inputs(batch: MicroBatch, device: torch.device) -> Inputs:
    # Without a mask SDPA is causal, and a causal model never sees right padding.
    return {} if batch.end is None else {"attention_mask": dense_mask(on_device(batch.end, device))}


def dense_mask(end: torch.Tensor) -> torch.Tensor:
    """end int64 [B, S] -> bool [B, 1, S, S]: query q (third axis) may attend to key k where k <= q < end[k]."""
    place = torch.arange(end.shape[1], device=end.device)
    return ((place[None, :] <= place[:, None]) & (place[:, None] < end[:, None, :])).unsqueeze(1)


def _flash_inputs(batch: MicroBatch, device: torch.device) -> Inputs:
    """Which tokens are padding, for flash-attn to skip; of a packed row, where each trace begins, so that no layer has
    to ask the GPU for it."""
    if batch.end is None:
        width = batch.input_ids.shape[1]
        lengths = batch.last_index - np.arange(len(batch.last_index)) * width + 1
        return {"attention_mask": on_device(np.arange(width) < lengths[:, None], device)}
    positions = batch.position_ids[0]
    starts = np.append(np.flatnonzero(positions == 0), len(positions)).astype(np.int32)
    bounds, longest = on_device(starts, device), int(np.diff(starts).max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


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
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


SDPA = Attention("sdpa", _dense_inputs)
FLASH = Attention("flash_attention_2", _flash_inputs)
FLEX = Attention(
    "packed_flex", lambda batch, device: {"attention_mask": flex_mask(batch.end, device, batch.blocks)}, FLEX_BLOCK,
    has_dropout=False, prepare=_with_blocks,
)  # fmt: skip
ATTENTIONS = {attention.name: attention for attention in (SDPA, FLASH, FLEX)}

AttentionInterface.register(FLEX.name, _flex_forward)
AttentionMaskInterface.register(FLEX.name, sdpa_mask)  # only asked for where no ready mask is given
