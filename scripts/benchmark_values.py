"""What values cost: the local scorer, SGLang in this process, and a server of it, side by side in one run.

    python scripts/benchmark_values.py                     # on a CPU: a small model of random weights
    python scripts/benchmark_values.py --device cuda --value_model MODEL --block_size 2048 --prompt 500

Searches run at once, and no generator does: blocks are drawn by the requests' seeds, so that all three get the same ones.
CPU seconds are those of this process and of all that it has started. Values are compared with the local ones where the
same traces were scored; close ones may be ranked otherwise, and the searches then part.
"""

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from gpu_parts.models import value_model
from gpu_parts.servers import server

from classifier_lib import Qwen2ForClassifier, ValueScorer
from common_lib.cli import ArgumentParser, UserError, check_rules, quiet_transformers, run_script, set_up_logging
from common_lib.concurrency import run_bounded
from common_lib.devices import memory_of
from common_lib.models import inspect_model
from engine_lib.base import Reply
from engine_lib.choose import make_value_engine
from engine_lib.value_base import ValueConfig
from search_lib.memory_plan import auto_limit
from search_lib.scorers import LoadedScorer, LocalScorers, ScorerThread
from search_lib.search import search
from search_lib.served_scorer import ServedScorer
from search_lib.tree import SearchConfig, SearchTask

KINDS = ("local", "sglang", "sglang-server")
Values = dict[tuple[int, ...], float]  # by trace


@dataclass(frozen=True)
class ValueBench:
    """So many searches at once, of prompts of so many tokens, with the value model of `values`."""

    values: ValueConfig
    shape: SearchConfig
    searches: int
    prompt: int
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of all prompts and blocks: what is computed where each is read once."""
        rounds = self.shape.max_length // self.shape.block_size
        blocks = rounds * self.shape.num_beams * self.shape.beam_width * self.shape.block_size
        return self.searches * (self.prompt + blocks)

    def draw(self, key: object, count: int) -> list[int]:
        return random.Random(repr((self.seed, key))).choices(range(self.values.vocab_size), k=count)

    async def generate(self, prompt_ids, n, limit, seeds, tree_id) -> list[Reply]:
        return [Reply(self.draw(seed, limit), "length", len(prompt_ids)) for seed in seeds[:n]]


@contextlib.contextmanager
def scorer_of(kind: str, bench: ValueBench) -> Iterator[LoadedScorer]:
    """Started; whoever searches with it closes it, on the event loop. A server ends here."""
    config, on_cpu = bench.values, bench.values.device == "cpu"
    if kind == "local":
        dtype = torch.float32 if config.dtype == "fp32" else torch.bfloat16
        model = Qwen2ForClassifier.from_pretrained(config.model_path, dtype=dtype, attn_implementation="auto")
        model = model.to(config.device)
        limit = auto_limit(config.device, *memory_of(config.device))
        yield LocalScorers([ScorerThread(ValueScorer(model, limit), config.device)])
        return
    pool = 2 * bench.tokens if on_cpu else 0  # a GPU's is what it has; on a CPU SGLang would take a third of the RAM
    with contextlib.ExitStack() as at_end:
        if kind == "sglang":
            config = replace(config, sglang_args=(f"max_total_tokens={pool}",) if pool else ())
        else:
            program = [
                "-m",
                "engine_lib.value_server",
                "--classifier_ckpt_path",
                config.model_path,
                "--log-level",
                "error",
            ]
            more = ["--device", "cpu", "--max-total-tokens", str(pool)] if on_cpu else []
            config = replace(config, urls=(at_end.enter_context(server([*program, *more])),))
        yield ServedScorer(make_value_engine(kind, config), config)


async def measure(scorer: LoadedScorer, bench: ValueBench) -> tuple[dict[str, float], Values]:
    """What the searches cost, and their values."""
    tasks = [SearchTask(i, bench.seed, tuple(bench.draw(("prompt", i), bench.prompt))) for i in range(bench.searches)]
    trees, computed, values = [], 0, {}

    async def one(task: SearchTask) -> None:
        trees.append(await search(task, bench.generate, scorer, bench.shape))

    cpu, begin = cpu_seconds(), time.perf_counter()
    await run_bounded(tasks, one, len(tasks))
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    for result in trees:
        computed += result.total("tokens_scored")
        tree = result.tree
        values |= {tuple(tree.prompt_ids + tree.response(i)): tree.value[i] for i in range(1, len(tree.value))}
    scores = sum(len(result.tree.value) - 1 for result in trees)
    return {
        "seconds": seconds, "scores/s": scores / seconds, "tokens/s": bench.tokens / seconds, "CPU seconds": cpu,
        "tokens computed": computed, "tokens computed a new one": computed / bench.tokens,
    }, values  # fmt: skip


def run_kind(kind: str, bench: ValueBench) -> tuple[dict[str, float], Values]:
    """Start it, warm it up with other prompts, measure it, and end it."""

    async def measured(scorer: LoadedScorer) -> tuple[dict[str, float], Values]:
        try:
            await measure(scorer, replace(bench, searches=min(2, bench.searches), seed=bench.seed + 1))
            return await measure(scorer, bench)
        finally:
            await scorer.close()

    with scorer_of(kind, bench) as scorer:
        return asyncio.run(measured(scorer))


def largest_difference(values: Values, local: Values) -> float:
    """nan where they have no trace in common."""
    return max((abs(values[trace] - local[trace]) for trace in values.keys() & local.keys()), default=float("nan"))


def cpu_seconds() -> float:
    """User and system time of this process and of all that descend from it, those included that ended and were waited for."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid], times[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    family, found = {os.getpid()}, -1
    while found != len(family):
        found = len(family)
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(times[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def table(results: dict[str, tuple[dict[str, float], Values]]) -> str:
    """Markdown."""
    names = list(next(iter(results.values()))[0])
    lines = [f"| values | {' | '.join(names)} | off local by |", "|---" + "|---:" * (len(names) + 1) + "|"]
    for kind, (told, values) in results.items():
        cells = [f"{told[name]:,.0f}" if told[name] >= 1000 else f"{told[name]:.3g}" for name in names]
        off = f"{largest_difference(values, results['local'][1]):.1g}" if kind != "local" else "-"
        lines.append(f"| {kind} | {' | '.join(cells)} | {off} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    counts = {"searches": 32, "rounds": 4, "block_size": 64, "prompt": 64, "num_beams": 4, "beam_width": 2}
    meanings = (
        "at once",
        "blocks of a trace",
        "tokens of a block",
        "tokens of a prompt",
        "of a search",
        "candidates of a beam",
    )
    for (name, default), meaning in zip(counts.items(), meanings, strict=True):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--value_model", help="a folder (default: a small model of random weights)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of value engines; local always is"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    check_rules(args, [(name, getattr(args, name) >= 1, "must be at least 1") for name in counts])
    args.kinds = list(dict.fromkeys(["local", *args.kinds]))
    if args.kinds != ["local"] and find_spec("sglang") is None:
        raise UserError("--kinds sglang and sglang-server need sglang, which is not installed here; give --kinds local")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    set_up_logging()
    quiet_transformers()
    on_gpu = args.device.startswith("cuda")
    # One, also in SGLang's processes: threads that wait for each other on a busy machine would count as work.
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.value_model or name)
        if args.value_model is None:
            value_model("small", args.device, torch.bfloat16 if on_gpu else torch.float32).save_pretrained(folder)
        info = inspect_model(folder, "--value_model")
        dtype = "bf16" if on_gpu else "fp32"
        values = ValueConfig(info.path, info.vocab_size, info.num_labels or 3, args.device, dtype)
        shape = SearchConfig(args.num_beams, args.beam_width, args.block_size, args.rounds * args.block_size)
        bench = ValueBench(values, shape, args.searches, args.prompt)
        results = {kind: run_kind(kind, bench) for kind in args.kinds}
    where = (
        args.device
        if on_gpu
        else f"on a CPU of {os.cpu_count()} cores, {threads} thread(s): ratios do not hold for a GPU"
    )
    print(f"{args.searches} searches at once of {args.num_beams} x {args.beam_width} candidates, {args.rounds} blocks of "
          f"{args.block_size} tokens, prompts of {args.prompt}: {bench.tokens:,} tokens; {dtype}, {where}\n")  # fmt: skip
    print(table(results))
    return 0


if __name__ == "__main__":
    run_script(main)
