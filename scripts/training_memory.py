"""The memory line of train_classifier.py against what fake tensors of the real step take, and what compiled layers keep.

    python scripts/training_memory.py                    # three shapes, all packings, FSDP and DDP: minutes, and no GPU
    python scripts/training_memory.py --shapes 0.5B --tokens 16384

Every operation's outputs are tracked by their storages through two micro batches of a step; attention is a stand-in that
keeps what a flash kernel keeps. Exit status 1 where a figure
is off by more than 15 %.
"""

import argparse
import contextlib
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config
import torch.distributed as dist
from gpu_parts.models import model_info
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config
from transformers.masking_utils import sdpa_mask

from classifier_lib import Qwen2ForClassifier, rollout_loss
from common_lib.cli import run_script
from training_lib.compiling import compile_layers
from training_lib.memory import StepShape, compiled_layer, estimate_memory
from training_lib.precision import Precision
from training_lib.ranks import World, clear_gradients, distribute, gradient_sync
from training_lib.step import make_optimizer

SHAPES = {  # of Qwen2.5
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                 vocab_size=151_936),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, vocab_size=151_936),
    "7B": dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, vocab_size=152_064),
}  # fmt: skip
PRECISIONS = {
    "FSDP, bf16": Precision(True, True), "DDP, autocast": Precision(False, True), "DDP, fp32": Precision(False, False),
    "FSDP, fp32": Precision(True, False), "DDP, bf16 parameters": Precision(False, False, bf16_parameters=True),
}  # fmt: skip
CLOSE = 0.15


# ---------------------------------------------------------------------------------------------------------------------
# A step of fake tensors


class StorageTracker(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there, and their peak."""

    SMALL = 1 << 16

    def __init__(self):
        super().__init__()
        self.live: dict[int, weakref.ref] = {}
        self.peak = 0

    def add(self, tensor: object) -> bool:
        """Whether its storage is new, and not too small to count."""
        if not isinstance(tensor, torch.Tensor):
            return False
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = id(storage)
        if key in self.live or storage.nbytes() < self.SMALL:
            return False
        self.live[key] = weakref.ref(storage, lambda _: self.live.pop(key, None))
        return True

    def now(self) -> int:
        """FSDP empties storages that it keeps: what they have is asked anew."""
        return sum(storage.nbytes() for ref in list(self.live.values()) if (storage := ref()) is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        added = [self.add(tensor) for tensor in tree_leaves(out)]
        if any(added):
            self.peak = max(self.peak, self.now())
        return out


@torch.library.custom_op("training_memory::varlen", mutates_args=())
def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for a flash kernel: its output [B, heads, S, d], and the softmax's sums, which it keeps for its backward."""
    return torch.zeros_like(query), query.new_zeros(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("training_memory::varlen_backward", mutates_args=())
def kernel_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


@kernel.register_fake
def _(query, key, value):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@kernel_backward.register_fake
def _(query, key, value, out, sums):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


kernel.register_autograd(
    lambda ctx, *_: kernel_backward(*ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def attend(module, query, key, value, attention_mask, **kwargs):
    return kernel(query.to(value.dtype), key.to(value.dtype), value)[0].transpose(1, 2).contiguous(), None


STAND_IN = "kernel_stand_in"
AttentionInterface.register(STAND_IN, attend)
AttentionMaskInterface.register(STAND_IN, sdpa_mask)


def measure_step(shapes: dict[str, int], shape: StepShape, rows: int = 1) -> int:
    """Bytes at the peak of the second step of two passes over `rows` x `tokens / rows` tokens on the first of the ranks."""
    config = Qwen2Config(**shapes, num_labels=shape.num_labels)
    dtype = torch.bfloat16 if shape.precision.bf16_parameters else torch.float32
    with fake_ranks(shape.ranks):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model = Qwen2ForClassifier._from_config(config, dtype=dtype, attn_implementation=STAND_IN).train()
        model.set_dropout(attention=0.0, head=0.05)
        if shape.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        world = World(0, shape.ranks if shape.precision.fsdp else 1, torch.device("cpu"))
        called = distribute(model, world, shape.precision)  # its mesh of ranks is real
        optimizer = make_optimizer(called, 1e-4, (0.9, 0.95), 0.1)
        with fake, StorageTracker() as tracker:
            for tensor in [*model.parameters(), *model.buffers()]:
                tracker.add(tensor)
            for parameter in model.parameters():  # of the first step
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            clear_gradients(called, optimizer)
            tracker.peak = 0
            for last in (False, True):
                with gradient_sync(called, last):
                    one_pass(called, rows, shape)
            return tracker.peak


def one_pass(model: torch.nn.Module, rows: int, shape: StepShape) -> None:
    """Forward, loss at every second token, backward."""
    ids = torch.zeros(rows, shape.tokens // rows, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.precision.autocast):
        mask = {"full_attention": None}
        logits = model(input_ids=ids, position_ids=ids[:1], attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    index = torch.zeros(shape.tokens // 2, dtype=torch.int64)
    rollout_loss(logits, index, index, torch.zeros(8, dtype=torch.int64), torch.zeros(8)).backward()


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """A process group that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# What a compiled layer keeps


def measure_layer(shapes: dict[str, int], shape: StepShape) -> float:
    """Bytes a token that one compiled layer keeps for its backward under `shape.budget`, as torch's partitioner cuts it;
    without the rotary tables, which all layers share. `shape.tokens` real tokens are computed on the CPU."""
    config = Qwen2Config(**(shapes | {"num_hidden_layers": 1, "vocab_size": 64}), num_labels=3)
    dtype = torch.bfloat16 if shape.precision.half_residual else torch.float32
    model = Qwen2ForClassifier._from_config(config, dtype=dtype, attn_implementation=STAND_IN).train()
    torch._dynamo.reset()
    places = torch.arange(shape.tokens)[None]
    hidden = torch.randn(1, shape.tokens, config.hidden_size, dtype=dtype).requires_grad_()
    rotary = model.model.rotary_emb(hidden, places)
    shared = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *rotary)}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in shared:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        torch._functorch.config.patch(activation_memory_budget=1.0, joint_custom_pass=None),  # as they were, afterwards
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=shape.precision.autocast),
    ):
        compile_layers(model, shape.budget, "aot_eager_decomp_partition")
        layer = model.model.layers[0].forward
        out = layer(hidden, attention_mask=None, position_ids=places, position_embeddings=rotary, use_cache=False)
    del out
    return sum(kept.values()) / shape.tokens


# ---------------------------------------------------------------------------------------------------------------------
# The table

NARROW = dict(  # 1.5B / 8: as many bytes to each other, and quick
    hidden_size=192, intermediate_size=1120, num_hidden_layers=1, num_attention_heads=12, num_key_value_heads=2, vocab_size=64
)  # fmt: skip
LAYOUTS = {"none": 8, "pack": 1, "tree": 1}  # rows of a pass: what tree saves is tokens of the row
RANKS = 4


def cases(tokens: int, layouts: Sequence[str]) -> Iterator[tuple[str, int, StepShape]]:
    """(name, rows, shape)"""
    for layout in layouts:
        for name, precision in PRECISIONS.items():
            for checkpointing in (True, False):
                ranks = RANKS if precision.fsdp else 1
                shape = StepShape(tokens, precision, ranks, checkpointing, packed=layout != "none")
                kept = "checkpointing" if checkpointing else "all kept"
                yield f"{layout}, {name}, {kept}", LAYOUTS[layout], shape


def tell(name: str, measured: float, estimated: float, unit: str) -> bool:
    """A line; whether it is close."""
    off = estimated / measured - 1
    print(f"{name:55} measured {measured:8.2f}  estimated {estimated:8.2f} {unit}  {off:+.1%}", flush=True)
    return abs(off) <= CLOSE


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES, help="of the model")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=LAYOUTS, help="of the rows")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a pass")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    close = []
    for model in args.shapes:
        info = model_info(SHAPES[model])
        for name, rows, shape in cases(args.tokens, args.layouts):
            measured, estimated = measure_step(SHAPES[model], shape, rows), estimate_memory(info, shape).total
            close.append(tell(f"{model}, {name}", measured / 1e9, estimated / 1e9, "GB"))
    for half in (True, False):
        for budget in (1.0, 0.8, 0.6, 0.4, 0.1):
            shape = StepShape(4096, Precision(half, True), compiled=True, checkpointing=False, budget=budget)
            measured, estimated = measure_layer(NARROW, shape), compiled_layer(model_info(NARROW), shape)
            name = f"compiled layer, {'bf16' if half else 'fp32'} residual, budget {budget}"
            close.append(tell(name, measured / 1024, estimated / 1024, "KiB a token"))
    print(f"{sum(close)} of {len(close)} within {CLOSE:.0%}")
    return 0 if all(close) else 1


if __name__ == "__main__":
    run_script(main)
