"""What a training step is made of: its computation on one rank, the model, the optimizer, and what it costs."""

import argparse
import logging
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING

import torch
from torch import nn

from classifier_lib import Qwen2ForClassifier, bradley_terry_loss, rollout_loss
from common_lib.cli import quiet_transformers
from training_lib.attention import Attention, on_device
from training_lib.compiling import activation_budget, compile_layers, whole_layers
from training_lib.packing import MicroBatch, empty_batch
from training_lib.ranks import World, gradient_sync

if TYPE_CHECKING:  # it reads data sets: more packages than a step needs
    from training_lib.plan import TrainingPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainStep:
    """Forward, loss and backward of one step's micro batches on this rank."""

    model: nn.Module  # as distributed
    world: World
    attention: Attention
    autocast: bool
    total_batch_size: int  # roll-outs a step, over all ranks
    pairs: bool = False  # Bradley-Terry: the loss is one of pairs of roll-outs
    packed: bool = False
    sharded: bool = False  # by FSDP

    def backward(self, batches: list[MicroBatch]) -> list[float]:
        """Gradients of the whole step's mean loss, averaged over ranks by DDP and FSDP; this rank's part of the loss."""
        losses = []
        for i, batch in enumerate(batches):
            with gradient_sync(self.model, i == len(batches) - 1):
                loss = self.loss(self.logits(batch), batch, self.total_batch_size)
                (loss * self.world.size).backward()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits of all tokens of a micro batch, [tokens, num_labels]."""
        inputs = self.attention.inputs(batch, self.world.device)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(**inputs).logits
        return logits.flatten(0, 1)

    def loss(self, logits: torch.Tensor, batch: MicroBatch, num_rollouts: int) -> torch.Tensor:
        """The micro batch's part of the mean over `num_rollouts` roll-outs, or over half as many pairs."""
        device = self.world.device
        if self.pairs:
            last = logits[on_device(batch.last_index, device)].squeeze(-1)
            if len(last) == 0:
                return logits.sum() * 0.0
            return bradley_terry_loss(last[0::2], last[1::2]) * (len(last) / num_rollouts)
        arrays = (batch.token_index, batch.rollout_index, batch.labels)
        weights = torch.full((len(batch.labels),), 1.0 / num_rollouts, device=device)
        return rollout_loss(logits, *(on_device(array, device) for array in arrays), weights)

    def pad_to_same_count(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """With FSDP every rank must run as many passes as the others: empty ones are added."""
        if not self.sharded:
            return batches
        missing = max(self.world.gather(len(batches))) - len(batches)
        return [empty_batch(self.packed, self.attention.row_multiple)] * missing + batches

    @torch.no_grad()
    def find_nonfinite_sample(self, batches: list[MicroBatch]) -> str:
        """The first roll-out of this rank whose logits are not finite. With FSDP every rank must call it."""
        found = []
        for batch in batches:
            finite = torch.isfinite(self.logits(batch)).all(dim=-1).cpu().numpy()
            owners = batch.rollout_index[~finite[batch.token_index]]
            found += [batch.sources[owner] for owner in owners[:1]]
        return "row {}, roll-out {}".format(*found[0]) if found else "unknown (computed again, its logits are finite)"


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_model(args: argparse.Namespace, plan: "TrainingPlan", world: World) -> Qwen2ForClassifier:
    """The value model, with the run's dropout and attention, on its device, or where FSDP is to take it from; a backbone gets
    a fresh head."""
    quiet_transformers()  # what it reports of missing weights, Qwen2ForClassifier says itself
    torch.manual_seed(args.seed)  # a fresh head is the same on all ranks
    load = {"dtype": torch.float32 if args.param_dtype == "fp32" else torch.bfloat16, "attn_implementation": "sdpa"}
    if plan.has_head:
        model = Qwen2ForClassifier.from_pretrained(plan.model_dir, **load)
    else:
        model = Qwen2ForClassifier.from_backbone(plan.model_dir, num_labels=args.num_labels, **load)
    return set_up_model(model, args, plan.attention, world)


def set_up_model(
    model: Qwen2ForClassifier, args: argparse.Namespace, attention: Attention, world: World
) -> Qwen2ForClassifier:
    """The loaded model as a run trains it: dropout, attention, checkpointing, device, compiled layers, noise."""
    if args.p_dropout > 0 and not attention.has_dropout:
        logger.info(
            "attention dropout is 0: %s has none (head dropout stays %g); --packing none has it",
            attention.name,
            args.p_dropout,
        )
    model.set_dropout(attention=args.p_dropout if attention.has_dropout else 0.0, head=args.p_dropout)
    model.set_attn_implementation(attention.name)
    if whole_layers(args):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.fsdp != "on":  # FSDP takes a layer there as it shards it, so that no card need hold the whole model
        model.to(world.device)
    # DDP's graph splitter has nothing to split in graphs of one layer, and it does not know FlexAttention.
    torch._dynamo.config.optimize_ddp = False
    if args.compile:
        compile_layers(model, activation_budget(args))
    torch.manual_seed(args.seed * 1_000_003 + world.rank)  # dropout differs between ranks
    return model.train()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule


def make_optimizer(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW, eps 1e-6, with weight decay on tensors of two or more dimensions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-6, fused=True)


def learning_rate(step: int, num_steps: int, max_lr: float) -> float:
    """Rate of step 0 .. num_steps - 1: linear warm-up, then a cosine to 10 % of `max_lr`.

    Warm-up takes max(5 % of the steps, 100), but at most half of them.
    """
    warmup = min(max(num_steps // 20, 100), num_steps // 2)
    if step < warmup:
        return max_lr * (step + 1) / warmup
    done = (step - warmup) / max(num_steps - 1 - warmup, 1)
    return max_lr * (0.1 + 0.9 * 0.5 * (1 + cos(pi * done)))


# ---------------------------------------------------------------------------------------------------------------------
# Speed

# Dense bf16 peak in FLOP/s, from the makers' data sheets (without sparsity); the first name that fits counts.
PEAK_FLOPS = {
    "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12,
    "B200": 2250e12, "B300": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A40": 150e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 5090": 209e12, "MI300X": 1307e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """The card's dense bf16 peak in FLOP/s; None for a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def step_flops(model: Qwen2ForClassifier, num_tokens: float, num_pairs: float) -> float:
    """Model FLOPs of forward and backward: 6 a weight and token, 12 a head dimension and attended pair in each layer.

    The embedding is no weight here. Tokens without padding, shared ones once; pairs are real ones; nothing is counted
    for recomputation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    config, embedding = model.config, model.get_input_embeddings().weight
    weights = sum(parameter.numel() for parameter in model.parameters()) - embedding.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * num_pairs
    return 6 * weights * num_tokens + attention
