"""utils.evaluation.metrics against hand-worked rankings, slow loops, scikit-learn and simulation."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from utils.evaluation import metrics
from utils.evaluation.metrics import chance_map, mean_average_precision, retrieval_metrics

ROOT = Path(__file__).resolve().parents[2]


def random_sets(seed=0, queries=37, items=53, dim=8, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query, gallery = (torch.randn(n, dim, generator=generator, dtype=dtype) for n in (queries, items))
    labels = [torch.randint(0, classes, (n,), generator=generator) for n in (queries, items)]
    return query, labels[0], gallery, labels[1]


def slow_rankings(query, query_labels, gallery, gallery_labels):
    """Relevance lists by plain Python; assumes no ties."""
    rankings = []
    for vector, label in zip(query.tolist(), query_labels.tolist()):
        scored = []
        for item, item_label in zip(gallery.tolist(), gallery_labels.tolist()):
            dot = sum(a * b for a, b in zip(vector, item))
            norms = sum(a * a for a in vector) ** 0.5 * sum(b * b for b in item) ** 0.5
            scored.append((dot / norms, item_label == label))
        rankings.append([relevant for _, relevant in sorted(scored, key=lambda pair: -pair[0])])
    return rankings


def slow_average_precision(relevant):
    hits, total = 0, 0.0
    for rank, is_relevant in enumerate(relevant, start=1):
        if is_relevant:
            hits += 1
            total += hits / rank
    return total / hits if hits else 0.0


def on_circle(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_hand_worked_ranking():
    gallery, gallery_labels = on_circle(50, 10, 30, 20, 40), torch.tensor([9, 7, 9, -3, 7])
    # query at 0 degrees ranks 10, 20, 30, 40, 50: relevant (label 7) at ranks 1 and 4
    values = retrieval_metrics(5 * on_circle(0), torch.tensor([7]), gallery, gallery_labels, ks=(1, 5))
    assert values["map"] == pytest.approx((1 / 1 + 2 / 4) / 2, abs=1e-12)
    assert values["ndcg"] == pytest.approx((1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)), abs=1e-12)
    # label 9: relevant at ranks 3 and 5
    query, label = on_circle(0), torch.tensor([9])
    assert mean_average_precision(query, label, gallery, gallery_labels) == pytest.approx((1 / 3 + 2 / 5) / 2, abs=1e-12)
    values = retrieval_metrics(query, label, gallery, gallery_labels, ks=(1, 2, 3, 99))
    assert [values[f"r@{k}"] for k in (1, 2, 3, 99)] == [0, 0, 1, 1]
    assert values["ndcg"] == pytest.approx((1 / np.log2(4) + 1 / np.log2(6)) / (1 + 1 / np.log2(3)), abs=1e-12)


def test_double_loop():
    sets = random_sets()
    rankings = slow_rankings(*sets)
    expected = np.mean([slow_average_precision(relevant) for relevant in rankings])
    assert abs(mean_average_precision(*(values.numpy() for values in sets)) - expected) < 1e-9
    values = retrieval_metrics(*sets, ks=(1, 5))
    assert list(values) == ["map", "r@1", "r@5", "ndcg"] and abs(values["map"] - expected) < 1e-9
    for k in (1, 5):
        assert values[f"r@{k}"] == pytest.approx(np.mean([any(relevant[:k]) for relevant in rankings]), abs=1e-12)
    assert values["map"] == mean_average_precision(*sets)


def test_scikit_learn_agrees():
    query, query_labels, gallery, gallery_labels = sets = random_sets(seed=1)
    scores = torch.nn.functional.cosine_similarity(query.unsqueeze(1), gallery.unsqueeze(0), dim=2).numpy()
    relevant = (query_labels.unsqueeze(1) == gallery_labels).numpy()
    expected = np.mean([average_precision_score(truth, score) for truth, score in zip(relevant, scores)])
    assert abs(mean_average_precision(*sets) - expected) < 1e-9
    assert abs(retrieval_metrics(*sets)["ndcg"] - ndcg_score(relevant, scores)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries, items", [(37, 53), (18, 5), (5, 18), (7, 7)])
def test_chunk_sizes_agree_even_with_ties(dtype, queries, items):
    query, query_labels, gallery, gallery_labels = random_sets(2, queries, items, dim=12, dtype=dtype)
    for pair in ((query, gallery), (query.sign(), gallery.sign())):  # codes have 13 levels of similarity only
        arguments = (pair[0], query_labels, pair[1], gallery_labels)
        whole = retrieval_metrics(*arguments)
        for size in (1, 2, 5, 1000):
            assert retrieval_metrics(*arguments, chunk_size=size) == pytest.approx(whole, abs=1e-12)


def test_memory_bound_sets_the_chunk(monkeypatch):
    sets = random_sets()
    expected = retrieval_metrics(*sets)
    monkeypatch.setitem(metrics.SCORE_BYTES, "cpu", 8 * 53 * 4)
    prepared = metrics._prepare(*sets)
    assert [len(chunk) for chunk in metrics._ranked_relevance(*prepared, None, 0)] == [4] * 9 + [1]
    assert retrieval_metrics(*sets) == pytest.approx(expected, abs=1e-12)


PEAK = """
import torch
from utils.evaluation.metrics import mean_average_precision

torch.set_num_threads(1)
query, gallery = torch.randn(1000, 8), torch.randn(100_000, 8)
labels = torch.arange(100_000) % 10
for queries in (200, 1000, 1000):
    mean_average_precision(query[:queries], labels[:queries], gallery, labels)
    print(int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to read the peak of the memory")
def test_memory_does_not_grow_with_the_number_of_queries():
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    few, _, many = map(float, found.stdout.split())
    assert many < few + 250, f"{few:.0f} MiB after 200 queries, {many:.0f} MiB after 2,000 more"


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
    (relevant,) = metrics._ranked_relevance(*prepared, None, 0)
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


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(0, 3)), r"query must be a non-empty .* shape \(0, 3\)"),
        (dict(gallery=torch.ones(3)), r"gallery must be a non-empty .* shape \(3,\)"),
        (dict(gallery=torch.ones(4, 2)), "one width D, got 3 and 2"),
        (dict(query_labels=torch.zeros(3, dtype=torch.long)), r"query_labels must have shape \(2,\), got \(3,\)"),
        (dict(gallery_labels=torch.zeros(4)), "gallery_labels must hold integers, got torch.float32"),
        (dict(gallery=torch.tensor([[1.0] * 3] * 2 + [[float("nan")] * 3] * 2)), "2 rows with NaN or infinity, first at row 2"),
        (dict(chunk_size=0), "chunk_size must be positive, got 0"),
    ],
)
def test_bad_input(change, message):
    for ks in ((), (0,), (1.5,), (True,)):
        with pytest.raises(ValueError, match="k must be positive integers"):
            retrieval_metrics(*random_sets(), ks=ks)
    good = dict(query=torch.ones(2, 3), query_labels=torch.tensor([0, 1]), gallery=torch.ones(4, 3), gallery_labels=np.array([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=message):
        mean_average_precision(**{**good, **change})


def test_chance_by_simulation():
    generator = np.random.default_rng(0)
    gallery_labels = np.array([0] * 3 + [1] * 9 + [2])
    query_labels = np.array([0, 1, 1, 2, 5])  # 5 is not in the gallery
    runs = []
    for _ in range(4000):
        order = generator.permutation(gallery_labels)
        runs.append(np.mean([slow_average_precision(order == label) for label in query_labels]))
    standard_error = np.std(runs) / len(runs) ** 0.5
    assert abs(np.mean(runs) - chance_map(query_labels, gallery_labels)) < 4 * standard_error


def test_chance_exact_cases():
    # two items, one relevant: precision 1 or 1/2 with equal probability
    assert chance_map(torch.tensor([4]), torch.tensor([4, 5])) == pytest.approx(0.75, abs=1e-12)
    assert chance_map(np.array([4]), np.array([4])) == 1.0
    assert chance_map(np.array([4]), np.array([4, 4, 4])) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match="0 gallery items"):
        chance_map(np.array([4]), np.array([], dtype=int))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    sets = random_sets()
    on_gpu = retrieval_metrics(*(values.cuda() for values in sets))
    assert on_gpu == pytest.approx(retrieval_metrics(*sets), abs=1e-12)


def test_reversed_and_read_only_arrays_are_accepted(recwarn):
    rows, labels = np.random.default_rng(0).normal(size=(6, 4)), np.arange(6) % 3
    expected = mean_average_precision(rows, labels, rows, labels)
    rows.flags.writeable = labels.flags.writeable = False
    assert mean_average_precision(rows[::-1], labels[::-1], rows, labels) == pytest.approx(expected)
    assert not recwarn.list
