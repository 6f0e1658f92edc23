"""Reductions over the neighbour lists of points, without an edge tensor; called by `models/kernels/edge_conv.py`.

All take `rows`, (M, k) int64: the k neighbours of every one of the M points as rows of the (M, C) point matrix.
`models/kernels/edge_conv_triton.py` has the same functions as kernels for CUDA, behind `triton_operations`.
"""

import functools
import importlib
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.errors import UserError

BLOCK_ELEMENTS = 2**20  # of one block of doubles: near the cache, yet few calls, since threads meet after each
ROW_MASK = 2**28 - 1
SMALLEST_KEY = torch.tensor([2.0**-1000], dtype=torch.float64)


@functools.cache
def triton_operations(device: torch.device) -> ModuleType:
    """Return `models.kernels.edge_conv_triton` after running its kernels once on a device.

    Raises:
        UserError: where they do not run; it names the cause.
    """
    try:
        kernels = importlib.import_module("models.kernels.edge_conv_triton")
        kernels.check(device)
    except Exception as error:  # a compiler, driver or chip that Triton does not like raises any type
        raise UserError(f"model.edge_conv: triton needs Triton, a CUDA device that it supports and a C compiler, found {device} and "
                        f"{type(error).__name__}: {error}; set model.edge_conv to fused, which gives the same numbers") from error
    return kernels


def in_degrees(rows: Tensor) -> Tensor:
    """Count how often each point is somebody's neighbour, (M,) int64."""
    if rows.device.type == "cpu":
        return torch.bincount(rows.view(-1), minlength=rows.shape[0])
    ones = torch.ones_like(rows.view(-1))  # elsewhere bincount waits for the largest entry
    return torch.zeros_like(rows[:, 0]).index_add_(0, rows.view(-1), ones)


def neighbour_sum(x: Tensor, rows: Tensor) -> Tensor:
    """Sum the rows of x (M, C) over the neighbours of every point, (M, C)."""
    return F.embedding_bag(rows, x, mode="sum")


def transposed_neighbour_sum(x: Tensor, rows: Tensor, points: int) -> Tensor:
    """Sum the rows of x over the points that list a given point as neighbour.

    Args:
        x: (M, C) float.
        rows: (M, k) int64; every neighbour lies in the same run of `points` rows.
        points: N, points of one cloud; M is a multiple of it.
    Returns:
        (M, C) sums.
    """
    if x.device.type != "cpu":
        out = torch.zeros_like(x)
        for slot in rows.unbind(1):
            out.index_add_(0, slot, x)
        return out
    k = rows.shape[1]
    local = (rows.view(-1, points * k) % points).numpy()
    # NumPy sorts 16-bit integers by radix, which torch.sort does not.
    order = torch.from_numpy(local.astype(np.min_scalar_type(points - 1)).argsort(axis=1, kind="stable"))
    order = order.div_(k, rounding_mode="floor").add_(torch.arange(0, x.shape[0], points).view(-1, 1))
    degree = in_degrees(rows)
    return F.embedding_bag(order.view(-1), x, degree.cumsum(0) - degree, mode="sum")


def transposed_sums(own: Tensor, winner: Tensor, x: Tensor | None, rows: Tensor, points: int) -> tuple[Tensor, Tensor | None]:
    """Sums over the points that list a given point as neighbour, the adjoints of `neighbour_max` and `neighbour_sum`.

    Args:
        own: (M, C) float; added up over those points and channels where the given point won the maximum.
        winner: (M, C) winners from `neighbour_max`.
        x: (M, D) float, for `transposed_neighbour_sum`, or None.
        rows: (M, k) int64; every neighbour lies in the same run of `points` rows.
        points: N, points of one cloud; M is a multiple of it.
    Returns:
        (M, C) sums of own and (M, D) sums of x, or None without x.
    """
    near = torch.zeros_like(own).view(-1).scatter_add_(0, winner.view(-1).long(), own.view(-1)).view_as(own)
    return near, None if x is None else transposed_neighbour_sum(x, rows, points)


def neighbour_max(u: Tensor, rows: Tensor, points: int, tied: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of every channel over the neighbours of every point; the lowest row wins a tie.

    Args:
        u: (M, C) float.
        rows: (M, k) int64; every neighbour lies in the same run of `points` rows.
        points: N, points of one cloud; M is a multiple of it.
        tied: (C,) bool; channels where all neighbours count as equal.
    Returns:
        (M, C) values of the winners and (M, C) integer positions of the winners in the flattened u.
    """
    packed = u.device.type == "cpu" and u.dtype == torch.float32
    best, winner = _packed_max(u, rows, points) if packed else _slot_max(u, rows)
    if u.device.type != "cpu" or tied.any():  # looking at `tied` would make other devices wait
        lowest = rows.amin(1)
        best = torch.where(tied, u[lowest], best)
        winner = torch.where(tied, (lowest * u.shape[1])[:, None] + torch.arange(u.shape[1], device=u.device), winner)
    return best, winner


def _slot_max(u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    slots = rows.sort(1).values.T.contiguous()
    best = u[slots[0]]
    winner = slots[0].unsqueeze(1).expand_as(u)
    for slot in slots[1:]:
        candidate = u[slot]
        winner = torch.where(candidate > best, slot.unsqueeze(1), winner)
        best = torch.maximum(best, candidate)
    return best, winner * u.shape[1] + torch.arange(u.shape[1], device=u.device)


def _packed_max(u: Tensor, rows: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """`_slot_max` for float32 on the CPU: one sparse max-product over doubles that carry their own row.

    A float32 leaves 29 mantissa bits of a double empty. The row within the block goes into the lower 28, inverted
    where that makes the lower row the larger number, so that the maximum brings its source along and rounds back to
    the float32 it came from.
    """
    count, channels = u.shape
    best = torch.empty_like(u)
    winner = torch.empty(u.shape, dtype=torch.int32 if u.numel() < 2**31 else torch.int64)
    column = torch.arange(channels)
    step = max(1, BLOCK_ELEMENTS // (points * channels)) * points
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        size = block.stop - start
        keys = u[block] + SMALLEST_KEY  # zeros need a mantissa too
        bits = keys.view(torch.int64)
        code = ROW_MASK - torch.arange(size).unsqueeze(1)
        bits |= (bits >> 63).bitwise_and_(ROW_MASK).bitwise_xor_(code)
        top = torch.sparse.mm(_adjacency(rows[block] - start, keys.dtype), keys, "amax")
        best[block] = top
        bits = top.view(torch.int64)
        code = (bits >> 63).bitwise_xor_(bits).bitwise_and_(ROW_MASK)
        code.clamp_(min=ROW_MASK + 1 - size)  # a NaN may have lost its row
        torch.add((ROW_MASK + start) * channels + column, code, alpha=-channels, out=winner[block])
    return best, winner


def _adjacency(rows: Tensor, dtype: torch.dtype) -> Tensor:
    count, k = rows.shape
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
        return torch.sparse_csr_tensor(torch.arange(0, count * k + 1, k), rows.reshape(-1),
                                       torch.ones(count * k, dtype=dtype), size=(count, count))
