"""Layouts: every one describes the same attention, losses and gradients, and none computes more than it must."""

import shutil

import numpy as np
import pytest
import torch
from tiny import tiny_value_model
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from classifier_lib import bradley_terry_loss, rollout_loss
from training_lib.attention import FLEX, SDPA, dense_mask, flex_mask
from training_lib.packing import (
    Trace,
    block_lists,
    common_prefix,
    empty_batch,
    lay_out,
    padded_batch,
    tree_row,
    trie_counts,
)

MAX_LENGTH = 48
CPU = torch.device("cpu")


def random_traces(seed: int, num: int = 24, vocab: int = 3, max_length: int = MAX_LENGTH) -> list[Trace]:
    """Roll-ins that are nested prefixes, repeated, or unrelated; few token ids, so that roll-outs start alike too."""
    rng = np.random.default_rng(seed)
    trunks = [rng.integers(0, vocab, length) for length in (max_length + 10, *rng.integers(1, max_length, 2))]
    traces = []
    for number in range(num):
        trunk = trunks[rng.integers(len(trunks))]
        roll_in = trunk[: rng.integers(1, len(trunk) + 1)]
        roll_out = rng.integers(0, vocab, rng.integers(1, 30))
        tokens = np.concatenate([roll_in, roll_out])[:max_length]
        traces.append(Trace(tokens, len(roll_in), int(rng.integers(3)), (number, 0)))
    return traces


def shown(traces: list[Trace]) -> set[tuple[int, ...]]:
    """All distinct prefixes: the nodes of the trie."""
    return {tuple(trace.tokens[: n + 1].tolist()) for trace in traces for n in range(len(trace.tokens))}


@pytest.mark.parametrize("seed", range(20))
def test_tree_row_attends_to_exactly_the_branch_and_holds_each_prefix_once(seed):
    traces = random_traces(seed)
    batch = tree_row(traces, multiple=8)
    mask = dense_mask(torch.from_numpy(batch.end))[0, 0].numpy()
    assert batch.num_tokens == len(shown(traces))
    for query in range(batch.num_tokens):
        branch = np.flatnonzero(mask[query])
        assert (batch.position_ids[0, branch] == np.arange(len(branch))).all()
        assert branch[-1] == query
    assert batch.num_pairs == mask[: batch.num_tokens].sum()
    for owner, trace in enumerate(traces):
        branch = np.flatnonzero(mask[batch.last_index[owner]])
        assert (batch.input_ids[0, branch] == trace.tokens).all()
        assert (batch.token_index[batch.rollout_index == owner] == branch[trace.start :]).all()
        assert batch.labels[owner] == trace.label
    padding = np.arange(batch.num_tokens, batch.input_ids.shape[1])
    assert (mask[padding].sum(axis=1) == 1).all()
    assert not mask[: batch.num_tokens, padding].any()


@pytest.mark.parametrize("packing", ["none", "pack", "tree"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 32])
def test_every_rollout_is_laid_out_once_within_capacity(packing, micro_batch_size):
    traces = random_traces(3, num=40)
    batches = lay_out([[trace] for trace in traces], packing, micro_batch_size, MAX_LENGTH)
    assert sorted(source for batch in batches for source in batch.sources) == sorted(t.source for t in traces)
    by_source = {trace.source: trace for trace in traces}
    for batch in batches:
        assert batch.num_tokens <= micro_batch_size * MAX_LENGTH
        flat = batch.input_ids.ravel()
        for owner, source in enumerate(batch.sources):
            owned = batch.token_index[batch.rollout_index == owner]
            assert (flat[owned] == by_source[source].tokens[by_source[source].start :]).all()
            assert flat[batch.last_index[owner]] == by_source[source].tokens[-1]
            assert batch.labels[owner] == by_source[source].label


@pytest.mark.parametrize("packing", ["pack", "tree"])
@pytest.mark.parametrize("row_tokens", [MAX_LENGTH, 77, 200, 5000])
def test_a_row_holds_row_tokens_whatever_the_micro_batch(packing, row_tokens):
    units = [[trace] for trace in random_traces(3, num=40)]
    sizes = [batch.num_tokens for batch in lay_out(units, packing, 3, MAX_LENGTH, row_tokens=row_tokens)]
    assert max(sizes) <= row_tokens and (len(sizes) == 1) == (row_tokens == 5000)
    assert max(sizes) > 0.8 * min(row_tokens, sum(sizes))


def test_micro_batches_of_padded_traces_are_of_a_length_the_longest_first():
    traces = random_traces(3, num=40)
    lengths = sorted((len(trace.tokens) for trace in traces), reverse=True)
    batches = lay_out([[trace] for trace in traces], "none", 7, MAX_LENGTH)
    by_source = {trace.source: len(trace.tokens) for trace in traces}
    assert [by_source[source] for batch in batches for source in batch.sources] == lengths
    assert [len(batch.sources) for batch in batches] == [7] * 5 + [5]


def test_roll_outs_that_share_the_most_stay_in_one_row():
    """Of four nested roll-ins that do not fit a row it is the shortest that stands twice, and a family that fits is
    whole."""
    trunk = np.arange(100, 140)
    nested = [Trace(np.append(trunk[:n], [n] * 10), n, 0, (1, n)) for n in (10, 20, 30, 40)]
    other = [Trace(np.append(trunk[:5] - 50, [n] * 35), 5, 0, (0, n)) for n in (1, 2)]
    batches = lay_out([[trace] for trace in [*nested, *other]], "tree", 1, 79)
    rows = sorted(sorted(batch.sources) for batch in batches)
    assert rows == [[(0, 1), (0, 2)], [(1, 10)], [(1, 20), (1, 30), (1, 40)]]
    assert sum(batch.num_tokens for batch in batches) == 75 + 20 + 70


@pytest.mark.parametrize("seed", range(5))
def test_a_trie_is_counted_as_it_is_laid_out(seed):
    traces = random_traces(seed)
    row = tree_row(traces)
    assert trie_counts(traces) == (row.num_tokens, row.num_pairs)


def test_pairs_share_a_row():
    traces = random_traces(5, num=40)
    pairs = [traces[i : i + 2] for i in range(0, 40, 2)]
    for packing in ("none", "pack", "tree"):
        for batch in lay_out(pairs, packing, 2, MAX_LENGTH):
            numbers = [row for row, _ in batch.sources]
            assert len(numbers) % 2 == 0
            assert all(a + 1 == b and a % 2 == 0 for a, b in zip(numbers[0::2], numbers[1::2], strict=True))


def test_a_trie_longer_than_a_row_is_split_and_repeats_the_prefix():
    prefix = np.arange(20)
    traces = [Trace(np.append(prefix, [30 + i] * 10), 20, 1, (i, 0)) for i in range(6)]
    batches = lay_out([[trace] for trace in traces], "tree", 1, 50)
    assert [batch.num_tokens for batch in batches] == [50, 50]
    assert all((batch.input_ids[0, :20] == prefix).all() for batch in batches)


def test_rows_are_filled_to_the_brim_the_longest_first():
    """Best fit: the smallest space that is left is taken, whatever the order of the units."""
    sizes = [2, 4, 6, 3, 5]
    traces = [Trace(np.full(size, size), 1, 0, (size, 0)) for size in sizes]
    batches = lay_out([[trace] for trace in traces], "pack", 1, 10)
    assert [[row for row, _ in batch.sources] for batch in batches] == [[6, 4], [5, 3, 2]]
    assert [batch.num_tokens for batch in batches] == [10, 10]


def test_padding_goes_up_to_a_bucket():
    trace = Trace(np.ones(1500, dtype=np.int32), 10, 0, (0, 0))
    assert padded_batch([trace], 16384).input_ids.shape == (1, 2048)
    longest = Trace(np.ones(100, dtype=np.int32), 10, 0, (0, 0))
    assert padded_batch([longest], 100).input_ids.shape == (1, 100)


def test_common_prefix():
    a = np.array([1, 2, 3, 4])
    assert common_prefix(a, np.array([1, 2, 5])) == 2
    assert common_prefix(a, a) == 4
    assert common_prefix(a, a[:3]) == 3
    assert common_prefix(a, np.array([7])) == 0
    assert common_prefix(a, np.array([], dtype=int)) == 0 == common_prefix(a[:0], a[:0])


@pytest.mark.parametrize("seed", range(5))
def test_block_lists_are_the_dense_mask_in_blocks(seed):
    batch = tree_row(random_traces(seed), multiple=8)
    block = 8
    mask = dense_mask(torch.from_numpy(batch.end))[0, 0].numpy()
    n = len(mask) // block
    blocks = mask.reshape(n, block, n, block)
    partial_counts, partial, full_counts, full = block_lists(batch.end[0], block)
    for query in range(n):
        read = set(partial[query, : partial_counts[query]]) | set(full[query, : full_counts[query]])
        assert set(np.flatnonzero(blocks[query].any(axis=(0, 2)))) <= read
        for key in full[query, : full_counts[query]]:
            assert blocks[query, :, key].all()
        # Nothing is read in vain, but for a block whose tokens end in mid-block.
        for key in partial[query, : partial_counts[query]]:
            assert blocks[query, :, key].any()


# ---------------------------------------------------------------------------------------------------------------------
# Losses and gradients


def gradients(model, units, packing, micro_batch_size, pairs=False, row_tokens=None):
    """(loss, gradients by name) of the mean over all roll-outs, or pairs."""
    model.zero_grad()
    total = 0.0
    count = sum(len(unit) for unit in units)
    for batch in lay_out(units, packing, micro_batch_size, MAX_LENGTH, row_tokens=row_tokens):
        logits = model(**SDPA.inputs(batch, CPU)).logits.flatten(0, 1)
        if pairs:
            last = logits[torch.from_numpy(batch.last_index)].squeeze(-1)
            loss = bradley_terry_loss(last[0::2], last[1::2]) * (len(last) / count)
        else:
            indices = (torch.from_numpy(a) for a in (batch.token_index, batch.rollout_index, batch.labels))
            loss = rollout_loss(logits, *indices, torch.full((len(batch.labels),), 1 / count))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(one, other):
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= 1e-5 * grad.norm() + 1e-9, name


@pytest.mark.parametrize("num_labels", [3, 1])
@pytest.mark.parametrize("seed", range(3))
def test_pack_and_tree_have_the_losses_and_gradients_of_none(seed, num_labels):
    """Shared, nested and repeated prefixes, ragged lengths, truncation, equal roll-out starts with other labels."""
    model = tiny_value_model(num_labels=num_labels).train()
    traces = random_traces(seed)
    assert any(trace.start >= len(trace.tokens) for trace in traces)  # a roll-out that is cut away whole
    units = [[trace] for trace in traces]
    reference = gradients(model, units, "none", 1)
    for packing, micro_batch_size in (("none", 7), ("pack", 2), ("pack", 24), ("tree", 1), ("tree", 3), ("tree", 24)):
        assert_same_gradients(reference, gradients(model, units, packing, micro_batch_size))
    for packing in ("pack", "tree"):
        for row_tokens in (MAX_LENGTH, 101, 4000):
            assert_same_gradients(reference, gradients(model, units, packing, 5, row_tokens=row_tokens))


def test_bradley_terry_gradients_do_not_depend_on_the_layout():
    model = tiny_value_model(num_labels=1).train()
    traces = random_traces(8, num=12)
    pairs = [traces[i : i + 2] for i in range(0, 12, 2)]
    reference = gradients(model, pairs, "none", 2, pairs=True)
    for packing, micro_batch_size in (("none", 12), ("pack", 4), ("tree", 2), ("tree", 12)):
        assert_same_gradients(reference, gradients(model, pairs, packing, micro_batch_size, pairs=True))
    for row_tokens in (2 * MAX_LENGTH, 111):
        assert_same_gradients(reference, gradients(model, pairs, "tree", 2, pairs=True, row_tokens=row_tokens))


def test_an_empty_batch_has_loss_zero_and_gradients_zero():
    model = tiny_value_model().train()
    for packed in (True, False):
        batch = empty_batch(packed)
        logits = model(**SDPA.inputs(batch, CPU)).logits.flatten(0, 1)
        indices = (torch.from_numpy(a) for a in (batch.token_index, batch.rollout_index, batch.labels))
        loss = rollout_loss(logits, *indices, torch.zeros(0))
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: the kernel is compiled")
def test_flex_mask_is_the_dense_mask():
    """Compiled FlexAttention on the CPU (forward only there) reads the block lists, so a wrong one would show."""
    batch = tree_row(random_traces(1, num=60), multiple=128)
    assert batch.input_ids.shape[1] >= 3 * 128
    torch.manual_seed(0)
    query = torch.randn(1, 6, batch.end.shape[1], 16)
    key, value = torch.randn(2, 1, 2, batch.end.shape[1], 16).unbind(0)
    mask = dense_mask(torch.from_numpy(batch.end))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    with torch.no_grad():
        flex = torch.compile(flex_attention, dynamic=True)(
            query, key, value, block_mask=flex_mask(batch.end, CPU), enable_gqa=True
        )
    assert (flex - dense).abs().max() < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_with_flex_attention_is_the_model_with_a_dense_mask(autocast):
    """In compiled layers, of which rows of any length and mask must share one graph."""
    model = tiny_value_model(num_hidden_layers=3).eval()
    batches = [tree_row(random_traces(seed, num=10 + 20 * seed), multiple=128) for seed in range(3)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dense = [model(**SDPA.inputs(batch, CPU)).logits for batch in batches]
        model.set_attn_implementation(FLEX.name)
        torch._dynamo.reset()
        counters.clear()
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True, backend="eager")
        flex = [model(**FLEX.inputs(batch, CPU)).logits for batch in batches]
    for one, other in zip(dense, flex, strict=True):
        assert (one - other).abs().max() <= (0.05 if autocast else 1e-5) * one.abs().max()
    assert counters["stats"]["unique_graphs"] == 1
