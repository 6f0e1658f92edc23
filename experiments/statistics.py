"""Mean, spread and confidence intervals over seeds, and paired comparisons of two rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

LEVEL = 0.95
MIN_PAIRS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, their standard deviation (n - 1), and the confidence interval of the mean; None below n = 2."""

    n: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A paired difference; verdict: "n/a" (fewer than 3 seeds in common), "within noise", "better" or "worse"."""

    n: int
    verdict: str
    difference: Estimate | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, standard deviation and the 95 % interval of Student's t of independent values, at least one."""
    if len(values) == 1:
        return Estimate(1, values[0])
    center, spread = mean(values), stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return Estimate(len(values), center, spread, center - half, center + half)


def compare(ours: Mapping[int, float], others: Mapping[int, float]) -> Comparison:
    """Compare two rows (seed -> score) on the seeds that both have, seed by seed; the difference is ours - others.

    An interval that contains 0 is "within noise", whatever the sign of the mean.
    """
    shared = sorted(ours.keys() & others.keys())
    if len(shared) < MIN_PAIRS:
        return Comparison(len(shared), "n/a")
    difference = estimate([ours[seed] - others[seed] for seed in shared])
    verdict = "within noise" if difference.low <= 0 <= difference.high else "better" if difference.mean > 0 else "worse"
    return Comparison(len(shared), verdict, difference)
