"""Targets and losses of the hashing methods against slow loops in float64, UCCH's memory, and PT-FUCH's rounds."""

import copy

import numpy as np
import pytest
import torch
from compared import NAMES, context_of, pairs
from torch import nn
from torch.nn import functional as F

from baselines.cfrh import CFRH
from baselines.dgcpn import DGCPN, neighbour_distribution
from baselines.djsrh import DJSRH
from baselines.federation import average, split
from baselines.hashing import FeatureSimilarity, cosine
from baselines.jdsh import JDSH
from baselines.pt_fuch import PTFUCH, Client, batches, distillation, prototype_loss
from baselines.ucch import DEFAULTS, UCCH, UnifiedContrast, random_memory, signs

FEATURES, LABELS = pairs(60)
INDEX = torch.tensor([3, 17, 41, 8, 59, 22])
METHODS = {"djsrh": DJSRH, "jdsh": JDSH, "dgcpn": DGCPN, "cfrh": CFRH}
DOUBLE = {name: torch.as_tensor(rows) for name, rows in FEATURES.items()}


def cos(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def cosines(left, right):
    return np.array([[cos(a, b) for b in right] for a in left])


def mse(left, right):
    return float(np.mean((np.asarray(left) - np.asarray(right)) ** 2))


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
    with pytest.raises(ValueError, match="'rescaled' or 'published'"):
        FeatureSimilarity(DOUBLE["GrayImg"], "rescale")


@pytest.mark.parametrize("name", ["djsrh", "jdsh", "cfrh", "ucch", "dgcpn"])
def test_codes_sharpen_with_the_epoch_where_the_method_says_so(name):
    method = UCCH(context_of(name, FEATURES, dim=8)) if name == "ucch" else built(name)
    sharpens = name in ("djsrh", "jdsh", "cfrh")
    for epoch in (1, 4):
        embeddings, first, _ = codes_of(method, epoch)
        assert np.allclose(first, np.tanh((epoch**0.5 if sharpens else 1) * embeddings["GrayImg"].numpy()))
    assert float(method.state_dict()["alpha"]) == (2 if sharpens else 1)  # kept for retrieval after a restart


def djsrh_target(mu, eta, beta):
    joint = beta * published("GrayImg") + (1 - beta) * published("PointCloud")
    assert np.allclose(np.diag(joint), 1) and np.allclose(joint, joint.T)
    second = np.array([[sum(joint[i, k] * joint[j, k] for k in range(6)) / 6 for j in range(6)] for i in range(6)])
    return mu * ((1 - eta) * joint + eta * second)


def test_djsrh():
    method = built("djsrh", beta=0.3)
    wanted = djsrh_target(1.5, 0.4, 0.3)
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
    assert values.min() > -1e-9  # a matrix of cosines
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
    # codes that say the target exactly, alike in both modalities, leave the pairs' term alone: kappa = 1 removes it
    same = torch.randn(6, 8, dtype=torch.float64)
    exact = built("dgcpn", kappa=1.0)
    assert exact.loss(same, same, cosine(same, same)).item() < 1e-12


def test_cfrh():
    method = built("cfrh")
    sx, sy = published("GrayImg"), published("PointCloud")
    target = 1.5 * (0.4 * sx + 0.3 * sy + 0.3 * (sx @ sy.T + sy @ sx.T) / 12)
    assert np.allclose(method.target(INDEX).numpy(), target)
    method.double()
    embeddings, x, y = codes_of(method, 3)
    loss = mse(cosines(x, y), target) + 0.1 * (mse(cosines(x, x), target) + mse(cosines(y, y), target))
    for name, code in zip(NAMES, (x, y)):
        rows = (FEATURES[name] - FEATURES[name].mean(0)) / FEATURES[name].std(0)
        loss += 0.01 * mse(method.decoders[name](torch.as_tensor(code)).detach(), rows[INDEX])
    assert method(INDEX, embeddings, 3).item() == pytest.approx(loss, rel=1e-6)


def contrast(rows=9, dim=5, **settings):
    memory = F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    return UnifiedContrast(memory, {**DEFAULTS, **settings})


def unit_codes(batch=3, dim=5, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(batch, dim, generator=draw, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))


def test_ucch_contrast_against_a_slow_loop(monkeypatch):
    loss, codes, index = contrast(), unit_codes(), torch.tensor([4, 0, 7])
    drawn = torch.tensor([1, 4, 4, 8, 0, 2, 2, 6])  # own rows of samples 0 and 1 among them, some drawn twice
    monkeypatch.setattr(torch, "randint", lambda *a, **k: drawn)
    keys = np.where(loss.memory.numpy() < 0, -1, 1) / np.sqrt(5)
    wanted = 0.0
    for code in codes:
        for row, i in zip(code.detach().numpy(), index.tolist()):
            positive = np.exp(row @ keys[i] / 0.9)
            wanted -= np.log(positive / (positive + sum(np.exp(row @ keys[j] / 0.9) for j in drawn.tolist() if j != i))) / 3
    assert loss.contrastive(index, codes, warm_up=False).item() == pytest.approx(wanted, rel=1e-9)


def test_ucch_warm_up_uses_the_keys_of_the_batch():
    loss, codes = contrast(), unit_codes()
    keys = np.where(sum(code.detach().numpy() for code in codes) < 0, -1, 1) / np.sqrt(5)
    wanted = 0.0
    for code in codes:
        scores = np.exp(code.detach().numpy() @ keys.T / 0.9)
        wanted -= np.log(np.diag(scores) / scores.sum(1)).mean()
    assert loss.contrastive(torch.tensor([4, 0, 7]), codes, warm_up=True).item() == pytest.approx(wanted, rel=1e-9)


def test_ucch_ranking_loss():
    loss, (x, y) = contrast(margin=0.2, smoothing=0.7, shift=0.5), unit_codes(batch=5)
    similarity = (x @ y.T).detach().numpy()
    wanted = 0.0
    for i in range(5):
        kept = [s if s >= similarity[i, i] - 0.2 else s - 0.5 for s in similarity[i]]
        wanted += (0.2 + 0.7 * np.log(sum(np.exp(s / 0.7) for s in kept)) - similarity[i, i]) / 5
    assert loss.ranking(x @ y.T).item() == pytest.approx(wanted, rel=1e-9)
    wide = contrast(margin=100.0)  # every pair within the margin: plain softmax ranking
    assert wide.ranking(x @ y.T).item() == pytest.approx(100 + F.cross_entropy(x @ y.T, torch.arange(5)).item(), rel=1e-9)


def test_ucch_memory():
    method = UCCH(context_of("ucch", FEATURES, dim=16, batch_size=6))
    start = method.memory.clone()
    assert torch.allclose(start.norm(dim=1), torch.ones(60)) and start.abs().unique().tolist() == [0.25]
    embeddings = {name: torch.randn(6, 16, requires_grad=True) for name in NAMES}
    loss = method(INDEX, embeddings, 2)
    loss.backward()
    assert torch.equal(method.memory, start) and not method.memory.requires_grad and list(method.parameters()) == []
    method.after_step(INDEX, {name: rows.detach() for name, rows in embeddings.items()}, 2)
    x, y = (F.normalize(torch.tanh(rows.detach()), dim=1) for rows in embeddings.values())
    assert torch.allclose(method.memory[INDEX], F.normalize(0.4 * start[INDEX] + 0.6 * (x + y) / 2, dim=1), atol=1e-6)
    untouched = [i for i in range(60) if i not in INDEX.tolist()]
    assert torch.equal(method.memory[untouched], start[untouched])
    assert torch.allclose(method.memory.norm(dim=1), torch.ones(60))
    both = [method(INDEX, embeddings, 2).item() for _ in range(2)]
    assert np.isfinite(both).all() and both[0] != both[1]  # 59 negatives drawn anew


def test_both_terms_of_ucch_count():
    loss, codes, index = contrast(), unit_codes(), torch.tensor([4, 0, 7])
    for beta, active in ((1.0, "contrastive"), (0.0, "ranking")):
        only = contrast(beta=beta).loss(index, codes, warm_up=True)
        similarity = codes[0] @ codes[1].T
        parts = {"contrastive": loss.contrastive(index, codes, True), "ranking": loss.ranking(similarity) + loss.ranking(similarity.T)}
        assert only.item() == pytest.approx(parts[active].item(), rel=1e-9)
    assert signs(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [-1, 1, 1]


def test_prototype_and_distillation_losses():
    draw = torch.Generator().manual_seed(0)
    outputs = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2)]
    teacher = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2)]
    centres = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    softmax = lambda v: np.exp(v) / np.exp(v).sum()
    wanted = 0.0
    for i in range(4):
        scores = [np.array([cos(phi[i].numpy(), c) for c in centres.numpy()]) for phi in outputs]
        target = sum(softmax(s / 0.81) for s in scores) / 2
        wanted += sum((target * np.log(target / softmax(s / 0.26))).sum() for s in scores) / 2 / 4
    assert prototype_loss(outputs, centres).item() == pytest.approx(wanted, rel=1e-9)
    parts = [[cosines(a.numpy(), b.numpy()) for a in pair for b in pair] for pair in (outputs, teacher)]
    assert distillation(outputs, teacher).item() == pytest.approx(sum(mse(a, b) for a, b in zip(*parts)), rel=1e-9)
    assert distillation(outputs, outputs).item() == 0


def test_the_private_loss_divides_by_a_constant():
    rows = [torch.randn(12, 6), torch.randn(12, 7)]
    server = nn.ModuleList([nn.Linear(6, 4), nn.Linear(7, 4)])
    memories = [random_memory(12, 4, torch.Generator().manual_seed(i)) for i in range(2)]
    client = Client(server, rows, 3, {**PTFUCH.defaults, "private_epochs": 1, "global_epochs": 0}, memories)
    client.train_round(server, None, seed=0)
    index = torch.arange(12)
    outputs = [encoder(part).detach().requires_grad_() for encoder, part in zip(client.private.encoders, rows)]
    off = 0.001 * F.one_hot(client.ids, 3)
    clustering = sum(F.cross_entropy(phi @ client.prototypes.T - off, client.ids) for phi in outputs)
    taught = distillation([torch.tanh(phi) for phi in outputs], client.teacher)
    wanted = torch.autograd.grad(clustering + taught / max(clustering.item(), 0.01), outputs)
    found = torch.autograd.grad(client.private_loss(index, outputs), outputs)
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted))


def test_rounds_share_global_weights_and_keep_private_ones():
    torch.manual_seed(0)
    rows = [torch.as_tensor(FEATURES[name], dtype=torch.float32) for name in NAMES]
    server = nn.ModuleList([nn.Linear(part.shape[1], 8) for part in rows])
    before = copy.deepcopy(server.state_dict())
    memories = [random_memory(60, 8, torch.Generator().manual_seed(i)) for i in range(2)]
    client = Client(server, rows, 4, {**PTFUCH.defaults, "private_epochs": 1, "global_epochs": 1, "learning_rate": 1e-2}, memories)
    client.train_round(server, None, seed=0)
    assert all(torch.equal(server.state_dict()[key], value) for key, value in before.items())  # the server averages, clients do not write
    private = copy.deepcopy(client.private.encoders.state_dict())
    assert any(not torch.equal(private[key], before[key]) for key in before)
    assert any(not torch.equal(client.shared.encoders.state_dict()[key], before[key]) for key in before)
    client.settings = {**client.settings, "private_epochs": 0, "global_epochs": 0}
    client.train_round(server, client.prototypes, seed=1)
    assert all(torch.equal(client.shared.encoders.state_dict()[key], value) for key, value in before.items())
    assert all(torch.equal(client.private.encoders.state_dict()[key], value) for key, value in private.items())


def test_the_server_weighs_clients_by_their_rows():
    states = [{"w": torch.tensor([1.0, 5.0]), "n": torch.tensor(3)}, {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(9)}]
    mean = average(states, [10, 20])
    assert torch.allclose(mean["w"], torch.tensor([3.0, 3.0])) and int(mean["n"]) == 3
    assert all(torch.equal(average(states[:1], [7])[key], value) for key, value in states[0].items())


def test_clients_get_skewed_shares_of_every_sample_once():
    labels = np.repeat(np.arange(6), 200)
    parts = split(labels, 10, seed=0)
    assert len(parts) == 10 and sorted(np.concatenate(parts).tolist()) == list(range(1200))
    largest = [max((labels[part] == label).sum() for part in parts) / 200 for label in range(6)]
    assert np.mean(largest) > 0.4  # an even split has 0.1
    assert all(len(a) == len(b) and (a == b).all() for a, b in zip(parts, split(labels, 10, seed=0)))


def test_several_clients_learn_one_pair_of_networks():
    features, _ = pairs(200)
    settings = {"rounds": 1, "private_epochs": 1, "global_epochs": 1, "clients": 3, "batch_size": 32}
    found = []
    for _ in range(2):
        method = PTFUCH()
        method.fit(features, context_of("pt_fuch", features, dim=8, settings=settings))
        found.append(method.transform("PointCloud", features["PointCloud"][:9]))
    assert found[0].shape == (9, 8) and np.abs(found[0]).max() <= 1 and np.array_equal(*found)
    assert [len(index) for index in batches(70, 32, torch.device("cpu"))] == [32, 32]
    assert [len(index) for index in batches(20, 32, torch.device("cpu"))] == [20]
