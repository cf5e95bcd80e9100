"""What the training script is made of: ranks and how they agree, optimizer and schedule, speed and its log."""

import contextlib
import datetime
import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common_lib.cli import UserError
from common_lib.progress import format_count, format_seconds

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class World:
    """This process's place among those of the run. Without torchrun there is one rank and no process group."""

    rank: int
    size: int
    device: torch.device

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, numbers: list[int]) -> list[int]:
        if self.size == 1:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def raise_together(self, message: str | None) -> None:
        """Where any rank has a message, all ranks raise it as a UserError, so that none waits for another."""
        if self.max([message is not None])[0]:
            raise UserError(next(said for said in self.gather(message) if said is not None))

    def first_alone(self, do: Callable[[], Result]) -> Result:
        """Rank 0 does it, then the others: for downloads and caches. A UserError of one rank ends all."""
        result = message = None
        for turn in (True, False):
            if turn == (self.rank == 0):
                try:
                    result = do()
                except UserError as error:
                    message = str(error)
            self.raise_together(message)
        return result


def start_ranks(device: str, fsdp: bool) -> World:
    """Join the run that torchrun's environment describes. `device`: auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; give --device cpu, or install PyTorch for CUDA")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size > 1 or fsdp:
        # Objects, flags and sums travel by gloo, so that no kernel waits for them; gradients on a GPU by nccl.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        store = None if size > 1 else dist.HashStore()
        dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=datetime.timedelta(hours=1))
    return World(rank, size, place)


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can stop between two steps. Ctrl-C again ends the process at once."""

    def __init__(self):
        self.received: int | None = None
        self._since = 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        # A rank gets the same signal twice where a whole group is signalled: torchrun passes on its own.
        if self.received and number == signal.SIGINT and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._since = number, time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# Model on its ranks, optimizer, schedule


def distribute(model: nn.Module, world: World, fsdp: bool) -> nn.Module:
    """The model as it is called in training: sharded, replicated, or itself."""
    if fsdp:
        from torch.distributed.fsdp import fully_shard  # slow to import

        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 deprecates the flag, earlier ones do not know its successor.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # The only buffers are the rotary frequencies, which never change.
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    return model


@contextlib.contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass only where `enabled`: the last of a step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def make_optimizer(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW, eps 1e-6, with weight decay on tensors of two or more dimensions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-6, fused=True)


def learning_rate(step: int, num_steps: int, max_lr: float) -> float:
    """Rate of step 0 .. num_steps - 1: linear warm-up, then a cosine to 10 % of `max_lr`.

    Warm-up takes max(5 % of the steps, 100), but at most half of them.
    """
    from math import cos, pi

    warmup = min(max(num_steps // 20, 100), num_steps // 2)
    if step < warmup:
        return max_lr * (step + 1) / warmup
    done = (step - warmup) / max(num_steps - 1 - warmup, 1)
    return max_lr * (0.1 + 0.9 * 0.5 * (1 + cos(pi * done)))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients to a joint norm of at most `max_norm`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ---------------------------------------------------------------------------------------------------------------------
# Speed

# Dense bf16 peak in FLOP/s, from the makers' data sheets (without sparsity); the first name that fits counts.
PEAK_FLOPS = {
    "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
    "B200": 2250e12, "B300": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A40": 150e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """The card's dense bf16 peak in FLOP/s; None for a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def step_flops(config, num_parameters: int, num_tokens: float, num_pairs: float) -> float:
    """Model FLOPs of forward and backward: 6 a weight and token, 12 a head dimension and attended pair in each layer.

    `num_parameters`: without the embedding. Tokens without padding, shared ones once; pairs are real ones; nothing is
    counted for recomputation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * num_pairs
    return 6 * num_parameters * num_tokens + attention


def progress_line(record: dict[str, float], num_steps: int, eta: float) -> str:
    """One step's numbers in words. `eta` in seconds."""
    mfu = f" MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return (
        f"step {record['step']}/{num_steps} loss {record['loss']:.4f} lr {record['lr']:.1e} norm {record['grad_norm']:.2f}"
        f" tokens/s {format_count(record['tokens_per_s'])} (real {format_count(record['real_tokens_per_s'])},"
        f" loss {format_count(record['loss_tokens_per_s'])}){mfu} ETA {format_seconds(eta)}"
    )


class MetricsLog:
    """`metrics.jsonl`: one line a step and one an evaluation; the local record of truth. Only rank 0 writes."""

    def __init__(self, path: Path, last_step: int):
        """Go on after `last_step`: later lines belong to steps that a stop has undone, and are removed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n"):
                with contextlib.suppress(ValueError):  # a torn last line
                    if json.loads(line)["step"] <= last_step:
                        kept.append(line + "\n")
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, object]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
