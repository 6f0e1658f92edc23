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
    """A mean over n values, their standard deviation (n - 1), and the confidence interval of the mean; None where n is too small."""

    n: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """Of differences: "n/a", "better", "worse", or "within noise" if the interval holds 0, whatever the sign of the mean."""
        if self.low is None:
            return "n/a"
        return "within noise" if self.low <= 0 <= self.high else "better" if self.mean > 0 else "worse"


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, standard deviation and the 95 % interval of Student's t of independent values, at least one."""
    if len(values) == 1:
        return Estimate(1, values[0])
    center, spread = mean(values), stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return Estimate(len(values), center, spread, center - half, center + half)


def compare(ours: Mapping[int, float], others: Mapping[int, float]) -> Estimate:
    """Estimate ours - others, seed by seed, on the seeds that both rows (seed -> score) have; fewer than 3 give n alone."""
    shared = sorted(ours.keys() & others.keys())
    return estimate([ours[seed] - others[seed] for seed in shared]) if len(shared) >= MIN_PAIRS else Estimate(len(shared))
