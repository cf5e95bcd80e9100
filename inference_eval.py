"""Search every problem of a benchmark with a generator and a value model, grade, write, and say how well it went.

    # the released command, on a GPU
    python inference_eval.py --benchmark aime-24 --piref_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
        --classifier_ckpt_path VGS-AI/DeepSeek-VM-1.5B --search_type beam2 --num_blocks 8 --output_path inference_outputs.jsonl
    # against running SGLang servers
    python inference_eval.py --engine sglang-server --sglang_url http://node1:30000 --sglang_url http://node2:30000
    # on a CPU, with small models of your own
    python inference_eval.py --benchmark problems.jsonl --piref_model GENERATOR --classifier_ckpt_path VALUE_MODEL \
        --max_length 256 --block_size 64 --engine transformers

Killed at any moment, the same command goes on where it stopped. `report.py` makes tables, plots and pages of the output.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from stats_utils import format_table, summarize
from tracking_utils import make_tracker

from cli_utils import ArgumentParser, UserError, enable_fast_transfers, run_script, set_up_logging
from data_utils import (
    PROMPT_FORMATS,
    BlockTexts,
    Problem,
    benchmark_name,
    check_prompt_format,
    format_prompt,
    load_benchmark,
)
from device_utils import free_memory, hardware_name, limit_cpu_threads, resolve_device
from engine_utils import Engine, EngineError, Request, choose_engine, make_engine
from eval_utils import Grader, extract_answer
from model_utils import (
    ModelInfo,
    check_generator,
    check_positions,
    check_token_ids,
    check_value_model,
    inspect_model,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)
from output_utils import FORMAT, OutputError, RunFiles, check_output_path
from progress_utils import Progress, format_count, format_seconds
from search_utils import (
    SELECTIONS,
    Round,
    ScorerThread,
    SearchConfig,
    SearchError,
    SearchResult,
    SearchTask,
    Tree,
    parse_search_type,
    run_searches,
    search,
)

logger = logging.getLogger("inference_eval")

ENGINES = ("auto", "sglang", "sglang-server", "transformers")
TRACKERS = ("neptune", "trackio", "none")

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    flag = parser.add_argument_group("what is searched").add_argument
    flag("--benchmark", default="aime-24", help="aime-24, aime-25, hmmt-feb-24, hmmt-feb-25, or a .jsonl/.json/.parquet file "
         "or dataset folder with problem and answer (default: %(default)s)")  # fmt: skip
    flag("--max_problems", type=int, help="only the first that many problems (default: all)")
    flag(
        "--output_path",
        default="inference_outputs.jsonl",
        help="results; beside it .meta.json and .tree.jsonl (default: %(default)s)",
    )
    flag(
        "--num_repetitions",
        type=int,
        default=1,
        help="independent searches of each problem, any number; may grow later (default: %(default)s)",
    )
    flag(
        "--seed",
        type=int,
        default=1337,
        help="decides every sampled token, as far as the engine is deterministic (default: %(default)s)",
    )

    flag = parser.add_argument_group("search").add_argument
    flag(
        "--search_type",
        default="beam2",
        help="beamB: num_blocks/B beams of B candidates; bfs: one beam; bon: independent samples (default: %(default)s)",
    )
    flag(
        "--num_blocks",
        type=int,
        default=8,
        help="candidates a round; the budget N of one search (default: %(default)s)",
    )
    flag("--block_size", type=int, default=4096, help="tokens of a block at most (default: %(default)s)")
    flag("--max_length", type=int, default=16384, help="response tokens of a trace at most (default: %(default)s)")
    flag(
        "--selection",
        choices=SELECTIONS,
        default="value",
        help="random: a seeded draw instead of the best values, the paper's ablation (default: %(default)s)",
    )
    flag("--temperature", type=float, default=0.6, help="0 is greedy (default: %(default)s)")
    flag("--top_p", type=float, default=0.95, help="mass of the nucleus that is sampled from (default: %(default)s)")
    flag("--prompt_format", choices=PROMPT_FORMATS, default="r1", help="r1: the released models' own; chat: the generator's chat template with the "
         "instruction; bare: that template with the problem alone (default: %(default)s)")  # fmt: skip
    flag(
        "--batch_size",
        type=int,
        default=32,
        help="searches at once, over all problems and repetitions (default: %(default)s)",
    )

    flag = parser.add_argument_group("generator").add_argument
    flag(
        "--piref_model",
        default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        help="folder or hub name (default: %(default)s)",
    )
    flag(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="auto: sglang where installed, else transformers (default: %(default)s)",
    )
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    flag(
        "--attention_impl",
        default="flash_attention_2",
        help="of the value model and the transformers engine; auto takes the fastest installed (default: %(default)s)",
    )
    flag(
        "--piref_gpu_util",
        type=float,
        default=0.5,
        help="SGLang's mem_fraction_static: GPU memory for the generator (default: %(default)s)",
    )
    flag("--use_sglang_server", action="store_true", help="the same as --engine sglang-server at localhost:SGLANG_PORT")
    flag("--sglang_port", type=int, default=30000, help="(default: %(default)s)")
    flag("--sglang_url", action="append", default=[], metavar="URL", help="a server or router; repeat for several")
    flag(
        "--sglang_args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="passed to the SGLang engine: tp_size=2 dp_size=4 context_length=32768 ...",
    )
    flag(
        "--deterministic", action="store_true", help="SGLang's deterministic inference; without it SGLang ignores seeds"
    )
    flag(
        "--request_timeout",
        type=float,
        default=3600.0,
        help="seconds for one block of one request (default: %(default)s)",
    )

    flag = parser.add_argument_group("value model").add_argument
    flag("--classifier_ckpt_path", default="VGS-AI/DeepSeek-VM-1.5B", help="folder or hub name (default: %(default)s)")
    flag("--value_device", default="auto", help="auto: the same as --device")
    flag("--value_dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    flag(
        "--value_cache_gb",
        default="auto",
        help="bound on its caches, in GB (auto: 60%% of the GPU memory left, 25%% of the free RAM)",
    )

    flag = parser.add_argument_group("tracking").add_argument
    flag(
        "--neptune_project",
        nargs="?",
        const="",
        help="log to neptune; without a value NEPTUNE_PROJECT says which project",
    )
    flag("--tracker", choices=TRACKERS, help="default: neptune if --neptune_project is given, else none")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments, checked as far as they can be without reading a file. Raises UserError."""
    args = build_parser().parse_args(argv)
    rules = (
        ("seed", args.seed >= 0, "must be 0 or more"),
        ("num_repetitions", args.num_repetitions >= 1, "must be at least 1"),
        ("batch_size", args.batch_size >= 1, "must be at least 1"),
        ("max_problems", args.max_problems is None or args.max_problems >= 1, "must be at least 1"),
        ("temperature", 0 <= args.temperature <= 100, "must be from 0 (greedy) to 100"),
        ("top_p", 0 < args.top_p <= 1, "must be above 0 and at most 1"),
        ("piref_gpu_util", 0 < args.piref_gpu_util < 1, "is a share of the GPU's memory: above 0 and below 1"),
        ("sglang_port", 1 <= args.sglang_port <= 65535, "must be from 1 to 65535"),
        ("request_timeout", args.request_timeout > 0, "must be above 0"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"--{name} {getattr(args, name)} {rule}")
    parse_search_type(args.search_type, args.num_blocks, args.block_size, args.max_length)
    if args.value_cache_gb != "auto":
        try:
            args.value_cache_gb = float(args.value_cache_gb)
        except ValueError:
            raise UserError(f"--value_cache_gb {args.value_cache_gb!r} must be auto or a number of GB") from None
        if not 0 < args.value_cache_gb < float("inf"):
            raise UserError(f"--value_cache_gb {args.value_cache_gb} must be above 0")
    if args.use_sglang_server:
        if args.engine not in ("auto", "sglang-server"):
            raise UserError(f"--use_sglang_server and --engine {args.engine} contradict each other; give one of them")
        args.engine = "sglang-server"
    if args.sglang_url and args.engine not in ("auto", "sglang-server"):
        raise UserError(f"--sglang_url needs --engine sglang-server, not {args.engine}")
    if args.sglang_url:
        args.engine = "sglang-server"
    if args.engine == "sglang-server" and not args.sglang_url:
        args.sglang_url = [f"http://localhost:{args.sglang_port}"]
    args.tracker = args.tracker or ("none" if args.neptune_project is None else "neptune")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Everything that can be checked before a model is loaded


@dataclass
class Plan:
    """What is to be searched, and with what."""

    problems: list[Problem]
    prompts: list[list[int]]
    generator: ModelInfo
    value_model: ModelInfo
    tokenizer: Any
    stop_ids: tuple[int, ...]
    config: SearchConfig
    engine: str
    device: str
    value_device: str
    value_dtype: str


def make_plan(args: argparse.Namespace) -> Plan:
    """Read the benchmark, configs and tokenizers, and check that all fits. Raises UserError."""
    engine = choose_engine(args.engine)
    device = resolve_device(args.device, "--device")
    value_device = device if args.value_device == "auto" else resolve_device(args.value_device, "--value_device")
    problems = load_benchmark(args.benchmark, args.max_problems)
    generator_path = resolve_model(args.piref_model, "--piref_model")
    value_path = resolve_model(args.classifier_ckpt_path, "--classifier_ckpt_path")
    generator = inspect_model(generator_path, "--piref_model")
    value_model = inspect_model(value_path, "--classifier_ckpt_path")
    check_generator(generator)
    check_value_model(value_model)
    tokenizer = load_tokenizer(generator_path, "--piref_model")
    check_prompt_format(args.prompt_format, tokenizer)
    prompts = [format_prompt(p.problem, args.prompt_format, tokenizer) for p in problems]
    stop_ids = stop_token_ids(generator_path, tokenizer)
    check_token_ids(generator, value_model, tokenizer, max(*stop_ids, *map(max, prompts)))
    longest_prompt = max(map(len, prompts))
    check_positions(generator, value_model, longest_prompt, args.max_length)
    width, branch, block_size = parse_search_type(args.search_type, args.num_blocks, args.block_size, args.max_length)
    value_dtype = args.value_dtype
    if value_dtype == "auto":
        value_dtype = "bf16" if value_device.startswith("cuda") else "fp32"
    check_value_cache(args.value_cache_gb, value_model, value_dtype, longest_prompt + args.max_length)
    config = SearchConfig(width, branch, block_size, args.max_length, args.selection, args.seed)
    return Plan(problems, prompts, generator, value_model, tokenizer, stop_ids, config, engine, device, value_device,
                value_dtype)  # fmt: skip


def check_value_cache(cache_gb: float | str, info: ModelInfo, dtype: str, trace: int) -> None:
    """The cache must hold one whole trace and a working copy of it."""
    per_token = 2 * info.num_hidden_layers * info.num_key_value_heads * info.head_dim * (2 if dtype == "bf16" else 4)
    needed = 2 * trace * per_token / 1e9
    if cache_gb != "auto" and float(cache_gb) < needed:
        raise UserError(
            f"--value_cache_gb {cache_gb} cannot hold one trace of {trace} tokens and a working copy; give at least "
            f"{needed:.3g}"
        )


def make_meta(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What X.meta.json says of a run; a second start is compared with it."""
    packages = ("torch", "transformers", "sglang", "flash-attn", "math-verify", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    text = json.dumps([[p.problem, p.answer, ids] for p, ids in zip(plan.problems, plan.prompts, strict=True)])
    return {
        "format": FORMAT,
        "arguments": dict(vars(args).items()),
        "versions": versions,
        "benchmark": benchmark_name(args.benchmark),
        "num_problems": len(plan.problems),
        "problems_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "search": vars(plan.config) | {"num_blocks": args.num_blocks},
        "generator": plan.generator.to_json(),
        "value_model": plan.value_model.to_json(),
        "numerics": {
            "engine": plan.engine.removesuffix("-server"),
            "generator_dtype": "bf16" if plan.device.startswith("cuda") else "fp32",
            "value_dtype": plan.value_dtype,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load_scorer(args: argparse.Namespace, plan: Plan) -> ScorerThread:
    """The value model on its device, in a scorer with a bounded cache, in a thread of its own."""
    import torch

    from classifier_lib import Qwen2ForClassifier, ValueScorer

    model = Qwen2ForClassifier.from_pretrained(
        plan.value_model.path,
        attn_implementation=args.attention_impl,
        torch_dtype=torch.bfloat16 if plan.value_dtype == "bf16" else torch.float32,
        use_cache=False,
    ).to(plan.value_device)
    cache_bytes = free_memory(plan.value_device) if args.value_cache_gb == "auto" else int(args.value_cache_gb * 1e9)
    scorer = ValueScorer(model, cache_bytes)
    logger.info(
        "value model: %s, %s on %s, caches up to %.1f GB", plan.value_model.path, plan.value_dtype, plan.value_device,
        cache_bytes / 1e9,
    )  # fmt: skip
    return ScorerThread(scorer)


# ---------------------------------------------------------------------------------------------------------------------
# Search every problem


class Stopped(Exception):
    """A signal ended the run; everything finished is in the files."""

    def __init__(self, number: signal.Signals):
        super().__init__(f"stopped by {number.name}")
        self.number = number


class Run:
    """The searches of one start of the program: what they share, and what is shown of them."""

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        files: RunFiles,
        engine: Engine,
        scorer: ScorerThread,
        grader: Grader,
    ):
        self.args, self.plan, self.files, self.engine, self.scorer, self.grader = (
            args,
            plan,
            files,
            engine,
            scorer,
            grader,
        )
        self.texts: dict[str, BlockTexts] = {}
        self.total = len(plan.problems) * args.num_repetitions
        self.begin = time.perf_counter()
        self.done_before = len(files.finished)
        self.generated = self.scored = 0
        self.progress = Progress(self.status)
        self.stopped_by: signal.Signals | None = None

    async def generate(self, prompt_ids: list[int], n: int, max_new_tokens: int, seeds: list[int], tree_id: str):
        args = self.args
        requests = [
            Request(prompt_ids, max_new_tokens, args.temperature, args.top_p, self.plan.stop_ids, seed, tree_id)
            for seed in seeds[:n]
        ]
        return await self.engine.generate(requests)

    def on_round(self, task: SearchTask, tree: Tree, record: Round) -> None:
        self.files.add_round(task, record, self.round_texts(task, tree, record))
        self.generated += sum(map(len, record.tokens))
        self.scored += record.tokens_scored
        self.progress.update()

    def round_texts(self, task: SearchTask, tree: Tree, record: Round) -> list[str]:
        """Text of each candidate of the round that was just added to `tree`."""
        texts = self.texts[task.tree_id]
        first = len(tree.parent) - len(record.parent)
        return [
            texts.add(first + i, parent, tree.response(first + i), last=bool(finish))
            for i, (parent, finish) in enumerate(zip(record.parent, record.finish, strict=True))
        ]

    async def one(self, task: SearchTask) -> None:
        """Search, grade, write."""
        earlier = self.files.rounds.get((task.data_idx, task.repeat_idx), [])
        self.texts[task.tree_id] = self.texts_of(task, earlier)
        result = await search(task, self.generate, self.scorer, self.plan.config, earlier, self.on_round)
        del self.texts[task.tree_id]
        self.files.add_result(await self.row(result))
        self.progress.update()

    def texts_of(self, task: SearchTask, rounds: Sequence[Round]) -> BlockTexts:
        """The texts of a search, brought up to the rounds of an earlier start."""
        self.texts[task.tree_id] = BlockTexts(self.decode)
        tree = Tree(task.prompt_ids, self.plan.config.width)
        for record in rounds:
            tree.add(record)
            self.round_texts(task, tree, record)
        return self.texts[task.tree_id]

    def decode(self, ids: list[int]) -> str:
        return self.plan.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    async def row(self, result: SearchResult) -> dict[str, Any]:
        """The line of X.jsonl: the released code's keys first."""
        task, tree = result.task, result.tree
        problem = self.plan.problems[task.data_idx]
        responses = [tree.response(node) for node in result.beams]
        answers = [extract_answer(self.decode(ids)) for ids in responses]
        rewards = await self.grader.agrade([(problem.answer, answer) for answer in answers])
        return {
            "repeat_idx": task.repeat_idx,
            "data_idx": task.data_idx,
            "global_idx": task.repeat_idx * len(self.plan.problems) + task.data_idx,
            "problem": problem.problem,
            "gt_answer": problem.answer,
            "generated_ids": responses,
            "generated_scores": [tree.value[node] for node in result.beams],
            "processed_answer": answers,
            "reward": rewards,
            "dt": result.seconds,
            "finish_reasons": [tree.finish[node] for node in result.beams],
            "prompt_tokens": len(task.prompt_ids),
            "tokens_generated": sum(map(len, tree.tokens)),
            "tokens_scored": result.total("tokens_scored"),
            "tokens_reread": result.total("tokens_reread"),
            "tokens_cached": result.total("tokens_cached"),
            "seconds_generate": result.total("seconds_generate"),
            "seconds_score": result.total("seconds_score"),
        }

    def status(self) -> str:
        """Searches done, rates of this start, time left, and how often the finished beams were right so far."""
        seconds = time.perf_counter() - self.begin
        done, now = len(self.files.finished), len(self.files.finished) - self.done_before
        left = format_seconds(seconds / now * (self.total - done)) if now else "?"
        rewards = [reward for row in self.files.finished.values() for reward in row["reward"]]
        accuracy = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
        return (
            f"searches {done}/{self.total} | {format_count(self.generated / seconds)} tok/s generated, "
            f"{format_count(self.scored / seconds)} scored | pass@1 {accuracy} | {format_seconds(seconds)}, ETA {left}"
        )


async def search_all(run: Run) -> None:
    """Run every search that is not finished. SIGINT and SIGTERM end it in order: `Stopped`."""
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, run, this, number)
    tasks = [
        SearchTask(data_idx, repeat_idx, tuple(prompt))
        for repeat_idx in range(run.args.num_repetitions)
        for data_idx, prompt in enumerate(run.plan.prompts)
        if (data_idx, repeat_idx) not in run.files.finished
    ]
    try:
        await run_searches(tasks, run.one, run.args.batch_size)
    except asyncio.CancelledError:
        if run.stopped_by is None:
            raise
        raise Stopped(run.stopped_by) from None
    finally:
        run.progress.close()
        await run.engine.close()


def _stop(run: Run, task: asyncio.Task, number: int) -> None:
    run.stopped_by = signal.Signals(number)
    task.cancel()
    for again in (signal.SIGINT, signal.SIGTERM):  # a second one ends at once
        asyncio.get_running_loop().remove_signal_handler(again)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(args: argparse.Namespace, files: RunFiles, grader: Grader, tracker: Any) -> None:
    """The table, and the same numbers to the tracker."""
    rows = summarize(files.finished.values(), args.num_blocks, grader)
    print(format_table(rows), flush=True)
    name = benchmark_name(args.benchmark)
    tracker.log_configs(files.meta)
    for row in rows:
        metrics = {f"{name}/{key}": value for key, value in row.items() if key.endswith(("_m", "_ci", "_ci_repeat"))}
        tracker.log_metrics(metrics, step=row["N"])


def run_all(args: argparse.Namespace, plan: Plan, files: RunFiles, grader: Grader) -> None:
    """Load both models and search what is not finished."""
    if plan.device == plan.value_device == "cpu":
        limit_cpu_threads()
    engine = make_engine(plan.engine, plan.generator, device=plan.device, args=args)
    scorer = load_scorer(args, plan)
    files.meta["engine"] = engine.describe()
    run = Run(args, plan, files, engine, scorer, grader)
    if files.finished or files.rounds:
        logger.info(
            "going on: %d of %d searches are finished, %d are under way",
            len(files.finished),
            run.total,
            len(files.rounds),
        )
    try:
        asyncio.run(search_all(run))
    finally:
        scorer.close()


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    enable_fast_transfers()
    args = parse_args(argv)
    paths = check_output_path(args.output_path)
    plan = make_plan(args)
    files = RunFiles.open(paths, make_meta(args, plan))
    begin, total = time.perf_counter(), len(plan.problems) * args.num_repetitions
    try:
        tracker = make_tracker(args.tracker, args.neptune_project)
        with Grader() as grader:
            try:
                if len(files.finished) < total:
                    run_all(args, plan, files, grader)
                    files.sort_results()
                report(args, files, grader, tracker)
            finally:
                tracker.close()
        return 0
    except Stopped as stop:
        print(
            f"{stop}: {len(files.finished)} of {total} searches are finished; the same command goes on", file=sys.stderr
        )
        return 128 + stop.number
    except (EngineError, SearchError, OutputError) as error:
        done = f"{len(files.finished)} of {total} searches are finished; the same command goes on"
        print(f"error: {error} ({done})", file=sys.stderr)
        return 1
    finally:
        files.close(time.perf_counter() - begin, hardware_name(plan.device))


if __name__ == "__main__":
    run_script(main)
