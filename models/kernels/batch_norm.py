"""BatchNorm and the (leaky) ReLU behind it, on rows: in fewer passes on a CPU with Numba, by torch's layers elsewhere."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels import neighbour_ops
from models.sync_batchnorm import update_running_statistics


def normalise_and_activate(rows: Tensor, bn: nn.modules.batchnorm._BatchNorm, slope: float = 0.0) -> Tensor:
    """LeakyReLU(bn(rows)) of rows (M, C), with `slope` below zero; running statistics are taken as by bn."""
    if not (bn.training and len(rows) > 1 and rows.device.type == "cpu" and neighbour_ops.HAS_NUMBA and type(bn) is nn.BatchNorm1d
            and rows.dtype == bn.weight.dtype):
        return F.leaky_relu(bn(rows), slope, inplace=True)
    out, mean, var = _NormalisedActivation.apply(rows, bn.weight, bn.bias, bn.eps, slope)
    update_running_statistics(bn, mean, var, len(rows))
    return out


class _NormalisedActivation(torch.autograd.Function):
    """Two passes for the statistics, one for the output; backwards one for the sums over the batch, one for the gradient at the rows."""

    @staticmethod
    def forward(ctx, rows, gamma, beta, eps, slope):
        from models.kernels import rows_numba

        rows = rows.contiguous()
        mean = rows.mean(0)
        var = rows_numba.squares(rows, mean) / len(rows)
        rstd = (var + eps).rsqrt()
        scale = gamma * rstd
        offset = beta - mean * scale
        ctx.save_for_backward(rows, mean, rstd, scale, offset)
        ctx.slope, ctx.kernels = slope, rows_numba
        ctx.mark_non_differentiable(mean, var)
        return rows_numba.activate(rows, scale, offset, slope), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _var):
        rows, mean, rstd, scale, offset = ctx.saved_tensors
        grad_rows, grad_beta, grad_gamma = ctx.kernels.activation_sums(grad, rows, mean, scale, offset, ctx.slope)
        grad_gamma *= rstd
        tilt = scale * rstd * grad_gamma / len(rows)  # of the gradient through the variance, along rows - mean
        ctx.kernels.subtract_affine(grad_rows, rows, tilt, scale * grad_beta / len(rows) - tilt * mean)
        return grad_rows, grad_gamma, grad_beta, None, None
