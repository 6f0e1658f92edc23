"""Exact nearest neighbours without a distance tensor of the whole batch; called by `models/kernels/edge_conv.py`."""

import torch
from torch import Tensor

from models.kernels.neighbour_ops import operations

BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**26}  # of the distances at a time; near the cache of a CPU


@torch.no_grad()
def knn(x: Tensor, k: int) -> Tensor:
    """Exact nearest neighbours of every point inside its own cloud, itself included.

    Ranks by squared Euclidean distance from blocked matrix products, so that no (B, N, N) tensor lives. Clouds are
    centred first: the expansion |a|^2 + |b|^2 - 2ab would otherwise lose the distance of points far from the origin.

    Args:
        x: (B, N, C) float points or features; half precisions are ranked in float32.
        k: neighbours per point, 1 <= k <= N.
    Returns:
        (B, N, k) int64 indices into the N points of the same cloud, nearest first. Of neighbours at exactly equal
        distance the lower index comes first on a CPU with Numba; elsewhere their order and the choice at the k-th place are free.
    Raises:
        ValueError: if x is not (B, N, C) or k is outside 1..N.
    """
    if x.dim() != 3:
        raise ValueError(f"knn expects points of shape (B, N, C), found {tuple(x.shape)}")
    batch, points, _ = x.shape
    if not 1 <= k <= points:
        raise ValueError(f"knn needs 1 <= k <= N, found k = {k} with clouds of N = {points} points; lower k")
    x = x if x.dtype == torch.float64 else x.float()
    smallest = operations(x.device).smallest
    index = torch.empty(batch, points, k, dtype=torch.long, device=x.device)
    block = BLOCK_BYTES.get(x.device.type, BLOCK_BYTES["cuda"]) // x.element_size()
    rows, clouds = max(1, min(points, block // points)), max(1, block // points**2)
    with torch.autocast(x.device.type, enabled=False):
        for b in range(0, batch, clouds):
            centred = x[b:b + clouds] - x[b:b + clouds].mean(1, keepdim=True)
            norms = centred.square().sum(-1).unsqueeze(1)  # (b, 1, N); the query's own norm does not change its ranking
            for n in range(0, points, rows):
                distance = torch.baddbmm(norms, centred[:, n:n + rows], centred.transpose(1, 2), alpha=-2)
                own = norms[:, 0, n:n + rows]  # added, it turns the ranking into squared distances
                index[b:b + clouds, n:n + rows] = smallest(distance.flatten(0, 1), own.reshape(-1), k).view(*own.shape, k)
    return index
