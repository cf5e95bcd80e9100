"""What a training step holds of a rank's memory, from shapes alone: told and checked before weights load. No torch.

The formulas count, tensor by tensor, what autograd keeps of a Qwen2 layer; scripts/training_memory.py holds them against
tracked fake tensors. Written h, q, kv, i: numbers a token of the residual, of queries, of keys, and inside the MLP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from common_lib.cli import UserError
from common_lib.models import ModelInfo
from training_lib.precision import Precision

RESERVE = 0.06  # of a card, left alone: the driver's context, NCCL, the allocator's holes
EASE = 0.9  # of what can be used: a little less kept costs less than a run that ends
BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.1)  # of compiled layers, best first
MOST_RANKS = 1024


@dataclass(frozen=True)
class StepShape:
    """What decides a step's memory beside the model. `budget`: of compiled layers without checkpointing."""

    tokens: int  # of the largest row, or padded micro batch
    precision: Precision
    ranks: int = 1
    checkpointing: bool = True
    compiled: bool = False
    budget: float = 1.0
    num_labels: int = 3
    dense_mask: bool = False  # packed rows through SDPA
    packed: bool = True
    shortest: int = 1  # tokens that a row must hold: a whole trace

    @property
    def itemsize(self) -> int:
        """Bytes of a stored parameter."""
        return 2 if self.precision.bf16_parameters else 4

    @property
    def computed(self) -> int:
        """Bytes of a number that a matrix product reads."""
        return 2 if self.precision.half_attention else 4

    @property
    def residual(self) -> int:
        """Bytes of a number that runs from layer to layer."""
        return 2 if self.precision.half_residual else 4


def layer_parameters(info: ModelInfo) -> int:
    h, q, kv = info.hidden_size, *_projections(info)
    return h * (2 * q + 2 * kv + 3 * info.intermediate_size + 2) + q + 2 * kv


def root_parameters(info: ModelInfo, num_labels: int) -> int:
    """Those outside of the layers: embeddings, last norm, head."""
    h = info.hidden_size
    return h * (info.vocab_size + 1 + h + num_labels)


def _projections(info: ModelInfo) -> tuple[int, int]:
    return info.num_attention_heads * info.head_dim, info.num_key_value_heads * info.head_dim


# ---------------------------------------------------------------------------------------------------------------------
# Activations, in bytes a token


def eager_layer(info: ModelInfo, shape: StepShape) -> int:
    """What a layer's forward keeps for its backward.

    Each of two norms: its input in fp32, the normed input, and what the matrix products read, which autocast casts anew
    for each of them. Attention: queries, keys, values, output, and the softmax's sums. The MLP: gate, silu(gate), up, and
    their product.
    """
    h, c = info.hidden_size, shape.computed
    if shape.residual == c:
        norms = 2 * (4 * h + c * h + c * h)
    else:
        norms = 2 * (4 * h + 4 * h) + (3 + 2) * c * h
    return norms + 8 + _attention(info, c) + 4 * c * info.intermediate_size


def compiled_layer(info: ModelInfo, shape: StepShape) -> int:
    """The same of a compiled layer under an activation budget.

    1.0 keeps the layer's input, attention's projected output, both norms' outputs, attention's own, gate, up and
    silu(gate) x up. Below it the norms and the product are computed again from the rest, and where that is more than the
    share allows (0: the input and attention's own output, which are kept in any case, 1: all) matrix products are, too.
    """
    h, c, i = info.hidden_size, shape.computed, info.intermediate_size
    least = shape.residual * h + c * _projections(info)[0] + 4 * info.num_attention_heads
    lean = shape.residual * h + c * h + _attention(info, c) + 2 * c * i
    full = lean + 2 * c * h + c * i
    return full if shape.budget >= 1 else min(lean, round(least + shape.budget * (full - least)))


def _attention(info: ModelInfo, itemsize: int) -> int:
    q, kv = _projections(info)
    return itemsize * (2 * q + 2 * kv) + 4 * info.num_attention_heads


def activation_bytes(info: ModelInfo, shape: StepShape) -> int:
    """Of a pass at its peak: at the head, or in the backward of the last layer (which checkpointing computes again)."""
    h, c, layers = info.hidden_size, shape.computed, info.num_hidden_layers
    head = (4 + 4 * c) * h + 64  # last norm, dropout and its mask, the head's layers; logits and loss are small
    gradient = shape.residual * h
    products = (3 if shape.compiled else 2) * c * info.intermediate_size  # gradients inside the MLP
    if shape.checkpointing:
        kept = layers * shape.residual * h
        again = compiled_layer(info, replace(shape, budget=1.0)) if shape.compiled else eager_layer(info, shape)
        if shape.residual == 4:
            again -= 4 * h  # its input is the checkpoint
    else:
        kept, again = layers * (compiled_layer if shape.compiled else eager_layer)(info, shape), 0
    copies = 0  # of the weights, that autocast makes for the whole forward pass
    if shape.precision.autocast and shape.itemsize == 4 and not shape.compiled:
        copies = 2 * (info.num_hidden_layers * layer_parameters(info) + h * h)
    at_head = shape.tokens * (kept + head) + copies
    in_layer = shape.tokens * (kept + again + gradient + products) + (0 if shape.checkpointing else copies)
    mask = 5 * shape.tokens**2 if shape.dense_mask else 0  # as bools, and as the floats that SDPA adds
    return max(at_head, in_layer) + mask


# ---------------------------------------------------------------------------------------------------------------------
# A rank


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by name of what a rank holds at the peak of a step, from the second on."""

    parts: dict[str, int]
    shape: StepShape

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        """In GB."""
        words = [f"{name.replace('_', ' ')} {size / 1e9:.3g}" for name, size in self.parts.items()]
        return f"{', '.join(words)} at {self.shape.tokens:,} tokens"


def estimate_memory(info: ModelInfo, shape: StepShape) -> TrainingMemory:
    """What a rank holds with AdamW. DDP's buckets are its gradients; FSDP shares the states out and gathers layers."""
    layer, root = layer_parameters(info), root_parameters(info, shape.num_labels)
    numbers = info.num_hidden_layers * layer + root
    states = numbers * shape.itemsize // (shape.ranks if shape.precision.fsdp else 1)
    parts = {"parameters": states, "gradients": states, "AdamW": 2 * states}
    activations = activation_bytes(info, shape)
    if shape.precision.fsdp:
        # The root stays gathered through a pass; of the layers one is, the next comes, and one's gradients are reduced.
        gathered = shape.computed * (root + 4 * layer)
        # At the pass's end, without activations: the root's gradient, as computed and in fp32 to be reduced.
        last = shape.computed * 2 * root + 4 * root + 4 * root // shape.ranks
        parts["gathered_layers"] = max(gathered, last - activations)
    parts["activations"] = activations
    return TrainingMemory(parts, shape)


def usable(card: int) -> int:
    """Bytes of a card that tensors may take."""
    return int((1 - RESERVE) * card)


def choose_activation_budget(
    info: ModelInfo, shape: StepShape, card: int, budgets: Sequence[float] = BUDGETS
) -> float | None:
    """The first of the budgets of compiled layers with which a step has ease on a card of `card` bytes, or else fits; None
    where none does."""
    needs = {budget: estimate_memory(info, replace(shape, budget=budget)).total for budget in budgets}
    fitting = [b for share in (EASE, 1.0) for b, need in needs.items() if need <= share * usable(card)]
    return fitting[0] if fitting else None


def check_memory(info: ModelInfo, shape: StepShape, card: int, name: str) -> TrainingMemory:
    """The estimate, where it fits a card of `card` bytes. UserError with its sizes and the flags that make it fit, where
    not. name: of the card, in words."""
    found = estimate_memory(info, shape)
    if found.total <= usable(card):
        return found
    ways = [f"{flags} ({found.total / 1e9:.3g} GB)" for flags, found in _ways_to_fit(info, shape, card)]
    where = f"each of {shape.ranks} ranks" if shape.ranks > 1 else "its one rank"
    raise UserError(
        f"a step of {info.path} needs {found.total / 1e9:.3g} GB on {where}, and {name} has {card / 1e9:.3g}, of which "
        f"{usable(card) / 1e9:.3g} can be used: {found}; {'what fits: ' + ', or '.join(ways) if ways else 'give a smaller model'}"
    )


def _ways_to_fit(info: ModelInfo, shape: StepShape, card: int) -> Iterator[tuple[str, TrainingMemory]]:
    """(flags, estimate) of each change that is enough: of the passes, of the ranks, and of both."""
    smaller = list(_smaller_passes(shape))
    more: list[tuple[str, StepShape]] = []
    ranks = shape.ranks
    while ranks < MOST_RANKS:
        ranks *= 2
        precision = replace(shape.precision, fsdp=True)
        more.append((f"--fsdp on with {ranks} ranks", replace(shape, precision=precision, ranks=ranks)))
    if not shape.precision.fsdp and shape.ranks > 1:
        more.insert(0, ("--fsdp on", replace(shape, precision=replace(shape.precision, fsdp=True))))
    both = [
        (f"{flags} and {way}", replace(other, precision=wide.precision, ranks=wide.ranks))
        for flags, other in smaller
        for way, wide in more
    ]
    found = False
    for group in (smaller, more, both):
        fitting = [(flags, e) for flags, other in group if (e := estimate_memory(info, other)).total <= usable(card)]
        if fitting and not (group is both and found):
            found = True
            yield fitting[0]


def _smaller_passes(shape: StepShape) -> Iterator[tuple[str, StepShape]]:
    """Ever less memory for the same step."""
    if not shape.checkpointing and not shape.compiled:
        yield "--gradient_checkpointing", replace(shape, checkpointing=True)
    if shape.compiled and not shape.checkpointing and shape.budget > BUDGETS[-1]:
        yield f"--activation_budget {BUDGETS[-1]}", replace(shape, budget=BUDGETS[-1])
    tokens = shape.tokens // 2
    while tokens >= shape.shortest:
        flag = f"--row_tokens {tokens}" if shape.packed else f"--micro_batch_size {tokens // shape.shortest}"
        yield flag, replace(shape, tokens=tokens if shape.packed else tokens // shape.shortest * shape.shortest)
        tokens //= 2
