"""Sampling: against a plain reference in numpy, the distribution, and draws that rounding does not move."""

import numpy as np
import pytest
import torch
from plain_sampling import draw, nucleus, probabilities, uniform

from engine_lib.sampling import row_uniforms, sample_rows


def sample(logits, temperature, top_p, uniforms) -> list[int]:
    """One row for each number."""
    rows = len(uniforms)
    logits = torch.as_tensor(np.asarray(logits, np.float32))
    temperature, top_p = (torch.as_tensor(np.broadcast_to(x, rows).astype(np.float64)) for x in (temperature, top_p))
    return sample_rows(logits.expand(rows, -1), temperature, top_p, torch.as_tensor(uniforms)).tolist()


def test_each_draw_is_that_of_the_plain_reference():
    """Rows of all kinds in one batch: each is drawn by its own temperature, top_p and number."""
    rng = np.random.default_rng(0)
    rows = 600
    logits = np.round(rng.normal(size=(rows, 23)) * 2, 1).astype(np.float32)  # with ties
    temperatures, top_ps = rng.choice([0, 0.3, 0.6, 1, 2.5], rows), rng.choice([0.05, 0.5, 0.9, 0.95, 1.0], rows)
    uniforms = rng.random(rows)
    drawn = sample_rows(*map(torch.as_tensor, (logits, temperatures, top_ps, uniforms))).tolist()
    assert drawn == [draw(*row) for row in zip(logits, temperatures, top_ps, uniforms, strict=True)]
    greedy = temperatures == 0
    assert np.array_equal(np.array(drawn)[greedy], logits[greedy].argmax(axis=1))
    assert np.mean(np.array(drawn)[~greedy] == logits[~greedy].argmax(axis=1)) < 0.7


def test_tokens_are_drawn_in_the_order_of_ids_not_of_probabilities():
    logits = np.log([0.2, 0.5, 0.3])
    assert sample(logits, 1.0, 1.0, [0.1, 0.19, 0.21, 0.69, 0.71, 0.99]) == [0, 0, 1, 1, 2, 2]
    assert sample(logits, 1.0, 0.7, [0.0, 0.6, 0.63, 0.99]) == [1, 1, 2, 2]  # without token 0: 5/8 and 3/8


def test_of_equal_tokens_the_lower_ids_are_in_the_nucleus():
    assert set(sample([0.0, 1.0, 1.0, 1.0, 1.0], 1.0, 0.4, np.linspace(0, 0.999, 50))) == {1, 2}


def test_near_equal_logits_may_swap_without_moving_a_draw():
    """1e-6 of a logit is what another batch may make of it."""
    rng = np.random.default_rng(1)
    uniforms = rng.random(2000)
    logits = rng.normal(size=40)
    logits[::4] = 2.0
    nudged = np.tile(logits, (2000, 1)) + rng.uniform(-1e-6, 1e-6, (2000, 40))
    assert len({tuple(np.argsort(row)) for row in nudged}) > 1900  # in many orders
    for top_p in (1.0, 0.9):  # which the last of the equal ones does not end
        ones = torch.ones(2000, dtype=torch.float64)
        moved = sample_rows(torch.as_tensor(nudged), ones, ones * top_p, torch.as_tensor(uniforms))
        assert np.mean(moved.numpy() != np.array(sample(logits, 1.0, top_p, uniforms))) < 0.001


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 0.95), (2.0, 0.5), (0.7, 0.05)])
def test_samples_have_the_stated_distribution(temperature, top_p):
    rows, logits = 40_000, np.array([1.0, 3.0, 3.0, -2.0, 0.5, 2.0, -30.0])
    expected = nucleus(probabilities(logits, temperature), top_p)
    drawn = sample(logits, temperature, top_p, row_uniforms(np.arange(rows), steps=5))
    shares = np.bincount(drawn, minlength=7) / rows
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / rows)
    assert not shares[expected == 0].any()


def test_extreme_draws_stay_in_the_nucleus():
    extreme = [0.0, 1 - 2.0**-53, 0.5]
    assert set(sample([0.0, 50.0, 0.0, -1e9], 1.0, 1.0, extreme)) <= {0, 1, 2}
    assert sample([0.0, 50.0, 0.0, -1e9], 1.0, 0.9, extreme) == [1, 1, 1]
    assert sample([0.0, 0.0, 0.0, -9.0], 1.0, 0.9, extreme) == [0, 2, 1]  # the last one of the nucleus is not the last


def test_uniforms_are_those_of_the_stated_generator():
    seeds = [0, 1, 7, 2**31 - 1]
    for step in (0, 11):
        assert row_uniforms(np.array(seeds), step).tolist() == [uniform(seed, step) for seed in seeds]


def test_uniforms_are_uniform_and_independent_of_the_batch():
    noise = np.stack([row_uniforms(np.arange(2000), step) for step in range(20)])
    assert 0 <= noise.min() < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.02
    assert row_uniforms(np.array([7]), 3)[0] == noise[3, 7]
