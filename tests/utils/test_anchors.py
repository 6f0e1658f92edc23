"""utils.evaluation.anchors against slow loops."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.evaluation.anchors import FLOOR, NEIGHBOURS, POWER, Anchors


def pairs(count=60, dim=8, seed=0):
    """Objects around five centres in two modalities with an offset each."""
    numbers = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=numbers, dtype=torch.float64)
    groups = torch.arange(count) % 5
    centres = torch.randn(5, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    strength = torch.linspace(3, 0.1, dim, dtype=torch.float64)
    rows = {name: (centres[groups] + 0.3 * draw(count, dim)) * strength + shift for name, shift in (("A", 0.5), ("B", -0.5))}
    return {name: F.normalize(values, dim=1) for name, values in rows.items()}


def by_loops(train, name, row):
    """The equations of the docstring, one number at a time."""
    means = {key: values.numpy().mean(axis=0) for key, values in train.items()}
    unit = lambda values: values / np.linalg.norm(values)
    centred = [unit(sample - means[key]) for key, values in train.items() for sample in values.numpy()]
    moment = sum(np.outer(sample, sample) for sample in centred) / len(centred)
    strengths, axes = np.linalg.eigh(moment)
    whitening = sum(max(s, FLOOR * strengths.max()) ** (-POWER / 2) * np.outer(axis, axis) for s, axis in zip(strengths, axes.T))
    whiten = lambda key, sample: unit(whitening @ (sample - means[key]))
    objects = [np.mean([whiten(key, values[i].numpy()) for key, values in train.items()], axis=0) for i in range(len(train[name]))]
    mine = whiten(name, row)
    cosines = [float(mine @ whiten(name, sample)) for sample in train[name].numpy()]
    near = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:NEIGHBOURS]
    weights = [max(cosines[i], 0) ** 3 for i in near]
    return unit(mine + sum(w * objects[i] for w, i in zip(weights, near)) / sum(weights))


@pytest.mark.parametrize("count", [60, 4])  # also fewer objects than neighbours
def test_rows_are_those_of_the_equations(count):
    train, test = pairs(count), pairs(7, seed=1)
    anchors = Anchors(train)
    for name, rows in test.items():
        expected = np.stack([by_loops(train, name, row.numpy()) for row in rows])
        np.testing.assert_allclose(anchors.place(name, rows).numpy(), expected, atol=2e-6)
        assert anchors.place(name, rows.float()).dtype == torch.float32


def test_rows_without_spread_stay_finite():
    same = F.normalize(torch.ones(20, 4), dim=1)
    anchors = Anchors({"A": same, "B": same})
    assert anchors.place("A", same).isfinite().all() and anchors.place("B", F.normalize(torch.randn(3, 4), dim=1)).isfinite().all()
