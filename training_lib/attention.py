"""Attention over packed rows: from a row's `end` vector to what the backbone's attention is given.

Which kernel a layout runs on: `none` plain causal attention (SDPA, or flash-attn where installed); packed rows on a GPU
FlexAttention, or for `pack` flash-attn's varlen kernel where installed; packed rows on a CPU a dense mask through SDPA.
"""

import functools
import importlib.util
import logging

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from training_lib.packing import MicroBatch, block_lists

logger = logging.getLogger(__name__)

FLEX = "packed_flex"
FLEX_BLOCK = 128


@functools.cache
def _compiled_flex_attention():
    """Compiled at its first use, since that is slow; dynamic: rows differ in length, and one kernel serves them all."""
    return torch.compile(flex_attention, dynamic=True)


def _flex_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query [1, heads, S, d]; key, value [1, kv heads, S, d]; attention_mask: the row's BlockMask."""
    if dropout:
        raise ValueError("FlexAttention has no attention dropout; set the model's to 0")
    # Under autocast the rotary embedding leaves query and key in float32; all three must agree.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Inside a compiled layer the call is traced as it is; compiling it twice is what must not happen.
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX, _flex_forward)
AttentionMaskInterface.register(FLEX, sdpa_mask)  # only asked for where no ready mask is given


def choose_attention(packing: str, device: str, half_precision: bool) -> str:
    """The attention implementation for a layout, as a name of the transformers library or FLEX."""
    has_flash = device == "cuda" and half_precision and importlib.util.find_spec("flash_attn") is not None
    if packing == "tree" or (packing == "pack" and not has_flash):
        return FLEX if device == "cuda" else "sdpa"
    return "flash_attention_2" if has_flash else "sdpa"


def row_multiple(implementation: str) -> int:
    """Packed rows are padded to a multiple of this."""
    return FLEX_BLOCK if implementation == FLEX else 8


def model_inputs(batch: MicroBatch, implementation: str, device: torch.device) -> dict[str, object]:
    """Keyword arguments of the model's forward for a micro batch; tensors on `device`."""

    def on_device(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    inputs = {"input_ids": on_device(batch.input_ids), "use_cache": False}
    if batch.end is None:
        # A causal model never sees right padding; only flash-attn gains from knowing it (it skips it).
        if implementation == "flash_attention_2":
            width = batch.input_ids.shape[1]
            lengths = batch.last_index - np.arange(len(batch.last_index)) * width + 1
            inputs["attention_mask"] = on_device(np.arange(width) < lengths[:, None])
        return inputs
    inputs["position_ids"] = on_device(batch.position_ids)
    if implementation == FLEX:
        inputs["attention_mask"] = flex_mask(batch.end, device)
    elif implementation == "flash_attention_2":
        inputs |= _varlen_arguments(batch.position_ids[0], device)
    else:
        inputs["attention_mask"] = dense_mask(on_device(batch.end))
    return inputs


def dense_mask(end: torch.Tensor) -> torch.Tensor:
    """end int64 [B, S] -> bool [B, 1, S, S]: query q (third axis) may attend to key k where k <= q < end[k]."""
    place = torch.arange(end.shape[1], device=end.device)
    return ((place[None, :] <= place[:, None]) & (place[:, None] < end[:, None, :])).unsqueeze(1)


def flex_mask(end: np.ndarray, device: torch.device) -> BlockMask:
    """The BlockMask of one row, end int64 [1, S], S a multiple of FLEX_BLOCK. Never builds the S x S mask."""
    limits = torch.from_numpy(end[0].astype(np.int32)).to(device)

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx < limits[kv_idx])

    lists = [torch.from_numpy(part)[None, None].to(device) for part in block_lists(end[0], FLEX_BLOCK)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod)


def _varlen_arguments(position_ids: np.ndarray, device: torch.device) -> dict[str, object]:
    """Where each trace of a packed row begins, for flash-attn; given, so that no layer has to ask the GPU for it."""
    starts = np.append(np.flatnonzero(position_ids == 0), len(position_ids)).astype(np.int32)
    bounds, longest = torch.from_numpy(starts).to(device), int(np.diff(starts).max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
