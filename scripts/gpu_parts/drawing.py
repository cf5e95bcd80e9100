"""What `--seeded` costs an engine's step: drawing a token for each row, beside taking the largest."""

import numpy as np
import torch

from engine_lib.sampling import only_drawn
from gpu_parts.models import SHAPES, timed
from gpu_parts.report import Report

TABLE = "drawing a token a row (--seeded)"
ROWS, VOCAB = {"tiny": 8, "small": 16, "full": 256}, {"tiny": 4096, "small": 4096, "full": SHAPES["full"]["vocab_size"]}
# Spreads of normal logits. Peaked: the 1024 most probable tokens hold the nucleus of 0.95; flat: they do not, and all
# are sorted, which is rare in a model that was trained.
PEAKED, FLAT = 8.0, 1.0
REPEATS = 10


def drawing(report: Report) -> None:
    """Milliseconds a step at temperature 1 and top_p 0.95, in bfloat16 on a GPU."""
    rows, vocab, device = ROWS[report.size], VOCAB[report.size], report.device
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(rows, vocab, generator=generator, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    seeds, steps = np.arange(rows, dtype=np.uint64), np.arange(rows)
    temperatures, top_ps = (torch.full((rows,), value, dtype=torch.float64, device=device) for value in (1.0, 0.95))

    def draw(logits: torch.Tensor) -> torch.Tensor:
        return only_drawn(logits, seeds, steps, temperatures, top_ps)

    case = f"{rows} rows of {vocab} logits, {str(dtype).removeprefix('torch.')}"
    for name, work, spread in (
        ("argmax alone", lambda logits: logits.argmax(dim=-1), PEAKED),
        ("from the shortlist", draw, PEAKED),
        ("where all are sorted", draw, FLAT),
    ):
        logits = (spread * normal).to(dtype)
        work(logits)  # warm-up
        seconds, _ = timed(device, lambda work=work, logits=logits: [work(logits) for _ in range(REPEATS)])
        report.figure(TABLE, name, 1000 * seconds / REPEATS, "ms", case=case)
