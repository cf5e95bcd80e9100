"""What an attention kernel is told, and what it really weighs, against what each token may see: exactly."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from training_lib.attention import Attention, Inputs
from training_lib.packing import MicroBatch
from training_lib.precision import Precision


def visible(batch: MicroBatch) -> np.ndarray:
    """bool [B, S, S]: query q (second axis) may attend to key k, from the traces' own lengths, or the row's `end`."""
    rows, width = batch.input_ids.shape
    place = np.arange(width)
    causal = place[None, :] <= place[:, None]
    end = np.full((rows, width), width) if batch.end is None else batch.end
    return causal & (place[:, None] < end[:, None, :])


def real(batch: MicroBatch) -> np.ndarray:
    """bool [B, S]: which tokens are not padding."""
    width = batch.input_ids.shape[1]
    if batch.end is None:
        return np.arange(width) <= (batch.last_index % width)[:, None]
    return np.arange(width)[None] < batch.num_tokens


# ---------------------------------------------------------------------------------------------------------------------
# What the kernel is told


def wrong_integers(batch: MicroBatch, inputs: Inputs) -> str | None:
    """How a batch's inputs differ from its `end`; None where they say the same of every pair of tokens."""
    mask, wanted = inputs.get("attention_mask"), visible(batch)
    if isinstance(mask, BlockMask):
        return _wrong_blocks(mask, wanted[0])
    if isinstance(mask, torch.Tensor):
        return _differing("the mask", mask[:, 0].cpu().numpy().astype(int), wanted)
    if "cu_seq_lens_q" in inputs:
        return _wrong_bounds(inputs, batch, wanted)
    return None if batch.end is None else "a packed row has no mask"


def _differing(what: str, counts: np.ndarray, wanted: np.ndarray) -> str | None:
    """counts: how often each pair is visited; once where it is wanted, else never."""
    wrong = np.argwhere(counts != wanted)
    if not len(wrong):
        return None
    query, key = wrong[0][-2:]
    return f"{what} differs from the traces in {len(wrong)} pairs, the first: token {query} and token {key}"


def _wrong_bounds(inputs: Inputs, batch: MicroBatch, wanted: np.ndarray) -> str | None:
    bounds, (rows, width) = inputs["cu_seq_lens_q"].cpu().numpy(), batch.input_ids.shape
    lengths = np.diff(bounds)
    if bounds[0] != 0 or bounds[-1] != rows * width or lengths.min() < 1 or lengths.max() > inputs["max_length_q"]:
        return f"the sequences' bounds {bounds.tolist()} do not divide {rows * width} tokens"
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(rows * width)
    told = (sequence[:, None] == sequence[None, :]) & (place[None, :] <= place[:, None])
    whole = np.zeros_like(told)
    for row in range(rows):
        part = slice(row * width, (row + 1) * width)
        whole[part, part] = wanted[row]
    kept = real(batch).ravel()  # padding may see padding as it likes
    mixed = np.flatnonzero(np.bincount(sequence, kept) % lengths)
    if len(mixed):
        return f"the sequence from token {bounds[mixed[0]]} on holds padding, too"
    return _differing("the sequences' bounds", (told & kept[:, None]).astype(int), whole & kept[:, None])


def _wrong_blocks(mask: BlockMask, wanted: np.ndarray) -> str | None:
    """Of the lists that the forward goes by, of those that the backward goes by, and of `mask_mod`."""
    size, block = len(wanted), mask.BLOCK_SIZE[0]
    place = torch.arange(size, device=mask.kv_indices.device)
    zero = torch.zeros((), dtype=torch.int64, device=place.device)
    allowed = mask.mask_mod(zero, zero, place[:, None], place[None, :]).cpu().numpy()
    if wrong := _differing("mask_mod", allowed.astype(int), wanted):
        return wrong
    lists = {
        "the lists of key blocks": (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices),
        "the lists of query blocks": (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices),
    }
    for what, (counts, indices, full_counts, full_indices) in lists.items():
        whole, partial = _listed(full_counts, full_indices), _listed(counts, indices)
        if "query" in what:
            whole, partial = whole.T, partial.T
        if wrong := _differing(what, _spread(whole, block) + _spread(partial, block) * allowed, wanted):
            return wrong
    return None


def _listed(counts: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    """int [n, n]: how often row i's list names block j. counts [1, 1, n], indices [1, 1, n, n]."""
    numbers, named = counts[0, 0].cpu().numpy(), indices[0, 0].cpu().numpy()
    found = np.zeros((len(numbers), named.shape[1]), dtype=int)
    for row, count in enumerate(numbers):
        np.add.at(found[row], named[row, :count], 1)
    return found


def _spread(blocks: np.ndarray, size: int) -> np.ndarray:
    return blocks.repeat(size, axis=0).repeat(size, axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# What the kernel weighs


def kernel_leaks(
    batch: MicroBatch, attention: Attention, model: nn.Module, device: torch.device, precision: Precision
) -> str | None:
    """Where the kernel's weights, or their gradients, are not 0 though a token may not see the other, or are 0 though it may.

    Weights are read out: with equal scores and values that are unit vectors, a channel of the output is the weight of one
    key; so is one of a value's gradient that of one query. Scores' gradients come out likewise, of queries where keys are
    unit vectors and of keys where queries are.
    """
    config, (rows, width) = model.config, batch.input_ids.shape
    heads, kv_heads, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        model.model.layers[0].self_attn.head_dim,
    )
    attend = _kernel(batch, attention, model, device)
    dtype = torch.bfloat16 if precision.half_attention else torch.float32
    wanted, kept = torch.from_numpy(visible(batch)), torch.from_numpy(real(batch))[:, :, None]
    generator = torch.Generator().manual_seed(0)
    zeros = {count: torch.zeros(rows, count, width, size, device=device, dtype=dtype) for count in (heads, kv_heads)}
    random = {count: torch.randn(zeros[count].shape, generator=generator).to(device, dtype) for count in zeros}
    first_heads = slice(None, None, heads // kv_heads)  # of each group of queries
    for begin in range(0, width, kv_heads * size):
        units = _unit_vectors(rows, kv_heads, width, size, begin).to(device, dtype)
        of_queries = zeros[heads].clone()
        of_queries[:, first_heads] = units
        out, _, _, of_value = attend(zeros[heads], zeros[kv_heads], units, of_queries)
        _, of_query, _, _ = attend(zeros[heads], units, random[kv_heads], random[heads])
        _, _, of_key, _ = attend(of_queries, zeros[kv_heads], random[kv_heads], random[heads])
        chosen = slice(begin, min(begin + kv_heads * size, width))
        count = chosen.stop - begin
        for what, read, queries, keys, must in (  # read: [B, queries, keys]
            ("weights", _read(out[:, first_heads], count), slice(0, width), chosen, True),
            ("gradient of values", _read(of_value, count).transpose(1, 2), chosen, slice(0, width), True),
            ("gradient of queries", _read(of_query[:, first_heads], count), slice(0, width), chosen, False),
            ("gradient of keys", _read(of_key, count).transpose(1, 2), chosen, slice(0, width), False),
        ):
            seen, may = read != 0, wanted[:, queries, keys]  # NaN is not 0
            wrong = ((seen != may) if must else (seen & ~may)) & kept[:, queries]
            if wrong.any():
                row, query, key = wrong.nonzero()[0].tolist()
                weighs = "weighs" if seen[row, query, key] else "does not weigh"
                return f"{what}: token {query + queries.start} {weighs} token {key + keys.start}"
    return None


def _kernel(batch: MicroBatch, attention: Attention, model: nn.Module, device: torch.device) -> Callable:
    """(query, key, value, gradient of the output), each [B, heads, S, d] -> [output, gradients of the three]."""
    inputs = {
        name: part for name, part in attention.inputs(batch, device).items() if name not in ("input_ids", "use_cache")
    }
    mask = inputs.pop("attention_mask", None)
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    module, kernel = model.model.layers[0].self_attn, AttentionInterface()[attention.name]

    def attend(*parts: torch.Tensor) -> list[torch.Tensor]:
        given = [part.detach().clone().requires_grad_() for part in parts[:3]]
        out, _ = kernel(module, *given, mask, dropout=0.0, scaling=1.0, **inputs)
        return [out.transpose(1, 2).detach(), *torch.autograd.grad(out, given, parts[3].transpose(1, 2))]

    return attend


def _unit_vectors(rows: int, heads: int, width: int, size: int, begin: int) -> torch.Tensor:
    """[rows, heads, width, size]: 1 in channel c of head h at place begin + h * size + c, else 0."""
    found = torch.zeros(rows, heads, width, size)
    places = torch.arange(begin, min(begin + heads * size, width))
    found[:, (places - begin) // size, places, (places - begin) % size] = 1
    return found


def _read(part: torch.Tensor, count: int) -> torch.Tensor:
    """[rows, heads, width, size] -> float32 [rows, width, count]: the channels of all heads one behind the other."""
    return part.transpose(1, 2).flatten(2)[..., :count].float().cpu()
