"""3 x 3 convolutions of maps of at most 2 x 2 positions, as one matrix product: on a CPU several times faster than torch's."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 2  # positions along a side; torch's convolution is as fast on larger maps
TAPS = 9


def use_products(trunk: nn.Module) -> None:
    """Let the 3 x 3 convolutions of a network take small maps as products; its parameters, their names and values stay as they are."""
    for module in trunk.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            module.__class__ = SmallMapConv2d


class SmallMapConv2d(nn.Conv2d):
    """A 3 x 3 convolution with padding 1, without bias, groups or dilation."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, H', W')."""
        small = maps.device.type == "cpu" and max(maps.shape[2:]) <= LARGEST
        return convolve(maps, self.weight, self.stride) if small else super().forward(maps)


def convolve(maps: Tensor, weight: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
    """Convolve maps (B, C, H, W) with weight (O, C, 3, 3), padding 1; every position of the output is joined to every one of the input.

    Returns:
        (B, O, H', W') in channels-last order, H' = (H - 1) // stride + 1.
    """
    taps = _taps(tuple(maps.shape[2:]), stride)  # (H', W', H, W)
    kernels = F.pad(weight.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 0, 1))  # (O, 9 and a zero, C)
    joined = kernels.index_select(1, taps.flatten()).unflatten(1, (taps[..., 0, 0].numel(), -1))  # (O, H' W', H W, C)
    rows = F.linear(maps.permute(0, 2, 3, 1).flatten(1), joined.transpose(0, 1).flatten(2).flatten(0, 1))  # (B, H' W' O)
    return rows.unflatten(1, (*taps.shape[:2], -1)).permute(0, 3, 1, 2)


@cache
def _taps(size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Return the tap between every position of the output and of the input, `TAPS` for none, (H', W', H, W) int64."""
    down, across = (torch.arange(length)[None] - torch.arange(0, length, step)[:, None] + 1 for length, step in zip(size, stride))
    rows, columns = down[:, None, :, None], across[None, :, None, :]
    inside = (rows >= 0) & (rows < 3) & (columns >= 0) & (columns < 3)
    return torch.where(inside, 3 * rows + columns, TAPS)
