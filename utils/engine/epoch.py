"""One epoch of either stage: the loop over its batches, and its learning rate."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from utils.engine import distributed
from utils.errors import UserError


def run_batches(
    batches: Iterable[Any], step: Callable[[Any], Mapping[str, Tensor]], *, title: str, log_interval: int
) -> dict[str, float]:
    """Run one optimisation step per batch and return the mean of every detached scalar that the steps return.

    Sums stay on the device; they are read back once per `log_interval` steps, for the progress bar and the check that
    every component is finite.

    Args:
        title: for the progress bar and errors, e.g. "step1 epoch 3".
    Raises:
        UserError: if there is no batch, or a component is not finite.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    with tqdm(batches, desc=title, leave=False, disable=not (sys.stderr.isatty() and distributed.is_main())) as progress:
        for batch in progress:
            for key, value in step(batch).items():
                totals[key] = totals[key] + value if key in totals else value
            count += 1
            if count % log_interval == 0:
                progress.set_postfix({key: f"{value:.4f}" for key, value in _means(totals, count, title).items()})
    if count == 0:
        raise UserError(f"{title}: no batch to train on; lower optim.batch_size or add samples")
    return _means(totals, count, title)


def _means(totals: Mapping[str, Tensor], count: int, title: str) -> dict[str, float]:
    means = {key: float(value) / count for key, value in totals.items()}
    if not all(math.isfinite(value) for value in means.values()):
        raise UserError(
            f"{title}, step {count}: a loss is not finite, means so far {means}; the last checkpoint is from the epoch "
            "before. Lower optim.learning_rate or check the data"
        )
    return means


def learning_rate(config: Any, epoch: int) -> float:
    """Return the rate of an epoch (1-based): constant, or a half cosine from the initial rate towards zero."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / config.epochs))
