"""models/: the memory bank against loops, the heads, and the encoders' shapes, symmetries and batch isolation."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional as F

from models import DGCNN, LinearClassifier, MemoryBank, MeshNet, ResNet18


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_update(rows, index, embeddings, momentum, renormalise):
    """Eq. 6 by plain Python on {sample: row}."""
    for i, vector in zip(index.tolist(), embeddings.tolist()):
        norm = math.sqrt(math.fsum(x * x for x in vector))
        fresh = [x / norm for x in vector]
        mixed = [momentum * m + (1 - momentum) * v for m, v in zip(rows[i], fresh)]
        norm = math.sqrt(math.fsum(x * x for x in mixed)) if renormalise else 1
        rows[i] = [x / norm for x in mixed]


# Memory bank, Eq. 6


def filled_bank():
    bank = MemoryBank(8, 5, 0.9)
    bank.fill(draw(8, 5, seed=9))
    return bank


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("renormalise", [True, False])
def test_updates_equal_loops(momentum, renormalise):
    bank, start = MemoryBank(12, 5, momentum, renormalise).double(), draw(12, 5, seed=9).double()
    bank.fill(start * 50)
    rows = dict(enumerate((start / start.norm(dim=1, keepdim=True)).tolist()))
    for step in range(20):
        index = torch.randperm(12, generator=torch.Generator().manual_seed(step))[:5]
        embeddings = draw(5, 5, seed=step) * 10.0 ** (step % 5 - 2)
        before, others = bank.memory.clone(), [i for i in range(12) if i not in index]
        bank.update(index, embeddings)
        slow_update(rows, index, embeddings, momentum, renormalise)
        assert torch.equal(bank.memory[others], before[others])
    expected = torch.tensor([rows[i] for i in range(12)], dtype=torch.float64)
    assert torch.allclose(bank.memory, expected, rtol=0, atol=1e-12)
    assert torch.allclose(bank.memory.norm(dim=1), torch.ones(12).double()) == (renormalise or momentum == 0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_rows_stay_unit_and_finite_for_opposite_embeddings(momentum):
    bank = MemoryBank(2, 3, momentum)
    bank.fill(torch.tensor([[1.0, 2, 2], [0, 0, 1]]))
    bank.update(torch.tensor([0, 1]), torch.tensor([[-3.0, -6, -6], [0, 0, -1e-6]]))
    assert torch.allclose(bank.memory.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_bank_is_a_float32_buffer_without_gradients(dtype):
    bank, embeddings = filled_bank(), draw(2, 5).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank.update(torch.tensor([0, 1]), embeddings * 2)
    assert not list(bank.parameters()) and bank.memory.dtype == torch.float32 and len(bank) == 8
    assert not bank.memory.requires_grad and not bank(torch.tensor([0])).requires_grad
    assert bank.memory[:2].norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("index,shape,error", [
    ([0, 1], (2, 4), ValueError), ([0, 1], (3, 5), ValueError), ([0], (5,), ValueError), ([[0]], (1, 5), ValueError),
    ([8], (1, 5), IndexError), ([-1], (1, 5), IndexError),
])
def test_bank_rejects_updates_and_keeps_its_rows(index, shape, error):
    bank = filled_bank()
    before = bank.memory.clone()
    with pytest.raises(error):
        bank.update(torch.tensor(index), torch.ones(shape))
    with pytest.raises(ValueError, match=r"\(8, 5\)"):
        bank.fill(torch.ones(7, 5))
    assert torch.equal(bank.memory, before)


def test_the_linear_classifier_starts_at_the_centroids_bias_free_and_scaled():
    head, centroids = LinearClassifier(5, 3, scale=7.0), draw(3, 5).double() * 4
    weight = head.weight
    head.start_from(centroids)
    assert dict(head.named_parameters()) == {"weight": weight} and weight.requires_grad and weight.dtype == torch.float32
    assert torch.allclose(weight, F.normalize(centroids, dim=1).float(), atol=1e-6)
    x = draw(4, 5)
    expected = [[7 * sum(a * b for a, b in zip(row, w)) for w in weight.tolist()] for row in x.tolist()]
    assert torch.allclose(head(x), torch.tensor(expected), atol=1e-5)
    with pytest.raises(ValueError, match=r"must be \(3, 5\)"):
        head.start_from(draw(4, 5))


# Encoders


def jolted(model):
    """Give BatchNorm statistics and weights arbitrary values, so that nothing holds by their initial ones alone."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 0, 1)
    return model.eval()


def point_encoder(edge_conv="fused"):
    torch.manual_seed(0)
    return jolted(DGCNN(16, k=5, width=24, edge_conv=edge_conv))


@pytest.mark.parametrize("stages,feature_dim", [(1, 64), (2, 128), (3, 256), (4, 512)])
def test_image_encoder_shapes_and_stages(stages, feature_dim):
    encoder = ResNet18(12, stages)
    assert encoder(draw(2, 3, 32, 32)).shape == (2, 12)
    assert encoder.head[0].in_features == feature_dim
    kept = {name.split(".")[1] for name, _ in encoder.named_parameters() if name.startswith("backbone.layer")}
    assert kept == {f"layer{i}" for i in range(1, stages + 1)}
    assert not any(name.startswith("backbone.fc") for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("build,shape", [
    (lambda: jolted(ResNet18(8, 3)), (4, 3, 32, 32)), (point_encoder, (4, 20, 3)),
    (lambda: point_encoder("reference"), (4, 20, 3)),
], ids=["images", "fused", "reference"])
def test_eval_mode_does_not_mix_samples(build, shape):
    encoder, x = build(), draw(*shape)
    with torch.no_grad():
        expected = encoder(x)
        alone = torch.cat([encoder(row[None]) for row in x])
        order = torch.tensor([2, 0, 3, 1])
        assert torch.allclose(alone, expected, atol=1e-5)
        assert torch.allclose(encoder(x[order]), expected[order], atol=1e-5)
    assert expected.std(dim=0).min() > 1e-4  # the samples do differ


@pytest.mark.parametrize("edge_conv", ["fused", "reference"])
@pytest.mark.parametrize("hostile", [0, 2])
@pytest.mark.parametrize("spoil", [lambda x: x * float("nan"), lambda x: x * 1e6, lambda x: x + 1e4, torch.zeros_like],
                         ids=["nan", "huge", "far", "zero"])
def test_a_broken_cloud_leaves_the_others_alone(edge_conv, hostile, spoil):
    encoder, x = point_encoder(edge_conv), draw(3, 20, 3)
    others = [i for i in range(3) if i != hostile]
    spoiled = x.clone()
    spoiled[hostile] = spoil(x[hostile])
    with torch.no_grad():
        assert torch.allclose(encoder(spoiled)[others], encoder(x)[others], atol=1e-4)


@pytest.mark.parametrize("edge_conv", ["fused", "reference"])
def test_point_encoder_ignores_the_order_of_points(edge_conv):
    encoder, x = point_encoder(edge_conv), draw(3, 40, 3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = encoder(x)
        assert torch.allclose(point_encoder("reference")(x), expected, atol=1e-3)
        assert torch.allclose(encoder(x[:, order]), expected, atol=1e-5)
        assert not torch.allclose(encoder(x[:, :, [1, 0, 2]]), expected, atol=1e-3)


@pytest.mark.parametrize("k", [4, 5])
def test_few_and_coinciding_points(k):
    encoder, x = DGCNN(16, k, width=8), draw(3, 1, 3).expand(3, 5, 3).contiguous().requires_grad_()
    embeddings = encoder(x)
    embeddings.square().sum().backward()
    assert embeddings.shape == (3, 16) and embeddings.isfinite().all() and x.grad.isfinite().all()
    with pytest.raises(ValueError, match=f"k = {k}.*N = {k - 1}"):
        encoder(draw(2, k - 1, 3))


ENCODERS = {"images": (lambda: ResNet18(8, 2), (2, 3, 32, 32)), "points": (lambda: DGCNN(8, 4, 8), (2, 12, 3)),
            "meshes": (lambda: MeshNet(8, 8), (2, 12, 18))}


@pytest.mark.parametrize("kind", ["images", "points"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_every_parameter(kind, autocast):
    encoder, x = ENCODERS[kind][0](), draw(*ENCODERS[kind][1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        embeddings = encoder(x)
    embeddings.float().square().sum().backward()
    assert embeddings.shape == (2, 8) and embeddings.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build,shape", ENCODERS.values(), ids=ENCODERS)
def test_no_encoder_waits_for_its_device(monkeypatch, build, shape, training):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # unknown to the device below
    with torch.device("meta"):  # has no values, so that whatever needs one on the host fails
        build().train(training)(torch.randn(shape)).sum().backward()
