"""Batch normalisation over the batches of all processes, on any backend (torch's own needs CUDA). Used with torchrun."""

import torch
from torch import Tensor, nn

from utils.engine import distributed


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of (B, C, ...) whose training statistics cover all processes; everything else as torch's BatchNorm."""

    def _check_input_dim(self, values: Tensor) -> None:
        """Take any number of axes; torch's own classes are for one number each."""

    def forward(self, values: Tensor) -> Tensor:
        """Normalise (B, C, ...); the local batches may differ in size."""
        if not self.training or distributed.world() == 1:
            return super().forward(values)
        shape = [1, -1] + [1] * (values.dim() - 2)
        axes = [axis for axis in range(values.dim()) if axis != 1]
        wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        totals = torch.cat([wide.sum(axes), wide.new_tensor([wide.numel() / wide.shape[1]])])
        totals = distributed.sum_over_processes(totals)
        count = totals[-1]
        mean = totals[:-1] / count
        centred = wide - mean.view(shape)
        variance = distributed.sum_over_processes(centred.square().sum(axes)) / count
        update_running_statistics(self, mean, variance, count)
        normalised = centred * (variance + self.eps).rsqrt().view(shape)
        return (normalised * self.weight.view(shape) + self.bias.view(shape)).to(values.dtype)


@torch.no_grad()
def update_running_statistics(bn: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, count: int | Tensor) -> None:
    """Take a batch into the running statistics of a BatchNorm as torch does, without waiting for the device.

    Args:
        mean: (C,) of the batch; variance: (C,), biased; count: values per channel, at least 2.
    """
    bn.num_batches_tracked.add_(1)
    factor = bn.num_batches_tracked.to(bn.running_mean.dtype).reciprocal() if bn.momentum is None else bn.momentum
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), factor)
    bn.running_var.lerp_((variance * (count / (count - 1))).to(bn.running_var.dtype), factor)


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm1d and BatchNorm2d inside a module, in place, keeping parameters, buffers and their names."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            replacement = SyncBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement)
        else:
            synchronise(child)
    return module
