"""examples/search_loop.py: the plain loop and the search keep the same beams, and it runs as its docstring says."""

import asyncio
import random
import re
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT

from classifier_lib import Qwen2ForClassifier, ValueScorer
from engine_lib.base import Reply
from eval_utils import extract_answer, weighted_vote
from examples import search_loop
from examples.miniature.make_generator import new_generator
from examples.miniature.tokenizer import build_tokenizer
from search_lib.scorers import ScorerThread
from search_lib.search import search
from search_lib.tree import SearchConfig, SearchTask, parse_search_type

MAX_LENGTH, STOP_ID = 48, 256
PROMPT = [259, 40, 41, 42]


class Writer:
    """Seeded continuations in place of a generator: noise, and now and then an answer and the stop id."""

    def __init__(self, seed: int, tokenizer, distinct: int | None = None):
        """`distinct`: blocks are drawn from so many only, so that some are the same."""
        self.rng, self.distinct = random.Random(seed), distinct
        self.endings = [tokenizer(rf"</think>\boxed{{{n}}}", add_special_tokens=False).input_ids for n in range(3)]

    def block(self, limit: int) -> list[int]:
        rng = random.Random(self.rng.randrange(self.distinct)) if self.distinct else self.rng
        block = [rng.randrange(256) for _ in range(rng.randrange(limit) if rng.random() < 0.3 else limit)]
        if len(block) < limit:
            block = [*block, *rng.choice(self.endings), STOP_ID][-limit:]
        return block

    def write_block(self, ids: list[int], n: int, limit: int) -> list[list[int]]:
        return [self.block(limit) for _ in range(n)]

    async def generate(self, prompt_ids, n, max_new_tokens, seeds, tree_id) -> list[Reply]:
        blocks = self.write_block(prompt_ids, n, max_new_tokens)
        return [Reply(b, "stop" if b[-1] == STOP_ID else "length", len(prompt_ids), 0) for b in blocks]


def both(seed: int, search_type: str, num_blocks: int, digits: int = 9, distinct: int | None = None):
    """(beams, values) of the loop, (beams, values) of the search, its tree; values rounded to so many digits."""
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_value_model(seed=seed)
    num_beams, beam_width, block_size = parse_search_type(search_type, num_blocks, 12, MAX_LENGTH)

    def value_of(ids):
        with torch.inference_mode():
            return round(model(torch.tensor([ids])).success_probs[0, -1].item(), digits)

    class Rounded(ValueScorer):
        def score(self, *args):
            return [round(value, digits) for value in super().score(*args)]

    shape = (num_beams, beam_width, block_size, MAX_LENGTH)
    loop = search_loop.search(PROMPT, Writer(seed, tokenizer, distinct).write_block, value_of, *shape, {STOP_ID})
    scorer = ScorerThread(Rounded(tiny.tiny_value_model(seed=seed)))
    task, config = SearchTask(0, 0, tuple(PROMPT)), SearchConfig(*shape)
    tree = asyncio.run(search(task, Writer(seed, tokenizer, distinct).generate, scorer, config)).tree
    asyncio.run(scorer.close())
    ours = [tree.response(node) for node in tree.beams], [tree.value[node] for node in tree.beams]
    return loop, ours, tree


def check_votes(beams, loop_values, values) -> None:
    answers = [extract_answer(tiny.tiny_tokenizer().decode(beam)) for beam in beams]
    winner = search_loop.vote(answers, loop_values)
    classes = [sorted(set(answers)).index(answer) if answer else -1 for answer in answers]
    share = weighted_vote(classes, [answer == winner for answer in answers], values)
    totals = {a: sum(v for v, b in zip(values, answers, strict=True) if a == b) for a in answers if a}
    tied = sum(total > max(totals.values()) - 1e-9 for total in totals.values())
    assert share == pytest.approx(1 / tied if tied else 0.0)
    assert bool(winner) == bool(tied)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("search_type", "num_blocks"), [("beam2", 8), ("beam4", 8), ("bfs", 6), ("bon", 6)])
def test_the_loop_and_the_search_keep_the_same_beams_and_vote_alike(search_type, num_blocks, seed):
    (beams, values), (expected_beams, expected_values), _ = both(seed, search_type, num_blocks)
    assert beams == expected_beams
    assert values == pytest.approx(expected_values, abs=1e-5)
    check_votes(beams, values, expected_values)


def test_the_comparison_has_finished_beams_beside_open_ones_and_answers_to_vote_on():
    runs = [both(seed, "beam2", 8) for seed in range(5)]
    assert any(len({len(record.parent) for record in tree.rounds}) > 1 for _, _, tree in runs)
    endings = [beam[-1] for (beams, _), _, _ in runs for beam in beams]
    assert 5 < endings.count(STOP_ID) < len(endings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("search_type", ["beam2", "bfs"])
def test_ties_go_to_the_lower_index(search_type, seed):
    """Values of one digit, and blocks that are the same: most rankings have ties."""
    (beams, values), (expected_beams, expected_values), tree = both(seed, search_type, 8, digits=1, distinct=12)
    assert any(len(set(record.value)) < len(record.value) for record in tree.rounds)
    assert (beams, values) == (expected_beams, expected_values)
    check_votes(beams, values, expected_values)


def test_an_empty_answer_never_wins():
    assert search_loop.vote(["", "7", "", "8", "8"], [0.9, 0.5, 0.9, 0.3, 0.3]) == "8"
    assert search_loop.vote(["", ""], [0.9, 0.5]) == ""


def test_the_script_runs_as_its_docstring_says(tmp_path):
    """On untrained models of quickstart's shape, with its tokenizer."""
    torch.manual_seed(0)
    new_generator(build_tokenizer()).save_pretrained(tmp_path / "generator")
    build_tokenizer().save_pretrained(tmp_path / "generator")
    Qwen2ForClassifier.from_backbone(tmp_path / "generator").save_pretrained(tmp_path / "value_model")

    def run(*arguments):
        command = [sys.executable, str(ROOT / "examples" / "search_loop.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    done = run(tmp_path / "generator", tmp_path / "value_model", "40a2b9c9d7e4f9")
    assert done.returncode == 0, done.stderr
    *beams, answer = done.stdout.splitlines()
    assert len(beams) == 4
    assert all(re.fullmatch(r"0\.\d{3}  .*", beam) for beam in beams)
    assert answer.startswith("answer:")
    wrong = run(tmp_path / "generator")
    assert wrong.returncode == 1
    assert "search_loop.py GENERATOR VALUE_MODEL" in wrong.stderr


def test_it_fits_on_a_page():
    assert len((ROOT / "examples" / "search_loop.py").read_text().splitlines()) <= 70
