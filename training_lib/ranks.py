"""The ranks of a training run: how they meet, agree and fail together, and the model on them."""

import contextlib
import datetime
import ipaddress
import logging
import os
import socket
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
from training_lib.launch import RankError
from training_lib.precision import Precision

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# How long a rank waits for the others before it ends the run: while one may download, compile or write a checkpoint, and
# from step to step, where one that hangs holds up all the others' GPUs.
PATIENT = datetime.timedelta(hours=1)
STEPPING = datetime.timedelta(minutes=10)


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

    def from_rank0(self, item: Any) -> Any:
        """Rank 0's item, on every rank."""
        items = [item]
        if self.size > 1:
            dist.broadcast_object_list(items)
        return items[0]

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with rank 0's values, in place."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def raise_together(self, message: str | None) -> None:
        """Where any rank has a message, all ranks raise it as a UserError, so that none waits for another."""
        if said := [message for message in self.gather(message) if message is not None]:
            raise UserError(said[0])

    def wait_at_most(self, limit: datetime.timedelta) -> None:
        """For the others, from now on, whatever goes between ranks (torch has no public name for it)."""
        if not dist.is_initialized():
            return
        for group in dist.distributed_c10d._world.pg_map:
            for device in group._device_types:
                group._get_backend(device)._set_default_timeout(limit)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Between steps: what one rank does while the others wait may take long here."""
        self.wait_at_most(PATIENT)
        yield
        self.wait_at_most(STEPPING)

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
def join_ranks(device: str) -> Iterator[World]:
    """Join the run that torchrun's environment describes. `device`: auto, cpu or cuda. Raises UserError."""
    kind = resolve_device(device, "--device")
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    world = World(rank, size, place)
    if size > 1:
        start_group(world)
    try:
        yield world
    except RuntimeError as error:
        message = (str(error) or "no message").splitlines()[0].partition(". ")[0]
        if not isinstance(error, dist.DistError) and not any(words in message for words in LOST):
            raise
        raise RankError(
            f"rank {rank} lost the others: one of them hangs or has ended ({message}); what each rank said last tells which; "
            "the same command goes on from the last checkpoint"
        ) from error
    finally:
        if size == 1 and dist.is_initialized():  # several leave by launch.leave_ranks
            dist.destroy_process_group()


def start_group(world: World) -> None:
    """The process group of the ranks; of one, which only FSDP wants."""
    # Objects, flags and sums travel by gloo, so that no kernel waits for them; gradients on a GPU by nccl.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    store = None if world.size > 1 else dist.HashStore()
    check_host_address()
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, store=store, timeout=PATIENT)


# How gloo's messages tell it, which are RuntimeErrors
LOST = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "timeout caused pair closure")


def check_host_address() -> None:
    """Of several nodes each listens where its own name leads. Raises RankError where that is this machine's inside, as on
    a Debian or Ubuntu whose /etc/hosts names it 127.0.1.1: the others would call in vain."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not several or "GLOO_SOCKET_IFNAME" in os.environ or not _is_inside(socket.gethostname()):
        return
    told = (
        f"this node's name {socket.gethostname()} leads to itself (/etc/hosts), where the ranks of other nodes cannot reach "
        "it; set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface between the nodes, such as eth0: "
        "`ip -brief address` lists them"
    )
    if not _is_inside(os.environ.get("MASTER_ADDR", "")):
        raise RankError(told)
    logger.warning("%s", told)  # this is the first node, which sees itself like this, or all are on one machine


def _is_inside(name: str) -> bool:
    """Whether a host name or address is found, and is a loopback address."""
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return False
    return ipaddress.ip_address(str(address).split("%")[0]).is_loopback


def distribute(model: nn.Module, world: World, precision: Precision) -> nn.Module:
    """The model as it is called in training: sharded, replicated, or itself."""
    if precision.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

        if not dist.is_initialized():
            start_group(world)
        # The optimizer steps on the parameters as they are stored; gradients are summed and kept in fp32.
        warnings.filterwarnings(
            "ignore", message="FSDP2-wrapped module"
        )  # of success_probs, a view that nothing writes to
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision.half else MixedPrecisionPolicy()
        mesh = init_device_mesh(world.device.type, (world.size,))  # by itself it takes a GPU where there is one
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        return fully_shard(model, mesh=mesh, mp_policy=mixed)
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 deprecates the flag, earlier ones do not know its successor.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # The only buffers are the rotary frequencies, which never change.
            return DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    return model


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """DDP exchanges gradients in this backward pass only where `enabled`: the last of a step. FSDP does in every one, as a
    rank would else hold the whole model's."""
    replicated = isinstance(model, DistributedDataParallel)
    return model.no_sync() if replicated and not enabled else contextlib.nullcontext()


def clear_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After a step. DDP's lie in its buckets: let go, the next passes would make others beside them."""
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def clip_gradients(model: nn.Module, most: float) -> float:
    """Scale all gradients to a joint norm of `most` at most; the norm before, over all ranks' shards."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
