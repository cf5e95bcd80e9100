"""Search: this project's order of work against the lock-step order of the released code, on each engine that is here.

The figures are those of benchmark_search.py: both orders get as many prompts of random tokens and generate as many
tokens, one run of each after a warm-up. "overlap" is the time in which engine and value model both work.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from benchmark_search import Bench, lock_step, measure, this_search
from transformers import Qwen2Config, Qwen2ForCausalLM

from common_lib.devices import use_expandable_segments
from engine_lib.base import Engine, EngineConfig
from engine_lib.choose import make_engine
from gpu_parts.drawing import drawing
from gpu_parts.models import SHAPES, memory_given_back, value_model
from gpu_parts.needs import need
from gpu_parts.report import Report
from gpu_parts.servers import server
from search_lib.tree import SearchConfig

before_cuda = use_expandable_segments  # as a search does
TABLE = "searches"
FULL_SEARCHES, BLOCKS, PROMPT, ROUNDS = 32, (256, 512, 1024), 500, 2
NUM_BEAMS, BEAM_WIDTH = 4, 2
GPU_SHARE = 0.5  # of the memory, for SGLang: the value model needs the rest
SERVER_FLAGS = ("--skip-tokenizer-init", "--log-level", "error")
CPU_FLAGS = ("--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
             "--disable-overlap-schedule", "--max-total-tokens", "65536")  # fmt: skip


def run(report: Report) -> None:
    if report.device == "cpu":  # half of the cores for each model, also in SGLang's processes
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = ("tiny", "full") if report.size == "full" else ("tiny",)
        for size in sizes:
            save_generator(size, report.device, folder / size)
        tiny = Sizes("tiny", 2, (16,), 8)
        with report.going_on("transformers, tiny"):
            compare(report, "transformers", tiny, folder)
        with report.going_on("drawing"):
            drawing(report)
        real = Sizes("full", FULL_SEARCHES, BLOCKS, PROMPT) if report.size == "full" else Sizes("tiny", 16, (64,), 64)
        sglang = find_spec("sglang") is not None and report.size != "tiny"
        if not sglang:
            why = "--tiny: its start takes half a minute" if report.size == "tiny" else "sglang is not installed"
            for name in ("sgl.Engine", "SGLang server"):
                report.leave_out(f"search through {name}", why)
        kinds = ["sglang", "sglang-server"] * sglang + ["transformers"] * (report.size == "full")
        seconds = [needed(report, kind) for kind in kinds]
        for i, kind in enumerate(kinds):
            if report.has_time(seconds[i], f"search through {kind}"):
                with memory_given_back(report, kind), report.going_on(kind):
                    compare(report, kind, real, folder, keep=sum(seconds[i + 1 :]))


def needed(report: Report, kind: str) -> float:
    """Seconds until an engine of this kind has its first figures; on a CPU, most of them for SGLang's start."""
    if report.size != "full":
        return 60.0
    return need("search", kind, report.size) + need("search", f"{kind}, first block", report.size)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is searched: models of which size, how often at once, in blocks of which lengths."""

    model: str
    searches: int
    blocks: tuple[int, ...]
    prompt: int


def save_generator(size: str, device: str, folder: Path) -> None:
    """Random weights, in bfloat16 on a GPU: engines load folders."""
    torch.manual_seed(1)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**SHAPES[size]), dtype=dtype)
    model.save_pretrained(folder)


def compare(report: Report, kind: str, sizes: Sizes, folder: Path, keep: float = 0.0) -> None:
    """Both orders on one engine, at each length of blocks that there is time for. keep: seconds for the next engines."""
    generator, vocab = str(folder / sizes.model), SHAPES[sizes.model]["vocab_size"]
    model = value_model(sizes.model, report.device, torch.bfloat16 if report.device == "cuda" else torch.float32)
    config = EngineConfig(generator, vocab, report.device, samples=False, gpu_share=GPU_SHARE)
    if kind == "sglang" and report.device == "cpu":
        config = dataclasses.replace(config, sglang_args=("max_total_tokens=65536",))
    with contextlib.ExitStack() as at_end:
        if kind == "sglang-server":
            url = at_end.enter_context(server(server_program(report, generator)))
            config = dataclasses.replace(config, sglang_urls=(url,))
        engine = make_engine(kind, config)
        bench = Bench(engine, model, SearchConfig(1, 1, 1, 1), [])
        asyncio.run(measure_blocks(report, kind, sizes, bench, vocab, keep))


async def measure_blocks(report: Report, kind: str, sizes: Sizes, bench: Bench, vocab: int, keep: float) -> None:
    rng = random.Random(0)

    def fresh(searches: int, block: int) -> Bench:
        prompts = [tuple(rng.randrange(1, vocab) for _ in range(sizes.prompt)) for _ in range(searches)]
        return Bench(bench.engine, bench.model, SearchConfig(NUM_BEAMS, BEAM_WIDTH, block, ROUNDS * block), prompts)

    engine: Engine = bench.engine
    try:
        for order in (lock_step, this_search):
            await measure(order, fresh(1, min(sizes.blocks[0], 16)))  # warm-up
        first = need("search", f"{kind}, first block", report.size) if sizes.model == "full" else 0.0
        a_token = 0.0  # seconds of both orders, by token of a block
        for block in sizes.blocks:
            name = f"{kind}, {sizes.model} model, {sizes.searches} searches, blocks of {block}"
            # Without a first block the engine was started for nothing; a longer one must not take the next engines' time.
            if not report.has_time(block * a_token or first, name, keep=keep if a_token else 0.0):
                break
            begin = time.monotonic()
            orders = [await measure(order, fresh(sizes.searches, block)) for order in (lock_step, this_search)]
            a_token = (time.monotonic() - begin) / block
            figures(report, name, *orders)
    finally:
        await engine.close()


def figures(report: Report, case: str, lock_step: dict[str, float], this: dict[str, float]) -> None:
    for name, told in ((f"{case}: this search", this), (f"{case}: lock-step", lock_step)):
        report.figure(TABLE, "wall-clock", told["wall-clock, s"], "s", case=name)
        report.figure(TABLE, "tokens generated/s", told["tokens generated"] / told["wall-clock, s"], case=name)
        report.figure(TABLE, "overlap", 100 * told["both at once, s"] / told["wall-clock, s"], "%", case=name)
        report.figure(TABLE, "engine idle", told["engine idle, %"], "%", case=name)
        report.figure(TABLE, "prompts from the cache", told["prompt tokens from the cache, %"], "%", case=name)
        report.figure(TABLE, "tokens scored a token generated", told["tokens scored a token generated"], case=name)
    name, same = f"{case}: this search", this["tokens generated"] / lock_step["tokens generated"]
    report.figure(TABLE, "wall-clock / lock-step", this["wall-clock, s"] / lock_step["wall-clock, s"], "x", case=name)
    report.figure(TABLE, "tokens / lock-step", same, "x", case=name, at_most=1.0, at_least=1.0)


def server_program(report: Report, generator: str) -> list[str]:
    flags = CPU_FLAGS if report.device == "cpu" else ("--mem-fraction-static", str(GPU_SHARE))
    return ["-m", "sglang.launch_server", "--model-path", generator, *SERVER_FLAGS, *flags]
