"""Write a search run whose truth is known, in the format of `inference_eval.py`, without a model.

    # full size: 30 problems x 16 repetitions x 8 candidates x 16k tokens, 0.8 GB
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
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

VOCAB_SIZE = 151_936
STOP_ID = 151_643
ANSWER_TOKENS = 12  # length of the closing line with the box; a block is never shorter
CONCENTRATION = 6.0  # how fast a trace's fate is settled: high is slow
CHARACTERS_PER_TOKEN = 4
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

    @property
    def branch(self) -> int:
        """Candidates per beam and round."""
        return int(self.search_type.removeprefix("beam")) if self.search_type.startswith("beam") else 1

    @property
    def width(self) -> int:
        """Beams kept."""
        return self.num_blocks // self.branch

    @property
    def round_tokens(self) -> int:
        """Most tokens of a block; `bon` is one block of the whole length."""
        return self.max_length if self.search_type == "bon" else self.block_size


@dataclass
class Node:
    """One candidate of a simulated tree."""

    parent: int
    tokens: list[int]
    text: str
    probability: float
    value: float
    finish: str
    path: list[int]
    correct: bool = False
    answer: str = ""
    kept: bool = False


class TextPool:
    """A long stretch of harmless reasoning, of which blocks are slices."""

    def __init__(self, rng: np.random.Generator, characters: int):
        pieces, length = [], 0
        while length < characters:
            numbers = rng.integers(2, 999, size=len(SENTENCES))
            for sentence, number in zip(SENTENCES, numbers, strict=True):
                pieces.append(sentence.replace("{n}", str(number)) + " ")
                length += len(pieces[-1])
        self.text = "".join(pieces)

    def slice(self, rng: np.random.Generator, characters: int) -> str:
        start = int(rng.integers(0, len(self.text) - characters))
        return self.text[start : start + characters]


def noisy(probability: float, noise: float, rng: np.random.Generator) -> float:
    """The value of a trace: its success probability with normal noise on the logit."""
    clipped = min(max(probability, 1e-4), 1 - 1e-4)
    logit = math.log(clipped / (1 - clipped)) + noise * float(rng.standard_normal())
    return 1 / (1 + math.exp(-logit))


def wrong_answer(gold: int, rng: np.random.Generator) -> str:
    """One of few attractive mistakes, so that wrong answers can win votes."""
    return str(gold + int(rng.choice([1, 2, 10, 7], p=[0.55, 0.25, 0.15, 0.05])))


def extend(parent: Node, number: int, start: int, gold: int, options: Options, pool: TextPool, rng) -> Node:
    """One candidate: a block of at most the round's tokens that may end the trace."""
    room = min(options.round_tokens, options.max_length - start)
    last = start + room >= options.max_length
    spread = CONCENTRATION * max(parent.probability, 1e-3), CONCENTRATION * max(1 - parent.probability, 1e-3)
    probability = float(rng.beta(*spread))
    ends = last or rng.random() < options.early_stop
    node = Node(
        parent.path[-1], [], "", probability, noisy(probability, options.noise, rng), "", [*parent.path, number]
    )
    length = room
    if ends:
        node.correct = bool(rng.random() < probability)
        truncated = last and not node.correct and rng.random() < 0.25
        node.finish = "length" if truncated else "stop"
        length = room if truncated else int(rng.integers(max(ANSWER_TOKENS, room * 7 // 10), room + 1))
    node.tokens = rng.integers(0, STOP_ID, size=length).tolist()
    node.text = pool.slice(rng, length * CHARACTERS_PER_TOKEN)
    if node.finish == "stop":
        node.tokens[-1] = STOP_ID
        empty = not node.correct and rng.random() < 0.05
        node.answer = "" if empty else str(gold) if node.correct else wrong_answer(gold, rng)
        closing = (
            "\n</think>\n\nI could not find it." if empty else f"\n</think>\n\n**Answer:** \\boxed{{{node.answer}}}"
        )
        node.text = node.text[: -len(closing)] + closing
    return node


def simulate_search(
    problem: dict, repeat_idx: int, options: Options, pool: TextPool, rng: np.random.Generator
) -> Iterator[dict]:
    """The rounds of one search as journal lines, and last the search's own output line (it has `generated_ids`)."""
    gold = int(problem["answer"])
    prompt = rng.integers(0, STOP_ID, size=60 + len(problem["problem"]) // 4).tolist()
    root = Node(0, [], "", problem["rate"], 0.0, "", [0])
    nodes, beams = [root], [root] * options.width
    seconds_generate = seconds_score = 0.0
    start = round_idx = 0
    while slots := [slot for slot, beam in enumerate(beams) if not beam.finish]:
        fresh: list[Node] = []
        for slot in slots:
            for _ in range(options.branch):
                fresh.append(extend(beams[slot], len(nodes) + len(fresh), start, gold, options, pool, rng))
        nodes.extend(fresh)
        for node in sorted(fresh, key=lambda node: -node.value)[: len(slots)]:
            node.kept = True
        for slot, node in zip(slots, (node for node in fresh if node.kept), strict=True):
            beams[slot] = node
        generate, score = 30 + 20 * float(rng.random()), 1 + float(rng.random())
        seconds_generate, seconds_score = seconds_generate + generate, seconds_score + score
        new_tokens = sum(len(node.tokens) for node in fresh)
        line: dict[str, object] = {
            "data_idx": problem["data_idx"],
            "repeat_idx": repeat_idx,
            "round": round_idx,
            "parent": [node.parent for node in fresh],
            "tokens": [node.tokens for node in fresh],
            "value": [node.value for node in fresh],
            "kept": [node.kept for node in fresh],
            "finish": [node.finish for node in fresh],
            "text": [node.text for node in fresh],
            "seconds_generate": generate,
            "seconds_score": score,
            "tokens_scored": new_tokens + (len(prompt) if start == 0 else 0),
            "tokens_reread": 0,
            "tokens_cached": (start + len(prompt)) * (len(fresh) - 1),
        }
        if start == 0:
            line["prompt_ids"] = prompt
        yield line
        start += options.round_tokens
        round_idx += 1
    generated = sum(len(node.tokens) for node in nodes)
    yield {
        "repeat_idx": repeat_idx,
        "data_idx": problem["data_idx"],
        "global_idx": repeat_idx * options.problems + problem["data_idx"],
        "problem": problem["problem"],
        "gt_answer": problem["answer"],
        "generated_ids": [[token for i in node.path for token in nodes[i].tokens] for node in beams],
        "generated_scores": [node.value for node in beams],
        "processed_answer": [node.answer for node in beams],
        "reward": [node.correct for node in beams],
        "dt": seconds_generate + seconds_score + 1.0,
    } | (
        {}
        if options.released
        else {
            "finish_reasons": [node.finish for node in beams],
            "prompt_tokens": len(prompt),
            "tokens_generated": generated,
            "tokens_scored": generated + len(prompt),
            "tokens_reread": 0,
            "tokens_cached": sum(
                (len(prompt) + options.round_tokens * r) * (options.num_blocks - 1) for r in range(round_idx)
            ),
            "seconds_generate": seconds_generate,
            "seconds_score": seconds_score,
        }
    )


def qwen2_shape(layers: int, hidden: int, intermediate: int, heads: int, key_value_heads: int) -> dict[str, object]:
    """The shape of a Qwen2 model as `meta.json` gives it (parameters counted without biases and norms)."""
    head_dim = hidden // heads
    block = hidden * head_dim * (2 * heads + 2 * key_value_heads) + 3 * hidden * intermediate
    return {
        "path": f"synthetic-{hidden}",
        "fingerprint": "0" * 16,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "vocab_size": VOCAB_SIZE,
        "num_parameters": layers * block + 2 * VOCAB_SIZE * hidden,
        "num_parameters_embedding": 2 * VOCAB_SIZE * hidden,
        "tie_word_embeddings": False,
    }


def meta(options: Options) -> dict[str, object]:
    """`X.meta.json` of the synthetic run: a 7B generator and a 1.5B value model."""
    search = {"width": options.width, "branch": options.branch, "num_blocks": options.num_blocks}
    return {
        "format": 1,
        "arguments": {
            "search_type": options.search_type,
            "num_blocks": options.num_blocks,
            "block_size": options.block_size,
            "max_length": options.max_length,
            "num_repetitions": options.repetitions,
            "selection": "value",
            "seed": options.seed,
        },
        "versions": {"synthetic": "1"},
        "num_problems": options.problems,
        "benchmark": "synthetic",
        "generator": qwen2_shape(28, 3584, 18_944, 28, 4),
        "value_model": qwen2_shape(28, 1536, 8960, 12, 2) | {"num_labels": 3},
        "engine": {"name": "synthetic"},
        "started": "2026-01-01T00:00:00+00:00",
        "search": search | {"block_size": options.round_tokens, "max_length": options.max_length},
        "sessions": [
            {
                "started": "2026-01-01T00:00:00+00:00",
                "ended": "2026-01-01T04:00:00+00:00",
                "seconds": 14_400.0,
                "hardware": "none (synthetic)",
            }
        ],
    }


def make_problems(options: Options, rng: np.random.Generator) -> list[dict]:
    """Problems with their known success rate (`rate`); texts may be given."""
    problems = []
    for data_idx in range(options.problems):
        a, b, c = (int(value) for value in rng.integers(2, 99, size=3))
        text = f"Find the remainder when {a}^{{{b}}} + {c} is divided by 1000. (Synthetic problem {data_idx}.)"
        if data_idx < len(options.problem_texts):
            text = options.problem_texts[data_idx]
        rate = float(rng.beta(*options.beta))
        problems.append({"data_idx": data_idx, "problem": text, "answer": str(int(rng.integers(1, 985))), "rate": rate})
    return problems


def make_synthetic_run(path: Path, options: Options) -> None:
    """Write `path` and, unless `options.released`, its `.meta.json` and `.tree.jsonl`. Same options, same bytes."""
    if options.num_blocks % options.branch:
        raise ValueError(
            f"num_blocks {options.num_blocks} is not a multiple of {options.branch} ({options.search_type})"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    problems = make_problems(options, np.random.default_rng([options.seed, 1]))  # the same for every search type
    pool = TextPool(np.random.default_rng([options.seed, 2]), max(1_000_000, 8 * options.max_length))
    rng = np.random.default_rng([options.seed, 3, *options.search_type.encode()])
    tree_path = path.with_name(path.name.removesuffix(".jsonl") + ".tree.jsonl")
    waiting = [(problem, repeat) for repeat in range(options.repetitions) for problem in problems]
    written = 0
    with path.open("w", encoding="utf-8") as out, tree_path.open("w", encoding="utf-8") as tree:
        running: list[Iterator[dict]] = []
        held: dict[int, str] = {}
        while waiting or running:
            while waiting and len(running) < 4:  # a few searches at once: lines of different searches interleave
                running.append(simulate_search(*waiting.pop(0), options, pool, rng))
            for search in list(running):
                line = next(search)
                if "generated_ids" not in line:
                    tree.write(json.dumps(line) + "\n")
                    continue
                running.remove(search)
                held[line["global_idx"]] = json.dumps(line) + "\n"
            while written in held:  # output in `global_idx` order
                out.write(held.pop(written))
                written += 1
    if options.released:
        tree_path.unlink()
        return
    meta_path = path.with_name(path.name.removesuffix(".jsonl") + ".meta.json")
    meta_path.write_text(json.dumps(meta(options), indent=1) + "\n", encoding="utf-8")


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
