"""The memory line of train_classifier.py against what fake tensors of the real step take, and what compiled layers keep.

    python scripts/training_memory.py            # three shapes, all packings, FSDP and DDP: minutes, no memory to speak of
    python scripts/training_memory.py --shape 0.5B --tokens 16384

Every operation's outputs are tracked by their storages through two micro batches of a step; attention is a stand-in that
keeps what a flash kernel keeps. A row is off by more than 15 %: exit status 1.
"""

import argparse
import contextlib
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config
from transformers.masking_utils import sdpa_mask

from classifier_lib import Qwen2ForClassifier
from common_lib.cli import run_script
from common_lib.models import ModelInfo
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


class Tracker(TorchDispatchMode):
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
        if any([self.add(tensor) for tensor in tree_leaves(out)]):
            self.peak = max(self.peak, self.now())
        return out


class KernelLike(torch.autograd.Function):
    """Keeps what a flash kernel keeps: queries, keys, values, output, and the softmax's sums."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        query.new_empty(query.shape, dtype=torch.float32)  # where it adds up the queries' gradient
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def kernel_like(module, query, key, value, attention_mask, **kwargs):
    out = KernelLike.apply(query.to(value.dtype), key.to(value.dtype), value)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("kernel_like", kernel_like)
AttentionMaskInterface.register("kernel_like", sdpa_mask)


def measure_step(shapes: dict[str, int], shape: StepShape, rows: int = 1) -> int:
    """Bytes at the peak of the second step of two passes over `rows` x `tokens / rows` tokens on the first of the ranks."""
    config = Qwen2Config(**shapes, num_labels=shape.num_labels)
    dtype = torch.bfloat16 if shape.precision.bf16_parameters else torch.float32
    with fake_ranks(shape.ranks):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model = Qwen2ForClassifier._from_config(config, dtype=dtype, attn_implementation="kernel_like").train()
        model.set_dropout(attention=0.0, head=0.05)
        if shape.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        world = World(0, shape.ranks if shape.precision.fsdp else 1, torch.device("cpu"))
        called = distribute(model, world, shape.precision)  # its mesh of ranks is real
        optimizer = make_optimizer(called, 1e-4, (0.9, 0.95), 0.1)
        with fake, Tracker() as tracker:
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
    from classifier_lib import rollout_loss

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


def model_info(shapes: dict[str, int]) -> ModelInfo:
    return ModelInfo(
        path="a Qwen2", fingerprint="", head_dim=shapes["hidden_size"] // shapes["num_attention_heads"],
        max_position_embeddings=131_072, tie_word_embeddings=False, num_parameters=None, num_parameters_embedding=None,
        num_labels=None, has_lm_head=None, **shapes,
    )  # fmt: skip
