"""Who gets how much of a device's memory in a search: sums of bytes, and what to say of them. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common_lib.cli import UserError
from common_lib.models import ModelInfo
from search_lib.tree import SearchConfig

GPU_RESERVE = 0.05  # of a card, left alone: SGLang's prefill of many prompts at once, kernels that load late, rounding
RAM_SHARE = 0.25  # of the free RAM, for the value model: the generator's caches and the page cache want some, too
LESS = "lower --piref_gpu_util (servers: --mem-fraction-static where they are started) or give another --value_device"


@dataclass(frozen=True)
class EngineMemory:
    """How an engine's start left the memory of the value model's device (bytes), what the engine says of itself
    (`Engine.describe()`), and where it runs, in words, if not on that device."""

    free_before: int
    free_after: int
    described: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: str = ""


def elsewhere(engine: str, device: str, value_device: str, described: Mapping[str, Any]) -> str:
    """`EngineMemory.elsewhere` of an engine by its name and device; SGLang's ranks take that GPU and the next ones."""
    if engine == "sglang-server":
        return "generator on its servers"
    first, last = _gpu(device), _gpu(device) + int(described.get("tp_size") or 1) * int(described.get("dp_size") or 1)
    if device[:3] == value_device[:3] and (device == "cpu" or first <= _gpu(value_device) < last):
        return ""
    return f"generator on {device}"


def _gpu(device: str) -> int:
    return int(device.partition(":")[2] or 0)


@dataclass(frozen=True)
class MemoryPlan:
    """What each part takes of a device, in bytes by name. Caches, activations and what is left are a promise: a pass's
    working copy counts as cache, and what is left includes the reserve. The parts add up to `total`."""

    device: str
    total: int
    parts: dict[str, int]
    elsewhere: str = ""  # where the generator is, if not here
    value_elsewhere: str = ""

    def line(self) -> str:
        """The statement at the start, in GB."""
        groups = (
            ("generator_weights", "kv_pool", "graphs"),
            ("value_weights", "value_cache", "activations", "value_kv_pool", "value_graphs"),
            ("other", "left"),
        )
        words = [
            ", ".join(f"{name.replace('_', ' ')} {self.parts[name] / 1e9:.3g}" for name in group if name in self.parts)
            for group in groups
        ]
        for i, where in enumerate((self.elsewhere, self.value_elsewhere)):
            words[i] = ", ".join(filter(None, (words[i], where)))
        return f"memory of {self.device}, {self.total / 1e9:.3g} GB: {'; '.join(words)}"


def auto_limit(device: str, free: int, total: int, shared: bool = False) -> int:
    """Bytes that the value model's caches and activations may take together, of what is free once engine and weights are
    loaded. shared: the transformers engine, whose caches come and go, generates on the same GPU and gets half."""
    if not device.startswith("cuda"):
        return int(RAM_SHARE * free)
    most = max(0, free - int(GPU_RESERVE * total))
    return most // 2 if shared else most


def plan_memory(
    device: str, free: int, total: int, engine: EngineMemory, generator: ModelInfo, value_weights: int, limit: int,
    activations: int,
) -> MemoryPlan:  # fmt: skip
    """The promise. free, total: now, with engine and value model loaded. limit: of caches and activations together.

    Of the generator the weights and the pool are sums; `graphs` is what else the start of its engine took (decode graphs,
    and what its processes need of the driver).
    """
    parts = engine_parts(device, engine, generator, 2 if device.startswith("cuda") else 4)
    parts["value_weights"] = value_weights
    parts["value_cache"], parts["activations"] = max(0, limit - activations), min(limit, activations)
    return _with_rest(MemoryPlan(device, total, parts, engine.elsewhere), free - limit)


def plan_served_memory(
    device: str, free: int, total: int, engine: EngineMemory, generator: ModelInfo, value: EngineMemory,
    value_model: ModelInfo, value_itemsize: int,
) -> MemoryPlan:  # fmt: skip
    """The same where SGLang has the value model: its weights and pool, and in `value_graphs` what else its start took."""
    parts = engine_parts(device, engine, generator, 2 if device.startswith("cuda") else 4)
    parts |= engine_parts(
        device, value, value_model, value_itemsize, ("value_weights", "value_kv_pool", "value_graphs")
    )
    return _with_rest(MemoryPlan(device, total, parts, engine.elsewhere, value.elsewhere), free)


def engine_parts(
    device: str, engine: EngineMemory, model: ModelInfo, itemsize: int,
    names: tuple[str, str, str] = ("generator_weights", "kv_pool", "graphs"),
) -> dict[str, int]:  # fmt: skip
    """Of an engine that runs on this device: weights and pool as sums, and on a GPU what else its start took."""
    if engine.elsewhere:
        return {}
    ranks = int(engine.described.get("tp_size") or 1)
    parts = {names[0]: (model.num_parameters or 0) * itemsize // ranks}
    if pool := engine.described.get("kv_pool_tokens"):
        parts[names[1]] = int(pool) * model.kv_bytes(itemsize) // min(ranks, model.num_key_value_heads)
    if device.startswith("cuda"):
        parts[names[2]] = max(0, engine.free_before - engine.free_after - sum(parts.values()))
    return parts


def _with_rest(plan: MemoryPlan, left: int) -> MemoryPlan:
    plan.parts["left"] = max(0, left)
    plan.parts["other"] = max(0, plan.total - sum(plan.parts.values()))
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# Is it enough?


def half_way(config: SearchConfig) -> int:
    """Length of a beam half-way through the rounds, in tokens."""
    return config.block_size * (math.ceil(config.max_length / config.block_size) - 1) // 2


def working_set(config: SearchConfig, prompt: int, searches: int) -> int:
    """Tokens whose keys and values so many searches want at once, on average: each its prompt and its beams as they are
    half-way through the rounds, and one of them, which is being scored, its candidates and a working copy of each."""
    length, candidates = half_way(config), config.num_beams * config.beam_width
    return searches * (prompt + config.num_beams * length) + candidates * (prompt + length + 2 * config.block_size)


def check_limit(limit: int, free: int, device: str, least: int) -> None:
    """Raises UserError where the caches cannot even hold one trace and its working copy (`least` bytes)."""
    if limit < least:
        raise UserError(
            f"with the engine and the value model loaded {free / 1e9:.3g} GB are free on {device}, of which its caches may "
            f"take {limit / 1e9:.3g}, but one trace and a working copy need {least / 1e9:.3g}; {LESS}"
        )


def shortage(limit: int, free: int, device: str, wanted: int, searches: int, at_once: int = 0) -> str:
    """What to say, in one line, where the caches (`limit` bytes) are smaller than what the searches on this device want at
    once; '' where they are not. at_once: searches on all devices together, where there are several."""
    if limit > free:
        return f"--value_cache_gb {limit / 1e9:.3g} is more than the {free / 1e9:.3g} GB that are free on {device}"
    if limit >= wanted:
        return ""
    at_once = at_once or searches
    fewer = int(at_once * limit / wanted)
    options = [f"give --batch_size {fewer}"] if 0 < fewer < at_once else []
    options.append("give a larger --value_cache_gb" if 2 * limit <= free else LESS)
    return (
        f"the value model's caches of {limit / 1e9:.3g} GB are {limit / wanted:.0%} of the {wanted / 1e9:.3g} GB that "
        f"{searches} searches want at once, so tokens will be read again ({free / 1e9:.3g} GB are free on {device}); "
        f"{', or '.join(options)}"
    )


def served_working_set(config: SearchConfig, prompt: int, searches: int) -> int:
    """Tokens that a value model which SGLang serves should hold, at most: of each search the prompt, its beams as the last
    round finds them, and that round's candidates, as nobody tells SGLang which go on. The longest and not half of it:
    searches that start together grow together, and a pool that is too small for their end gives up beams they still need."""
    candidates = config.num_beams * config.beam_width * config.block_size
    return searches * (prompt + config.num_beams * (config.max_length - config.block_size) + candidates)


def pool_shortage(pool: int, wanted: int, searches: int, remedy: str) -> str:
    """What to say, in one line, where SGLang's pool (tokens) is smaller than what the searches want at once; '' where it is
    not. remedy: how to give it more."""
    if pool >= wanted:
        return ""
    fewer = int(searches * pool / wanted)
    options = [f"give --batch_size {fewer}"] if 0 < fewer < searches else []
    return (
        f"the value engine's cache holds {pool:,} tokens, and {searches} searches want {wanted:,} at once, so tokens will be "
        f"computed again; {', or '.join([*options, remedy])}"
    )
