"""The Triton kernels of EdgeConv against loops, the PyTorch operations and the reference layer.

Without a GPU the whole file runs a second time, in a subprocess, where Triton interprets the kernels on the CPU.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_edge_conv import assert_same, make_pair

from models.kernels import neighbour_ops
from models.kernels.knn import knn
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it while it is imported
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; test_interpreted_kernels runs it on the CPU")])
on_device = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [CUDA])


@pytest.fixture(autouse=True)
def _seed_and_full_precision(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the reference's convolution


@pytest.fixture
def kernels():
    from models.kernels import edge_conv_triton

    return edge_conv_triton


def make_layers(*sizes, device):
    """The reference on a device and a copy of it that uses the kernels."""
    reference, layer = (layer.to(device) for layer in make_pair(*sizes))
    layer.implementation = "triton"
    return reference, layer


def make_rows(clouds, points, k, repeats=False):
    """Random neighbours (clouds * points, k); without repeats all neighbours of a point differ."""
    lists = [torch.randint(points, (k,)) if repeats else torch.randperm(points)[:k] for _ in range(clouds * points)]
    return torch.stack(lists) + torch.arange(clouds).repeat_interleave(points).view(-1, 1) * points


def loop_max(u, rows, tied):
    """Values and rows of the winners, neighbour by neighbour."""
    best, row = torch.empty_like(u), torch.empty(u.shape, dtype=torch.long)
    for i, neighbours in enumerate(rows.tolist()):
        for c in range(u.shape[1]):
            row[i, c] = min(neighbours) if tied[c] else min(neighbours, key=lambda j: (-u[j, c].item(), j))
            best[i, c] = u[row[i, c], c]
    return best, row


def loop_sums(own, row, x, rows):
    """`transposed_sums`, edge by edge; row holds the winners."""
    near, incoming = torch.zeros_like(own), torch.zeros_like(x)
    for i, neighbours in enumerate(rows.tolist()):
        near[row[i], torch.arange(own.shape[1])] += own[i]
        for j in neighbours:
            incoming[j] += x[i]
    return near, incoming


# Clouds, points, k, channels of the maximum, channels of the sums, may a neighbour repeat. A tile of the maximum has
# 1024 / channels points by up to 128 channels; the sums read 32 entries of a list at a time.
SHAPES = [(2, 4, 3, 5, 3, False), (1, 5, 5, 2, 3, False), (1, 3, 100, 4, 2, True), (1, 1, 1, 1, 1, False),
          (1, 9, 2, 130, 3, True), (2, 2, 2, 128, 129, False)]


@pytest.mark.parametrize("shape, dtype", [(s, torch.float32) for s in SHAPES] + [(SHAPES[-2], torch.float64)], ids=str)
@on_device
def test_operations_equal_loops(kernels, device, shape, dtype):
    clouds, points, k, c_max, c_sum, repeats = shape
    rows = make_rows(clouds, points, k, repeats)
    u = torch.randn(len(rows), c_max, dtype=dtype).mul(2).round()  # many ties
    own, x = torch.randn_like(u), torch.randn(len(rows), c_sum, dtype=dtype)
    tied = torch.arange(c_max) % 4 == 1
    best, row = loop_max(u, rows, tied)
    near, incoming = loop_sums(own.double(), row, x.double(), rows)
    on = [tensor.to(device) for tensor in (u, rows, tied, own, x)]
    found_best, winner = kernels.neighbour_max(*on[:2], points, on[2])
    assert torch.equal(found_best.cpu(), best)
    assert torch.equal(rows.gather(1, winner.cpu().long()), row)
    found = kernels.transposed_sums(on[3], winner, on[4], on[1], points)
    expected = {"near": near, "incoming": incoming, "sum": x.double()[rows].sum(1)}
    for (name, value), tensor in zip(expected.items(), (*found, kernels.neighbour_sum(on[4], on[1]))):
        assert tensor.dtype == dtype, name
        torch.testing.assert_close(tensor.cpu().double(), value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name)
    terms, flat = torch.randn(2, c_max, dtype=dtype), row * c_max + torch.arange(c_max)
    gradients = kernels.edge_gradients(on[3].clone(), winner, on[0], on[3], *terms.to(device), on[1], points)
    plain = neighbour_ops.edge_gradients(own.clone(), flat, u, own, *terms, rows, points)
    torch.testing.assert_close([values.cpu() for values in gradients], list(plain), rtol=1e-4, atol=1e-4)
    assert kernels.transposed_sums(on[3], winner, None, on[1], points)[1] is None
    assert torch.equal(neighbour_ops.in_degrees(on[1]).cpu(), torch.bincount(rows.flatten(), minlength=len(rows)))


@on_device
def test_more_neighbours_than_a_byte_can_number(kernels, device):
    rows = torch.zeros(2, 260, dtype=torch.long, device=device)
    rows[:, 259] = 1
    u = torch.tensor([[1.0, 1.0], [2.0, 0.0]], device=device)
    best, slot = kernels.neighbour_max(u, rows, 2, torch.zeros(2, dtype=torch.bool, device=device))
    assert best.tolist() == [[2, 1], [2, 1]] and slot[:, 0].tolist() == [259, 259]
    near, incoming = kernels.transposed_sums(torch.ones_like(u), slot, u, rows, 2)
    assert near.tolist() == [[0, 2], [2, 0]] and incoming.tolist() == [[259 * 3, 259], [3, 1]]


@on_device
def test_hostile_neighbours_and_numbers(kernels, device):
    rows = torch.tensor([[0, 1], [2, -1], [1, 3]], device=device)  # those outside the points are not read
    u = torch.tensor([[1.0], [3.0], [2.0]], device=device)
    best, slot = kernels.neighbour_max(u, rows, 3, torch.zeros(1, dtype=torch.bool, device=device))
    assert best[0] == 3 and best[1:].isnan().all()
    assert kernels.neighbour_sum(u, rows).flatten().tolist() == [4, 2, 3]
    near, incoming = kernels.transposed_sums(u, slot, u, rows, 3)
    assert near.flatten().tolist() == [0, 1, 0] and incoming.flatten().tolist() == [1, 1 + 2, 3]  # two winners lie outside
    nan, inf = float("nan"), float("inf")
    u = torch.tensor([[nan, -inf, inf], [1.0, -inf, 2.0], [2.0, -inf, 3.0]], device=device)
    rows = torch.tensor([[0, 1], [1, 0], [2, 1]], device=device)
    best, slot = kernels.neighbour_max(u, rows, 3, torch.zeros(3, dtype=torch.bool, device=device))
    assert best.nan_to_num(-7.0, inf, -inf).tolist() == [[-7.0, -inf, inf], [-7.0, -inf, inf], [2.0, -inf, 3.0]]
    assert rows.gather(1, slot.long()).tolist() == [[0, 0, 0], [0, 0, 0], [2, 1, 2]]


@pytest.mark.parametrize("training, dtype", [(True, torch.float64), (True, torch.float32), (False, torch.float32)])
@on_device
def test_layer_equals_reference(device, training, dtype):
    layers = make_layers(3, 130, 5, dtype, device=device)
    x = (torch.randn(2, 5, 3, dtype=dtype) * 2 + 3).to(device)
    assert_same(*(layer.train(training) for layer in layers), x, knn(x, 5))


if not INTERPRETED:
    @needs_triton
    def test_interpreted_kernels():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    @needs_triton
    @pytest.mark.parametrize("kernel, constants", [
        ("_max_kernel", {"K": 20, "POINTS": 8, "BLOCK": 128}),
        ("_list_sum_kernel", {"K": 20, "WINNERS": True, "ENTRIES": 32, "BLOCK": 64}),
        ("_list_sum_kernel", {"K": 1, "WINNERS": False, "ENTRIES": 32, "BLOCK": 4})])
    def test_kernels_compile_without_a_gpu(kernel, constants, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        import triton
        from triton.backends.compiler import GPUTarget

        from models.kernels import edge_conv_triton

        function = getattr(edge_conv_triton, kernel)
        types = {"tied": "*i1", "slot": "*u8", "slots": "*u8", "rows": "*i64", "entries": "*i64", "starts": "*i64",
                 "count": "i32", "channels": "i32"} | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "*fp32") for name in function.arg_names}
        source = triton.compiler.ASTSource(function, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
        assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])  # no atomics, hence one order of summation

    @pytest.mark.parametrize("module, cause", [("triton", "found cpu, "), ("models.kernels.edge_conv_triton", "ModuleNotFoundError")])
    def test_kernels_that_do_not_run_are_an_error_that_names_the_way_out(monkeypatch, module, cause):
        if module != "triton":  # as without Triton
            monkeypatch.setitem(sys.modules, module, None)
        layer = make_layers(3, 4, 2, torch.float32, device="cpu")[1]
        with pytest.raises(UserError, match=f"(?s)model.edge_conv: triton needs .*{cause}.*set model.edge_conv to fused"):
            layer(torch.randn(1, 5, 3))
