"""Who gets how much memory: the sums, the statement, and when there is too little."""

import random

import pytest
import torch
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier, ValueScorer
from classifier_lib.cache_budget import CacheBudget, TokenBytes
from common_lib.cli import UserError
from common_lib.models import ModelInfo
from search_lib.memory_plan import (
    EngineMemory,
    auto_limit,
    check_limit,
    elsewhere,
    plan_memory,
    plan_served_memory,
    pool_shortage,
    served_working_set,
    shortage,
    working_set,
)  # fmt: skip
from search_lib.tree import SearchConfig

GB = 10**9
# The released models' shapes.
SHAPES = dict(num_hidden_layers=28, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
              num_key_value_heads=2, vocab_size=151936)  # fmt: skip
GENERATOR = ModelInfo(
    "generator", "", **SHAPES, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=False,
    num_parameters=1_777_000_000, num_parameters_embedding=233_000_000, num_labels=None, has_lm_head=True,
)  # fmt: skip
RELEASED = SearchConfig(num_beams=4, beam_width=2, block_size=4096, max_length=16384)


def promise(device="cuda:0", free=36 * GB, limit=32 * GB, **engine):
    engine = EngineMemory(**({"free_before": 84 * GB, "free_after": 40 * GB, "described": {}} | engine))
    return plan_memory(device, free, 85 * GB, engine, GENERATOR, int(3.1 * GB), limit, 3 * GB)


def test_the_statement_of_an_engine_in_process():
    plan = promise(described={"kv_pool_tokens": 1_300_000, "tp_size": 1})
    assert plan.parts == {
        "generator_weights": 3_554_000_000,
        "kv_pool": 1_300_000 * 28_672,
        "graphs": 44 * GB - 3_554_000_000 - 1_300_000 * 28_672,
        "value_weights": 3_100_000_000,
        "value_cache": 29 * GB,
        "activations": 3 * GB,
        "left": 4 * GB,
        "other": 85 * GB - 44 * GB - 3_100_000_000 - 36 * GB,
    }
    assert sum(plan.parts.values()) == plan.total == 85 * GB
    assert plan.line() == (
        "memory of cuda:0, 85 GB: generator weights 3.55, kv pool 37.3, graphs 3.17; "
        "value weights 3.1, value cache 29, activations 3; other 1.9, left 4"
    )


def test_ranks_share_weights_and_pool_and_heads_are_split_no_further_than_there_are():
    described = {"kv_pool_tokens": 1_000_000, "tp_size": 4}
    parts = promise(described=described).parts
    assert (parts["generator_weights"], parts["kv_pool"]) == (888_500_000, 1_000_000 * 28_672 // 2)


def test_the_statement_of_a_server_and_of_a_cpu():
    plan = promise(elsewhere="generator on its servers", free_before=41 * GB)
    assert not plan.parts.keys() & {"generator_weights", "kv_pool", "graphs"}
    assert plan.line().startswith("memory of cuda:0, 85 GB: generator on its servers; value weights 3.1, ")
    assert plan.parts["other"] == 85 * GB - 36 * GB - 3_100_000_000
    on_cpu = promise("cpu", described={"kv_pool_tokens": 1000})
    assert "graphs" not in on_cpu.parts  # of what a start took of the RAM nobody can tell
    assert on_cpu.parts["kv_pool"] == 1000 * 2 * 28_672


def test_two_engines_of_one_gpu_have_each_its_share():
    generator = EngineMemory(84 * GB, 40 * GB, {"kv_pool_tokens": 1_300_000})
    value = EngineMemory(40 * GB, 5 * GB, {"kv_pool_tokens": 1_000_000, "tp_size": 2})
    plan = plan_served_memory("cuda:0", 5 * GB, 85 * GB, generator, GENERATOR, value, GENERATOR, 2)
    assert sum(plan.parts.values()) == plan.total
    assert plan.line() == (
        "memory of cuda:0, 85 GB: generator weights 3.55, kv pool 37.3, graphs 3.17; "
        "value weights 1.78, value kv pool 14.3, value graphs 18.9; other 1, left 5"
    )
    value = EngineMemory(40 * GB, 40 * GB, {}, "value model on its servers")
    plan = plan_served_memory("cuda:0", 40 * GB, 85 * GB, generator, GENERATOR, value, GENERATOR, 2)
    assert plan.line().endswith("; value model on its servers; other 1, left 40")


@pytest.mark.parametrize(
    ("engine", "device", "value_device", "described", "expected"),
    [
        ("sglang", "cuda", "cuda:0", {}, ""),
        ("sglang", "cuda:0", "cuda:1", {}, "generator on cuda:0"),
        ("sglang", "cuda:0", "cuda:1", {"tp_size": 2}, ""),
        ("sglang", "cuda:0", "cuda:2", {"dp_size": 2}, "generator on cuda:0"),
        ("transformers", "cpu", "cuda:0", {}, "generator on cpu"),
        ("transformers", "cuda:0", "cpu", {}, "generator on cuda:0"),
        ("transformers", "cpu", "cpu", {}, ""),
        ("sglang-server", "cuda", "cuda", {}, "generator on its servers"),
    ],
)
def test_where_the_generator_is(engine, device, value_device, described, expected):
    assert elsewhere(engine, device, value_device, described) == expected


def test_auto_takes_what_is_free_but_for_a_reserve():
    assert auto_limit("cuda:0", 40 * GB, 80 * GB) == 36 * GB
    assert auto_limit("cuda:0", 40 * GB, 80 * GB, shared=True) == 18 * GB
    assert auto_limit("cuda:0", 3 * GB, 80 * GB) == 0
    assert auto_limit("cpu", 40 * GB, 80 * GB) == 10 * GB


def test_too_little_for_one_trace_is_told_before_searching():
    check_limit(10, 20, "cuda:0", least=10)
    with pytest.raises(
        UserError, match=r"1.5 GB are free on cuda:0, of which .* take 0.5, but .* need 0.97; lower --piref_gpu_util"
    ):
        check_limit(GB // 2, 3 * GB // 2, "cuda:0", least=970_000_000)


# ---------------------------------------------------------------------------------------------------------------------
# The least cache


def wanted(searches: int, limit: int) -> int:
    token = TokenBytes.of_config(Qwen2Config(**SHAPES), 2, masked=False)
    budget = CacheBudget(token, limit)
    return working_set(RELEASED, 500, searches) * token.kv + budget.activation_bytes(32768, 500 + 12288, 4096)


@pytest.mark.parametrize(("gb", "warned"), [(3, True), (19, True), (32, False), (40, False)])
def test_the_released_command_is_warned_where_it_would_read_a_fifth_again(gb, warned):
    text = shortage(gb * GB, 60 * GB, "cuda:0", wanted(32, gb * GB), 32)
    assert bool(text) == warned
    assert bool(text) == (reread(gb) > 1.2)


def test_a_shortage_says_what_to_change():
    text = shortage(15 * GB, 20 * GB, "cuda:0", 30 * GB, 32)
    assert text.startswith("the value model's caches of 15 GB are 50% of the 30 GB that 32 searches want at once, ")
    assert "--batch_size 16" in text and "--piref_gpu_util" in text and "--mem-fraction-static" in text
    free = "(60 GB are free on cpu); give "
    assert f"{free}--batch_size 16, or give a larger --value_cache_gb" in shortage(15 * GB, 60 * GB, "cpu", 30 * GB, 32)
    assert f"{free}a larger --value_cache_gb" in shortage(15 * GB, 60 * GB, "cpu", 30 * GB, 1)
    assert shortage(15 * GB, 10 * GB, "cuda:0", GB, 32) == (
        "--value_cache_gb 15 is more than the 10 GB that are free on cuda:0"
    )
    assert shortage(GB, 10 * GB, "cuda:0", GB, 1) == ""


def test_several_devices_share_the_searches():
    """A device that holds half of what its 16 want: half of all 32."""
    assert "the 30 GB that 16 searches want at once" in shortage(15 * GB, 20 * GB, "cuda:0", 30 * GB, 16, 32)
    assert "give --batch_size 16, or" in shortage(15 * GB, 20 * GB, "cuda:0", 30 * GB, 16, 32)


def test_the_pool_of_a_served_value_model():
    """Measured with SGLang: 8 searches of 4 x 2 candidates that start together, blocks of 64, 320 tokens. A pool of 12,768
    tokens computes each token once, one of 8,672 1.87 times; so the latter, which holds them half-way, must be told of."""
    shape = SearchConfig(4, 2, 64, 320)
    wanted = served_working_set(shape, 60, 8)
    assert wanted == 8 * (60 + 4 * 256 + 8 * 64) == 12_768
    assert pool_shortage(wanted, wanted, 8, "give more") == ""
    assert pool_shortage(8_672, wanted, 8, "give more") == (
        "the value engine's cache holds 8,672 tokens, and 8 searches want 12,768 at once, so tokens will be computed again; "
        "give --batch_size 5, or give more"
    )
    assert pool_shortage(100, wanted, 8, "give more").endswith("again; give more")
    assert served_working_set(SearchConfig(8, 1, 320, 320), 60, 8) == 8 * (60 + 8 * 320)  # one round


def test_fewer_searches_and_single_rounds_want_less():
    assert working_set(RELEASED, 500, 2) == 2 * (500 + 4 * 6144) + 8 * (500 + 6144 + 8192)
    assert working_set(SearchConfig(8, 1, 16384, 16384), 500, 32) == 32 * 500 + 8 * (500 + 2 * 16384)
    assert working_set(SearchConfig(4, 2, 4096, 16385), 0, 1) > working_set(SearchConfig(4, 2, 4096, 16384), 0, 1)


class Unread(ValueScorer):
    """The scorer itself with tensors that hold nothing and values drawn at random."""

    rng = random.Random(0)

    def _working_cache(self, rows, length):
        return torch.empty(2, 1, len(rows), 1, length, 1, device="meta")

    def _forward(self, kv, rows, prefix, width):
        return [self.rng.random() for _ in rows]


def reread(gb: float, scale: int = 128) -> float:
    """Tokens scored over tokens given: 96 searches, 32 at once, in which a token stands for `scale`."""
    with torch.device("meta"):
        model = Qwen2ForClassifier._from_config(
            Qwen2Config(**SHAPES | {"vocab_size": 9}, num_labels=3), dtype=torch.bfloat16
        )
    scorer, rng = Unread(model, gb * GB), random.Random(1)
    token = scorer.budget.token
    scorer.budget = CacheBudget(TokenBytes(token.kv * scale, token.new * scale, token.key * scale, 0), gb * GB)
    scorer.max_batch_tokens //= scale
    waiting, block, given, turn = list(range(96)), 4096 // scale, 0, 0.0
    running = {}  # search -> (its turn, beams, rounds done)
    while waiting or running:
        while waiting and len(running) < 32:
            tree = waiting.pop()
            scorer.start(str(tree), [1] * (500 // scale))
            running[tree], given = (turn + 1 + rng.random() / 2, [0] * 4, 0), given + 500 // scale
        tree = min(running, key=running.get)
        turn, beams, rounds = running[tree]
        items = [(beam, [2] * block) for beam in beams for _ in range(2)]
        values, given = scorer.score(str(tree), items, [rounds == 3] * 8), given + 8 * block
        if rounds == 3:
            del running[tree]
            scorer.release(str(tree))
            continue
        best = sorted(range(8), key=lambda i: -values[i])[:4]
        beams = [1 + 8 * rounds + i for i in best]
        scorer.keep(str(tree), beams)
        running[tree] = (turn + 1 + rng.random() / 2, beams, rounds + 1)
    return scorer.usage.tokens_scored / given


def test_what_a_larger_cache_saves():
    """The figures that the warning rests on."""
    found = [reread(gb) for gb in (3, 19, 32, 40)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.6 and 1.3 < found[1] < 1.6 and found[2] < 1.2 and found[3] < 1.02
