"""The linear layer on many rows: 1 x 1 convolutions against the plain product."""

import pytest
import torch
from torch.nn import functional as F

from models.kernels.linear import MAPS, linear, linear_of_parts, weight_gradient


def case(rows, sizes, c_out=7, dtype=torch.float32):
    torch.manual_seed(0)
    parts = [torch.randn(rows, 2 * size, dtype=dtype)[:, ::2].requires_grad_() for size in sizes]  # not contiguous
    return parts, torch.randn(c_out, sum(sizes), dtype=dtype, requires_grad=True), torch.randn(c_out, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("rows", [1, MAPS, MAPS + 1, 20 * MAPS])
@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_the_plain_product(rows, sizes, dtype):
    parts, weight, bias = case(rows, sizes, dtype=dtype)
    leaves = [weight, bias, *parts]
    results = [linear_of_parts(parts, weight, bias), F.linear(torch.cat(parts, 1), weight, bias)]
    pull = torch.randn_like(results[0]).T.contiguous().T
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(result, leaves, pull) for result in results), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight_gradient(pull, parts[0]), pull.T @ parts[0], rtol=1e-4, atol=1e-4)
    plain = linear_of_parts(parts, weight), linear_of_parts([part.detach() for part in parts], weight)
    assert torch.equal(*plain) and plain[1].requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-20, 1e30])
def test_hostile_rows_stay_in_their_row(value):
    (rows,), weight, _ = case(4 * MAPS, (5,))
    rows = rows.detach().clone()
    rows[3] = value
    with torch.no_grad():
        torch.testing.assert_close(linear(rows, weight), F.linear(rows, weight), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_equal_rows_give_equal_bits():
    rows = torch.randn(1, 64).expand(37 * MAPS, 64)
    assert len(linear(rows, torch.randn(131, 64)).unique(dim=0)) == 1


def test_autocast_takes_the_plain_product():
    parts, weight, bias = case(2 * MAPS, (3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_of_parts(parts, weight, bias)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    torch.testing.assert_close(weight.grad, torch.cat([part.sum(0) for part in parts]).expand(7, 7).detach(), rtol=0.05, atol=0.1)
