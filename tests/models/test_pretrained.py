"""Public weights: what is used and reported, and that nothing unfit ever leaves random weights in silence."""

import functools
import hashlib
import http.server
import io
import threading
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from models import pretrained
from models.kernels.edge_conv import EdgeConv
from models.pretrained import load_dgcnn_checkpoint, load_imagenet_resnet18, load_matching, load_resnet18_weights
from utils.errors import UserError

CHANNELS = ((3, 64), (64, 64), (64, 128), (128, 256))


def dgcnn(width):
    """The names of the point encoder, at a given width of conv5."""
    encoder = nn.Module()
    encoder.edge_convs = nn.ModuleList(EdgeConv(c_in, c_out, 20) for c_in, c_out in CHANNELS)
    encoder.conv5, encoder.bn5 = nn.Conv1d(512, width, 1, bias=False), nn.BatchNorm1d(width)
    encoder.head = nn.Sequential(nn.Linear(2 * width, 32, bias=False), nn.BatchNorm1d(32))
    return encoder


def dgcnn_checkpoint(prefix="module.", counters=True):
    """A state dict with the keys and shapes of the public file, duplicates and classifier included."""
    shapes = [(64, 6, 1, 1), (64, 128, 1, 1), (128, 128, 1, 1), (256, 256, 1, 1), (1024, 512, 1)]
    state = {}
    for number, shape in enumerate(shapes, start=1):
        state[f"conv{number}.0.weight"] = torch.randn(shape)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = torch.rand(shape[0])
            state[f"bn{number}.{name}"] = tensor
            state[f"conv{number}.1.{name}"] = tensor
        if counters:
            state[f"bn{number}.num_batches_tracked"] = torch.tensor(7)
            state[f"conv{number}.1.num_batches_tracked"] = torch.tensor(7)
    state |= {"linear1.weight": torch.randn(512, 2048), "linear2.weight": torch.randn(256, 512),
              "linear2.bias": torch.randn(256), "linear3.weight": torch.randn(40, 256), "linear3.bias": torch.randn(40)}
    state |= {f"bn{n}.{name}": torch.rand(size) for n, size in ((6, 512), (7, 256))
              for name in ("weight", "bias", "running_mean", "running_var")}
    return {prefix + key: value for key, value in state.items()}


def save(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def unchanged(module, action, error, match):
    """The action fails with the message, and the module keeps every value."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=match):
        action()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("counters", [True, False])
def test_dgcnn_checkpoint_fills_the_trunk(tmp_path, prefix, counters):
    state = dgcnn_checkpoint(prefix, counters)
    encoder = dgcnn(1024)
    head = encoder.head[0].weight.clone()
    report = load_dgcnn_checkpoint(encoder, save(state, tmp_path / "model.1024.t7"))
    for number in range(4):
        layer = encoder.edge_convs[number]
        assert torch.equal(layer.conv.weight, state[f"{prefix}conv{number + 1}.0.weight"])
        assert torch.equal(layer.bn.running_var, state[f"{prefix}conv{number + 1}.1.running_var"])
    assert torch.equal(encoder.conv5.weight, state[prefix + "conv5.0.weight"])
    assert torch.equal(encoder.bn5.bias, state[prefix + "conv5.1.bias"])
    assert torch.equal(encoder.head[0].weight, head)
    assert len(report.used) == 5 * (6 if counters else 5)
    assert len(report.used) + len(report.skipped) == len(state)
    assert any(line.startswith(prefix + "linear1.weight") for line in report.skipped)
    assert "head.0.weight" in report.missing
    assert ("edge_convs.0.bn.num_batches_tracked" in report.missing) == (not counters)
    assert f"{len(report.used)} tensors loaded" in report.summary()


def test_dgcnn_of_another_width_leaves_conv5_out_and_says_so(tmp_path):
    encoder = dgcnn(256)
    report = load_dgcnn_checkpoint(encoder, save(dgcnn_checkpoint(), tmp_path / "model.1024.t7"))
    assert "conv5.weight" in report.missing and "edge_convs.3.conv.weight" in report.used
    assert any("conv5.0.weight: shape (1024, 512, 1)" in line and "(256, 512, 1)" in line for line in report.skipped)


def test_the_real_encoder_takes_the_checkpoint(tmp_path):
    models = pytest.importorskip("models")
    encoder = models.DGCNN(16, k=4)
    report = load_dgcnn_checkpoint(encoder, save(dgcnn_checkpoint(), tmp_path / "model.1024.t7"))
    assert len(report.used) == 30 and all(name.startswith("head.") for name in report.missing)


def test_foreign_keys_fail(tmp_path):
    encoder = dgcnn(64)
    path = save({"module.backbone.weight": torch.zeros(3)}, tmp_path / "other.t7")
    unchanged(encoder, lambda: load_dgcnn_checkpoint(encoder, path), ValueError, "other.t7.*matches no parameter")


def test_a_checkpoint_without_one_layer_fails_and_changes_nothing(tmp_path):
    state = dgcnn_checkpoint()
    del state["module.conv3.0.weight"]
    encoder = dgcnn(1024)
    path = save(state, tmp_path / "part.t7")
    unchanged(encoder, lambda: load_dgcnn_checkpoint(encoder, path), ValueError, r"lacks edge_convs\.2\.conv\.weight")


def test_a_layer_of_another_shape_fails(tmp_path):
    state = dgcnn_checkpoint()
    state["module.conv1.0.weight"] = torch.zeros(64, 12, 1, 1)
    encoder = dgcnn(1024)
    path = save(state, tmp_path / "normals.t7")
    unchanged(encoder, lambda: load_dgcnn_checkpoint(encoder, path), ValueError, r"\(64, 12, 1, 1\)")


@pytest.mark.parametrize("keep", [0, 3, 1000, -1000])
def test_truncated_file(tmp_path, keep):
    path = save(dgcnn_checkpoint(), tmp_path / "cut.t7")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut.t7 is not a readable PyTorch checkpoint"):
        load_dgcnn_checkpoint(dgcnn(64), path)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {}, {"state_dict": {"a": torch.zeros(1)}}])
def test_not_a_state_dict(tmp_path, content):
    with pytest.raises(ValueError, match="expected a flat state dict"):
        load_dgcnn_checkpoint(dgcnn(64), save(content, tmp_path / "odd.t7"))


def test_code_in_a_file_is_not_run(tmp_path):
    path = save({"a": SimpleNamespace(x=1)}, tmp_path / "code.t7")
    with pytest.raises(ValueError, match="not a readable"):
        load_dgcnn_checkpoint(dgcnn(64), path)


def test_absent_file():
    with pytest.raises(UserError, match="nowhere.t7.*none"):
        load_dgcnn_checkpoint(dgcnn(64), "nowhere.t7")


def test_load_matching_copies_in_place_and_reports():
    layer = nn.Linear(2, 3)
    weight = layer.weight
    state = {"module.w": torch.ones(3, 2), "bias": torch.ones(4), "extra": torch.ones(1)}
    rename = {"w": "weight", "bias": "bias"}.get
    report = load_matching(layer, state, rename, ["weight"])
    assert layer.weight is weight and torch.equal(weight, torch.ones(3, 2))
    assert (report.used, report.missing) == (["weight"], ["bias"])
    assert report.skipped[0].startswith("bias: shape (4,)") and report.skipped[1].startswith("extra:")


@pytest.fixture(scope="module")
def resnet_bytes():
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch, resnet_bytes):
    """A local stand-in for the download address; yields a function that serves bytes under a hashed name."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=folder)
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path / "pretrained")
    name = f"resnet18-{hashlib.sha256(resnet_bytes).hexdigest()[:8]}.pth"
    url = f"http://127.0.0.1:{running.server_port}/{name}"
    monkeypatch.setattr(pretrained, "ResNet18_Weights", SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url)))
    yield SimpleNamespace(folder=folder, name=name, url=url, home=tmp_path / "home", local=tmp_path / "pretrained")
    running.shutdown()
    running.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def resnet_encoder():
    encoder = nn.Module()
    with torch.device("meta"):  # initialising ten million numbers would take most of the time of these tests
        encoder.backbone = torchvision.models.resnet18(weights=None)
    encoder.backbone.fc = nn.Identity()
    encoder.to_empty(device="cpu")
    for value in encoder.state_dict().values():
        value.fill_(3)
    return encoder


def test_download_loads_and_is_found_again(server, resnet_bytes):
    (server.folder / server.name).write_bytes(resnet_bytes)
    encoder = resnet_encoder()
    report = load_resnet18_weights(encoder, "imagenet")
    state = torch.load(io.BytesIO(resnet_bytes), weights_only=True)
    assert torch.equal(encoder.backbone.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert sorted(line.split(":")[0] for line in report.skipped) == ["fc.bias", "fc.weight"] and not report.missing
    (server.folder / server.name).unlink()
    load_imagenet_resnet18()  # from the cache
    cached = server.home / "hub" / "checkpoints" / server.name
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        load_imagenet_resnet18()


def test_file_in_the_pretrained_folder_comes_first_and_is_checked(server, resnet_bytes):
    server.local.mkdir()
    (server.local / server.name).write_bytes(resnet_bytes)
    assert "conv1.weight" in load_imagenet_resnet18()
    (server.local / server.name).write_bytes(resnet_bytes[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged: its SHA-256 should start with"):
        load_imagenet_resnet18()


@pytest.mark.parametrize("fault", ["404", "wrong hash", "truncated", "refused"])
def test_failed_download_says_what_to_fetch(server, resnet_bytes, monkeypatch, fault):
    if fault == "wrong hash":
        (server.folder / server.name).write_bytes(resnet_bytes + b"x")
    if fault == "truncated":
        (server.folder / server.name).write_bytes(resnet_bytes)
        monkeypatch.setattr(QuietHandler, "copyfile", lambda self, source, out: out.write(source.read()[:5000]))
    if fault == "refused":
        url = f"http://127.0.0.1:1/{server.name}"
        monkeypatch.setattr(pretrained.ResNet18_Weights.IMAGENET1K_V1, "url", url)
    encoder = resnet_encoder()
    unchanged(encoder, lambda: load_resnet18_weights(encoder, "imagenet"), UserError,
              rf"Fetch {server.name} from http.* put it at .*pretrained.*{server.name}.*`none`")
    checkpoints = server.home / "hub" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_the_true_address_carries_the_documented_file_name():
    assert torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.endswith("/resnet18-f37072fd.pth")


def test_resnet_from_a_path(tmp_path, resnet_bytes):
    path = tmp_path / "own.pth"
    path.write_bytes(resnet_bytes)
    assert not load_resnet18_weights(resnet_encoder(), str(path)).missing
    state = torch.load(path, weights_only=True)
    del state["layer2.0.conv1.weight"]
    torch.save(state, path)
    encoder = resnet_encoder()
    unchanged(encoder, lambda: load_resnet18_weights(encoder, str(path)), ValueError,
              r"own.pth: the checkpoint lacks layer2\.0\.conv1\.weight")
