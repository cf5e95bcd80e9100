"""Which device, how much of its memory, how many threads, and its name for the record."""

import logging
import os
import platform
from pathlib import Path

from common_lib.cli import UserError

logger = logging.getLogger(__name__)


def check_device_name(name: str, flag: str) -> None:
    """Raises UserError for a name that no machine has; whether this one has it, `resolve_device` says."""
    kind, _, index = name.partition(":")
    if name != "auto" and (kind not in ("cpu", "cuda") or (index and not index.isdecimal())):
        raise UserError(f"{flag} {name!r} is unknown; give auto, cpu, cuda or cuda:N")


def resolve_device(name: str, flag: str) -> str:
    """`auto` -> cuda where there is a GPU. Raises UserError for a GPU that is not there."""
    check_device_name(name, flag)
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"{flag} {name}: this machine has {torch.cuda.device_count()} usable GPUs; give {flag} cpu")
    return name


def memory_of(device: str) -> tuple[int, int]:
    """(free, total) bytes: of the GPU, whoever uses it, or of the RAM, whose page cache counts as free."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return total, total
    lines = (line.split() for line in meminfo.read_text().splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), total


def use_expandable_segments() -> None:
    """Let torch's allocator grow its segments, so that passes of many sizes leave no holes. For this process only: a
    variable of the environment would reach the processes of SGLang. Call it before the first tensor is there; a setting of the user's
    in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF stays as it is."""
    if os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"):
        return
    import torch

    setter = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if setter is None:
        logger.warning("memory: torch %s has no way to set expandable_segments here; give "
                       "PYTORCH_ALLOC_CONF=expandable_segments:True if memory runs out", torch.__version__)  # fmt: skip
        return
    setter("expandable_segments:True")


def set_thread_device(device: str) -> None:
    """Make a GPU the one that this thread stands on: some kernels (flash-attn 4's) launch there, wherever tensors are."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)


def limit_cpu_threads() -> None:
    """Generation and scoring run at the same time: on a CPU each gets half of the cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))


def hardware_name(device: str) -> str:
    """The GPU's name, or the processor's and its cores."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
