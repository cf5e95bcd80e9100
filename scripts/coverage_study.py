"""How often do the 95 % intervals cover the truth, and how often does the paired test reject two equal runs?

    python scripts/coverage_study.py                       # 5,000 simulated runs of 30 problems x 16 repetitions each
    python scripts/coverage_study.py --simulations 500

Each problem has a success rate drawn from a Beta distribution. Each repetition gives one answer: the right one with
that rate, else one of two wrong ones; and a value, Beta(3, 2) if right, Beta(2, 3) if wrong. The truth is the mean over
the population of problems (here 100,000). Two kinds of interval: clustered by problem, and as released: from repeat noise
only, or with * between problems, where all repetitions are pooled. "warned": the share of runs that come with a warning
that few problems carry the variance.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_lib.intervals import Floats, clustered_interval, paired_test, repeat_noise_half_width, variance_warning
from eval_lib.tables import Table, as_text, number
from eval_lib.votes import pooled_votes

GATED = [(2.0, 2.0), (0.5, 0.5), (0.3, 0.5)]
UNGATED = [(0.1, 0.9), (0.05, 0.02)]  # so skewed that 30 problems cannot tell
POOLED = (1, 4, 16)
WRONG_ANSWERS = 2
TRUTH_PROBLEMS = 100_000


def simulate(rng: np.random.Generator, rates: Floats, repetitions: int) -> dict[str, dict[int, Floats]]:
    """Runs of problems with these success rates [...]: statistic -> pooled repetitions -> scores [..., windows]."""
    right = rng.random((*rates.shape, repetitions)) < rates[..., None]
    answer = np.where(right, 0, rng.integers(1, 1 + WRONG_ANSWERS, right.shape))
    value = np.where(right, rng.beta(3, 2, right.shape), rng.beta(2, 3, right.shape))
    votes = (answer[..., None] == np.arange(1 + WRONG_ANSWERS)).astype(np.float64)
    truth = np.array([1.0] + [0.0] * WRONG_ANSWERS)
    weights = votes * value[..., None]
    sizes = [m for m in POOLED if m <= repetitions]
    by_count = pooled_votes(votes, votes * truth, sizes)
    by_value = pooled_votes(weights, weights * truth, sizes)
    return {
        "mean": {1: right.astype(np.float64)},
        "majority": dict(zip(sizes, by_count, strict=True)),
        "weighted": dict(zip(sizes, by_value, strict=True)),
    }


def study(alpha: float, beta: float, simulations: int, problems: int, seed: int) -> list[list[float | str]]:
    """Rows: statistic, pooled, truth, cover of the clustered interval, of the released one, share warned."""
    rng, repetitions = np.random.default_rng([seed, int(alpha * 1000), int(beta * 1000)]), max(POOLED)
    means: dict[tuple[str, int], list[float]] = {}
    for _ in range(TRUTH_PROBLEMS // 5000):
        for name, by_size in simulate(rng, rng.beta(alpha, beta, 5000), repetitions).items():
            for m, scores in by_size.items():
                means.setdefault((name, m), []).append(float(scores.mean()))
    truth = {key: float(np.mean(parts)) for key, parts in means.items()}
    counts = {key: np.zeros(3) for key in truth}
    rejected = 0
    for chunk in np.array_split(np.arange(simulations), max(1, simulations // 250)):
        rates = rng.beta(alpha, beta, (len(chunk), problems))
        run = simulate(rng, rates, repetitions)
        for name, m in truth:
            scores = run[name][m]  # [runs, problems, windows]
            mean, half = clustered_interval(scores.mean(-1))
            disjoint = scores[..., : repetitions // m * m : m].swapaxes(-1, -2)
            noise = repeat_noise_half_width(disjoint)
            distance = abs(mean - truth[name, m])
            warned = sum(variance_warning(values) is not None for values in scores.mean(-1))
            counts[name, m] += (distance <= half).sum(), (distance <= noise).sum(), warned
        other = simulate(rng, rates, repetitions)["mean"][1]
        rejected += int((paired_test((run["mean"][1] - other).mean(-1))[2] < 0.05).sum())
    rows: list[list[float | str]] = []
    for (name, m), (clustered, noise_only, warned_of) in counts.items():
        rows.append([name, m, truth[name, m], *(x / simulations for x in (clustered, noise_only, warned_of))])
    return [*rows, ["paired test rejects", 1, 0.05, rejected / simulations, math.nan, math.nan]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 where a gated figure is outside its band."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=5000)
    parser.add_argument("--problems", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    start, rows = time.monotonic(), []
    for alpha, beta in GATED + UNGATED:
        for name, m, truth, share, *others in study(alpha, beta, args.simulations, args.problems, args.seed):
            low, high = (0.035, 0.06) if str(name).startswith("paired") else (0.93, 0.97)
            outside = (alpha, beta) in GATED and not low <= float(share) <= high
            shares = [number(float(x), ".1%") for x in (share, *others)]
            shares[1] += "*" * (m == max(POOLED))
            verdict = "outside" if outside else ""
            rows.append([f"Beta({alpha:g},{beta:g})", str(name), str(m), number(float(truth)), *shares, verdict])
    columns = ["rates", "statistic", "pooled", "truth", "by problem", "as released", "warned", "band"]
    size = f"{args.simulations:,} runs of {args.problems} problems x {max(POOLED)} repetitions; 95 % intervals"
    outside = sum(row[-1] != "" for row in rows)
    band = f"{outside} gated figures outside 93-97 % (paired test: 3.5-6 %); {time.monotonic() - start:.0f} s"
    print(as_text(Table(size, columns, rows, [band], words=["rates", "statistic", "band"])))
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
