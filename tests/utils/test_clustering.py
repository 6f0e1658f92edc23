"""utils.evaluation.clustering and device_kmeans: planted clusters, slow loops in float64, scikit-learn, brute-force accuracy."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from utils.evaluation import clustering, device_kmeans
from utils.evaluation.clustering import clustering_accuracy, joint_then_per_modality, kmeans, nmi, purity
from utils.evaluation.device_kmeans import _inertia, best_of_starts, lloyd


@pytest.fixture(params=["as on the CPU", "as on other devices"])
def route(request, monkeypatch):
    if request.param != "as on the CPU":
        monkeypatch.setattr(clustering, "_scikit_learn", best_of_starts)


def planted(seed=0, count=120, clusters=4, dim=16, noise=0.05):
    """Unit rows (N, D) around unit centres, the numbers of their centres, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(clusters, dim, generator=generator), dim=1)
    labels = torch.arange(count) % clusters
    return normalize(centres[labels] + noise * torch.randn(count, dim, generator=generator), dim=1), labels, centres


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("origin", [0.0, 1000.0])
def test_planted_clusters_are_found(route, spherical, origin):
    x, labels, _ = planted()
    x = x if spherical else x + origin
    centroids, assignments = kmeans(x, 4, spherical=spherical)
    assert centroids.shape == (4, 16) and assignments.dtype == torch.int64
    assert clustering_accuracy(assignments, labels) == 1.0
    for cluster in range(4):
        mean = x[assignments == cluster].mean(dim=0)
        expected = normalize(mean, dim=0) if spherical else mean
        assert torch.allclose(centroids[cluster], expected, rtol=1e-6, atol=1e-6)
    distances = torch.cdist(x.double(), centroids.double())
    assert torch.equal(assignments, distances.argmin(dim=1))


def test_same_seed_same_result_whatever_the_global_state(route):
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    first = kmeans(x, 9, seed=3)
    np.random.seed(99)
    torch.manual_seed(99)
    second = kmeans(x, 9, seed=3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], kmeans(x, 9, seed=4, num_init=1)[0])
    assert torch.equal(kmeans(x, 9, seed=2**40 + 3)[0], first[0])  # wide and negative seeds are accepted
    assert kmeans(x, 9, seed=-1)[0].isfinite().all()
    with pytest.raises(ValueError, match="n(um)?_init.*0"):
        kmeans(x, 3, num_init=0)


def test_init_is_used_and_keeps_ids_and_centres_without_rows():
    x, labels, centres = planted()
    order = torch.tensor([2, 0, 3, 1])
    far = -normalize(centres.sum(dim=0, keepdim=True), dim=1)
    centroids, assignments = kmeans(x, 5, init=torch.cat([centres[order], far]), spherical=True)
    assert torch.equal(order[assignments], labels) and torch.allclose(centroids[4], far[0], atol=1e-6)


def test_duplicate_rows_and_other_types(route):
    x = torch.eye(3).repeat(5, 1).double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn reports fewer distinct rows than clusters
        centroids, assignments = kmeans(x, 6)
    assert centroids.isfinite().all() and centroids.dtype == torch.float32 and not centroids.requires_grad
    assert clustering_accuracy(assignments, torch.arange(15) % 3) == 1.0


@pytest.mark.parametrize("x, options, message", [
    (torch.ones(3, 2), dict(num_clusters=5), "num_clusters = 5 for N = 3"),
    (torch.ones(3, 2), dict(num_clusters=0), "num_clusters = 0 for N = 3"),
    (torch.ones(3), dict(num_clusters=1), r"\(N, D\) tensor, got shape \(3,\)"),
    (torch.tensor([[1.0], [float("inf")]]), dict(num_clusters=1), "1 of 2 are not, first at row 1"),
    (torch.ones(3, 2), dict(num_clusters=2, init=torch.ones(3, 2)), r"init must have shape \(2, 2\), got \(3, 2\)"),
    (torch.ones(3, 2), dict(num_clusters=2, spherical=True), "unit rows, norms span 1.414 to 1.414"),
])
def test_bad_input(x, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x, **options)


def test_ids_mean_the_same_in_both_modalities(route):
    first, labels, centres = planted(seed=5)
    shift = 0.3 * normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(6)), dim=1)
    second = normalize(first + shift, dim=1)  # a modality gap smaller than the distance between clusters
    order = torch.randperm(len(second), generator=torch.Generator().manual_seed(7))
    joint, centroids, assignments = joint_then_per_modality([first, second[order]], 4, seed=0)
    assert torch.equal(assignments[0][order], assignments[1])
    assert clustering_accuracy(assignments[0], labels) == 1.0
    for modality in centroids:
        assert torch.allclose(modality.norm(dim=1), torch.ones(4), atol=1e-5)
        assert torch.equal((modality @ joint.T).argmax(dim=1), torch.arange(4))
    assert not torch.allclose(centroids[0], centroids[1], atol=1e-3)


def test_joint_clusters_of_one_modality_alone_are_reported():
    first, second = planted(seed=1, noise=0.01)[0], -planted(seed=1, noise=0.01)[0]
    with pytest.warns(UserWarning, match="4 of 8 joint clusters hold none"):
        _, _, assignments = joint_then_per_modality([first, second], 8, seed=0)
    assert set(assignments[0].tolist()).isdisjoint(assignments[1].tolist())


@pytest.mark.parametrize("clusters, classes", [(3, 3), (4, 3), (3, 4)])
def test_accuracy_by_brute_force(clusters, classes):
    generator = np.random.default_rng(clusters)
    assignments, labels = generator.integers(0, clusters, 40), generator.integers(0, classes, 40)
    size = max(clusters, classes)
    best = max(np.mean([order[a] == label for a, label in zip(assignments, labels)]) for order in itertools.permutations(range(size)))
    assert clustering_accuracy(assignments, labels) == pytest.approx(best, abs=1e-12)
    # ids are names only: any relabelling, also negative and sparse, gives the same score
    assert clustering_accuracy(torch.from_numpy(100 - 7 * assignments), labels * 1000) == pytest.approx(best, abs=1e-12)


def test_scores_by_hand_and_what_is_no_assignment():
    assignments, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([5, 5, 6, 6, 6, 5])
    assert clustering_accuracy(assignments, labels) == pytest.approx(4 / 6)  # cluster 2 is left over
    assert purity(assignments, labels) == pytest.approx(5 / 6)
    assert nmi(labels, labels) == pytest.approx(1.0)
    assert nmi(torch.tensor([0, 1]).repeat(50), torch.tensor([0, 0, 1, 1]).repeat(25)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError):
        purity(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="assignments must be a non-empty"):
        nmi(torch.tensor([0.5, 1.0]), torch.tensor([0, 1]))


def cloud(count=300, dim=4, seed=3):
    """One cloud without clusters, where every start ends elsewhere."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def inertia_of(x, centroids):
    return float(_inertia(x, *lloyd(x, centroids, 0)))


def slow_lloyd(x, centroids, max_iter, spherical):
    """Loops over rows and clusters, in float64; the last ids belong to the last centres."""
    x, unit = x.double().numpy(), lambda v: v / np.linalg.norm(v) if spherical else v
    centroids = [unit(row) for row in centroids.double().numpy()]
    assign = lambda: [min(range(len(centroids)), key=lambda k: ((row - centroids[k]) ** 2).sum()) for row in x]
    ids = assign()
    for _ in range(max_iter):
        groups = [[row for row, i in zip(x, ids) if i == k] for k in range(len(centroids))]
        centroids = [unit(np.mean(group, axis=0)) if group else old for group, old in zip(groups, centroids)]
        ids = assign()
    return np.array(centroids), ids, sum(((row - centroids[i]) ** 2).sum() for row, i in zip(x, ids))


@pytest.mark.parametrize("spherical, offset", [(True, 3), (False, 0), (False, 1000)])  # squares near 10^6 have steps of 0.06
@pytest.mark.parametrize("max_iter", [0, 1, 4, 100])
def test_lloyd_against_slow_loops(monkeypatch, spherical, offset, max_iter):
    monkeypatch.setattr(device_kmeans, "CHUNK_ELEMENTS", 6 * 11)  # 11 rows at a time, 60 = 5 * 11 + 5
    x = normalize(cloud(60) + offset, dim=1) if spherical else cloud(60) + offset
    start = torch.cat([3 * x[:5] if spherical else x[:5], -50 * torch.ones(1, 4)])  # the last one stays empty
    given = start.clone()
    centroids, ids = lloyd(x, start, max_iter, spherical)
    expected, expected_ids, expected_inertia = slow_lloyd(x, given, max_iter, spherical)
    assert ids.dtype == torch.int64 and ids.tolist() == expected_ids and torch.equal(start, given)
    np.testing.assert_allclose(centroids.numpy(), expected, rtol=0, atol=2e-4 if offset == 1000 else 1e-5)
    assert offset == 1000 or float(_inertia(x, centroids, ids)) == pytest.approx(expected_inertia, rel=1e-5)
    assert centroids is not start and 5 not in expected_ids
    assert torch.allclose(centroids[5], normalize(start[5], dim=0) if spherical else start[5])


@pytest.mark.parametrize("clusters", [2, 7, 20])
def test_inertia_is_that_of_scikit_learn_within_a_few_percent_where_there_are_no_clusters(clusters):
    x = cloud()
    inertia = inertia_of(x, best_of_starts(x, clusters, seed=0, num_init=10, max_iter=100))
    assert inertia == pytest.approx(KMeans(clusters, n_init=10, random_state=0).fit(x.numpy()).inertia_, rel=0.03)


def test_the_best_of_the_starts_is_kept(monkeypatch):
    x, done = cloud(), []
    spy = lambda *arguments: done.append(lloyd(*arguments)) or done[-1]
    monkeypatch.setattr(device_kmeans, "lloyd", spy)
    centroids = best_of_starts(x, 12, seed=1, num_init=6, max_iter=20)
    inertias = [inertia_of(x, centres) for centres, _ in done]
    assert len(set(inertias)) == 6 and torch.equal(centroids, done[int(np.argmin(inertias))][0])


def test_as_many_clusters_as_rows_and_one_cluster():
    x = cloud(40)
    assert inertia_of(x, best_of_starts(x, 40, seed=0, num_init=1, max_iter=10)) < 1e-10
    assert torch.allclose(best_of_starts(x, 1, seed=0, num_init=2, max_iter=10)[0], x.mean(dim=0), atol=1e-6)
    assert torch.equal(best_of_starts(x[:1], 1, seed=0, num_init=1, max_iter=10), x[:1])


@pytest.mark.parametrize("offset", [0.0, 3000.1])
def test_duplicate_rows_start_from_different_ones(offset):
    x = (cloud(3, dim=40) + offset).repeat(5, 1)
    for seed in range(20):
        assert len(best_of_starts(x, 3, seed=seed, num_init=1, max_iter=0).unique(dim=0)) == 3
    centroids = best_of_starts(x, 6, seed=0, num_init=2, max_iter=10)
    assert centroids.isfinite().all() and inertia_of(x, centroids) == pytest.approx(0, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spherical", [False, True])
def test_on_cuda_runs_repeat_and_agree_with_the_cpu(spherical):
    labels = torch.arange(5003) % 5
    x = normalize(4 * torch.eye(5, 6)[labels] + 0.02 * cloud(5003, 6), dim=1).cuda()
    first, second = (clustering.kmeans(x, 5, seed=2, spherical=spherical) for _ in range(2))
    joint = clustering.joint_then_per_modality([x, x.flip(0)], 5, seed=2)
    assert first[0].is_cuda and torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert clustering_accuracy(first[1], labels) == 1.0 and torch.equal(joint[2][0].flip(0), joint[2][1])
    wide = cloud(20_000, 64).cuda()
    runs = [best_of_starts(wide, 20, seed=0, num_init=2, max_iter=30) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    on_cpu = inertia_of(wide.cpu(), best_of_starts(wide.cpu(), 20, seed=0, num_init=2, max_iter=30))
    assert inertia_of(wide, runs[0]) == pytest.approx(on_cpu, rel=0.02)
