r"""Search every problem of a benchmark with a generator and a value model, grade, write, and say how well it went.

    # on a GPU (the released command with all its flags: README)
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
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common_lib import devices, models
from common_lib.cli import UserError, enable_fast_transfers, quiet_transformers, run_script, set_up_logging
from common_lib.files import OutputError
from common_lib.shards import WHOLE, Shard
from common_lib.signals import Stopped, StopSignal, run_until_signal
from common_lib.tracking import Tracker, make_tracker
from data_utils import benchmark_name, check_prompt_format, format_prompt, load_benchmark
from engine_lib.arguments import engine_config
from engine_lib.base import Engine, EngineError
from engine_lib.choose import choose_engine, make_engine
from engine_lib.value_base import ValueEngine
from eval_lib.stopped import StopRecord, format_run, summarize_run
from eval_lib.stopping import Stopping
from eval_utils import Grader, problem_classes
from search_lib import value_models
from search_lib.arguments import parse_args
from search_lib.memory_plan import EngineMemory, elsewhere
from search_lib.plan import SearchPlan
from search_lib.results import ResultRows
from search_lib.run_files import FORMAT, RunFiles, check_output_path, check_same_shards, reproducible
from search_lib.run_shards import check_beside
from search_lib.run_stopping import RunStops
from search_lib.runner import SearchRunner, generate_with
from search_lib.scorers import LoadedScorer
from search_lib.search import SearchError
from search_lib.search_progress import SearchProgress
from search_lib.tree import SearchConfig, parse_search_type

logger = logging.getLogger("inference_eval")

# ---------------------------------------------------------------------------------------------------------------------
# Plan: everything that can be checked before a model is loaded


def make_plan(args: argparse.Namespace, load_tokenizer: Callable[[Path, str], Any]) -> SearchPlan:
    """Read the benchmark, configs and tokenizers, and check that all fits. Raises UserError."""
    engine = choose_engine(args.engine)
    config = SearchConfig(
        *parse_search_type(args.search_type, args.num_blocks, args.block_size, args.max_length),
        args.max_length, args.selection, args.seed,
    )  # fmt: skip
    problems = load_benchmark(args.benchmark, args.max_problems)
    shard = shard_of(args) or WHOLE
    if shard.count > len(problems):
        raise UserError(f"--shard {shard}: there are only {len(problems)} problems; give an N of at most that many")
    generator = models.inspect_model(models.resolve_model(args.piref_model, "--piref_model"), "--piref_model")
    flag = "--classifier_ckpt_path"
    value_model = models.inspect_model(models.resolve_model(args.classifier_ckpt_path, flag), flag)
    models.check_generator(generator)
    models.check_value_model(value_model)
    # From here on with torch and transformers, whose import takes seconds
    device = devices.resolve_device(args.device, "--device")
    value_devices = value_models.resolve_value_devices(args, device)
    value_dtype = value_models.resolve_value_dtype(args, device, value_devices)
    is_local = args.value_engine == "local"
    attention = value_models.attention_of_value_models(
        args.attention_impl, value_devices if is_local else (), value_dtype
    )
    tokenizer = load_tokenizer(Path(generator.path), "--piref_model")
    check_prompt_format(args.prompt_format, tokenizer)
    prompts = [format_prompt(p.problem, args.prompt_format, tokenizer) for p in problems]
    stop_ids = models.stop_token_ids(Path(generator.path), tokenizer)
    models.check_token_ids(generator, value_model, tokenizer, max(*stop_ids, *map(max, prompts)), load_tokenizer)
    models.check_positions(generator, value_model, max(map(len, prompts)), args.max_length)
    plan = SearchPlan(problems, prompts, shard, generator, value_model, tokenizer, stop_ids, config, engine, device,
                      args.value_engine, value_devices, value_dtype, attention)  # fmt: skip
    if is_local:
        most = max(map(value_devices.count, value_devices))
        models.check_value_cache(args.value_cache_gb, value_model, value_dtype, plan.longest_trace, most)
    return plan


def shard_of(args: argparse.Namespace) -> Shard | None:
    return None if args.shard is None else Shard.parse(args.shard, "--shard")


def stopping_of(args: argparse.Namespace, plan: SearchPlan) -> Stopping:
    return Stopping(args.stop, args.stop_vote, args.alpha, args.num_repetitions, plan.config.num_beams)


def make_meta(args: argparse.Namespace, plan: SearchPlan) -> dict[str, Any]:
    """What X.meta.json says of a run; a second start is compared with it."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "sglang", "flash-attn", "math-verify", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    text = json.dumps([[p.problem, p.answer, ids] for p, ids in zip(plan.problems, plan.prompts, strict=True)])
    value_engine = plan.value_engine.removesuffix("-server")
    return {
        "format": FORMAT,
        "arguments": dict(vars(args)),
        "versions": versions,
        "benchmark": benchmark_name(args.benchmark),
        "num_problems": len(plan.problems),
        "problems_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "search": plan.config.to_json() | {"num_blocks": args.num_blocks},
        "generator": asdict(plan.generator),
        "value_model": asdict(plan.value_model),
        "numerics": {
            "engine": plan.engine.removesuffix("-server"),
            "generator_dtype": generator_dtype(plan),
            "value_engine": value_engine,
            "value_dtype": plan.value_dtype,
        },
        "reproducible": reproducible(plan.value_dtype, value_engine),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def generator_dtype(plan: SearchPlan) -> str | None:
    """None: the servers' own, which this process's device says nothing of."""
    if plan.engine == "sglang-server":
        return None
    return "bf16" if plan.device.startswith("cuda") else "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Load


def load_engine(args: argparse.Namespace, plan: SearchPlan) -> Engine:
    """The generator. Raises UserError for settings that cannot be, EngineError where it does not start."""
    quiet_transformers()
    if plan.device == "cpu" and "cpu" in plan.value_devices:
        devices.limit_cpu_threads()
    searches = len(plan.own_prompts) * args.num_repetitions
    return make_engine(plan.engine, engine_config(args, plan.generator, plan.device, searches, args.num_blocks))


@dataclass(frozen=True)
class Loaders:
    """Where what is loaded comes from; simulations and tests give others."""

    engine: Callable[[argparse.Namespace, SearchPlan], Engine] = load_engine
    scorer: Callable[..., LoadedScorer] = value_models.load_scorer
    tokenizer: Callable[[Path, str], Any] = models.load_tokenizer
    tracker: Callable[..., Tracker] = make_tracker


# ---------------------------------------------------------------------------------------------------------------------
# Search every problem


def start_models(
    args: argparse.Namespace, plan: SearchPlan, files: RunFiles, loaders: Loaders, stop: StopSignal
) -> tuple[Engine, LoadedScorer]:
    """The generator first: value models take what it leaves of a device; value servers are met before it. Where one does not
    start, and at a signal, nothing is left."""
    if any(device.startswith("cuda") for device in plan.value_devices):
        devices.use_expandable_segments()
    free = {device: devices.memory_of(device)[0] for device in plan.memory_devices}
    started: list[Engine | ValueEngine | LoadedScorer] = []
    try:
        with stop.raising():
            if servers := value_models.meet_servers(args, plan):
                started.append(servers)
            engine = loaders.engine(args, plan)
            started.append(engine)
            check_context_length(args, plan, engine)
            files.meta["engine"] = described = engine.describe()
            memory = {}
            for device, before in free.items():
                where = elsewhere(plan.engine, plan.device, device, described)
                memory[device] = EngineMemory(before, devices.memory_of(device)[0], described, where)
            scorer = loaders.scorer(args, plan, memory, servers)
            started.append(scorer)
            files.meta["value_engine"] = scorer.describe()
    except BaseException:
        for one in started:
            asyncio.run(one.close())
        raise
    return engine, scorer


def search_problems(
    args: argparse.Namespace, plan: SearchPlan, files: RunFiles, stops: RunStops, grader: Grader, loaders: Loaders
) -> None:
    """Load both models and search what is not finished; both are closed however it ends. Raises Stopped."""
    files.take_back()
    with StopSignal() as stop:
        engine, scorer = start_models(args, plan, files, loaders, stop)
        say_what_is_searched(args, plan, stops)
        runner = SearchRunner(
            generate_with(engine, args.temperature, args.top_p, plan.stop_ids), scorer, plan.config, files,
            ResultRows(plan.problems, plan.decode, grader), stops, SearchProgress(stops, plan.config),
        )  # fmt: skip

        async def run() -> None:
            try:
                await scorer.check()
                await runner.run(plan.own_prompts, args.num_repetitions, args.batch_size)
            finally:
                try:
                    await engine.close()
                finally:
                    await scorer.close()

        asyncio.run(run_until_signal(run(), stop))


def say_what_is_searched(args: argparse.Namespace, plan: SearchPlan, stops: RunStops) -> None:
    logger.info(
        "%s: %d problems x %s%d repetitions; %s: %d beams x %d candidates, blocks of %d, up to %d tokens; %s engine",
        benchmark_name(args.benchmark) + (f", shard {args.shard}" if args.shard else ""), len(plan.own_prompts),
        "" if args.stop == "none" else "at most ", args.num_repetitions, args.search_type, plan.config.num_beams,
        plan.config.beam_width, plan.config.block_size, plan.config.max_length, plan.engine,
    )  # fmt: skip
    if stops.files.finished or stops.files.rounds:
        under_way = sum(stops.counts(*key) for key in stops.files.rounds)
        logger.info("going on: %s, %d are under way", stops.in_words(), under_way)


def check_context_length(args: argparse.Namespace, plan: SearchPlan, engine: Engine) -> None:
    """SGLang's KV pool may hold less than the model's positions. Raises UserError."""
    if plan.longest_trace > engine.context_length:
        raise UserError(
            f"the longest prompt and --max_length {args.max_length} make {plan.longest_trace} tokens, and the {engine.name} "
            f"engine takes {engine.context_length}; give a smaller --max_length, or SGLang more memory (--piref_gpu_util)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Report


def start_tracker(args: argparse.Namespace, files: RunFiles, loaders: Loaders) -> Tracker:
    """The tracker of this run; a later start of the same run goes on with the same one."""
    ids = files.meta["tracker_ids"]
    tracker = loaders.tracker(
        args.tracker, args.neptune_project or None, benchmark_name(args.benchmark), resume_id=ids.get(args.tracker)
    )
    if args.tracker != "none":
        logger.info("tracker: %s", tracker.where)
        ids[args.tracker] = tracker.id
    return tracker


def report(args: argparse.Namespace, stops: RunStops, grader: Grader, tracker: Tracker) -> None:
    """The table, what the whole run cost, and where it is; the table's numbers also to the tracker."""
    files, lines, shard = stops.files, stops.lines, shard_of(args)
    problems = (shard or WHOLE).count_of(files.meta["num_problems"])
    record = StopRecord.of(files.meta)
    rows, outcome = summarize_run(lines, args.num_blocks, problem_classes(lines, grader), record, problems)
    sums = {key: sum(line[key] for line in lines) for key in ("tokens_generated", "tokens_scored", "tokens_reread")}
    seconds = sum(session["seconds"] for session in files.meta["sessions"])
    part = f"shard {shard}, {problems} of {files.meta['num_problems']} problems:\n" if shard else ""
    print(
        f"{part}{format_run(rows, outcome)}\n\n"
        f"{len(lines)} searches: {sums['tokens_generated']:,} tokens generated, {sums['tokens_scored']:,} scored "
        f"(of them {sums['tokens_reread']:,} read again), {seconds:,.1f} s wall-clock\n"
        f"written to {files.paths.results}; tables{' of all shards' if shard else ''}, plots and a page to look inside: "
        f"python report.py {args.output_path}",
        flush=True,
    )
    name = (f"shard_{shard.index}/" if shard else "") + benchmark_name(args.benchmark)
    tracker.log_configs(files.meta)
    for row in rows:
        known = {key: value for key, value in row.items() if value is not None}
        metrics = {
            f"{name}/{key}": known[key] for key in known if key.endswith(("_m", "_ci", "_ci_repeat", "repeat_groups"))
        }
        tracker.log_metrics(metrics, step=row["N"])


def main(argv: Sequence[str] | None = None, loaders: Loaders = Loaders()) -> int:
    set_up_logging()
    enable_fast_transfers()
    args = parse_args(argv, __doc__)
    paths = check_output_path(args.output_path, shard_of(args))
    others = check_beside(args.output_path, shard_of(args))
    plan = make_plan(args, loaders.tokenizer)
    begin, meta, stops = time.perf_counter(), make_meta(args, plan), None
    check_same_shards(others, meta)
    try:
        with RunFiles(paths, meta) as files, Grader() as grader:
            stops = RunStops(stopping_of(args, plan), files, plan.own_prompts, grader.answer_classes)
            try:  # once more, now that others see this one: they may have begun in the meantime
                check_same_shards(check_beside(args.output_path, shard_of(args)), meta)
            except UserError:
                files.note_session(0.0, "")
                raise
            with contextlib.closing(start_tracker(args, files, loaders)) as tracker:
                try:
                    if not stops.is_over:
                        search_problems(args, plan, files, stops, grader, loaders)
                    files.sort_results(stops.counts)
                finally:
                    files.note_session(time.perf_counter() - begin, devices.hardware_name(plan.device))
                report(args, stops, grader, tracker)
        return 0
    except Stopped as stop:
        print(f"{stop}: {how_far(stops)}", file=sys.stderr)
        return stop.status
    except (EngineError, SearchError, OutputError) as error:
        print(f"error: {error} ({how_far(stops)})", file=sys.stderr)
        return 1


def how_far(stops: RunStops | None) -> str:
    return f"{stops.in_words()}; the same command goes on" if stops else "the same command goes on"


if __name__ == "__main__":
    run_script(main)
