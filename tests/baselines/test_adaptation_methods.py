"""RevGrad's reversed gradient and MEDA's kernel classifier against integrals, slow loops and direct solutions."""

import numpy as np
import pytest
import torch
from compared import CLASSES, NAMES, context_of, needs_cca_zoo, pairs
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from torch.nn import functional as F

from baselines import METHODS, meda, revgrad
from baselines.meda import MEDA, AlignedClassifier, domain_distance, flow_kernel_root
from baselines.revgrad import ReverseGradient, RevGrad, source_labels, strength
from utils.errors import UserError

FEATURES, LABELS = pairs(120)


def shifted(count=60, seed=0):
    """Two classes along one axis in two domains, the target moved so far that its class 0 lies by the source's class 1."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    source = np.stack([labels * 2.0, np.zeros(count), np.zeros(count)], 1) + 0.25 * draw.normal(size=(count, 3))
    target = source + 0.1 * draw.normal(size=(count, 3)) + np.array([1.2, 0.6, 0.0])
    return source, labels, target


def test_the_reversed_gradient():
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad((z**2).sum(), z)[0]
    loss = (ReverseGradient.apply(z, 0.3) ** 2).sum()
    assert loss.item() == pytest.approx((z**2).sum().item())
    assert torch.allclose(torch.autograd.grad(loss, z)[0], -0.3 * wanted)
    assert [strength(epoch, 11) for epoch in (1, 11)] == pytest.approx([0, 2 / (1 + np.exp(-10)) - 1])


@pytest.mark.parametrize("name", ["revgrad", "meda", "pt_fuch"])
def test_more_clusters_than_pairs(name):
    if name == "meda":
        needs_cca_zoo()
    few, method = pairs(14)[0], METHODS[name].load()
    context = context_of(name, few, dim=8, num_clusters=20)
    with pytest.raises(UserError, match="method.num_clusters: expected at most the number of training pairs, 14, found 20"):
        method(context) if name == "revgrad" else method().fit(few, context)


def test_more_neighbours_than_rows():
    source, labels, target = shifted()
    with pytest.raises(UserError, match="method.options.neighbours: expected at most 119, .* found 120"):
        AlignedClassifier(2, {**MEDA.defaults, "neighbours": 120}).fit(source, labels, target)


def test_the_discriminator_tells_the_domains_apart_and_the_embeddings_get_the_reversed_gradient(monkeypatch):
    monkeypatch.setattr(revgrad, "DISCRIMINATOR_WIDTH", 64)
    method = RevGrad(context_of("revgrad", FEATURES, dim=8)).eval()  # no dropout
    first, second = (torch.randn(count, 8, requires_grad=True) for count in (5, 7))
    believed = method.discriminator(torch.cat([first, second])).squeeze(1).sigmoid()
    plain = -(torch.cat([1 - believed[:5], believed[5:]])).log().mean()
    found, inputs = method.domain_loss(first, second, 0.3), [first, second, *method.discriminator.parameters()]
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    for place, (slope, wanted) in enumerate(zip(torch.autograd.grad(found, inputs), torch.autograd.grad(plain, inputs), strict=True)):
        assert torch.allclose(slope, wanted * (-0.3 if place < 2 else 1), atol=1e-7)


def test_the_discriminator_learns_while_the_embeddings_unlearn(monkeypatch):
    monkeypatch.setattr(revgrad, "DISCRIMINATOR_WIDTH", 64)
    torch.manual_seed(0)
    method = RevGrad(context_of("revgrad", FEATURES, dim=8)).eval()  # no dropout
    first, second = (torch.randn(60, 8) + shift for shift in (0, 1.5))
    first, second = first.requires_grad_(), second.requires_grad_()
    optimizer = torch.optim.SGD([{"params": method.discriminator.parameters()}, {"params": [first, second], "lr": 20.0}], lr=0.1)
    right = []
    for step in range(120):
        loss = method.domain_loss(first, second, 0.0 if step < 40 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(method.logged["discriminator_accuracy"].item())
        believed = method.discriminator(torch.cat([first, second])).squeeze(1) > 0
    assert method.logged["discriminator_accuracy"].item() == pytest.approx((believed == (torch.arange(120) >= 60)).float().mean().item(), abs=0.05)
    assert right[39] > 0.9 and np.mean(right[-10:]) < 0.75


def test_where_revgrad_takes_its_labels_from():
    clusters = source_labels(context_of("revgrad", FEATURES))
    assert clusters.shape == (120,) and clusters.unique().tolist() == list(range(CLASSES))
    other = {**FEATURES, "PointCloud": FEATURES["PointCloud"][::-1].copy()}
    assert torch.equal(source_labels(context_of("revgrad", other)), clusters)  # of the images alone
    scaled = {**FEATURES, "GrayImg": FEATURES["GrayImg"] * np.geomspace(1, 100, 120)[:, None]}
    assert torch.equal(source_labels(context_of("revgrad", scaled)), clusters)  # of unit rows
    assert source_labels(context_of("revgrad", FEATURES, LABELS)).tolist() == LABELS.tolist()
    embeddings, index = {name: torch.randn(9, 8) for name in NAMES}, torch.arange(9)
    losses = {}
    for transfer in (True, False):
        torch.manual_seed(0)
        method = RevGrad(context_of("revgrad", FEATURES, dim=8, settings={"transfer": transfer})).eval()
        scores = [F.cross_entropy(method.classifier(rows), clusters[index]) for rows in embeddings.values()]
        losses[transfer] = method.source_loss(index, *embeddings.values()).item()
        assert losses[transfer] == pytest.approx((scores[0] + scores[1] * transfer).item())
    paired = RevGrad(context_of("revgrad", FEATURES, dim=8, settings={"source": "pairs"}))
    assert paired.labels is None and paired(index, embeddings, 3).isfinite()
    given = [rows.requires_grad_() for rows in embeddings.values()]
    for epoch in (1, 3):  # lambda 0, and of two twelfths
        found, wanted = method(index, embeddings, epoch), method.source_loss(index, *given) + method.domain_loss(*given, strength(epoch, 12))
        assert found.item() == pytest.approx(wanted.item())
        assert all(torch.allclose(*slopes) for slopes in zip(torch.autograd.grad(found, given), torch.autograd.grad(wanted, given)))
    with pytest.raises(UserError, match="'labels' or 'pairs', found 'label'"):
        RevGrad(context_of("revgrad", FEATURES, settings={"source": "label"}))


def test_the_flow_kernel_is_the_integral_over_the_geodesic():
    draw = np.random.default_rng(0)
    source, target = (draw.normal(size=(50, 6)) @ np.diag([3, 2, 1, 0.1, 0.1, 0.1]) @ np.linalg.qr(draw.normal(size=(6, 6)))[0] for _ in "st")
    root = flow_kernel_root(source, target, 2)
    bases = [np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2].T for rows in (source, target)]
    left, cosines, right = np.linalg.svd(bases[0].T @ bases[1])
    angles = np.arccos(cosines)
    away = (bases[1] @ right.T - bases[0] @ left * cosines) / np.sin(angles)
    steps = (np.arange(4000) + 0.5) / 4000
    wanted = np.zeros((6, 6))
    for t in steps:
        basis = bases[0] @ left * np.cos(t * angles) + away * np.sin(t * angles)
        assert np.allclose(basis.T @ basis, np.eye(2))
        wanted += basis @ basis.T / len(steps)
    assert np.allclose(root @ root, wanted, atol=1e-6)
    assert np.allclose(flow_kernel_root(source, source, 2) @ source.T, bases[0] @ bases[0].T @ source.T, atol=1e-6)  # no way to go


def test_without_alignment_and_graph_it_is_kernel_ridge_regression():
    source, labels, target = shifted()
    settings = {**MEDA.defaults, "lam": 0.0, "rho": 0.0, "neighbours": 5, "rounds": 1}
    fitted = AlignedClassifier(2, settings).fit(source, labels, target)
    ridge = KernelRidge(alpha=0.1, kernel="rbf", gamma=fitted.gamma).fit(source, np.eye(2)[labels])
    assert np.allclose(fitted.scores(target), ridge.predict(target), atol=1e-9)


def test_meda_beats_the_nearest_neighbour_on_a_shift():
    source, labels, target = shifted()
    nearest = np.mean([labels[((source - row) ** 2).sum(1).argmin()] == label for row, label in zip(target, labels)])
    aligned = AlignedClassifier(2, {**MEDA.defaults, "neighbours": 5}).fit(source, labels, target).scores(target).argmax(1)
    assert nearest < 0.8 < (aligned == labels).mean()


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_closed_form_of_a_round(rounds):
    source, labels, target = shifted(20)
    fit = lambda count: AlignedClassifier(3, {**MEDA.defaults, "neighbours": 4, "rounds": count}).fit(source, labels, target)
    fitted = fit(rounds)  # class 2 has no rows
    rows, n, m = np.concatenate([source, target]), 20, 20
    kernel = rbf_kernel(rows, gamma=fitted.gamma)
    pseudo = np.array([labels[((source - row) ** 2).sum(1).argmin()] for row in target])
    if rounds == 2:
        nearest, pseudo = pseudo, fit(1).scores(target).argmax(1)
        assert (nearest != pseudo).any()
    distances = [domain_distance(source, target)] + [domain_distance(source[labels == c], target[pseudo == c]) for c in range(3)]
    mu = 1 - distances[0] / sum(distances)
    assert 0 < mu < 1 and distances[3] == 0
    classes = np.concatenate([labels, pseudo])
    discrepancy = np.zeros((40, 40))
    for i in range(40):
        for j in range(40):
            sign = 1 if (i < n) == (j < n) else -1
            discrepancy[i, j] = (1 - mu) * sign / ((n if i < n else m) * (n if j < n else m))
            if classes[i] == classes[j]:
                counts = [(classes[:n] == classes[i]).sum(), (classes[n:] == classes[i]).sum()]
                discrepancy[i, j] += mu * sign / (counts[i >= n] * counts[j >= n])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines, graph = unit @ unit.T, np.zeros((40, 40))
    for i in range(40):
        for j in sorted(set(range(40)) - {i}, key=lambda j: -cosines[i, j])[:4]:
            graph[i, j] = graph[j, i] = max(cosines[i, j], 0)
    degrees = graph.sum(1)
    laplacian = np.eye(40) - graph / np.sqrt(np.outer(degrees, degrees))
    known, wanted = np.diag(np.arange(40) < n).astype(float), np.zeros((40, 3))
    wanted[np.arange(n), labels] = 1
    system = (known + 10 * discrepancy + laplacian) @ kernel + 0.1 * np.eye(40)
    assert np.allclose(fitted.coefficients, np.linalg.solve(system, wanted), atol=1e-8)
    assert np.allclose(fitted.scores(target[:3]), kernel[n:n + 3] @ fitted.coefficients, atol=1e-9)


def test_meda_ranks_map_and_belief_and_fits_a_part_of_the_pairs(monkeypatch):
    needs_cca_zoo()
    seen = []
    original = AlignedClassifier.fit
    monkeypatch.setattr(meda.AlignedClassifier, "fit", lambda self, *given: (seen.extend(given), original(self, *given))[1])
    method, context = MEDA(), context_of("meda", FEATURES, dim=12, settings={"rounds": 1, "pairs": 40, "tau": 2.0, "subspace": 3})
    method.fit(FEATURES, context)
    chosen = np.linspace(0, 119, 40).astype(int)
    mapped = [method.cca.transform(name, FEATURES[name])[chosen] for name in NAMES]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in mapped]
    root = flow_kernel_root(*unit, 3)
    wanted = [unit[0] @ root, source_labels(context).numpy()[chosen], unit[1] @ root]
    assert len(seen) == 3 and all(np.allclose(*both) for both in zip(seen, wanted))
    codes = method.transform("PointCloud", FEATURES["PointCloud"][:7])
    assert codes.shape == (7, 12 + CLASSES)
    assert np.allclose(np.linalg.norm(codes[:, :12], axis=1), 1) and np.allclose(np.linalg.norm(codes[:, 12:], axis=1), 2)
    method.settings = {**method.settings, "map": False}
    assert np.allclose(2 * method.transform("PointCloud", FEATURES["PointCloud"][:7]), codes[:, 12:])
