"""EdgeConv and k-NN against explicit loops, the reference implementation and finite differences."""

import copy

import pytest
import torch

from models.kernels.edge_conv import EdgeConv
from models.kernels.knn import BLOCK_BYTES, knn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_pair(c_in, c_out, k, dtype=torch.float64):
    """A reference layer with random BatchNorm parameters of both signs, and its fused copy."""
    reference = EdgeConv(c_in, c_out, k, "reference").to(dtype)
    with torch.no_grad():
        reference.bn.weight.copy_(torch.linspace(-1, 1, c_out) + 0.01)
        reference.bn.bias.normal_()
        reference.bn.running_mean.normal_()
        reference.bn.running_var.uniform_(0.5, 2)
    fused = copy.deepcopy(reference)
    fused.implementation = "fused"
    return reference, fused


def run(layer, x, index, weights):
    """Output, gradients and running statistics of one forward and backward."""
    x = x.clone().requires_grad_()
    out = layer(x, index)
    (out * weights).sum().backward()
    bn = layer.bn
    return {"out": out.detach(), "x": x.grad, "weight": layer.conv.weight.grad, "gamma": bn.weight.grad,
            "beta": bn.bias.grad, "running_mean": bn.running_mean, "running_var": bn.running_var,
            "batches": bn.num_batches_tracked}


def assert_same(reference, fused, x, index):
    weights = torch.randn(*x.shape[:2], reference.conv.out_channels, dtype=x.dtype, device=x.device)
    expected, found = run(reference, x, index, weights), run(fused, x, index, weights)
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=0.1) if value.is_floating_point() else 1
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert ((found[name] - value).abs().max() / scale).item() <= TOLERANCE[x.dtype], name


def loop_edge_conv(layer, x, index):
    """Eval-mode EdgeConv, edge by edge."""
    weight, bn = layer.conv.weight.flatten(1), layer.bn
    out = torch.empty(*x.shape[:2], weight.shape[0], dtype=x.dtype)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            edges = []
            for j in index[b, i].tolist():
                y = weight @ torch.cat((x[b, j] - x[b, i], x[b, i]))
                z = (y - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
                edges.append(torch.where(z > 0, z, 0.2 * z))
            out[b, i] = torch.stack(edges).amax(0)
    return out


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_eval_mode_equals_loops(implementation):
    layer = make_pair(3, 6, 4)[implementation == "fused"].eval()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    index = knn(x, 4)
    torch.testing.assert_close(layer(x, index), loop_edge_conv(layer, x, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch, points, c_in, c_out, k", [
    (3, 17, 5, 8, 4), (2, 9, 3, 6, 9), (2, 9, 3, 6, 1), (1, 2, 1, 1, 2), (1, 64, 32, 48, 20), (7, 33, 4, 16, 5)])
def test_fused_equals_reference(batch, points, c_in, c_out, k, training, dtype):
    reference, fused = make_pair(c_in, c_out, k, dtype)
    x = torch.randn(batch, points, c_in, dtype=dtype) * 2 + 3
    assert_same(reference.train(training), fused.train(training), x, knn(x, k))


@pytest.mark.parametrize("training", [True, False])
def test_zero_scales_and_neighbours_that_repeat_and_leave_out_the_point(training):
    layers = make_pair(3, 6, 5)
    with torch.no_grad():
        for layer in layers:
            layer.train(training).bn.weight[:3] = torch.tensor([0.0, -0.0, 0.0])
            layer.bn.momentum = None  # the mean over all batches
    assert_same(*layers, torch.randn(2, 12, 3, dtype=torch.float64), torch.randint(0, 4, (2, 12, 7)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_ties_go_to_the_lowest_index_in_both(training, dtype):
    layers = make_pair(3, 8, 6, dtype)
    with torch.no_grad():  # eighths times small integers: all arithmetic before BatchNorm is exact, so that maxima tie
        for layer in layers:
            layer.train(training).conv.weight.copy_(torch.arange(48).view(8, 6, 1, 1).remainder(5).sub(2) / 8)
    index = torch.stack([torch.randperm(24)[:6] for _ in range(48)]).view(2, 24, 6)
    assert_same(*layers, torch.randint(-1, 2, (2, 24, 3)).to(dtype), index)


def test_offset_far_from_the_origin_keeps_float32_accurate():
    exact, fused = make_pair(3, 16, 10)
    fused = fused.float()
    x = torch.randint(-512, 512, (2, 64, 3)).double() / 256 + 1000  # exact in float32 too
    index = knn(x, 10)
    assert (fused(x.float(), index) - exact(x, index)).abs().max() < 1e-5


def test_not_a_number_stays_visible_and_in_range():
    fused = make_pair(3, 6, 4, torch.float32)[1].eval()
    x = torch.randn(2, 12, 3)
    x[1, 5] = float("nan")
    x[0, 2] = float("inf")
    x.requires_grad_()
    out = fused(x, torch.arange(12).expand(2, 12, 12).contiguous())
    out.sum().backward()
    assert out.isnan().any()


def test_bfloat16_autocast_keeps_statistics_in_float32():
    reference, fused = make_pair(4, 8, 5, torch.float32)
    x = torch.randn(2, 16, 4)
    index = knn(x, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(x.bfloat16(), index)
        out.float().sum().backward()
    assert fused.bn.running_mean.dtype == torch.float32 and fused.conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), reference(x.bfloat16().float(), index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("x, index, message", [
    ((2, 5, 4), None, r"expects \(B, N, 3\)"), ((2, 5, 3), (2, 4, 2), "int64 neighbours"), ((2, 1, 3), None, "k = 2 with clouds of N = 1"),
    ((1, 1, 3), (1, 1, 1), "single edge")])
def test_bad_input(implementation, x, index, message):
    with pytest.raises(ValueError, match=message):
        EdgeConv(3, 4, 2, implementation)(torch.randn(x), None if index is None else torch.zeros(index, dtype=torch.long))
    with pytest.raises(ValueError, match="k = 0"):
        knn(torch.randn(2, 5, 3), 0)


def brute_force(x, k):
    """Distances in float64 by differences: (B, N, N), and the k nearest of each point."""
    distance = (x.double().unsqueeze(2) - x.double().unsqueeze(1)).square().sum(-1)
    return distance, distance.argsort(dim=-1, stable=True)[..., :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points, channels, k, block", [
    (40, 3, 8, 2**20), (40, 3, 40, 2**20), (33, 16, 5, 4 * 33 * 7), (5, 2, 1, 1)])
def test_knn_equals_brute_force(points, channels, k, block, dtype, monkeypatch):
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block)
    x = torch.randn(3, points, channels, dtype=dtype)
    assert torch.equal(knn(x, k), brute_force(x, k)[1])


@pytest.mark.parametrize("x", [
    torch.randint(-2**12, 2**12, (2, 64, 3), generator=torch.Generator().manual_seed(0)).float() / 2**12 + 1000,
    torch.randint(0, 2, (1, 30, 2), generator=torch.Generator().manual_seed(0)).float()], ids=["far from the origin", "duplicates"])
def test_knn_has_the_least_distances_and_no_point_twice(x):
    distance, expected = brute_force(x, 12)
    index = knn(x, 12)
    torch.testing.assert_close(distance.gather(2, index), distance.gather(2, expected), rtol=1e-4, atol=1e-6)
    assert all(len(set(row)) == 12 for row in index.flatten(0, 1).tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [True, False])
def test_cuda_equals_cpu(training):
    reference, fused = make_pair(16, 32, 8, torch.float32)
    x = torch.randn(4, 64, 16)
    index, weights = knn(x, 8), torch.randn(4, 64, 32)
    expected = run(reference.train(training), x, index, weights)
    found = run(fused.train(training).cuda(), x.cuda(), index.cuda(), weights.cuda())
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4)
