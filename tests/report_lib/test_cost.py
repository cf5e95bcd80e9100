"""FLOPs of a search, against torch's own counter and a count token by token."""

import itertools
import json

import numpy as np
import pytest
import tiny
import torch
from synthetic_runs import analysis_of, make_pair, make_run
from torch.utils.flop_counter import FlopCounterMode

from report_lib.cost import ForwardCost, contexts_of, forward_costs, search_flops
from report_lib.data import read_run
from search_lib.run_reader import Journal, RunPaths


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("runs"))


def test_forward_flops_are_those_that_torch_counts():
    """A whole tiny model under torch's own counter; it attends to all positions, so contexts are tokens squared here."""
    model = tiny.tiny_generator(attn_implementation="eager")
    config, tokens = model.config, 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    shape = config.to_dict() | {"head_dim": config.hidden_size // config.num_attention_heads}
    cost = ForwardCost.of(shape, config.hidden_size * config.vocab_size)
    assert cost.flops(tokens, tokens**2) == counter.get_total_flops()


def test_contexts_count_each_token_and_all_before_it():
    for start, length in itertools.product(range(4), range(5)):
        assert contexts_of(start, length) == sum(start + i + 1 for i in range(length))


def test_search_flops_against_a_token_by_token_count(pair):
    """Every generated token at its position; the prompt tokens of requests that were not cached; every token scored once."""
    vgs, _ = pair
    run = read_run(vgs, "vgs")
    generator, value_model = forward_costs(run.meta)
    tree, line = Journal(*run.journal_paths).read(2, 1)[0], run.by_problem[2][1]
    prompt, nodes = len(tree.prompt_ids), range(1, len(tree.parent))
    decode = prefill = 0
    for node in nodes:
        first = prompt + tree.start[node]
        decode += sum(generator.flops(1, first + i + 1) for i in range(len(tree.tokens[node])))
        prefill += sum(generator.flops(1, i + 1) for i in range(first))
    score = sum(value_model.flops(1, i + 1) for i in range(prompt))
    for node in nodes:
        first = prompt + tree.start[node]
        score += sum(value_model.flops(1, first + i + 1) for i in range(len(tree.tokens[node])))
    cold = search_flops(tree, line | {"tokens_cached": 0}, (generator, value_model))
    assert cold == {
        "flops_decode": pytest.approx(decode),
        "flops_prefill": pytest.approx(prefill),
        "flops_score": pytest.approx(score),
    }
    asked = sum(prompt + tree.start[node] for node in nodes)
    half = search_flops(tree, line | {"tokens_cached": asked / 2, "tokens_scored": 2 * line["tokens_scored"]},
                        (generator, value_model))  # fmt: skip
    assert half["flops_prefill"] == pytest.approx(prefill / 2)
    assert half["flops_score"] == pytest.approx(2 * score)
    assert search_flops(tree, {"dt": 1.0}, (generator, value_model)) is None


def test_flops_grow_with_pooled_repetitions_and_need_shapes(pair, tmp_path):
    vgs, _ = pair
    analysis = analysis_of(vgs)
    assert [row["flops"] / analysis.rows[0]["flops"] for row in analysis.rows] == pytest.approx([1, 2, 3, 4])
    assert analysis.flops["flops"] == pytest.approx(np.mean(list(analysis.costs["flops"].values())))
    copy = make_run(tmp_path, "copy")
    meta = json.loads(RunPaths.of(copy).meta.read_text())
    del meta["generator"]["head_dim"]
    RunPaths.of(copy).meta.write_text(json.dumps(meta))
    analysis = analysis_of(copy)
    assert analysis.flops is None
    assert any("no FLOPs" in note for note in analysis.notes)
