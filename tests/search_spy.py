"""inference_eval.main in this process with spies below its loaders: what reaches engine, value model and tracker.

Engine, scorer and tracker are replaced at the last line before their libraries, so that everything between a flag and
them is the real code. The value model is a real one; the generator is a pure function of what it is asked.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import tiny
import torch
from fake_value import FakeValueEngine

import classifier_lib
import inference_eval
from common_lib import tracking
from engine_lib import choose
from engine_lib.base import Reply, Request
from eval_lib.stopping import Stopping
from search_lib import served_scorer

STOP = 256
TOKENIZER = tiny.tiny_tokenizer()
LETTERS = TOKENIZER("abcdefghijklmnop", add_special_tokens=False).input_ids
ENDINGS = [
    [*TOKENIZER(rf"</think>\boxed{{{n}}}", add_special_tokens=False).input_ids, STOP] for n in (0, 2, 4, 6)
]  # fmt: skip  # the right answers of the four problems
ENDING = len(ENDINGS[0])


def block(limit: int, key: object, stop_share: float = 0.3) -> list[int]:
    """Tokens that depend on the key alone: letters, or an answer at the end of a block that stops."""
    rng = random.Random(repr(key))
    if limit >= ENDING and rng.random() < stop_share:
        return [*rng.choices(LETTERS, k=rng.randint(0, limit - ENDING)), *rng.choice(ENDINGS)]
    return rng.choices(LETTERS, k=limit)


def by_seed(request: Request, nth: int) -> list[int]:
    return block(request.max_new_tokens, (request.prompt_ids, request.seed))


def by_count(request: Request, nth: int) -> list[int]:
    """Like `by_seed`, but by how often this prompt was given in this search."""
    return block(request.max_new_tokens, (request.prompt_ids, nth))


@dataclass
class Seen:
    """What the spies saw of one or several runs."""

    engines: list[tuple[str, object]] = field(default_factory=list)  # name, EngineConfig
    requests: list[Request] = field(default_factory=list)
    most_searches: int = 0  # that asked at once
    loaded: list[tuple[str, dict]] = field(default_factory=list)  # value models: path, keywords
    moved: list[str] = field(default_factory=list)  # devices that a value model was sent to
    scorers: list[classifier_lib.ValueScorer] = field(default_factory=list)
    value_engines: list[tuple[str, FakeValueEngine]] = field(default_factory=list)
    stoppings: list[Stopping] = field(default_factory=list)
    checked: list[object] = field(default_factory=list)  # ValueConfig of served value models
    trackers: list["SpyTracker"] = field(default_factory=list)
    output: Path = Path()
    status: int | None = None

    @property
    def config(self):
        return self.engines[-1][1]

    @property
    def value_config(self):
        return self.value_engines[-1][1].config

    @property
    def seeds(self) -> list[int]:
        return [request.seed for request in self.requests]

    @property
    def rows(self) -> list[dict]:
        return read(self.output)

    @property
    def rounds(self) -> list[dict]:
        return read(self.output.with_name(self.output.stem + ".tree.jsonl"))

    @property
    def meta(self) -> dict:
        return json.loads(self.output.with_name(self.output.stem + ".meta.json").read_text(encoding="utf-8"))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class SpyEngine:
    """Notes its requests. `fail_after`: calls until it dies; `context`: that it says it has."""

    vocab_size = 264

    def __init__(self, name, config, seen: Seen, write, fail_after: int | None, context: int = 1 << 20):
        self.name, self.config, self.seen, self.write, self.context_length = name, config, seen, write, context
        self.left, self.asked, self.inside = fail_after, Counter(), Counter()
        seen.engines.append((name, config))

    def describe(self):
        return {"name": self.name}

    async def generate(self, requests):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise inference_eval.EngineError("the spy died")
        self.seen.requests += requests
        replies = []
        for request in requests:
            key = request.group, tuple(request.prompt_ids)
            tokens = self.write(request, self.asked[key])
            self.asked[key] += 1
            replies.append(Reply(tokens, "stop" if tokens[-1] == STOP else "length", len(request.prompt_ids), 3))
        group = requests[0].group
        self.inside[group] += 1
        self.seen.most_searches = max(self.seen.most_searches, sum(count > 0 for count in self.inside.values()))
        for _ in range(20):
            await asyncio.sleep(0)
        self.inside[group] -= 1
        return replies

    async def close(self): ...


class SpyTracker(tracking.Tracker):
    """Notes what it is made with and what is logged."""

    def __init__(self, kind, project, run_id, tags):
        super().__init__(run_id, f"{kind} of the test")
        self.kind, self.project, self.configs, self.metrics, self.closed = kind, project, {}, [], 0

    def send_configs(self, configs):
        assert not self.metrics  # before the first metrics
        self.configs |= configs

    def send_metrics(self, metrics, step):
        self.metrics.append((step, metrics))

    def send_rest(self, seconds):
        self.closed += 1


def watch_value_model(seen: Seen, stack: ExitStack) -> None:
    model_class, scorer_class = classifier_lib.Qwen2ForClassifier, classifier_lib.ValueScorer
    load = model_class.from_pretrained

    def from_pretrained(path, **keywords):
        seen.loaded.append((str(path), keywords))
        model = load(path, **keywords)
        model.to = lambda device: seen.moved.append(device) or model  # a GPU that is not here
        return model

    def scorer(*arguments, **keywords):
        seen.scorers.append(scorer_class(*arguments, **keywords))
        return seen.scorers[-1]

    stack.enter_context(mock.patch.object(model_class, "from_pretrained", from_pretrained))
    stack.enter_context(mock.patch.object(classifier_lib, "ValueScorer", scorer))


def run(
    argv: list[str],
    write: Callable = by_seed,
    fail_after: int | None = None,
    seen: Seen | None = None,
    value_engine: dict | None = None,
):
    """`main(argv)`, and what was seen. Two GPUs seem to be there, with 1 GB free. value_engine: settings of a
    FakeValueEngine."""
    seen = seen or Seen()
    seen.output = Path(argv[len(argv) - 1 - argv[::-1].index("--output_path") + 1])
    with ExitStack() as stack:
        engines = {
            name: lambda config, name=name: SpyEngine(name, config, seen, write, fail_after) for name in choose.ENGINES
        }

        def tracker(kind):
            return lambda *arguments: seen.trackers.append(SpyTracker(kind, *arguments)) or seen.trackers[-1]

        def value(kind):
            def make(config):
                seen.value_engines.append((kind, FakeValueEngine(config, **value_engine or {})))
                return seen.value_engines[-1][1]

            return make

        async def check(engine, config):
            seen.checked.append(config)

        stops = inference_eval.RunStops
        stack.enter_context(
            mock.patch.object(inference_eval, "RunStops", lambda *a: seen.stoppings.append(a[0]) or stops(*a))
        )
        stack.enter_context(mock.patch.object(served_scorer, "check_values", check))
        stack.enter_context(mock.patch.dict(choose.ENGINES, engines))
        stack.enter_context(mock.patch.dict(choose.VALUE_ENGINES, {kind: value(kind) for kind in choose.VALUE_ENGINES}))
        stack.enter_context(mock.patch.dict(tracking.TRACKERS, {kind: tracker(kind) for kind in tracking.TRACKERS}))
        watch_value_model(seen, stack)
        for name, value in {"device_count": 2, "is_available": False, "get_device_name": "a GPU"}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
        stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9)))
        stack.enter_context(mock.patch.object(torch.cuda, "set_device", lambda device: None))
        seen.status = inference_eval.main(argv)
    return seen


def write_inputs(folder: Path) -> None:
    """Models, their likes with other weights and under other names, and benchmarks."""
    tiny.save_generator(folder / "generator")
    tiny.save_generator(folder / "generator_copy")
    tiny.save_generator(folder / "other_generator", seed=7)
    tiny.save_value_model(folder / "value")
    tiny.save_value_model(folder / "value_copy")
    tiny.save_value_model(folder / "other_value", seed=8)
    for name, sign in (("problems", "+"), ("problems_copy", "+"), ("others", "plus")):
        rows = [{"problem": f"What is {i} {sign} {i}?", "answer": str(2 * i)} for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def base_flags(folder: Path, output: Path) -> list[str]:
    """Four problems of two repetitions and four rounds, each of two beams of two candidates."""
    flags = {
        "benchmark": folder / "problems.jsonl", "piref_model": folder / "generator",
        "classifier_ckpt_path": folder / "value", "output_path": output, "engine": "transformers", "num_blocks": 4,
        "block_size": 12, "max_length": 48, "num_repetitions": 2,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
