"""Models of random weights, made on the device, and what is measured of a device."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark_search import SMALL
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier

TINY = SMALL | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=512)
FULL = SMALL | dict(  # of DeepSeek-R1-Distill-Qwen-1.5B and of the value model
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151_936,
)  # fmt: skip
SHAPES = {"tiny": TINY, "small": SMALL, "full": FULL}


def value_model(
    size: str, device: str, dtype: torch.dtype, attention: str = "sdpa", seed: int = 0
) -> Qwen2ForClassifier:
    """Random weights, the same in every dtype, to rounding: a GPU, and torch 2.11, draw other numbers in bfloat16. Values
    differ: at the usual initial scale a random head gives 1/3 for everything."""
    config = Qwen2Config(**SHAPES[size], num_labels=3)
    torch.manual_seed(seed)
    with torch.device(device):
        exact = Qwen2ForClassifier._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for linear in (exact.score[0], exact.score[2]):
            linear.weight.normal_(std=1 / math.sqrt(config.hidden_size))
        for layer in exact.model.layers:  # attention that prefers some tokens to others
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.normal_(std=1.5 / math.sqrt(config.hidden_size))
    if dtype == torch.float32:
        return exact.eval()
    with torch.device(device):
        model = Qwen2ForClassifier._from_config(config, dtype=dtype, attn_implementation=attention)
    model.load_state_dict(exact.state_dict())  # not `to`, which would round the rotary frequencies as well
    return model.eval()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until the device has done it, result)."""
    synchronize(device)
    begin = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - begin, result


def free_memory(device: str) -> None:
    """Give back what is cached, and count the peak from here on."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated_gb(device: str) -> float | None:
    return torch.cuda.memory_allocated() / 1e9 if device.startswith("cuda") else None


def peak_gb(device: str) -> float | None:
    """Largest memory of tensors since `free_memory`, in GB; None on a CPU, which does not count it."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else None


NOT_ON_CPU = "has no meaning on a CPU"
