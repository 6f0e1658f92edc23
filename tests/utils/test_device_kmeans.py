"""utils.evaluation.device_kmeans against slow loops in float64 and scikit-learn; on a CUDA device where there is one."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from utils.evaluation import clustering, device_kmeans
from utils.evaluation.clustering import clustering_accuracy
from utils.evaluation.device_kmeans import _inertia, best_of_starts, lloyd


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
    single = [inertia_of(x, best_of_starts(x, clusters, seed=s, num_init=1, max_iter=100)) for s in range(5)]
    assert inertia <= np.mean(single) * (1 + 1e-6)


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
