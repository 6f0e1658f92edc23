"""utils.evaluation.anchors against slow loops, and what a placed row may depend on."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.evaluation.anchors import FLOOR, NEIGHBOURS, POWER, Anchors
from utils.evaluation.metrics import mean_average_precision


def pairs(count=60, dim=8, seed=0, noise=0.3):
    """Objects around five centres in two modalities with an offset each; their groups."""
    numbers = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=numbers, dtype=torch.float64)
    groups = torch.arange(count) % 5
    centres = torch.randn(5, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    strength = torch.linspace(3, 0.1, dim, dtype=torch.float64)
    rows = {name: (centres[groups] + noise * draw(count, dim)) * strength + shift for name, shift in (("A", 0.5), ("B", -0.5))}
    return {name: F.normalize(values, dim=1) for name, values in rows.items()}, groups


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
    train, test = pairs(count)[0], pairs(7, seed=1)[0]
    anchors = Anchors(train)
    for name, rows in test.items():
        expected = np.stack([by_loops(train, name, row.numpy()) for row in rows])
        np.testing.assert_allclose(anchors.place(name, rows).numpy(), expected, atol=2e-6)


def test_a_row_depends_on_itself_and_the_training_set_alone():
    (train, _), (test, _) = pairs(), pairs(9, seed=2)
    anchors, order = Anchors(train), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = Anchors({name: rows[order] for name, rows in train.items()})
    for name, rows in test.items():
        whole = anchors.place(name, rows)
        assert torch.allclose(anchors.place(name, rows[4:5]), whole[4:5], atol=1e-6)
        assert torch.allclose(shuffled.place(name, rows), whole, atol=1e-6)  # the order of the objects
        broken = Anchors({**train, "B": train["B"].roll(1, dims=0)}).place(name, rows)
        assert not torch.allclose(broken, whole, atol=1e-3)  # but not which rows are one object
    assert anchors.place("A", test["A"].float()).dtype == torch.float32


def test_noisy_rows_find_their_group_better():
    (train, _), (test, groups) = pairs(400, noise=1.0), pairs(100, seed=3, noise=1.0)
    anchors = Anchors(train)
    placed = [anchors.place(name, rows) for name, rows in test.items()]
    before, after = (mean_average_precision(first, groups, second, groups) for first, second in (test.values(), placed))
    assert after > before + 0.05


def test_rows_without_spread_stay_finite():
    same = F.normalize(torch.ones(20, 4), dim=1)
    anchors = Anchors({"A": same, "B": same})
    assert anchors.place("A", same).isfinite().all() and anchors.place("B", F.normalize(torch.randn(3, 4), dim=1)).isfinite().all()
