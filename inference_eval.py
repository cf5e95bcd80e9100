r"""Search every problem of a benchmark with a generator and a value model, grade, write, and say how well it went.

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
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from common_lib.cli import UserError, enable_fast_transfers, quiet_transformers, run_script, set_up_logging
from common_lib.concurrency import run_bounded
from common_lib.devices import default_cache_bytes, hardware_name, limit_cpu_threads, resolve_device
from common_lib.models import (
    ModelInfo,
    check_generator,
    check_positions,
    check_token_ids,
    check_value_cache,
    check_value_model,
    inspect_model,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)
from common_lib.progress import Progress, format_count, format_seconds
from common_lib.tracking import Tracker, make_tracker
from data_utils import (
    BlockTexts,
    Problem,
    benchmark_name,
    check_prompt_format,
    format_prompt,
    load_benchmark,
)
from engine_lib.arguments import engine_config
from engine_lib.base import Engine, EngineError, Request
from engine_lib.choose import choose_engine, make_engine
from eval_lib.summary import format_table, summarize
from eval_utils import Grader, extract_answer, problem_classes
from search_lib.arguments import parse_args
from search_lib.run_files import FORMAT, OutputError, RunFiles, check_output_path
from search_lib.scorers import ScorerThread
from search_lib.search import SearchError, search
from search_lib.tree import Round, SearchConfig, SearchResult, SearchTask, Tree, parse_search_type

logger = logging.getLogger("inference_eval")

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
    num_beams, beam_width, block_size = parse_search_type(
        args.search_type, args.num_blocks, args.block_size, args.max_length
    )
    value_dtype = args.value_dtype
    if value_dtype == "auto":
        value_dtype = "bf16" if value_device.startswith("cuda") else "fp32"
    check_value_cache(args.value_cache_gb, value_model, value_dtype, longest_prompt + args.max_length)
    config = SearchConfig(num_beams, beam_width, block_size, args.max_length, args.selection, args.seed)
    return Plan(problems, prompts, generator, value_model, tokenizer, stop_ids, config, engine, device, value_device,
                value_dtype)  # fmt: skip


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
        "search": plan.config.to_json() | {"num_blocks": args.num_blocks},
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
    cache_bytes = (
        default_cache_bytes(plan.value_device) if args.value_cache_gb == "auto" else int(args.value_cache_gb * 1e9)
    )
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
        self.rounds_done: dict[str, int] = {}  # of the searches under way, in this start
        self.generated = self.scored = 0
        self.progress = Progress(self.status)
        self.stopped_by: signal.Signals | None = None
        self.stopped_at = 0.0

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
        self.rounds_done[task.tree_id] = self.rounds_done.get(task.tree_id, 0) + 1
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
        self.files.add_result(await self.row(result))
        del self.texts[task.tree_id]
        self.rounds_done.pop(task.tree_id, None)
        self.progress.update()

    def texts_of(self, task: SearchTask, rounds: Sequence[Round]) -> BlockTexts:
        """The texts of a search, brought up to the rounds of an earlier start."""
        self.texts[task.tree_id] = BlockTexts(self.decode)
        tree = Tree(task.prompt_ids, self.plan.config.num_beams)
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
        """Searches done, time left, rates of this start, and how often the finished beams were right so far."""
        seconds, done = time.perf_counter() - self.begin, len(self.files.finished)
        most_rounds = math.ceil(self.plan.config.max_length / self.plan.config.block_size)
        gained = done - self.done_before + sum(self.rounds_done.values()) / most_rounds
        left = format_seconds(seconds / gained * max(0.0, self.total - self.done_before - gained)) if gained else "?"
        rewards = [reward for row in self.files.finished.values() for reward in row["reward"]]
        accuracy = f"{sum(rewards) / len(rewards):.3f}" if rewards else "-"
        return (
            f"{done}/{self.total} searches, ETA {left} | {format_count(self.generated / seconds)} tok/s generated, "
            f"{format_count(self.scored / seconds)} scored | pass@1 {accuracy}"
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
        await run_bounded(tasks, run.one, run.args.batch_size)
    except asyncio.CancelledError:
        if run.stopped_by is None:
            raise
        raise Stopped(run.stopped_by) from None
    finally:
        run.progress.close()
        await run.engine.close()


def _stop(run: Run, task: asyncio.Task, number: int) -> None:
    if run.stopped_by is None:
        run.stopped_by, run.stopped_at = signal.Signals(number), time.monotonic()
        task.cancel()
    elif time.monotonic() - run.stopped_at > 1:  # asked again: at once (shells and launchers often send it twice)
        os._exit(128 + number)


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(args: argparse.Namespace, files: RunFiles, grader: Grader, tracker: Tracker) -> None:
    """The table, and the same numbers to the tracker."""
    lines = list(files.finished.values())
    rows = summarize(lines, args.num_blocks, problem_classes(lines, grader), files.meta["num_problems"])
    print(format_table(rows))
    print(f"\n{totals(args, files, lines)}", flush=True)
    name = benchmark_name(args.benchmark)
    tracker.log_configs(files.meta)
    for row in rows:
        known = {key: value for key, value in row.items() if value is not None}
        metrics = {f"{name}/{key}": known[key] for key in known if key.endswith(("_m", "_ci", "_ci_repeat"))}
        tracker.log_metrics(metrics, step=row["N"])


def start_tracker(args: argparse.Namespace, files: RunFiles) -> Tracker:
    """The tracker of this run; a later start of the same run goes on with the same one."""
    resume_id = files.meta.get("tracker_ids", {}).get(args.tracker)
    tracker = make_tracker(
        args.tracker, args.neptune_project or None, benchmark_name(args.benchmark), resume_id=resume_id
    )
    if args.tracker != "none":
        logger.info("tracker: %s", tracker.where)
        files.meta["tracker_ids"] = files.meta.get("tracker_ids", {}) | {args.tracker: tracker.id}
    return tracker


def totals(args: argparse.Namespace, files: RunFiles, lines: Sequence[dict[str, Any]]) -> str:
    """What the whole run cost, and where it is."""
    sums = {key: sum(line[key] for line in lines) for key in ("tokens_generated", "tokens_scored", "tokens_reread")}
    seconds = sum(session["seconds"] for session in files.meta["sessions"])
    return (
        f"{len(lines)} searches: {sums['tokens_generated']:,} tokens generated, {sums['tokens_scored']:,} scored "
        f"(of them {sums['tokens_reread']:,} read again), {seconds:,.1f} s wall-clock\n"
        f"written to {files.paths.results}; tables, plots and a page to look inside: python report.py {files.paths.results}"
    )


def run_all(args: argparse.Namespace, plan: Plan, files: RunFiles, grader: Grader) -> None:
    """Load both models and search what is not finished."""
    quiet_transformers()
    if plan.device == plan.value_device == "cpu":
        limit_cpu_threads()
    engine = make_engine(plan.engine, engine_config(args, plan.generator, plan.device))
    longest = max(map(len, plan.prompts)) + args.max_length
    if longest > engine.context_length:  # SGLang's KV pool may hold less than the model's positions
        raise UserError(
            f"the longest prompt and --max_length {args.max_length} make {longest} tokens, and the {engine.name} engine takes "
            f"{engine.context_length}; give a smaller --max_length, or SGLang more memory (--piref_gpu_util)"
        )
    scorer = load_scorer(args, plan)
    files.meta["engine"] = engine.describe()
    run = Run(args, plan, files, engine, scorer, grader)
    logger.info(
        "%s: %d problems x %d repetitions; %s: %d beams x %d candidates, blocks of %d, up to %d tokens; %s engine",
        benchmark_name(args.benchmark), len(plan.problems), args.num_repetitions, args.search_type, plan.config.num_beams,
        plan.config.beam_width, plan.config.block_size, plan.config.max_length, plan.engine,
    )  # fmt: skip
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
    args = parse_args(argv, __doc__)
    paths = check_output_path(args.output_path)
    plan = make_plan(args)
    begin, total = time.perf_counter(), len(plan.problems) * args.num_repetitions
    finished: Sized = ()
    try:
        with RunFiles.open(paths, make_meta(args, plan)) as files, Grader() as grader:
            finished = files.finished
            with contextlib.closing(start_tracker(args, files)) as tracker:
                try:
                    if len(finished) < total:
                        run_all(args, plan, files, grader)
                    files.sort_results()
                finally:
                    files.note_session(time.perf_counter() - begin, hardware_name(plan.device))
                report(args, files, grader, tracker)
        return 0
    except Stopped as stop:
        print(f"{stop}: {len(finished)} of {total} searches are finished; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    except (EngineError, SearchError, OutputError) as error:
        done = f"{len(finished)} of {total} searches are finished; the same command goes on"
        print(f"error: {error} ({done})", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_script(main)
