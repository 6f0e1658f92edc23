"""losses/: every formula recomputed by slow float64 loops, gradients, bounds, and hostile batches."""

import math

import pytest
import torch

from losses import ESTIMATORS, ModalityInvarianceLoss, RobustConcentratingLoss, SelfMatchingLoss
from losses.self_matching import mutual_information

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def value_and_gradient(loss, *inputs, autocast=False):
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = loss(*inputs)
    result.backward()
    return result.detach(), inputs[0].grad


def softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / math.fsum(weights) for w in weights]


# Modality invariance, Eq. 13-14


def slow_invariance(z, tau):
    rows = {}
    for m, modality in enumerate(z.tolist()):
        for i, vector in enumerate(modality):
            norm = math.sqrt(math.fsum(x * x for x in vector))
            rows[m, i] = [x / norm for x in vector]
    total = 0.0
    for anchor, v in rows.items():
        weight = {key: math.exp(sum(a * b for a, b in zip(v, w)) / tau) for key, w in rows.items() if key != anchor}
        positive = sum(value for (_, i), value in weight.items() if i == anchor[1])
        total -= math.log(positive / sum(weight.values()))
    return total / z.shape[1]


@pytest.mark.parametrize("modalities", [2, 3, 4])
@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("tau", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_invariance_equals_loops(modalities, batch, tau, dtype):
    z = draw(modalities, batch, 5, scale=3, dtype=dtype)
    result = ModalityInvarianceLoss(tau)(z)
    assert result.shape == () and result.dtype == dtype
    assert float(result) == pytest.approx(slow_invariance(z, tau), rel=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_invariance_by_hand_on_the_unit_circle(degrees):
    # Two objects `degrees` apart, both modalities equal: one positive (cosine 1) and two negatives (cosine c) each.
    angle = math.radians(degrees)
    z = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64).repeat(2, 1, 1)
    expected = 2 * math.log(1 + 2 * math.exp((math.cos(angle) - 1) / 0.5))
    assert float(ModalityInvarianceLoss(0.5)(z)) == pytest.approx(expected, rel=1e-12)


def test_invariance_leaves_the_anchor_out_of_both_sums():
    # With the anchor in both sums (as printed) separated objects would give about 0; with it in the denominator alone,
    # M log 2. Without it the loss vanishes for M = 2, and the two other positives of M = 3 are summed, not averaged.
    for modalities in (2, 3):
        z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64).repeat(modalities, 1, 1)
        assert 0 <= float(ModalityInvarianceLoss(0.05)(z)) < 1e-10
        same = torch.ones(modalities, 4, 3, dtype=torch.float64)
        expected = modalities * math.log((4 * modalities - 1) / (modalities - 1))
        assert float(ModalityInvarianceLoss(0.05)(same)) == pytest.approx(expected, rel=1e-12)


def test_invariance_under_permutation_of_instances_and_modalities_and_scaling_of_rows():
    z = draw(3, 6, 4)
    loss = ModalityInvarianceLoss(0.2)
    expected = float(loss(z))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scales = draw(3, 6, 1, seed=1).exp()
    for changed in (z[:, order], z[[2, 0, 1]], z * scales):
        assert float(loss(changed)) == pytest.approx(expected, rel=1e-12)
    broken = torch.stack([z[0], z[1], z[2, order]])
    assert abs(float(loss(broken)) - expected) > 1e-2  # the pairing does matter


@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 4, 3)])
def test_invariance_gradient(shape):
    assert torch.autograd.gradcheck(ModalityInvarianceLoss(0.3), draw(*shape).requires_grad_())


def test_invariance_gradient_pulls_an_object_together():
    _, grad = value_and_gradient(ModalityInvarianceLoss(0.3), draw(2, 5, 4))
    z = draw(2, 5, 4)
    stepped = z - 1e-3 * grad
    assert float(ModalityInvarianceLoss(0.3)(stepped)) < float(ModalityInvarianceLoss(0.3)(z))


@pytest.mark.parametrize("z", [
    torch.ones(2, 3, 4), torch.zeros(2, 3, 4), draw(2, 3, 4, scale=1e15, dtype=torch.float32),
    draw(2, 3, 4, scale=1e-20, dtype=torch.float32), torch.eye(4).repeat(3, 1, 1), -torch.eye(4).repeat(3, 1, 1),
], ids=["equal", "zero", "huge", "tiny", "separated", "negated"])
@pytest.mark.parametrize("tau", [1e-3, 0.05, 10.0])
def test_invariance_stays_finite(z, tau):
    value, grad = value_and_gradient(ModalityInvarianceLoss(tau), z)
    assert value.isfinite() and value > -1e-5 and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_invariance_is_full_precision_under_autocast(dtype):
    z = draw(2, 9, 16, dtype=dtype)
    expected, reference = value_and_gradient(ModalityInvarianceLoss(0.05), z.float())
    value, grad = value_and_gradient(ModalityInvarianceLoss(0.05), z, autocast=True)
    assert value.dtype == torch.float32 and float(value) == pytest.approx(float(expected), rel=1e-6)
    assert torch.allclose(grad.float(), reference, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 1, 3), (4, 3), (2, 0, 3), (2, 2, 2, 2)])
def test_invariance_rejects_shapes(shape):
    with pytest.raises(ValueError, match="M >= 2, B >= 2"):
        ModalityInvarianceLoss(0.1)(torch.ones(shape))


@pytest.mark.parametrize("loss", [ModalityInvarianceLoss, SelfMatchingLoss])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperatures_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature"):
        loss(temperature)


# Self matching, Eq. 7-8


def slow_information(joint):
    total = math.fsum(map(math.fsum, joint))
    joint = [[x / total for x in row] for row in joint]
    rows, columns = [math.fsum(row) for row in joint], [math.fsum(column) for column in zip(*joint)]
    return math.fsum(
        x * math.log(x / (rows[i] * columns[j])) for i, row in enumerate(joint) for j, x in enumerate(row) if x > 0
    )


def slow_matching(logits, memory, tau, estimator):
    current = [softmax(row) for row in logits.tolist()]
    sharp = []
    for row in memory.tolist():
        powers = [p ** (1 / tau) for p in softmax(row)]
        sharp.append([p / sum(powers) for p in powers])
    batch, classes = logits.shape
    if estimator == "hard":
        return -sum(math.log(i[s.index(max(s))]) for s, i in zip(sharp, current)) / batch
    if estimator == "class":
        pairs = range(classes)
        return -slow_information([[sum(s[k] * i[l] for s, i in zip(sharp, current)) for l in pairs] for k in pairs])
    return -slow_information([[sum(a * b for a, b in zip(s, i)) for i in current] for s in sharp])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(2, 2), (7, 4), (3, 9), (1, 5)])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matching_equals_loops(estimator, shape, tau, dtype):
    logits, memory = draw(*shape, scale=2, dtype=dtype), draw(*shape, seed=1, scale=2, dtype=dtype)
    result = SelfMatchingLoss(tau, estimator)(logits, memory)
    assert result.shape == () and result.dtype == dtype
    expected = slow_matching(logits, memory, tau, estimator)
    assert float(result) == pytest.approx(expected, rel=10 * TOLERANCE[dtype], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_matching_ignores_sample_order_and_a_common_cluster_order(estimator):
    logits, memory, loss = draw(8, 5), draw(8, 5, seed=1), SelfMatchingLoss(0.5, estimator)
    expected = float(loss(logits, memory))
    samples, clusters = torch.randperm(8, generator=torch.Generator().manual_seed(2)), torch.tensor([4, 2, 0, 1, 3])
    assert float(loss(logits[samples], memory[samples])) == pytest.approx(expected, rel=1e-12)
    assert float(loss(logits[:, clusters], memory[:, clusters])) == pytest.approx(expected, rel=1e-12)


def test_hard_matching_does_not_depend_on_the_temperature():
    logits, memory = draw(8, 5), draw(8, 5, seed=1)
    assert SelfMatchingLoss(0.1, "hard")(logits, memory) == SelfMatchingLoss(5.0, "hard")(logits, memory)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matching_stays_within_its_bounds(scale, dtype):
    logits, memory = draw(12, 5, scale=scale, dtype=dtype), draw(12, 5, seed=1, scale=scale, dtype=dtype)
    for memory_logits in (memory, logits):
        for estimator, lowest in (("class", -math.log(5)), ("instance", -math.log(12)), ("hard", 0)):
            value, grad = value_and_gradient(SelfMatchingLoss(0.3, estimator), logits, memory_logits)
            assert value.isfinite() and grad.isfinite().all() and value >= lowest - 1e-5
            assert estimator == "hard" or value <= 1e-6


@pytest.mark.parametrize("estimator,expected", [("class", -math.log(4)), ("instance", -math.log(4)), ("hard", 0.0)])
def test_balanced_confident_agreement_is_the_optimum(estimator, expected):
    logits = 1e4 * torch.eye(4).repeat(1 if estimator == "instance" else 3, 1)
    value, grad = value_and_gradient(SelfMatchingLoss(0.5, estimator), logits, logits)
    assert float(value) == pytest.approx(expected, abs=1e-5) and grad.abs().max() < 1e-5


def test_instance_matching_of_balanced_clusters_is_the_entropy_of_the_clusters():
    logits = 1e4 * torch.eye(4).repeat(3, 1)  # 12 samples in 4 clusters: knowing i tells j's cluster, ln 4
    assert float(SelfMatchingLoss(0.5, "instance")(logits, logits)) == pytest.approx(-math.log(4), abs=1e-5)


@pytest.mark.parametrize("estimator", ["class", "instance"])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("row", [[0.0, 0, 0], [1e4, 0, 0], [1e4, -1e4, 0], [3.0, 1, -2]], ids=["uniform", "one", "extreme", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_predictions_carry_no_information(estimator, batch, row, dtype):
    logits = torch.tensor(row, dtype=dtype).repeat(batch, 1)
    value, grad = value_and_gradient(SelfMatchingLoss(0.2, estimator), logits, logits)
    assert abs(value) < 1e-5 and grad.isfinite().all() and grad.abs().max() < 1e-5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_gradient_reaches_the_memory(estimator):
    logits, memory = draw(6, 4).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    SelfMatchingLoss(0.5, estimator)(logits, memory).backward()
    assert memory.grad is None and logits.grad.abs().max() > 0
    shared = draw(6, 4).requires_grad_()  # the same tensor on both sides: only the current prediction may count
    SelfMatchingLoss(0.5, estimator)(shared, shared).backward()
    _, expected = value_and_gradient(lambda x: SelfMatchingLoss(0.5, estimator)(x, shared.detach()), shared)
    assert torch.equal(shared.grad, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_matching_gradient(estimator):
    loss, memory = SelfMatchingLoss(0.5, estimator), draw(5, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: loss(x, memory), draw(5, 4).requires_grad_())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_matching_is_full_precision_under_autocast(estimator):
    # The marginals of a nearly even K x K joint differ by less than bfloat16 resolves.
    logits, memory = draw(64, 10, dtype=torch.float32), draw(64, 10, seed=1, dtype=torch.float32)
    loss = SelfMatchingLoss(0.5, estimator)
    expected, reference = value_and_gradient(loss, logits, memory)
    value, grad = value_and_gradient(loss, logits, memory, autocast=True)
    assert value.dtype == torch.float32 and float(value) == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(grad, reference, rtol=1e-3, atol=1e-6)


def test_mutual_information_by_hand():
    assert float(mutual_information(torch.eye(3))) == pytest.approx(math.log(3), rel=1e-6)
    assert float(mutual_information(torch.ones(3, 4))) == pytest.approx(0, abs=1e-6)
    joint = torch.tensor([[3.0, 1, 0], [0, 2, 2]], dtype=torch.float64)
    assert float(mutual_information(joint)) == pytest.approx(slow_information(joint.tolist()), rel=1e-12)
    assert float(mutual_information(7 * joint.T)) == pytest.approx(slow_information(joint.tolist()), rel=1e-12)
    assert torch.autograd.gradcheck(mutual_information, (joint + 0.1).requires_grad_())


@pytest.mark.parametrize("logits,memory", [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((4,), (4,)), ((2, 4, 3), (2, 4, 3))])
def test_matching_rejects_shapes(logits, memory):
    with pytest.raises(ValueError, match=r"must both be"):
        SelfMatchingLoss(0.5)(torch.ones(logits), torch.ones(memory))


def test_matching_rejects_an_empty_batch():
    with pytest.raises(ValueError):
        SelfMatchingLoss(0.5)(torch.ones(0, 3), torch.ones(0, 3))


def test_matching_rejects_an_unknown_estimator():
    with pytest.raises(ValueError, match="'pairs'"):
        SelfMatchingLoss(0.5, "pairs")


# Robust concentrating loss, Eq. 11-12


def slow_robust(logits, labels, alpha):
    classes, total = logits.shape[1], 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        p = max(softmax(row)[label], 1 / classes)
        total += (-math.log(p)) ** alpha * (1 - p)
    return total / len(labels)


def confident(gap, classes=4, dtype=torch.float32):
    """One row whose label 0 leads all others by `gap`."""
    logits = torch.zeros(1, classes, dtype=dtype)
    logits[0, 0] = gap
    return logits, torch.tensor([0])


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.25, 0.3, 0.35, 1.0, 2.5])
@pytest.mark.parametrize("shape", [(1, 2), (9, 3), (40, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_robust_equals_loops(alpha, shape, dtype):
    logits = draw(*shape, scale=3, dtype=dtype)
    labels = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(1))
    result = RobustConcentratingLoss(alpha, shape[1])(logits, labels)
    assert result.shape == () and result.dtype == dtype
    assert float(result) == pytest.approx(slow_robust(logits, labels, alpha), rel=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("p,classes,alpha,expected", [
    (0.5, 4, 0.3, math.log(2) ** 0.3 / 2), (0.9, 2, 0.25, (-math.log(0.9)) ** 0.25 * 0.1),
    (0.2, 4, 0.3, math.log(4) ** 0.3 * 0.75), (0.5, 2, 1.0, math.log(2) / 2), (0.01, 10, 0.0, 0.9),
])
def test_robust_by_hand(p, classes, alpha, expected):
    probs = torch.full((1, classes), (1 - p) / (classes - 1), dtype=torch.float64)
    probs[0, 1] = p
    assert float(RobustConcentratingLoss(alpha, classes)(probs.log(), torch.tensor([1]))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.1, -7.3, 1e4, -1e4])
def test_uniform_logits_are_clipped_for_every_class_count(dtype, offset):
    for classes in [*range(2, 70), 100, 127, 365, 1000, 4096, 10007]:
        logits, labels = torch.full((2, classes), offset, dtype=dtype), torch.tensor([0, classes - 1])
        loss = RobustConcentratingLoss(0.3, classes)
        value, grad = value_and_gradient(loss, logits, labels)
        assert not grad.any(), classes
        assert float(value) == pytest.approx(math.log(classes) ** 0.3 * (1 - 1 / classes), rel=1e-5)
        assert loss.clipped_fraction(logits, labels) == 1, classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_push_a_chance_level_sample_above_the_clip(dtype):
    for classes in range(4, 200):
        probs = torch.full((1, classes), 1 / classes, dtype=torch.float64)
        probs[0, 1], probs[0, 2] = 1.5 / classes, 0.5 / classes  # p = 1/K exactly, the others uneven
        _, grad = value_and_gradient(RobustConcentratingLoss(0.3, classes), probs.log().to(dtype), torch.tensor([0]))
        assert not grad.any(), classes


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_below_chance_get_no_gradient_and_the_constant(alpha, dtype):
    logits = draw(200, 6, scale=4, dtype=dtype)
    labels = torch.randint(6, (200,), generator=torch.Generator().manual_seed(1))
    p = logits.softmax(1)[torch.arange(200), labels]
    loss = RobustConcentratingLoss(alpha, 6)
    _, grad = value_and_gradient(loss, logits, labels)
    below = p <= 1 / 6
    assert 20 < below.sum() < 180
    assert not grad[below].any() and (grad[~below].abs().sum(1) > 0).all()
    constant = math.log(6) ** alpha * (1 - 1 / 6)
    for row in below.nonzero()[:, 0][:10]:
        assert float(loss(logits[row, None], labels[row, None])) == pytest.approx(constant, rel=1e-6)
    assert float(loss.clipped_fraction(logits, labels)) == pytest.approx(float(below.double().mean()), abs=1e-6)


@pytest.mark.parametrize("margin", [1e-4, 1e-2, 1.0])
def test_samples_just_above_chance_do_get_a_gradient(margin):
    for classes in (2, 10, 365):
        loss = RobustConcentratingLoss(0.3, classes)
        logits, labels = confident(margin, classes)
        value, grad = value_and_gradient(loss, logits, labels)
        assert grad[0, 0] < 0 and value < math.log(classes) ** 0.3 * (1 - 1 / classes)
        value, grad = value_and_gradient(loss, -logits, labels)
        assert not grad.any()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.35, 1.0])
def test_robust_falls_monotonically_without_a_jump_at_the_clip_level(alpha):
    logits = torch.zeros(801, 5, dtype=torch.float64)
    logits[:, 0] = torch.linspace(-10, 30, 801, dtype=torch.float64)
    loss = RobustConcentratingLoss(alpha, 5)
    values = torch.stack([loss(row[None], torch.tensor([0])) for row in logits])
    steps = values.diff()
    assert (steps <= 1e-15).all() and steps.min() > -0.05 and values[-1] < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_alpha_gives_half_the_absolute_error(dtype):
    logits, labels = draw(30, 5, scale=3, dtype=dtype), torch.zeros(30, dtype=torch.long)
    labels = torch.where(logits.softmax(1)[:, 0] > 0.2, 0, logits.argmax(1))  # unclipped samples alone
    expected = 1 - logits.double().softmax(1)[torch.arange(30), labels].mean()
    mae = (logits.double().softmax(1) - torch.eye(5, dtype=torch.float64)[labels]).abs().sum(1).mean() / 2
    assert float(mae) == pytest.approx(float(expected), rel=1e-9)
    for alpha, tolerance in ((1e-4, 1e-2), (1e-7, 1e-5), (0.0, 1e-6)):
        assert float(RobustConcentratingLoss(alpha, 5)(logits, labels)) == pytest.approx(float(expected), rel=tolerance)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-30, 1e-7, 1.0, 15.0, 17.0, 40.0, 88.0, 104.0, 750.0, 1e4])
def test_robust_stays_finite_at_any_confidence(alpha, dtype, gap):
    for sign in (1, -1):
        logits, labels = confident(sign * gap, dtype=dtype)
        value, grad = value_and_gradient(RobustConcentratingLoss(alpha, 4), logits, labels)
        assert value.isfinite() and value >= 0 and grad.isfinite().all() and grad.abs().max() < 10
        if sign * gap >= 40:
            assert value < 1e-6 and grad.abs().max() < 1e-3  # p -> 1: nothing left to learn


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 10.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_robust_stays_finite_on_extreme_batches(alpha, dtype):
    logits = 1e4 * draw(50, 6).sign().to(dtype)
    value, grad = value_and_gradient(RobustConcentratingLoss(alpha, 6), logits, torch.arange(50) % 6)
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_robust_gradient(alpha):
    logits = draw(8, 4, scale=2)
    labels = torch.cat([logits[:5].argmax(1), logits[5:].argmin(1)])
    loss = RobustConcentratingLoss(alpha, 4)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


def test_robust_under_autocast():
    torch.manual_seed(0)
    layer, x, labels = torch.nn.Linear(8, 5), draw(30, 8, scale=4, dtype=torch.float32), torch.arange(30) % 5
    loss = RobustConcentratingLoss(0.3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        value = loss(logits, labels)
    value.backward()
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert value.item() == pytest.approx(slow_robust(logits.detach(), labels, 0.3), rel=1e-4)
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("alpha,classes,message", [(-0.1, 4, "alpha"), (float("nan"), 4, "alpha"), (0.3, 1, "num_classes")])
def test_robust_rejects_arguments(alpha, classes, message):
    with pytest.raises(ValueError, match=message):
        RobustConcentratingLoss(alpha, classes)


@pytest.mark.parametrize("shape,labels,message", [
    ((2, 3), [0, 1], "logits"), ((2, 5), [0, 1], "logits"), ((4,), [0], "logits"), ((0, 4), [], "logits"),
    ((2, 4), [0], "pseudo_labels"), ((2, 4), [[0], [1]], "pseudo_labels"), ((2, 4), [0, 4], r"0\.\.3.*0\.\.4"),
    ((2, 4), [-1, 0], r"-1\.\.0"),
])
def test_robust_rejects_batches(shape, labels, message):
    with pytest.raises(ValueError, match=message):
        RobustConcentratingLoss(0.3, 4)(torch.zeros(shape), torch.tensor(labels, dtype=torch.long))
