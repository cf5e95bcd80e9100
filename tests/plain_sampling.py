"""Sampling as it is meant, in numpy and whole numbers, one token at a time."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Reference: add tokens from the most probable one on until their mass reaches top_p; of equal ones the first."""
    kept, mass = np.zeros_like(probs), 0.0
    for i in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if mass >= top_p:
            break
        kept[i] = probs[i]
        mass += probs[i]
    return kept / kept.sum()


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def draw(logits: np.ndarray, temperature: float, top_p: float, uniform: float) -> int:
    """Reference: greedy at 0, else the first token in the order of ids at which the nucleus' mass exceeds the number."""
    if temperature == 0:
        return int(np.argmax(logits))
    mass = 0.0
    for token, probability in enumerate(nucleus(probabilities(logits, temperature), top_p)):
        mass += probability
        if mass > uniform:
            return token
    raise AssertionError("the number is not below 1")


def splitmix(x: int) -> int:
    """The finalizer of SplitMix64, in whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def uniform(seed: int, step: int) -> float:
    """The number that a request of this seed draws its token number `step` by."""
    return (splitmix((splitmix((seed + GOLDEN) % 2**64) + GOLDEN * (step + 1)) % 2**64) >> 11) / 2**53
