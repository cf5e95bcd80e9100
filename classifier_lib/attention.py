"""Attention: one place decides which kernel a model runs on, before it loads, and says so.

The kernels of the flash-attn packages are asked of the transformers library only where they are really there: it would
raise ImportError for one that is not, or fetch another from the hub where its `kernels` package is installed.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from importlib import metadata

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import import_utils

logger = logging.getLogger(__name__)

SDPA_LOWER_RIGHT = "sdpa_lower_right"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FlashKernel:
    """A package of kernels. All of them align a causal mask to the last key, so that new tokens may follow a cache."""

    look_up: str  # of the transformers library: flash-attn and flash-attn-4 share a folder, so an import proves nothing
    package: str
    module: str
    least_capability: int  # major version of the GPU's


FLASH_KERNELS = {
    "flash_attention_2": FlashKernel("is_flash_attn_2_available", "flash-attn", "flash_attn", 8),
    "flash_attention_3": FlashKernel("is_flash_attn_3_available", "flash-attn-3", "flash_attn_interface", 8),
    "flash_attention_4": FlashKernel("is_flash_attn_4_available", "flash-attn-4", "flash_attn.cute", 9),
}


def resolve_attn_implementation(
    name: str | None = None, dtype: torch.dtype | None = None, device: str = "cuda", model: str = ""
) -> str:
    """The attention implementation to load a model with; what was asked for where it exists, else said loudly.

    `name`: a name of the transformers library; None or "auto" takes the fastest one that can run here
    (flash_attention_2 needs the flash-attn package, a GPU and half precision; otherwise sdpa). `device`: where the model
    will run, as far as that is known. `model`: what it is called in the log; with a name every choice is told.
    """
    is_auto = name in (None, "auto")
    wanted = "flash_attention_2" if is_auto else name
    missing = flash_missing(wanted, dtype, device) if wanted in FLASH_KERNELS else None
    chosen, what = "sdpa" if missing else wanted, f"{model}: attention" if model else "attention"
    if missing and not is_auto:
        _warn_once(f"{what}: {name} was asked for, but {missing}; using sdpa (slower; values equal to rounding)")
    elif missing and dtype in HALF and device != "cpu" and torch.cuda.is_available():
        _warn_once(f"{what}: sdpa, since for flash_attention_2 {missing}")
    elif is_auto:
        logger.info(
            "%s: %s (the fastest that can run here%s)", what, chosen, f"; {wanted}: {missing}" if missing else ""
        )
    elif model:
        logger.info("%s: %s", what, chosen)
    return chosen


def flash_missing(name: str, dtype: torch.dtype | None, device: str = "cuda") -> str | None:
    """Why a kernel of `FLASH_KERNELS` cannot run; None where it can. A dtype of None is not looked at."""
    kernel = FLASH_KERNELS[name]
    if device == "cpu":
        return "it has no kernel for a CPU"
    if dtype not in (None, *HALF):
        return f"it has no {str(dtype).removeprefix('torch.')} kernel"
    if not torch.cuda.is_available():
        return "there is no GPU"
    look_up = getattr(import_utils, kernel.look_up, None)
    if look_up is None:
        return "the installed transformers library does not know it"
    if not look_up():
        return f"the {kernel.package} package is not installed{_beside(kernel)}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < kernel.least_capability:
        has = "{}.{}".format(*capability)
        return f"it needs a GPU of compute capability {kernel.least_capability}.0 or above, and this one has {has}"
    try:
        importlib.import_module(kernel.module)
    except Exception as error:  # built for another torch, CUDA or glibc
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"the {kernel.package} package is installed but cannot be loaded ({reason}); install it again"
    return None


def _beside(kernel: FlashKernel) -> str:
    """The package that is often taken for the one that is missing."""
    if kernel.package != "flash-attn":
        return ""
    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return ""
    return f" (flash-attn-4 {version}, which SGLang brings, is another one: flash_attention_4 asks for it by name)"


def use_cached_attention(model: PreTrainedModel) -> None:
    """Give a model attention that is right where new tokens follow a cache; the flash kernels are, and stay."""
    name = model.config._attn_implementation
    if name in FLASH_KERNELS or name == SDPA_LOWER_RIGHT:
        return
    if name != "sdpa":
        _warn_once(f"attention: values of growing traces are computed with sdpa, not with the model's {name}")
    model.set_attn_implementation(SDPA_LOWER_RIGHT)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _sdpa_lower_right(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA whose causal mask is aligned to the *last* key, so that new tokens may follow a cache.

    query: [B, heads, q, d]; key, value: [B, kv heads, k, d], k >= q. With a mask, or without a cache, this is the
    library's own SDPA. With a cache and no mask, that one would build a [q, k] mask, which the flash kernel refuses;
    `causal_lower_right` keeps the flash kernel on a GPU. On a CPU it builds the mask itself.
    """
    q_length, k_length = query.shape[2], key.shape[2]
    if attention_mask is not None or q_length == k_length or q_length == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    from torch.nn.attention.bias import causal_lower_right  # not above: it loads the compiler, a second of start-up

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    bias = causal_lower_right(q_length, k_length)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA_LOWER_RIGHT, _sdpa_lower_right)
AttentionMaskInterface.register(SDPA_LOWER_RIGHT, sdpa_mask)
