"""Memory: what the line at a search's start promises against what is used, with each engine that is here."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from classifier_lib import ValueScorer
from common_lib.devices import memory_of, use_expandable_segments
from common_lib.models import ModelInfo, inspect_model
from engine_lib.base import EngineConfig
from engine_lib.choose import make_engine
from gpu_parts.models import NOT_ON_CPU, allocated_gb, free_memory, memory_given_back, peak_gb, value_model
from gpu_parts.needs import need
from gpu_parts.report import Report
from gpu_parts.scoring import CHECK, MANY, SPEED, cached
from gpu_parts.search import GPU_SHARE, save_generator
from search_lib.memory_plan import EngineMemory, auto_limit, plan_memory

before_cuda = use_expandable_segments  # as a search does


def run(report: Report) -> None:
    has_sglang = report.device == "cuda" and report.size == "full" and find_spec("sglang") is not None
    if not has_sglang:
        report.leave_out("beside SGLang", "it needs a GPU, sglang, and the full size")
    with tempfile.TemporaryDirectory() as name:
        save_generator(report.size, report.device, Path(name))
        info = inspect_model(Path(name), "--piref_model")
        for kind in ("sglang", "transformers") if has_sglang else ("transformers",):
            if report.has_time(need("memory", kind, report.size), kind):
                with memory_given_back(report, kind), report.going_on(kind):
                    promise_and_use(report, kind, info)


def promise_and_use(report: Report, kind: str, info: ModelInfo) -> None:
    """Start an engine, make the promise as inference_eval.py does, and score many trees while the engine waits."""
    device = report.device
    growth = replace((SPEED if device == "cuda" else CHECK)[report.size], trees=MANY)
    free_memory(device)
    before, _ = memory_of(device)
    engine = make_engine(kind, EngineConfig(info.path, info.vocab_size, device, samples=False, gpu_share=GPU_SHARE))
    try:
        engine_memory = EngineMemory(before, memory_of(device)[0], engine.describe())
        model = value_model(report.size, device, torch.bfloat16 if device == "cuda" else torch.float32)
        free_memory(device)
        free, total = memory_of(device)
        limit = auto_limit(device, free, total, shared=kind == "transformers")
        scorer = ValueScorer(model, limit)
        longest = growth.prompt + (growth.rounds - 1) * growth.block
        activations = scorer.budget.activation_bytes(scorer.max_batch_tokens, longest, growth.block)
        weights = model.num_parameters() * model.dtype.itemsize
        plan = plan_memory(device, free, total, engine_memory, info, weights, limit, activations)
        report.say(f"{kind}: {plan.line()}")
        allocated = allocated_gb(device)
        with lowest_free(device) as least:
            cached(scorer, growth)
        used = peak_gb(device)
        promised = (plan.parts["value_cache"] + plan.parts["activations"]) / 1e9
        table, case = "GB promised and used", f"beside {kind}"
        report.figure(table, "caches and activations, promised", promised, case=case)
        report.figure(table, "used", used and used - allocated, case=case, at_most=promised, why=NOT_ON_CPU)
        report.figure(table, "left, promised", plan.parts["left"] / 1e9, case=case)
        left = min(least) / 1e9 if least else None
        report.figure(table, "free at the least", left, case=case, at_least=plan.parts["left"] / 1e9, why=NOT_ON_CPU)
        share = 100 * scorer.usage.tokens_reread / growth.tokens_cached
        report.figure(table, "tokens read again, %", share, case=case)
    finally:
        asyncio.run(engine.close())


@contextlib.contextmanager
def lowest_free(device: str) -> Iterator[list[int]]:
    """Bytes that are free on a GPU, whoever takes the rest, looked at 50 times a second."""
    found: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            found.append(memory_of(device)[0])

    thread = threading.Thread(target=look)
    if device.startswith("cuda"):
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
