"""Values of growing traces, each token read once.

A search tree is a trie of token blocks. Every node keeps the keys and values of its own tokens only, so a prefix that
candidates share is held once; to score a batch of candidates their paths are laid side by side in one working cache.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicLayer

from classifier_lib.attention import use_cached_attention
from classifier_lib.cache_budget import CacheBudget, TokenBytes
from classifier_lib.modeling import Qwen2ForClassifier, success_probs


@dataclass
class ScoringUsage:
    """Tokens that went through the value model. `tokens_scored` counts all but padding, read-again ones included."""

    tokens_scored: int = 0
    tokens_reread: int = 0
    tokens_padding: int = 0


class ValueScorer:
    """Scores candidates of many search trees with one value model, paying for each token once.

    The prompt is node 0; the candidates are numbered 1, 2, ... in the order they are scored in.

    scorer.start("tree", prompt_ids)
    values = scorer.score("tree", [(0, block_a), (0, block_b)])    # nodes 1 and 2, children of the prompt
    scorer.keep("tree", [2])                                       # only node 2 goes on: free the others
    values = scorer.score("tree", [(2, block_c), (2, block_d)])    # nodes 3 and 4
    scorer.release("tree")

    Values equal a plain forward pass over the whole trace: to 1e-5 in float32; in bfloat16 to rounding (README).
    `cache_bytes` bounds held caches, working cache and activations (None: unbounded; see `CacheBudget`). Where candidates
    do not fit, they are scored in several chunks; what cannot be held is read again when needed, counted in
    `usage.tokens_reread`. Not thread-safe: call it from one thread.
    """

    def __init__(self, model: Qwen2ForClassifier, cache_bytes: int | None = None, max_batch_tokens: int = 32768):
        """`max_batch_tokens`: new tokens in one forward pass, whatever the cache (at least one row goes)."""
        if "sliding_attention" in model.config.layer_types:
            raise ValueError("the value model uses sliding-window attention, which ValueScorer cannot cache")
        use_cached_attention(model)
        self.model = model.eval()
        self.max_batch_tokens = max_batch_tokens
        token = TokenBytes.of_config(model.config, model.dtype.itemsize, masked=model.device.type == "cpu")
        self.budget = CacheBudget(token, cache_bytes)
        self.usage = ScoringUsage()
        self._trees: dict[str, _Tree] = {}  # least recently scored first

    # ------------------------------------------------------------------------------------------------- trees

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        """Begin a tree. `history`: (parent, tokens) of nodes 1, 2, ... scored in an earlier process; nothing is read
        until a candidate needs it, and then counts as read again."""
        if tree_id in self._trees:
            raise ValueError(f"tree {tree_id!r} has been started already")
        if not prompt_ids:
            raise ValueError(f"tree {tree_id!r}: the prompt is empty")
        nodes = [_Node(None, list(prompt_ids))]
        for parent, tokens in history:
            nodes.append(_Node(nodes[parent], list(tokens), was_read=True))
        nodes[0].was_read = len(nodes) > 1
        self._trees[tree_id] = _Tree(nodes)

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None:
        """Free the caches of all nodes that are not in `nodes` or above one of them."""
        tree = self._trees[tree_id]
        wanted = {above for number in nodes for above in tree.nodes[number].path()}
        self._drop(node for node in tree.nodes if node not in wanted)

    def release(self, tree_id: str) -> None:
        """Forget a tree. Unknown ones are no error, so that it can be called twice."""
        if tree := self._trees.pop(tree_id, None):
            self._drop(tree.nodes)

    def tree_usage(self, tree_id: str) -> ScoringUsage:
        """What this tree has cost so far in this process."""
        return self._trees[tree_id].usage

    def score(
        self, tree_id: str, items: Sequence[tuple[int, Sequence[int]]], finished: Sequence[bool] | None = None
    ) -> list[float]:
        """Values at the last token of each (parent node, new tokens); the items become the next node numbers.

        `finished[i]`: item i will have no children, so its cache is not kept. Raises ValueError for an unknown parent
        or an empty block.
        """
        if not items:
            return []
        tree = self._trees.pop(tree_id)
        self._trees[tree_id] = tree  # now the most recently used
        for parent, tokens in items:
            if not 0 <= parent < len(tree.nodes):
                raise ValueError(f"tree {tree_id!r} has no node {parent} (it has 0 to {len(tree.nodes) - 1})")
            if not tokens:
                raise ValueError(f"tree {tree_id!r}: an empty block has no last token to score")
            if not 0 <= min(tokens) <= max(tokens) < self.model.config.vocab_size:
                raise ValueError(f"tree {tree_id!r}: a token id is outside the value model's vocabulary")
        ends = zip(items, finished or [False] * len(items), strict=True)
        candidates = [_Node(tree.nodes[parent], list(tokens), final=final) for (parent, tokens), final in ends]
        tree.nodes += candidates
        self._read_shared_ancestors(tree, candidates)
        values = self._read(tree, candidates)
        return [values[node] for node in candidates]

    # ------------------------------------------------------------------------------------------------- reading

    def _read_shared_ancestors(self, tree: _Tree, candidates: Sequence[_Node]) -> None:
        """Read the ancestors that are not held and that several candidates share, level by level, each once.

        An ancestor of one candidate is read together with it, and so is one that there is no room to hold.
        """
        uses = Counter(node for child in candidates for node in child.path()[:-1] if node.kv is None)
        shared = [(len(node.path()), node) for node in tree.nodes if uses[node] > 1]
        for depth in sorted({depth for depth, _ in shared}):
            nodes = [node for at, node in shared if at == depth]
            if self._can_hold(tree, nodes):
                self._read(tree, nodes)

    def _can_hold(self, tree: _Tree, nodes: Sequence[_Node]) -> bool:
        """Whether these nodes can be held beside the reading of one; makes the room by giving up other trees' caches."""
        rows = map(_Row.of, nodes)
        one = max(self.budget.pass_bytes(1, row.prefix_length, len(row.new_tokens)) for row in rows)
        held = sum(len(node.tokens) for node in nodes) * self.budget.token.kv
        return self._make_room(held + one, keep=tree)

    def _read(self, tree: _Tree, nodes: Sequence[_Node]) -> dict[_Node, float]:
        """Read nodes in chunks that fit, and keep their caches as far as they are wanted; the value at the end of each."""
        values: dict[_Node, float] = {}
        while remaining := [node for node in nodes if node not in values]:
            values |= self._read_chunk(tree, self._next_chunk(tree, remaining))
        return values

    def _next_chunk(self, tree: _Tree, remaining: Sequence[_Node]) -> list[_Row]:
        """Rows with a prefix of one length for the next forward pass, the longest first (so little is padded)."""
        rows = list(map(_Row.of, remaining))
        prefix = min(row.prefix_length for row in rows)
        alike = sorted((r for r in rows if r.prefix_length == prefix), key=lambda r: -len(r.new_tokens))
        longest = len(alike[0].new_tokens)
        if not self._make_room(self.budget.pass_bytes(1, prefix, longest), keep=tree):
            # The last resort: give up this tree's caches, too, but for those of the first row.
            self._drop(node for node in tree.nodes if node not in alike[0].held)
            self.budget.check_last_row(prefix, longest)
            return alike[:1]
        held_after = 0 if all(row.to_read[-1].final for row in alike) else longest
        most = max(1, self.max_batch_tokens // longest)
        return alike[: min(most, self.budget.rows_that_fit(prefix, longest, held_after))]

    @torch.inference_mode()
    def _read_chunk(self, tree: _Tree, rows: list[_Row]) -> dict[_Node, float]:
        """Read rows in one forward pass; the value at the end of each."""
        prefix, width = rows[0].prefix_length, max(len(row.new_tokens) for row in rows)
        with self.budget.reading(len(rows), prefix, width):
            kv = self._working_cache(rows, prefix + width)
            values = self._forward(kv, rows, prefix, width)
            self._account(tree, rows, width)
            for i, row in enumerate(rows):
                self._hold(row, kv[:, :, i])
        return {row.to_read[-1]: value for row, value in zip(rows, values, strict=True)}

    def _forward(self, kv: torch.Tensor, rows: list[_Row], prefix: int, width: int) -> list[float]:
        """Values at the rows' last tokens; fills the new tokens' places in `kv`."""
        device, lengths = self.model.device, [len(row.new_tokens) for row in rows]
        padded = [row.new_tokens + [0] * (width - len(row.new_tokens)) for row in rows]
        layers = [_WorkingLayer(keys, values, prefix) for keys, values in zip(kv[0], kv[1], strict=True)]
        # Causal, and padded on the right only: no mask is needed, and passing one would cost the fast kernel.
        hidden = self.model.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask={"full_attention": None},
            position_ids=torch.arange(prefix, prefix + width, device=device).unsqueeze(0),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        ).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), torch.tensor(lengths, device=device) - 1]
        return success_probs(self.model.score(last)).tolist()

    def _working_cache(self, rows: list[_Row], length: int) -> torch.Tensor:
        """[2, layers, rows, kv heads, length, head dim], the held prefixes copied in."""
        config, head_dim = self.model.config, self.model.model.layers[0].self_attn.head_dim
        shape = (2, config.num_hidden_layers, len(rows), config.num_key_value_heads, length, head_dim)
        kv = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        for i, row in enumerate(rows):
            at = 0
            for node in row.held:
                end = at + len(node.tokens)
                kv[:, :, i, :, at:end] = node.kv
                at = end
        return kv

    def _account(self, tree: _Tree, rows: list[_Row], width: int) -> None:
        scored = sum(len(row.new_tokens) for row in rows)
        reread = 0
        for node in itertools.chain.from_iterable(row.to_read for row in rows):
            reread += len(node.tokens) if node.was_read else 0
            node.was_read = True
        for usage in (tree.usage, self.usage):
            usage.tokens_scored += scored
            usage.tokens_reread += reread
            usage.tokens_padding += len(rows) * width - scored

    def _hold(self, row: _Row, kv: torch.Tensor) -> None:
        """Keep the new caches of a row that was just read, as far as there is room."""
        at = row.prefix_length
        for node in row.to_read:
            end = at + len(node.tokens)
            wanted = node.kv is None and not (node.final and node is row.to_read[-1])
            if wanted and self.budget.hold(len(node.tokens)):
                node.kv = kv[:, :, :, at:end].clone()
            at = end

    def _make_room(self, needed: int, keep: _Tree) -> bool:
        """Give up the caches of other trees, least recently scored first, until `needed` bytes are free."""
        for victim in self._trees.values():
            if self.budget.free >= needed:
                break
            if victim is not keep:
                self._drop(victim.nodes)
        return self.budget.free >= needed

    def _drop(self, nodes: Iterable[_Node]) -> None:
        for node in nodes:
            if node.kv is not None:
                self.budget.drop(len(node.tokens))
                node.kv = None


# ---------------------------------------------------------------------------------------------------------------------
# Trees, and rows of a forward pass


@dataclass(eq=False)
class _Node:
    parent: _Node | None
    tokens: list[int]
    was_read: bool = False  # went through the model before: reading it again counts as such
    final: bool = False  # will have no children
    kv: torch.Tensor | None = None  # [2, layers, kv heads, len(tokens), head dim], or not held

    def path(self) -> list[_Node]:
        """From the prompt down to this node."""
        path = [self]
        while path[-1].parent is not None:
            path.append(path[-1].parent)
        return path[::-1]


@dataclass
class _Tree:
    nodes: list[_Node]
    usage: ScoringUsage = field(default_factory=ScoringUsage)


@dataclass
class _Row:
    """One node to read: `held` cached ancestors give the prefix, the tokens of `to_read` (itself last) are new."""

    held: list[_Node]
    to_read: list[_Node]
    prefix_length: int
    new_tokens: list[int]

    @classmethod
    def of(cls, node: _Node) -> _Row:
        path = node.path()
        held = list(itertools.takewhile(lambda above: above.kv is not None, path))
        to_read = path[len(held) :]
        prefix_length = sum(len(above.tokens) for above in held)
        return cls(held, to_read, prefix_length, [token for new in to_read for token in new.tokens])


class _WorkingLayer(DynamicLayer):
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
