"""BatchNorm and the (leaky) ReLU behind it, on rows: in fewer passes on a CPU with Numba, by torch's layers elsewhere."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels import neighbour_ops
from models.sync_batchnorm import update_running_statistics


def is_compiled(rows: Tensor, bn: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether `normalise_and_activate` takes its own passes over such rows."""
    here = rows.device.type == "cpu" and neighbour_ops.HAS_NUMBA and not torch.is_autocast_enabled("cpu")
    return here and bn.training and len(rows) > 1 and type(bn) is nn.BatchNorm1d and rows.dtype == bn.weight.dtype


def normalise_and_activate(rows: Tensor, bn: nn.modules.batchnorm._BatchNorm, slope: float = 0.0, bias: Tensor | None = None) -> Tensor:
    """LeakyReLU(bn(rows + bias)) of rows (M, C), with `slope` below zero; running statistics are taken as by bn.

    Args:
        bias: (C,); compiled, it costs no pass: the mean of the batch takes it away again, and its gradient is 0.
    """
    if not is_compiled(rows, bn):
        return F.leaky_relu(bn(rows if bias is None else rows + bias), slope, inplace=True)
    beta = bn.bias if bias is None else bn.bias + 0 * bias
    out, mean, var = _NormalisedActivation.apply(rows, bn.weight, beta, bn.eps, slope)
    update_running_statistics(bn, mean if bias is None else mean + bias, var, len(rows))
    return out


class _NormalisedActivation(torch.autograd.Function):
    """One pass for the statistics, one for the output; backwards one for the sums over the batch, one for the gradient at the rows."""

    @staticmethod
    def forward(ctx, rows, gamma, beta, eps, slope):
        from models.kernels import rows_numba

        rows = rows.contiguous()
        mean, var = rows_numba.mean_and_variance(rows)
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
        grad = grad.contiguous()
        grad_beta, grad_gamma = ctx.kernels.gradient_sums(grad, rows, mean, scale, offset, ctx.slope)
        grad_gamma *= rstd
        tilt = scale * rstd * grad_gamma / len(rows)  # of the gradient through the variance, along rows - mean
        shift = scale * grad_beta / len(rows) - tilt * mean
        grad_rows = ctx.kernels.gradient_at_rows(grad, rows, scale, offset, tilt, shift, ctx.slope)
        return grad_rows, grad_gamma, grad_beta, None, None
