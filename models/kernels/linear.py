"""A linear layer on many rows, and on several inputs that count as one; called by the encoders of clouds and meshes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

MAPS = 16  # a 1 x 1 convolution of so many maps is oneDNN's whatever the number of threads


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply weight (C_out, C_in) and bias (C_out,) to rows (M, C_in), as `F.linear`.

    On a CPU as a 1 x 1 convolution: oneDNN is near the limit for many rows and few channels, where the BLAS behind `F.linear` is not.
    """
    if not _as_maps(rows):
        return F.linear(rows, weight, bias)
    return F.conv2d(_maps(rows), weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(len(rows), -1)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Return grad^T rows, (C_out, C_in): the gradient at the weight of `linear`, of those at its output (M, C_out)."""
    if not _as_maps(rows):
        return grad.T @ rows
    return conv2d_weight(_maps(rows), (grad.shape[1], rows.shape[1], 1, 1), _maps(grad)).flatten(1)


def _as_maps(rows: Tensor) -> bool:
    fits = rows.device.type == "cpu" and rows.dtype == torch.float32 and len(rows) % MAPS == 0
    return fits and not torch.is_autocast_enabled("cpu")


def _maps(rows: Tensor) -> Tensor:
    return rows.contiguous().view(MAPS, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)  # channels last


def linear_of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply weight (C_out, C_in) and bias (C_out,) to rows (M, C_in), given as parts (M, C_i) whose concatenation is never built."""
    if len(parts) > 1 and _as_maps(parts[0]):
        return _LinearOfParts.apply(weight, bias, *parts)
    return _sum_of_products(parts, weight, bias)


def _sum_of_products(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    pieces = weight.split([part.shape[1] for part in parts], dim=1)
    rows = linear(parts[0], pieces[0], bias)
    for part, piece in zip(parts[1:], pieces[1:]):
        rows.add_(linear(part, piece))
    return rows


class _LinearOfParts(torch.autograd.Function):
    """Autograd would copy the sum for every product that is added to it in place."""

    @staticmethod
    def forward(ctx, weight, bias, *parts):
        ctx.save_for_backward(weight, *parts)
        ctx.has_bias = bias is not None
        return _sum_of_products(parts, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, *parts = ctx.saved_tensors
        pieces = weight.split([part.shape[1] for part in parts], dim=1)
        grads = [linear(grad, piece.T) if needed else None for piece, needed in zip(pieces, ctx.needs_input_grad[2:])]
        return torch.cat([weight_gradient(grad, part) for part in parts], 1), grad.sum(0) if ctx.has_bias else None, *grads
