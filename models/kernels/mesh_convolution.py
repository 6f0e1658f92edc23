"""Mesh convolution of MeshNet on rows of faces: layers shared by all faces, and aggregation over the three neighbours.

The faces of all meshes of a batch are the rows of one (M, C) matrix, M = B * F; `Neighbours` says which rows touch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels.batch_norm import is_compiled, normalise_and_activate
from models.kernels.linear import linear, linear_of_parts
from models.kernels.neighbour_ops import compiled_or_plain, in_degrees, operations
from models.sync_batchnorm import SyncBatchNorm, update_running_statistics
from utils.engine import distributed

SIDES = 3


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
            early, late = (None, conv.bias) if is_compiled(parts[0], bn) else (conv.bias, None)
            parts = (normalise_and_activate(linear_of_parts(parts, conv.weight.flatten(1), early), bn, bias=late),)
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
        the maximum can be taken before the BatchNorm. In training the mean of the batch takes b away again.
        """
        conv, bn, relu = self.concat_mlp
        weight, bias, scale = conv.weight.flatten(1), conv.bias, bn.weight
        if isinstance(bn, SyncBatchNorm) and distributed.world() > 1:
            pairs = _pairs(_both_terms(structural, weight, bias), 0, neighbours)
            return relu(bn(pairs.flatten(0, 2)[..., None, None])).view_as(pairs).amax(dim=1).flatten(0, 1)
        sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
        both = _both_terms(structural, weight * sign[:, None], None if bn.training else bias * sign)
        running = None if bn.training else (bn.running_mean * sign, bn.running_var)
        with torch.autocast(both.device.type, enabled=False):
            both = both.to(scale.dtype)
            out, mean, var = _StrongestPairs.apply(both, scale * sign, bn.bias + 0 * bias, running, bn.eps, neighbours)
        if bn.training:
            update_running_statistics(bn, mean * sign + bias, var, neighbours.rows.numel())
        return out


def _both_terms(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a face gives to its own pairs, with the bias, and to those of its neighbours, side by side: (M, 2C) of rows (M, C)."""
    return linear(rows, torch.cat(weight.chunk(2, dim=1)), None if bias is None else torch.cat((bias, torch.zeros_like(bias))))


class _StrongestPairs(torch.autograd.Function):
    """relu(scale * normalised(max over the neighbours j of own_i + other_j) + shift) with scale >= 0, (own, other) = both.

    Mean and variance are those of all pairs, or given (`running`). With y a centred pair, the gradient through the batch statistics
    takes level + slope * y from every pair.
    """

    @staticmethod
    def forward(ctx, both, scale, shift, running, eps, neighbours):
        own, other = both.chunk(2, dim=1)
        count = neighbours.rows.numel()
        mean = own.mean(0) + (neighbours.degree.to(other.dtype) @ other) / count if running is None else running[0]
        passes, ops = compiled_or_plain(both.device, "mesh_numba", "mesh_convolution"), operations(both.device)
        best, squares = passes.strongest(both, mean, neighbours)
        var = (squares / count).to(both.dtype) if running is None else running[1]
        rstd = (var + eps).rsqrt()
        factor = scale * rstd
        ctx.save_for_backward(both, mean, best, factor, rstd, shift)
        ctx.neighbours, ctx.batch_statistics, ctx.passes, ctx.ops = neighbours, running is None, passes, ops
        ctx.mark_non_differentiable(mean, var)
        return ops.activate(best, factor, shift, 0.0), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _var):
        both, mean, best, factor, rstd, shift = ctx.saved_tensors
        grad, grad_shift, grad_scale = ctx.ops.activation_sums(grad, best, torch.zeros_like(shift), factor, shift, 0.0)
        grad_scale = grad_scale * rstd
        part = factor / ctx.neighbours.rows.numel() * ctx.batch_statistics
        level, slope = part * grad_shift, part * grad_scale * rstd
        return ctx.passes.pair_gradients(grad, both, mean, best, level, slope, ctx.neighbours), grad_scale, grad_shift, None, None, None


def _pairs(both: Tensor, mean: Tensor | float, neighbours: Neighbours) -> Tensor:
    """own_i - mean + other_j of every pair, (B, 3, F, C), of (own, other) = both (B * F, 2C)."""
    own, other = both.chunk(2, dim=1)
    return (own - mean).unflatten(0, (-1, 1, neighbours.rows.shape[2])) + other[neighbours.rows]


def strongest(both: Tensor, mean: Tensor, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
    """Return the largest pair of every face, (B * F, C), and the sum of squares over all pairs, (C,); pairs as by `_pairs`."""
    pairs = _pairs(both, mean, neighbours)
    return pairs.amax(dim=1).flatten(0, 1), pairs.square_().sum((0, 1, 2), dtype=torch.float64)


def pair_gradients(
    grad: Tensor, both: Tensor, mean: Tensor, best: Tensor, level: Tensor, slope: Tensor, neighbours: Neighbours
) -> Tensor:
    """Return the gradient at both: `grad` (B * F, C) goes to the pairs that are `best`, level + slope * pair is taken from all.

    Args:
        level, slope: (C,); the others as for `strongest`, whose result is `best`.
    """
    pairs = _pairs(both, mean, neighbours)
    grad, best = (values.unflatten(0, (-1, 1, pairs.shape[2])) for values in (grad, best))
    won = (pairs == best).to(pairs.dtype)
    pull = won.mul_(grad / won.sum(1, keepdim=True)).sub_(torch.addcmul(level, pairs, slope))
    other = F.embedding_bag(neighbours.order, pull.flatten(0, 2), neighbours.starts, mode="sum")
    return torch.cat((pull.sum(1).flatten(0, 1), other), dim=1)
