"""Values of growing traces, each token read once.

A search tree is a trie of token blocks. Every node keeps the keys and values of its own tokens only, so a prefix that
candidates share is held once; to score a batch of candidates their paths are laid side by side in one working cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicLayer

from classifier_lib.cache_budget import CacheBudget, TokenBytes
from classifier_lib.modeling import Qwen2ForClassifier, success_probs

ROOT = 0  # node number of the prompt; the candidates are numbered 1, 2, ... in the order they were scored in


@dataclass
class ScoringUsage:
    """Tokens that went through the value model. `tokens_scored` counts all but padding, read-again ones included."""

    tokens_scored: int = 0
    tokens_reread: int = 0
    tokens_padding: int = 0


class ValueScorer:
    """Scores candidates of many search trees with one value model, paying for each token once.

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
        if model.config._attn_implementation != "flash_attention_2":
            model.set_attn_implementation("sdpa_lower_right")
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
        nodes = [_Node(-1, list(prompt_ids))]
        nodes += [_Node(parent, list(tokens), was_read=True) for parent, tokens in history]
        nodes[ROOT].was_read = len(nodes) > 1
        self._trees[tree_id] = _Tree(nodes)

    def keep(self, tree_id: str, nodes: Iterable[int]) -> None:
        """Free the caches of all nodes that are not in `nodes` or above one of them."""
        tree = self._trees[tree_id]
        wanted = {above for node in nodes for above in tree.path(node)}
        self._drop(node for number, node in enumerate(tree.nodes) if number not in wanted)

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
        first = len(tree.nodes)
        for parent, tokens in items:
            if not 0 <= parent < first:
                raise ValueError(f"tree {tree_id!r} has no node {parent} (it has 0 to {first - 1})")
            if not tokens:
                raise ValueError(f"tree {tree_id!r}: an empty block has no last token to score")
            if not 0 <= min(tokens) <= max(tokens) < self.model.config.vocab_size:
                raise ValueError(f"tree {tree_id!r}: a token id is outside the value model's vocabulary")
        tree.nodes += [_Node(parent, list(tokens)) for parent, tokens in items]
        self._read_shared_ancestors(tree, [parent for parent, _ in items])
        final = finished or [False] * len(items)
        hold = {first + i for i in range(len(items)) if not final[i]}
        values = self._read(tree, range(first, len(tree.nodes)), hold)
        return [values[first + i] for i in range(len(items))]

    # ------------------------------------------------------------------------------------------------- reading

    def _read_shared_ancestors(self, tree: _Tree, parents: Sequence[int]) -> None:
        """Read the ancestors that are not held and that several candidates share, level by level, each once.

        An ancestor of one candidate is read together with it, and so is one that there is no room to hold.
        """
        uses: dict[tuple[int, int], int] = {}
        for parent in parents:
            for depth, node in enumerate(tree.path(parent)):
                if tree.nodes[node].kv is None:
                    uses[depth, node] = uses.get((depth, node), 0) + 1
        for depth in sorted({depth for depth, _ in uses}):
            nodes = [node for (at, node), count in sorted(uses.items()) if at == depth and count > 1]
            if nodes and self._can_hold(tree, nodes):
                self._read(tree, nodes, set(nodes))

    def _can_hold(self, tree: _Tree, nodes: Sequence[int]) -> bool:
        """Whether these nodes can be held beside the reading of one; makes the room by giving up other trees' caches."""
        rows = [self._row(tree, node) for node in nodes]
        one = max(self.budget.pass_bytes(1, row.prefix_length, len(row.new_tokens)) for row in rows)
        held = sum(len(tree.nodes[node].tokens) for node in nodes) * self.budget.token.kv
        return self._make_room(held + one, keep=tree)

    def _row(self, tree: _Tree, node: int) -> _Row:
        path = tree.path(node)
        held = 0
        while held < len(path) and tree.nodes[path[held]].kv is not None:
            held += 1
        to_read = path[held:]
        prefix_length = sum(len(tree.nodes[n].tokens) for n in path[:held])
        return _Row(path[:held], to_read, prefix_length, [t for n in to_read for t in tree.nodes[n].tokens])

    def _read(self, tree: _Tree, nodes: Iterable[int], hold: set[int]) -> dict[int, float]:
        """Read nodes in chunks that fit and keep the caches of those in `hold`; the value at the end of each node."""
        values: dict[int, float] = {}
        remaining = list(nodes)
        while remaining:
            chunk = self._next_chunk(tree, remaining, hold)
            values |= self._read_chunk(tree, chunk, hold)
            remaining = [node for node in remaining if node not in values]
        return values

    def _next_chunk(self, tree: _Tree, remaining: Sequence[int], hold: set[int]) -> list[_Row]:
        """Rows with a prefix of one length for the next forward pass, the longest first (so little is padded)."""
        rows = [self._row(tree, node) for node in remaining]
        prefix = min(row.prefix_length for row in rows)
        alike = sorted((r for r in rows if r.prefix_length == prefix), key=lambda r: -len(r.new_tokens))
        longest = len(alike[0].new_tokens)
        if not self._make_room(self.budget.pass_bytes(1, prefix, longest), keep=tree):
            # The last resort: give up this tree's caches, too, but for those of the first row.
            self._drop(node for number, node in enumerate(tree.nodes) if number not in alike[0].held)
            self.budget.check_last_row(prefix, longest)
            return alike[:1]
        held_after = longest if any(row.to_read[-1] in hold for row in alike) else 0
        most = max(1, self.max_batch_tokens // longest)
        return alike[: min(most, self.budget.rows_that_fit(prefix, longest, held_after))]

    @torch.inference_mode()
    def _read_chunk(self, tree: _Tree, rows: list[_Row], hold: set[int]) -> dict[int, float]:
        """Read rows in one forward pass; the value at the end of each."""
        prefix, width = rows[0].prefix_length, max(len(row.new_tokens) for row in rows)
        with self.budget.reading(len(rows), prefix, width):
            kv = self._working_cache(tree, rows, prefix + width)
            values = self._forward(kv, rows, prefix, width)
            self._account(tree, rows, width)
            for i, row in enumerate(rows):
                self._hold(tree, row, kv[:, :, i], hold)
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

    def _working_cache(self, tree: _Tree, rows: list[_Row], length: int) -> torch.Tensor:
        """[2, layers, rows, kv heads, length, head dim], the held prefixes copied in."""
        config, head_dim = self.model.config, self.model.model.layers[0].self_attn.head_dim
        shape = (2, config.num_hidden_layers, len(rows), config.num_key_value_heads, length, head_dim)
        kv = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        for i, row in enumerate(rows):
            at = 0
            for number in row.held:
                node_kv = tree.nodes[number].kv
                kv[:, :, i, :, at : at + node_kv.shape[3]] = node_kv
                at += node_kv.shape[3]
        return kv

    def _account(self, tree: _Tree, rows: list[_Row], width: int) -> None:
        scored = sum(len(row.new_tokens) for row in rows)
        reread = 0
        for node in (tree.nodes[number] for row in rows for number in row.to_read):
            reread += len(node.tokens) if node.was_read else 0
            node.was_read = True
        for usage in (tree.usage, self.usage):
            usage.tokens_scored += scored
            usage.tokens_reread += reread
            usage.tokens_padding += len(rows) * width - scored

    def _hold(self, tree: _Tree, row: _Row, kv: torch.Tensor, hold: set[int]) -> None:
        """Keep the new caches of a row that was just read, as far as there is room."""
        at = row.prefix_length
        for number in row.to_read:
            node = tree.nodes[number]
            end = at + len(node.tokens)
            wanted = node.kv is None and (number in hold or number != row.to_read[-1])
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


@dataclass
class _Node:
    parent: int
    tokens: list[int]
    was_read: bool = False  # went through the model before: reading it again counts as such
    kv: torch.Tensor | None = None  # [2, layers, kv heads, len(tokens), head dim], or not held


@dataclass
class _Tree:
    nodes: list[_Node]
    usage: ScoringUsage = field(default_factory=ScoringUsage)

    def path(self, node: int) -> list[int]:
        """Node numbers from the prompt down to `node`."""
        path = [node]
        while path[-1] != ROOT:
            path.append(self.nodes[path[-1]].parent)
        return path[::-1]


@dataclass
class _Row:
    """One node to read: `held` cached ancestors give the prefix, the tokens of `to_read` (itself last) are new."""

    held: list[int]
    to_read: list[int]
    prefix_length: int
    new_tokens: list[int]


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
