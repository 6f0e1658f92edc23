"""Mesh convolution of MeshNet on rows of faces: layers shared by all faces, and aggregation over the three neighbours.

The faces of all meshes of a batch are the rows of one (M, C) matrix, M = B * F; `Neighbours` says which rows touch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels.batch_norm import normalise_and_activate
from models.kernels.linear import linear_of_parts
from models.kernels.neighbour_ops import in_degrees
from models.sync_batchnorm import SyncBatchNorm, update_running_statistics
from utils.engine import distributed

SIDES = 3
BLOCK_ELEMENTS = 2**18  # of the pairs worked on at a time on a CPU: near the cache


class SharedMLP(nn.Sequential):
    """(1x1 convolution, BatchNorm, ReLU) triples on rows; `channels` are those of the input and after every triple."""

    def __init__(self, *channels: int) -> None:
        layers = []
        for c_in, c_out in zip(channels[:-1], channels[1:]):
            layers += [nn.Conv1d(c_in, c_out, kernel_size=1), nn.BatchNorm1d(c_out), nn.ReLU(inplace=True)]
        super().__init__(*layers)

    def forward(self, *parts: Tensor) -> Tensor:
        """Map rows (M, C_in) to (M, C_out). Several inputs count as one, their channels in the order given."""
        layers = iter(self)
        for conv, bn, _relu in zip(layers, layers, layers):
            parts = (normalise_and_activate(linear_of_parts(parts, conv.weight.flatten(1), conv.bias), bn),)
        return parts[0]


@dataclass(frozen=True)
class Neighbours:
    """The three neighbours of every face, and the same relation from the side of the neighbour; build with `of`.

    Pairs (face, neighbour) are ordered by mesh, then side, then face, so that each side of a mesh is one run of its faces.

    Attributes:
        rows: (B, 3, F) int64, row of the neighbour of every pair.
        order: (3 * M,) int64, the pairs sorted by that row.
        starts: (M,) int64, place in `order` where the pairs of a row begin.
        degree: (M,) int64, how many pairs a face is the neighbour of.
    """

    rows: Tensor
    order: Tensor
    starts: Tensor
    degree: Tensor

    @classmethod
    def of(cls, neighbours: Tensor) -> "Neighbours":
        """From the indices (B, F, 3) int64, which count within a mesh.

        An index that names no face of its mesh is a ValueError on the CPU. Others are not waited for: their next operation fails.
        """
        batch, faces = neighbours.shape[:2]
        wrong = (neighbours < 0) | (neighbours >= faces)
        if neighbours.device.type != "cpu":
            torch._assert_async(~wrong.any(), "MeshNet found the index of a neighbour outside of its mesh")
        elif wrong.any():
            mesh, face, side = wrong.nonzero()[0].tolist()
            raise ValueError(f"MeshNet expects neighbours 0 to {faces - 1}, found {int(neighbours[mesh, face, side])} at mesh "
                             f"{mesh} of the batch, face {face}, side {side}; a face without a neighbour names itself")
        first = torch.arange(0, batch * faces, faces, device=neighbours.device)
        rows = (neighbours + first.view(-1, 1, 1)).transpose(1, 2).contiguous()
        order = rows.view(-1).int().sort(stable=True).indices
        degree = in_degrees(rows.view(-1, SIDES))
        return cls(rows, order, degree.cumsum(0) - degree, degree)

    def sum(self, values: Tensor) -> Tensor:
        """Sum the rows (M, C) over the neighbours of every face, (M, C); differentiable."""
        return _NeighbourSum.apply(values, self)


class _NeighbourSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, neighbours):
        ctx.neighbours = neighbours
        return F.embedding_bag(neighbours.rows.transpose(1, 2).reshape(-1, SIDES), values, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        order, faces = ctx.neighbours.order, ctx.neighbours.rows.shape[2]
        face = order.div(SIDES * faces, rounding_mode="floor") * faces + order % faces
        return F.embedding_bag(face, grad.contiguous(), ctx.neighbours.starts, mode="sum"), None


class MeshConvolution(nn.Module):
    """Combines both features of a face (spatial output) and aggregates over its three neighbours (structural output)."""

    def __init__(self, spatial_in: int, structural_in: int, spatial_out: int, structural_out: int) -> None:
        super().__init__()
        self.combination_mlp = SharedMLP(spatial_in + structural_in, spatial_out)
        self.concat_mlp = nn.Sequential(
            nn.Conv2d(2 * structural_in, structural_in, kernel_size=1), nn.BatchNorm2d(structural_in), nn.ReLU()
        )
        self.aggregation_mlp = SharedMLP(structural_in, structural_out)

    def forward(self, spatial: Tensor, structural: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
        """Map rows (M, C_spatial) and (M, C_structural) to the two outputs, rows as well."""
        combined = self.combination_mlp(spatial, structural)
        return combined, self.aggregation_mlp(self.strongest_pairs(structural, neighbours))

    def strongest_pairs(self, structural: Tensor, neighbours: Neighbours) -> Tensor:
        """Maximum over the neighbours j of ReLU(BatchNorm(W (x_i, x_j) + b)), (M, C) to (M, C).

        The convolution of a pair is the sum of one term of the face and one of the neighbour, each needed once per row.
        Turning the sign of a channel in W, b and the BatchNorm scale changes nothing, so that no scale is negative and
        the maximum can be taken before the BatchNorm.
        """
        conv, bn, relu = self.concat_mlp
        weight, bias, scale = conv.weight.flatten(1), conv.bias, bn.weight
        if isinstance(bn, SyncBatchNorm) and distributed.world() > 1:
            own, other = _own_and_other(structural, weight, bias)
            pairs = own.unflatten(0, (-1, 1, neighbours.rows.shape[2])) + other[neighbours.rows]  # (B, 3, F, C)
            return relu(bn(pairs.flatten(0, 2)[..., None, None])).view_as(pairs).amax(dim=1).flatten(0, 1)
        sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
        own, other = _own_and_other(structural, weight * sign[:, None], bias * sign)
        running = None if bn.training else (bn.running_mean * sign, bn.running_var)
        with torch.autocast(own.device.type, enabled=False):
            own, other = own.to(scale.dtype), other.to(scale.dtype)
            out, mean, var = _StrongestPairs.apply(own, other, scale * sign, bn.bias, running, bn.eps, neighbours)
        if bn.training:
            update_running_statistics(bn, mean * sign, var, neighbours.rows.numel())
        return out


def _own_and_other(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    own_weight, other_weight = weight.chunk(2, dim=1)  # (C, C) each
    return F.linear(rows, own_weight, bias), F.linear(rows, other_weight)


class _StrongestPairs(torch.autograd.Function):
    """relu(scale * normalised(max over the neighbours j of own_i + other_j) + shift) with scale >= 0, a few meshes at a time.

    Mean and variance are those of all pairs, or given (`running`). No array of all pairs is built: a block of them lies in
    a buffer near the cache, and once more in the backward pass. Equal neighbours share the gradient of their maximum. With
    y a centred pair, the gradient through the batch statistics takes level + slope * y from every pair.
    """

    @staticmethod
    def forward(ctx, own, other, scale, shift, running, eps, neighbours):
        count = neighbours.rows.numel()
        if running is None:
            mean = own.mean(0) + (neighbours.degree.to(other.dtype) @ other) / count
        else:
            mean = running[0]
        own = (own - mean).unflatten(0, (-1, neighbours.rows.shape[2]))  # (B, F, C)
        best, squares = torch.empty_like(own), torch.zeros_like(mean, dtype=torch.float64)
        for meshes, pairs in _blocks(own, other, neighbours):
            torch.amax(pairs, 1, out=best[meshes])
            if running is None:
                squares += pairs.square_().sum((0, 1, 2))
        var = (squares / count).to(own.dtype) if running is None else running[1]
        out = torch.addcmul(shift, best.flatten(0, 1), scale * (var + eps).rsqrt()).relu_()
        ctx.save_for_backward(own, other, best, out, scale, var)
        ctx.eps, ctx.neighbours, ctx.batch_statistics = eps, neighbours, running is None
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _var):
        own, other, best, out, scale, var = ctx.saved_tensors
        neighbours, rstd = ctx.neighbours, (var + ctx.eps).rsqrt()
        grad = torch.ops.aten.threshold_backward(grad.contiguous(), out, 0)  # at the BatchNorm output of the strongest pairs
        grad_shift, grad_scale = grad.sum(0), (grad * best.view_as(grad)).sum(0) * rstd
        factor = scale * rstd
        level, slope = (factor / neighbours.rows.numel() * term for term in (grad_shift, grad_scale * rstd))
        grad = grad.mul_(factor).view_as(own)
        grad_own, grad_other = torch.empty_like(own), torch.empty_like(own)
        for meshes, pairs in _blocks(own, other, neighbours):
            if ctx.batch_statistics:
                dense = torch.addcmul(level, pairs, slope)
            strongest = pairs.eq_(best[meshes, None])
            strongest.mul_((grad[meshes] / strongest.sum(1))[:, None])
            if ctx.batch_statistics:
                pairs.sub_(dense)
            torch.sum(pairs, 1, out=grad_own[meshes])
            grad_other[meshes] = _collect(pairs, neighbours, meshes)
        return grad_own.flatten(0, 1), grad_other.flatten(0, 1), grad_scale, grad_shift, None, None, None


def _blocks(own: Tensor, other: Tensor, neighbours: Neighbours) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of meshes with own_i + other_j of their pairs, (meshes, 3, F, C) in a buffer that the next run overwrites."""
    batch, faces, channels = own.shape
    step = batch if own.device.type != "cpu" else max(1, BLOCK_ELEMENTS // (SIDES * faces * channels))
    buffer = own.new_empty(min(step, batch), SIDES, faces, channels)
    for start in range(0, batch, step):
        meshes = slice(start, min(start + step, batch))
        pairs = buffer[:meshes.stop - start]
        torch.index_select(other, 0, neighbours.rows[meshes].view(-1), out=pairs.view(-1, channels))
        yield meshes, pairs.add_(own[meshes, None])


def _collect(pairs: Tensor, neighbours: Neighbours, meshes: slice) -> Tensor:
    """Sum values (meshes, 3, F, C) of the pairs of a run of meshes into their neighbours, (meshes, F, C)."""
    faces, first = pairs.shape[2], meshes.start * pairs[0, :, :, 0].numel()
    order = neighbours.order[first:first + pairs[..., 0].numel()] - first
    starts = neighbours.starts[meshes.start * faces:meshes.stop * faces] - first
    return F.embedding_bag(order, pairs.view(-1, pairs.shape[3]), starts, mode="sum").view(-1, faces, pairs.shape[3])
