"""Targets and losses of the graph hashing methods against slow loops in float64."""

import numpy as np
import pytest
import torch
from compared import NAMES, context_of, cosines, mse, pairs, standard

from baselines.cfrh import CFRH
from baselines.dgcpn import DGCPN, neighbour_distribution
from baselines.djsrh import DJSRH
from baselines.hashing import FeatureSimilarity, cosine
from baselines.jdsh import JDSH
from baselines.ucch import UCCH
from utils.errors import UserError

FEATURES, _ = pairs(60)
INDEX = torch.tensor([3, 17, 41, 8, 59, 22])
METHODS = {"djsrh": DJSRH, "jdsh": JDSH, "dgcpn": DGCPN, "cfrh": CFRH}
DOUBLE = {name: torch.as_tensor(rows) for name, rows in FEATURES.items()}


def published(name):
    return 2 * cosines(FEATURES[name][INDEX], FEATURES[name][INDEX]) - 1


def built(name, **settings):
    """A method on float64 features, with the similarity as published."""
    return METHODS[name](context_of(
        name, FEATURES, dtype=torch.float64, batch_size=6, dim=8, settings={"similarity": "published", **settings}
    ))


def codes_of(method, epoch, seed=0):
    draw = torch.Generator().manual_seed(seed)
    embeddings = {name: torch.randn(6, 8, generator=draw, dtype=torch.float64) for name in NAMES}
    method.start_epoch(epoch, dict)
    return embeddings, *(method.represent(name, rows).numpy() for name, rows in embeddings.items())


def test_feature_similarity():
    plain, scaled = (FeatureSimilarity(DOUBLE["GrayImg"], rule)(torch.arange(60)).numpy() for rule in ("published", "rescaled"))
    wanted = cosines(FEATURES["GrayImg"], FEATURES["GrayImg"])
    off = ~np.eye(60, dtype=bool)
    assert np.allclose(plain, 2 * wanted - 1) and np.allclose(scaled[off].min(), -1) and np.allclose(scaled[off].max(), 1)
    low, high = wanted[off].min(), wanted[off].max()
    assert np.allclose(scaled[off], (2 * (wanted - low) / (high - low) - 1)[off])
    assert np.array_equal(np.diag(scaled), np.ones(60)) and np.array_equal(scaled, scaled.T)
    signed = FeatureSimilarity(torch.randn(30, 3, dtype=torch.float64), "published")(torch.arange(30))
    assert signed.min() == -1  # what 2 s - 1 puts below -1 is cut
    alike = FeatureSimilarity(torch.ones(5, 3), "rescaled")(torch.arange(5))
    assert torch.allclose(alike, torch.eye(5), atol=1e-5)
    with pytest.raises(UserError, match="'rescaled' or 'published'"):
        FeatureSimilarity(DOUBLE["GrayImg"], "rescale")


@pytest.mark.parametrize("name", ["djsrh", "jdsh", "cfrh", "ucch", "dgcpn"])
def test_codes_sharpen_with_the_epoch_where_the_method_says_so(name):
    method = UCCH(context_of(name, FEATURES, dim=8)) if name == "ucch" else built(name)
    sharpens = name in ("djsrh", "jdsh", "cfrh")
    for epoch in (1, 4):
        embeddings, first, _ = codes_of(method, epoch)
        assert np.allclose(first, np.tanh((epoch**0.5 if sharpens else 1) * embeddings["GrayImg"].numpy()))
    assert float(method.state_dict()["alpha"]) == (2 if sharpens else 1)  # kept for retrieval after a restart


def test_djsrh():
    method = built("djsrh", beta=0.3)
    joint = 0.3 * published("GrayImg") + 0.7 * published("PointCloud")
    second = np.array([[sum(joint[i, k] * joint[j, k] for k in range(6)) / 6 for j in range(6)] for i in range(6)])
    wanted = 1.5 * (0.6 * joint + 0.4 * second)
    assert np.allclose(method.target(INDEX).numpy(), wanted)
    embeddings, x, y = codes_of(method, 5)
    loss = 0.1 * mse(cosines(x, x), wanted) + mse(cosines(x, y), wanted) + 0.1 * mse(cosines(y, y), wanted)
    assert method(INDEX, embeddings, 5).item() == pytest.approx(loss, rel=1e-9)


def test_djsrh_has_no_loss_where_the_codes_realise_the_target():
    reachable = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.float64)
    features = {name: torch.cat([reachable, 1 - reachable], 1) for name in NAMES}  # cosines 0, 1/2 ... of unit diagonal
    method = DJSRH(context_of("djsrh", features, dtype=torch.float64, settings={"mu": 1.0, "eta": 0.0, "similarity": "published"}))
    target = method.target(torch.arange(4))
    values, vectors = torch.linalg.eigh(target)
    assert values.min() > -1e-9 and torch.equal(target, target.T)  # a matrix of cosines
    rows = vectors * values.clamp(0).sqrt()  # rows with these cosines
    method.represent = lambda name, embeddings: embeddings
    assert method(torch.arange(4), dict.fromkeys(NAMES, rows), 1).item() < 1e-12
    assert method(torch.arange(4), dict.fromkeys(NAMES, rows.flip(0)), 1).item() > 1e-2


def test_jdsh():
    method = built("jdsh")
    sx, sy = published("GrayImg"), published("PointCloud")
    both = cosines(sx, sy)
    joint = 0.4 * sx + 0.3 * sy + 0.3 * (both + both.T) / 2
    assert np.allclose(method.joint(INDEX).numpy(), joint) and np.allclose(joint, joint.T)
    others = joint[~np.eye(6, dtype=bool)]
    method.thresholds = left, right, low, high = *np.quantile(others, [0.3, 0.7]) + 1e-6, others.min(), others.max()
    wanted, counts = np.zeros((6, 6)), [0, 0]
    for i in range(6):
        for j in range(6):
            s = joint[i, j]
            counts[0] += s < left
            counts[1] += s > right
            s = (1 + 0.1 * np.exp(-(s - low))) * s if s < left else (1 + 0.2 * np.exp(s - high)) * s if s > right else s
            wanted[i, j] = 1.4 * s
    assert min(counts) > 0 and np.allclose(method.target(INDEX).numpy(), wanted)
    embeddings, x, y = codes_of(method, 2)
    loss = 0.1 * (mse(cosines(x, x), wanted) + mse(cosines(y, y), wanted)) + 2 * mse(cosines(x, y), wanted) - np.diag(cosines(x, y)).mean()
    assert method(INDEX, embeddings, 2).item() == pytest.approx(loss, rel=1e-9)


def test_thresholds_of_jdsh_come_from_the_training_set():
    context = context_of("jdsh", FEATURES, dtype=torch.float64, batch_size=30)
    method = JDSH(context)
    left, right, low, high = method.thresholds
    assert low < left < right < high
    draw = torch.Generator().manual_seed(0)
    joint = torch.cat([method.joint(torch.randperm(60, generator=draw)[:30])[~torch.eye(30, dtype=torch.bool)] for _ in range(40)])
    assert (joint < left).float().mean().item() == pytest.approx(0.05, abs=0.02)
    assert (joint > right).float().mean().item() == pytest.approx(0.05, abs=0.02)
    assert JDSH(context).thresholds == method.thresholds  # of a seed
    for changed, words in (({"left_share": 0.95}, "left_share must be below right_share"), ({"first": 0.8}, "must sum to 1, got 1.4")):
        with pytest.raises(UserError, match=words):
            JDSH(context_of("jdsh", FEATURES, dtype=torch.float64, settings=changed))


def test_dgcpn_graph():
    method = built("dgcpn", second=0.4, neighbours=0.2)
    similarity = 0.6 * cosines(FEATURES["GrayImg"], FEATURES["GrayImg"]) + 0.4 * cosines(FEATURES["PointCloud"], FEATURES["PointCloud"])
    graph = np.zeros((60, 60))
    for i in range(60):
        chosen = sorted(set(range(60)) - {i}, key=lambda j: -similarity[i, j])[:12]
        for j in chosen:
            graph[i, j] = similarity[i, j] / similarity[i, chosen].sum()
    found = neighbour_distribution(torch.as_tensor(similarity), 12)
    assert np.allclose(found.numpy(), graph)
    assert np.allclose(found.sum(1), 1) and (found > 0).sum(1).tolist() == [12] * 60 and found.diagonal().eq(0).all()
    wanted = np.clip(2 * (0.7 * similarity + 0.3 * 24 * graph @ graph.T) - 1, -1, 1)
    assert np.allclose(method.target.numpy(), wanted) and np.allclose(wanted, wanted.T)
    isolated = neighbour_distribution(torch.zeros(4, 4), 2)
    assert (isolated > 0).sum(1).tolist() == [2] * 4 and torch.allclose(isolated.sum(1), torch.ones(4))


def test_dgcpn_loss():
    method = built("dgcpn")
    target = method.target[INDEX][:, INDEX].numpy()

    def loss(x, y):
        xx, xy, yy = cosines(x, x), cosines(x, y), cosines(y, y)
        others = 1 - np.eye(6)
        graph = sum(mse(others * c, others * target) for c in (xx, xy, yy))
        return mse(np.diag(xy), 1.5) + graph + mse(xy, xx) + mse(xy, yy) + mse(xx, yy) + mse(xy, xy.T)

    embeddings, x, y = codes_of(method, 1)
    wanted = loss(x, y) + loss(x, np.sign(y)) + loss(np.sign(x), y)
    assert method(INDEX, embeddings, 1).item() == pytest.approx(wanted, rel=1e-9)
    x, y = inputs = [rows.requires_grad_() for rows in embeddings.values()]
    x, y, sx, sy = x.tanh(), y.tanh(), x.detach().sign(), y.detach().sign()
    plain = sum(method.loss(*codes, torch.as_tensor(target)) for codes in ((x, y), (x, sy), (sx, y)))
    slopes = [torch.autograd.grad(loss, inputs) for loss in (method(INDEX, embeddings, 1), plain)]
    assert all(torch.allclose(*both) for both in zip(*slopes))  # none through signs
    # codes that say the target exactly, alike in both modalities, leave the pairs' term alone: kappa = 1 removes it
    same = torch.randn(6, 8, dtype=torch.float64)
    assert built("dgcpn", kappa=1.0).loss(same, same, cosine(same, same)).item() < 1e-12


def test_cfrh():
    method = built("cfrh")
    sx, sy = published("GrayImg"), published("PointCloud")
    target = 1.5 * (0.4 * sx + 0.3 * sy + 0.3 * (sx @ sy.T + sy @ sx.T) / 12)
    assert np.allclose(method.target(INDEX).numpy(), target)
    method.double()
    embeddings, x, y = codes_of(method, 3)
    loss = mse(cosines(x, y), target) + 0.1 * (mse(cosines(x, x), target) + mse(cosines(y, y), target))
    for name, code in zip(NAMES, (x, y)):
        loss += 0.01 * mse(method.decoders[name](torch.as_tensor(code)).detach(), standard(FEATURES[name])[INDEX])
    assert method(INDEX, embeddings, 3).item() == pytest.approx(loss, rel=1e-6)
