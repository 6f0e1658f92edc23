"""Joins two sets of which no member is paired, by their clusters: many clusterings of each, matched one by one, and their consensus.

For `baselines.unpaired`. Nothing here reads a label. All arrays are float64, sets are called first and second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import softmax

from baselines.cca import unit_rows
from utils.errors import UserError
from utils.evaluation.clustering import kmeans

AXES = 32  # of the space that a set is clustered in
SOFTNESS = 0.1  # temperature of cosines, of members with clusters and of clusters with each other
STRUCTURE = 0.5  # weight of the clusters' own distances in the fused Gromov-Wasserstein cost
SHARPNESS = 4  # exponent of the consensus that makes targets of it
RIDGE = 0.3  # of the linear map between two rounds, in mean squared lengths of its input
JUDGED = 400  # members of each set that the agreement is measured on


def standardise(rows: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Scale rows (N, D) by mean and standard deviation of the set `of` (M, D), then to unit norm."""
    return unit_rows((rows - of.mean(axis=0)) / (of.std(axis=0) + 1e-6))


def shared_axes(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    """Return (D, count): principal axes of two sets of unit rows that weigh the same, each divided by the root of its deviation.

    What both sets vary in most is mainly how they differ as sets; halving the exponents of the spectrum lets the rest be heard.
    """
    spread = sum(rows.T @ rows / len(rows) for rows in (first, second)) / 2
    values, axes = np.linalg.eigh(spread)
    return axes[:, ::-1][:, :count] / values[::-1][:count].clip(1e-12) ** 0.25


@dataclass(frozen=True)
class Codes:
    """What is found of one set: rows of its training members (N, S), and of others (M, S)."""

    train: np.ndarray
    test: np.ndarray


def soft_clusters(train: np.ndarray, test: np.ndarray, num_clusters: int, seed: int) -> Codes:
    """Cluster unit rows (N, D) of a training set on their own axes; others (M, D) are told their clusters.

    Returns:
        Soft memberships in the K clusters; rows sum to 1.
    """
    axes = shared_axes(train - train.mean(axis=0), train - train.mean(axis=0), min(AXES, *train.shape))
    places = [unit_rows((rows - train.mean(axis=0)) @ axes) for rows in (train, test)]
    centroids = unit_rows(kmeans(torch.from_numpy(places[0]), num_clusters, seed=seed, num_init=1)[0].double().numpy())
    return Codes(*(softmax(rows @ centroids.T / SOFTNESS, axis=1) for rows in places))


def centroids_of(clustering: Codes, rows: np.ndarray) -> np.ndarray:
    """Return the unit centroids (K, D) of the training members' rows (N, D) about the mean centroid: large clusters count as small ones."""
    weights = clustering.train**2
    found = unit_rows((weights / weights.sum(axis=0).clip(1e-12)).T @ rows)
    return unit_rows(found - found.mean(axis=0))


def match_clusters(first: np.ndarray, second: np.ndarray, how: str) -> np.ndarray:
    """Match unit centroids (K, D) of two sets.

    Args:
        how: "soft", the mean of two softmaxes of the cosines, over the second clusters and over the first ones, so that a kind
            with many clusters in one set may share the few of the other; "hungarian", one to one by cosine, which is optimal
            transport between equal weights; or "gromov", fused Gromov-Wasserstein: pairs of matched clusters should also be as
            far from each other in both sets (Vayer et al. 2019).
    Returns:
        (K, K), of sum K: how much of a first cluster goes to each second one.
    Raises:
        UserError: without POT, which "gromov" needs.
    """
    if how == "soft":
        return sum(softmax(first @ second.T / SOFTNESS, axis=axis) for axis in (0, 1)) / 2
    cost = 1 - first @ second.T
    if how == "hungarian":
        return np.eye(len(cost))[linear_sum_assignment(cost)[1]]
    try:
        import ot
    except ImportError as error:
        raise UserError("Gromov-Wasserstein needs POT: pip install -r requirements-baselines.txt") from error
    weights = np.full(len(cost), 1 / len(cost))
    inner = [1 - rows @ rows.T for rows in (first, second)]
    scaled = [matrix / matrix.mean() for matrix in (cost, *inner)]
    return ot.gromov.fused_gromov_wasserstein(*scaled, weights, weights, alpha=STRUCTURE) * len(cost)


def agree(
    first: Sequence[Codes], second: Sequence[Codes], spaces: Sequence[tuple[np.ndarray, np.ndarray]], how: str
) -> tuple[Codes, Codes]:
    """Match the k-th clusterings of both sets in every space, and join all matchings.

    Args:
        spaces: rows of the training members, (N, D) and (M, D), in which clusters of the two sets can be compared.
        how: as in `match_clusters`.
    Returns:
        The consensus: codes of both sets, whose dot product is the mean share of matched clusters.
    """
    matched = []
    for mine, other in zip(first, second, strict=True):
        for rows, other_rows in spaces:
            shares = match_clusters(centroids_of(mine, rows), centroids_of(other, other_rows), how)
            matched.append((mine.train @ shares, mine.test @ shares, other.train, other.test))
    train, test, *others = (np.concatenate(parts, axis=1) * len(matched) ** -0.5 for parts in zip(*matched))
    return Codes(train, test), Codes(*others)


def next_round(consensus: tuple[Codes, Codes], first: np.ndarray, spaces: Sequence[tuple[np.ndarray, np.ndarray]]) -> list:
    """Return the spaces with the first set mapped anew: a ridge regression towards the members of the second that it is matched with.

    Args:
        first: (N, D) unit rows of the first set's training members; spaces: those of the round before.
    """
    scores = consensus[0].train @ consensus[1].train.T  # (N, M)
    shares = scores**SHARPNESS / (scores**SHARPNESS).sum(axis=1, keepdims=True)
    inputs = np.concatenate([first, np.ones((len(first), 1))], axis=1)
    gram = inputs.T @ inputs / len(inputs)
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    mapped = lambda rows: unit_rows(inputs @ np.linalg.solve(gram, inputs.T @ unit_rows(shares @ rows) / len(inputs)))
    return [(unit_rows(before + mapped(rows)), rows) for before, rows in spaces]


def agreement(consensus: tuple[Codes, Codes], first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of a consensus with the dot products of other rows of its training members: a measure without labels.

    Args:
        first: (N, L) and second: (M, L), of which at most JUDGED each are compared, evenly spaced.
    """
    chosen = [np.linspace(0, len(side) - 1, min(JUDGED, len(side))).astype(int) for side in (first, second)]
    found = [codes.train for codes in consensus]
    scores = [(mine[chosen[0]] @ other[chosen[1]].T).ravel() for mine, other in (found, (first, second))]
    return float(np.corrcoef(*scores)[0, 1])
