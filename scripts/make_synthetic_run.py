"""Write a search run whose truth is known: the real search and its files, with a simulated generator and value model.

    # full size: 30 problems x 16 repetitions x 8 candidates x 16k tokens, 0.7 GB
    python scripts/make_synthetic_run.py runs/full.jsonl
    # the baseline on the same problems; a small one
    python scripts/make_synthetic_run.py runs/bon.jsonl --search_type bon
    python scripts/make_synthetic_run.py runs/small.jsonl --problems 6 --repetitions 4 --max_length 800 --block_size 200

The simulated process: problem i has success rate p_i ~ Beta(a, b). Every block moves a trace's success probability p to
Beta(c p, c (1 - p)), whose mean is p, and a trace that ends is correct with its last p. A value is that p, with
normal noise of `--noise` added to its logit. So with `--noise 0` and without selection (`beam1`, `bon`) the values
are calibrated exactly.
"""

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from common_lib.concurrency import run_bounded
from data_utils import Problem
from engine_lib.base import Reply
from eval_utils import extract_answer
from search_lib.run_files import FORMAT, RunFiles, RunPaths
from search_lib.scorers import Scored
from search_lib.search import search
from search_lib.tree import Round, SearchConfig, SearchResult, SearchTask, Tree, parse_search_type

VOCAB_SIZE = 151_936
STOP_ID = 151_643
ANSWER_TOKENS = 12  # room for the closing line with the box; a block is never shorter
CONCENTRATION = 6.0  # how fast a trace's fate is settled: high is slow
CHARACTERS_PER_TOKEN = 4
RELEASED_KEYS = 10
SENTENCES = (
    "Let me write the condition as a_{n} = {n} and see what follows for the next term.",
    "Wait, I should double-check the case where the remainder modulo {n} is zero.",
    "So the area of the triangle is {n}/2, which means the height must be {n}.",
    "Hmm, if x > {n} then the left side grows faster, so there are only finitely many cases.",
    "By symmetry we may assume a <= b <= c; this leaves {n} ordered triples to count.",
    "Substituting back gives x^2 - {n}x + 1 = 0, and its discriminant is a perfect square.",
    "Alternatively, use generating functions: the coefficient of t^{n} is what we want.",
    "That does not look right: {n} is not divisible by 7. Let me go through it again.\n",
    "Therefore the sum telescopes and equals {n}.\n\n",
)


@dataclass
class Options:
    """What a synthetic run looks like; the defaults are the full-size run of the project's checks."""

    problems: int = 30
    repetitions: int = 16
    num_blocks: int = 8
    search_type: str = "beam2"
    block_size: int = 4096
    max_length: int = 16_384
    early_stop: float = 0.05  # chance that a block which is not the last one ends the trace
    beta: tuple[float, float] = (0.5, 0.5)
    noise: float = 1.0
    seed: int = 0
    released: bool = False  # only the released code's ten keys, no tree, no settings
    problem_texts: list[str] = field(default_factory=list)

    def config(self) -> SearchConfig:
        """Raises UserError for numbers that do not fit together."""
        shape = parse_search_type(self.search_type, self.num_blocks, self.block_size, self.max_length)
        return SearchConfig(*shape, self.max_length, seed=self.seed)


def make_synthetic_run(path: Path, options: Options) -> None:
    """Write `path` and, unless `options.released`, its `.meta.json` and `.tree.jsonl`. Same options, same bytes, apart
    from the dates of the meta file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths, run_meta = RunPaths.of(str(path)), meta(options)
    for old in (paths.results, paths.tree, paths.meta):
        old.unlink(missing_ok=True)
    with RunFiles.open(paths, run_meta) as files:
        asyncio.run(SyntheticRun(options, files).search_all())
        files.sort_results()
        files.note_session(14_400.0, "none (synthetic)")
    if options.released:
        paths.tree.unlink()
        paths.meta.unlink()


class SyntheticRun:
    """The searches of a run. Everything random comes from generators of its own kind, so that the order does not count."""

    def __init__(self, options: Options, files: RunFiles):
        self.options, self.files, self.config = options, files, options.config()
        self.problems, self.rates = make_problems(options, np.random.default_rng([options.seed, 1]))
        self.text = PieceText(np.random.default_rng([options.seed, 2]), max(400_000, 16 * options.max_length))

    async def search_all(self) -> None:
        prompt_rng = np.random.default_rng([self.options.seed, 3])
        prompts = [prompt_rng.integers(0, STOP_ID, size=60 + len(p.problem) // 4).tolist() for p in self.problems]
        tasks = [
            SearchTask(data_idx, repeat_idx, tuple(prompt))
            for repeat_idx in range(self.options.repetitions)
            for data_idx, prompt in enumerate(prompts)
        ]
        await run_bounded(tasks, self.search_one, 4)  # a few at once: lines of different searches interleave

    async def search_one(self, task: SearchTask) -> None:
        gold, rate = int(self.problems[task.data_idx].answer), self.rates[task.data_idx]
        model = SimulatedModels(self.options, task, gold, rate, self.text)
        result = await search(task, model.generate, model, self.config, on_round=self.write_round)
        result.seconds = 1.0 + sum(record.seconds for record in result.tree.rounds)
        row = result_row(result, self.problems, self.text)
        self.files.add_result(dict(list(row.items())[:RELEASED_KEYS]) if self.options.released else row)

    def write_round(self, task: SearchTask, tree: Tree, record: Round) -> None:
        """With times as of real models, in place of the simulation's own."""
        rng = np.random.default_rng([self.options.seed, 4, task.data_idx, task.repeat_idx, record.round])
        record.seconds_generate, record.seconds_score = 30 + 20 * float(rng.random()), 1 + float(rng.random())
        record.seconds = record.seconds_generate + record.seconds_score
        self.files.add_round(task, record, [self.text.decode(tokens) for tokens in record.tokens])


# ---------------------------------------------------------------------------------------------------------------------
# The simulated models


class SimulatedModels:
    """Generator and value model of one search, which know how likely each trace is to end right."""

    def __init__(self, options: Options, task: SearchTask, gold: int, rate: float, text: "PieceText"):
        self.options, self.gold, self.text = options, gold, text
        # What is known of a trace, prompt included, by its tokens: its success probability and its value.
        self.known: dict[tuple[int, ...], tuple[float, float]] = {task.prompt_ids: (rate, math.nan)}
        self.paths: list[tuple[int, ...]] = []  # by node number
        self.prompt_tokens = len(task.prompt_ids)

    async def generate(self, prompt_ids: list[int], n: int, limit: int, seeds: list[int], tree_id: str) -> list[Reply]:
        parent = tuple(prompt_ids)
        last = len(prompt_ids) - self.prompt_tokens + limit == self.options.max_length
        replies = []
        for seed in seeds:
            rng = np.random.default_rng([seed, *self.options.search_type.encode()])
            probability, reply = self.extend(parent, limit, last, rng)
            value = noisy(probability, self.options.noise, rng)
            self.known[parent + tuple(reply.token_ids)] = probability, value
            replies.append(reply)
        return replies

    def extend(self, parent: tuple[int, ...], room: int, last: bool, rng) -> tuple[float, Reply]:
        """One candidate: its success probability, and a block of at most `room` tokens that may end the trace."""
        before = self.known[parent][0]
        probability = float(rng.beta(CONCENTRATION * max(before, 1e-3), CONCENTRATION * max(1 - before, 1e-3)))
        ends = last or rng.random() < self.options.early_stop
        correct = rng.random() < probability
        endless = last and not correct and rng.random() < 0.25
        cached = len(parent) if len(parent) > self.prompt_tokens else 0
        if not ends or endless:
            return probability, Reply(self.text.block(rng, room), "length", len(parent), cached)
        answer = str(self.gold) if correct else wrong_answer(self.gold, rng) if rng.random() >= 0.05 else None
        said = "I could not find it." if answer is None else f"**Answer:** \\boxed{{{answer}}}"
        closing = [*self.text.encode(f"\n</think>\n\n{said}"), STOP_ID]
        length = int(rng.integers(max(ANSWER_TOKENS, room * 7 // 10), room + 1))
        return probability, Reply(self.text.block(rng, length - len(closing)) + closing, "stop", len(parent), cached)

    def start(self, tree_id: str, prompt_ids: Sequence[int], history) -> None:
        self.paths = [tuple(prompt_ids)]

    async def score(self, tree_id: str, items, finished) -> Scored:
        tokens_scored = sum(len(tokens) for _, tokens in items)
        if len(self.paths) == 1:
            tokens_scored += self.prompt_tokens
        fresh = [self.paths[parent] + tuple(tokens) for parent, tokens in items]
        self.paths += fresh
        return Scored([self.known[path][1] for path in fresh], 0.0, tokens_scored)

    def keep(self, tree_id: str, nodes) -> None:
        """Nothing is cached."""

    def release(self, tree_id: str) -> None:
        """Goes with the object."""


def noisy(probability: float, noise: float, rng: np.random.Generator) -> float:
    """The value of a trace: its success probability with normal noise on the logit."""
    clipped = min(max(probability, 1e-4), 1 - 1e-4)
    logit = math.log(clipped / (1 - clipped)) + noise * float(rng.standard_normal())
    return 1 / (1 + math.exp(-logit))


def wrong_answer(gold: int, rng: np.random.Generator) -> str:
    """One of few attractive mistakes, so that wrong answers can win votes."""
    return str(gold + int(rng.choice([1, 2, 10, 7], p=[0.55, 0.25, 0.15, 0.05])))


class PieceText:
    """A long stretch of harmless reasoning, of which blocks are slices; a token is four characters."""

    def __init__(self, rng: np.random.Generator, characters: int):
        self.ids: dict[str, int] = {}
        self.pieces: dict[int, str] = {STOP_ID: ""}
        sentences: list[str] = []
        while sum(map(len, sentences)) < characters:
            numbers = rng.integers(2, 999, size=(100, len(SENTENCES)))
            sentences += [
                sentence.replace("{n}", str(number)) + " "
                for row in numbers
                for sentence, number in zip(SENTENCES, row, strict=True)
            ]
        self.stretch = self.encode("".join(sentences))

    def encode(self, text: str) -> list[int]:
        ids = []
        for start in range(0, len(text), CHARACTERS_PER_TOKEN):
            piece = text[start : start + CHARACTERS_PER_TOKEN]
            if piece not in self.ids:
                token = self.ids[piece] = len(self.ids) * 7919 % STOP_ID  # all over the vocabulary; 7919 is a prime
                self.pieces[token] = piece
            ids.append(self.ids[piece])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self.pieces[token] for token in ids])

    def block(self, rng: np.random.Generator, length: int) -> list[int]:
        start = int(rng.integers(0, len(self.stretch) - length))
        return self.stretch[start : start + length]


# ---------------------------------------------------------------------------------------------------------------------
# Problems, and what the files say


def make_problems(options: Options, rng: np.random.Generator) -> tuple[list[Problem], list[float]]:
    """Problems and their success rates, the same for every search type; texts may be given."""
    problems, rates = [], []
    for data_idx in range(options.problems):
        a, b, c = (int(value) for value in rng.integers(2, 99, size=3))
        text = f"Find the remainder when {a}^{{{b}}} + {c} is divided by 1000. (Synthetic problem {data_idx}.)"
        if data_idx < len(options.problem_texts):
            text = options.problem_texts[data_idx]
        rates.append(float(rng.beta(*options.beta)))
        problems.append(Problem(text, str(int(rng.integers(1, 985)))))
    return problems, rates


def result_row(result: SearchResult, problems: Sequence[Problem], text: PieceText) -> dict[str, object]:
    """The line of X.jsonl."""
    task, tree = result.task, result.tree
    problem, responses = problems[task.data_idx], [tree.response(node) for node in result.beams]
    answers = [extract_answer(text.decode(ids)) for ids in responses]
    totals = ("tokens_scored", "tokens_reread", "tokens_cached", "seconds_generate", "seconds_score")
    return {
        "repeat_idx": task.repeat_idx,
        "data_idx": task.data_idx,
        "global_idx": task.repeat_idx * len(problems) + task.data_idx,
        "problem": problem.problem,
        "gt_answer": problem.answer,
        "generated_ids": responses,
        "generated_scores": [tree.value[node] for node in result.beams],
        "processed_answer": answers,
        "reward": [answer == problem.answer for answer in answers],
        "dt": result.seconds,
        "finish_reasons": [tree.finish[node] for node in result.beams],
        "prompt_tokens": len(task.prompt_ids),
        "tokens_generated": sum(map(len, tree.tokens)),
        **{name: result.total(name) for name in totals},
    }


def qwen2_shape(layers: int, hidden: int, intermediate: int, heads: int, key_value_heads: int) -> dict[str, object]:
    """The shape of a Qwen2 model as `meta.json` gives it (parameters counted without biases and norms)."""
    head_dim, embedding = hidden // heads, 2 * VOCAB_SIZE * hidden
    layer = hidden * head_dim * (2 * heads + 2 * key_value_heads) + 3 * hidden * intermediate
    return {
        "path": f"synthetic-{hidden}", "fingerprint": "0" * 16, "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
        "head_dim": head_dim, "vocab_size": VOCAB_SIZE, "num_parameters": layers * layer + embedding,
        "num_parameters_embedding": embedding, "tie_word_embeddings": False,
    }  # fmt: skip


def meta(options: Options) -> dict[str, object]:
    """`X.meta.json` of the synthetic run: a 7B generator and a 1.5B value model."""
    names = ("search_type", "num_blocks", "block_size", "max_length", "seed")
    arguments = {name: getattr(options, name) for name in names}
    return {
        "format": FORMAT,
        "arguments": arguments | {"num_repetitions": options.repetitions, "selection": "value"},
        "versions": {"synthetic": "1"},
        "num_problems": options.problems,
        "benchmark": "synthetic",
        "generator": qwen2_shape(28, 3584, 18_944, 28, 4),
        "value_model": qwen2_shape(28, 1536, 8960, 12, 2) | {"num_labels": 3},
        "engine": {"name": "synthetic"},
        "started": "2026-01-01T00:00:00+00:00",
        "search": options.config().to_json() | {"num_blocks": options.num_blocks},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: every option of `Options` except texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_path", type=Path)
    for name in ("problems", "repetitions", "num_blocks", "block_size", "max_length", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Options, name))
    parser.add_argument("--search_type", default="beam2", help="beamB or bon")
    parser.add_argument("--early_stop", type=float, default=Options.early_stop)
    parser.add_argument("--noise", type=float, default=Options.noise)
    parser.add_argument("--beta", type=float, nargs=2, default=Options.beta, metavar=("A", "B"))
    parser.add_argument("--released", action="store_true", help="only the released code's ten keys, no tree")
    arguments = vars(parser.parse_args(argv))
    path = arguments.pop("output_path")
    make_synthetic_run(path, Options(**(arguments | {"beta": tuple(arguments["beta"])})))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
