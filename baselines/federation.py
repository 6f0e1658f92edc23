"""What a federated method needs beside its losses: a split of the rows among clients and the mean of their weights."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

DIRICHLET = 0.1  # concentration: most of a label's samples go to one or two clients


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts; counters of integers are the first one's."""
    total = sum(weights)
    mean = dict(states[0])
    for name in [name for name, value in mean.items() if value.is_floating_point()]:
        mean[name] = sum(state[name] * (weight / total) for state, weight in zip(states, weights, strict=True))
    return mean


def split(labels: np.ndarray, clients: int, seed: int) -> list[np.ndarray]:
    """Return the sample numbers of each client: of every label's samples, shares drawn from a Dirichlet distribution."""
    draw = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        cuts = (draw.dirichlet([DIRICHLET] * clients).cumsum()[:-1] * len(members)).round().astype(int)
        for part, chosen in zip(parts, np.split(members, cuts), strict=True):
            part.append(chosen)
    return [np.concatenate(part) for part in parts]
