"""utils.evaluation.device_kmeans on the CPU, against scikit-learn and slow loops in float64; on a CUDA device where there is one."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from utils.evaluation import clustering, device_kmeans
from utils.evaluation.clustering import clustering_accuracy
from utils.evaluation.device_kmeans import WEIGHT_LEVELS, _draw, _inertia, _plus_plus, best_of_starts, lloyd


def blobs(count=203, clusters=5, dim=6, spread=0.02, seed=0, origin=0.0):
    """(N, D) float32 around well separated centres, and the numbers of their blobs."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(clusters, dim) + origin
    labels = torch.randperm(count, generator=generator) % clusters
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("origin", [0.0, 1000.0])
def test_separated_blobs_are_found_from_one_start_as_scikit_learn_finds_them(seed, origin):
    x, labels = blobs(origin=origin)
    centroids = best_of_starts(x, 5, seed=seed, num_init=1, max_iter=100)
    again, assignments = lloyd(x, centroids, 0)
    reference = KMeans(5, n_init=1, random_state=0).fit(x.double().numpy())
    assert torch.equal(again, centroids) and clustering_accuracy(assignments, labels) == 1.0
    assert clustering_accuracy(assignments, reference.labels_) == 1.0
    assert inertia_of(x, centroids) == pytest.approx(reference.inertia_, rel=1e-3 if origin else 1e-6)
    for cluster in range(5):
        assert torch.allclose(centroids[cluster], x[assignments == cluster].double().mean(dim=0).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clusters", [2, 7, 20])
def test_inertia_is_that_of_scikit_learn_within_a_few_percent_where_there_are_no_clusters(clusters):
    x = cloud()
    centroids = best_of_starts(x, clusters, seed=0, num_init=10, max_iter=100)
    inertia = inertia_of(x, centroids)
    reference = KMeans(clusters, n_init=10, random_state=0).fit(x.numpy()).inertia_
    assert inertia == pytest.approx(reference, rel=0.03)
    single = [inertia_of(x, best_of_starts(x, clusters, seed=s, num_init=1, max_iter=100)) for s in range(5)]
    assert inertia <= np.mean(single) * (1 + 1e-6)


def test_the_best_of_the_starts_is_kept(monkeypatch):
    x, done = cloud(), []
    spy = lambda *arguments: done.append(lloyd(*arguments)) or done[-1]
    monkeypatch.setattr(device_kmeans, "lloyd", spy)
    centroids = best_of_starts(x, 12, seed=1, num_init=6, max_iter=20)
    inertias = [inertia_of(x, centres) for centres, _ in done]
    assert len(set(inertias)) > 1 and torch.equal(centroids, done[int(np.argmin(inertias))][0])


def test_same_seed_same_result_whatever_the_global_state():
    x = cloud()
    first = best_of_starts(x, 9, seed=3, num_init=2, max_iter=50)
    torch.manual_seed(99)
    assert torch.equal(best_of_starts(x, 9, seed=3, num_init=2, max_iter=50), first)
    assert not torch.equal(best_of_starts(x, 9, seed=4, num_init=1, max_iter=50), first)
    for seed in (-1, 2**40 + 3):
        assert torch.isfinite(best_of_starts(x, 2, seed=seed, num_init=1, max_iter=5)).all()


@pytest.mark.parametrize("chunk", [7, 50, 300, 301])
def test_chunks_change_nothing_but_rounding(monkeypatch, chunk):
    x = cloud()
    whole = best_of_starts(x, 8, seed=0, num_init=3, max_iter=100)
    ids, inertia = lloyd(x, whole, 0)[1], inertia_of(x, whole)
    seen = []
    passes = device_kmeans._pass
    monkeypatch.setattr(device_kmeans, "_pass", lambda rows, *rest: seen.append(len(rows)) or passes(rows, *rest))
    monkeypatch.setattr(device_kmeans, "CHUNK_ELEMENTS", 8 * chunk)  # 8 = max(K, D): `chunk` rows at a time
    split = best_of_starts(x, 8, seed=0, num_init=3, max_iter=100)
    assert seen and torch.allclose(split, whole, atol=1e-5) and torch.equal(lloyd(x, split, 0)[1], ids)
    assert inertia_of(x, split) == pytest.approx(inertia, rel=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("max_iter", [0, 1, 4, 100])
def test_lloyd_against_slow_loops(monkeypatch, spherical, max_iter):
    monkeypatch.setattr(device_kmeans, "CHUNK_ELEMENTS", 6 * 11)  # 11 rows at a time, 60 = 5 * 11 + 5
    x = normalize(cloud(60) + 3, dim=1) if spherical else cloud(60)
    start = torch.cat([3 * x[:5] if spherical else x[:5], -50 * torch.ones(1, 4)])  # the last one stays empty
    given = start.clone()
    centroids, ids = lloyd(x, start, max_iter, spherical)
    expected, expected_ids, expected_inertia = slow_lloyd(x, given, max_iter, spherical)
    assert ids.dtype == torch.int64 and ids.tolist() == expected_ids and torch.equal(start, given)
    np.testing.assert_allclose(centroids.numpy(), expected, atol=1e-5)
    assert float(_inertia(x, centroids, ids)) == pytest.approx(expected_inertia, rel=1e-5)
    assert centroids is not start and 5 not in expected_ids
    assert torch.allclose(centroids[5], normalize(start[5], dim=0) if spherical else start[5])


def test_distances_far_from_the_origin_keep_their_digits():
    x = cloud(60) + 1000  # squares of coordinates are 10^6, where float32 has steps of 0.06
    expected, ids, _ = slow_lloyd(x, x[:5], 20, False)
    centroids, assignments = lloyd(x, x[:5], 20)
    assert assignments.tolist() == ids
    np.testing.assert_allclose(centroids.numpy(), expected, rtol=0, atol=2e-4)


def test_as_many_clusters_as_rows_and_one_cluster():
    x = cloud(40)
    centroids = best_of_starts(x, 40, seed=0, num_init=1, max_iter=10)
    ids = lloyd(x, centroids, 0)[1]
    assert sorted(ids.tolist()) == list(range(40)) and inertia_of(x, centroids) < 1e-10
    assert torch.allclose(centroids[ids], x, atol=1e-6)
    mean = best_of_starts(x, 1, seed=0, num_init=2, max_iter=10)
    assert torch.allclose(mean[0], x.mean(dim=0), atol=1e-6)
    assert torch.equal(best_of_starts(x[:1], 1, seed=0, num_init=1, max_iter=10), x[:1])


@pytest.mark.parametrize("offset", [0.0, 3000.1])
def test_duplicate_rows_start_from_different_ones_and_leave_finite_centres(offset):
    x = (cloud(3, dim=40) + offset).repeat(5, 1)
    for seed in range(20):
        uniform = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert len(_plus_plus(x, uniform).unique(dim=0)) == 3
    centroids = best_of_starts(x, 6, seed=0, num_init=2, max_iter=10)
    ids = lloyd(x, centroids, 0)[1]
    assert torch.isfinite(centroids).all() and inertia_of(x, centroids) == pytest.approx(0, abs=1e-6)
    assert clustering_accuracy(ids, torch.arange(15) % 3) == 1.0 and len(ids.unique()) == 3


def test_draws_by_hand():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    last = 1 - 2.0**-53
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 0.6, last], dtype=torch.float64)
    assert _draw(weights, uniform).tolist() == [1, 1, 2, 2, 2]
    assert _draw(torch.zeros(4), uniform).tolist() == [0, 0, 1, 2, 3]
    assert _draw(torch.tensor([1.0, 1e-30]), torch.tensor([last], dtype=torch.float64)).tolist() == [0]  # below one level
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    share = torch.bincount(_draw(torch.tensor([2.0, 1.0, 4.0, 3.0]), grid), minlength=4)
    assert share.tolist() == [2000, 1000, 4000, 3000]
    assert (2**31) * WEIGHT_LEVELS < 2**63


def test_greedy_starts_against_loops():
    x = cloud(50)
    uniform = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    rows, numbers = x.double().numpy(), uniform.numpy()
    chosen = [int(numbers[0, 0] * 50)]
    for step in range(1, 6):
        closest = [min(((row - rows[c]) ** 2).sum() for c in chosen) for row in rows]
        edges = np.cumsum(closest) / np.sum(closest)
        candidates = [int(np.searchsorted(edges, number, side="right")) for number in numbers[step]]
        left = [sum(min(d, ((row - rows[c]) ** 2).sum()) for d, row in zip(closest, rows)) for c in candidates]
        chosen.append(candidates[int(np.argmin(left))])
    assert torch.equal(_plus_plus(x, uniform), x[chosen])


def test_no_start_is_refused():
    for search in (best_of_starts, clustering.kmeans):
        with pytest.raises(ValueError, match="n(um)?_init.*0"):
            search(cloud(), 3, seed=0, num_init=0, max_iter=10)


def test_kmeans_and_joint_clustering_on_this_route(monkeypatch):
    monkeypatch.setattr(clustering, "_scikit_learn", best_of_starts)
    x, labels = blobs()
    x = normalize(x, dim=1).double().requires_grad_()
    for spherical in (False, True):
        centroids, assignments = clustering.kmeans(x, 5, spherical=spherical, num_init=2)
        assert centroids.dtype == torch.float32 and not centroids.requires_grad
        assert clustering_accuracy(assignments, labels) == 1.0
        assert not spherical or torch.allclose(centroids.norm(dim=1), torch.ones(5), atol=1e-6)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    _, _, (first, second) = clustering.joint_then_per_modality([x, x[order]], 5, seed=0)
    assert torch.equal(first[order], second) and clustering_accuracy(first, labels) == 1.0


class NoHostCopies(TorchDispatchMode):
    """Fails on any operation that makes a CPU tensor of a CUDA tensor with more than one element."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = any(isinstance(value, torch.Tensor) and value.is_cuda and value.numel() > 1 for value in args)
        assert not (wide and isinstance(out, torch.Tensor) and out.device.type == "cpu"), f"{func} copies to the host"
        return out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spherical", [False, True])
def test_on_cuda_rows_stay_there_and_runs_repeat(spherical):
    x, labels = blobs(count=5003)
    x = normalize(x, dim=1).cuda()
    with NoHostCopies():
        first = clustering.kmeans(x, 5, seed=2, spherical=spherical)
        joint = clustering.joint_then_per_modality([x, x.flip(0)], 5, seed=2)
    second = clustering.kmeans(x, 5, seed=2, spherical=spherical)
    assert first[0].is_cuda and torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert clustering_accuracy(first[1], labels) == 1.0 and torch.equal(joint[2][0].flip(0), joint[2][1])
    wide = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).cuda()
    runs = [best_of_starts(wide, 20, seed=0, num_init=2, max_iter=30) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    on_cpu = inertia_of(wide.cpu(), best_of_starts(wide.cpu(), 20, seed=0, num_init=2, max_iter=30))
    assert inertia_of(wide, runs[0]) == pytest.approx(on_cpu, rel=0.02)
