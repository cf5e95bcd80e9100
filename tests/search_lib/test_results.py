"""What the files say of a search: texts of blocks, result lines, and the line of progress."""

import asyncio
from types import SimpleNamespace

import pytest
import tiny
from simulated import SimScorer, simple_generate

from data_utils import Problem
from eval_lib.stopping import Stopping
from search_lib.results import ResultRows
from search_lib.run_stopping import RunStops
from search_lib.search import search
from search_lib.search_progress import SearchProgress
from search_lib.tree import Round, SearchConfig, SearchTask, Tree


def texts_of_a_chain(rows: ResultRows, ids: list[int], size: int, finish: str) -> list[str]:
    """Texts of blocks of `size` tokens, each the only child of the one before."""
    tree, texts = Tree((2, 3), 1), []
    for index, at in enumerate(range(0, len(ids), size)):
        ends = at + size >= len(ids)
        record = Round(index, [index], [ids[at : at + size]], [0.5], [True], [finish if ends else ""])
        tree.add(record)
        texts += rows.block_texts(tree, record)
    return texts


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_texts_of_blocks_add_up_even_where_a_character_is_split(size):
    tokenizer = tiny.tiny_tokenizer()
    rows = ResultRows([], lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False), None)
    ids = tokenizer("a€b 漢字 .", add_special_tokens=False).input_ids
    texts = texts_of_a_chain(rows, ids, size, "stop")
    assert len(texts) == -(-len(ids) // size)
    assert "".join(texts) == "a€b 漢字 ."
    assert "".join(texts_of_a_chain(rows, ids[:2], size, "length")) == "a�"  # ends in mid-character for good
    assert "".join(texts_of_a_chain(rows, ids[:2], size, "")) == "a"  # goes on


class Even:
    """Grades an answer as right if it equals the given one."""

    async def agrade(self, pairs):
        return [gold == answer for gold, answer in pairs]


def test_the_line_of_a_search():
    task = SearchTask(1, 2, (5, 6, 7))
    result = asyncio.run(search(task, simple_generate(), SimScorer(), SearchConfig(2, 2, 10, 30)))
    rows = ResultRows([Problem("p", "0")] * 3 + [Problem("q", "1")], lambda ids: f"\\boxed{{{len(ids) // 30}}}", Even())
    row = asyncio.run(rows.result(result))
    assert row["global_idx"] == 2 * 4 + 1
    assert row["processed_answer"] == [str(len(ids) // 30) for ids in row["generated_ids"]]
    assert row["reward"] == [answer == "0" for answer in row["processed_answer"]]
    assert row["generated_scores"] == [result.tree.value[node] for node in result.beams]
    assert row["tokens_generated"] == row["tokens_scored"] == sum(map(len, result.tree.tokens))
    assert row["dt"] == result.seconds


def test_the_line_of_progress(capsys):
    times = iter([100.0, 110.0, 120.0])
    finished = {(0, 0): {"reward": [True, False]}}  # of an earlier start
    stops = RunStops(Stopping("none", "weighted", 0.05, 1, 1), SimpleNamespace(finished=finished), range(5), list)
    progress = SearchProgress(stops, SearchConfig(1, 2, 10, 40), clock=lambda: next(times))
    assert progress.status() == "1/5 searches, ETA ? | 0 tok/s generated, 0 scored | pass@1 0.500"
    first, second = SearchTask(1, 0, ()), SearchTask(2, 0, ())
    record = Round(0, [0, 0], [[1] * 10, [1] * 20], [0.1, 0.2], [True, False], ["", ""], tokens_scored=50)
    for task in (first, first, second):
        progress.add_round(task, record)
    finished[1, 0] = {"reward": [True, True]}
    progress.end(first)
    # In 20 s a whole search and a quarter of another; 2.75 are left. 90 tokens generated, 150 scored.
    assert progress.status() == "2/5 searches, ETA 44s | 4 tok/s generated, 8 scored | pass@1 0.750"


def test_the_line_of_progress_of_a_run_that_stops():
    """Three problems of at most four repetitions: one decided after two, one with all, of the third none is finished."""
    times = iter([100.0, 110.0])
    finished = {(i, r): {"reward": [i == 0], "repeat_idx": r} for i in range(2) for r in range(4)}
    del finished[1, 3]
    stops = RunStops(Stopping("none", "weighted", 0.05, 4, 1), SimpleNamespace(finished=finished), range(3), list)
    stops.stopping, stops.stopped = Stopping("sure", "weighted", 0.05, 4, 1), {0: 2}
    progress = SearchProgress(stops, SearchConfig(1, 2, 10, 40), clock=lambda: next(times))
    finished[1, 3] = {"reward": [False], "repeat_idx": 3}
    # One in 10 s; 4 of the third problem's are left. Of all that count a third is right: of the problems it is a half.
    status = progress.status()
    assert status.startswith("6/10 searches (2/3 problems decided), ETA at most 40s | ")
    assert status.endswith("| pass@1 0.500")
    assert stops.in_words() == "2 of 3 problems are decided, 6 searches finished"
