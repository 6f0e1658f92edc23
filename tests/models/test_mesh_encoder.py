"""models/mesh_encoder.py and mesh_convolution.py against an explicit formulation in float64, and their invariances."""

import pytest
import torch
from torch import nn

from models import mesh_encoder
from models.kernels import mesh_convolution, neighbour_ops
from models.kernels.mesh_convolution import MeshConvolution, Neighbours
from models.mesh_encoder import MeshNet
from models.sync_batchnorm import SyncBatchNorm, synchronise
from utils.engine import distributed

FACES = 14


def meshes(batch=3, faces=FACES, seed=0):
    """Random faces with unit normals and any neighbours, float64."""
    generator = torch.Generator().manual_seed(seed)
    continuous = torch.randn(batch, faces, 15, generator=generator, dtype=torch.float64)
    continuous[..., 12:] = nn.functional.normalize(continuous[..., 12:], dim=2)
    neighbours = torch.randint(faces, (batch, faces, 3), generator=generator).double()
    return torch.cat([continuous, neighbours], dim=2)


def norms(net):
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def make_net(training, scales=(0.5, 1.5), width=8, conv_width=5, mask_ratio=0.0, seed=1):
    """A float64 MeshNet whose BatchNorms are not trivial; their running statistics are those of a few random meshes."""
    torch.manual_seed(seed)
    net = MeshNet(6, width, 0.0, conv_width).double()
    for module in norms(net):
        module.momentum = 1.0
        nn.init.uniform_(module.weight, *scales)
        nn.init.normal_(module.bias, 0, 0.3)
    net(meshes(batch=8, seed=9))
    for module in norms(net):
        module.momentum = 0.1
    net.mask_ratio = mask_ratio
    return net.train(training)


@pytest.mark.parametrize("faces,found", [
    (torch.zeros(2, 18, 5), r"\(2, 18, 5\)"), (torch.zeros(5, 18), r"\(5, 18\)"), (torch.zeros(2, 0, 18), r"\(2, 0, 18\)"),
    (torch.zeros(2, 5, 18, dtype=torch.bfloat16), "bfloat16"),
])
def test_other_inputs_are_refused(faces, found):
    with pytest.raises(ValueError, match=found):
        MeshNet(6, width=8)(faces)


@pytest.mark.parametrize("training", [False, True])
def test_the_starting_corner_does_not_matter_but_the_orientation_does(training):
    faces, net = meshes(), make_net(training)
    turned = faces.clone()
    for mesh in range(len(faces)):
        for face in range(FACES):
            start = (mesh + 2 * face) % 3
            turned[mesh, face, 3:12] = faces[mesh, face, 3:12].view(3, 3).roll(-start, 0).flatten()
            turned[mesh, face, 15:] = faces[mesh, face, 15:].roll(-start)
    torch.testing.assert_close(net(turned), net(faces), rtol=0, atol=1e-9)
    flipped = faces.clone()
    flipped[..., 3:6], flipped[..., 6:9] = faces[..., 6:9], faces[..., 3:6]
    assert not torch.allclose(net(flipped), net(faces), atol=1e-3)


def test_no_mesh_sees_another_one_of_the_batch():
    faces, net = meshes(), make_net(False)
    alone = torch.cat([net(mesh[None]) for mesh in faces])
    torch.testing.assert_close(net(faces), alone, rtol=0, atol=1e-10)
    faces.requires_grad_()
    net(faces)[1].sum().backward()
    assert faces.grad[1].abs().sum() > 0 and faces.grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("value", [-1, FACES, float("nan"), float("inf")])
def test_neighbours_outside_of_their_mesh_are_refused(value):
    faces = meshes()
    faces[1, 4, 17] = value
    with pytest.raises(ValueError, match=rf"0 to {FACES - 1}, found .* at mesh 1 .* face 4, side 2"):
        MeshNet(6, width=8).double()(faces)


# The explicit formulation, on (B, C, F) and with every pair built


def around(features, neighbours):
    """(B, C, F) to (B, C, F, 3), the features of the neighbours (B, F, 3)."""
    return torch.stack([mesh[:, index] for mesh, index in zip(features, neighbours)])


def explicit_correlation(layer, normals, neighbours):
    alpha, beta = layer.weight_alpha[0], layer.weight_beta[0]
    vectors = torch.stack([alpha.sin() * beta.cos(), alpha.sin() * beta.sin(), alpha.cos()])  # (3, K, 4)
    four = torch.cat([normals[..., None], around(normals, neighbours)], dim=3)
    distance = (four[:, :, None, :, :, None] - vectors[None, :, :, None, None, :]).square().sum(dim=1)  # (B, K, F, 4, 4)
    return nn.functional.relu(layer.bn((distance / (-2 * layer.SIGMA**2)).exp().mean(dim=(3, 4))))


def explicit_convolution(layer, spatial, structural, neighbours):
    combined = nn.Sequential(*layer.combination_mlp)(torch.cat([spatial, structural], dim=1))
    own = structural[..., None].expand(-1, -1, -1, 3)
    pairs = layer.concat_mlp(torch.cat([own, around(structural, neighbours)], dim=1))
    return combined, nn.Sequential(*layer.aggregation_mlp)(pairs.amax(dim=3))


def explicit(net, faces):
    """What `net(faces)` stands for, with mask_ratio 0."""
    neighbours, columns = faces[..., 15:].long(), faces[..., :15].transpose(1, 2)
    structure, corners, normals = net.structural_descriptor, columns[:, 3:12], columns[:, 12:]
    pairs = torch.stack([corners[:, [(start + i) % 9 for i in range(6)]] for start in (0, 3, 6)], dim=3)  # (B, 6, F, 3)
    rotated = nn.Sequential(*structure.FRC.rotate_mlp)(pairs.flatten(2)).unflatten(2, (-1, 3)).mean(dim=3)
    parts = [nn.Sequential(*structure.FRC.fusion_mlp)(rotated), explicit_correlation(structure.FKC, normals, neighbours), normals]
    structural = nn.Sequential(*structure.structural_mlp)(torch.cat(parts, dim=1))
    spatial0 = nn.Sequential(*net.spatial_descriptor.spatial_mlp)(columns[:, :3])
    spatial1, structural = explicit_convolution(net.mesh_conv1, spatial0, structural, neighbours)
    spatial2, structural = explicit_convolution(net.mesh_conv2, spatial1, structural, neighbours)
    fused = nn.Sequential(*net.fusion_mlp)(torch.cat([spatial2, structural], dim=1))
    return net.head(nn.Sequential(*net.concat_mlp)(torch.cat([spatial1, spatial2, fused], dim=1)).amax(dim=2))


def twins(training, scales=(-1.0, 1.0), **sizes):
    """Two equal float64 encoders, BatchNorm scales of both signs or all of one."""
    return make_net(training, scales, **sizes), make_net(training, scales, **sizes)


def gradients_of(net, result):
    """Gradients by parameter name, for a loss that weighs every output differently."""
    weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view_as(result)
    gradients = torch.autograd.grad((result * weights).sum(), list(net.parameters()))
    return {name: gradient for (name, _), gradient in zip(net.named_parameters(), gradients)}


def assert_same_step(net, faces, result, plain_net, plain):
    torch.testing.assert_close(result, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients_of(net, result), gradients_of(plain_net, plain), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain_net.named_buffers()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scales", [(0.5, 1.5), (-1.5, -0.5), (-1.0, 1.0)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_gradients_and_statistics_are_those_of_the_explicit_formulation(compiled, training, scales, monkeypatch):
    if not compiled:
        monkeypatch.setattr(neighbour_ops, "HAS_NUMBA", False)
    net, plain_net = twins(training, scales)
    faces = meshes(batch=4)
    faces = torch.cat([faces, faces[:, [3, 3, 0, FACES - 1]]], dim=1)  # repeated ones, among neighbours as well
    faces[0, :, 15:] = torch.arange(FACES + 4)[:, None]  # every face its own neighbour
    faces[1, :, 16:] = torch.arange(FACES + 4)[:, None]
    faces[2, 2:6, 15], faces[2, 2:6, 16] = FACES + 1, 3
    inputs = [faces.clone().requires_grad_() for _ in range(2)]
    result, plain = net(inputs[0]), explicit(plain_net, inputs[1])
    for output, leaf in ((result, inputs[0]), (plain, inputs[1])):
        (output * torch.arange(24).view(4, 6)).sum().backward(retain_graph=True)
        assert leaf.grad[..., :15].abs().sum() > 0
    first = torch.tensor([*range(FACES), 3, 3, 0, FACES - 1])  # which of equal faces wins a maximum is a matter of rounding
    slopes = [leaf.grad[..., :15].new_zeros(4, FACES, 15).index_add_(1, first, leaf.grad[..., :15]) for leaf in inputs]
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-8)
    assert_same_step(net, faces, result, plain_net, plain)


@pytest.mark.parametrize("factor", [0.0, 1e6, 1e-20, torch.nan, torch.inf])
def test_compiled_passes_equal_the_plain_ones_on_hostile_rows(factor):
    mesh_numba = pytest.importorskip("models.kernels.mesh_numba", reason="needs Numba")
    torch.manual_seed(0)
    neighbours = Neighbours.of(torch.randint(6, (2, 6, 3)))
    both, grad, mean, level, slope = torch.randn(12, 8), torch.randn(12, 4), *torch.randn(3, 4)
    both[:6, :4] *= factor
    both[6:, 4:] = both[6, 4:]  # ties
    found, expected = (passes.strongest(both, mean, neighbours) for passes in (mesh_numba, mesh_convolution))
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    slopes = [passes.pair_gradients(grad, both, mean, expected[0], level, slope, neighbours) for passes in (mesh_numba, mesh_convolution)]
    torch.testing.assert_close(*slopes, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 2 * FACES * 256, 2**30])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch, elements):
    net, plain_net = twins(True)
    faces = meshes(batch=5)
    monkeypatch.setattr(mesh_encoder, "BLOCK_ELEMENTS", elements)
    assert_same_step(net, faces, net(faces), plain_net, explicit(plain_net, faces))


@pytest.mark.parametrize("processes", [1, 2])
def test_synchronised_statistics(monkeypatch, processes):
    net, plain_net = twins(True)
    synchronise(net)
    assert isinstance(net.mesh_conv1.concat_mlp[1], SyncBatchNorm)
    monkeypatch.setattr(distributed, "world", lambda: processes)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda values: processes * values)  # all with the same batch
    faces = meshes(batch=4)
    result, plain = net(faces), explicit(plain_net, faces)
    torch.testing.assert_close(result, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients_of(net, result), gradients_of(plain_net, plain), rtol=1e-7, atol=1e-8)
    means = [{name: b for name, b in n.named_buffers() if name.endswith("mean")} for n in (net, plain_net)]
    torch.testing.assert_close(*means, rtol=1e-10, atol=1e-10)


def test_large_offsets_keep_the_statistics_of_the_pairs():
    torch.manual_seed(0)
    layer, wide = MeshConvolution(3, 4, 5, 6), MeshConvolution(3, 4, 5, 6).double()
    with torch.no_grad():
        layer.concat_mlp[0].bias.add_(1000)
    wide.load_state_dict(layer.state_dict())
    structural, neighbours = torch.randn(60, 4) + 30, Neighbours.of(torch.randint(20, (3, 20, 3)))
    result, expected = layer.strongest_pairs(structural, neighbours), wide.strongest_pairs(structural.double(), neighbours)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-3)  # 1000 has a spacing of 6e-5


def pooled(net, faces):
    """The features before the maximum, and what the head received."""
    seen = {}
    hooks = [
        net.concat_mlp.register_forward_hook(lambda module, args, output: seen.update(features=output)),
        net.head.register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0])),
    ]
    net(faces)
    for hook in hooks:
        hook.remove()
    return seen["features"].unflatten(0, faces.shape[:2]), seen["pooled"]  # (B, F, width), (B, width)


@pytest.mark.parametrize("count,ratio,kept", [(100, 0.95, 5), (FACES, 0.5, 7), (4, 0.95, 1), (FACES, 0.0, FACES)])
def test_training_takes_the_maximum_over_a_random_share(count, ratio, kept):
    net, faces = make_net(True, mask_ratio=ratio), meshes(faces=count)
    torch.manual_seed(3)
    features, found = pooled(net, faces)
    torch.manual_seed(3)
    chosen = torch.randperm(count)[:kept]
    assert torch.equal(found, features[:, chosen].max(dim=1).values)
    assert torch.equal(found, features.max(dim=1).values) == (kept == count)
    state = torch.get_rng_state()
    features, found = pooled(net.eval(), faces)  # evaluation takes all faces and draws nothing
    assert torch.equal(found, features.max(dim=1).values) and torch.equal(torch.get_rng_state(), state)


def test_cpu_autocast_stays_close_and_trains():
    net, faces = make_net(False, conv_width=256).float(), meshes().float()
    assert net(faces[:, :1] * 0).shape == (3, 6) and net(faces).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(faces).float()
    torch.testing.assert_close(half, net(faces), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net.train()(faces).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())
