"""Compiled layers: one graph for all of them and all row lengths, and what of it is kept for the backward pass."""

import argparse
from collections.abc import Callable

import torch
import torch._functorch.config  # not there by itself
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from training_lib.arguments import AUTO

ATTENTION = ("flex_attention", "varlen", "flash_attention", "efficient_attention")  # in names of operators


def whole_layers(args: argparse.Namespace) -> bool:
    """Whether every layer keeps its input alone and is computed again in the backward pass.

    Without a flag that is so where layers are not compiled: the compiler keeps what is dear to compute and computes the
    rest again, at a tenth of the cost (`activation_budget`). With --gradient_checkpointing it is so in any case.
    """
    return not args.compile if args.gradient_checkpointing is None else args.gradient_checkpointing


def activation_budget(args: argparse.Namespace) -> float:
    """The part of its activations that a compiled layer keeps for the backward pass, above 0 and at most 1. A choice that
    is left to the run, and not made by now, is all."""
    partial = args.compile and not whole_layers(args) and args.activation_budget != AUTO
    return args.activation_budget if partial else 1.0


def compile_layers(model: nn.Module, budget: float = 1.0, backend: str | Callable = "inductor") -> None:
    """Compile each layer's forward: the layers share one graph for all row lengths, and checkpointing stays outside.

    budget: of activations kept, relative to what the compiler would keep by itself; 0.8 computes norms and products of
    the MLP again, almost for free, and below about 0.6 matrix products too. One for the process: torch has it so.
    """
    torch._functorch.config.activation_memory_budget = budget
    torch._functorch.config.joint_custom_pass = keep_attention if budget < 1 else None
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def keep_attention(joint: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
    """Have attention's output kept whatever the budget: 2 bytes a number, and dear to compute again.

    The partitioner knows that of a few of torch's operators. FlexAttention, `varlen_attn` and those of packages look to it
    as if they were free, and of a package's dropout it does not know that it draws noise, which would be other noise.
    """
    for node in joint.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and any(part in name for part in ATTENTION) and "backward" not in name:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return joint


def graphs_compiled() -> int:
    """That this process has compiled so far: one for all layers, and one for each time that a row did not fit it."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
