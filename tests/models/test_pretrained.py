"""Public weights: what is used and reported, and that nothing unfit ever leaves random weights in silence."""

import hashlib
import io
import re
from types import SimpleNamespace

import pytest
import torch
import torchvision

from models import DGCNN, MeshNet, ResNet18, pretrained
from models.pretrained import load_imagenet_resnet18, load_weights
from utils.errors import UserError

STATISTICS = ("weight", "bias", "running_mean", "running_var")


def norm(name, size, counters=True):
    state = {f"{name}.{key}": torch.rand(size) for key in STATISTICS}
    return state | ({f"{name}.num_batches_tracked": torch.tensor(7)} if counters else {})


def dgcnn_checkpoint(prefix="module.", counters=True):
    """A state dict with the keys and shapes of the public file, duplicates and classifier included."""
    shapes = [(64, 6, 1, 1), (64, 128, 1, 1), (128, 128, 1, 1), (256, 256, 1, 1), (1024, 512, 1)]
    state = {}
    for number, shape in enumerate(shapes, start=1):
        state[f"conv{number}.0.weight"] = torch.randn(shape)
        own = norm("", shape[0], counters)
        state |= {f"{name}{key}": value for name in (f"bn{number}", f"conv{number}.1") for key, value in own.items()}
    state |= {"linear1.weight": torch.randn(512, 2048), "linear3.bias": torch.randn(40)} | norm("bn6", 512, False)
    return {prefix + key: value for key, value in state.items()}


MESHNET_BLOCKS = {
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


def meshnet_checkpoint(prefix="module.", counters=True):
    """A state dict with the names and shapes of the public file, classifier included."""
    state = {f"structural_descriptor.FKC.weight_{angle}": torch.rand(1, 64, 4) for angle in ("alpha", "beta")}
    state |= norm("structural_descriptor.FKC.bn", 64, counters)
    for block, shapes in MESHNET_BLOCKS.items():
        for place, shape in zip(range(0, 6, 3), shapes):
            state |= {f"{block}.{place}.weight": torch.randn(shape), f"{block}.{place}.bias": torch.randn(shape[0])}
            state |= norm(f"{block}.{place + 1}", shape[0], counters)
    state |= {"classifier.0.weight": torch.randn(512, 1024), "classifier.0.bias": torch.randn(512)}
    return {prefix + key: value for key, value in state.items()}


# Per network: the encoder of a width, and the contents of its public file
NETWORKS = {"dgcnn": (lambda width: DGCNN(16, k=4, width=width), dgcnn_checkpoint), "meshnet": (lambda width: MeshNet(16, width), meshnet_checkpoint)}
networks = pytest.mark.parametrize("network", NETWORKS)


def save(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def unchanged(module, action, error, match):
    """The action fails with the message, and the module keeps every value."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=match):
        action()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def own_name(network, key):
    """The encoder's name of a key of the file, or None."""
    if network == "meshnet":
        return None if key.startswith("classifier.") else key
    layer, part, name = key.split(".", 2) if key.startswith("conv") else ("", "", "")
    if layer == "conv5":
        return f"conv5.{name}" if part == "0" else f"bn5.{name}"
    return f"edge_convs.{int(layer[4:]) - 1}.{'conv' if part == '0' else 'bn'}.{name}" if layer else None


@networks
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("counters", [True, False])
def test_a_checkpoint_fills_everything_but_the_head(tmp_path, network, prefix, counters):
    build, checkpoint = NETWORKS[network]
    state, encoder = checkpoint(prefix, counters), build(1024)
    head = encoder.head[0].weight.clone()
    report = load_weights(encoder, save(state, tmp_path / "public.t7"))
    names = {own_name(network, key.removeprefix(prefix)): value for key, value in state.items()}
    names.pop(None)
    own = encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in names.items())
    assert report.used == sorted(names) and len(report.used) + len(report.skipped) == len(state)
    assert torch.equal(encoder.head[0].weight, head)
    assert all(name.startswith("head.") or (not counters and name.endswith("tracked")) for name in report.missing)
    assert any("linear1.weight: not used" in line or "classifier.0.weight: not used" in line for line in report.skipped)
    assert f"{len(report.used)} tensors loaded" in report.summary()


@pytest.mark.parametrize("network,layers,shape", [("dgcnn", ("conv5", "bn5"), (1024, 512, 1)), ("meshnet", ("fusion_mlp", "concat_mlp"), (1024, 1024, 1))])
def test_a_narrow_encoder_leaves_the_last_layers_out_and_says_so(tmp_path, network, layers, shape):
    build, checkpoint = NETWORKS[network]
    report = load_weights(build(64), save(checkpoint(), tmp_path / "public.t7"))
    assert any(re.search(rf"{layers[0]}\.0\.weight: shape {re.escape(str(shape))}, the encoder's {layers[0]}\S* has \(64, ", found) for found in report.skipped)
    assert {name.split(".")[0] for name in report.missing} == {*layers, "head"}


@pytest.mark.parametrize("network,lost,name", [
    ("dgcnn", "conv3.0.weight", "edge_convs.2.conv.weight"), ("meshnet", "concat_mlp.0.weight", "concat_mlp.0.weight"),
    ("meshnet", "structural_descriptor.FKC.weight_beta", "structural_descriptor.FKC.weight_beta"),
    ("meshnet", "mesh_conv2.concat_mlp.1.bias", "mesh_conv2.concat_mlp.1.bias"),
])
def test_a_checkpoint_without_one_tensor_fails_and_changes_nothing(tmp_path, network, lost, name):
    build, checkpoint = NETWORKS[network]
    state, encoder = checkpoint(), build(1024)
    del state["module." + lost]
    path = save(state, tmp_path / "part.t7")
    unchanged(encoder, lambda: load_weights(encoder, path), UserError, f"part.t7.*lacks {name}")


@networks
def test_foreign_and_odd_files_fail_and_change_nothing(tmp_path, network):
    build, checkpoint = NETWORKS[network]
    encoder, path = build(64), tmp_path / "odd.t7"
    wrong_shape = checkpoint()
    first = "module.conv1.0.weight" if network == "dgcnn" else "module.spatial_descriptor.spatial_mlp.0.weight"
    wrong_shape[first] = torch.zeros(64, 12, 1, 1)
    for content, message in (
        ({"module.backbone.weight": torch.zeros(3), "classifier.0.weight": torch.zeros(2)}, "odd.t7.*matches no parameter"),
        (wrong_shape, r"shape \(64, 12, 1, 1\)"), (torch.zeros(3), "expected a flat state dict"), ([1, 2], "expected a flat state dict"),
        ({}, "expected a flat state dict"), ({"state_dict": {"a": torch.zeros(1)}}, "expected a flat state dict"),
        ({"a": SimpleNamespace(x=1)}, "odd.t7 is not a readable"),  # its code is not run
    ):
        save(content, path)
        unchanged(encoder, lambda: load_weights(encoder, path), UserError, message)
    content = save(checkpoint(), path).read_bytes()
    for keep in (0, 3, 1000, -1000):
        path.write_bytes(content[:keep])
        unchanged(encoder, lambda: load_weights(encoder, path), UserError, "odd.t7 is not a readable PyTorch checkpoint")
    with pytest.raises(UserError, match="nowhere.t7.*none"):
        load_weights(encoder, "nowhere.t7")


@pytest.fixture(scope="module")
def resnet_bytes():
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture
def served(tmp_path, monkeypatch, resnet_bytes):
    """A file under a hashed name in place of the download address; not there yet."""
    path = tmp_path / "served" / f"resnet18-{hashlib.sha256(resnet_bytes).hexdigest()[:8]}.pth"
    for folder in (path.parent, tmp_path / "pretrained"):
        folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path / "pretrained")
    monkeypatch.setattr(pretrained, "ResNet18_Weights", SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=path.as_uri())))
    return path


def resnet_encoder():
    with torch.device("meta"):  # initialising ten million numbers would take most of the time of these tests
        encoder = ResNet18(8)
    encoder.to_empty(device="cpu")
    for value in encoder.state_dict().values():
        value.fill_(3)
    return encoder


def test_a_download_loads_and_is_found_again_unless_damaged(served, tmp_path, resnet_bytes):
    served.write_bytes(resnet_bytes)
    encoder = resnet_encoder()
    report = load_weights(encoder, "imagenet")
    state = torch.load(io.BytesIO(resnet_bytes), weights_only=True)
    assert torch.equal(encoder.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert sorted(line.split(":")[0] for line in report.skipped) == ["fc.bias", "fc.weight"] and all(name.startswith("head.") for name in report.missing)
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "own.pth")
    unchanged(encoder, lambda: load_weights(encoder, str(tmp_path / "own.pth")), UserError,
              r"own.pth: the checkpoint lacks backbone\.layer2\.0\.conv1\.weight")
    served.unlink()
    cached, own = tmp_path / "home" / "hub" / "checkpoints" / served.name, tmp_path / "pretrained" / served.name
    for path in (cached, own):  # the cache, and the project's own folder, which comes first
        path.write_bytes(resnet_bytes)
        assert "conv1.weight" in load_imagenet_resnet18()
        path.write_bytes(resnet_bytes[:-1] + b"x")
        with pytest.raises(UserError, match=f"{path} is damaged: its SHA-256 should start with"):
            load_imagenet_resnet18()


@pytest.mark.parametrize("fault", ["not there", "wrong hash", "refused"])
def test_failed_download_says_what_to_fetch(served, tmp_path, resnet_bytes, monkeypatch, fault):
    if fault == "wrong hash":
        served.write_bytes(resnet_bytes + b"x")
    if fault == "refused":
        monkeypatch.setattr(pretrained.ResNet18_Weights.IMAGENET1K_V1, "url", f"http://127.0.0.1:1/{served.name}")
    assert torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.endswith("/resnet18-f37072fd.pth")  # as the README says
    encoder = resnet_encoder()
    unchanged(encoder, lambda: load_weights(encoder, "imagenet"), UserError,
              rf"Fetch {served.name} from .* put it at .*pretrained.*{served.name}.*`none`")
    assert not list(tmp_path.glob("home/hub/checkpoints/*"))


