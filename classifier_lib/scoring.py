"""Values of growing traces, each token read once.

A search tree is a trie of token blocks. Every node keeps the keys and values of its own tokens only, so a prefix that
candidates share is held once; to score a batch of candidates their paths are laid side by side in one working cache.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from transformers.cache_utils import Cache

from classifier_lib.cache_budget import CacheBudget, TokenBytes, default_batch_tokens
from classifier_lib.device_memory import ScoringOutOfMemory, free_words, give_back, is_out_of_memory
from classifier_lib.modeling import Qwen2ForClassifier, success_probs
from classifier_lib.traces import PassRow, ScoringUsage, TraceNode, TraceTree, WorkingLayer, copy_of

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class ValueScorer:
    """Scores candidates of many search trees with one value model, paying for each token once.

    The prompt is node 0; the candidates are numbered 1, 2, ... in the order they are scored in.

    scorer.start("tree", prompt_ids)
    values = scorer.score("tree", [(0, block_a), (0, block_b)])    # nodes 1 and 2, children of the prompt
    scorer.keep("tree", [2])                                       # only node 2 goes on: free the others
    values = scorer.score("tree", [(2, block_c), (2, block_d)])    # nodes 3 and 4
    scorer.release("tree")

    Values equal a plain forward pass over the whole trace: to 1e-5 in float32, whatever they are batched with; in bfloat16
    to rounding (README), and their last bits depend on the batch. `cache_bytes` bounds held caches, working cache and
    activations (None: unbounded; see `CacheBudget`). Where candidates do not fit, they are scored in several chunks; what
    cannot be held is read again when needed, counted in `usage.tokens_reread`. Not thread-safe: call it from one thread.

    A pass for which the device runs out of memory all the same is tried again with half of its rows, and where it has one
    row, after the least recently scored tree has given up its caches; `back_offs` counts that, and the first one is
    logged. Smaller bounds that were found so are kept.
    """

    def __init__(self, model: Qwen2ForClassifier, cache_bytes: int | None = None, max_batch_tokens: int | None = None):
        """`max_batch_tokens`: new tokens in one forward pass (at least one row goes); None: as `cache_bytes` allows."""
        if "sliding_attention" in model.config.layer_types:
            raise ValueError("the value model uses sliding-window attention, which ValueScorer cannot cache")
        if model.config._attn_implementation != "flash_attention_2":
            model.set_attn_implementation("sdpa_lower_right")
        self.model = model.eval()
        token = TokenBytes.of_config(model.config, model.dtype.itemsize, masked=model.device.type == "cpu")
        self.max_batch_tokens = max_batch_tokens or default_batch_tokens(token, cache_bytes)
        self.budget = CacheBudget(token, cache_bytes)
        self.usage = ScoringUsage()
        self.back_offs = 0
        self._trees: dict[str, TraceTree] = {}  # least recently scored first

    # ------------------------------------------------------------------------------------------------- trees

    def start(self, tree_id: str, prompt_ids: Sequence[int], history: Iterable[tuple[int, Sequence[int]]] = ()) -> None:
        """Begin a tree. `history`: (parent, tokens) of nodes 1, 2, ... scored in an earlier process; nothing is read
        until a candidate needs it, and then counts as read again."""
        if tree_id in self._trees:
            raise ValueError(f"tree {tree_id!r} has been started already")
        if not prompt_ids:
            raise ValueError(f"tree {tree_id!r}: the prompt is empty")
        nodes = [TraceNode(None, list(prompt_ids))]
        for parent, tokens in history:
            nodes.append(TraceNode(nodes[parent], list(tokens), was_read=True))
        nodes[0].was_read = len(nodes) > 1
        self._trees[tree_id] = TraceTree(nodes)

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
        or an empty block, ScoringOutOfMemory where a trace does not fit the device even alone.
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
        candidates = [TraceNode(tree.nodes[parent], list(tokens), final=final) for (parent, tokens), final in ends]
        tree.nodes += candidates
        self._read_shared_ancestors(tree, candidates)
        values = self._read(tree, candidates)
        return [values[node] for node in candidates]

    # ------------------------------------------------------------------------------------------------- reading

    def _read_shared_ancestors(self, tree: TraceTree, candidates: Sequence[TraceNode]) -> None:
        """Read the ancestors that are not held and that several candidates share, level by level, each once.

        An ancestor of one candidate is read together with it, and so is one that there is no room to hold.
        """
        uses = Counter(node for child in candidates for node in child.path()[:-1] if node.kv is None)
        shared = [(len(node.path()), node) for node in tree.nodes if uses[node] > 1]
        for depth in sorted({depth for depth, _ in shared}):
            nodes = [node for at, node in shared if at == depth]
            if self._can_hold(tree, nodes):
                self._read(tree, nodes)

    def _can_hold(self, tree: TraceTree, nodes: Sequence[TraceNode]) -> bool:
        """Whether these nodes can be held beside the reading of one; makes the room by giving up other trees' caches."""
        rows = map(PassRow.of, nodes)
        one = max(self.budget.pass_bytes(1, row.prefix_length, len(row.new_tokens)) for row in rows)
        held = sum(len(node.tokens) for node in nodes) * self.budget.token.kv
        return self._make_room(held + one, keep=tree)

    def _read(self, tree: TraceTree, nodes: Sequence[TraceNode]) -> dict[TraceNode, float]:
        """Read nodes in chunks that fit, and keep their caches as far as they are wanted; the value at the end of each."""
        values: dict[TraceNode, float] = {}
        alone = False
        while remaining := [node for node in nodes if node not in values]:
            rows = self._next_chunk(tree, remaining)
            if (read := self._unless_out_of_memory(self._read_chunk, tree, rows)) is None:
                alone = self._back_off(tree, rows, alone)
            else:
                values, alone = values | read, False
        return values

    def _unless_out_of_memory(self, function: Callable[..., _T], *arguments: object) -> _T | None:
        """What it returns; None where the device had no memory for it. Then its frames, and with them its tensors, are
        gone on return: the exception would keep them."""
        try:
            return function(*arguments)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _back_off(self, tree: TraceTree, rows: list[PassRow], was_alone: bool) -> bool:
        """After a pass that ran out of memory: half of its rows, then fewer caches, then once more as it is. Is this the
        last of them? Raises ScoringOutOfMemory where it `was_alone` already."""
        prefix, width, budget = rows[0].prefix_length, len(rows[0].new_tokens), self.budget
        needed, held, device = budget.pass_bytes(len(rows), prefix, width), budget.held, self.model.device
        give_back(device)
        what = f"reading {len(rows)} x {width} new tokens behind {prefix} held ones"
        alone = len(rows) == 1 and held == prefix * budget.token.kv
        if alone and was_alone:
            raise ScoringOutOfMemory(
                f"out of memory on {device} for a single trace of {prefix + width} tokens ({prefix} held, {width} to "
                f"read), with nothing else held: it takes about {(held + needed) / 1e9:.3g} GB{free_words(device)}"
            )
        if alone:
            self._note_back_off(what, needed, "trying once more")
        elif len(rows) > 1:
            self.max_batch_tokens = len(rows) // 2 * width
            self._note_back_off(what, needed, f"going on with {self.max_batch_tokens} new tokens a pass")
        else:
            self._note_back_off(what, needed, "going on with fewer caches, and so reading tokens again")
            budget.shrink(needed)
            if not self._give_up_oldest(keep=tree):
                self._drop(node for node in tree.nodes if node not in rows[0].held)
        return alone

    def _note_back_off(self, what: str, needed: int, then: str) -> None:
        self.back_offs += 1
        logger.log(
            logging.WARNING if self.back_offs == 1 else logging.DEBUG,
            "scoring: out of memory on %s %s (%.3g GB beside caches of %.3g GB%s); %s; later ones are not said",
            self.model.device, what, needed / 1e9, self.budget.held / 1e9, free_words(self.model.device), then,
        )  # fmt: skip

    def _next_chunk(self, tree: TraceTree, remaining: Sequence[TraceNode]) -> list[PassRow]:
        """Rows with a prefix of one length for the next forward pass, the longest first (so little is padded)."""
        rows = list(map(PassRow.of, remaining))
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
    def _read_chunk(self, tree: TraceTree, rows: list[PassRow]) -> dict[TraceNode, float]:
        """Read rows in one forward pass; the value at the end of each."""
        prefix, width = rows[0].prefix_length, max(len(row.new_tokens) for row in rows)
        with self.budget.reading(len(rows), prefix, width):
            kv = self._working_cache(rows, prefix + width)
            values = self._forward(kv, rows, prefix, width)
            self._account(tree, rows, width)
            for i, row in enumerate(rows):
                self._hold(row, kv[:, :, i])
        return {row.to_read[-1]: value for row, value in zip(rows, values, strict=True)}

    def _forward(self, kv: torch.Tensor, rows: list[PassRow], prefix: int, width: int) -> list[float]:
        """Values at the rows' last tokens; fills the new tokens' places in `kv`."""
        device, lengths = self.model.device, [len(row.new_tokens) for row in rows]
        padded = [row.new_tokens + [0] * (width - len(row.new_tokens)) for row in rows]
        layers = [WorkingLayer(keys, values, prefix) for keys, values in zip(kv[0], kv[1], strict=True)]
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

    def _working_cache(self, rows: list[PassRow], length: int) -> torch.Tensor:
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

    def _account(self, tree: TraceTree, rows: list[PassRow], width: int) -> None:
        scored = sum(len(row.new_tokens) for row in rows)
        reread = 0
        for node in itertools.chain.from_iterable(row.to_read for row in rows):
            reread += len(node.tokens) if node.was_read else 0
            node.was_read = True
        for usage in (tree.usage, self.usage):
            usage.tokens_scored += scored
            usage.tokens_reread += reread
            usage.tokens_padding += len(rows) * width - scored

    def _hold(self, row: PassRow, kv: torch.Tensor) -> None:
        """Keep the new caches of a row that was just read, as far as there is room."""
        at = row.prefix_length
        for node in row.to_read:
            end = at + len(node.tokens)
            wanted = node.kv is None and not (node.final and node is row.to_read[-1])
            if wanted and self.budget.hold(len(node.tokens)):
                node.kv = self._unless_out_of_memory(copy_of, kv, at, end)
                if node.kv is None:
                    needed = len(node.tokens) * self.budget.token.kv
                    self.budget.drop(len(node.tokens))
                    self.budget.shrink(needed)
                    self._note_back_off("keeping what was read", needed, "reading it again when it is needed")
            at = end

    def _make_room(self, needed: int, keep: TraceTree) -> bool:
        """Give up the caches of other trees, least recently scored first, until `needed` bytes are free."""
        while self.budget.free < needed and self._give_up_oldest(keep):
            pass
        return self.budget.free >= needed

    def _give_up_oldest(self, keep: TraceTree) -> bool:
        """Give up the caches of the least recently scored other tree; False where none has any."""
        for victim in self._trees.values():
            if victim is not keep and any(node.kv is not None for node in victim.nodes):
                self._drop(victim.nodes)
                return True
        return False

    def _drop(self, nodes: Iterable[TraceNode]) -> None:
        for node in nodes:
            if node.kv is not None:
                self.budget.drop(len(node.tokens))
                node.kv = None
