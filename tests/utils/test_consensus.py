"""utils.evaluation.consensus: communities found where they were planted, reliability and fused beliefs."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, cohen_kappa_score
from torch.nn import functional as F

from utils.evaluation.clustering import clustering_accuracy
from utils.evaluation.consensus import (
    agreement_of_partitions,
    cluster_objects,
    fuse,
    most_typical,
    neighbour_graph,
    trust,
    view_agreement,
)


def planted(sizes, spread, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(len(sizes), 16, generator=numbers), dim=1)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = centres[labels] + spread * torch.randn(len(labels), 16, generator=numbers)
    return F.normalize(rows, dim=1), labels


def modalities(sizes, first, second):
    """Two views of the same objects, with their own noise."""
    one, labels = planted(sizes, first)
    numbers = torch.Generator().manual_seed(1)
    return {"A": one, "B": F.normalize(one + second * torch.randn(one.shape, generator=numbers), dim=1)}, labels


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("sizes", [(120, 120, 120), (300, 60, 60, 40)])
def test_the_number_of_planted_groups_is_found(sizes, trusted):
    rows, labels = modalities(sizes, 0.1, 0.05)
    found = cluster_objects(rows, "auto", trusted, seed=3)
    assert found.record["num_clusters"] == len(sizes) == len(found.ids.unique()) == len(found.centroids["A"])
    assert clustering_accuracy(found.ids, labels) > 0.99
    for name, centroids in found.centroids.items():
        mean = F.normalize(torch.stack([rows[name][found.ids == k].mean(0) for k in range(len(sizes))]), dim=1)
        torch.testing.assert_close(centroids, mean)


def test_the_modality_that_sees_the_groups_is_trusted():
    rows, labels = modalities((80,) * 6, 0.15, 0.3)
    found = cluster_objects(rows, "auto", True, seed=0)
    assert found.record["method"].endswith("of A") and clustering_accuracy(found.ids, labels) > 0.98
    best = {name: max(trial["agreement"] for trial in trials) for name, trials in found.record["trials"].items()}
    assert best["A"] > best["B"]
    again = cluster_objects(rows, "auto", True, seed=0)
    assert torch.equal(again.ids, found.ids) and again.record == found.record


def test_small_groups_that_the_graphs_merge_are_split_rather():
    rows, labels = modalities((16,) * 30, 0.2, 0.25)
    found = cluster_objects(rows, "auto", True, seed=0)
    trials = found.record["trials"]["A"]
    assert max(trial["agreement"] for trial in trials) < 0.7 and max(max(trial["num_clusters"]) for trial in trials) < 15
    assert found.record["method"] == "Louvain communities of A, over-clustered" and found.record["resolution"] == 6
    assert found.record["num_clusters"] == len(found.centroids["B"]) and clustering_accuracy(found.ids, labels) > 0.9
    one = [np.zeros(8, dtype=np.int64)]
    assert agreement_of_partitions({"A": [one], "B": [one]}, "A") == [0]  # a single community says nothing


def test_fine_communities_split_confirmed_groups_and_merge_none():
    rows, labels = modalities((120, 120, 120), 0.1, 0.05)
    found = cluster_objects(rows, "fine", True, seed=0)
    assert found.record["resolution"] == 6 and found.record["num_clusters"] == len(found.ids.unique()) > 6
    assert all(len(labels[found.ids == k].unique()) == 1 for k in range(found.record["num_clusters"]))


def test_the_most_typical_run_is_not_the_one_that_merges():
    usual = np.repeat([0, 1, 2], 20)
    merged = np.where(np.arange(60) < 28, 0, usual)
    for runs in ([merged, usual, usual], [usual, merged, 2 - usual], [usual]):
        assert adjusted_rand_score(most_typical(runs), usual) == 1


def test_agreement_by_hand():
    coarse, fine = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 2, 2, 1, 1, 1, 1])
    found = {"A": [[coarse], [fine]], "B": [[coarse], [coarse]], "C": [[fine], [fine]]}
    between = adjusted_rand_score(coarse, fine)
    assert agreement_of_partitions(found, "A") == pytest.approx([(1 + between) / 2, (between + 1) / 2])
    assert agreement_of_partitions({"A": found["A"], "B": found["B"]}, "A") == pytest.approx([1, between])


def test_given_a_number_it_is_the_joint_k_means():
    rows, labels = modalities((60,) * 4, 0.1, 0.1)
    found = cluster_objects(rows, 4, True, seed=0)
    assert found.ids is None and found.record == {"num_clusters": 4, "method": "k-means"}
    assert clustering_accuracy((rows["A"] @ found.centroids["A"].T).argmax(1), labels) > 0.99
    with pytest.raises(ValueError, match="more than 15 rows, found 15"):
        neighbour_graph(planted((15,), 0.1)[0])


def test_agreement_of_views_is_cohens_kappa_and_a_collapsed_modality_not_reliable():
    first = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    second = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.1, 0.9], [0.8, 0.2]])
    assert view_agreement([first, second]) == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    one, two = torch.rand(2, 200, 7, generator=torch.Generator().manual_seed(0))
    two[:150] = one[:150]
    assert view_agreement([one, two]) == pytest.approx(cohen_kappa_score(one.argmax(1), two.argmax(1)))
    assert view_agreement([one, one]) == 1
    collapsed = torch.tensor([[0.9, 0.1]] * 5)
    assert view_agreement([collapsed, collapsed]) == 0
    assert view_agreement([collapsed, collapsed.flip(1)]) == 0  # worse than chance is no reliability either


def test_trust_follows_the_odds_and_fused_beliefs_are_the_weighted_mean():
    assert trust({"a": 0.9, "b": 0.5}) == pytest.approx({"a": 0.9, "b": 0.1})
    assert trust({"a": 1.0, "b": 1.0}) == trust({"a": 0.0, "b": 0.0}) == {"a": 0.5, "b": 0.5}
    posteriors = {"a": torch.tensor([[0.8, 0.2]]), "b": torch.tensor([[0.1, 0.9]])}
    torch.testing.assert_close(fuse(posteriors, {"a": 3.0, "b": 1.0}), torch.tensor([[0.625, 0.375]]))
