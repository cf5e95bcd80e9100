"""Running out of a device's memory: how it shows, and what can be given back."""

import gc

import torch

# A RuntimeError with one of these texts means the same as torch.OutOfMemoryError.
OTHER_FORMS = (
    "CUDA error: out of memory",  # outside of torch's allocator: a kernel that is loaded late, say
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS found no room for its workspace
    "DefaultCPUAllocator: can't allocate memory",
)


class ScoringOutOfMemory(MemoryError):
    """A single trace, with nothing else held, does not fit the device. The message is one line: what was to be read,
    how much that takes, and what is free."""


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(form in str(error) for form in OTHER_FORMS)


def give_back(device: torch.device) -> None:
    """Free what nobody holds any more: tensors in a failed pass's frames, and blocks that torch keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_words(device: torch.device) -> str:
    """What is free there, in words; on a GPU only, whose driver tells exactly."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f", and {free / 1e9:.3g} GB of its {total / 1e9:.3g} GB are free"
