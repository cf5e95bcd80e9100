"""The ranks of a training run: how they meet, agree and fail together, and the model on them."""

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common_lib.cli import UserError
from common_lib.devices import resolve_device
from common_lib.files import OutputError

Result = TypeVar("Result")


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

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def raise_together(self, message: str | None) -> None:
        """Where any rank has a message, all ranks raise it as a UserError, so that none waits for another."""
        if said := [message for message in self.gather(message) if message is not None]:
            raise UserError(said[0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Every rank does this; a UserError or OutputError of one is raised on all."""
        message = None
        try:
            yield
        except (UserError, OutputError) as error:
            message = str(error)
        self.raise_together(message)

    def rank0_first(self, do: Callable[[], Result]) -> Result:
        """Rank 0 does it, then the others: for downloads and caches. A UserError of one rank ends all."""
        result: Any = None
        for turn in (True, False):
            with self.together():
                if turn == (self.rank == 0):
                    result = do()
        return result


@contextlib.contextmanager
def join_ranks(device: str, fsdp: bool) -> Iterator[World]:
    """Join the run that torchrun's environment describes. `device`: auto, cpu or cuda. Raises UserError."""
    kind = resolve_device(device, "--device")
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    grouped = size > 1 or fsdp
    if grouped:
        # Objects, flags and sums travel by gloo, so that no kernel waits for them; gradients on a GPU by nccl.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        store = None if size > 1 else dist.HashStore()
        dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=datetime.timedelta(hours=1))
    yield World(rank, size, place)
    if grouped and size == 1:  # several leave by launch.leave_ranks
        dist.destroy_process_group()


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


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Exchange gradients in this backward pass only where `enabled`: the last of a step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)
    replicated = isinstance(model, DistributedDataParallel)
    return model.no_sync() if replicated and not enabled else contextlib.nullcontext()
