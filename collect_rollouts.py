"""Make a training set for the value model: roll-outs of a generator, graded, in OpenR1-VM's schema.

For each problem: `--num_roll_ins` traces, by one or several models; each cut at `--prefixes_per_roll_in` places; from
each prefix `--rollouts_per_prefix` roll-outs of the fixed policy `--piref_model`; each graded as incorrect (0), correct
(1) or length-limited (2). Problems that never succeed are left out.

    # as the paper's data: 14 roll-ins x 4 nested prefixes
    python collect_rollouts.py --problems VGS-AI/OpenR1-Cleaned --piref_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
        --roll_in_models deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --output_dir rollouts
    # without roll-ins: four roll-outs from the bare prompt
    python collect_rollouts.py --problems problems.jsonl --piref_model GENERATOR --output_dir rollouts --num_roll_ins 0 \
        --rollouts_per_prefix 4 --max_length 256

Stopped at any moment, the same command goes on. `train_classifier.py --data_path rollouts` reads the result.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
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
from common_lib.devices import resolve_device
from common_lib.models import ModelInfo, check_generator, inspect_model, load_tokenizer, resolve_model, stop_token_ids
from common_lib.progress import Progress, format_count, format_seconds
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
from eval_utils import Grader, extract_answer
from training_lib.collection import (
    CUT_WEIGHTS,
    Journal,
    Output,
    SourceProblem,
    count,
    cut_positions,
    draw_seed,
    labels_of,
    load_problems,
    write_card,
)

logger = logging.getLogger("collect_rollouts")

ATTEMPTS = 3  # for a request that the engine aborts
# What may change when a stopped collection goes on; a change of anything else would change the data.
FREE = FREE_ARGUMENTS | {"output_dir", "batch_size"}


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
    flag("--cut_weight", choices=CUT_WEIGHTS, default="sqrt", help="where a trace is cut: after t tokens with probability "
         "proportional to sqrt(t), 1, or 1/sqrt(t). The paper says square-root weighted, no more: sqrt(t) is an assumption")
    flag("--rollouts_per_prefix", type=int, default=1, help="roll-outs of the fixed policy from each prefix")
    flag("--keep_unsolved", action="store_true", help="keep problems of which no roll-out succeeds")
    flag("--shard_size", type=int, default=500, help="problems of a parquet file")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--max_length", type=int, default=16384, help="response tokens of a trace, prefix included; a longer one is "
         "length-limited")
    add_sampling_flags(flag)
    flag("--seed", type=int, default=1337, help="decides cuts and, as far as the engine is deterministic, tokens")

    flag = parser.add_argument_group("generators").add_argument
    flag("--piref_model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", help="the fixed policy: folder or hub name")
    flag("--roll_in_models", nargs="+", help="models that write roll-ins, in turn (default: the fixed policy)")
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
    args.roll_in_models = args.roll_in_models or [args.piref_model]
    if args.engine == "sglang-server" and args.roll_in_models != [args.piref_model]:
        raise UserError(
            "--roll_in_models: a server serves one model; give --engine sglang, which loads one after the other"
        )
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Everything that can be checked before a model is loaded


@dataclass
class Plan:
    problems: list[SourceProblem]
    prompts: list[list[int]]
    policy: ModelInfo
    roll_in_models: list[ModelInfo]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    engine: str
    device: str


def make_plan(args: argparse.Namespace) -> Plan:
    """Read problems, configs and tokenizers, and check that all fits. Raises UserError."""
    engine, device = choose_engine(args.engine), resolve_device(args.device, "--device")
    problems = load_problems(args.problems, args.split, args.max_problems)
    path = resolve_model(args.piref_model, "--piref_model")
    policy = inspect_model(path, "--piref_model")
    check_generator(policy)
    tokenizer = load_tokenizer(path, "--piref_model")
    check_prompt_format(args.prompt_format, tokenizer)
    prompts = [format_prompt(problem.problem, args.prompt_format, tokenizer) for problem in problems]
    others = []
    for name in args.roll_in_models if args.num_roll_ins else []:
        other_path = resolve_model(name, "--roll_in_models")
        other = inspect_model(other_path, "--roll_in_models")
        check_generator(other)
        if other_path != path and load_tokenizer(other_path, "--roll_in_models").get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--roll_in_models {name} has another tokenizer than --piref_model {args.piref_model}; they must share one"
            )
        others.append(other)
    longest = max(map(len, prompts)) + args.max_length
    for info in (policy, *others):
        if longest > info.max_position_embeddings:
            raise UserError(
                f"the longest prompt ({longest - args.max_length} tokens) and --max_length {args.max_length} make {longest} "
                f"tokens, more than the {info.max_position_embeddings} positions of {info.path}"
            )
    return Plan(problems, prompts, policy, others, tokenizer, stop_token_ids(path, tokenizer), engine, device)


def settings_of(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What decides the data: flags, the problems' texts, the models' weights."""
    import hashlib

    texts = hashlib.sha256(repr(plan.problems).encode()).hexdigest()[:32]
    models = [info.fingerprint for info in (plan.policy, *plan.roll_in_models)]
    flags = {name: value for name, value in vars(args).items() if name not in FREE}
    return flags | {"problem_texts": texts, "num_problems": len(plan.problems), "models": models}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Collector:
    """Runs the problems through the engine, `batch_size` at once and without barriers between them."""

    def __init__(self, args: argparse.Namespace, plan: Plan, output: Output, grader: Grader):
        self.args, self.plan, self.output, self.grader = args, plan, output, grader
        self.begun, self.done, self.todo = time.perf_counter(), 0, 0
        self.tokens = self.rollouts = self.right = 0
        self.doing = ""
        self.progress = Progress(self.status)

    def status(self) -> str:
        seconds = time.perf_counter() - self.begun
        left = format_seconds(seconds / self.done * (self.todo - self.done)) if self.done else "?"
        right = f" | right {self.right / self.rollouts:.3f}" if self.rollouts else ""
        return f"{self.doing}: {self.done}/{self.todo} problems, ETA {left} | {format_count(self.tokens / seconds)} tok/s{right}"

    def start(self, doing: str, todo: int) -> None:
        self.doing, self.todo, self.done, self.tokens = doing, todo, 0, 0
        self.begun = time.perf_counter()

    async def generate(self, engine: Engine, requests: list[Request]) -> list[Reply]:
        """Replies in order; what the engine aborts is asked for again. Raises EngineError."""
        replies = await engine.generate(requests)
        for _ in range(ATTEMPTS):
            failed = [i for i, reply in enumerate(replies) if reply.finish_reason == "abort"]
            if not failed:
                break
            for i, reply in zip(failed, await engine.generate([requests[i] for i in failed]), strict=True):
                replies[i] = reply
        else:
            raise EngineError(f"a request was aborted {ATTEMPTS + 1} times")
        self.tokens += sum(len(reply.token_ids) for reply in replies)
        return replies

    def request(self, number: int, prefix: Sequence[int], *key: int) -> Request:
        """A continuation of a problem's prompt and a prefix of its response."""
        args = self.args
        return Request(
            prompt_ids=[*self.plan.prompts[number], *prefix], max_new_tokens=args.max_length - len(prefix),
            temperature=args.temperature, top_p=args.top_p, stop_ids=self.plan.stop_ids,
            seed=draw_seed(args.seed, number, *key), group=str(number),
        )  # fmt: skip

    async def roll_ins(self, engine: Engine, number: int, model: int) -> dict[int, list[int]]:
        """Roll-ins of one problem by one model: response tokens by roll-in number; a stop token is not part of them."""
        mine = range(model, self.args.num_roll_ins, len(self.plan.roll_in_models))
        replies = await self.generate(engine, [self.request(number, [], 0, roll_in) for roll_in in mine])
        stops = set(self.plan.stop_ids)
        return {
            roll_in: reply.token_ids[:-1] if reply.token_ids[-1] in stops else reply.token_ids
            for roll_in, reply in zip(mine, replies, strict=True)
        }

    async def row(self, engine: Engine, number: int, roll_ins: dict[int, list[int]]) -> dict[str, Any]:
        """One row of the data set."""
        args, plan = self.args, self.plan
        problem = plan.problems[number]
        prefixes = [
            trace[:cut]
            for roll_in, trace in sorted(roll_ins.items())
            for cut in cut_positions(
                len(trace), args.prefixes_per_roll_in, args.cut_weight, draw_seed(args.seed, number, 1, roll_in)
            )
        ] or [[]]
        requests = [
            self.request(number, prefix, 2, place, repeat)
            for place, prefix in enumerate(prefixes)
            for repeat in range(args.rollouts_per_prefix)
        ]
        replies = await self.generate(engine, requests)
        prefix_of = [prefix for prefix in prefixes for _ in range(args.rollouts_per_prefix)]
        texts = [self.decode([*prefix, *reply.token_ids]) for prefix, reply in zip(prefix_of, replies, strict=True)]
        answers = [extract_answer(text) for text in texts]
        right = await self.grader.agrade([(problem.answer, answer) for answer in answers])
        labels = labels_of([reply.finish_reason for reply in replies], right)
        self.rollouts += len(labels)
        self.right += labels.count(1)
        return {
            "message_id": problem.message_id, "problem": problem.problem, "solution": problem.solution,
            "answer": problem.answer, "reward": [float(label == 1) for label in labels],
            "roll_in_ids": [request.prompt_ids for request in requests],
            "roll_outs_ids": [reply.token_ids for reply in replies], "processed_answer": answers, "labels": labels,
        }  # fmt: skip

    def decode(self, ids: list[int]) -> str:
        return self.plan.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    async def each(self, numbers: Sequence[int], work) -> None:
        """`await work(number)` for each, `batch_size` at once. The first error ends all."""
        queue = iter(numbers)

        async def worker() -> None:
            for number in queue:
                await work(number)
                self.done += 1
                self.progress.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.args.batch_size, len(numbers))):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def run(self) -> None:
        """Roll-ins of the models that are not the policy, one model after the other; then everything of the policy."""
        args, plan = self.args, self.plan
        missing = self.output.missing()
        written = []  # (model, journal)
        for model, info in enumerate(plan.roll_in_models):
            if info.fingerprint != plan.policy.fingerprint:
                written.append((model, Journal(self.output.work / f"roll_ins-{model:02d}.jsonl")))
                await self._write_roll_ins(model, info, written[-1][1], missing)
        if not missing:
            return
        known: dict[int, dict[int, list[int]]] = {number: {} for number in missing}
        for _, journal in written:
            for record in journal.records():
                known.get(record["i"], {}).update({int(key): ids for key, ids in record["roll_ins"].items()})
        inline = [
            model for model, info in enumerate(plan.roll_in_models) if info.fingerprint == plan.policy.fingerprint
        ]
        engine = make_engine(plan.engine, engine_config(args, plan.policy, plan.device))

        async def work(number: int) -> None:
            roll_ins = known.pop(number)
            for model in inline:
                roll_ins |= await self.roll_ins(engine, number, model)
            self.output.add(number, await self.row(engine, number, roll_ins))

        self.start("roll-outs", len(missing))
        try:
            await self.each(missing, work)
            self.progress.close()
        finally:
            await engine.close()

    async def _write_roll_ins(self, model: int, info: ModelInfo, journal: Journal, missing: Sequence[int]) -> None:
        todo = [number for number in missing if number not in journal.done]
        if not todo:
            return
        engine = make_engine(self.plan.engine, engine_config(self.args, info, self.plan.device))

        async def work(number: int) -> None:
            journal.add(number, {"roll_ins": await self.roll_ins(engine, number, model)})

        self.start(f"roll-ins of {Path(info.path).name}", len(todo))
        try:
            await self.each(todo, work)
            self.progress.close()
        finally:
            await engine.close()


class Stopped(Exception):
    """A signal ended the run in order."""

    def __init__(self, number: int):
        self.number = number


async def run_until_signal(collector: Collector) -> None:
    """Run to the end, or to SIGINT or SIGTERM: `Stopped`. The second signal ends the process at once."""
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    received: list[tuple[int, float]] = []

    def stop(number: int) -> None:
        if received and time.monotonic() - received[0][1] > 1:
            os._exit(128 + number)
        if not received:
            received.append((number, time.monotonic()))
            this.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        await collector.run()
    except asyncio.CancelledError:
        if not received:
            raise
        raise Stopped(received[0][0]) from None


def report(args: argparse.Namespace, output: Output, settings: dict[str, Any]) -> None:
    """The data card, and its main figures on the screen."""
    figures = count(output)
    roll_ins = (
        f"Roll-ins are cut after t response tokens with probability proportional to {args.cut_weight} of t, without "
        "repetition (the paper says only that positions are square-root weighted; this reading is an assumption)."
    )
    write_card(
        output, figures, settings, roll_ins if args.num_roll_ins else "Every roll-out starts at the bare prompt."
    )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in figures["labels"].items())
    print(
        f"{figures['rows']} problems ({figures['dropped']} without a success left out), {figures['rollouts']} roll-outs: {shares}"
    )
    print(f"written to {output.folder}; next: train_classifier.py --data_path {output.folder}", flush=True)
    if not figures["rows"]:
        raise UserError(
            "no problem was ever solved, so there is nothing to train on; --keep_unsolved keeps such problems"
        )


def main(argv: Sequence[str] | None = None) -> int:
    set_up_logging()
    enable_fast_transfers()
    args = parse_args(argv)
    plan = make_plan(args)
    settings = settings_of(args, plan)
    folder = Path(args.output_dir)
    with closing(Output(folder, settings, len(plan.problems), args.shard_size, args.keep_unsolved)) as output:
        output.write_whole_shards()
        missing = len(output.missing())
        if missing < len(plan.problems):
            logger.info("going on: %d of %d problems are done", len(plan.problems) - missing, len(plan.problems))
        quiet_transformers()
        try:
            with Grader() as grader:
                asyncio.run(run_until_signal(Collector(args, plan, output, grader)))
        except Stopped as stop:
            done = len(plan.problems) - len(output.missing())
            name = signal.Signals(stop.number).name
            print(
                f"{name}: {done} of {len(plan.problems)} problems are done; the same command goes on", file=sys.stderr
            )
            return 128 + stop.number
        except EngineError as error:
            done = len(plan.problems) - len(output.missing())
            print(
                f"error: {error} ({done} of {len(plan.problems)} problems are done; the same command goes on)",
                file=sys.stderr,
            )
            return 1
        report(args, output, settings)
    return 0


if __name__ == "__main__":
    run_script(main)
