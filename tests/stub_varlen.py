"""A varlen kernel for a CPU: dense math of flash-attn's meaning, and for the compiler an operator that it cannot see into."""

import torch

from training_lib.attention import varlen_attention
from training_lib.varlen import register_varlen

calls: list[tuple[int, int]] = []  # (tokens, longest) of each


def _weights(query, key, bounds, scale):
    """(scaled) softmax over the keys of a query's own sequence up to itself, float32 [heads, T, T]."""
    place = torch.arange(len(query), device=query.device)
    sequence = torch.bucketize(place, bounds.long(), right=True)
    seen = (sequence[:, None] == sequence[None, :]) & (place[None, :] <= place[:, None])
    scores = _heads(query, 1) @ _heads(key, query.shape[1] // key.shape[1]).transpose(1, 2) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _heads(part, groups):
    """[T, heads, d] -> float32 [heads * groups, T, d]."""
    return part.float().repeat_interleave(groups, dim=1).transpose(0, 1)


@torch.library.custom_op("vgs_tests::varlen", mutates_args=())
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    assert query.dtype == key.dtype == value.dtype and all(part.is_contiguous() for part in (query, key, value))
    assert bounds.dtype == torch.int32 and longest == int(bounds.diff().max()) and bounds[-1] == len(query)
    calls.append((len(query), longest))
    values = _heads(value, query.shape[1] // value.shape[1])
    return (_weights(query, key, bounds, scale) @ values).transpose(0, 1).to(query.dtype).contiguous()


@torch.library.custom_op("vgs_tests::varlen_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = query.shape[1] // key.shape[1]
    q, k, v, out = _heads(query, 1), _heads(key, groups), _heads(value, groups), _heads(grad, 1)
    weights = _weights(query, key, bounds, scale)
    inner = out @ v.transpose(1, 2)
    scores = weights * (inner - (inner * weights).sum(-1, keepdim=True)) * scale
    of_query, of_key, of_value = scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ out
    of_key, of_value = (part.unflatten(0, (-1, groups)).sum(1) for part in (of_key, of_value))
    return tuple(part.transpose(0, 1).to(query.dtype).contiguous() for part in (of_query, of_key, of_value))


_forward.register_fake(lambda query, key, value, bounds, longest, scale: torch.empty_like(query))
_backward.register_fake(lambda grad, *parts: tuple(torch.empty_like(part) for part in parts[:3]))


def _keep(ctx, inputs, output):
    query, key, value, bounds, _, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, bounds)


_forward.register_autograd(
    lambda ctx, grad: (*_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None),
    setup_context=_keep,
)


def attend(query, key, value, bounds, longest, dropout, scale):
    assert dropout == 0
    return _forward(query, key, value, bounds, longest, scale)


STUB = varlen_attention("varlen_stub", has_dropout=False)
register_varlen(STUB.name, attend)
