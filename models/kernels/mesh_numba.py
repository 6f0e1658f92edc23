"""The passes over all pairs of touching faces of `models/kernels/mesh_convolution.py`, compiled for CPUs by Numba.

Threads share the meshes; a mesh is always summed in one order, so results do not depend on their number.
"""

import numpy as np
import torch
from torch import Tensor

from models.kernels.mesh_convolution import Neighbours
from models.kernels.rows_numba import compiled, share


def strongest(own: Tensor, other: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
    """As `mesh_convolution.strongest`."""
    best, sums = torch.empty_like(own), own.new_zeros(len(own), own.shape[2])
    arrays = [values.numpy() for values in (own, other.contiguous(), neighbours.rows, best, sums)]
    share(len(own), lambda start, stop: _strongest(*arrays, start, stop))
    return best, sums.sum(0, dtype=torch.float64)


def pair_gradients(
    grad: Tensor, own: Tensor, other: Tensor, best: Tensor, level: Tensor, slope: Tensor, neighbours: Neighbours
) -> tuple[Tensor, Tensor]:
    """As `mesh_convolution.pair_gradients`."""
    other = other.contiguous()
    grad_own, grad_other = torch.empty_like(own), torch.zeros_like(other)
    arrays = [values.numpy() for values in (grad, own, other, best, level, slope, neighbours.rows, grad_own, grad_other)]
    share(len(own), lambda start, stop: _pair_gradients(*arrays, start, stop))
    return grad_own, grad_other


@compiled
def _strongest(own, other, rows, best, sums, start, stop):
    for mesh in range(start, stop):
        for face in range(own.shape[1]):
            mine, out = own[mesh, face], best[mesh, face]
            first, second, third = other[rows[mesh, 0, face]], other[rows[mesh, 1, face]], other[rows[mesh, 2, face]]
            for channel in range(len(mine)):  # several loops: with one array to write to, each is vector code
                out[channel] = mine[channel] + np.maximum(np.maximum(first[channel], second[channel]), third[channel])
            for channel in range(len(mine)):
                one, two, three = mine[channel] + first[channel], mine[channel] + second[channel], mine[channel] + third[channel]
                sums[mesh, channel] += one * one + two * two + three * three


@compiled
def _pair_gradients(grad, own, other, best, level, slope, rows, grad_own, grad_other, start, stop):
    channels = own.shape[2]
    pulls = np.empty((rows.shape[1], channels), own.dtype)
    for mesh in range(start, stop):
        for face in range(own.shape[1]):
            for side in range(len(pulls)):
                pair, neighbour = pulls[side], other[rows[mesh, side, face]]
                for channel in range(channels):
                    pair[channel] = own[mesh, face, channel] + neighbour[channel]
            out = grad_own[mesh, face]
            for channel in range(channels):  # here the share of each of the strongest pairs
                winners = 0
                for side in range(len(pulls)):
                    winners += pulls[side, channel] == best[mesh, face, channel]
                out[channel] = grad[mesh, face, channel] / winners
            for side in range(len(pulls)):
                pair = pulls[side]
                for channel in range(channels):
                    won = out[channel] if pair[channel] == best[mesh, face, channel] else 0
                    pair[channel] = won - (level[channel] + slope[channel] * pair[channel])
            for channel in range(channels):
                out[channel] = pulls[0, channel] + pulls[1, channel] + pulls[2, channel]
            for side in range(len(pulls)):
                pair, target = pulls[side], grad_other[rows[mesh, side, face]]
                for channel in range(channels):
                    target[channel] += pair[channel]
