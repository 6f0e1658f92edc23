"""The passes over all pairs of touching faces of `models/kernels/mesh_convolution.py`, compiled for CPUs by Numba.

Threads share the meshes; a mesh is always summed in one order, so results do not depend on their number.
"""

import numpy as np
import torch
from torch import Tensor

from models.kernels.mesh_convolution import Neighbours
from models.kernels.rows_numba import compiled, share


def strongest(both: Tensor, mean: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
    """As `mesh_convolution.strongest`."""
    both, meshes = both.contiguous(), len(neighbours.rows)
    best, sums = both.new_empty(len(both), len(mean)), both.new_zeros(meshes, len(mean))
    arrays = [values.numpy() for values in (both, mean, neighbours.rows, best, sums)]
    share(meshes, lambda start, stop: _strongest(*arrays, start, stop))
    return best, sums.sum(0, dtype=torch.float64)


def pair_gradients(
    grad: Tensor, both: Tensor, mean: Tensor, best: Tensor, level: Tensor, slope: Tensor, neighbours: Neighbours
) -> Tensor:
    """As `mesh_convolution.pair_gradients`."""
    both = both.contiguous()
    pulls = torch.empty_like(both)
    arrays = [values.numpy() for values in (grad, both, mean, best, level, slope, neighbours.rows, pulls)]
    share(len(neighbours.rows), lambda start, stop: _pair_gradients(*arrays, start, stop))
    return pulls


@compiled
def _strongest(both, mean, rows, best, sums, start, stop):
    channels, faces = len(mean), rows.shape[2]
    mine = np.empty_like(mean)
    for mesh in range(start, stop):
        for face in range(faces):
            own, out = both[mesh * faces + face, :channels], best[mesh * faces + face]
            first, second, third = both[rows[mesh, 0, face]], both[rows[mesh, 1, face]], both[rows[mesh, 2, face]]
            first, second, third = first[channels:], second[channels:], third[channels:]
            for channel in range(channels):  # several loops: with one array to write to, each is vector code
                mine[channel] = own[channel] - mean[channel]
            for channel in range(channels):
                out[channel] = mine[channel] + np.maximum(np.maximum(first[channel], second[channel]), third[channel])
            for channel in range(channels):
                one, two, three = mine[channel] + first[channel], mine[channel] + second[channel], mine[channel] + third[channel]
                sums[mesh, channel] += one * one + two * two + three * three


@compiled
def _pair_gradients(grad, both, mean, best, level, slope, rows, pulls, start, stop):
    channels, faces, one, zero = len(mean), rows.shape[2], both.dtype.type(1), both.dtype.type(0)
    mine, part = np.empty_like(mean), np.empty_like(mean)
    for mesh in range(start, stop):
        pulls[mesh * faces:(mesh + 1) * faces, channels:] = zero
        for face in range(faces):
            row = mesh * faces + face
            own, out, most, slopes = both[row, :channels], pulls[row, :channels], best[row], grad[row]
            for channel in range(channels):
                mine[channel] = own[channel] - mean[channel]
                out[channel] = zero
                part[channel] = zero
            for side in range(len(rows[mesh])):
                other = both[rows[mesh, side, face], channels:]
                for channel in range(channels):  # how many pairs are the strongest
                    part[channel] += one if mine[channel] + other[channel] == most[channel] else zero
            for channel in range(channels):
                part[channel] = slopes[channel] / part[channel]
            for side in range(len(rows[mesh])):
                other, target = both[rows[mesh, side, face], channels:], pulls[rows[mesh, side, face], channels:]
                for channel in range(channels):
                    pair = mine[channel] + other[channel]
                    target[channel] += (part[channel] if pair == most[channel] else zero) - (level[channel] + slope[channel] * pair)
                for channel in range(channels):
                    pair = mine[channel] + other[channel]
                    out[channel] += (part[channel] if pair == most[channel] else zero) - (level[channel] + slope[channel] * pair)
