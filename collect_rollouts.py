"""Make a training set for the value model: roll-outs of a generator, graded, in OpenR1-VM's schema.

For each problem: `--num_roll_ins` traces, by one or several models; each cut at `--prefixes_per_roll_in` places; from
each prefix `--rollouts_per_prefix` roll-outs of the generator `--piref_model`; each graded as incorrect (0), correct (1)
or length-limited (2). Problems that never succeed are left out.

    # as the paper's data: 14 roll-ins x 4 nested prefixes
    python collect_rollouts.py --problems VGS-AI/OpenR1-Cleaned --piref_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
        --roll_in_models deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --output_dir rollouts
    # without roll-ins: four roll-outs from the bare prompt
    python collect_rollouts.py --problems problems.jsonl --piref_model GENERATOR --output_dir rollouts --num_roll_ins 0 \
        --rollouts_per_prefix 4 --max_length 256

Stopped at any moment, the same command goes on. `train_classifier.py --data_path rollouts` reads the result. On N machines
that share a folder: the same command on each, with --shard 0/N to --shard N-1/N.
"""

import argparse
import asyncio
import contextlib
import hashlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common_lib.cli import (
    ArgumentParser,
    UserError,
    check_rules,
    enable_fast_transfers,
    quiet_transformers,
    run_script,
    set_up_logging,
)
from common_lib.concurrency import gather_all, run_bounded
from common_lib.devices import resolve_device
from common_lib.files import OutputError
from common_lib.models import ModelInfo, check_generator, inspect_model, load_tokenizer, resolve_model, stop_token_ids
from common_lib.progress import Progress, format_count, format_seconds
from common_lib.shards import WHOLE, Shard
from common_lib.signals import Stopped, run_until_signal
from data_utils import check_prompt_format, format_prompt
from engine_lib.arguments import (
    FREE_ARGUMENTS,
    add_engine_flags,
    add_sampling_flags,
    engine_config,
    engine_rules,
    resolve_engine,
)
from engine_lib.base import Engine, EngineError, Reply, Request
from engine_lib.choose import choose_engine, make_engine
from engine_lib.retry import RequestsFailed, RetryPolicy, ask_until_whole
from engine_lib.served_vocabulary import check_vocabulary
from eval_utils import Grader, extract_answer
from training_lib import collection, data_card
from training_lib.collection import SourceProblem, draw_seed
from training_lib.collection_folder import CollectionFolder, RollIns, check_output_dir, check_shard
from training_lib.roll_in_servers import parse_roll_in_urls

logger = logging.getLogger("collect_rollouts")

# What may change when a stopped collection goes on; a change of anything else would change the data.
FREE = FREE_ARGUMENTS | {"output_dir", "batch_size", "shard", "roll_in_url"}


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)

    flag = parser.add_argument_group("what is collected").add_argument
    flag("--problems", required=True, help="a .jsonl/.json/.parquet file, a dataset folder, or a hub data set, with problem "
         "and answer (the paper's: VGS-AI/OpenR1-Cleaned)")
    flag("--split", default="train", help="of a folder or hub data set")
    flag("--max_problems", type=int, help="only the first that many problems (default: all)")
    flag("--output_dir", required=True, help="the training set; a data card and parquet files under data/")
    flag("--num_roll_ins", type=int, default=14, help="traces to cut, per problem; 0: every roll-out starts at the prompt")
    flag("--prefixes_per_roll_in", type=int, default=4, help="prefixes of each, nested")
    flag("--cut_weight", choices=collection.CUT_WEIGHTS, default="sqrt", help="where a trace is cut: after t tokens with probability "
         "proportional to sqrt(t), 1, or 1/sqrt(t). The paper says square-root weighted, no more: sqrt(t) is an assumption")
    flag("--rollouts_per_prefix", type=int, default=1, help="roll-outs of the generator from each prefix")
    flag("--keep_unsolved", action="store_true", help="keep problems of which no roll-out succeeds")
    flag("--shard_size", type=int, default=500, help="problems of a parquet file")
    flag("--shard", metavar="I/N", help="make every N-th parquet file from file I on (I from 0), beside processes that make the "
         "others in the same --output_dir; the files are those of one process (default: all)")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--max_length", type=int, default=16384, help="response tokens of a trace, prefix included; a longer one is "
         "length-limited")
    add_sampling_flags(flag)
    flag("--seed", type=int, default=1337, help="decides cuts and, as far as the engine is deterministic, tokens")

    flag = parser.add_argument_group("generators").add_argument
    flag("--piref_model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", help="the generator: folder or hub name")
    flag("--roll_in_models", nargs="+", help="models that write roll-ins, in turn (default: the generator)")
    flag("--roll_in_url", action="append", default=[], metavar="MODEL=URL", help="an SGLang server or router of a model of "
         "--roll_in_models, which then is not loaded here; repeat for more models, or for more servers of one")
    flag("--batch_size", type=int, default=256, help="problems at once")
    add_engine_flags(flag, attention="auto", gpu_share=0.85)
    return parser
# fmt: on


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked as far as they can be without reading a file. Raises UserError."""
    args = build_parser().parse_args(argv)
    at_least_one = ("prefixes_per_roll_in", "rollouts_per_prefix", "shard_size", "max_length", "batch_size")
    rules = [(name, getattr(args, name) >= 1, "must be at least 1") for name in at_least_one] + [
        ("num_roll_ins", args.num_roll_ins >= 0, "must be 0 or more"),
        ("max_problems", args.max_problems is None or args.max_problems >= 1, "must be at least 1"),
    ]
    check_rules(args, [*rules, *engine_rules(args)])
    resolve_engine(args)
    shard_of(args)
    args.roll_in_models = args.roll_in_models or [args.piref_model]
    alone = set(args.roll_in_models) - {args.piref_model} - set(parse_roll_in_urls(args))
    if args.engine == "sglang-server" and alone:
        raise UserError(
            f"--roll_in_models {min(alone)}: a server serves one model; give --roll_in_url {min(alone)}=URL, or --engine sglang, "
            "which loads one after the other"
        )
    return args


def shard_of(args: argparse.Namespace) -> Shard:
    return Shard.parse(args.shard, "--shard") if args.shard is not None else WHOLE


# ---------------------------------------------------------------------------------------------------------------------
# Everything that can be checked before a model is loaded


@dataclass
class CollectionPlan:
    """What is collected, and with what."""

    problems: list[SourceProblem]
    prompts: list[list[int]]
    generator: ModelInfo
    roll_in_models: list[ModelInfo]
    served: dict[int, tuple[str, ...]]  # URLs of the servers of those of the roll-in models that have some
    tokenizer: Any
    stop_ids: tuple[int, ...]
    engine: str
    device: str

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def make_plan(args: argparse.Namespace) -> CollectionPlan:
    """Read problems, configs and tokenizers, and check that all fits. Raises UserError."""
    problems = collection.load_problems(args.problems, args.split, args.max_problems)
    check_shard(shard_of(args), len(problems), args.shard_size)
    generator = inspect_generator(args.piref_model, "--piref_model")
    names = args.roll_in_models if args.num_roll_ins else []
    roll_in_models = [inspect_generator(name, "--roll_in_models") for name in names]
    engine, device = choose_engine(args.engine), resolve_device(args.device, "--device")
    path = Path(generator.path)
    tokenizer = load_tokenizer(path, "--piref_model")
    check_prompt_format(args.prompt_format, tokenizer)
    prompts = [format_prompt(problem.problem, args.prompt_format, tokenizer) for problem in problems]
    longest = max(map(len, prompts))
    for info in (generator, *roll_in_models):
        if longest + args.max_length > info.max_position_embeddings:
            raise UserError(
                f"the longest prompt ({longest} tokens) and --max_length {args.max_length} make {longest + args.max_length} "
                f"tokens, more than the {info.max_position_embeddings} positions of {info.path}"
            )
    for other in (Path(info.path) for info in roll_in_models if info.path != generator.path):
        if load_tokenizer(other, "--roll_in_models").get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--roll_in_models {other} has another tokenizer than --piref_model {args.piref_model}; they must share one"
            )
    urls = parse_roll_in_urls(args)
    served = {model: urls[name] for model, name in enumerate(names) if name in urls}
    stop_ids = stop_token_ids(path, tokenizer)
    return CollectionPlan(problems, prompts, generator, roll_in_models, served, tokenizer, stop_ids, engine, device)


def inspect_generator(name: str, flag: str) -> ModelInfo:
    info = inspect_model(resolve_model(name, flag), flag)
    check_generator(info, flag)
    return info


def settings_of(args: argparse.Namespace, plan: CollectionPlan) -> dict[str, Any]:
    """What decides the data: flags, the problems' texts, the models' weights."""
    texts = hashlib.sha256(repr(plan.problems).encode()).hexdigest()[:32]
    models = [info.fingerprint for info in (plan.generator, *plan.roll_in_models)]
    flags = {name: value for name, value in vars(args).items() if name not in FREE}
    return flags | {"problem_texts": texts, "num_problems": len(plan.problems), "models": models}


# ---------------------------------------------------------------------------------------------------------------------
# Collecting


async def collect(args: argparse.Namespace, plan: CollectionPlan, output: CollectionFolder, grader: Grader) -> None:
    """Roll-ins of the models that are loaded for them alone, one after the other; then everything of the generator, and
    roll-ins of models that servers have."""
    missing = output.missing()
    if not missing:
        return
    async with contextlib.AsyncExitStack() as at_end:
        served = await meet_servers(args, plan, len(missing), at_end)
        traces: dict[int, dict[int, list[int]]] = {number: {} for number in missing}  # by problem and roll-in
        now = []  # models whose roll-ins are written with the roll-outs
        for model, info in enumerate(plan.roll_in_models):
            if model not in served and info.fingerprint == plan.generator.fingerprint:
                now.append(model)
                continue
            kept = output.roll_ins(model)
            numbers = [number for number in missing if not kept.has(number)]
            if model in served:
                now.append(model)
            elif numbers:
                stage = Stage(args, plan, info, f"roll-ins of {Path(info.path).name}", len(numbers))
                await write_roll_ins(stage, model, kept, numbers)
            for number, written in kept.read().items():
                traces.get(number, {}).update(written)
            kept.close()

        stage = Stage(args, plan, plan.generator, "roll-outs", len(missing), served)

        async def work(number: int) -> None:
            found = traces.pop(number)
            wanted = [model for model in now if not stage.roll_ins_of(model) <= found.keys()]
            for written in await gather_all(sample_roll_ins(stage, number, model) for model in wanted):
                found |= written
            output.add(number, await make_row(stage, grader, number, found))

        await stage.run(missing, work)


async def meet_servers(
    args: argparse.Namespace, plan: CollectionPlan, todo: int, at_end: contextlib.AsyncExitStack
) -> dict[int, Engine]:
    """The engines of roll-in models that servers have, by model. Raises UserError where one serves something else."""
    engines = {}
    for model, urls in plan.served.items():
        info, what = plan.roll_in_models[model], f"--roll_in_models {args.roll_in_models[model]}"
        config = engine_config(args, info, plan.device, todo, requests_each(args))
        config = replace(
            config, sglang_urls=urls, model_flag="--roll_in_models", url_flag="--roll_in_url", gpu_share_given=False
        )
        engines[model] = make_engine("sglang-server", config)
        at_end.push_async_callback(engines[model].close)
        check_context(args, plan, engines[model])
        await check_vocabulary(engines[model].describe()["servers"], plan.tokenizer, info.vocab_size, what)
    return engines


def check_context(args: argparse.Namespace, plan: CollectionPlan, engine: Engine) -> None:
    """SGLang's KV pool may hold less than the model's positions. Raises UserError."""
    longest = max(map(len, plan.prompts)) + args.max_length
    if longest > engine.context_length:
        raise UserError(
            f"the longest prompt and --max_length {args.max_length} make {longest} tokens, more than the "
            f"{engine.context_length} that the {engine.name} engine takes; give a smaller --max_length"
        )


async def write_roll_ins(stage: "Stage", model: int, kept: RollIns, numbers: Sequence[int]) -> None:
    """Roll-ins of these problems by one model, kept in files: its engine makes room for the generator's."""

    async def work(number: int) -> None:
        kept.add(number, await sample_roll_ins(stage, number, model))

    await stage.run(numbers, work)


async def sample_roll_ins(stage: "Stage", number: int, model: int) -> dict[int, list[int]]:
    """Roll-ins of one problem by one model: response tokens by roll-in number; a stop token is not part of them."""
    mine = sorted(stage.roll_ins_of(model))
    requests = [stage.request(number, [], 0, roll_in) for roll_in in mine]
    replies = await stage.sample(requests, stage.served.get(model))
    stops = set(stage.plan.stop_ids)
    return {
        roll_in: reply.token_ids[:-1] if reply.token_ids[-1] in stops else reply.token_ids
        for roll_in, reply in zip(mine, replies, strict=True)
    }


async def make_row(stage: "Stage", grader: Grader, number: int, roll_ins: dict[int, list[int]]) -> dict[str, Any]:
    """One row of the data set: roll-outs from the cut roll-ins, graded."""
    args, problem = stage.args, stage.plan.problems[number]
    prefixes = [
        trace[:cut]
        for roll_in, trace in sorted(roll_ins.items())
        for cut in collection.cut_positions(
            len(trace), args.prefixes_per_roll_in, args.cut_weight, draw_seed(args.seed, number, 1, roll_in)
        )
    ] or [[]]
    starts = [(prefix, i, repeat) for i, prefix in enumerate(prefixes) for repeat in range(args.rollouts_per_prefix)]
    requests = [stage.request(number, prefix, 2, i, repeat) for prefix, i, repeat in starts]
    replies = await stage.sample(requests)
    answers = [
        extract_answer(stage.plan.decode([*prefix, *reply.token_ids]))
        for (prefix, *_), reply in zip(starts, replies, strict=True)
    ]
    labels = collection.labels_of(
        [reply.finish_reason for reply in replies],
        await grader.agrade([(problem.answer, answer) for answer in answers]),
    )
    stage.rollouts += len(labels)
    stage.right += labels.count(1)
    return vars(problem) | {
        "reward": [float(label == 1) for label in labels],
        "roll_in_ids": [request.prompt_ids for request in requests],
        "roll_outs_ids": [reply.token_ids for reply in replies], "processed_answer": answers, "labels": labels,
    }  # fmt: skip


def requests_each(args: argparse.Namespace) -> int:
    """Most requests of one problem at once: its roll-ins, then its roll-outs."""
    prefixes = max(1, args.num_roll_ins * args.prefixes_per_roll_in)
    return max(args.num_roll_ins, prefixes * args.rollouts_per_prefix)


class Stage:
    """One model's turn: its engine, and what is shown of its progress."""

    def __init__(
        self, args: argparse.Namespace, plan: CollectionPlan, model: ModelInfo, title: str, todo: int,
        served: Mapping[int, Engine] = MappingProxyType({}),
    ):  # fmt: skip
        """served: engines of roll-in models that are not the stage's own."""
        self.args, self.plan, self.title, self.todo, self.served = args, plan, title, todo, served
        self.engine = make_engine(plan.engine, engine_config(args, model, plan.device, todo, requests_each(args)))
        self.begun = time.perf_counter()
        self.done = self.tokens = self.rollouts = self.right = 0
        self.progress = Progress(self.status)

    async def run(self, numbers: Sequence[int], work: Callable[[int], Awaitable[None]]) -> None:
        """`await work(number)` for each problem, `batch_size` at once; then close the engine."""

        async def one(number: int) -> None:
            await work(number)
            self.done += 1
            self.progress.update()

        try:
            check_context(self.args, self.plan, self.engine)
            await run_bounded(numbers, one, self.args.batch_size)
            self.progress.close()
        finally:
            await self.engine.close()

    def roll_ins_of(self, model: int) -> set[int]:
        """Which roll-ins of a problem a model writes: the models take turns."""
        return set(range(model, self.args.num_roll_ins, len(self.plan.roll_in_models)))

    def request(self, number: int, prefix: Sequence[int], *key: int) -> Request:
        """A continuation of a problem's prompt and a prefix of its response."""
        args = self.args
        return Request(
            prompt_ids=[*self.plan.prompts[number], *prefix], max_new_tokens=args.max_length - len(prefix),
            temperature=args.temperature, top_p=args.top_p, stop_ids=self.plan.stop_ids,
            seed=draw_seed(args.seed, number, *key), group=str(number),
        )  # fmt: skip

    async def sample(self, requests: Sequence[Request], engine: Engine | None = None) -> list[Reply]:
        """Replies in order, of the stage's own engine or another. Raises EngineError, RequestsFailed."""
        writer = engine or self.engine
        replies = await ask_until_whole(
            lambda wanted: writer.generate([requests[i] for i in wanted]),
            [request.max_new_tokens for request in requests],
            RetryPolicy(),
        )
        self.tokens += sum(len(reply.token_ids) for reply in replies)
        return replies

    def status(self) -> str:
        seconds = time.perf_counter() - self.begun
        left = format_seconds(seconds / self.done * (self.todo - self.done)) if self.done else "?"
        right = f" | right {self.right / self.rollouts:.3f}" if self.rollouts else ""
        return f"{self.title}: {self.done}/{self.todo} problems, ETA {left} | {format_count(self.tokens / seconds)} tok/s{right}"


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def report(output: CollectionFolder) -> None:
    """Once all files are there: the data card, and its main figures on the screen. The last shard to end finds them."""
    if left := len(output.elsewhere()):
        print(f"shard {output.shard} is done: {len(output.files)} of {output.num_files} parquet files. {left} of other shards "
              "are not there yet; the shard that ends last writes the data card", flush=True)  # fmt: skip
        return
    figures = data_card.count(output)
    data_card.write_card(output, figures)
    left_out = f"{figures['dropped']} without a success left out"
    print(f"{figures['rows']} problems ({left_out}), {figures['rollouts']} roll-outs: {figures['labels']}")
    print(f"written to {output.folder}; next: train_classifier.py --data_path {output.folder}", flush=True)
    if not figures["rows"]:
        raise UserError(
            "no problem was ever solved, so there is nothing to train on; --keep_unsolved keeps such problems"
        )


def progress_of(output: CollectionFolder) -> str:
    mine = "" if output.shard == WHOLE else f" of shard {output.shard}"
    return f"{output.num_done} of {output.num_mine} problems{mine} are done"


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    enable_fast_transfers()
    args = parse_args(argv)
    folder = Path(args.output_dir)
    check_output_dir(folder)
    plan = make_plan(args)
    output = None
    try:
        with contextlib.closing(CollectionFolder(folder, settings_of(args, plan), shard_of(args))) as output:
            if output.num_done:
                logger.info("going on: %s", progress_of(output))
            quiet_transformers()
            with Grader() as grader:
                asyncio.run(run_until_signal(collect(args, plan, output, grader)))
            report(output)
        return 0
    except (Stopped, EngineError, RequestsFailed, OutputError) as error:
        done = progress_of(output) if output else f"0 of {len(plan.problems)} problems are done"
        done += "; the same command goes on"
        stopped = isinstance(error, Stopped)
        print(f"{error}: {done}" if stopped else f"error: {error} ({done})", file=sys.stderr)
        return error.status if stopped else 1


if __name__ == "__main__":
    run_script(main)
