"""models.kernels.small_maps: convolutions of small maps as products give what torch's convolution gives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.image_encoder import ResNet18
from models.kernels.small_maps import SmallMapConv2d, convolve


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("size", [(2, 2), (1, 1), (1, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_convolution(size, stride, memory_format):
    torch.manual_seed(0)
    maps = torch.randn(3, 4, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    expected, found = F.conv2d(maps, weight, stride=stride, padding=1), convolve(maps, weight, stride)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(torch.autograd.grad(found, (maps, weight), grad), torch.autograd.grad(expected, (maps, weight), grad)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("stages", [3, 4])
def test_the_image_encoder_is_the_plain_network_on_them(stages, monkeypatch):
    torch.manual_seed(0)
    encoder, images = ResNet18(16, stages=stages).double(), torch.randn(6, 3, 32, 32, dtype=torch.float64)
    assert [type(module) for module in encoder.modules()].count(SmallMapConv2d) == 4 * stages

    def run():
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        return {name: value.grad.clone() for name, value in encoder.named_parameters()}

    found = run()
    monkeypatch.setattr(SmallMapConv2d, "forward", nn.Conv2d.forward)
    for name, expected in run().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9, msg=name)
