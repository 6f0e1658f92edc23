"""Lloyd's iterations on the device of the rows, repeatable there; `utils.evaluation.clustering.kmeans` is what to call.

No sum depends on timing: sums per cluster are products with a one-hot matrix (`index_add_` on CUDA adds in any order).
"""

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_ELEMENTS = 2**24  # of the largest temporary, 64 MiB in float32


def best_of_starts(x: Tensor, num_clusters: int, *, seed: int, num_init: int, max_iter: int) -> Tensor:
    """Run Euclidean k-means from several k-means++ starts and keep the one of lowest inertia.

    scikit-learn draws the starts, on the CPU and from a copy of the rows, so every device has the same ones; results on two
    devices may still differ where rounding decides.

    Args, Raises: as `utils.evaluation.clustering.kmeans`; of starts with equal inertia, the first is kept.
    Returns:
        Centroids (K, D) float32 on the device of `x`.
    """
    if num_init < 1:
        raise ValueError(f"num_init must be at least 1, got {num_init}")
    state = np.random.RandomState(seed % 2**32)  # it takes 32 bits
    host = (x - x.mean(dim=0)).cpu().numpy()
    best, lowest = None, None
    for _ in range(num_init):
        with threadpool_limits(limits=1):  # sums of several threads depend on timing
            _, chosen = kmeans_plusplus(host, num_clusters, random_state=state)
        centroids, assignments = lloyd(x, x[torch.from_numpy(chosen).to(x.device)], max_iter)
        inertia = _inertia(x, centroids, assignments)
        if lowest is None or inertia < lowest:
            best, lowest = centroids, inertia
    return best


def lloyd(x: Tensor, centroids: Tensor, max_iter: int, spherical: bool = False) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from given centres; a cluster that runs empty keeps its centre, so its id keeps its meaning.

    Args:
        x: (N, D) float32 rows, of unit norm if `spherical`.
        centroids: (K, D) float32 on the same device; not changed.
        max_iter: most updates of the centres; fewer if no row changes its cluster. 0 only assigns the rows.
        spherical: centres are scaled to unit norm, at the start and after every update.
    Returns:
        Centroids (K, D) float32 and the nearest one of each row (N,) int64, of equally near ones the lower; both on the
        device of `x`. The size of the chunks changes them by rounding alone.
    """
    centroids = normalize(centroids, dim=1) if spherical else centroids.clone()
    origin = x.mean(dim=0)  # distances from here: far from zero, squares of coordinates would drown them
    assignments, sums, counts = _pass(x, origin, centroids)
    for _ in range(max_iter):
        means = (origin + sums / counts.clamp(min=1)).to(x.dtype)  # (K, D)
        means = torch.where(counts > 0, means, centroids)
        centroids = normalize(means, dim=1) if spherical else means
        previous = assignments
        assignments, sums, counts = _pass(x, origin, centroids)
        if torch.equal(previous, assignments):
            break
    return centroids, assignments


def _pass(x: Tensor, origin: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One reading of all rows: nearest centroids (N,), and per cluster the sum of (row - origin) (K, D) and the count (K, 1)."""
    shifted = centroids - origin
    norms, ids = shifted.square().sum(dim=1), torch.arange(len(centroids), device=x.device)
    sums, counts = x.new_zeros(centroids.shape, dtype=torch.float64), x.new_zeros(len(ids), 1, dtype=torch.float64)
    assignments = []
    for chunk in x.split(_rows_per_chunk(centroids)):
        rows = chunk - origin
        nearest = torch.addmm(norms, rows, shifted.T, alpha=-2).argmin(dim=1)  # squared distance less |row|^2
        members = (nearest == ids.unsqueeze(1)).to(x.dtype)  # (K, rows of the chunk)
        sums += members @ rows
        counts += members.sum(dim=1, keepdim=True)
        assignments.append(nearest)
    return torch.cat(assignments), sums, counts


def _inertia(x: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Sum of the squared distances of the rows to their centroids, a float64 scalar."""
    size = _rows_per_chunk(centroids)
    parts = zip(x.split(size), assignments.split(size))
    return sum((rows - centroids[ids]).square().sum(dtype=torch.float64) for rows, ids in parts)


def _rows_per_chunk(centroids: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(centroids.shape))
