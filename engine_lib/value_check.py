"""Does a served value model give this checkpoint's values? Asked at the start of a run, before anything is searched.

SGLang only logs that a model package failed to load, and then serves another class of its own, whose numbers look like
values; and a server may serve another checkpoint. So a known sequence is scored, and its values are held against those
of a plain forward pass of classifier_lib's model, where its weights are at hand.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from common_lib.cli import UserError
from engine_lib.base import first_line
from engine_lib.value_base import NoValue, ValueConfig, ValueEngine

logger = logging.getLogger(__name__)

ENDS = (1, 7, 16, 24)  # tokens of the known sequence's prefixes that are scored: several, one may be right by chance
# Ids that every vocabulary has: one outside a *server's* vocabulary would kill it, and that one may be the wrong one.
KNOWN_IDS = 128
# Most that a right value may be off. fp32: rounding is 1e-6 on a CPU, but a GPU's attention kernels may multiply in TF32,
# whose mantissa is 8 times as fine as bf16's. bf16 here: 0.003 off fp32 by SGLang, 0.006 by transformers, of a tiny model.
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}


def known_traces(vocab_size: int) -> list[list[int]]:
    """What every value model can be asked: prefixes of one sequence, the longest last."""
    ids = [(37 * i + 11) % min(vocab_size, KNOWN_IDS) for i in range(max(ENDS))]
    return [ids[:end] for end in ENDS]


async def check_values(engine: ValueEngine, config: ValueConfig) -> None:
    """Hold an engine's values of the known sequence against the checkpoint's own; says what was held against what.

    Raises EngineError or UserError, each one line, where they are not those of `config.model_path`.
    """
    traces = known_traces(config.vocab_size)
    try:
        valued = await engine.values(traces, "")
    except NoValue as error:  # the same command would find the same again
        raise UserError(first_line(error)) from error
    for trace, one in zip(traces, valued, strict=True):
        if not (0 <= one.value <= 1 and one.tokens_computed >= 1):
            raise UserError(
                f"the value engine answers {one.value} and {one.tokens_computed} tokens computed for a trace of {len(trace)}: "
                "it serves no value model of this project, or engine_lib.sglang_value_model failed to load there"
            )
    if not has_weights(config.model_path):
        logger.warning(
            "value model: no weights in %s, so its served values cannot be held against it: only you know that they are its",
            config.model_path,
        )
        return
    begin = time.monotonic()
    local = local_values(config.model_path, traces[-1], ENDS)
    off = max(abs(one.value - value) for one, value in zip(valued, local, strict=True))
    bound = TOLERANCE[config.dtype]
    if not off <= bound:
        raise UserError(
            f"the served value model gives {valued[-1].value:.6f} for a known sequence, and {config.model_path} gives "
            f"{local[-1]:.6f} (off by {off:.2g}; {bound:g} is rounding in {config.dtype}): another value model is "
            "served, or engine_lib.sglang_value_model failed to load there"
        )
    logger.info(
        "value model: %d served values (%s) of a known sequence are within %.1g of a forward pass of %s in fp32 on the CPU "
        "(%.1f s)", len(traces), config.dtype, off, config.model_path, time.monotonic() - begin,
    )  # fmt: skip


def has_weights(model_path: str) -> bool:
    return any(next(Path(model_path).glob(kind), None) for kind in ("*.safetensors", "pytorch_model*.bin"))


def local_values(model_path: str, ids: Sequence[int], ends: Sequence[int]) -> list[float]:
    """Values at the last tokens of prefixes of so many tokens, by a plain forward pass in float32 on the CPU.

    For a moment that takes 4 bytes a parameter beside the file's own: 9 GB and 7 s at 1.5B, measured on two cores.
    """
    import torch

    from classifier_lib import Qwen2ForClassifier

    with torch.inference_mode():
        model = Qwen2ForClassifier.from_pretrained(model_path, dtype=torch.float32, attn_implementation="sdpa").eval()
        values = model(torch.tensor([list(ids)]), use_cache=False).success_probs[0]
    return [values[end - 1].item() for end in ends]
