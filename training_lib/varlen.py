"""Flash kernels over rows of several sequences ("varlen"): which there are, and one wrapper that calls any of them.

transformers' own wrapper of flash-attn warns inside a compiled layer where autocast has left rotated queries in float32,
and looks at the padding mask on the way: 8 to 17 graphs a layer. The wrapper here casts, gives the kernel where sequences
begin, and no mask: one graph. A kernel's function is looked up when it is chosen, never inside a layer.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import attention as torch_attention
from transformers import AttentionInterface, AttentionMaskInterface

from classifier_lib.attention import HALF, flash_missing
from training_lib.packing import MicroBatch

# query [T, heads, d]; key, value [T, kv heads, d]; bounds int32 [n + 1]; longest; dropout; scale -> [T, heads, d]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float, float | None], torch.Tensor]
FLASH4_MAJOR = (9, 10)  # compute capabilities that torch's bridge to flash-attn-4 serves


@dataclass(frozen=True)
class VarlenKernel:
    """A kernel, why it is taken, and how it is found. All are causal, take grouped heads, and have a backward."""

    name: str
    reason: str
    has_dropout: bool
    missing: Callable[[torch.dtype], str | None]  # why it cannot run here; None where it can
    load: Callable[[], Attend]  # an exception says why it cannot be loaded


def varlen_order(dropout: bool, never: bool = False) -> list[VarlenKernel]:
    """The kernels, the one to take first. With attention dropout, only those that have it; never: those that have it not.

    Dropout that is asked for is kept wherever a kernel has it, since it is part of the recipe (p_dropout 0.05 as released),
    and a change of kernel should change no more than rounding. Torch's own kernel comes before the flash-attn package, of
    whose source it is: the compiler knows what it costs and that it draws noise, and computes neither again by mistake.
    """
    if never:
        return [kernel for kernel in VARLEN if not kernel.has_dropout]
    return [kernel for kernel in VARLEN if kernel.has_dropout or not dropout]


def load_varlen(kernel: VarlenKernel, dtype: torch.dtype) -> str | None:
    """Make a kernel ready under its name in the transformers library; or why it cannot be."""
    if missing := kernel.missing(dtype):
        return missing
    try:
        attend = kernel.load()
    except Exception as error:  # a package of another version, or built for another torch
        return f"it cannot be loaded ({type(error).__name__}: {error})".splitlines()[0]
    register_varlen(kernel.name, attend)
    return None


def register_varlen(name: str, attend: Attend) -> None:
    AttentionInterface.register(name, functools.partial(varlen_forward, attend))
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def varlen_forward(
    attend: Attend, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """query [B, heads, S, d]; key, value [B, kv heads, S, d] -> [B, S, heads, d]. kwargs: `cu_seq_lens_q` int32 [n + 1],
    where the sequences of the B * S tokens begin and end, and `max_length_q`, as `varlen_inputs` gives them."""
    if attention_mask is not None or kwargs.get("cu_seq_lens_q") is None:
        raise ValueError("a varlen kernel takes no mask, but where each sequence begins (varlen_inputs)")
    # Under autocast the rotary embedding leaves query and key in float32. Contiguous: flash-attn-4 has given NaN gradients
    # for inputs that are not.
    parts = (part.to(value.dtype).transpose(1, 2).flatten(0, 1).contiguous() for part in (query, key, value))
    out = attend(*parts, kwargs["cu_seq_lens_q"], kwargs["max_length_q"], dropout, scaling)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def varlen_bounds(batch: MicroBatch) -> np.ndarray:
    """Where the sequences of a batch's B * S tokens begin, and their end: int32 [n + 1].

    The padding behind a trace is a sequence of its own, in a packed row one for each token, so that no trace sees it.
    """
    rows, width = batch.input_ids.shape
    if batch.end is not None:
        return np.append(np.flatnonzero(batch.position_ids[0] == 0), width).astype(np.int32)
    return np.unique([*range(0, (rows + 1) * width, width), *(batch.last_index + 1)]).astype(np.int32)


def varlen_inputs(batch: MicroBatch) -> dict[str, object]:
    """Keyword arguments of the model's forward: numpy bounds, and the longest sequence's length as an int."""
    bounds = varlen_bounds(batch)
    return {"attention_mask": {"full_attention": None}, "cu_seq_lens_q": bounds,
            "max_length_q": int(np.diff(bounds).max())}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def _torch_missing(dtype: torch.dtype) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if dtype not in HALF:
        return f"it has no {str(dtype).removeprefix('torch.')} kernel"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without it"
    has = torch.cuda.get_device_capability()
    return None if has >= (8, 0) else "it needs a GPU of compute capability 8.0 or above"


def _flash4_missing(dtype: torch.dtype) -> str | None:
    if missing := flash_missing("flash_attention_4", dtype):
        return missing
    major, minor = torch.cuda.get_device_capability()
    return None if major in FLASH4_MAJOR else f"torch has no bridge to it for compute capability {major}.{minor}"


def _load_torch() -> Attend:
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def attend(query, key, value, bounds, longest, dropout, scale):
        if dropout:  # the public function has none; what it calls has
            flash = torch.ops.aten._flash_attention_forward
            return flash(query, key, value, bounds, bounds, longest, longest, dropout, True, False, scale=scale)[0]
        return varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
        )

    return attend


def _load_flash4() -> Attend:
    # By torch's bridge: as an operator that the compiler knows. The package's own function cannot be compiled.
    torch_attention.activate_flash_attention_impl("FA4")
    return _load_torch()


def _load_flash2() -> Attend:
    flash = importlib.import_module("flash_attn").flash_attn_varlen_func

    def attend(query, key, value, bounds, longest, dropout, scale):
        return flash(query, key, value, bounds, bounds, longest, longest, dropout, softmax_scale=scale, causal=True)

    return attend


VARLEN = [
    VarlenKernel(
        "varlen_flash_attention_4", "the fastest on Hopper and Blackwell; no attention dropout", False,
        _flash4_missing, _load_flash4,
    ),
    VarlenKernel(
        "varlen_torch", "torch's own flash kernel, with attention dropout; the compiler knows its cost and its noise", True,
        _torch_missing, _load_torch,
    ),
    VarlenKernel(
        "varlen_flash_attention_2", "the flash-attn package, with attention dropout", True,
        functools.partial(flash_missing, "flash_attention_2"), _load_flash2,
    ),
]  # fmt: skip
