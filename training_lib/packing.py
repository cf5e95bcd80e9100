"""How roll-outs are laid out in the rows that the value model reads: padded, packed, or as a trie. Pure numpy.

One vector describes every packed row: token q may attend to token k where `k <= q < end[k]`. For packed traces that is
the end of k's own trace; for a trie in depth-first order it is the end of k's subtree, so that a prefix which several
traces share is computed once. A position can be a roll-out token of one trace and a roll-in token of another: the loss
is therefore described by (position, roll-out) pairs, not by a mask over positions.
"""

from collections.abc import Callable, Sequence
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


BlockLists = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # as `block_lists` returns them


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one forward pass reads, and where its losses are. Every array is int64, but for the block lists.

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
    blocks: BlockLists | None = None  # of the mask, where the kernel takes them: they cost more than the layout


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

    none: `micro_batch_size` traces a micro batch, the longest first, right-padded to a bucket. pack, tree: rows of at
    most `row_tokens` tokens (None: `micro_batch_size * max_length`), as many as are needed, each padded to `multiple`. No
    unit is split.
    """
    capacity = row_tokens or micro_batch_size * max_length
    if packing == "none":
        traces = [trace for unit in _sorted_units(units) for trace in unit]
        starts = range(0, len(traces), micro_batch_size)
        return [padded_batch(traces[i : i + micro_batch_size], max_length) for i in starts]
    if packing == "pack":
        return [packed_row(traces, multiple) for traces in _fill_rows(units, capacity, pack_size)]
    if packing == "tree":
        return [tree_row(traces, multiple) for traces in _fill_rows(_families(units, capacity), capacity, trie_size)]
    raise ValueError(f"unknown packing {packing!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def padded_batch(traces: Sequence[Trace], max_length: int) -> MicroBatch:
    """One trace a row, right-padded to one of at most 16 different lengths, so that there are few shapes to compile."""
    width = padded_width(max(len(trace.tokens) for trace in traces), max_length)
    input_ids = np.full((len(traces), width), PAD_ID, dtype=np.int64)
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape)
    places = [row * width + np.arange(len(trace.tokens)) for row, trace in enumerate(traces)]
    real = np.concatenate(places)
    input_ids.flat[real] = np.concatenate([trace.tokens for trace in traces])
    return _micro_batch(traces, places, input_ids, position_ids, None, real % width)


def padded_width(longest: int, max_length: int) -> int:
    """One of at most 16 lengths, that of a row which holds a trace of `longest` tokens."""
    bucket = max(8, max_length // 16)
    return min(-(-longest // bucket) * bucket, max(max_length, longest))


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


def _sorted_units(units: Sequence[Unit]) -> list[Unit]:
    """The longest first, so that neighbours are of a length; a pair is as long as its longer trace."""
    return sorted(units, key=lambda unit: -max(len(trace.tokens) for trace in unit))


def _fill_rows(units: Sequence[Unit], capacity: int, size: Callable[[Unit], int]) -> list[list[Trace]]:
    """Best fit, longest first: at most one row in excess of what the tokens need, near enough."""
    rows: list[tuple[int, list[Trace]]] = []
    for taken, unit in sorted(((size(unit), unit) for unit in units), key=lambda item: -item[0]):
        fitting = [i for i, (used, _) in enumerate(rows) if used + taken <= capacity]
        if fitting:
            fullest = max(fitting, key=lambda i: rows[i][0])
            rows[fullest] = rows[fullest][0] + taken, rows[fullest][1] + list(unit)
        else:
            rows.append((taken, list(unit)))
    return [traces for _, traces in rows]


def pack_size(traces: Unit) -> int:
    """Tokens of the traces one behind the other."""
    return sum(len(trace.tokens) for trace in traces)


def _families(units: Sequence[Unit], capacity: int) -> list[list[Trace]]:
    """Units put together, those that share the most first, as long as their trie fits a row.

    So of nested roll-ins that do not fit one row together it is the shortest that stands in two.
    """
    traces = [(trace, number) for number, unit in enumerate(units) for trace in unit]
    traces.sort(key=lambda place: sort_key(place[0].tokens))
    lengths, owner = np.array([(len(trace.tokens), number) for trace, number in traces]).T
    shared = shared_prefixes([trace.tokens for trace, _ in traces])
    one, other = np.nonzero(shared > capacity // 100)  # to keep less together is not worth a fuller row
    family = {number: np.flatnonzero(owner == number).tolist() for number in range(len(units))}  # traces, by each unit
    for edge in np.argsort(-shared[one, other], kind="stable"):
        a, b = family[int(owner[one[edge]])], family[int(owner[other[edge]])]
        both = sorted({*a, *b})
        if a is not b and lengths[both].sum() - shared[both[:-1], both[1:]].sum() <= capacity:
            family |= dict.fromkeys(owner[both].tolist(), both)
    distinct = {id(members): dict.fromkeys(owner[members].tolist()) for members in family.values()}
    return [[trace for number in numbers for trace in units[number]] for numbers in distinct.values()]


def shared_prefixes(paths: Sequence[np.ndarray]) -> np.ndarray:
    """How many leading tokens paths i < j share, of paths in sorted order; 0 elsewhere. int64 [n, n]."""
    shared = np.zeros((len(paths), len(paths)), dtype=np.int64)
    neighbours = np.array([common_prefix(one, other) for one, other in pairwise(paths)], dtype=np.int64)
    for i in range(len(neighbours)):  # what two share, all between them share
        shared[i, i + 1 :] = np.minimum.accumulate(neighbours[i:])
    return shared


def trie_size(traces: Unit) -> int:
    """Tokens of the traces' trie."""
    return trie_counts(traces)[0]


def trie_counts(traces: Unit) -> tuple[int, int]:
    """(tokens, attended pairs) of the traces' trie: in sorted order the longest prefix that a trace shares with any before
    is the one that it shares with its predecessor."""
    paths = sorted((trace.tokens for trace in traces), key=sort_key)
    lengths = np.array([len(path) for path in paths])
    shared = np.array([0, *(common_prefix(one, other) for one, other in pairwise(paths))])
    return int((lengths - shared).sum()), int((triangle(lengths) - triangle(shared)).sum())


def triangle(tokens: np.ndarray) -> np.ndarray:
    """Attended pairs of traces of so many tokens, of which each attends to itself and all before it."""
    return tokens * (tokens + 1) // 2


# ---------------------------------------------------------------------------------------------------------------------
# Attention masks of packed rows


def block_lists(end: np.ndarray, block: int = 128) -> BlockLists:
    """The non-empty blocks of one row's attention mask, from its `end` vector, without ever building the mask.

    end: int [S], S a multiple of `block`. Returns int32 arrays (partial counts [n], partial indices [n, most], full counts
    [n], full indices [n, most]) for n = S / block query blocks: the first `counts[i]` entries of `indices[i]` are the key
    blocks that query block i reads, and no count is above `most` (n would be 8 MB for 1,000 blocks, from another process).
    A key block before the query block is read where any of its tokens reaches the query block's first token, and needs no
    mask where all reach its last.
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
    """bool [n, n] -> counts int32 [n], and indices int32 [n, most] with the True columns of each row in front."""
    counts = blocks.sum(axis=1)
    rows, columns = np.nonzero(blocks)  # row after row
    indices = np.zeros((len(blocks), counts.max()), dtype=np.int32)
    indices[rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)] = columns
    return counts.astype(np.int32), indices
