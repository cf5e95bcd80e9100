"""The scorer's account of memory, alone: sums of bytes, and how many rows fit."""

import random

import pytest
import tiny
from transformers import Qwen2Config

from classifier_lib.cache_budget import CacheBudget, TokenBytes
from common_lib.cli import UserError
from common_lib.models import check_value_cache, inspect_model

TOKEN = TokenBytes(kv=100, new=1000, key=10, pair=1)


def test_bytes_of_the_released_model():
    shape = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    config = Qwen2Config(**shape, num_key_value_heads=2)
    on_gpu = TokenBytes.of_config(config, itemsize=2, masked=False)
    assert on_gpu == TokenBytes(
        kv=2 * 28 * 2 * 128 * 2, new=2 * (4 * 1536 + 3 * 8960 + 2 * 1536 + 2 * 256), key=6144, pair=0
    )
    assert TokenBytes.of_config(config, itemsize=4, masked=True).pair == 5


def test_a_pass_is_its_working_copy_and_its_activations():
    budget = CacheBudget(TOKEN)
    assert budget.pass_bytes(rows=3, prefix=0, new=4) == 3 * 4 * (100 + 1000)
    assert budget.pass_bytes(rows=3, prefix=6, new=4) == 3 * (10 * (100 + 10) + 4 * 1000) + 4 * 10 * 1


@pytest.mark.parametrize("seed", range(50))
def test_as_many_rows_as_fit_and_not_one_more(seed):
    rng = random.Random(seed)
    token = TokenBytes(*(rng.randint(0 if at else 1, 500) for at in range(4)))
    budget = CacheBudget(token, limit=rng.randint(1, 1_000_000))
    held = rng.randint(0, 100)
    assert budget.hold(held) == (held * token.kv <= budget.limit)
    prefix, new, held_after = rng.randint(0, 40), rng.randint(1, 40), rng.choice((0, 40))
    rows = budget.rows_that_fit(prefix, new, held_after)

    def fits(rows):
        after = rows * (prefix + new + held_after) * token.kv
        return budget.held + max(budget.pass_bytes(rows, prefix, new), after) <= budget.limit

    assert fits(rows) or rows == 1
    assert not fits(rows + 1)


def test_held_caches_and_working_copy_share_the_limit():
    budget = CacheBudget(TOKEN, limit=1000)
    assert budget.hold(4)
    with budget.reading(rows=1, prefix=2, new=2):
        assert budget.free == 200
        assert not budget.hold(3)
        assert budget.hold(2)
        assert budget.free == 0
    assert budget.free == 400
    budget.drop(6)
    assert (budget.held, budget.free) == (0, 1000)


def test_a_failed_pass_gives_its_working_copy_back():
    budget = CacheBudget(TOKEN, limit=1000)
    with pytest.raises(MemoryError), budget.reading(rows=1, prefix=0, new=5):
        raise MemoryError
    assert budget.free == 1000


def test_without_a_limit_everything_fits():
    budget = CacheBudget(TOKEN)
    assert budget.hold(10**9)
    assert budget.rows_that_fit(prefix=10**5, new=10**4, held_after=10**4) > 10**4


def test_the_least_cache_that_the_script_accepts_holds_every_row_of_a_trace(tmp_path):
    info = inspect_model(tiny.save_value_model(tmp_path), "--classifier_ckpt_path")
    token, trace = TokenBytes.of_config(tiny.tiny_config(), itemsize=4, masked=True), 57
    least = 2 * trace * token.kv
    check_value_cache(least / 1e9, info, "fp32", trace)
    with pytest.raises(UserError, match="cannot hold one trace of 57 tokens"):
        check_value_cache((least - 1) / 1e9, info, "fp32", trace)
    for prefix in range(trace):
        budget = CacheBudget(token, least)
        assert budget.hold(prefix)
        budget.check_last_row(prefix, trace - prefix)
    assert budget.hold(1)
    assert budget.hold(1)
    with pytest.raises(ValueError, match="cannot hold a trace of 57 tokens .* it needs 2.89e-05 GB"):
        budget.check_last_row(prefix, trace - prefix)
