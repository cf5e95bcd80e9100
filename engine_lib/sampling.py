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
    The nucleus is the smallest set of most probable tokens whose mass reaches top_p. Equal probabilities are ordered
    by token id, so that a draw depends on the row alone. Returns int64 [rows].
    """
    greedy = logits.argmax(dim=-1)
    if bool((temperatures == 0).all()):
        return greedy
    scale = torch.where(temperatures == 0, torch.ones_like(temperatures), temperatures)
    # Sorted for every row, also where top_p is 1: a row must not be drawn otherwise beside one that needs the order.
    logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probs = torch.softmax(logits.double() / scale[:, None], dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    probs = torch.where(mass_before < top_ps[:, None], probs, torch.zeros_like(probs))
    cumulative = probs.cumsum(dim=-1)
    # Scaled to the kept mass, and below it even after rounding, so that no token of probability zero is drawn.
    total = cumulative[:, -1]
    drawn = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, drawn[:, None], right=True)
    token = order.gather(1, index).squeeze(1)
    return torch.where(temperatures == 0, greedy, token)
