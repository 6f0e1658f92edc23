"""models/kernels/neighbour_numba.py: the compiled reductions and the selection of neighbours against plain ones, hostile numbers included."""

import numpy as np
import pytest
import torch

from models.kernels import neighbour_ops
from models.kernels.batch_norm import normalise_and_activate
from models.kernels.knn import knn

compiled = pytest.importorskip("models.kernels.neighbour_numba", reason="Numba is not installed")
rows_numba = pytest.importorskip("models.kernels.rows_numba", reason="Numba is not installed")
CLOUDS, POINTS, K, CHANNELS = 7, 10, 4, 13


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def hostile_values(dtype):
    u = torch.randn(CLOUDS * POINTS, CHANNELS).mul(4).round().div(2).to(dtype)  # many ties
    u[20:40] = -u[20:40].abs()  # maxima of exactly zero, of both signs
    u[3, 3], u[4, 3], u[5, 4], u[6, 5] = 1e-45, -3e38, 3e38, torch.inf
    return u


def neighbours():
    clouds = torch.arange(CLOUDS * POINTS).div(POINTS, rounding_mode="floor").mul(POINTS)
    return torch.randint(0, POINTS, (CLOUDS * POINTS, K)) + clouds[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions_equal_the_plain_ones(threads, dtype):
    torch.manual_seed(0)
    u, rows, tied = hostile_values(dtype), neighbours(), torch.zeros(CHANNELS, dtype=torch.bool)
    tied[2] = True
    best, winner = compiled.neighbour_max(u, rows, POINTS, tied)
    plain_best, plain_winner = neighbour_ops.neighbour_max(u, rows, POINTS, tied)
    assert torch.equal(best, plain_best) and torch.equal(winner.long(), plain_winner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistics", [True, False])
def test_sums_over_edges_equal_those_of_autograd(threads, dtype, statistics):
    torch.manual_seed(0)
    u, v, own = (torch.randn(CLOUDS * POINTS, CHANNELS, dtype=dtype, requires_grad=True) for _ in range(3))
    rows, (level, slope) = neighbours(), torch.randn(2, CHANNELS, dtype=dtype) * statistics
    edges = u[rows] + v[:, None]  # (M, k, C)
    _, winner = neighbour_ops.neighbour_max(u.detach(), rows, POINTS, torch.zeros(CHANNELS, dtype=torch.bool))
    won = rows[:, :, None] == winner.div(CHANNELS, rounding_mode="floor")[:, None]
    won &= won.cumsum(1) == 1  # a neighbour may be there twice
    pulls = won * own[:, None] - level - slope * edges
    expected = torch.autograd.grad(edges, (u, v), pulls.detach())
    given = [values.detach() for values in (u, v)]
    for module in (compiled, neighbour_ops):
        torch.testing.assert_close(module.edge_squares(*given, rows), edges.detach().square().sum((0, 1), dtype=torch.float64), rtol=1e-5, atol=0)
        terms = (level, slope) if statistics else (None, None)
        found = module.edge_gradients(own.detach().clone(), winner, *given, *terms, rows, POINTS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-20, 1e6])
def test_hostile_edges_stay_in_their_channel_and_cloud(value):
    torch.manual_seed(0)
    u, v, own = torch.randn(3, CLOUDS * POINTS, CHANNELS)
    u[3, 2] = v[5, 2] = value
    rows, (level, slope) = neighbours(), torch.randn(2, CHANNELS)
    _, winner = neighbour_ops.neighbour_max(u, rows, POINTS, torch.zeros(CHANNELS, dtype=torch.bool))
    results = [module.edge_gradients(own.clone(), winner, u, v, level, slope, rows, POINTS) for module in (compiled, neighbour_ops)]
    for found, plain in zip(*results):
        torch.testing.assert_close(found[POINTS:], plain[POINTS:])
        torch.testing.assert_close(found[:POINTS, 3:], plain[:POINTS, 3:])
        assert torch.equal(found.isfinite(), plain.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_activation_and_its_gradients_equal_those_of_autograd(threads, dtype):
    torch.manual_seed(0)
    edge, grad = hostile_values(dtype).clamp(-100, 100), torch.randn(CHANNELS, CLOUDS * POINTS, dtype=dtype).T
    mean, scale, offset = torch.randn(3, CHANNELS, dtype=dtype)
    scale[0] = offset[0] = offset[1] = 0  # nothing but zeros, and zeros among others
    leaf = edge.clone().requires_grad_()
    normal = (leaf * scale + offset).requires_grad_()
    normal.retain_grad()
    out = torch.nn.functional.leaky_relu(normal, 0.2)
    out.backward(grad)
    expected = (leaf.grad, normal.grad.sum(0), (normal.grad * (edge - mean)).sum(0))
    for module in (compiled, neighbour_ops):
        torch.testing.assert_close(module.activate(edge, scale, offset, 0.2), out.detach())
        for found, true in zip(module.activation_sums(grad, edge, mean, scale, offset, 0.2), expected, strict=True):
            torch.testing.assert_close(found, true)


def test_a_maximum_over_a_nan_is_one():
    u, rows = torch.zeros(4, 2), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])
    u[2, 1] = torch.nan
    best, winner = compiled.neighbour_max(u, rows, 4, torch.zeros(2, dtype=torch.bool))
    assert best.isnan().tolist() == [[False, False], [False, True], [False, True], [False, False]]
    assert winner.min() >= 0 and winner.max() < u.numel()


def by_value_then_column(distances, k):
    distances = torch.where(distances.isnan(), torch.inf, distances)
    order = [np.lexsort((np.arange(distances.shape[1]), row)) for row in distances.numpy()]
    return torch.from_numpy(np.stack(order)[:, :k])


HOSTILE = {
    "zeros": torch.zeros, "three values": lambda *shape: torch.randint(0, 3, shape).float(), "tiny": lambda *s: torch.rand(s) * 1e-20,
    "huge": lambda *s: torch.rand(s) * 1e6, "all NaN": lambda *s: torch.full(s, torch.nan),
    "half NaN": lambda *s: torch.where(torch.rand(s) < 0.5, -torch.nan, torch.rand(s)), "negative": lambda *s: -torch.rand(s),
    "mostly infinite": lambda *s: torch.where(torch.rand(s) < 0.99, torch.inf, torch.rand(s)),
    "close in pairs": lambda *s: 1 + torch.rand(s[0], s[1] // 2).repeat_interleave(2, 1) * 1e-3, "float64": lambda *s: torch.rand(s).double() * 1e-300,
}


@pytest.mark.parametrize("k", [1, 8, 199, 200])
@pytest.mark.parametrize("kind", HOSTILE)
def test_the_smallest_are_exact_in_value_and_order(threads, kind, k):
    torch.manual_seed(1)
    distances = HOSTILE[kind](32, 200)
    found = compiled.smallest(distances, torch.zeros(32, dtype=distances.dtype), k)
    assert torch.equal(found, by_value_then_column(distances, k))


def test_offsets_change_the_search_not_the_result():
    torch.manual_seed(2)
    distances = torch.rand(20, 300) * 1e-4 - 5
    found = compiled.smallest(distances, torch.full((20,), 5.0), 10)
    assert torch.equal(found, by_value_then_column(distances, 10))


@pytest.mark.parametrize("points,k", [(128, 8), (256, 10), (1024, 20)])
def test_neighbours_equal_those_without_numba(points, k, monkeypatch):
    torch.manual_seed(3)
    x = torch.randn(2, points, 3)
    fast = knn(x, k)
    monkeypatch.setattr(neighbour_ops, "HAS_NUMBA", False)
    assert torch.equal(fast, knn(x, k))


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("rows", [2, 64, 150])
@pytest.mark.parametrize("biased", [False, True])
def test_normalisation_and_activation_equal_torchs_layers(threads, slope, rows, biased):
    torch.manual_seed(0)
    values = (torch.randn(rows, CHANNELS, dtype=torch.float64) * 3 + 100).requires_grad_()
    layers = [torch.nn.BatchNorm1d(CHANNELS).double() for _ in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    grad = torch.randn(CHANNELS, rows, dtype=torch.float64).T
    bias = torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True) if biased else None
    plain = lambda layer: torch.nn.functional.leaky_relu(layer(values + bias if biased else values), slope)
    found, expected = normalise_and_activate(values, layers[0], slope, bias), plain(layers[1])
    assert type(found.grad_fn).__name__ == "_NormalisedActivationBackward"
    torch.testing.assert_close(found, expected)
    sources = [(values, *layer.parameters(), *([bias] if biased else [])) for layer in layers]
    torch.testing.assert_close(torch.autograd.grad(found, sources[0], grad), torch.autograd.grad(expected, sources[1], grad))
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
    for layer in layers:
        layer.eval()
    torch.testing.assert_close(normalise_and_activate(values, layers[0], slope, bias), plain(layers[1]))


@pytest.mark.parametrize("value", [0.0, 1e6, 1e-20, torch.nan, torch.inf])
def test_normalisation_of_hostile_rows_equals_torchs_layers(value):
    torch.manual_seed(0)
    values, layers = torch.randn(64, CHANNELS), [torch.nn.BatchNorm1d(CHANNELS) for _ in range(2)]
    values[:, 0] = 1  # a column that does not vary
    values[3, 1] = value
    plain = torch.nn.functional.leaky_relu(layers[1](values), 0.2)
    torch.testing.assert_close(normalise_and_activate(values, layers[0], 0.2), plain, equal_nan=True, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), equal_nan=True, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_shared_work_is_done_once_and_its_failures_are_raised(threads, library, count, monkeypatch):
    if not library:
        monkeypatch.setattr(rows_numba, "_openmp", lambda: None)
    done = np.zeros(count, dtype=np.int64)

    def work(start, stop):
        done[start:stop] += 1

    rows_numba.share(count, work)
    assert (done == 1).all()
    if count:
        with pytest.raises(ZeroDivisionError):
            rows_numba.share(count, lambda start, stop: 1 // (start * 0))
