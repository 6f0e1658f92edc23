"""utils.evaluation.consensus: communities found where they were planted, reliability and fused beliefs."""

import pytest
import torch
from torch.nn import functional as F

from utils.evaluation.clustering import clustering_accuracy
from utils.evaluation.consensus import find_communities, fuse, trust, view_agreement


def planted(sizes, spread, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(len(sizes), 16, generator=numbers), dim=1)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = centres[labels] + spread * torch.randn(len(labels), 16, generator=numbers)
    return F.normalize(rows, dim=1), labels


@pytest.mark.parametrize("sizes", [(120, 120, 120), (300, 60, 60, 30)])
def test_the_number_of_planted_groups_is_found(sizes):
    rows, labels = planted(sizes, 0.1)
    found = find_communities(rows, seed=3)
    assert found.num_clusters == len(sizes) == len(found.ids.unique())
    assert clustering_accuracy(found.ids, labels) > 0.99
    chosen = next(trial for trial in found.trials if trial["resolution"] == found.resolution)
    assert chosen["stability"] == found.stability == max(trial["stability"] for trial in found.trials) > 0.95


def test_clearer_groups_are_more_stable_and_a_seed_fixes_everything():
    clear, blurred = (find_communities(planted((100,) * 5, spread)[0], seed=0) for spread in (0.1, 0.4))
    assert clear.stability > blurred.stability
    again = find_communities(planted((100,) * 5, 0.4)[0], seed=0)
    assert torch.equal(again.ids, blurred.ids) and again.trials == blurred.trials


def test_too_few_rows():
    with pytest.raises(ValueError, match="more than 15 rows, found 15"):
        find_communities(planted((15,), 0.1)[0], seed=0)


def test_agreement_of_views_counts_equal_decisions():
    first = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    second = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.1, 0.9], [0.8, 0.2]])
    assert view_agreement([first, second]) == 0.75


def test_trust_follows_the_odds():
    assert trust({"a": 0.9, "b": 0.5}) == pytest.approx({"a": 0.9, "b": 0.1})
    assert trust({"a": 1.0, "b": 1.0}) == {"a": 0.5, "b": 0.5}
    assert trust({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}


def test_fused_beliefs_are_the_weighted_mean():
    posteriors = {"a": torch.tensor([[0.8, 0.2]]), "b": torch.tensor([[0.1, 0.9]])}
    torch.testing.assert_close(fuse(posteriors, {"a": 3.0, "b": 1.0}), torch.tensor([[0.625, 0.375]]))
