"""utils.evaluation.clustering on planted clusters, with brute-force permutations as the reference for accuracy."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from utils.evaluation import clustering
from utils.evaluation.clustering import ari, clustering_accuracy, joint_then_per_modality, kmeans, nmi, purity
from utils.evaluation.device_kmeans import best_of_starts


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


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.ones(3, 2), dict(num_clusters=5), "num_clusters = 5 for N = 3"),
        (torch.ones(3, 2), dict(num_clusters=0), "num_clusters = 0 for N = 3"),
        (torch.ones(3), dict(num_clusters=1), r"\(N, D\) tensor, got shape \(3,\)"),
        (torch.tensor([[1.0], [float("inf")]]), dict(num_clusters=1), "1 of 2 are not, first at row 1"),
        (torch.ones(3, 2), dict(num_clusters=2, init=torch.ones(3, 2)), r"init must have shape \(2, 2\), got \(3, 2\)"),
        (torch.ones(3, 2), dict(num_clusters=2, spherical=True), "unit rows, norms span 1.414 to 1.414"),
    ],
)
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


def test_scores_by_hand():
    assignments, labels = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([5, 5, 6, 6, 6, 5])
    assert clustering_accuracy(assignments, labels) == pytest.approx(4 / 6)  # cluster 2 is left over
    assert purity(assignments, labels) == pytest.approx(5 / 6)
    assert nmi(labels, labels) == pytest.approx(1.0) and ari(labels, labels) == pytest.approx(1.0)
    independent = torch.tensor([0, 1]).repeat(50), torch.tensor([0, 0, 1, 1]).repeat(25)
    assert nmi(*independent) == pytest.approx(0.0, abs=1e-9) and abs(ari(*independent)) < 0.05


def test_scores_refuse_what_is_no_assignment():
    with pytest.raises(ValueError):
        purity(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="assignments must be a non-empty"):
        nmi(torch.tensor([0.5, 1.0]), torch.tensor([0, 1]))
