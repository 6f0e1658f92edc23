"""EdgeConv of DGCNN (Wang et al. 2019) without the edge tensor, and its plain specification.

Used by `models/point_encoder.py`. The derivation of the fused forward and backward is in `_FusedEdgeConv`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels import neighbour_ops
from models.kernels.knn import knn
from models.kernels.linear import linear, weight_gradient
from models.sync_batchnorm import SyncBatchNorm, update_running_statistics
from utils.engine import distributed

IMPLEMENTATIONS = ("fused", "triton", "reference")
SLOPE = 0.2  # of the LeakyReLU below zero
MOMENT_ROWS = 1024  # points whose second moments are one product


class EdgeConv(nn.Module):
    """max over the neighbours j of LeakyReLU(BatchNorm(W (x_j - x_i, x_i))), the layer of DGCNN.

    Where neighbours tie for the maximum, the gradient goes to the one of lowest index, whatever their order.
    `conv` and `bn` hold the parameters under the shapes of the public checkpoints; all implementations share them.

    Args:
        in_channels: C_in of the points.
        out_channels: C_out.
        k: neighbours per point when `forward` gets no index.
        implementation: "fused" never builds an edge tensor; "triton" is the same with its reductions as kernels for CUDA;
            "reference" is the explicit formulation, the specification of both.
    """

    def __init__(self, in_channels: int, out_channels: int, k: int, implementation: str = "fused") -> None:
        super().__init__()
        self.k = k
        self.implementation = implementation
        self.conv = nn.Conv2d(2 * in_channels, out_channels, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Map points or features (B, N, C_in) to features (B, N, C_out); float32 from the fused implementations under autocast.

        Args:
            index: (B, N, k) int64 neighbours of every point, any k; `knn(x, self.k)` when None.
        Raises:
            ValueError: if a shape or index does not fit, or one edge alone is to be normalised in training mode.
            UserError: "triton" where its kernels do not run.
        """
        if x.dim() != 3 or 2 * x.shape[-1] != self.conv.in_channels:
            raise ValueError(f"EdgeConv expects (B, N, {self.conv.in_channels // 2}), found {tuple(x.shape)}")
        if index is None:
            index = knn(x, self.k)
        if index.dim() != 3 or index.shape[:2] != x.shape[:2] or index.shape[2] < 1 or index.dtype != torch.long:
            raise ValueError(f"EdgeConv expects int64 neighbours (B, N, k) = ({x.shape[0]}, {x.shape[1]}, k >= 1), "
                             f"found {index.dtype} {tuple(index.shape)}")
        if self.bn.training and index.numel() == 1:
            raise ValueError("EdgeConv cannot normalise a single edge in training mode; use larger clouds or eval()")
        return self._reference(x, index) if self.implementation == "reference" else self._fused(x, index)

    def _reference(self, x: Tensor, index: Tensor) -> Tensor:
        batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
        neighbours = x[batch, index.sort(-1).values]  # (B, N, k, C); sorted, so that the lowest index wins a tie
        centre = x.unsqueeze(2).expand_as(neighbours)
        edges = torch.cat((neighbours - centre, centre), dim=-1).permute(0, 3, 1, 2)  # (B, 2C, N, k)
        activated = F.leaky_relu(self.bn(self.conv(edges)), SLOPE)
        return activated.max(dim=-1).values.transpose(1, 2)  # (B, N, C_out)

    def _fused(self, x: Tensor, index: Tensor) -> Tensor:
        bn = self.bn
        offset = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1) * x.shape[1]
        rows = (index + offset).view(-1, index.shape[2])  # (B*N, k) rows of the flattened points
        flat = x.reshape(-1, x.shape[2])
        running = None if bn.training else (bn.running_mean, bn.running_var)
        world = distributed.world() if isinstance(bn, SyncBatchNorm) else 1
        ops = neighbour_ops.operations(x.device, self.implementation)
        with torch.autocast(x.device.type, enabled=False):
            flat = flat.to(self.conv.weight.dtype)
            out, mean, var = _FusedEdgeConv.apply(
                flat, self.conv.weight.flatten(1), bn.weight, bn.bias, rows, x.shape[1], running, bn.eps, world, ops)
        if bn.training:
            update_running_statistics(bn, mean, var, rows.numel() * world)
        return out.view(*x.shape[:2], -1)


class _FusedEdgeConv(torch.autograd.Function):
    """EdgeConv on flattened points; every dense term is worked out per point, none per edge.

    With W = (W1, W2) and the points centred, an edge is y_ij = W1 x_j + Wd x_i + shift, Wd = W2 - W1: one row per point
    of u = X W1^T and v = X Wd^T. The shift, W2 times the centre, is kept out of y, where it would cost digits.
    BatchNorm is affine and LeakyReLU monotone, so the maximum over the neighbours is that of sign(gamma) u. Mean and
    variance over all edges are quadratic forms of `moments`, the second moments of (x_j, x_i), which need in-degrees
    and neighbourhood sums only. In the backward pass BatchNorm's dense terms are linear in (x_j, x_i), so that they
    too reduce to degrees, neighbourhood sums and transposed neighbourhood sums; the rest touches one edge per point
    and channel, the one that won the maximum. With several processes of equal batches (world > 1) the moments, and
    in the backward pass the sums over edges behind BatchNorm's terms, are added up over all of them.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, rows, points, running, eps, world, ops):
        channels, edges = x.shape[1], rows.numel() * world
        # Any nearby point will do, and this one keeps integer coordinates, so true ties, exact. In eval mode no cloud may
        # depend on another one of the batch, not even by rounding.
        centre = x[0].clone() if running is None else torch.zeros_like(x[0])
        if world > 1:
            distributed.add_over_processes(centre.div_(world))
        x = x - centre
        split = torch.cat((weight[:, :channels], weight[:, channels:] - weight[:, :channels]), 1)  # (C_out, 2C)
        shift = weight[:, channels:] @ centre
        sign = torch.where(gamma < 0, -1.0, 1.0).to(x.dtype)
        best, winner = ops.neighbour_max(linear(x, split[:, :channels] * sign[:, None]), rows, points, gamma == 0)
        edge = best.mul_(sign).add_(linear(x, split[:, channels:]))  # (B*N, C_out), winners, without shift

        moments = edge_mean = sums = degree = None
        if running is None:
            degree = ops.in_degrees(rows).to(x.dtype)
            sums = ops.neighbour_sum(x, rows)
            edge_mean, moments = _edge_moments(x, sums, degree, rows.shape[1], points, world)
            wide = split.double()
            mean = (wide @ edge_mean).to(x.dtype)
            var = ((wide @ moments) * wide).sum(1).clamp_(min=0).div_(edges).to(x.dtype)
        else:
            mean, var = running[0].to(x.dtype) - shift, running[1].to(x.dtype)
        rstd = (var + eps).rsqrt()
        scale = gamma * rstd
        offset = beta - mean * scale
        ctx.save_for_backward(x, split, scale, offset, centre, edge, winner, mean, rstd, rows, sums, degree, edge_mean, moments)
        ctx.points, ctx.ops, ctx.world = points, ops, world
        batch_mean = mean + shift
        ctx.mark_non_differentiable(batch_mean, var)
        return ops.activate(edge, scale, offset, SLOPE), batch_mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _var):
        with torch.autocast(grad.device.type, enabled=False):
            return _fused_backward(ctx, grad)


def _edge_moments(x: Tensor, sums: Tensor, degree: Tensor, k: int, points: int, world: int) -> tuple[Tensor, Tensor]:
    """Mean (2C,) and centred second moments (2C, 2C), summed over all edges of all processes, of (x_j, x_i); float64."""
    edges = k * len(x) * world
    weighted = x * degree[:, None]
    clouds = len(x) // points
    together = points * math.gcd(clouds, max(1, MOMENT_ROWS // points))
    x, weighted, sums = (values.view(-1, together, x.shape[1]) for values in (x, weighted, sums))
    # Sums over a thousand points in the working precision, added up in float64.
    near, cross, own = (torch.bmm(x.transpose(1, 2), values).sum(0, dtype=torch.float64) for values in (weighted, sums, x))
    mean = torch.cat([values.sum(1).sum(0, dtype=torch.float64) for values in (weighted, k * x)]) / edges
    moments = torch.cat((torch.cat((near, cross.T), 1), torch.cat((cross, k * own), 1)))
    if world > 1:
        distributed.add_over_processes(mean)
        distributed.add_over_processes(moments)
    return mean, moments - edges * mean[:, None] * mean


def _fused_backward(ctx, grad):
    x, split, scale, offset, centre, edge, winner, mean, rstd, rows, sums, degree, edge_mean, moments = ctx.saved_tensors
    channels, edges = x.shape[1], rows.numel() * ctx.world
    own, grad_beta, grad_gamma = ctx.ops.activation_sums(grad, edge, mean, scale, offset, SLOPE)
    grad_gamma *= rstd
    every_beta, every_gamma = grad_beta, grad_gamma  # over all processes
    if ctx.world > 1 and moments is not None:
        every_beta, every_gamma = distributed.add_over_processes(torch.stack((grad_beta, grad_gamma)))
    dense_x = x if moments is not None and ctx.needs_input_grad[0] else None
    near, incoming = ctx.ops.transposed_sums(own, winner, dense_x, rows, ctx.points)

    grad_split = torch.cat((weight_gradient(near, x), weight_gradient(own, x)), 1)
    total = scale * every_beta  # sum of the edge gradients; BatchNorm in training mode makes it zero
    slope = None
    if moments is not None:
        slope = (scale * rstd * every_gamma).double() / edges
        dense = slope[:, None] * (split.double() @ moments) + total.double()[:, None] * edge_mean
        grad_split -= (dense / ctx.world).to(x.dtype)  # of all processes, which will be added up
        total = None
    grad_first, grad_second = grad_split.chunk(2, dim=1)
    second = grad_second if total is None else torch.addr(grad_second, total, centre)
    grad_weight = torch.cat((grad_first - grad_second, second), 1)

    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = linear(near, split[:, :channels].T).add_(linear(own, split[:, channels:].T))
        if slope is not None:
            offset = (scale * every_beta).double() / edges
            _subtract_batch_terms(grad_x, x, split, slope, offset, sums, incoming, degree, edge_mean, rows.shape[1])
    return grad_x, grad_weight, grad_gamma, grad_beta, *[None] * 6


def _subtract_batch_terms(grad_x, x, split, slope, offset, sums, incoming, degree, edge_mean, k) -> None:
    """Subtract from grad_x what flows through the batch statistics: sum over edges of offset + slope W (e - mean)."""
    channels = x.shape[1]
    wide = split.double()
    quadratic = wide.T @ (slope[:, None] * wide)  # (2C, 2C)
    constant = (wide.T @ offset - quadratic @ edge_mean).to(x.dtype)
    quadratic = quadratic.to(x.dtype)
    grad_x.addmm_(x * degree[:, None], quadratic[:channels, :channels], alpha=-1)
    grad_x.addmm_(incoming, quadratic[channels:, :channels], alpha=-1)
    grad_x.addmm_(sums, quadratic[:channels, channels:], alpha=-1)
    grad_x.addmm_(x, quadratic[channels:, channels:], alpha=-k)
    grad_x.addr_(degree, constant[:channels], alpha=-1).sub_(k * constant[channels:])
