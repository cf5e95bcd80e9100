"""How roll-outs are laid out in the rows that the value model reads: padded, packed, or as a trie. Pure numpy.

One vector describes every packed row: token q may attend to token k where `k <= q < end[k]`. For packed traces that is
the end of k's own trace; for a trie in depth-first order it is the end of k's subtree, so that a prefix which several
traces share is computed once. A position can be a roll-out token of one trace and a roll-in token of another: the loss
is therefore described by (position, roll-out) pairs, not by a mask over positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

PAD_ID = 0  # padding is never attended to and has no loss: any id of the vocabulary does


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One training sample: a roll-in and what the fixed policy then wrote, cut at `max_length` tokens."""

    tokens: np.ndarray  # int32 or int64 [length], the roll-in and then the roll-out
    start: int  # first roll-out token; `length` or more where the roll-out was cut away whole
    label: int
    source: tuple[int, int]  # row of the data set, place in the row's lists: to name the sample in a message


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one forward pass reads, and where its losses are. Every array is int64.

    input_ids, position_ids [B, S]; end [B, S], or None where each row is one right-padded trace (causal attention).
    token_index, rollout_index [P]: row `token_index[p]` of the logits, flattened to [B * S, C], is a roll-out token of
    roll-out `rollout_index[p]`. labels, last_index [R]: label of each roll-out; flat place of its trace's last token.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    end: np.ndarray | None
    token_index: np.ndarray
    rollout_index: np.ndarray
    labels: np.ndarray
    last_index: np.ndarray
    sources: tuple[tuple[int, int], ...]
    num_tokens: int  # tokens computed that are not padding
    num_pairs: int  # (query, key) pairs of these tokens that attention needs, per head


Unit = Sequence[Trace]  # traces that must share a row: one roll-out, or a Bradley-Terry pair


def lay_out(
    units: Sequence[Unit],
    packing: str,
    micro_batch_size: int,
    max_length: int,
    multiple: int = 8,
    row_tokens: int | None = None,
) -> list[MicroBatch]:
    """Lay out the roll-outs that one rank computes in one step.

    none: `micro_batch_size` traces a micro batch, in the order given, right-padded to a bucket. pack, tree: rows of at
    most `row_tokens` tokens (None: `micro_batch_size * max_length`), as many as are needed, each padded to `multiple`. No
    unit is split.
    """
    capacity = row_tokens or micro_batch_size * max_length
    if packing == "none":
        traces = [trace for unit in units for trace in unit]
        starts = range(0, len(traces), micro_batch_size)
        return [padded_batch(traces[i : i + micro_batch_size], max_length) for i in starts]
    if packing == "pack":
        return [packed_row(traces, multiple) for traces in _fill_rows(units, capacity)]
    if packing == "tree":
        return [tree_row(traces, multiple) for traces in _fill_tree_rows(units, capacity)]
    raise ValueError(f"unknown packing {packing!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def padded_batch(traces: Sequence[Trace], max_length: int) -> MicroBatch:
    """One trace a row, right-padded to one of at most 16 different lengths, so that there are few shapes to compile."""
    bucket = max(8, max_length // 16)
    longest = max(len(trace.tokens) for trace in traces)
    width = min(-(-longest // bucket) * bucket, max(max_length, longest))
    input_ids = np.full((len(traces), width), PAD_ID, dtype=np.int64)
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape)
    places = [row * width + np.arange(len(trace.tokens)) for row, trace in enumerate(traces)]
    real = np.concatenate(places)
    input_ids.flat[real] = np.concatenate([trace.tokens for trace in traces])
    return _micro_batch(traces, places, input_ids, position_ids, None, real % width)


def packed_row(traces: Sequence[Trace], multiple: int = 8) -> MicroBatch:
    """Traces one behind the other in one row; positions restart with each."""
    offsets = np.cumsum([0, *(len(trace.tokens) for trace in traces)])
    places = [np.arange(a, b) for a, b in pairwise(offsets)]
    tokens = np.concatenate([trace.tokens for trace in traces])
    positions = np.concatenate([np.arange(len(trace.tokens)) for trace in traces])
    end = np.repeat(offsets[1:], np.diff(offsets))
    return _padded_row(traces, places, tokens, positions, end, multiple)


def tree_row(traces: Sequence[Trace], multiple: int = 8) -> MicroBatch:
    """The traces' trie in depth-first order in one row; positions count along the branch.

    Sorted lexicographically, traces visit the trie depth first: each adds the tokens behind the prefix that it shares
    with its predecessor, and the predecessor's tokens behind that prefix have got their whole subtree.
    """
    order = sorted(range(len(traces)), key=lambda i: sort_key(traces[i].tokens))
    tokens, positions, end = np.empty((3, sum(len(trace.tokens) for trace in traces)), dtype=np.int64)
    branch = np.empty(max(len(trace.tokens) for trace in traces), dtype=np.int64)  # place of each token, by depth
    places: list[np.ndarray] = [branch] * len(traces)
    cursor = 0
    previous = np.empty(0, dtype=np.int64)
    for i in order:
        current = traces[i].tokens
        shared = common_prefix(previous, current)
        end[branch[shared : len(previous)]] = cursor
        new = slice(cursor, cursor + len(current) - shared)
        tokens[new], positions[new] = current[shared:], np.arange(shared, len(current))
        branch[shared : len(current)] = np.arange(new.start, new.stop)
        places[i] = branch[: len(current)].copy()
        cursor, previous = new.stop, current
    end[branch[: len(previous)]] = cursor
    return _padded_row(traces, places, tokens[:cursor], positions[:cursor], end[:cursor], multiple)


def empty_batch(packed: bool, multiple: int = 8) -> MicroBatch:
    """Padding without roll-outs: what a rank computes where another has one more micro batch and all must take part."""
    padding = np.zeros((1, multiple), dtype=np.int64)
    nothing = np.empty(0, dtype=np.int64)
    end = np.arange(multiple)[None] + 1 if packed else None
    return MicroBatch(padding, padding, end, nothing, nothing, nothing, nothing, (), 0, 0)


def sort_key(tokens: np.ndarray) -> bytes:
    """Bytes that compare as the token ids do, one by one (big-endian, so that memcmp is the numeric order)."""
    return tokens.astype(">u4").tobytes()


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two traces share."""
    n = min(len(a), len(b))
    return int(np.append(a[:n] != b[:n], True).argmax())


def _padded_row(traces, places, tokens, positions, end, multiple) -> MicroBatch:
    size = len(tokens)
    padding = np.arange(size, -(-size // multiple) * multiple)
    input_ids = np.append(tokens.astype(np.int64), np.full_like(padding, PAD_ID))[None]
    position_ids = np.append(positions, np.zeros_like(padding))[None]
    return _micro_batch(traces, places, input_ids, position_ids, np.append(end, padding + 1)[None], positions)


def _micro_batch(traces, places, input_ids, position_ids, end, positions) -> MicroBatch:
    """positions [num_tokens]: those of the tokens that are not padding; each attends to itself and all before it."""
    owned = [place[trace.start :] for place, trace in zip(places, traces, strict=True)]
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        end=end,
        token_index=np.concatenate(owned),
        rollout_index=np.repeat(np.arange(len(traces)), [len(tokens) for tokens in owned]),
        labels=np.array([trace.label for trace in traces], dtype=np.int64),
        last_index=np.array([place[-1] for place in places], dtype=np.int64),
        sources=tuple(trace.source for trace in traces),
        num_tokens=len(positions),
        num_pairs=int(positions.sum()) + len(positions),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which traces share a row


def _fill_rows(units: Sequence[Unit], capacity: int) -> list[list[Trace]]:
    """Best fit, longest first: at most one row in excess of what the tokens need, near enough."""

    def size(traces: Unit) -> int:
        return sum(len(trace.tokens) for trace in traces)

    rows: list[list[Trace]] = []
    for unit in sorted(units, key=size, reverse=True):
        fitting = [row for row in rows if size(row) + size(unit) <= capacity]
        if fitting:
            max(fitting, key=size).extend(unit)
        else:
            rows.append(list(unit))
    return rows


def _fill_tree_rows(units: Sequence[Unit], capacity: int) -> list[list[Trace]]:
    """In lexicographic order, a new row where the next unit's own tokens do not fit: neighbours share the most.

    A prefix shared by traces of two rows is repeated in both.
    """
    rows: list[list[Trace]] = []
    for unit in sorted(units, key=lambda unit: sort_key(unit[0].tokens)):
        if not rows or trie_size([*rows[-1], *unit]) > capacity:
            rows.append([])
        rows[-1].extend(unit)
    return rows


def trie_size(traces: Unit) -> int:
    """Tokens of the traces' trie: in sorted order the longest prefix shared with any before is the predecessor's."""
    paths = sorted((trace.tokens for trace in traces), key=sort_key)
    return sum(map(len, paths)) - sum(common_prefix(one, other) for one, other in pairwise(paths))


# ---------------------------------------------------------------------------------------------------------------------
# Attention masks of packed rows


def block_lists(end: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The non-empty blocks of one row's attention mask, from its `end` vector, without ever building the mask.

    end: int [S], S a multiple of `block`. Returns int32 arrays (partial counts [n], partial indices [n, n], full counts
    [n], full indices [n, n]) for n = S / block query blocks, in the form of `BlockMask.from_kv_blocks`: the first
    `counts[i]` entries of `indices[i]` are the key blocks that query block i reads. A key block before the query block
    is read where any of its tokens reaches the query block's first token, and needs no mask where all reach its last.
    """
    n = len(end) // block
    by_block = end.reshape(n, block)
    first = np.arange(n)[:, None] * block
    earlier = np.arange(n)[None, :] < np.arange(n)[:, None]
    read = earlier & (by_block.max(axis=1)[None, :] > first)
    full = earlier & (by_block.min(axis=1)[None, :] >= first + block)
    partial = (read & ~full) | np.eye(n, dtype=bool)
    return (*_compress(partial), *_compress(full))


def _compress(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [n, n] -> counts int32 [n], and indices int32 [n, n] with the True columns of each row in front."""
    return blocks.sum(axis=1).astype(np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
