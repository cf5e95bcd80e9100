"""What a run writes, against what was asked and what the value model says: seeds, rows, search types, the plain loop."""

import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import search_spy
import tiny
import torch

from examples import search_loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    search_spy.write_inputs(folder)
    return folder


@pytest.fixture
def start(folder, tmp_path):
    """Run with these flags beside the base ones, each time into a new file."""
    numbers = itertools.count()

    def start(write=search_spy.by_seed, **flags):
        more = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        base = search_spy.base_flags(folder, tmp_path / f"{next(numbers)}.jsonl")
        seen = search_spy.run([*base, *more], write)
        assert seen.status == 0
        return seen

    return start


def value_at_the_end(ids: list[int]) -> float:
    """A full forward pass over the whole trace."""
    with torch.inference_mode():
        return tiny.tiny_value_model()(torch.tensor([ids])).success_probs[0, -1].item()


def prompts_of(seen) -> dict[int, list[int]]:
    return {row["data_idx"]: row["prompt_ids"] for row in seen.rounds if row["round"] == 0}


# --------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("search_type", ["beam2", "beam1", "bfs", "bon"])
def test_no_two_requests_share_a_seed_and_another_seed_shares_none(search_type, start):
    """Problems, repetitions, rounds, beams and candidates; and the same seed again asks for the very same."""

    def asked(**flags):
        seen = start(search_type=search_type, num_repetitions=3, **flags)
        assert search_type == "bon" or max(row["round"] for row in seen.rounds) == 3
        assert len(set(seen.seeds)) == len(seen.seeds) > 40
        return {(request.group, tuple(request.prompt_ids), request.seed) for request in seen.requests}, set(seen.seeds)

    first, seeds = asked()
    again, _ = asked(batch_size=1)
    assert again == first
    other, other_seeds = asked(seed=4)
    assert not seeds & other_seeds
    assert {group for group, *_ in other} == {group for group, *_ in first}


def test_more_repetitions_go_on_with_other_seeds_and_the_first_ones_stay(start):
    few, many = start(num_repetitions=1), start(num_repetitions=3)
    assert set(few.seeds) == {request.seed for request in many.requests if request.group.endswith("/0")}


def test_problems_and_repetitions_are_not_copies(start):
    """With a generator that knows nothing but its seed: only seeds make a difference."""

    def by_seed_alone(request, nth):
        return search_spy.block(request.max_new_tokens, request.seed, stop_share=0.0)

    seen = start(by_seed_alone, num_repetitions=4)
    written = [tuple(map(tuple, row["generated_ids"])) for row in seen.rows]
    assert len(set(written)) == len(written) == 16
    beams = [beam for search in written for beam in search]
    assert len(set(beams)) == len(beams)
    for row in seen.rounds:
        assert len(set(map(tuple, row["tokens"]))) == len(row["tokens"])


# ---------------------------------------------------------------------------------------------------------------- rows


def test_values_answers_and_rewards_stand_beside_their_ids(start):
    """Recomputed one by one, by a full forward pass and a grading of this test's own."""
    seen = start(num_blocks=16, value_cache_gb=0.0001)
    prompts, mixed = prompts_of(seen), 0
    assert [row["global_idx"] for row in seen.rows] == list(range(8))
    for row in seen.rows:
        columns = ("generated_ids", "generated_scores", "processed_answer", "reward", "finish_reasons")
        assert row["gt_answer"] == str(2 * row["data_idx"])
        assert row["problem"] == f"What is {row['data_idx']} + {row['data_idx']}?"
        for ids, value, answer, reward, finish in zip(*map(row.get, columns), strict=True):
            assert value == pytest.approx(value_at_the_end(prompts[row["data_idx"]] + ids), abs=1e-5)
            box = re.findall(r"\\boxed\{(\d)\}", search_spy.TOKENIZER.decode(ids))
            assert answer == (box[0] if box else "")
            assert reward == (answer == row["gt_answer"])
            assert finish == ("stop" if ids[-1] == search_spy.STOP else "length")
            assert finish == "stop" or len(ids) == 48
        several = [len(set(map(str, row[column]))) > 1 for column in columns]
        mixed += all(several)
    assert mixed >= 3  # lines in which any two columns could be out of step


def test_a_line_counts_what_its_search_has_cost(start):
    """Tokens of every candidate, and the prompt once; requests, and so the engine's own count, agree."""
    seen = start()
    asked, row_count = defaultdict(int), Counter()
    for row in seen.rounds:
        row_count[row["data_idx"], row["repeat_idx"]] += len(row["tokens"])
        asked[row["data_idx"], row["repeat_idx"]] += sum(map(len, row["tokens"]))
    prompts = prompts_of(seen)
    for row in seen.rows:
        assert row["tokens_generated"] == asked[row["data_idx"], row["repeat_idx"]]
        assert row["tokens_scored"] == row["tokens_generated"] + len(prompts[row["data_idx"]])
        assert (
            row["tokens_cached"] == 3 * row_count[row["data_idx"], row["repeat_idx"]]
        )  # 3 of each request, the spy says
        assert row["dt"] >= row["seconds_generate"] + row["seconds_score"] > 0
    assert sum(len(row["tokens"]) for row in seen.rounds) == len(seen.requests)


def test_lines_end_in_the_order_of_global_idx_whatever_order_searches_end_in(start):
    """The first problem's searches take four rounds, the others' one."""

    def slow_first(request, nth):
        return search_spy.block(
            request.max_new_tokens, request.seed, stop_share=0.0 if request.group[0] == "0" else 1.0
        )

    seen = start(slow_first)
    assert [row["data_idx"] for row in seen.rounds][-2:] == [0, 0]
    assert [row["global_idx"] for row in seen.rows] == list(range(8))


def test_texts_of_blocks_are_beside_their_tokens(start):
    seen = start()
    for row in seen.rounds:
        shown = [search_spy.TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in row["tokens"]]
        assert row["text"] == shown
        assert [bool(finish) for finish in row["finish"]] == [
            tokens[-1] == search_spy.STOP or row["round"] == 3 for tokens in row["tokens"]
        ]
    assert {finish for row in seen.rounds for finish in row["finish"]} == {"", "stop", "length"}


# --------------------------------------------------------------------------------------------- search types, selection


def tree_of(seen, data_idx=0, repeat_idx=0):
    return [row for row in seen.rounds if (row["data_idx"], row["repeat_idx"]) == (data_idx, repeat_idx)]


@pytest.mark.parametrize(
    ("search_type", "beams", "width"),
    [("beam1", 8, 1), ("beam2", 4, 2), ("beam4", 2, 4), ("beam8", 1, 8), ("bfs", 1, 8)],
)
def test_beams_and_candidates_of_a_search_type(search_type, beams, width, start):
    """So many beams, so many candidates of each, the best of all go on; a finished beam is not extended."""

    def without_stops(request, nth):
        return search_spy.block(request.max_new_tokens, request.seed, stop_share=0.0)

    seen = start(without_stops, search_type=search_type, num_blocks=8)
    for data_idx, repeat_idx in itertools.product(range(4), range(2)):
        rows, held = tree_of(seen, data_idx, repeat_idx), [0] * beams
        assert [row["round"] for row in rows] == [0, 1, 2, 3]
        for number, row in enumerate(rows):
            assert row["parent"] == [node for node in held for _ in range(width)]
            assert set(map(len, row["tokens"])) == {12}
            held = [1 + 8 * number + i for i in range(8) if row["kept"][i]]
            assert sorted(row["value"], reverse=True)[:beams] == sorted(
                (row["value"][i] for i in range(8) if row["kept"][i]), reverse=True
            )
        assert len(held) == beams
    assert {len(row["generated_ids"]) for row in seen.rows} == {beams}
    assert len(seen.requests) == 8 * 4 * 8


def test_bon_writes_whole_responses_in_one_round_and_keeps_all(start):
    seen = start(search_type="bon", num_blocks=8)
    assert {request.max_new_tokens for request in seen.requests} == {48}
    assert len(seen.requests) == 8 * 8
    for row in seen.rounds:
        assert (row["round"], row["parent"], row["kept"]) == (0, [0] * 8, [True] * 8)
    for row in seen.rows:
        assert row["generated_ids"] == tree_of(seen, row["data_idx"], row["repeat_idx"])[0]["tokens"]


def test_random_selection_is_random_and_differs_by_problem_repetition_round_and_seed(start):
    """Against what values would choose, and along each of the four axes with the others held."""

    def without_stops(request, nth):
        return search_spy.block(request.max_new_tokens, request.seed, stop_share=0.0)

    def draws(**flags):
        seen = start(without_stops, selection="random", num_blocks=8, num_repetitions=3, **flags)
        for row in seen.rounds:
            assert sum(row["kept"]) == 4
        return {(r["data_idx"], r["repeat_idx"], r["round"]): tuple(r["kept"]) for r in seen.rounds}, seen

    first, seen = draws()
    for axis in range(3):
        alike = defaultdict(list)
        for key, kept in first.items():
            alike[key[:axis] + key[axis + 1 :]].append(kept)
        assert all(len(set(group)) > 1 for group in alike.values())
    other, _ = draws(seed=9)
    assert sum(first[key] == other[key] for key in first) < len(first) / 5
    assert draws()[0] == first
    places = Counter(i for kept in first.values() for i in range(8) if kept[i])  # 48 draws of 4 of 8: 24 each
    assert min(places.values()) > 14
    best = sum(row["kept"][max(range(8), key=row["value"].__getitem__)] for row in seen.rounds)
    assert 12 < best < 36  # of 48: a half, not all and not none


# --------------------------------------------------------------------------------------------------------- plain loop


@pytest.mark.parametrize(
    ("search_type", "num_blocks", "shape"), [("beam2", 8, (4, 2, 12)), ("bfs", 4, (1, 4, 12)), ("bon", 5, (5, 1, 48))]
)
def test_a_run_writes_the_lines_of_the_plain_loop(search_type, num_blocks, shape, start):
    """examples/search_loop.py on the same generator: blocks by prompt and how often it was asked. The run's scorer has to
    split, evict and read again."""
    seen = start(search_spy.by_count, value_batch_tokens=30, search_type=search_type, num_blocks=num_blocks,
                 value_cache_gb=0.0002)  # fmt: skip
    assert search_type == "bon" or max(row["round"] for row in seen.rounds) == 3
    model = tiny.tiny_value_model()
    for row in seen.rows:
        asked = Counter()

        def write_block(ids, n, limit, asked=asked):
            asked[tuple(ids)] += n
            nths = range(asked[tuple(ids)] - n, asked[tuple(ids)])
            return [search_spy.block(limit, (ids, nth)) for nth in nths]

        def value_of(ids):
            with torch.inference_mode():
                return model(torch.tensor([ids])).success_probs[0, -1].item()

        prompt = prompts_of(seen)[row["data_idx"]]
        beams, values = search_loop.search(prompt, write_block, value_of, *shape, 48, {search_spy.STOP})
        assert row["generated_ids"] == beams
        assert row["generated_scores"] == pytest.approx(values, abs=1e-5)
