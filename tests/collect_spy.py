"""collect_rollouts.py in this process, with an engine and a grader that note what reaches them and cost nothing."""

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tiny import save_generator, tiny_tokenizer

import collect_rollouts
from engine_lib.base import EngineConfig, Reply, Request

STOPS = (256, 257)  # the tokenizer's, and one more of the generation config
ANSWERS = ["0", "1", "2", "0", "1", "never"]  # of the six problems; what the spy boxes is one of 0 .. 3
TOKENIZER = tiny_tokenizer()


def make_inputs(folder: Path) -> Path:
    """Three generators with one tokenizer and two stop tokens, and six problems."""
    for seed, name in enumerate(("policy", "other", "third")):
        save_generator(folder / name, seed=seed)
        (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOPS)}))
    write_problems(folder / "problems.jsonl", ANSWERS)
    return folder


def write_problems(path: Path, answers: list[str]) -> Path:
    rows = [{"problem": f"Problem {i}?", "answer": answer, "solution": f"s{i}"} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


@dataclass
class SpyEngine:
    """Writes random letters, then mostly a boxed digit and one of the stop tokens: a function of the request and of which
    model it is. The first letter is the model's: p, o or t."""

    run: "Run"
    name: str
    config: EngineConfig
    context_length: int = 2048
    vocab_size: int = 264
    requests: list[Request] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    closed: bool = False

    async def generate(self, requests: list[Request]) -> list[Reply]:
        self.run.running += 1
        self.run.most_at_once = max(self.run.most_at_once, self.run.running)
        for _ in range(1 + requests[0].seed % 41):  # they end in another order than they began
            await asyncio.sleep(0)
        replies = [self.write(request) for request in requests]
        self.requests += requests
        self.replies += replies
        self.run.running -= 1
        return replies

    def write(self, request: Request) -> Reply:
        draws = random.Random(repr((request.seed, Path(self.config.model_path).name)))
        letters = [Path(self.config.model_path).name[0], *draws.choices("abcdefghijk", k=draws.randint(6, 16))]
        ids = [*encode("".join(letters) + f"</think> \\boxed{{{draws.randrange(4)}}}"), draws.choice(STOPS)]
        reason = "stop"
        if draws.random() < 0.3 or len(ids) > request.max_new_tokens:
            reason, ids = "length", encode("".join(draws.choices("lmnop", k=request.max_new_tokens)))
            ids[0] = encode(letters[0])[0]
        return Reply(ids, reason, len(request.prompt_ids))

    async def close(self) -> None:
        self.closed = True

    def describe(self) -> dict[str, Any]:
        return {"servers": dict.fromkeys(self.config.sglang_urls)}


class SpyGrader:
    """Equal texts are equal."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    async def agrade(self, pairs):
        await asyncio.sleep(0)
        return [truth == answer for truth, answer in pairs]


@dataclass
class Run:
    """What a collection asked of its engines, and what it left."""

    folder: Path
    engines: list[SpyEngine] = field(default_factory=list)
    running: int = 0
    most_at_once: int = 0
    status: int | None = None
    checked: list[tuple] = field(default_factory=list)  # servers whose vocabulary was asked for, embeddings, what for

    @property
    def config(self) -> EngineConfig:
        return self.engines[-1].config

    @property
    def exchanges(self) -> list[tuple[Request, Reply]]:
        return [both for engine in self.engines for both in zip(engine.requests, engine.replies, strict=True)]

    @property
    def requests(self) -> list[Request]:
        return [request for request, _ in self.exchanges]

    @property
    def seeds(self) -> set[int]:
        return {request.seed for request in self.requests}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for path in sorted(self.folder.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]

    @property
    def prompts(self) -> dict[str, list[int]]:
        """By group: the shortest of what was asked is the bare prompt."""
        found: dict[str, list[int]] = {}
        for request in sorted(self.requests, key=lambda request: len(request.prompt_ids)):
            found.setdefault(request.group, request.prompt_ids)
        return found

    def of_kind(self, roll_ins: bool) -> list[tuple[Request, Reply]]:
        """Roll-ins start at the bare prompt, roll-outs after it (with roll-ins of two tokens and more)."""
        prompts = self.prompts
        return [both for both in self.exchanges if (both[0].prompt_ids == prompts[both[0].group]) == roll_ins]


def flags(inputs: Path, output: Path, **changes: Any) -> list[str]:
    """Command line; None leaves a flag out, True gives it alone, a list gives several values."""
    settings = {
        "problems": inputs / "problems.jsonl", "piref_model": inputs / "policy", "output_dir": output, "max_length": 60,
        "num_roll_ins": 3, "prefixes_per_roll_in": 2, "rollouts_per_prefix": 2, "shard_size": 4,
        "engine": "transformers", "device": "cpu", "temperature": 0.9, "top_p": 0.8, "batch_size": 4, "seed": 3,
    }  # fmt: skip
    words: list[str] = []
    for name, value in (settings | changes).items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += (
                [word for text in values for word in (f"--{name}", text)]
                if name == "roll_in_url"
                else [f"--{name}", *map(str, values)]
            )
    return words


def collect(patch: Callable, inputs: Path, output: Path, **changes: Any) -> Run:
    """patch: `monkeypatch.setattr`."""
    run = Run(output)

    def make_engine(name: str, config: EngineConfig) -> SpyEngine:
        run.engines.append(SpyEngine(run, name, config))
        return run.engines[-1]

    async def check_vocabulary(urls, tokenizer, num_embeddings, what):
        run.checked.append((list(urls), num_embeddings, what))

    patch(collect_rollouts, "make_engine", make_engine)
    patch(collect_rollouts, "check_vocabulary", check_vocabulary)
    patch(collect_rollouts, "Grader", SpyGrader)
    run.status = collect_rollouts.main(flags(inputs, output, **changes))
    return run
