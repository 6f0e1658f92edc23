"""k-means over embeddings or memory banks, and label-based scores of an assignment (diagnostics, never training)."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from threadpoolctl import threadpool_limits
from torch import Tensor

from utils.evaluation.device_kmeans import best_of_starts, lloyd

Array = Tensor | np.ndarray
MAX_ITERATIONS = 100


def _check_rows(x: Tensor, num_clusters: int, init: Tensor | None, spherical: bool) -> None:
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"k-means needs a non-empty (N, D) tensor, got shape {tuple(x.shape)}")
    if num_clusters < 1 or num_clusters > len(x):
        raise ValueError(f"num_clusters must be in [1, N], got num_clusters = {num_clusters} for N = {len(x)} rows")
    bad = (~torch.linalg.vector_norm(x, torch.inf, dim=1).isfinite()).nonzero()  # isfinite of x itself makes a copy of it
    if len(bad):
        raise ValueError(f"k-means needs finite rows, {len(bad)} of {len(x)} are not, first at row {int(bad[0])}")
    if init is not None and init.shape != (num_clusters, x.shape[1]):
        raise ValueError(f"init must have shape {(num_clusters, x.shape[1])}, got {tuple(init.shape)}")
    norms = x.norm(dim=1)
    if spherical and (norms - 1).abs().max() > 1e-3:
        raise ValueError(f"spherical k-means needs unit rows, norms span {norms.min():.4g} to {norms.max():.4g}")


def kmeans(
    x: Tensor, num_clusters: int, *, init: Tensor | None = None, seed: int = 0, num_init: int = 10, spherical: bool = False
) -> tuple[Tensor, Tensor]:
    """Cluster rows by k-means, deterministic for a seed.

    Without `init`, k-means++ with `num_init` starts: scikit-learn's for rows on the CPU, on one thread because its
    multi-threaded sums depend on timing; for other rows its starts and the iterations of `utils.evaluation.device_kmeans`, so
    the two agree on the clustering, not bit for bit. With `init`, Lloyd's iterations go on from there, and a cluster without rows
    keeps its centre (scikit-learn would move it to an outlier, which unties the ids from their origin).

    Args:
        x: (N, D) floating-point tensor on any device.
        num_clusters: K, at most N.
        init: (K, D) starting centres, or None.
        seed: of the k-means++ starts, any integer.
        num_init: number of starts without `init`; the one of lowest inertia is kept.
        spherical: rows must have unit norm; centres then are unit directions and rows go to the largest cosine.
    Returns:
        Centroids (K, D) float32 and assignments (N,) int64, both on the device of `x`.
    Raises:
        ValueError: on a wrong shape, K > N, num_init < 1, non-finite rows, or rows that are not unit with `spherical`.
    """
    rows = x.detach().to(torch.float32)
    start = None if init is None else init.detach().to(rows)
    _check_rows(rows, num_clusters, start, spherical)
    if start is None:
        search = _scikit_learn if rows.device.type == "cpu" else best_of_starts
        start = search(rows, num_clusters, seed=seed, num_init=num_init, max_iter=MAX_ITERATIONS)
    through = init is None and not spherical  # Euclidean k-means is; only the ids are recomputed
    return lloyd(rows, start, 0 if through else MAX_ITERATIONS, spherical)


def _scikit_learn(x: Tensor, num_clusters: int, *, seed: int, num_init: int, max_iter: int) -> Tensor:
    """Centroids (K, D) of the best of `num_init` starts."""
    model = KMeans(num_clusters, n_init=num_init, max_iter=max_iter, random_state=seed % 2**32)  # scikit-learn takes 32 bits
    with threadpool_limits(limits=1):
        model.fit(x.numpy())
    return torch.from_numpy(model.cluster_centers_)


def joint_then_per_modality(banks: Sequence[Tensor], num_clusters: int, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cluster the unit rows (N, D) of all modalities together, then each one from the joint centres (RoMo, Sec. III-C).

    Returns:
        Joint centroids (K, D); M per-modality centroids (K, D) and M assignments (N,) whose ids mean the same cluster.
    """
    joint, _ = kmeans(torch.cat(list(banks)), num_clusters, seed=seed, spherical=True)
    results = [kmeans(bank, num_clusters, init=joint, spherical=True) for bank in banks]
    for position, (_, assignments) in enumerate(results):
        empty = num_clusters - len(assignments.unique())
        if empty:
            warnings.warn(f"bank {position}: {empty} of {num_clusters} joint clusters hold none of its rows", stacklevel=2)
    return joint, [centroids for centroids, _ in results], [assignments for _, assignments in results]


def _label_pairs(assignments: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
    pair = tuple(np.asarray(values.cpu() if isinstance(values, Tensor) else values) for values in (assignments, labels))
    for name, values in zip(("assignments", "labels"), pair):
        if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
            raise ValueError(f"{name} must be a non-empty (N,) integer array, got shape {values.shape} of {values.dtype}")
    return pair  # the scores refuse different lengths


def clustering_accuracy(assignments: Array, labels: Array) -> float:
    """Fraction of samples explained by the best one-to-one map of clusters to classes (Hungarian method).

    With more clusters than classes the clusters left over count as errors; see `purity` for the many-to-one score.

    Args:
        assignments: (N,) integer cluster ids; labels: (N,) integer classes; any values. Alike in the scores below.
    """
    table = contingency_matrix(*_label_pairs(assignments, labels))
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum())


def purity(assignments: Array, labels: Array) -> float:
    """Fraction of samples whose class is the most frequent one of their cluster; grows with the number of clusters."""
    table = contingency_matrix(*_label_pairs(assignments, labels))
    return float(table.max(axis=1).sum() / table.sum())


def nmi(assignments: Array, labels: Array) -> float:
    """Normalised mutual information in [0, 1] (arithmetic mean of the entropies)."""
    return float(normalized_mutual_info_score(*_label_pairs(assignments, labels)))
