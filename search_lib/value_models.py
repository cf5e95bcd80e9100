"""From flags to a scorer: value models on devices of this process, or one that SGLang serves.

Who gets how much of a device's memory is said once all is loaded, and where it is too little for the searches at once.
"""

import argparse
import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from common_lib import devices
from common_lib.cli import UserError
from engine_lib.choose import make_value_engine
from engine_lib.value_base import ValueConfig, ValueEngine
from search_lib import memory_plan
from search_lib.memory_plan import EngineMemory
from search_lib.plan import SearchPlan
from search_lib.scorers import LoadedScorer, LocalScorers, ScorerThread
from search_lib.served_scorer import ServedScorer

logger = logging.getLogger(__name__)

MORE_POOL = {
    "sglang": "a GPU with more memory for it (--value_device, a lower --piref_gpu_util, --value_sglang_args "
              "mem_fraction_static=... or max_total_tokens=...)",
    "sglang-server": "more servers, or servers started with a higher --mem-fraction-static",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Plan: before anything is loaded


def resolve_value_devices(args: argparse.Namespace, device: str) -> tuple[str, ...]:
    """Where value models are to be; none where servers have them. device: the generator's, for `auto`. Raises UserError."""
    if args.value_engine == "sglang-server":
        return ()
    return tuple(
        device if name == "auto" else devices.resolve_device(name, "--value_device") for name in args.value_device
    )


def resolve_value_dtype(args: argparse.Namespace, device: str, value_devices: Sequence[str]) -> str:
    """bf16 or fp32: for `auto` the fastest. Raises UserError for devices that would differ in it."""
    fastest = {"bf16" if name.startswith("cuda") else "fp32" for name in value_devices or (device,)}
    if args.value_dtype == "auto" and len(fastest) > 1:
        raise UserError(
            f"--value_device {' '.join(args.value_device)}: --value_dtype auto is bf16 on a GPU and fp32 on a CPU, and all "
            "values of a run must be of one kind; give --value_dtype fp32 or bf16"
        )
    return fastest.pop() if args.value_dtype == "auto" else args.value_dtype


def attention_of_value_models(name: str, value_devices: Sequence[str], dtype: str) -> dict[str, str]:
    """By device. Decided and said before a model is loaded: an engine takes minutes to start."""
    return {device: _attention(name, device, dtype) for device in dict.fromkeys(value_devices)}


def _attention(name: str, device: str, dtype: str) -> str:
    if device == "cpu":  # without torch, whose import takes seconds
        chosen = "eager" if name == "eager" else "sdpa"
        logger.info("value model: attention: %s (on a CPU)", chosen)
        return chosen
    import torch

    from classifier_lib import resolve_attn_implementation

    return resolve_attn_implementation(
        name, torch.bfloat16 if dtype == "bf16" else torch.float32, device, "value model"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Load


def meet_servers(args: argparse.Namespace, plan: SearchPlan) -> ValueEngine | None:
    """Value servers, where there are any: before the generator, which takes minutes to start and not to be told of a wrong
    URL. Raises UserError for another model, EngineError where none answers."""
    if plan.value_engine != "sglang-server":
        return None
    return make_value_engine(plan.value_engine, value_config(args, plan))


def load_scorer(
    args: argparse.Namespace, plan: SearchPlan, engine: Mapping[str, EngineMemory], servers: ValueEngine | None = None
) -> LoadedScorer:
    """The value model, ready. engine: the generator's and its memory, by each of `plan.memory_devices`. servers: of
    `meet_servers`. Raises UserError where there is too little memory or a served model is another one, EngineError where
    SGLang does not start."""
    if plan.value_engine == "local":
        return load_local(args, plan, engine)
    return load_served(args, plan, engine, servers or make_value_engine(plan.value_engine, value_config(args, plan)))


def searches_at_once(args: argparse.Namespace, plan: SearchPlan) -> int:
    return min(args.batch_size, len(plan.own_prompts) * args.num_repetitions)


def load_local(args: argparse.Namespace, plan: SearchPlan, engine: Mapping[str, EngineMemory]) -> LocalScorers:
    """One a device, each with a bounded cache and in a thread of its own."""
    models = [(device, load_value_model(plan, device)) for device in plan.value_devices]
    threads = []
    for device in dict.fromkeys(plan.value_devices):
        there = [model for name, model in models if name == device]
        threads += load_threads(args, plan, device, there, engine[device])
    config = plan.config
    return LocalScorers(threads, config.num_beams * config.beam_width * config.block_size)


def load_value_model(plan: SearchPlan, device: str) -> Any:
    """Raises UserError where it does not fit."""
    import torch

    from classifier_lib import Qwen2ForClassifier

    try:
        return Qwen2ForClassifier.from_pretrained(
            plan.value_model.path,
            attn_implementation=plan.value_attention[device],
            torch_dtype=torch.bfloat16 if plan.value_dtype == "bf16" else torch.float32,
            use_cache=False,
        ).to(device)
    except torch.OutOfMemoryError as error:
        where = f"{device}, where {devices.memory_of(device)[0] / 1e9:.3g} GB are free"
        raise UserError(f"the value model does not fit on {where}; {memory_plan.LESS}") from error


def load_threads(
    args: argparse.Namespace, plan: SearchPlan, device: str, models: Sequence[Any], engine: EngineMemory
) -> list[ScorerThread]:
    """Of the models on one device, which share what it has for them; says what that is, and where it is little."""
    from classifier_lib import ValueScorer
    from classifier_lib.cache_budget import TokenBytes, default_batch_tokens

    free, total = devices.memory_of(device)
    if args.value_cache_gb == "auto":
        shared = plan.engine == "transformers" and not engine.elsewhere
        limit = memory_plan.auto_limit(device, free, total, shared)
    else:
        limit = int(args.value_cache_gb * 1e9)
    count, each = len(models), limit // len(models)
    memory_plan.check_limit(each, free, device, 2 * plan.longest_trace * plan.value_kv_bytes)
    batch_tokens = args.value_batch_tokens
    if batch_tokens == "auto":  # what one model would take: passes do not depend on how many there are
        token = TokenBytes.of_config(models[0].config, models[0].dtype.itemsize, models[0].device.type == "cpu")
        batch_tokens = default_batch_tokens(token, limit)
    scorers = [ValueScorer(model, each, batch_tokens) for model in models]
    block = plan.config.block_size
    activations = scorers[0].budget.activation_bytes(batch_tokens, plan.longest_trace - block, block)
    weights = models[0].num_parameters() * models[0].dtype.itemsize
    promise = memory_plan.plan_memory(
        device, free, total, engine, plan.generator, count * weights, limit, count * activations
    )
    logger.info(
        "value model: %s, %s on %s%s, up to %d new tokens a pass\n%s", plan.value_model.path, plan.value_dtype, device,
        f" ({count} of them)" if count > 1 else "", batch_tokens, promise.line(),
    )  # fmt: skip
    searches = searches_at_once(args, plan)
    share = math.ceil(searches / len(plan.value_devices))  # of each model
    tokens = memory_plan.working_set(plan.config, plan.longest_prompt, share)
    wanted = count * (tokens * plan.value_kv_bytes + activations)
    if warning := memory_plan.shortage(limit, free, device, wanted, count * share, searches):
        logger.warning(warning)
    return [ScorerThread(scorer, device) for scorer in scorers]


# ---------------------------------------------------------------------------------------------------------------------
# Served by SGLang


def load_served(
    args: argparse.Namespace, plan: SearchPlan, engine: Mapping[str, EngineMemory], value_engine: ValueEngine
) -> ServedScorer:
    """In this process it was started after the generator: it sizes its pool by what is free."""
    warn_of_no_effect(args)
    try:
        if plan.longest_trace > value_engine.context_length:
            raise UserError(
                f"the longest prompt and --max_length {args.max_length} make {plan.longest_trace} tokens, and --value_engine "
                f"{plan.value_engine} takes {value_engine.context_length}; give a smaller --max_length, or "
                f"{MORE_POOL[plan.value_engine]}"
            )
        say_served(args, plan, engine, value_engine)
    except BaseException:
        asyncio.run(value_engine.close())
        raise
    return ServedScorer(value_engine, value_config(args, plan))


def value_config(args: argparse.Namespace, plan: SearchPlan) -> ValueConfig:
    searches = searches_at_once(args, plan)
    return ValueConfig(
        model_path=plan.value_model.path,
        vocab_size=plan.value_model.vocab_size,
        num_labels=plan.value_model.num_labels or 3,
        device=(plan.value_devices or (plan.device,))[0],
        dtype=plan.value_dtype,
        request_timeout_s=args.request_timeout,
        groups_at_once=searches,
        requests_at_once=searches * plan.config.num_beams * plan.config.beam_width,
        sglang_args=tuple(args.value_sglang_args),
        urls=tuple(url.rstrip("/") for url in args.value_url),
    )


def warn_of_no_effect(args: argparse.Namespace) -> None:
    """Of flags that were given and are those of local value models."""
    instead = {"value_cache_gb": "SGLang's pool is bounded by --mem-fraction-static or --max-total-tokens",
               "value_batch_tokens": "SGLang has --chunked-prefill-size"}  # fmt: skip
    if args.value_engine == "sglang-server":
        instead["value_device"] = "servers have their own"
    for name, words in instead.items():
        given = getattr(args, name)
        if given not in ("auto", ["auto"]):
            shown = " ".join(given) if isinstance(given, list) else given
            logger.warning(
                "value model: --%s %s has no effect with --value_engine %s: %s", name, shown, args.value_engine, words
            )


def say_served(
    args: argparse.Namespace, plan: SearchPlan, engine: Mapping[str, EngineMemory], value_engine: ValueEngine
) -> None:
    """Where it is, who has how much memory, and where the pool is too small."""
    pool, searches = value_engine.pool_tokens, searches_at_once(args, plan)
    where = f"{plan.value_dtype} on {plan.value_devices[0]}" if plan.value_devices else "on its servers"
    lines = [f"value model: {plan.value_model.path}, {where}, by SGLang, which holds {pool:,} tokens"]
    for device, generator in engine.items():
        free, total = devices.memory_of(device)
        words = "" if plan.value_devices else "value model on its servers"
        value = EngineMemory(generator.free_after, free, value_engine.describe(), words)
        itemsize = 2 if plan.value_dtype == "bf16" else 4
        parts = device, free, total, generator, plan.generator, value, plan.value_model, itemsize
        lines.append(memory_plan.plan_served_memory(*parts).line())
    logger.info("\n".join(lines))
    wanted = memory_plan.served_working_set(plan.config, plan.longest_prompt, searches)
    if warning := memory_plan.pool_shortage(pool, wanted, searches, f"give it {MORE_POOL[plan.value_engine]}"):
        logger.warning(warning)
