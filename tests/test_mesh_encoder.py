"""models/mesh_encoder.py against slow loops in float64, its invariances, and the public checkpoint's names."""

import math

import pytest
import torch
from torch import nn

from models.mesh_encoder import FaceKernelCorrelation, FaceRotateConvolution, MeshConvolution, MeshNet, gather_neighbours
from models.pretrained import load_meshnet_checkpoint

FACES = 14


def meshes(batch=3, faces=FACES, seed=0):
    """Random faces with unit normals and any neighbours, float64."""
    generator = torch.Generator().manual_seed(seed)
    continuous = torch.randn(batch, faces, 15, generator=generator, dtype=torch.float64)
    continuous[..., 12:] = nn.functional.normalize(continuous[..., 12:], dim=2)
    neighbours = torch.randint(faces, (batch, faces, 3), generator=generator).double()
    return torch.cat([continuous, neighbours], dim=2)


def encoder(training, mask_ratio=0.0, width=8, seed=1):
    """A float64 MeshNet whose BatchNorms are not trivial; their running statistics are those of a few random meshes."""
    torch.manual_seed(seed)
    net = MeshNet(6, width=width, mask_ratio=0.0).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    net(meshes(batch=8, seed=9))
    net.mask_ratio = mask_ratio
    return net.train(training)


def normalised(bn, values):
    """Evaluation-mode BatchNorm of a list of per-channel scalars, then ReLU."""
    statistics = (t.tolist() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return [max(0.0, (v - m) / math.sqrt(s + bn.eps) * w + b) for v, m, s, w, b in zip(values, *statistics, strict=True)]


def dense(mlp, values):
    """Evaluation-mode (convolution, BatchNorm, ReLU) triples applied to one vector, by loops."""
    for conv, bn in zip(mlp[0::3], mlp[1::3]):
        weight = conv.weight.flatten(1).tolist()
        outputs = [sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(weight, conv.bias.tolist())]
        values = normalised(bn, outputs)
    return values


def randomise(module, seed=2):
    torch.manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
    return module.double().eval()


def test_number_of_parameters_up_to_the_feature():
    net = MeshNet(256)
    assert sum(p.numel() for name, p in net.named_parameters() if not name.startswith("head.")) == 3_585_919
    assert net.head[0].weight.shape == (256, 1024) and net.head[0].bias is None


@pytest.mark.parametrize("training", [False, True])
def test_float32_shapes(training):
    net = MeshNet(6, width=8, mask_ratio=0.5).train(training)
    result = net(meshes(faces=1 if not training else FACES).float())
    assert result.shape == (3, 6) and result.dtype == torch.float32 and result.isfinite().all()


@pytest.mark.parametrize("faces,found", [
    (torch.zeros(2, 18, 5), r"\(2, 18, 5\)"), (torch.zeros(5, 18), r"\(5, 18\)"), (torch.zeros(2, 0, 18), r"\(2, 0, 18\)"),
    (torch.zeros(2, 5, 18, dtype=torch.bfloat16), "bfloat16"),
])
def test_other_inputs_are_refused(faces, found):
    with pytest.raises(ValueError, match=found):
        MeshNet(6, width=8)(faces)


@pytest.mark.parametrize("arguments", [{"mask_ratio": 1.0}, {"mask_ratio": -0.1}, {"width": 0}, {"embedding_dim": 0}])
def test_other_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="mask_ratio < 1, found"):
        MeshNet(**{"embedding_dim": 6, **arguments})


@pytest.mark.parametrize("training", [False, True])
def test_the_order_of_the_faces_does_not_matter(training):
    faces, net = meshes(), encoder(training)
    order = torch.stack([torch.randperm(FACES) for _ in faces])
    new_place = order.argsort(dim=1)
    moved = faces.gather(1, order[..., None].expand(-1, -1, 18)).clone()
    neighbours = moved[..., 15:].long()
    moved[..., 15:] = new_place.gather(1, neighbours.flatten(1)).view_as(neighbours).double()
    torch.testing.assert_close(net(moved), net(faces), rtol=0, atol=1e-9)
    moved[..., 15:] = neighbours.double()  # old indices now name other faces
    assert not torch.allclose(net(moved), net(faces), atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_the_starting_corner_does_not_matter_but_the_orientation_does(training):
    faces, net = meshes(), encoder(training)
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
    faces, net = meshes(), encoder(training=False)
    alone = torch.cat([net(mesh[None]) for mesh in faces])
    torch.testing.assert_close(net(faces), alone, rtol=0, atol=1e-10)
    faces.requires_grad_()
    net(faces)[1].sum().backward()
    assert faces.grad[1].abs().sum() > 0 and faces.grad[[0, 2]].abs().sum() == 0


def test_neighbours_are_gathered_per_sample():
    features = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    neighbours = torch.tensor([[[0, 1, 2], [3, 3, 3], [2, 0, 1], [1, 1, 0]], [[3, 2, 1], [0, 0, 0], [1, 2, 3], [2, 2, 2]]])
    gathered = gather_neighbours(features, neighbours)
    assert gathered.shape == (2, 3, 4, 3)
    for b, c, f, k in torch.cartesian_prod(*map(torch.arange, gathered.shape)).tolist():
        assert gathered[b, c, f, k] == features[b, c, neighbours[b, f, k]]


def test_kernel_correlation_by_hand():
    layer = FaceKernelCorrelation(num_kernels=2, sigma=0.2)
    with torch.no_grad():  # kernel 0: four times +z; kernel 1: +x, +y, -x, +z
        layer.weight_alpha.copy_(torch.tensor([[[0, 0, 0, 0], [math.pi / 2, math.pi / 2, math.pi / 2, 0]]]))
        layer.weight_beta.copy_(torch.tensor([[[0, 1, 2, 3], [0, math.pi / 2, math.pi, 0]]]))
    normals = torch.tensor([[[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [0, 0, 0]]]).transpose(1, 2)
    neighbours = torch.tensor([[[0, 0, 0], [0, 0, 0], [1, 1, 0], [3, 3, 3]]])
    zero = math.exp(-1 / 0.08)  # the zero normal of a face without area is at distance 1 from every vector
    expected = [[1, 0.75, 0.25, zero], [0.25, 0.1875, 0.125, zero]]
    torch.testing.assert_close(layer.correlate(normals, neighbours)[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_kernel_correlation_by_loops():
    layer, faces = randomise(FaceKernelCorrelation(num_kernels=5)), meshes(batch=2, faces=6)
    normals, neighbours = faces[..., 12:15].transpose(1, 2), faces[..., 15:].long()
    result, correlation = layer(normals, neighbours), layer.correlate(normals, neighbours)
    for b in range(2):
        for face in range(6):
            around = [faces[b, f, 12:15].tolist() for f in (face, *neighbours[b, face].tolist())]
            responses = []
            for alpha, beta in zip(layer.weight_alpha[0].tolist(), layer.weight_beta[0].tolist()):
                total = 0.0
                for a, c in zip(alpha, beta):
                    vector = (math.sin(a) * math.cos(c), math.sin(a) * math.sin(c), math.cos(a))
                    total += sum(math.exp(-math.dist(n, vector) ** 2 / (2 * 0.2**2)) for n in around)
                responses.append(total / 16)
            assert correlation[b, :, face].tolist() == pytest.approx(responses, abs=1e-12)
            assert result[b, :, face].tolist() == pytest.approx(normalised(layer.bn, responses), abs=1e-12)


def test_rotate_convolution_by_loops():
    layer, faces = randomise(FaceRotateConvolution()), meshes(batch=2, faces=4)
    result = layer(faces[..., 3:12].transpose(1, 2))
    for b in range(2):
        for face in range(4):
            v1, v2, v3 = faces[b, face, 3:12].view(3, 3).tolist()
            rotated = [dense(layer.rotate_mlp, pair) for pair in (v1 + v2, v2 + v3, v3 + v1)]
            mean = [sum(values) / 3 for values in zip(*rotated)]
            assert result[b, :, face].tolist() == pytest.approx(dense(layer.fusion_mlp, mean), abs=1e-12)


def test_mesh_convolution_by_loops():
    layer, faces = randomise(MeshConvolution(3, 4, 5, 6)), meshes(batch=2, faces=5)
    spatial, structural, neighbours = faces[..., :3], faces[..., 3:7], faces[..., 15:].long()
    combined, aggregated = layer(spatial.transpose(1, 2), structural.transpose(1, 2), neighbours)
    for b in range(2):
        for face in range(5):
            own = structural[b, face].tolist()
            pairs = [dense(layer.concat_mlp, own + structural[b, f].tolist()) for f in neighbours[b, face].tolist()]
            expected = dense(layer.aggregation_mlp, [max(values) for values in zip(*pairs)])
            assert aggregated[b, :, face].tolist() == pytest.approx(expected, abs=1e-12)
            expected = dense(layer.combination_mlp, spatial[b, face].tolist() + own)
            assert combined[b, :, face].tolist() == pytest.approx(expected, abs=1e-12)


def test_mesh_convolution_trains_like_the_plain_formulation():
    torch.manual_seed(0)
    layer = MeshConvolution(3, 4, 5, 6).double()
    faces = meshes(faces=9)
    structural, neighbours = faces[..., 3:7].transpose(1, 2), faces[..., 15:].long()
    result = layer(faces[..., :3].transpose(1, 2), structural, neighbours)[1]
    own = structural[..., None].expand(-1, -1, -1, 3)
    edges = layer.concat_mlp(torch.cat([own, gather_neighbours(structural, neighbours)], dim=1))
    torch.testing.assert_close(result, layer.aggregation_mlp(edges.amax(dim=3)), rtol=0, atol=1e-12)


def test_gradients_reach_every_parameter():
    net = encoder(training=False)
    net(meshes(batch=8)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


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
    return seen["features"], seen["pooled"]


@pytest.mark.parametrize("count,ratio,kept", [(100, 0.95, 5), (FACES, 0.5, 7), (4, 0.95, 1), (FACES, 0.0, FACES)])
def test_training_takes_the_maximum_over_a_random_share(count, ratio, kept):
    net, faces = encoder(training=True, mask_ratio=ratio), meshes(faces=count)
    torch.manual_seed(3)
    features, found = pooled(net, faces)
    torch.manual_seed(3)
    chosen = torch.randperm(count)[:kept]
    assert torch.equal(found, features[:, :, chosen].max(dim=2).values)
    assert torch.equal(found, features.max(dim=2).values) == (kept == count)


def test_evaluation_takes_the_maximum_over_all_faces_and_draws_nothing():
    net = encoder(training=False, mask_ratio=0.95)
    faces, state = meshes(), torch.get_rng_state()
    features, found = pooled(net, faces)
    assert torch.equal(found, features.max(dim=2).values)
    assert torch.equal(torch.get_rng_state(), state)


def test_repeated_faces_change_nothing_in_evaluation():
    net, faces = encoder(training=False), meshes()
    padded = torch.cat([faces, faces[:, [3, 3, 0, FACES - 1]]], dim=1)
    torch.testing.assert_close(net(padded), net(faces), rtol=0, atol=1e-10)


def test_cpu_autocast_stays_close():
    net, faces = encoder(training=False).float(), meshes().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(faces).float()
    assert half.isfinite().all()
    torch.testing.assert_close(half, net(faces), rtol=0.1, atol=0.1)


# The public checkpoint

BLOCKS = {
    "spatial_descriptor.spatial_mlp": [(64, 3, 1), (64, 64, 1)],
    "structural_descriptor.FRC.rotate_mlp": [(32, 6, 1), (32, 32, 1)],
    "structural_descriptor.FRC.fusion_mlp": [(64, 32, 1), (64, 64, 1)],
    "structural_descriptor.structural_mlp": [(131, 131, 1), (131, 131, 1)],
    "mesh_conv1.combination_mlp": [(256, 195, 1)], "mesh_conv1.concat_mlp": [(131, 262, 1, 1)],
    "mesh_conv1.aggregation_mlp": [(256, 131, 1)],
    "mesh_conv2.combination_mlp": [(512, 512, 1)], "mesh_conv2.concat_mlp": [(256, 512, 1, 1)],
    "mesh_conv2.aggregation_mlp": [(512, 256, 1)],
    "fusion_mlp": [(1024, 1024, 1)], "concat_mlp": [(1024, 1792, 1)],
}


def checkpoint(prefix="module."):
    """A state dict with the names and shapes of the public file, classifier included."""
    state = {f"structural_descriptor.FKC.weight_{angle}": torch.rand(1, 64, 4) for angle in ("alpha", "beta")}
    norms = {"structural_descriptor.FKC.bn": 64}
    for block, shapes in BLOCKS.items():
        for position, shape in enumerate(shapes):
            state[f"{block}.{3 * position}.weight"] = torch.randn(shape)
            state[f"{block}.{3 * position}.bias"] = torch.randn(shape[0])
            norms[f"{block}.{3 * position + 1}"] = shape[0]
    for norm, size in norms.items():
        state |= {f"{norm}.{name}": torch.rand(size) for name in ("weight", "bias", "running_mean", "running_var")}
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
    for layer, (c_out, c_in) in {0: (512, 1024), 3: (256, 512), 6: (40, 256)}.items():
        state |= {f"classifier.{layer}.weight": torch.randn(c_out, c_in), f"classifier.{layer}.bias": torch.randn(c_out)}
    return {prefix + key: value for key, value in state.items()}


def save(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_checkpoint_fills_everything_but_the_head(tmp_path, prefix):
    state, net = checkpoint(prefix), MeshNet(6)
    head = net.head[0].weight.clone()
    report = load_meshnet_checkpoint(net, save(state, tmp_path / "MeshNet.pkl"))
    own = net.state_dict()
    assert all(torch.equal(own[key.removeprefix(prefix)], value) for key, value in state.items() if "classifier" not in key)
    assert len(report.used) == len(state) - 6 and torch.equal(net.head[0].weight, head)
    assert len(report.skipped) == 6 and all("classifier." in line and "not used" in line for line in report.skipped)
    assert report.missing and all(name.startswith("head.") for name in report.missing)


def test_a_narrow_encoder_leaves_the_last_layers_out_and_says_so(tmp_path):
    net = MeshNet(6, width=64)
    report = load_meshnet_checkpoint(net, save(checkpoint(), tmp_path / "MeshNet.pkl"))
    assert any("fusion_mlp.0.weight: shape (1024, 1024, 1)" in line and "(64, 1024, 1)" in line for line in report.skipped)
    assert {name.split(".")[0] for name in report.missing} == {"fusion_mlp", "concat_mlp", "head"}


@pytest.mark.parametrize("lost", ["concat_mlp.0.weight", "structural_descriptor.FKC.weight_beta", "mesh_conv2.concat_mlp.1.bias"])
def test_a_checkpoint_without_one_tensor_fails_and_changes_nothing(tmp_path, lost):
    state, net = checkpoint(), MeshNet(6)
    del state["module." + lost]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"part.pkl.*lacks {lost}"):
        load_meshnet_checkpoint(net, save(state, tmp_path / "part.pkl"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_foreign_keys_fail(tmp_path):
    path = save({"module.conv1.0.weight": torch.zeros(64, 6, 1, 1), "classifier.0.weight": torch.zeros(2)}, tmp_path / "other.pkl")
    with pytest.raises(ValueError, match="other.pkl.*matches no parameter"):
        load_meshnet_checkpoint(MeshNet(6, width=8), path)
