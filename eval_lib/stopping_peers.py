"""Published stops that promise nothing of the kind that stopping.py does, to be compared with it. No torch.

Both count answers, each for itself, and look at no values. Adaptive-Consistency (Aggarwal et al. 2023, arXiv 2305.11860) stops
where its Beta posterior of the two most frequent answers is at least POSTERIOR, ESC (Li et al. 2024, arXiv 2401.10480) where a
window of WINDOW repetitions has one answer.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

POSTERIOR = 0.95
WINDOW = 5


@lru_cache(maxsize=100_000)
def lead_posterior(first: int, second: int) -> float:
    """P(p > 1/2) for p of Beta(first + 1, second + 1), first and second being how often the two most frequent answers came:
    that of at most `first` heads in first + second + 1 tosses."""
    tosses = first + second + 1
    return sum(math.comb(tosses, heads) for heads in range(first + 1)) / 2**tosses


def posterior_needs(most: int, level: float = POSTERIOR) -> NDArray[np.int64]:
    """The least `first` with `lead_posterior` >= level, by first + second: int64 [most + 1]. For thousands of answers at
    once, so in logarithms."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 2)))])  # of factorials
    needs = np.zeros(most + 1, dtype=np.int64)
    for both in range(most + 1):
        tosses, heads = both + 1, np.arange(both + 2)
        chances = np.exp(logs[tosses] - logs[heads] - logs[tosses - heads] - tosses * math.log(2))
        needs[both] = np.searchsorted(np.cumsum(chances), level)
    return needs
