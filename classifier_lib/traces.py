"""Growing traces as a trie of token blocks with their caches, and the rows in which a forward pass reads them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicLayer


@dataclass
class ScoringUsage:
    """Tokens that went through the value model. `tokens_scored` counts all but padding, read-again ones included."""

    tokens_scored: int = 0
    tokens_reread: int = 0
    tokens_padding: int = 0


@dataclass(eq=False)
class TraceNode:
    parent: TraceNode | None
    tokens: list[int]
    was_read: bool = False  # went through the model before: reading it again counts as such
    final: bool = False  # will have no children
    kv: torch.Tensor | None = None  # [2, layers, kv heads, len(tokens), head dim], or not held

    def path(self) -> list[TraceNode]:
        """From the prompt down to this node."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path[::-1]


@dataclass
class TraceTree:
    nodes: list[TraceNode]
    usage: ScoringUsage = field(default_factory=ScoringUsage)


@dataclass
class PassRow:
    """One node to read: `held` cached ancestors give the prefix, the tokens of `to_read` (itself last) are new."""

    held: list[TraceNode]
    to_read: list[TraceNode]
    prefix_length: int
    new_tokens: list[int]

    @classmethod
    def of(cls, node: TraceNode) -> PassRow:
        path = node.path()
        held = list(itertools.takewhile(lambda above: above.kv is not None, path))
        to_read = path[len(held) :]
        prefix_length = sum(len(above.tokens) for above in held)
        return cls(held, to_read, prefix_length, [token for new in to_read for token in new.tokens])


class WorkingLayer(DynamicLayer):
    """One layer of the working cache: room for prefix and new tokens, allocated once; attention writes the new ones."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix_length: int):
        super().__init__()
        self.keys, self.values, self.prefix_length = keys, values, prefix_length
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, self.prefix_length :] = key_states
        self.values[:, :, self.prefix_length :] = value_states
        return self.keys, self.values

    def get_seq_length(self):
        return self.prefix_length


def copy_of(kv: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Of those tokens, in memory of its own: a view would keep the whole batch's."""
    return kv[:, :, :, start:end].clone()
