"""Sampling: against a plain reference in numpy, the distribution, and draws that rounding does not move."""

import numpy as np
import pytest
import torch
from plain_sampling import draw, nucleus, probabilities, uniform

from engine_lib import sampling
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


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_nothing_is_made_up_where_logits_are_no_numbers(top_p):
    for broken in ([0.0, float("nan"), 1.0], [float("-inf")] * 3):
        with pytest.raises(ValueError, match="logits are no numbers"):
            sample(broken, 0.6, top_p, [0.5])
    assert sample([0.0, float("-inf"), float("-inf")], 0.6, top_p, [0.5]) == [0]


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


# The shortlist: the draws of a whole sort

VOCABULARY, SHORT = 300, 40


def adversarial_rows() -> dict[str, np.ndarray]:
    """Logits whose nuclei end within the shortlist, at its border, or beyond."""
    rng = np.random.default_rng(3)
    border = np.full(VOCABULARY, -5.0)
    border[rng.permutation(VOCABULARY)[:60]] = 1.0  # more equal ones than the shortlist holds
    head = border.copy()
    head[rng.permutation(VOCABULARY)[:30]] = 3.0
    exact = np.full(VOCABULARY, -30.0)
    exact[rng.permutation(VOCABULARY)[:SHORT]] = 2.0  # the shortlist is the nucleus
    return {
        "random": rng.normal(size=VOCABULARY) * 3,
        "peaked": np.where(np.arange(VOCABULARY) == 77, 20.0, rng.normal(size=VOCABULARY)),
        "flat": np.zeros(VOCABULARY),
        "nearly flat": rng.normal(size=VOCABULARY) * 1e-7,
        "equal at the border": border,
        "equal after a head": head,
        "the shortlist and nothing else": exact,
        "rounded as in bf16": np.asarray(torch.tensor(rng.normal(size=VOCABULARY) * 3).bfloat16().double()),
        "a few are possible": np.where(np.arange(VOCABULARY) % 100 == 7, 0.0, -np.inf),
        "of few kinds": rng.choice([0.0, 1.0, 2.0, 3.0], VOCABULARY),
    }


@pytest.mark.parametrize("name", adversarial_rows())
def test_a_shortlist_draws_what_a_whole_sort_draws(name, monkeypatch):
    """At every temperature and top_p, and those at which the nucleus ends with the last of the shortlist."""
    logits = torch.tensor(adversarial_rows()[name], dtype=torch.float32)
    mass = torch.softmax(logits.double(), 0).sort(descending=True).values.cumsum(0)[[SHORT - 2, SHORT - 1, SHORT]]
    top_ps = [0.01, 0.3, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12, 1.0, *mass.clamp(max=1).tolist(), *(mass / 2).tolist()]
    uniforms = [0.0, 1e-9, 0.1, 0.35, 0.5, 0.77, 0.9, 0.999, 1 - 2.0**-53]
    cases = [(t, p, u) for t in (0, 0.3, 0.6, 1.0, 2.5, 100.0) for p in top_ps for u in uniforms]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*cases, strict=True)]
    rows = logits.expand(len(cases), -1)
    drawn = {}
    for size in (SHORT, VOCABULARY):
        monkeypatch.setattr(sampling, "SHORTLIST", size)
        drawn[size] = sample_rows(rows, *columns)
    assert torch.equal(drawn[SHORT], drawn[VOCABULARY])


def test_shortlists_are_drawn_from_as_the_plain_reference_draws(monkeypatch):
    monkeypatch.setattr(sampling, "SHORTLIST", 5)
    rng = np.random.default_rng(5)
    logits = np.round(rng.normal(size=(300, 23)) * 2, 1).astype(np.float32)
    temperatures, top_ps, uniforms = rng.choice([0.3, 1, 2.5], 300), rng.choice([0.3, 0.7, 0.95], 300), rng.random(300)
    drawn = sample_rows(*map(torch.as_tensor, (logits, temperatures, top_ps, uniforms))).tolist()
    assert drawn == [draw(*row) for row in zip(logits, temperatures, top_ps, uniforms, strict=True)]


def test_only_rows_whose_nucleus_is_larger_are_sorted_whole(monkeypatch):
    """And none of those that keep every token, or are greedy."""
    monkeypatch.setattr(sampling, "SHORTLIST", SHORT)
    given, kept_of = [], sampling._kept_of
    monkeypatch.setattr(sampling, "_kept_of", lambda ids, *more: given.append(ids.shape) or kept_of(ids, *more))
    rows = adversarial_rows()
    names = ["peaked", "flat", "random", "flat", "flat", "nearly flat"]
    logits = torch.tensor(np.stack([rows[name] for name in names]), dtype=torch.float32)
    temperatures = torch.tensor([1, 1, 0.6, 0, 1, 1], dtype=torch.float64)
    top_ps = torch.tensor([0.95, 0.95, 0.9, 0.95, 1.0, 0.95], dtype=torch.float64)
    sample_rows(logits, temperatures, top_ps, torch.full((6,), 0.5, dtype=torch.float64))
    assert given == [(6, SHORT), (2, VOCABULARY)]


def test_the_rows_of_a_large_batch_are_drawn_some_at_a_time(monkeypatch):
    rng = np.random.default_rng(6)
    logits = torch.tensor(rng.normal(size=(50, 30)))
    columns = [torch.tensor(rng.uniform(0.2, 0.9, 50)) for _ in range(3)]
    whole, seen, draw_rows = sample_rows(logits, *columns), [], sampling._draw
    monkeypatch.setattr(sampling, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(sampling, "_draw", lambda some, *more: seen.append(len(some)) or draw_rows(some, *more))
    assert torch.equal(sample_rows(logits, *columns), whole)
    assert seen == [16, 16, 16, 2]


def test_each_row_may_be_at_a_step_of_its_own():
    seeds, steps = np.array([3, 3, 9]), np.array([0, 7, 7])
    assert row_uniforms(seeds, steps).tolist() == [uniform(3, 0), uniform(3, 7), uniform(9, 7)]


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
