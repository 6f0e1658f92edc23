"""Losses on embeddings, relations and cluster predictions: formulas by slow float64 loops, gradients, bounds, hostile batches."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from loss_checks import DTYPES, TOLERANCE, draw, softmax, value_and_gradient
from torch.nn import functional as F

from losses import ESTIMATORS, ModalityInvarianceLoss, RelationLoss, RobustConcentratingLoss, SelfMatchingLoss
from models import LinearClassifier, MemoryBank
from train_step1 import PLALearner

# Modality invariance, Eq. 13-14, and relations


def unit(row):
    norm = math.sqrt(math.fsum(x * x for x in row))
    return [x / norm for x in row]


def slow_invariance(z, tau, self_term):
    rows = {(m, i): unit(vector) for m, modality in enumerate(z.tolist()) for i, vector in enumerate(modality)}
    total = 0.0
    for anchor, v in rows.items():
        others = {key: w for key, w in rows.items() if self_term or key != anchor}
        weight = {key: math.exp(sum(a * b for a, b in zip(v, w)) / tau) for key, w in others.items()}
        positive = sum(value for (_, i), value in weight.items() if i == anchor[1])
        total -= math.log(positive / sum(weight.values()))
    return total / z.shape[1]


@pytest.mark.parametrize("modalities,batch", [(2, 2), (2, 7), (3, 3), (4, 5)])
@pytest.mark.parametrize("tau", [0.05, 2.0])
@pytest.mark.parametrize("self_term", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_invariance_equals_loops(modalities, batch, tau, self_term, dtype):
    z = draw(modalities, batch, 5, scale=3, dtype=dtype)
    result = ModalityInvarianceLoss(tau, self_term)(z)
    assert result.shape == () and result.dtype == dtype
    assert float(result) == pytest.approx(slow_invariance(z, tau, self_term), rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("z", [
    torch.ones(2, 3, 4), torch.zeros(2, 3, 4), draw(2, 3, 4, scale=1e15, dtype=torch.float32),
    draw(2, 3, 4, scale=1e-20, dtype=torch.float32), torch.eye(4).repeat(3, 1, 1),
], ids=["equal", "zero", "huge", "tiny", "separated"])
@pytest.mark.parametrize("tau", [1e-3, 10.0])
@pytest.mark.parametrize("self_term", [False, True])
def test_invariance_stays_finite(z, tau, self_term):
    value, grad = value_and_gradient(ModalityInvarianceLoss(tau, self_term), z)
    assert value.isfinite() and value > -1e-5 and grad.isfinite().all()


def slow_relations(z, target, tau):
    """Mean over views and samples of KL(p_i || q_i), in plain loops."""
    dot = lambda a, b: math.fsum(x * y for x, y in zip(a, b))
    goal = [unit([math.fsum(column) for column in zip(*map(unit, rows))]) for rows in zip(*target.tolist())]
    total = []
    for view in z.tolist():
        for wanted, row in zip(goal, map(unit, view)):
            p, q = (softmax([dot(one, other) / tau for other in goal]) for one in (wanted, row))
            total.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q)))
    return math.fsum(total) / len(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views, shown, tau", [(1, 1, 0.1), (2, 1, 0.5), (3, 2, 0.1)])
def test_relations_equal_loops_and_give_the_target_no_gradient(dtype, views, shown, tau):
    z, target = draw(views, 6, 5, seed=1), draw(shown, 6, 5, seed=2)
    value = RelationLoss(tau)(z.to(dtype), target.to(dtype).requires_grad_())
    assert value.dtype == dtype and float(value) == pytest.approx(slow_relations(z, target, tau), rel=100 * TOLERANCE[dtype])
    assert not value.requires_grad and torch.autograd.gradcheck(lambda rows: RelationLoss(tau)(rows, target), z.requires_grad_())


@pytest.mark.parametrize("z", [
    torch.ones(2, 4, 3), torch.zeros(2, 4, 3), torch.eye(4, 3).repeat(2, 1, 1), draw(2, 4, 3, scale=1e15, dtype=torch.float32),
])
def test_relations_stay_finite(z):
    for target in (torch.ones(1, 4, 3), torch.eye(4, 3)[None], torch.zeros(1, 4, 3)):
        value, grad = value_and_gradient(RelationLoss(1e-3), z, target, autocast=True)
        assert value.isfinite() and value > -1e-5 and grad.isfinite().all()


def test_rejected_batches_and_arguments():
    for shapes in (((2, 1, 3), (1, 1, 3)), ((4, 3), (1, 4, 3)), ((1, 4, 3), (1, 5, 3)), ((1, 4, 3), (1, 4, 2))):
        with pytest.raises(ValueError, match="B >= 2"):
            RelationLoss()(*map(torch.ones, shapes))
    for shape in ((1, 4, 3), (2, 1, 3), (4, 3), (2, 0, 3), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="M >= 2, B >= 2"):
            ModalityInvarianceLoss(0.1)(torch.ones(shape))
    for logits, memory in (((4, 3), (4, 2)), ((4, 3), (3, 3)), ((4,), (4,)), ((2, 4, 3), (2, 4, 3)), ((0, 3), (5, 3))):
        with pytest.raises(ValueError, match=r"logits must be \(B >= 1, K\)"):
            SelfMatchingLoss(0.5)(torch.ones(logits), torch.ones(memory))
    for loss, temperature in itertools.product((ModalityInvarianceLoss, SelfMatchingLoss, RelationLoss), (0, -1.0, float("nan"))):
        with pytest.raises(ValueError, match="temperature"):
            loss(temperature)
    with pytest.raises(ValueError, match="'pairs'"):
        SelfMatchingLoss(0.5, "pairs")
    with pytest.raises(ValueError, match="symmetric, found 'hard'"):
        SelfMatchingLoss(0.5, "hard", symmetric=True)


# Self matching, Eq. 7-8

KINDS = [(estimator, False) for estimator in ESTIMATORS] + [("class", True)]


def slow_information(joint, rows=None, columns=None):
    total = math.fsum(map(math.fsum, joint))
    joint = [[x / total for x in row] for row in joint]
    rows, columns = rows or [math.fsum(row) for row in joint], columns or [math.fsum(column) for column in zip(*joint)]
    return math.fsum(
        x * math.log(x / (rows[i] * columns[j])) for i, row in enumerate(joint) for j, x in enumerate(row) if x > 0
    )


def sharpen(row, tau):
    powers = [p ** (1 / tau) for p in softmax(row)]
    return [p / sum(powers) for p in powers]


def slow_matching(logits, memory, tau, estimator, symmetric):
    current, sharp = [softmax(row) for row in logits.tolist()], [sharpen(row, tau) for row in memory.tolist()]
    batch, classes = logits.shape
    if estimator == "hard":
        return -sum(math.log(i[s.index(max(s))]) for s, i in zip(sharp, current)) / batch
    if estimator == "instance":
        return -slow_information([[sum(a * b for a, b in zip(s, i)) for i in current] for s in sharp])
    pairs = range(classes)
    joint = [[sum(s[k] * i[n] for s, i in zip(sharp, current)) / batch for n in pairs] for k in pairs]
    mean = lambda view: [sum(column) / len(view) for column in zip(*view)]
    remembered = [softmax(row) for row in memory.tolist()]
    moved = [m + c - b for m, c, b in zip(mean(remembered), mean(current), mean(remembered[:batch]))]
    moved = [max(m, c * batch / len(memory)) for m, c in zip(moved, mean(current))]
    rows, columns = mean(sharp), [m / sum(moved) for m in moved]
    if symmetric:
        joint = [[(joint[k][n] + joint[n][k]) / 2 for n in pairs] for k in pairs]
        rows = columns = [(r + c) / 2 for r, c in zip(rows, columns)]
    return -slow_information(joint, rows, columns)


@pytest.mark.parametrize("estimator,symmetric", KINDS)
@pytest.mark.parametrize("batch,classes,sampled", [(7, 4, 0), (3, 9, 5), (1, 5, 0), (4, 2, 60)])
@pytest.mark.parametrize("tau", [0.1, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matching_equals_loops(estimator, symmetric, batch, classes, sampled, tau, dtype):
    logits, memory = draw(batch, classes, scale=2, dtype=dtype), draw(batch + sampled, classes, seed=1, scale=2, dtype=dtype)
    result = SelfMatchingLoss(tau, estimator, symmetric)(logits, memory)
    assert result.shape == () and result.dtype == dtype
    expected = slow_matching(logits, memory, tau, estimator, symmetric)
    assert float(result) == pytest.approx(expected, rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("estimator,symmetric", KINDS)
def test_sampled_rows_do_not_shrink_the_gradient_of_the_encoders(estimator, symmetric):
    """Through the learner's own step, on a bank of 1,500 rows in 20 clusters that lags behind the embeddings."""
    count, batch, clusters, dim = 1500, 50, 20, 1024
    numbers = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(clusters, dim, generator=numbers), dim=1)
    noise = lambda rows: torch.randn(rows, dim, generator=numbers) * dim**-0.5
    embeddings = F.normalize(centres[torch.arange(count) % clusters] + 2 * noise(count), dim=1)
    classifier, bank = LinearClassifier(dim, clusters, 10.0), MemoryBank(count, dim)
    classifier.start_from(F.normalize(centres + 0.3 * noise(clusters), dim=1))
    bank.fill(embeddings + 0.3 * noise(count))
    batches = [torch.randperm(count, generator=numbers)[:batch] for _ in range(12)]
    sizes, spread = {}, {}
    for sampled in (0, 50, 256, 1024):
        learner = SimpleNamespace(
            banks={"RGBImg": bank}, classifiers={"RGBImg": classifier}, self_matching=SelfMatchingLoss(0.5, estimator, symmetric),
            config=SimpleNamespace(pla=SimpleNamespace(memory_samples=sampled)),
        )
        match = lambda rows, index: PLALearner._match(learner, "RGBImg", index, rows, numbers)
        found = [value_and_gradient(match, embeddings[index], index)[1] for index in batches]
        sizes[sampled] = float(torch.stack([gradient.norm() for gradient in found]).mean())
        if symmetric or estimator == "hard" or sampled not in (0, 1024):
            continue
        same_first = [torch.cat([batches[0][:1], index[1:]]) for index in batches]
        alone = [value_and_gradient(match, embeddings[index], index)[1][0] for index in same_first]
        spread[sampled] = float(torch.stack(alone).var(dim=0).sum())
    most = 1.3 if estimator == "instance" else 1.2  # its B x B joint is a poor estimate: more rows make it steeper
    assert all(0.8 * sizes[0] < size < most * sizes[0] for size in sizes.values()), sizes
    assert not spread or spread[1024] < 0.6 * spread[0], spread  # what N' is for: the same sample among others


def test_a_collapse_is_pushed_back_at_once_though_the_memory_is_still_even():
    memory = 6 * torch.eye(4).repeat(100, 1)
    logits = torch.zeros(12, 4)
    logits[:, 0] = 3  # every sample is in cluster 0 now
    for rows in (memory[:12], memory):
        _, grad = value_and_gradient(SelfMatchingLoss(0.5), logits, rows)
        assert (grad[memory[:12].argmax(1) != 0, 0] > 0).all() and float(grad[:, 0].sum()) > 0


@pytest.mark.parametrize("estimator,symmetric", KINDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matching_stays_within_its_bounds(estimator, symmetric, scale, dtype):
    logits, memory = draw(12, 5, scale=scale, dtype=dtype), draw(40, 5, seed=1, scale=scale, dtype=dtype)
    lowest = {"class": -math.log(5), "instance": -math.log(12), "hard": 0}[estimator]
    for memory_logits, bound in ((memory[:12], lowest), (logits, lowest), (memory, -math.inf)):
        value, grad = value_and_gradient(SelfMatchingLoss(0.3, estimator, symmetric), logits, memory_logits)
        assert value.isfinite() and grad.isfinite().all() and value >= bound - 1e-5
        assert estimator == "hard" or value <= 1e-6


@pytest.mark.parametrize("row", [[0.0, 0, 0], [1e4, 0, 0], [1e4, -1e4, 0], [3.0, 1, -2]], ids=["uniform", "one", "extreme", "soft"])
def test_equal_predictions_carry_no_information(row):
    for (estimator, symmetric), batch, dtype in itertools.product(KINDS, (1, 6), DTYPES):
        if estimator != "hard":
            logits = torch.tensor(row, dtype=dtype).repeat(batch, 1)
            value, grad = value_and_gradient(SelfMatchingLoss(1.0 if symmetric else 0.2, estimator, symmetric), logits, logits)
            assert abs(value) < 1e-5 and grad.isfinite().all() and grad.abs().max() < 1e-5


@pytest.mark.parametrize("estimator,symmetric", KINDS)
def test_the_gradient_is_of_the_current_prediction_alone(estimator, symmetric):
    loss = SelfMatchingLoss(0.5, estimator, symmetric)
    logits, memory = draw(6, 4).requires_grad_(), draw(9, 4, seed=1).requires_grad_()
    loss(logits, memory).backward()
    assert memory.grad is None and logits.grad.abs().max() > 0
    shared = draw(6, 4).requires_grad_()  # the same tensor on both sides
    loss(shared, shared).backward()
    assert torch.equal(shared.grad, value_and_gradient(lambda x: loss(x, shared.detach()), shared)[1])
    assert torch.autograd.gradcheck(lambda x: loss(x, memory[:6].detach()), draw(6, 4).requires_grad_())


LOGITS = draw(64, 10, dtype=torch.float32), draw(80, 10, seed=1, dtype=torch.float32)
# The marginals of a nearly even K x K joint differ by less than bfloat16 resolves.


@pytest.mark.parametrize("loss,inputs", [(SelfMatchingLoss(0.5, *kind), LOGITS) for kind in KINDS] + [
    (ModalityInvarianceLoss(0.05), (draw(2, 9, 16, dtype=dtype),)) for dtype in (torch.bfloat16, torch.float32)
])
def test_full_precision_under_autocast(loss, inputs):
    expected, reference = value_and_gradient(loss, *(values.float() for values in inputs))
    value, grad = value_and_gradient(loss, *inputs, autocast=True)
    assert value.dtype == torch.float32 and float(value) == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(grad.float(), reference, rtol=1e-2, atol=1e-3 if inputs is not LOGITS else 1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_robust_weights_make_a_weighted_mean(clip):
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.1, 3.0], dtype=torch.float64)
    loss = RobustConcentratingLoss(0.3, 4, clip=clip)
    single = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(loss(logits, labels, weights), (weights * single).sum() / weights.sum())
    torch.testing.assert_close(loss(logits, labels, torch.ones(6, dtype=torch.float64)), loss(logits, labels))
