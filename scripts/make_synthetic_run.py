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

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np

from common_lib.cli import ArgumentParser, run_script
from common_lib.files import write_text
from common_lib.virtual_time import run_virtual
from data_utils import Problem
from engine_lib.base import Reply
from eval_lib.stopping import Stopping
from eval_utils import Grader
from search_lib.results import ResultRows
from search_lib.run_files import FORMAT, RunFiles, RunPaths
from search_lib.run_stopping import RunStops
from search_lib.runner import SearchRunner
from search_lib.scorers import Scored
from search_lib.search_progress import SearchProgress
from search_lib.tree import SearchConfig, parse_search_type

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
    paths = RunPaths.of(str(path))
    for old in (paths.results, paths.tree, paths.meta):
        old.unlink(missing_ok=True)
    problems, rates = make_problems(options, np.random.default_rng([options.seed, 1]))
    text = PieceText(np.random.default_rng([options.seed, 2]), max(400_000, 16 * options.max_length))
    rng = np.random.default_rng([options.seed, 3])
    prompts = [rng.integers(0, STOP_ID, size=60 + len(problem.problem) // 4).tolist() for problem in problems]
    models = SimulatedModels(options, [int(problem.answer) for problem in problems], rates, text)
    with RunFiles(paths, meta(options)) as files, Grader() as grader:
        rows = ResultRows(problems, text.decode, grader)
        every = Stopping("none", "weighted", 0.05, options.repetitions, options.config().num_beams)
        stops = RunStops(every, files, range(len(prompts)), grader.answer_classes)
        progress = SearchProgress(stops, options.config())
        runner = SearchRunner(models.generate, models, options.config(), files, rows, stops, progress)
        # A few at once: lines of different searches interleave. In virtual time: it takes as long as the work.
        run_virtual(runner.run(dict(enumerate(prompts)), options.repetitions, batch_size=4))
        files.sort_results()
        files.note_session(14_400.0, "none (synthetic)")
    if options.released:
        lines = [dict(list(row.items())[:RELEASED_KEYS]) for row in map(json.loads, path.open(encoding="utf-8"))]
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
        paths.tree.unlink()
        paths.meta.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The simulated models


class SimulatedModels:
    """Generator and value model that know how likely each trace is to end right, and take as long as real ones."""

    def __init__(self, options: Options, golds: Sequence[int], rates: Sequence[float], text: "PieceText"):
        self.options, self.golds, self.rates, self.text = options, golds, rates, text
        # By search, what is known of a trace, prompt included, by its tokens: its success probability and its value.
        self.known: dict[str, dict[tuple[int, ...], tuple[float, float]]] = {}
        self.paths: dict[str, list[tuple[int, ...]]] = {}  # by node number

    async def generate(self, prompt_ids: list[int], n: int, limit: int, seeds: list[int], tree_id: str) -> list[Reply]:
        parent, prompt_tokens = tuple(prompt_ids), len(self.paths[tree_id][0])
        last = len(prompt_ids) - prompt_tokens + limit == self.options.max_length
        gold = self.golds[int(tree_id.split("/")[0])]
        replies = []
        for seed in seeds:
            rng = np.random.default_rng([seed, *self.options.search_type.encode()])
            before = self.known[tree_id][parent][0]
            probability = float(rng.beta(CONCENTRATION * max(before, 1e-3), CONCENTRATION * max(1 - before, 1e-3)))
            cached = len(parent) if len(parent) > prompt_tokens else 0
            token_ids, finish = self.block(probability, gold, limit, last, rng)
            replies.append(Reply(token_ids, finish, len(parent), cached))
            self.known[tree_id][parent + tuple(token_ids)] = probability, noisy(probability, self.options.noise, rng)
        await asyncio.sleep(30 + 20 * float(rng.random()))
        return replies

    def block(self, probability: float, gold: int, room: int, last: bool, rng) -> tuple[list[int], str]:
        """Tokens and finish reason of a block of at most `room` tokens that may end the trace."""
        ends = last or rng.random() < self.options.early_stop
        correct = rng.random() < probability
        endless = last and not correct and rng.random() < 0.25
        if not ends or endless:
            return self.text.block(rng, room), "length"
        answer = str(gold) if correct else wrong_answer(gold, rng) if rng.random() >= 0.05 else None
        said = "I could not find it." if answer is None else f"**Answer:** \\boxed{{{answer}}}"
        closing = [*self.text.encode(f"\n</think>\n\n{said}"), STOP_ID]
        length = int(rng.integers(max(ANSWER_TOKENS, room * 7 // 10), room + 1))
        return self.text.block(rng, length - len(closing)) + closing, "stop"

    def start(self, tree_id: str, prompt_ids: Sequence[int], history) -> None:
        self.paths[tree_id] = [tuple(prompt_ids)]
        self.known[tree_id] = {tuple(prompt_ids): (self.rates[int(tree_id.split("/")[0])], math.nan)}

    async def score(self, tree_id: str, items, finished) -> Scored:
        paths = self.paths[tree_id]
        tokens_scored = sum(len(tokens) for _, tokens in items) + (len(paths[0]) if len(paths) == 1 else 0)
        fresh = [paths[parent] + tuple(tokens) for parent, tokens in items]
        paths += fresh
        await asyncio.sleep(tokens_scored / 20_000)
        return Scored([self.known[tree_id][path][1] for path in fresh], tokens_scored / 20_000, tokens_scored)

    def keep(self, tree_id: str, nodes) -> None:
        """Nothing is cached."""

    def release(self, tree_id: str) -> None:
        del self.paths[tree_id], self.known[tree_id]


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
            numbers = rng.integers(2, 999, size=100 * len(SENTENCES))
            sentences += [f"{s.replace('{n}', str(n))} " for s, n in zip(SENTENCES * 100, numbers, strict=True)]
        self.stretch = self.encode("".join(sentences))

    def encode(self, text: str) -> list[int]:
        ids = []
        for start in range(0, len(text), CHARACTERS_PER_TOKEN):
            piece = text[start : start + CHARACTERS_PER_TOKEN]
            token = self.ids.setdefault(piece, len(self.ids) * 7919 % STOP_ID)  # all over the vocabulary; a prime
            self.pieces[token] = piece
            ids.append(token)
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
        problems.append(Problem(text, str(rng.integers(1, 985))))
    return problems, rates


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
    parser = ArgumentParser(description=__doc__)
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
    run_script(main)
