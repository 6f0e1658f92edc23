"""The choice of neighbours, reductions over their lists without an edge tensor, and the normalised activation behind them.

Called by `models/kernels/knn.py` and `edge_conv.py`. The reductions take `rows`, (M, k) int64: the k neighbours of every one of the M
points as rows of the (M, C) point matrix; every neighbour lies in the same cloud, a run of `points` rows, of which M is a multiple.
`models/kernels/neighbour_numba.py` has the same functions compiled for the CPU, where Numba is installed, and
`models/kernels/edge_conv_triton.py` those of EdgeConv as kernels for CUDA, on request; `operations` chooses.
"""

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.errors import UserError

HAS_NUMBA = importlib.util.find_spec("numba") is not None


@functools.cache
def triton_operations(device: torch.device) -> ModuleType:
    """Return `models.kernels.edge_conv_triton` after running its kernels once on a device; a UserError where they do not run."""
    try:
        kernels = importlib.import_module("models.kernels.edge_conv_triton")
        kernels.check(device)
    except Exception as error:  # a compiler, driver or chip that Triton does not like raises any type
        raise UserError(f"model.edge_conv: triton needs Triton, a C compiler and a CUDA device that it supports, found {device}, "
                        f"{type(error).__name__}: {error}; set model.edge_conv to fused, which gives the same numbers") from error
    return kernels


def operations(device: torch.device, implementation: str = "fused") -> ModuleType:
    """Return the module that reduces on a device: this one, or one with the same functions."""
    return triton_operations(device) if implementation == "triton" else compiled_or_plain(device, "neighbour_numba", "neighbour_ops")


def compiled_or_plain(device: torch.device, compiled: str, plain: str) -> ModuleType:
    """Return one of two modules of `models.kernels` with the same functions: the compiled one on a CPU with Numba."""
    return importlib.import_module(f"models.kernels.{compiled if device.type == 'cpu' and HAS_NUMBA else plain}")


def smallest(distances: Tensor, offsets: Tensor, k: int) -> Tensor:
    """Return the columns (R, k) int64 of the k smallest entries of every row, smallest first.

    Args:
        distances: (R, N) float.
        offsets: (R,), which bring the smallest entries near zero when added to their rows; the compiled search needs that.
        k: 1 <= k <= N.
    """
    return distances.topk(k, dim=1, largest=False).indices


def in_degrees(rows: Tensor) -> Tensor:
    """Count how often each point is somebody's neighbour, (M,) int64."""
    if rows.device.type == "cpu":
        return torch.bincount(rows.view(-1), minlength=rows.shape[0])
    ones = torch.ones_like(rows.view(-1))  # elsewhere bincount waits for the largest entry
    return torch.zeros_like(rows[:, 0]).index_add_(0, rows.view(-1), ones)


def neighbour_sum(x: Tensor, rows: Tensor) -> Tensor:
    """Sum the rows of x (M, C) over the neighbours of every point, (M, C)."""
    return F.embedding_bag(rows, x, mode="sum")


def edge_squares(u: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Sum over all edges, from point i to its neighbour j, of (u_j + v_i)^2, (C,) float64, of u and v (M, C)."""
    return sum((u[slot] + v).square_().sum(0, dtype=torch.float64) for slot in rows.unbind(1))


def transposed_sums(own: Tensor, winner: Tensor, x: Tensor | None, rows: Tensor, points: int) -> tuple[Tensor, Tensor | None]:
    """Sums over the points that list a given point as neighbour, the adjoints of `neighbour_max` and `neighbour_sum`.

    Args:
        own: (M, C) float; added up over those points and channels where the given point won the maximum.
        winner: (M, C) winners from `neighbour_max`.
        x: (M, D) float, added up over all those points, or None.
    Returns:
        (M, C) sums of own and (M, D) sums of x, or None without x.
    """
    near = torch.zeros_like(own).view(-1).scatter_add_(0, winner.view(-1).long(), own.view(-1)).view_as(own)
    if x is None:
        return near, None
    incoming = torch.zeros_like(x)
    for slot in rows.unbind(1):
        incoming.index_add_(0, slot, x)
    return near, incoming


def edge_gradients(
    own: Tensor, winner: Tensor, u: Tensor, v: Tensor, level: Tensor | None, slope: Tensor | None, rows: Tensor, points: int,
    transposed: Callable = transposed_sums, total: Callable = neighbour_sum,
) -> tuple[Tensor, Tensor]:
    """Add up at u_j and at v_i, (M, C) each, what reaches the edges y_ij = u_j + v_i: own_i where j won, less level + slope y_ij.

    Args:
        own: (M, C), may be overwritten; winner: (M, C) from `neighbour_max`.
        level, slope: (C,), or None for nothing less.
        transposed, total: `transposed_sums` and `neighbour_sum`, or functions that do the same.
    """
    near, incoming = transposed(own, winner, None if level is None else v, rows, points)
    if level is None:
        return near, own
    degree, k = in_degrees(rows).to(u.dtype)[:, None], rows.shape[1]
    near -= degree * torch.addcmul(level, slope, u) + slope * incoming
    return near, own - k * torch.addcmul(level, slope, v) - slope * total(u, rows)


def neighbour_max(u: Tensor, rows: Tensor, points: int, tied: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of every channel over the neighbours of every point; the lowest row wins a tie.

    Args:
        u: (M, C) float.
        tied: (C,) bool; channels where all neighbours count as equal.
    Returns:
        (M, C) values of the winners and (M, C) integer positions of the winners in the flattened u.
    """
    channel = torch.arange(u.shape[1], device=u.device)
    slots = rows.sort(1).values.T.contiguous()
    best = u[slots[0]]
    winner = slots[0].unsqueeze(1).expand_as(u)
    for slot in slots[1:]:
        candidate = u[slot]
        winner = torch.where(candidate > best, slot.unsqueeze(1), winner)
        best = torch.maximum(best, candidate)
    winner = winner * u.shape[1] + channel
    if u.device.type != "cpu" or tied.any():  # looking at `tied` would make other devices wait
        lowest = rows.amin(1)
        best = torch.where(tied, u[lowest], best)
        winner = torch.where(tied, (lowest * u.shape[1])[:, None] + channel, winner)
    return best, winner


def activate(rows: Tensor, scale: Tensor, offset: Tensor, slope: float) -> Tensor:
    """LeakyReLU(scale rows + offset), (M, C), of rows (M, C), scale (C,) and offset (C,)."""
    return F.leaky_relu_(torch.addcmul(offset, rows, scale), slope)


def activation_sums(grad: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `activate`, and what BatchNorm sums of them.

    Args:
        grad: (M, C), of the output.
        mean: (C,) of the rows.
    Returns:
        (M, C) gradient at the rows, and the sums over M, (C,) each, of g and of g (rows - mean), g the gradient at scale rows + offset.
    """
    grad = torch.where(torch.addcmul(offset, rows, scale) > 0, grad, grad * slope)
    return grad * scale, grad.sum(0), (rows - mean).mul_(grad).sum(0)
