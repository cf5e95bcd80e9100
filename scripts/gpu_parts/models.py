"""Models of random weights, made on the device, and what is measured of a device."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from benchmark_search import SMALL
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier
from common_lib.devices import memory_of
from common_lib.models import ModelInfo
from gpu_parts.report import Report

TINY = SMALL | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=512)
FULL = SMALL | dict(  # of DeepSeek-R1-Distill-Qwen-1.5B and of the value model
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151_936,
)  # fmt: skip
SHAPES = {"tiny": TINY, "small": SMALL, "full": FULL}


def model_info(shapes: dict[str, Any]) -> ModelInfo:
    """What is known of a model of these shapes, as of a checkpoint's."""
    names = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return ModelInfo(
        path="a Qwen2", fingerprint="", head_dim=shapes["hidden_size"] // shapes["num_attention_heads"],
        max_position_embeddings=131_072, tie_word_embeddings=False, num_parameters=None, num_parameters_embedding=None,
        num_labels=None, has_lm_head=None, **{name: shapes[name] for name in names},
    )  # fmt: skip


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
    del exact
    free_memory(device)  # 6 GB at 1.5B, which torch would hold back from an engine that sizes its pool
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


@contextmanager
def memory_given_back(report: Report, what: str, patience_s: float = 20.0) -> Iterator[None]:
    """At the end wait until the GPU's memory is as free as before: processes that were ended let go of it a moment later,
    and the next engine sizes its pool by what is free. Around `going_on`: an error keeps what its frames hold."""
    device = report.device
    free_memory(device)
    before, total = memory_of(device)
    try:
        yield
    finally:
        gc.collect()
        free_memory(device)
        deadline = time.monotonic() + patience_s
        while device.startswith("cuda") and (lost := before - memory_of(device)[0]) > total // 50:
            if time.monotonic() > deadline:
                report.say(f"{what} was ended, but {lost / 1e9:.3g} GB of the GPU are not free again")
                break
            time.sleep(0.2)


NOT_ON_CPU = "has no meaning on a CPU"
