"""Sampling in which every row draws from noise of its own."""

import numpy as np
import torch


def row_uniforms(seeds, step: int):
    """One number in [0, 1) for each seed at this step: a function of (seed, step) and nothing else.

    seeds: uint64 [rows] (numpy). Returns float64 [rows]. Two rounds of the SplitMix64 finalizer (Steele, Lea and Flood
    2014, "Fast splittable pseudorandom number generators") as a counter-based generator.
    """

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = mix(mix(seeds.astype(np.uint64) + golden) + golden * np.uint64(step + 1))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_rows(logits, temperatures, top_ps, uniforms):
    """One token a row by inverse-transform sampling from the nucleus (Holtzman et al. 2020, arXiv 1904.09751).

    logits: float [rows, vocab]. temperatures (0: greedy), top_ps, uniforms: float64 [rows] on the logits' device.
    The nucleus is the smallest set of most probable tokens whose mass reaches top_p, of equal ones those of lower ids.
    It is drawn from in the order of ids, not of probabilities: near-equal logits, which rounding swaps from one batch
    to another, do not move the draw. Returns int64 [rows].
    """
    greedy = logits.argmax(dim=-1)
    if bool((temperatures == 0).all()):
        return greedy
    scale = torch.where(temperatures == 0, torch.ones_like(temperatures), temperatures)
    probs = torch.softmax(logits.double() / scale[:, None], dim=-1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    ranked = probs.gather(1, order)
    mass_before = ranked.cumsum(dim=-1) - ranked
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, order, mass_before < top_ps[:, None])
    cumulative = torch.where(kept, probs, torch.zeros_like(probs)).cumsum(dim=-1)
    # Scaled to the kept mass, and below it even after rounding, so that no token outside the nucleus is drawn.
    total = torch.where(kept, cumulative, torch.zeros_like(probs)).amax(dim=-1)
    drawn = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    token = (kept & (cumulative > drawn[:, None])).int().argmax(dim=-1)  # the first
    return torch.where(temperatures == 0, greedy, token)
