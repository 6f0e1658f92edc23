"""Mean, spread and confidence intervals over seeds, and paired comparisons of two rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student

from utils.errors import UserError

LEVEL = 0.95
MIN_PAIRS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, their standard deviation (n - 1), and the confidence interval of the mean; None below n = 2."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """A paired difference; verdict: "n/a" (fewer than 3 seeds in common), "within noise", "better" or "worse"."""

    n: int
    verdict: str
    difference: Estimate | None


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return mean, standard deviation and the interval of Student's t of independent values.

    Raises:
        UserError: without values, or if one is not finite.
    """
    if not values or not all(map(math.isfinite, values)):
        raise UserError(f"expected finite values, at least one, found {list(values)}")
    if len(values) == 1:
        return Estimate(1, values[0], None, None, None)
    center, spread = mean(values), stdev(values)
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return Estimate(len(values), center, spread, center - half, center + half)


def compare(ours: Mapping[int, float], others: Mapping[int, float], level: float = LEVEL) -> Comparison:
    """Compare two rows on the seeds that both have, seed by seed.

    Args:
        ours, others: seed -> score.
        level: of the confidence interval of the mean difference.
    Returns:
        The difference ours - others. An interval that contains 0 is "within noise", whatever the sign of the mean.
    """
    shared = sorted(ours.keys() & others.keys())
    if len(shared) < MIN_PAIRS:
        return Comparison(len(shared), "n/a", None)
    difference = estimate([ours[seed] - others[seed] for seed in shared], level)
    if difference.low <= 0 <= difference.high:
        return Comparison(len(shared), "within noise", difference)
    return Comparison(len(shared), "better" if difference.mean > 0 else "worse", difference)
