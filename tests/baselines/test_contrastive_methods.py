"""SCL, RONO and MRL against slow loops in float64."""

import numpy as np
import pytest
import torch
from compared import CLASSES, NAMES, context_of, pairs, standard, unit_codes
from torch.nn import functional as F

from baselines.mrl import MRL, robust_clustering
from baselines.rono import RONO, progress
from baselines.scl import SCL, Critic, contrastive
from losses import ModalityInvarianceLoss

FEATURES, LABELS = pairs(40)
INDEX = torch.tensor([3, 17, 31, 8])


def test_contrast_of_scl_leaves_the_positive_out_of_the_denominator():
    first, second = unit_codes(4, 6)
    rows = torch.cat([first, second]).numpy()
    wanted, with_positive = 0.0, 0.0
    for p in range(8):
        q = (p + 4) % 8
        scores = {n: np.exp(rows[p] @ rows[n] / 0.5) for n in range(8) if n != p}
        wanted -= np.log(scores[q] / sum(value for n, value in scores.items() if n != q)) / 8
        with_positive -= np.log(scores[q] / sum(scores.values())) / 8
    assert contrastive(first, second, 0.5).item() == pytest.approx(wanted, rel=1e-12)
    assert ModalityInvarianceLoss(0.5)(torch.stack([first, second])).item() == pytest.approx(2 * with_positive, rel=1e-12)  # NT-Xent
    assert contrastive(first, first, 0.05).item() < 0  # NT-Xent is never below 0


def joined_score(critic, x, z):
    """D(x, z) of one input and one code, joined."""
    *reading, last = critic.inputs
    joined = torch.cat([torch.nn.Sequential(*reading)(x), z])
    return critic.score(F.linear(joined, torch.cat([last.weight, critic.codes.weight], 1), last.bias)).squeeze()


def test_losses_of_scl():
    torch.manual_seed(0)
    method = SCL(context_of("scl", FEATURES, dtype=torch.float64, dim=6, settings={"critic_width": 5})).double().eval()
    embeddings = {name: torch.randn(4, 6, dtype=torch.float64) for name in NAMES}
    first, second = (method.represent(name, rows) for name, rows in embeddings.items())
    layer = method.shared
    for name, code in zip(NAMES, (first, second)):
        hidden = np.maximum(np.maximum(embeddings[name].numpy(), 0) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
        assert np.allclose(code.detach().numpy(), hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), 1e-12))
    information = 0.0
    for name in NAMES:
        inputs = torch.as_tensor(standard(FEATURES[name]))[INDEX]
        for code in (first, second):
            for i in range(4):
                scores = torch.stack([joined_score(method.critics[name], inputs[j], code[i]) for j in range(4)])
                information -= scores.log_softmax(0)[i].item() / 16
    invariance = (first - second).norm(dim=1).mean().item()
    wanted = 10 * contrastive(first, second, 0.5).item() + 0.01 * information + invariance
    assert method(INDEX, embeddings, 1).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("count,copies", [(4, 1), (16, 1), (11, 3)])
def test_the_critics_loss_and_slopes_are_those_of_the_plain_form(count, copies):
    torch.manual_seed(0)
    critic, inputs = Critic(7, 6, 5).double(), torch.randn(count, 7, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(copies * count, 6, dtype=torch.float64, requires_grad=True)
    scores = torch.stack([torch.stack([joined_score(critic, x, z) for x in inputs]) for z in codes])  # (copies count, count)
    plain = F.cross_entropy(scores, torch.arange(count).repeat(copies), reduction="sum") / count**2
    found, parameters = critic(inputs, codes), [p for name, p in critic.named_parameters() if name != "score.3.bias"]
    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    wanted = torch.autograd.grad(plain, [inputs, codes, *parameters])
    for slope, other in zip(torch.autograd.grad(3 * found, [inputs, codes, *parameters]), wanted, strict=True):
        assert torch.allclose(slope, 3 * other, rtol=1e-9, atol=1e-15) and other.abs().max() > 0
    with torch.no_grad():
        critic.score[3].weight.zero_()
    assert critic(inputs, codes).item() == pytest.approx(copies * np.log(count) / count)


def test_scl_survives_rows_of_zeros():
    method = SCL(context_of("scl", FEATURES, dim=6, settings={"dropout": 0.9, "critic_width": 5}))
    embeddings = {name: torch.randn(4, 6, requires_grad=True) for name in NAMES}
    for _ in range(20):
        loss = method(INDEX, embeddings, 1)
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(rows.grad).all() for rows in embeddings.values())
    assert method.represent("GrayImg", embeddings["GrayImg"]).eq(0).all(dim=1).any()  # the case was there
    read = []
    method.shared.register_forward_pre_hook(lambda layer, given: read.append(given[0]))
    method.represent("GrayImg", torch.ones(40, 6))
    assert read[0].unique().tolist() == pytest.approx([0, 10])  # dropout before the shared layer, too


def rono(epochs=50, **settings):
    torch.manual_seed(0)
    context = context_of("rono", FEATURES, LABELS, dtype=torch.float64, dim=6, epochs=epochs, settings=settings)
    return RONO(context).double()


@pytest.mark.parametrize("epoch,share", [(1, 0.0), (13, 0.5), (25, 1.0), (50, 1.0)])
def test_discriminative_loss_of_rono(epoch, share):
    method, (rows, _) = rono(), unit_codes(8, 6)
    labels = torch.tensor([0, 3, 3, 1, 4, 2, 0, 1])
    centres = method.centres.detach().numpy()
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    mean, warm, full = centres.sum(0) / CLASSES, 0.0, 0.0
    for z, y in zip(rows.numpy(), labels.tolist()):
        warm += np.exp(mean @ z) - np.exp((CLASSES + 1) / CLASSES * (centres[y] @ z))
        full -= abs(np.exp(mean @ z) - np.exp(centres[y] @ z) + 0.3)
    wanted = ((1 - share) * warm + share * full) / (0.05 * 8)
    assert method.discriminative(rows, labels, epoch).item() == pytest.approx(wanted, rel=1e-9)
    assert progress(epoch, 50, 0.5) == pytest.approx(share)
    vanilla = rono(vanilla=True)
    assert vanilla.discriminative(rows, labels, epoch).item() == pytest.approx(warm / (0.05 * 8), rel=1e-9)


def test_progress_of_short_trainings():
    assert [progress(epoch, 4, 0.5) for epoch in (1, 2, 3, 4)] == [0, 1, 1, 1]
    assert progress(1, 50, 0.0) == 1 and progress(1, 1, 0.5) == 1


def test_rono_pulls_clean_samples_and_pushes_noisy_ones():
    method = rono(epochs=2, warmup=0.0)
    with torch.no_grad():
        method.centres.copy_(torch.eye(CLASSES, 6))
    own, mean = torch.eye(6, dtype=torch.float64)[0], torch.ones(6, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, 1, 0]) / CLASSES
    flips = []
    for angle in torch.linspace(0.02, np.pi / 2, 60).tolist():
        z = (np.cos(angle) * own + np.sin(angle) * torch.eye(6, dtype=torch.float64)[5]).requires_grad_()
        loss = method.discriminative(z[None], torch.tensor([0]), 1)
        towards = -torch.autograd.grad(loss, z)[0] @ (own - own @ z.detach() * z.detach())  # along the sphere, to the centre
        clean = bool((own @ z).exp() > (mean @ z).exp() + 0.3)
        assert (towards > 0) == clean
        assert method.logged["clean"] == clean
        flips.append(clean)
    assert flips[0] and not flips[-1] and sum(a != b for a, b in zip(flips, flips[1:])) == 1


def test_rono_sums_its_three_losses():
    embeddings = {name: torch.randn(4, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, name in enumerate(NAMES)}
    labels = torch.as_tensor(LABELS)[INDEX]
    method = rono()
    rows = [F.normalize(value, dim=1) for value in embeddings.values()]
    rdc = method.discriminative(torch.cat(rows), torch.cat([labels, labels]), 7).item()
    mg = ModalityInvarianceLoss(0.22)(torch.stack(rows)).item()
    crc = sum(5 * (1 - method.head(value).softmax(1)[torch.arange(4), labels]).mean().item() for value in embeddings.values())
    assert method(INDEX, embeddings, 7).item() == pytest.approx(rdc + mg + crc, rel=1e-9)
    assert rono(rdc=0.5, mg=0.0, crc=2.0)(INDEX, embeddings, 7).item() == pytest.approx(0.5 * rdc + 2 * crc, rel=1e-9)


def test_robust_clustering_of_mrl():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1, 1])
    believed = logits.softmax(1)[torch.arange(6), labels].numpy()
    assert robust_clustering(logits, labels).item() == pytest.approx(np.log(1 - believed).mean(), rel=1e-9)
    for scale in (1.0, 1e3, 1e6):
        values = (scale * torch.eye(4, dtype=torch.float64)[:1]).requires_grad_()
        loss = robust_clustering(values, torch.tensor([0]))
        assert torch.isfinite(torch.autograd.grad(loss, values)[0]).all() and loss.item() >= np.log(1e-6) - 1e-9


def test_mrl_gives_confident_samples_the_larger_slope():
    def slope(believed):
        p = torch.tensor(believed, dtype=torch.float64, requires_grad=True)
        logits = torch.stack([p.log(), (1 - p).log()])[None]
        return torch.autograd.grad(robust_clustering(logits, torch.tensor([0])), p)[0].item()

    assert slope(0.9) == pytest.approx(-1 / (1 - 0.9)) and abs(slope(0.9)) > abs(slope(0.1))


def test_mrl_sums_its_losses_and_keeps_unit_centres():
    torch.manual_seed(0)
    method = MRL(context_of("mrl", FEATURES, LABELS, dtype=torch.float64, dim=6, settings={"beta": 0.7, "tau1": 0.5, "tau2": 0.9})).double()
    assert torch.allclose(method.centres.T @ method.centres, torch.eye(CLASSES, dtype=torch.float64), atol=1e-6)
    with torch.no_grad():
        method.centres.mul_(3.0)
    embeddings = {name: torch.randn(4, 6, dtype=torch.float64) for name in NAMES}
    rows = [F.normalize(value, dim=1) for value in embeddings.values()]
    found = method(INDEX, embeddings, 1)
    assert torch.allclose(method.centres.norm(dim=0), torch.ones(CLASSES, dtype=torch.float64))
    labels = torch.as_tensor(LABELS)[INDEX]
    believed = [(value @ method.centres / 0.5).softmax(1)[torch.arange(4), labels] for value in rows]
    wanted = 0.7 * sum((1 - p).log().mean() for p in believed) + 0.3 * ModalityInvarianceLoss(0.9)(torch.stack(rows))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
