"""The model as it is trained, and what one step computes on one rank."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from classifier_lib import Qwen2ForClassifier, bradley_terry_loss, rollout_loss
from common_lib.cli import quiet_transformers
from training_lib.attention import FLEX, model_inputs, row_multiple
from training_lib.loop import World, gradient_sync
from training_lib.packing import MicroBatch, empty_batch

logger = logging.getLogger(__name__)


def load_model(
    args: argparse.Namespace, model_dir: Path, has_head: bool, world: World, attention: str
) -> Qwen2ForClassifier:
    """The value model on its device, with the run's dropout and attention; a fresh head unless `has_head`."""
    quiet_transformers()  # what it reports of missing weights, Qwen2ForClassifier says itself
    torch.manual_seed(args.seed)  # a fresh head is the same on all ranks
    dtype = torch.float32 if args.param_dtype == "fp32" else torch.bfloat16
    load = {"dtype": dtype, "attn_implementation": "sdpa"}
    if has_head:
        model = Qwen2ForClassifier.from_pretrained(model_dir, **load)
    else:
        model = Qwen2ForClassifier.from_backbone(model_dir, num_labels=args.num_labels, **load)
    model.set_dropout(args.p_dropout)
    if attention == FLEX and args.p_dropout > 0:
        logger.info("attention dropout is 0: FlexAttention has none (head dropout stays %g)", args.p_dropout)
        model.config.attention_dropout = 0.0
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
    model.set_attn_implementation(attention)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.to(world.device)
    if args.compile or attention == FLEX:
        # DDP's graph splitter has nothing to split in graphs of one layer, and it does not know FlexAttention.
        torch._dynamo.config.optimize_ddp = False
    if args.compile:
        compile_layers(model)
    torch.manual_seed(args.seed * 1_000_003 + world.rank)  # dropout differs between ranks
    return model.train()


def compile_layers(model: Qwen2ForClassifier) -> None:
    """Compile each layer's forward: the layers share one graph for all row lengths, and checkpointing stays outside."""
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


@dataclass
class Step:
    """Forward, loss and backward of one step's micro batches on this rank."""

    args: argparse.Namespace
    model: torch.nn.Module  # as distributed
    world: World
    attention: str
    autocast: bool

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits of all tokens of a micro batch, [tokens, num_labels]."""
        inputs = model_inputs(batch, self.attention, self.world.device)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(**inputs).logits
        return logits.flatten(0, 1)

    def loss(self, logits: torch.Tensor, batch: MicroBatch, num_rollouts: int) -> torch.Tensor:
        """The micro batch's part of the mean over `num_rollouts` roll-outs, or over half as many pairs."""

        def on_device(array):
            return torch.from_numpy(array).to(self.world.device)

        if self.args.train_bt_model:
            last = logits[on_device(batch.last_index)].squeeze(-1)
            if len(last) == 0:
                return logits.sum() * 0.0
            return bradley_terry_loss(last[0::2], last[1::2]) * (len(last) / num_rollouts)
        labels = on_device(batch.labels)
        weights = torch.full((len(labels),), 1.0 / num_rollouts, device=self.world.device)
        return rollout_loss(logits, on_device(batch.token_index), on_device(batch.rollout_index), labels, weights)

    def backward(self, batches: list[MicroBatch]) -> list[float]:
        """Gradients of the whole step's mean loss, averaged over ranks by DDP and FSDP; this rank's part of the loss."""
        losses = []
        for i, batch in enumerate(batches):
            with gradient_sync(self.model, i == len(batches) - 1):
                loss = self.loss(self.logits(batch), batch, self.args.total_batch_size)
                (loss * self.world.size).backward()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def in_step(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """With FSDP every rank must run as many passes as the others: empty ones are added."""
        if not self.args.fsdp:
            return batches
        missing = self.world.max([len(batches)])[0] - len(batches)
        padding = empty_batch(self.args.packing != "none", row_multiple(self.attention))
        return [padding] * missing + batches

    @torch.no_grad()
    def blame(self, batches: list[MicroBatch]) -> str:
        """The first roll-out of this rank whose logits are not finite. With FSDP every rank must call it."""
        found = []
        for batch in batches:
            finite = torch.isfinite(self.logits(batch)).all(dim=-1).cpu().numpy()
            owners = batch.rollout_index[~finite[batch.token_index]]
            found += [batch.sources[owner] for owner in owners[:1]]
        return "row {}, roll-out {}".format(*found[0]) if found else "unknown (computed again, its logits are finite)"
