"""The relational loss against slow loops, and what it must ignore."""

import math

import pytest
import torch
from loss_checks import DTYPES, TOLERANCE, draw, softmax, value_and_gradient
from torch.nn import functional as F

from losses import RelationLoss


def slow_relations(z, target, tau):
    """Mean over views and samples of KL(p_i || q_i), in plain loops."""
    unit = lambda row: [x / math.sqrt(math.fsum(y * y for y in row)) for x in row]
    dot = lambda a, b: math.fsum(x * y for x, y in zip(a, b))
    views = [[unit(row) for row in view] for view in target.tolist()]
    goal = [unit([math.fsum(column) for column in zip(*rows)]) for rows in zip(*views)]
    total = []
    for view in z.tolist():
        rows = [unit(row) for row in view]
        for i in range(len(rows)):
            p, q = (softmax([dot(row, other) / tau for other in goal]) for row in (goal[i], rows[i]))
            total.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q)))
    return math.fsum(total) / len(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views, shown, tau", [(1, 1, 0.1), (2, 1, 0.5), (3, 2, 0.1)])
def test_relations_equal_slow_loops(dtype, views, shown, tau):
    z, target = draw(views, 6, 5, seed=1), draw(shown, 6, 5, seed=2)
    value = RelationLoss(tau)(z.to(dtype), target.to(dtype))
    assert value.dtype == dtype and float(value) == pytest.approx(slow_relations(z, target, tau), rel=100 * TOLERANCE[dtype])
    assert torch.autograd.gradcheck(lambda rows: RelationLoss(tau)(rows, target), z.requires_grad_())


def test_relations_ignore_scale_not_rotation_and_give_the_target_no_gradient():
    target = draw(1, 8, 4).requires_grad_()
    turn = torch.linalg.qr(draw(4, 4, seed=3))[0]
    loss = RelationLoss()
    assert float(loss(5 * target.detach(), target)) == pytest.approx(0, abs=1e-12)
    assert loss(5 * target.detach() @ turn, target) > 0.1
    z = draw(2, 8, 4, seed=4).requires_grad_()
    loss(z, target).backward()
    assert target.grad is None and z.grad.abs().max() > 0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert float(loss(z[:, order], target[:, order])) == pytest.approx(float(loss(z, target)), rel=1e-12)


@pytest.mark.parametrize("z", [torch.ones(2, 4, 3), torch.zeros(2, 4, 3), torch.eye(4, 3).repeat(2, 1, 1), draw(2, 4, 3, scale=1e15, dtype=torch.float32)])
def test_relations_stay_finite(z):
    for target in (torch.ones(1, 4, 3), torch.eye(4, 3)[None], torch.zeros(1, 4, 3)):
        value, grad = value_and_gradient(RelationLoss(1e-3), z, target, autocast=True)
        assert value.isfinite() and value > -1e-5 and grad.isfinite().all()


def test_rejected_relations():
    for shapes in (((2, 1, 3), (1, 1, 3)), ((4, 3), (1, 4, 3)), ((1, 4, 3), (1, 5, 3)), ((1, 4, 3), (1, 4, 2))):
        with pytest.raises(ValueError, match="B >= 2"):
            RelationLoss()(*map(torch.ones, shapes))
    with pytest.raises(ValueError, match="temperature"):
        RelationLoss(0)


def test_descent_on_relations_brings_every_sample_to_its_pair():
    target, z = draw(1, 12, 4, seed=5), draw(1, 12, 4, seed=6).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    cosines = lambda: F.cosine_similarity(z.detach()[0], target[0])
    assert cosines().mean() < 0.5
    for _ in range(300):
        optimizer.zero_grad()
        RelationLoss()(z, target).backward()
        optimizer.step()
    assert cosines().mean() > 0.9
