"""utils.evaluation.metrics and ranking against hand-worked rankings, slow and dense loops, scikit-learn and simulation."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch.nn import functional as F

from utils.evaluation import metrics
from utils.evaluation.metrics import chance_map, mean_average_precision, retrieval_metrics
from utils.evaluation.ranking import ALPHA, NEIGHBOURS, STEPS, UNREACHED, DiffusionRanking, nearest


def random_sets(seed=0, queries=37, items=53, dim=8, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query, gallery = (torch.randn(n, dim, generator=generator, dtype=dtype) for n in (queries, items))
    labels = [torch.randint(0, classes, (n,), generator=generator) for n in (queries, items)]
    return query, labels[0], gallery, labels[1]


def slow_rankings(query, query_labels, gallery, gallery_labels):
    """Relevance lists by plain Python; assumes no ties."""
    cosine = lambda one, two: sum(a * b for a, b in zip(one, two)) / sum(a * a for a in one) ** 0.5 / sum(b * b for b in two) ** 0.5
    for vector, label in zip(query.tolist(), query_labels.tolist()):
        scored = [(cosine(vector, item), of_item == label) for item, of_item in zip(gallery.tolist(), gallery_labels.tolist())]
        yield [relevant for _, relevant in sorted(scored, key=lambda pair: -pair[0])]


def slow_average_precision(relevant):
    ranks = [rank for rank, is_relevant in enumerate(relevant, start=1) if is_relevant]
    return sum(hits / rank for hits, rank in enumerate(ranks, start=1)) / max(len(ranks), 1)


def test_double_loop_and_scikit_learn(recwarn):
    sets = random_sets()
    rankings = list(slow_rankings(*sets))
    expected = np.mean([slow_average_precision(relevant) for relevant in rankings])
    assert abs(mean_average_precision(*(values.numpy() for values in sets)) - expected) < 1e-9
    values = retrieval_metrics(*sets)
    assert list(values) == ["map", "r@1", "r@5", "r@10", "ndcg"] and abs(values["map"] - expected) < 1e-9
    for k in (1, 5, 10):
        assert values[f"r@{k}"] == pytest.approx(np.mean([any(relevant[:k]) for relevant in rankings]), abs=1e-12)
    assert values["map"] == mean_average_precision(*sets)
    query, query_labels, gallery, gallery_labels = sets
    scores = F.cosine_similarity(query.unsqueeze(1), gallery.unsqueeze(0), dim=2).numpy()
    relevant = (query_labels.unsqueeze(1) == gallery_labels).numpy()
    assert values["map"] == pytest.approx(np.mean(list(map(average_precision_score, relevant, scores))), abs=1e-9)
    assert values["ndcg"] == pytest.approx(ndcg_score(relevant, scores), abs=1e-9)
    if torch.cuda.is_available():
        assert retrieval_metrics(*(part.cuda() for part in sets)) == pytest.approx(values, abs=1e-12)
    arrays = [part.numpy()[::-1] for part in sets]
    for array in arrays:
        array.flags.writeable = False
    assert mean_average_precision(*arrays) == pytest.approx(expected) and not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries, items", [(37, 53), (18, 5), (5, 18), (7, 7)])
def test_chunk_sizes_agree_even_with_ties(dtype, queries, items, monkeypatch):
    query, query_labels, gallery, gallery_labels = random_sets(2, queries, items, dim=12, dtype=dtype)
    for pair in ((query, gallery), (query.sign(), gallery.sign())):  # codes have 13 levels of similarity only
        arguments = (pair[0], query_labels, pair[1], gallery_labels)
        whole = retrieval_metrics(*arguments)
        for size in (1, 2, 5):
            with monkeypatch.context() as patch:
                patch.setitem(metrics.SCORE_BYTES, "cpu", 8 * items * size)
                assert retrieval_metrics(*arguments) == pytest.approx(whole, abs=1e-12)


def test_memory_bound_sets_the_chunk(monkeypatch):
    sets = random_sets()
    expected, within = retrieval_metrics(*sets), retrieval_metrics(*sets[2:], *sets[2:], exclude_self=True)
    monkeypatch.setitem(metrics.SCORE_BYTES, "cpu", 8 * 53 * 4)
    prepared = metrics._prepare(*sets)
    assert [len(chunk) for chunk in metrics._ranked_relevance(*prepared, 0)] == [4] * 9 + [1]
    assert retrieval_metrics(*sets) == pytest.approx(expected, abs=1e-12)
    assert retrieval_metrics(*sets[2:], *sets[2:], exclude_self=True) == pytest.approx(within, abs=1e-12)


def test_equal_scores_give_chance_for_a_class_sorted_gallery():
    gallery_labels = torch.arange(10).repeat_interleave(60)
    query_labels = torch.zeros(1, dtype=torch.long)  # the class that stands first in the file
    chance = chance_map(query_labels, gallery_labels)
    ones = torch.ones(600, 4)
    scores = [mean_average_precision(ones[:1], query_labels, ones, gallery_labels, seed=seed) for seed in range(30)]
    assert abs(np.mean(scores) - chance) < 0.02 and max(scores) < 0.3
    assert len(set(scores)) > 1
    assert mean_average_precision(ones[:1], query_labels, ones, gallery_labels, seed=5) == scores[5]


def test_tied_codes_do_not_depend_on_summation_order():
    # equal cosines from different sign patterns differ by rounding; the ties must still be broken by the shuffle
    generator = torch.Generator().manual_seed(0)
    gallery = torch.ones(400, 64)
    for row in gallery:
        row[torch.randperm(64, generator=generator)[:16]] = -1
    labels = torch.arange(2).repeat_interleave(200)
    prepared = metrics._prepare(torch.ones(1, 64), labels[:1], gallery, labels)
    order = torch.randperm(400, generator=metrics.generator_for(0, "gallery order"))
    (relevant,) = metrics._ranked_relevance(*prepared, 0)
    assert torch.equal(relevant[0], labels[order] == 0)


def test_query_without_relevant_item_scores_zero_and_is_counted():
    query, _, gallery, gallery_labels = random_sets(queries=4)
    labels = torch.tensor([0, 77, 1, 78])
    with pytest.warns(UserWarning, match="2 of 4 queries have no relevant"):
        value = mean_average_precision(query, labels, gallery, gallery_labels)
    keep = torch.tensor([0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value == pytest.approx(mean_average_precision(query[keep], labels[keep], gallery, gallery_labels) / 2, abs=1e-12)
    with pytest.warns(UserWarning) as caught:
        values = retrieval_metrics(query, labels + 100, gallery, gallery_labels)
    assert set(values.values()) == {0.0} and len(caught) == 1


@pytest.mark.parametrize("scale", [1e-170, 1e160, None])
def test_perfect_clusters_and_norms_do_not_matter(scale):
    centres, labels = torch.eye(5), torch.arange(5).repeat(6)
    assert mean_average_precision(centres[labels], labels, 100 * centres[labels], labels) == 1.0
    query, query_labels, gallery, gallery_labels = sets = random_sets()
    scale = scale or torch.linspace(0.01, 100, len(gallery), dtype=torch.float64).unsqueeze(1)
    expected = mean_average_precision(*sets)
    assert mean_average_precision(query, query_labels, gallery * scale, gallery_labels) == pytest.approx(expected, abs=1e-12)
    items, zero = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 0])  # a zero row has cosine 0
    assert mean_average_precision(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), items, zero) == 0.5


@pytest.mark.parametrize("change, message", [
    (dict(query=torch.zeros(0, 3)), r"query must be a non-empty .* shape \(0, 3\)"),
    (dict(gallery=torch.ones(3)), r"gallery must be a non-empty .* shape \(3,\)"),
    (dict(gallery=torch.ones(4, 2)), "one width D, got 3 and 2"),
    (dict(query_labels=torch.zeros(3, dtype=torch.long)), r"query_labels must have shape \(2,\), got \(3,\)"),
    (dict(gallery_labels=torch.zeros(4)), "gallery_labels must hold integers, got torch.float32"),
    (dict(gallery=torch.tensor([[1.0] * 3] * 2 + [[float("nan")] * 3] * 2)), "2 rows with NaN or infinity, first at row 2"),
])
def test_bad_input(change, message):
    good = dict(query=torch.ones(2, 3), query_labels=torch.tensor([0, 1]), gallery=torch.ones(4, 3), gallery_labels=np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=message):
        mean_average_precision(**{**good, **change})


def test_chance_by_simulation_and_by_hand():
    generator = np.random.default_rng(0)
    gallery_labels = np.array([0] * 3 + [1] * 9 + [2])
    query_labels = np.array([0, 1, 1, 2, 5])  # 5 is not in the gallery
    runs = []
    for _ in range(4000):
        order = generator.permutation(gallery_labels)
        runs.append(np.mean([slow_average_precision(order == label) for label in query_labels]))
    standard_error = np.std(runs) / len(runs) ** 0.5
    assert abs(np.mean(runs) - chance_map(query_labels, gallery_labels)) < 4 * standard_error
    # two items, one relevant: precision 1 or 1/2 with equal probability
    assert chance_map(torch.tensor([4]), torch.tensor([4, 5])) == pytest.approx(0.75, abs=1e-12)
    assert chance_map(np.array([4]), np.array([4])) == 1.0
    assert chance_map(np.array([4]), np.array([4, 4, 4])) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="0 gallery items"):
        chance_map(np.array([4]), np.array([], dtype=int))


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
    ranking, own = DiffusionRanking(gallery), torch.arange(len(queries))
    found = torch.cat([ranking.scores(part, rows if exclude_self else None) for part, rows in zip(queries.split(7), own.split(7))])
    for i, query in enumerate(queries):
        expected = dense_scores(query, gallery, own=i if exclude_self else None)
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-10, atol=1e-14)


def test_small_galleries():
    for size in (1, 2, NEIGHBOURS):
        scores = DiffusionRanking(unit(size, 3, 6)).scores(unit(4, 3, 7))
        assert scores.shape == (4, size) and scores.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 7, 13])
def test_metrics_rank_by_it_in_chunks(chunk, monkeypatch):
    monkeypatch.setitem(metrics.SCORE_BYTES, "cpu", 8 * 40 * chunk)
    gallery, queries = unit(40, 4, 4), unit(13, 4, 5)
    labels, query_labels = torch.arange(40) % 3, torch.arange(13) % 3
    orders = [np.argsort(-dense_scores(query, gallery), kind="stable") for query in queries]
    precisions = [slow_average_precision((labels == label).numpy()[order]) for label, order in zip(query_labels, orders)]
    scores = retrieval_metrics(queries, query_labels, gallery, labels, ranking="diffusion")
    assert scores["map"] == pytest.approx(np.mean(precisions), abs=1e-12)


def test_equal_neighbours_owe_nothing_to_the_order_of_the_files():
    """Two classes in each of two clusters, all members alike, in the order of the classes."""
    labels = torch.arange(4).repeat_interleave(50)
    rows, sets = torch.eye(2, dtype=torch.float64)[labels // 2], dict(exclude_self=True, similarity="dot")
    diffused, plain = (
        np.mean([retrieval_metrics(rows, labels, rows, labels, ranking=ranking, seed=seed, **sets)["map"] for seed in range(5)])
        for ranking in ("diffusion", "plain")
    )
    assert diffused == pytest.approx(plain, abs=0.02)


def test_dot_products_rank_posteriors_by_the_chance_of_one_cluster():
    query, gallery = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    labels = torch.tensor([0, 1])
    by_dot = retrieval_metrics(query, labels[1:], gallery, labels, similarity="dot")["map"]  # 0.50 and 0.58
    assert by_dot == 1 and mean_average_precision(query, labels[1:], gallery, labels) == 0.5  # cosines 0.98 and 0.88
    with pytest.raises(ValueError, match="norm at most"):
        retrieval_metrics(query * 9, labels[1:], gallery, labels, similarity="dot")


def test_nearest_leaves_out_the_item_itself_in_every_block(monkeypatch):
    monkeypatch.setattr("utils.evaluation.ranking.BLOCK_BYTES", 8 * 30 * 4)  # four rows at a time
    rows = unit(30, 3, 8)
    similar = (rows @ rows.T).fill_diagonal_(-torch.inf)
    for own in (torch.arange(30), torch.tensor([7, 3, 29, 4, 0, 11])):
        columns, values = nearest(rows[own], rows, 5, own)
        assert torch.equal(columns, similar[own].topk(5).indices)
        torch.testing.assert_close(values, similar[own].topk(5).values)
