"""What numbers a run computes in, and whether its states are sharded: settled from the flags and the device."""

import argparse
import logging
from dataclasses import dataclass

from training_lib.arguments import AUTO

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """fp32 parameters that are cast to bf16 for the matrix products: by FSDP, or under autocast.

    FSDP casts a layer's parameters as it gathers them, so that what runs from layer to layer is bf16 too; under autocast
    that stays fp32, twice the memory.
    """

    fsdp: bool
    half: bool  # bf16 products are wanted
    bf16_parameters: bool = False

    @property
    def autocast(self) -> bool:
        return self.half and not self.fsdp

    @property
    def half_attention(self) -> bool:
        """Whether the attention kernel gets bf16."""
        return self.half or self.bf16_parameters

    @property
    def half_residual(self) -> bool:
        """Whether what runs from layer to layer is bf16."""
        return self.bf16_parameters or (self.half and self.fsdp)

    def __str__(self) -> str:
        how = " by FSDP" if self.fsdp and self.half else " by autocast" if self.autocast else ""
        return f"{'FSDP' if self.fsdp else 'DDP'}, {'bf16' if self.half_attention else 'fp32'}{how}"


def wants_half(args: argparse.Namespace, device: str) -> bool:
    """device: cpu or cuda. Without a flag bf16 is for GPUs."""
    return device == "cuda" if args.autocast is None else args.autocast


def settle_precision(args: argparse.Namespace, device: str) -> Precision:
    """Fill in `fsdp` where it is left to the run: on with a GPU, also where it is alone. device: cpu or cuda.

    One GPU has nothing to shard, but gets the bf16 from layer to layer. A CPU gains nothing.
    """
    if args.fsdp == AUTO:
        args.fsdp = "on" if device == "cuda" else "off"
    found = Precision(args.fsdp == "on", wants_half(args, device), args.param_dtype == "bf16")
    if args.autocast and found.fsdp:
        asked = "has no effect with FSDP, which" if device == "cuda" else "is FSDP's own here, which"
        logger.info("--autocast %s casts parameters to bf16 by itself", asked)
    return found
