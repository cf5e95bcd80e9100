"""The certificate: before a run trains, its attention is held against what it should compute, on this device.

Block-sparse kernels have given silently wrong gradients on some GPUs. On a small batch of traces with shared prefixes, by a
model of two layers that has the run's shapes, dtype, kernel and compiler, and without dropout, three things are checked:
the integers that tell the kernel what a token may see; that nothing else is seen, forwards or backwards, exactly; and that
loss and gradients are as near to a float32 reference as those of plain attention in the run's dtype.
"""

import argparse
import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config

from classifier_lib import Qwen2ForClassifier
from common_lib.cli import UserError
from common_lib.files import write_json
from training_lib.attention import SDPA, Attention
from training_lib.attention_check import kernel_leaks, wrong_integers
from training_lib.compiling import activation_budget, compile_layers, whole_layers
from training_lib.packing import MicroBatch, Trace, lay_out
from training_lib.precision import Precision
from training_lib.ranks import World

if TYPE_CHECKING:  # it reads data sets
    from training_lib.plan import TrainingPlan

logger = logging.getLogger(__name__)

LAYERS = 2  # what a token sees in the first, a later one sees of it in the second
# (tokens of a root, [(tokens of a branch, [tokens of each roll-out])]): borders lie within blocks of 128 and on them
FAMILIES = [(140, [(30, [50]), (129, [70, 1]), (0, [90])]), (60, [(10, [100, 33])])]
# What is compared with runs on none of the flash kernels: torch hands flash-attn-4, once it is loaded, SDPA's calls too, and
# a kernel that is wrong would be held against itself.
PLAIN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
AT_MOST, FLOOR = 2.0, 1e-4  # times the plain path's distance, and what float32 may differ by
TOKENS_A_PART = 32  # whose embeddings' gradients are compared together


def family_traces(families: list[tuple[int, list[tuple[int, list[int]]]]]) -> list[Trace]:
    """Traces of nested roll-ins. Every node of their trie has a token id of its own, so that a gradient of the embeddings
    is one of places, whatever the layout."""
    traces, last = [], 0

    def fresh(count: int) -> list[int]:
        nonlocal last
        last += count
        return list(range(last - count + 1, last + 1))

    for root_tokens, branches in families:
        root = fresh(root_tokens)
        for branch_tokens, tails in branches:
            branch = root + fresh(branch_tokens)
            for tail in tails:
                # A roll-out that begins within the root: a token may be one of a roll-out here and of a roll-in there.
                start = len(branch) if branch_tokens else len(root) - 40
                label = len(traces) % 3
                traces.append(Trace(np.array(branch + fresh(tail)), start, label, (0, len(traces))))
    return traces


TRACES = family_traces(FAMILIES)
NUM_IDS = 1 + max(int(trace.tokens.max()) for trace in TRACES)


class CertificateBench:
    """A small model of the run's shapes, and the paths that are compared."""

    def __init__(
        self, config: Qwen2Config, attention: Attention, packing: str, precision: Precision, device: torch.device
    ):
        self.attention, self.packing, self.precision, self.device = attention, packing, precision, device
        self.config = Qwen2Config(
            vocab_size=NUM_IDS, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=LAYERS, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps, num_labels=3,
            max_position_embeddings=config.max_position_embeddings, rope_parameters=config.rope_parameters,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            use_sliding_window=False, tie_word_embeddings=False,
        )  # fmt: skip
        self.reference = self._model(torch.float32, SDPA)
        self.longest = max(len(trace.tokens) for trace in TRACES)

    def _model(self, dtype: torch.dtype, attention: Attention, like: nn.Module | None = None) -> Qwen2ForClassifier:
        """Weights with which attention is neither uniform nor a copy; no ReLU, which may switch by rounding alone."""
        model = Qwen2ForClassifier(copy.deepcopy(self.config))  # which says what attention it has
        model.score[1] = nn.Identity()
        if like is not None:
            model.load_state_dict(like.state_dict())
        else:
            with torch.no_grad():
                for name, part in model.named_parameters():
                    if part.dim() > 1:
                        part.normal_(std=1.0 if "embed" in name else part.shape[1] ** -0.5)
        model.set_attn_implementation(attention.name)
        return model.to(self.device, dtype).train()  # trained, as in the run: there is no dropout

    def in_run_dtype(self, attention: Attention) -> Qwen2ForClassifier:
        dtype = torch.bfloat16 if self.precision.half_residual else torch.float32
        return self._model(dtype, attention, self.reference)

    def batches(self, packing: str, attention: Attention) -> list[MicroBatch]:
        row_tokens = sum(len(trace.tokens) for trace in TRACES)
        found = lay_out([[trace] for trace in TRACES], packing, 4, self.longest, attention.row_multiple, row_tokens)
        return [attention.prepare(batch) for batch in found] if attention.prepare else found

    def losses(self, model: nn.Module, attention: Attention, batch: MicroBatch, half: bool) -> torch.Tensor:
        """Cross entropy of each (token, roll-out) pair, float32 [P], in the batch's order."""
        inputs = attention.inputs(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half and self.precision.autocast):
            logits = model(**inputs).logits.flatten(0, 1)
        token, rollout, labels = (
            torch.from_numpy(part).to(self.device) for part in (batch.token_index, batch.rollout_index, batch.labels)
        )
        return F.cross_entropy(logits[token].float(), labels[rollout], reduction="none")

    def path(
        self, model: nn.Module, attention: Attention, packing: str, half: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(each roll-out token's loss, trace after trace; gradients of their mean by name)."""
        model.zero_grad(set_to_none=True)
        found: dict[tuple[int, int], torch.Tensor] = {}
        for batch in self.batches(packing, attention):
            losses = self.losses(model, attention, batch, half)
            (losses.sum() / sum(len(trace.tokens) - trace.start for trace in TRACES)).backward()
            for number, source in enumerate(batch.sources):
                found[source] = losses.detach()[torch.from_numpy(batch.rollout_index == number).to(self.device)]
        gradients = {name: part.grad.float() for name, part in model.named_parameters()}
        return torch.cat([found[trace.source] for trace in TRACES]), gradients


# ---------------------------------------------------------------------------------------------------------------------
# The checks. Each returns what it found, or raises UserError.


def check_integers(bench: CertificateBench) -> int:
    """(a) What the kernel is told, against the trace of each token: exactly. Returns the pairs compared."""
    pairs = 0
    for batch in bench.batches(bench.packing, bench.attention):
        if wrong := wrong_integers(batch, bench.attention.inputs(batch, bench.device)):
            raise UserError(f"masks: {wrong}")
        pairs += batch.input_ids.shape[0] * batch.input_ids.shape[1] ** 2
    return pairs


def check_leaks(bench: CertificateBench, model: nn.Module) -> int:
    """(b) The kernel's weights, forwards and backwards, are 0 but where they may be otherwise, and a roll-out's loss has no
    gradient at a token that is not of its trace. Returns the pairs and tokens looked at."""
    looked, embedding = 0, model.get_input_embeddings().weight
    for batch in bench.batches(bench.packing, bench.attention):
        if wrong := kernel_leaks(batch, bench.attention, model, bench.device, bench.precision):
            raise UserError(f"leak: {wrong}")
        looked += batch.input_ids.shape[0] * batch.input_ids.shape[1] ** 2
        for number, source in enumerate(batch.sources):
            losses = bench.losses(model, bench.attention, batch, half=True)
            own = torch.from_numpy(batch.rollout_index == number).to(bench.device)
            (gradient,) = torch.autograd.grad(losses[own].mean(), embedding)
            others = torch.ones(NUM_IDS, dtype=torch.bool, device=bench.device)
            others[torch.from_numpy(TRACES[source[1]].tokens).to(bench.device)] = False
            leaking = others & (gradient != 0).any(dim=1)  # NaN is not 0
            if leaking.any():
                raise UserError(
                    f"leak: the loss of roll-out {source[1]} has a gradient at {int(leaking.sum())} tokens of other traces"
                )
            looked += int(others.sum())
    return looked


def check_distance(bench: CertificateBench, model: nn.Module) -> dict[str, float]:
    """(c) Loss and gradients are at most AT_MOST times as far from the float32 reference as those of plain attention, in
    each part. Returns the part that is nearest to that, as (distance, plain distance) of it."""
    with sdpa_kernel(PLAIN):
        wanted = dict(_parts(*bench.path(bench.reference, SDPA, "none", half=False)))
        plain = dict(_parts(*bench.path(bench.in_run_dtype(SDPA), SDPA, "none", half=True)))
    worst = {"ratio": 0.0}
    for name, found in _parts(*bench.path(model, bench.attention, bench.packing, half=True)):
        size = wanted[name].norm()
        off, allowed = ((part[name] - wanted[name]).norm() / size for part in ({name: found}, plain))
        ratio = float(off / (AT_MOST * allowed).clamp(min=FLOOR))
        if not ratio <= 1:  # NaN is far
            raise UserError(
                f"distance: {name} is {float(off):.2g} from the float32 reference, more than {AT_MOST:g} times plain attention's "
                f"{float(allowed):.2g}"
            )
        if ratio >= worst["ratio"]:
            worst = {"part": name, "ratio": ratio, "distance": float(off), "plain": float(allowed)}
    return worst


def _parts(losses: torch.Tensor, gradients: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is compared apart, by name. The embeddings' gradients by neighbouring tokens: a wrong block shows there."""
    yield "the loss", losses
    for name, gradient in gradients.items():
        if "embed" not in name:
            yield f"the gradient of {name}", gradient
        else:
            for first in range(1, NUM_IDS, TOKENS_A_PART):
                yield f"the gradient at tokens {first} ...", gradient[first : first + TOKENS_A_PART]


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def certify(bench: CertificateBench, model: nn.Module | None = None) -> dict[str, Any]:
    """All checks; what they found. UserError for the first that fails. model: the bench's, as the run would have it."""
    begin = time.monotonic()
    model = model or bench.in_run_dtype(bench.attention)
    found: dict[str, Any] = {"masks_compared": check_integers(bench), "leaks_looked_for": check_leaks(bench, model)}
    return found | {"distance": check_distance(bench, model), "seconds": time.monotonic() - begin}


def certify_run(args: argparse.Namespace, plan: "TrainingPlan", world: World) -> None:
    """Certify what a run is about to do, on every rank's device, and write `certificate.json`. UserError on all ranks where
    that of one fails. The run's noise is not touched, and what was compiled is forgotten: its shapes are small ones."""
    if not (world.device.type == "cuda" if args.certify is None else args.certify):
        return
    what = f"attention {plan.attention.name}, packing {args.packing}, {plan.precision}{', compiled' if args.compile else ''}"
    found, failure = {}, None
    with _apart(world.device):
        try:
            found = _certify_as_trained(args, plan, world)
        except UserError as error:
            failure = str(error)
    failure = next((failure for failure in world.gather(failure) if failure), None)
    with world.together():
        if world.rank == 0 and not args.eval_only:
            told = {"why": failure} if failure else found
            write_json(Path(plan.run_dir) / "certificate.json", {"passed": not failure, "what": what} | told)
    if failure:
        raise UserError(
            f"certificate: {what}: {failure}; training would be wrong: give another --packing (each has its own kernel), "
            "or leave --compile out; --no-certify trains all the same"
        )
    worst = found["distance"]
    logger.info(
        "certificate: %s: masks and %d places without a leak; %s is %.1e from float32 (plain attention: %.1e)",
        what, found["leaks_looked_for"], worst["part"], worst["distance"], worst["plain"],
    )  # fmt: skip


def _certify_as_trained(args: argparse.Namespace, plan: "TrainingPlan", world: World) -> dict[str, Any]:
    """`certify` with the kernel, the numbers, the compiler and the checkpointing of the run."""
    config = Qwen2Config.from_pretrained(plan.model_dir)
    bench = CertificateBench(config, plan.attention, args.packing, plan.precision, world.device)
    model = bench.in_run_dtype(plan.attention)
    if whole_layers(args):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.compile:
        compile_layers(model, activation_budget(args))
    try:
        return certify(bench, model)
    finally:
        torch._dynamo.reset()


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Without a trace in the noise that is drawn later, or in a GPU's memory."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()
