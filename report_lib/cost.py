"""What a search cost: floating-point operations of the generator and of the value model, from shapes in `meta.json`.

A forward pass over one token costs 2 operations per weight of a matrix it is multiplied with (one multiplication, one
addition), and 4 x layers x heads x head_dim per token it attends to (2 for its score, 2 for its share of the result).
This is Kaplan et al. 2020 (arXiv 2001.08361, section 2.1: 2 N + 2 n_layer n_ctx d_attn, where a causal token attends
to n_ctx / 2 on average) with the true context of every token, and with the output matrix counted, as Hoffmann et al.
2022 (arXiv 2203.15556, appendix F) do. Embedding look-ups, norms, biases and the softmax are left out. Nothing is
counted for backward passes: none run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_lib.tree import Tree

FORMULA = (
    "FLOPs of a forward pass = tokens x 2 x weights in matrices + 4 x layers x heads x head_dim x (tokens attended to, "
    "summed); Kaplan et al. 2020 (arXiv 2001.08361, sec. 2.1) with true contexts, output matrix included as in Hoffmann "
    "et al. 2022 (arXiv 2203.15556, app. F). Decode: tokens generated. Prefill: prompt tokens that the generator's cache "
    "did not hold; it depends on the engine (transformers keeps none between rounds). Value model: tokens scored. Shapes "
    "from meta.json."
)
COST_KEYS = ("flops_decode", "flops_prefill", "flops_score")


@dataclass(frozen=True)
class ForwardCost:
    """Operations of one token: `per_token`, and `per_context` for every token it attends to."""

    per_token: int
    per_context: int

    @classmethod
    def of(cls, shape: Mapping[str, Any], output_weights: int) -> "ForwardCost":
        """Of a Qwen2-like decoder (grouped-query attention, gated MLP) with an output matrix of so many weights."""
        hidden, head_dim, layers = shape["hidden_size"], shape["head_dim"], shape["num_hidden_layers"]
        heads, key_value_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        attention = hidden * head_dim * (2 * heads + 2 * key_value_heads)
        weights = layers * (attention + 3 * hidden * shape["intermediate_size"]) + output_weights
        return cls(2 * weights, 4 * layers * heads * head_dim)

    def flops(self, tokens: float, contexts: float) -> float:
        return tokens * self.per_token + contexts * self.per_context


Costs = tuple[ForwardCost, ForwardCost]  # of the generator, of the value model


def forward_costs(meta: Mapping[str, Any] | None) -> Costs | None:
    """None where the settings do not give both shapes."""
    try:
        generator, value_model = (meta or {})["generator"], (meta or {})["value_model"]
        head = value_model["hidden_size"] * (value_model["hidden_size"] + (value_model.get("num_labels") or 1))
        output = generator["hidden_size"] * generator["vocab_size"]
        return ForwardCost.of(generator, output), ForwardCost.of(value_model, head)
    except (KeyError, TypeError):
        return None


def contexts_of(start: int, length: int) -> int:
    """Tokens attended to, summed over `length` tokens after `start` others; each sees itself and all before it."""
    return length * start + length * (length + 1) // 2


def search_flops(tree: Tree, line: Mapping[str, Any], costs: Costs) -> dict[str, float] | None:
    """COST_KEYS of one finished search; None where the line does not tell what was scored and cached.

    Cached prompt tokens and re-read tokens are known as sums only, so they are taken to have the mean context of
    theirs.
    """
    if "tokens_scored" not in line or "tokens_cached" not in line:
        return None
    generator, value_model = costs
    prompt = len(tree.prompt_ids)
    generated = sum(map(len, tree.tokens))
    asked = [prompt + start for start in tree.start[1:]]  # prompt tokens of the request that wrote the node
    contexts = sum(contexts_of(before, len(tokens)) for before, tokens in zip(asked, tree.tokens[1:], strict=True))
    uncached = max(0.0, 1 - line["tokens_cached"] / max(1, sum(asked)))
    scored_share = line["tokens_scored"] / max(1, prompt + generated)
    return {
        "flops_decode": generator.flops(generated, contexts),
        "flops_prefill": uncached * generator.flops(sum(asked), sum(contexts_of(0, tokens) for tokens in asked)),
        "flops_score": scored_share * value_model.flops(prompt + generated, contexts_of(0, prompt) + contexts),
    }


def mean_costs(by_problem: Mapping[int, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """COST_KEYS and their sum `flops`: mean over problems of the mean over repetitions. Times m: of m pooled ones."""
    problems = by_problem.values()
    means = {
        key: sum(sum(search[key] for search in searches) / len(searches) for searches in problems) / len(problems)
        for key in COST_KEYS
    }
    return means | {"flops": sum(means.values())}
