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
SUMMED_ROWS = 1024  # points that are added up in the working precision


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
    """EdgeConv on flattened points; every product is worked out per point, none per edge.

    With W = (W1, W2) and the points centred, an edge is y_ij = W1 x_j + Wd x_i + shift, Wd = W2 - W1: one row per point
    of u = X W1^T and v = X Wd^T. The shift, W2 times the centre, is kept out of y, where it would cost digits.
    BatchNorm is affine and LeakyReLU monotone, so the maximum over the neighbours is that of u, once channels of negative
    gamma are turned round. The mean over all edges needs in-degrees only, the variance one pass over the edges. In the
    backward pass the gradient of one edge per point and channel, the one that won the maximum, and the terms of BatchNorm,
    which every edge pulls, are added up at u_j and v_i; the products follow. With several processes of equal batches
    (world > 1) the sums over edges, those of the backward pass too, are added up over all of them.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, rows, points, running, eps, world, ops):
        edges = rows.numel() * world
        # Any nearby point will do, and this one keeps integer coordinates, so true ties, exact. In eval mode no cloud may
        # depend on another one of the batch, not even by rounding.
        centre = x[0].clone() if running is None else torch.zeros_like(x[0])
        if world > 1:
            distributed.add_over_processes(centre.div_(world))
        x = x - centre
        sign = torch.where(gamma < 0, -1.0, 1.0).to(x.dtype)
        first, second = weight.chunk(2, 1)
        split = torch.cat((first, second - first), 1) * sign[:, None]  # (C_out, 2C)
        u, v = (linear(x, part) for part in split.chunk(2, 1))
        edge, winner = ops.neighbour_max(u, rows, points, gamma == 0)
        shift = second @ centre
        if running is None:
            mean = _edge_sums(x, rows, points)  # (2C,) float64, of x_j and of x_i
            mean = (split.double() @ (distributed.add_over_processes(mean) if world > 1 else mean) / edges).to(x.dtype)
        else:
            mean = (running[0].to(x.dtype) - shift) * sign
        v -= mean
        edge.add_(v)  # (B*N, C_out), winners, centred
        if running is None:
            squares = ops.edge_squares(u, v, rows)
            var = ((distributed.add_over_processes(squares) if world > 1 else squares) / edges).to(x.dtype)
        else:
            var = running[1].to(x.dtype)
        rstd = (var + eps).rsqrt()
        scale = gamma * sign * rstd
        ctx.save_for_backward(x, split, sign, scale, beta, u, v, edge, winner, rstd, rows)
        ctx.batch_statistics, ctx.points, ctx.ops, ctx.world = running is None, points, ops, world
        batch_mean = mean * sign + shift
        ctx.mark_non_differentiable(batch_mean, var)
        return ops.activate(edge, scale, beta, SLOPE), batch_mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _var):
        with torch.autocast(grad.device.type, enabled=False):
            return _fused_backward(ctx, grad)


def _edge_sums(x: Tensor, rows: Tensor, points: int) -> Tensor:
    """Sums over all edges of x_j and of x_i, (2C,) float64; those over about a thousand points in the working precision."""
    together = points * math.gcd(len(x) // points, max(1, SUMMED_ROWS // points))
    degree = neighbour_ops.in_degrees(rows).to(x.dtype)
    counts = torch.stack((degree, torch.full_like(degree, rows.shape[1])))  # (2, B*N)
    sums = torch.bmm(counts.view(2, -1, together).transpose(0, 1), x.view(-1, together, x.shape[1]))
    return sums.sum(0, dtype=torch.float64).flatten()


def _fused_backward(ctx, grad):
    x, split, sign, scale, beta, u, v, edge, winner, rstd, rows = ctx.saved_tensors
    own, grad_beta, grad_gamma = ctx.ops.activation_sums(grad, edge, torch.zeros_like(beta), scale, beta, SLOPE)
    grad_gamma *= rstd
    level = slope = None
    if ctx.batch_statistics:
        every = torch.stack((grad_beta, grad_gamma))  # of all processes
        every = distributed.add_over_processes(every) if ctx.world > 1 else every
        level, slope = every * torch.stack((scale, scale * rstd)) / (rows.numel() * ctx.world)
    near, own = ctx.ops.edge_gradients(own, winner, u, v, level, slope, rows, ctx.points)  # at u and at v
    grad_first, grad_second = (weight_gradient(part, x) * sign[:, None] for part in (near, own))
    grad_x = None
    if ctx.needs_input_grad[0]:
        first, second = split.chunk(2, 1)
        grad_x = linear(near, first.T).add_(linear(own, second.T))
    return grad_x, torch.cat((grad_first - grad_second, grad_second), 1), grad_gamma * sign, grad_beta, *[None] * 6
