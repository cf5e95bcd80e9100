"""Values: the local scorer, SGLang in this process and a server of it, on the same searches at once.

The figures are those of benchmark_values.py: seeded random blocks in the place of a generator, one run after a warm-up.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from benchmark_values import KINDS, ValueBench, Values, largest_difference, run_kind

from common_lib.devices import use_expandable_segments
from common_lib.models import inspect_model
from engine_lib.value_base import ValueConfig
from gpu_parts.models import memory_given_back, value_model
from gpu_parts.needs import need
from gpu_parts.report import Report
from search_lib.tree import SearchConfig

before_cuda = use_expandable_segments  # as a search does
TABLE = "values"
# Of each size the searches at once, and tokens of prompt and block; four beams of two candidates.
SIZES = {"tiny": (4, 8, 8), "small": (32, 64, 64), "full": (32, 500, 512)}
ROUNDS = {"tiny": 2, "small": 4, "full": 2}
CLOSE = {"bf16": 0.1, "fp32": 1e-5}  # values may be off by so much: on a GPU each kernel rounds in its own way


def run(report: Report) -> None:
    dtype = "bf16" if report.device == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        model = value_model(report.size, report.device, torch.float32 if dtype == "fp32" else torch.bfloat16)
        model.save_pretrained(folder)
        del model
        info, (searches, prompt, block) = inspect_model(Path(folder), "--value_model"), SIZES[report.size]
        shape = SearchConfig(4, 2, block, ROUNDS[report.size] * block)
        config = ValueConfig(info.path, info.vocab_size, info.num_labels, report.device, dtype)
        bench, local = ValueBench(config, shape, searches, prompt), {}
        report.say(f"{searches} searches at once, {bench.tokens:,} tokens, in {dtype}")
        for kind in kinds(report):
            if report.has_time(need("values", kind, report.size), kind):
                with memory_given_back(report, kind), report.going_on(kind):
                    local = one_kind(report, kind, bench, local)


def kinds(report: Report) -> list[str]:
    """Those that can be had; the others are told."""
    if report.size == "tiny" or find_spec("sglang") is None:
        why = "--tiny: its start takes half a minute" if report.size == "tiny" else "sglang is not installed"
        for name in KINDS[1:]:
            report.leave_out(f"values, {name}", why)
        return list(KINDS[:1])
    return list(KINDS)


def one_kind(report: Report, kind: str, bench: ValueBench, local: Values) -> Values:
    """Its figures; the local values, for the kinds after it."""
    told, values = run_kind(kind, bench)
    for name, value in told.items():
        at_most = 1.01 if name == "tokens computed a new one" else None
        report.figure(TABLE, name, value, case=kind, at_most=at_most)
    if kind == "local":
        return values
    if local:
        off = largest_difference(values, local)
        report.figure(TABLE, "off local values", off, case=kind, at_most=CLOSE[bench.values.dtype])
    return local
