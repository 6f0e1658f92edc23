"""utils.evaluation.ranking: diffusion against dense loops in float64, what it may depend on, and its place in the metrics."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.evaluation.metrics import mean_average_precision, retrieval_metrics
from utils.evaluation.ranking import ALPHA, NEIGHBOURS, STEPS, UNREACHED, DiffusionRanking, nearest


def unit(count, dim, seed):
    return F.normalize(torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


def dense_scores(query, gallery, own=None):
    """The definition, one query, with loops over a full matrix."""
    size = len(gallery)
    similar = (gallery @ gallery.T).numpy()
    listed = np.zeros((size, size), dtype=bool)
    for i in range(size):
        others = [j for j in np.argsort(-similar[i], kind="stable") if j != i]
        listed[i, others[:NEIGHBOURS]] = True
    weights = np.where(listed | listed.T, np.clip(similar, 0, None) ** 3, 0)
    degree = weights.sum(1)
    smooth = weights / np.sqrt(np.outer(degree, degree))
    cosines = (gallery @ query).numpy()
    order = [j for j in np.argsort(-cosines, kind="stable") if j != own][:NEIGHBOURS]
    first = np.zeros(size)
    first[order] = np.clip(cosines[order], 0, None) ** 3
    first /= np.linalg.norm(first)
    state = first
    for _ in range(STEPS):
        state = ALPHA * smooth @ state + (1 - ALPHA) * first
    return state + UNREACHED * cosines


@pytest.mark.parametrize("exclude_self", [False, True])
def test_sparse_equals_dense(exclude_self):
    gallery = unit(60, 6, 0)
    queries = gallery if exclude_self else unit(11, 6, 1)
    ranking = DiffusionRanking(gallery, exclude_self)
    found = torch.cat([ranking.scores(part, start) for start, part in zip(range(0, len(queries), 7), queries.split(7))])
    for i, query in enumerate(queries):
        expected = dense_scores(query, gallery, own=i if exclude_self else None)
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-10, atol=1e-14)


def test_a_query_does_not_depend_on_the_others():
    gallery, queries = unit(50, 5, 2), unit(8, 5, 3)
    ranking = DiffusionRanking(gallery)
    together = ranking.scores(queries)
    torch.testing.assert_close(together, torch.cat([ranking.scores(query[None]) for query in queries]), rtol=1e-12, atol=1e-15)


def test_chains_are_followed():
    """Two chains whose links are similar only to the next ones: the far end is as far as the other chain, but connected."""
    places = torch.arange(120, dtype=torch.float64)
    bumps = torch.exp(-((places[:, None] - places) ** 2) / 50) * (places[:, None] // 60 == places // 60)
    rows = F.normalize(bumps + 0.05 * torch.randn(120, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), dim=1)
    labels = (places // 60).long()
    plain = retrieval_metrics(rows, labels, rows, labels, exclude_self=True)["map"]
    diffused = retrieval_metrics(rows, labels, rows, labels, exclude_self=True, ranking="diffusion")["map"]
    assert plain < 0.85 and diffused > 0.98


@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_metrics_rank_by_it_in_chunks(chunk_size):
    gallery, queries = unit(40, 4, 4), unit(13, 4, 5)
    labels, query_labels = torch.arange(40) % 3, torch.arange(13) % 3
    precisions = []
    for query, label in zip(queries, query_labels):
        relevant = (labels == label).numpy()[np.argsort(-dense_scores(query, gallery), kind="stable")]
        precisions.append((np.cumsum(relevant) / np.arange(1, 41))[relevant].mean())
    scores = retrieval_metrics(queries, query_labels, gallery, labels, chunk_size=chunk_size, ranking="diffusion")
    assert scores["map"] == pytest.approx(np.mean(precisions), abs=1e-12)


def test_dot_products_rank_posteriors_by_the_chance_of_one_cluster():
    query, gallery = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    labels = torch.tensor([0, 1])
    by_dot = retrieval_metrics(query, labels[1:], gallery, labels, similarity="dot")["map"]  # 0.50 and 0.58
    assert by_dot == 1 and mean_average_precision(query, labels[1:], gallery, labels) == 0.5  # cosines 0.98 and 0.88
    with pytest.raises(ValueError, match="norm at most"):
        retrieval_metrics(query * 9, labels[1:], gallery, labels, similarity="dot")


def test_small_galleries():
    for size in (1, 2, NEIGHBOURS):
        scores = DiffusionRanking(unit(size, 3, 6)).scores(unit(4, 3, 7))
        assert scores.shape == (4, size) and scores.isfinite().all()


def test_nearest_leaves_out_the_item_itself_in_every_block(monkeypatch):
    monkeypatch.setattr("utils.evaluation.ranking.BLOCK_BYTES", 8 * 30 * 4)  # four rows at a time
    rows = unit(30, 3, 8)
    columns, values = nearest(rows, rows, 5, own=0)
    similar = (rows @ rows.T).fill_diagonal_(-torch.inf)
    assert torch.equal(columns, similar.topk(5).indices)
    torch.testing.assert_close(values, similar.topk(5).values)
