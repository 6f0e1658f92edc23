"""losses/robust.py: every formula recomputed by slow loops, its slope, published limits and constants, hostile batches."""

import math
import re
import sys
from decimal import Decimal, localcontext

import pytest
import torch

from losses import ROBUST_LOSSES, AUELoss, CELoss, GCELoss, MAELoss, NCEAGCELoss, RobustConcentratingLoss, build_robust_loss
from utils.settings import options

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def draw_labels(count, classes, seed=1):
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, logits, labels):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels)
    value.backward()
    return value.detach(), logits.grad


# The formulas, in Python floats, as the papers print them: from the list of all p and the label y.


def ce(p, y):
    return -math.log(p[y])


def mae(p, y):
    return sum(abs((k == y) - value) for k, value in enumerate(p))


def gce(q):
    return lambda p, y: (1 - p[y] ** q) / q


def aue(a, q):
    return lambda p, y: ((a - p[y]) ** q - (a - 1) ** q) / q


def nce_agce(v, w, a, q):
    return lambda p, y: v * math.log(p[y]) / sum(map(math.log, p)) + w * ((a + 1) ** q - (a + p[y]) ** q) / q


CASES = {
    "ce": (CELoss(), ce), "mae": (MAELoss(), mae), "gce": (GCELoss(), gce(0.7)), "gce_q_small": (GCELoss(0.05), gce(0.05)),
    "aue": (AUELoss(), aue(5.5, 3)), "aue_mnist": (AUELoss(3, 0.1), aue(3, 0.1)),
    "aue_steep": (AUELoss(1.01, 0.5), aue(1.01, 0.5)),
    "nce_agce": (NCEAGCELoss(), nce_agce(1, 4, 6, 1.5)),
    "nce_agce_100": (NCEAGCELoss(10, 0.1, 1.8, 3), nce_agce(10, 0.1, 1.8, 3)),
    "agce_mnist": (NCEAGCELoss(0, 1, 4, 0.2), nce_agce(0, 1, 4, 0.2)), "nce": (NCEAGCELoss(1, 0), nce_agce(1, 0, 6, 1.5)),
}
LOSSES = {name: loss for name, (loss, _) in CASES.items()} | {"rcll": RobustConcentratingLoss(0.3, 5)}


def slow(formula, logits, labels):
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        weights = [math.exp(x - max(row)) for x in row]
        total += formula([w / math.fsum(weights) for w in weights], label)
    return total / len(labels)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(1, 2), (9, 3), (40, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_loops(name, shape, dtype):
    loss, formula = CASES[name]
    logits, labels = draw(*shape, scale=3, dtype=dtype), draw_labels(*shape)
    result = loss(logits, labels)
    assert result.shape == () and result.dtype == dtype
    assert float(result) == pytest.approx(slow(formula, logits, labels), rel=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_differences_of_the_slow_formula(name):
    loss, formula = CASES[name]
    logits, labels, step = draw(4, 5, scale=2), draw_labels(4, 5), 1e-6
    _, grad = value_and_gradient(loss, logits, labels)
    for i, j in [(i, j) for i in range(4) for j in range(5)]:
        change = torch.zeros_like(logits)
        change[i, j] = step
        expected = (slow(formula, logits + change, labels) - slow(formula, logits - change, labels)) / (2 * step)
        assert float(grad[i, j]) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


SLOPES = {  # dL / dp
    "ce": lambda p: -1 / p, "mae": lambda p: -2, "gce": lambda p: -(p**-0.3), "aue": lambda p: -((5.5 - p) ** 2),
    "aue_mnist": lambda p: -((3 - p) ** -0.9), "agce_mnist": lambda p: -((4 + p) ** -0.8),
}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("p", [1e-8, 0.1, 0.5, 0.9, 1 - 1e-8])
def test_slope_by_hand(name, p):
    logits = torch.tensor([[0.0, math.log(p) - math.log1p(-p)]], dtype=torch.float64)
    _, grad = value_and_gradient(LOSSES[name], logits, torch.tensor([1]))
    assert float(grad[0, 1]) == pytest.approx(SLOPES[name](p) * p * (1 - p), rel=1e-6)  # dp / dz = p (1 - p)


@pytest.mark.parametrize("name,classes,expected", [
    ("ce", 10, math.log(10)), ("mae", 10, 1.8), ("gce", 10, (1 - 10**-0.7) / 0.7), ("aue", 10, (5.4**3 - 4.5**3) / 3),
    ("aue_mnist", 10, 0.40572287), ("nce", 10, 0.1), ("nce", 40, 0.025), ("nce_agce", 10, 0.1 + 9.21165487),
])
def test_values_at_chance(name, classes, expected):
    assert float(LOSSES[name](torch.full((3, classes), -7.3), draw_labels(3, classes))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name,total", [("mae", lambda k: 2 * (k - 1)), ("nce", lambda k: 1)])
def test_symmetric_losses_sum_to_a_constant_over_the_labels(name, total):
    """The property that makes them robust to even label noise; CE and GCE lack it."""
    logits = draw(1, 7, scale=3)
    sums = {key: sum(float(LOSSES[key](logits, torch.tensor([k]))) for k in range(7)) for key in (name, "ce", "gce")}
    assert sums[name] == pytest.approx(total(7), rel=1e-12)
    assert sums["ce"] > 8 and abs(sums["gce"] - total(7)) > 0.1


def test_limits_of_gce():
    logits, labels = draw(20, 6, scale=3), draw_labels(20, 6)
    cross_entropy, absolute = CELoss()(logits, labels), MAELoss()(logits, labels)
    assert float(GCELoss(1e-9)(logits, labels)) == pytest.approx(float(cross_entropy), rel=1e-7)
    assert float(GCELoss(1)(logits, labels)) == pytest.approx(float(absolute) / 2, rel=1e-12)
    for q, limit, scale in ((1e-9, CELoss(), 1), (1, MAELoss(), 0.5)):
        _, found = value_and_gradient(GCELoss(q), logits, labels)
        _, expected = value_and_gradient(limit, logits, labels)
        torch.testing.assert_close(found, scale * expected, rtol=1e-6, atol=1e-12)
    between = [float(GCELoss(q)(logits, labels)) for q in (1e-9, 0.3, 0.7, 1)]
    assert between == sorted(between, reverse=True)


def test_rcll_without_alpha_is_half_of_mae_above_chance():
    """Property 1, on samples that Eq. 12 does not clip; below chance RCLL is constant and MAE goes on falling."""
    labels = draw_labels(30, 6)
    logits = draw(30, 6) + 3 * torch.nn.functional.one_hot(labels, 6)
    above = logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1) > 1 / 6
    assert above.sum() >= 20
    kept = logits[above], labels[above]
    expected, expected_slope = value_and_gradient(MAELoss(), *kept)
    for alpha, tolerance in ((1e-9, 1e-7), (0, 1e-12)):
        value, slope = value_and_gradient(RobustConcentratingLoss(alpha, 6), *kept)
        assert float(value) == pytest.approx(float(expected) / 2, rel=tolerance)
        torch.testing.assert_close(slope, expected_slope / 2, rtol=1e-6, atol=1e-8)
    opposite = -5.0 * torch.nn.functional.one_hot(labels, 6)
    assert not value_and_gradient(RobustConcentratingLoss(0, 6), opposite, labels)[1].any()
    assert value_and_gradient(MAELoss(), opposite, labels)[1].any()


@pytest.mark.parametrize("gap", [-745.0, -100.0, -20.0, 20.0, 40.0, 100.0])
def test_exact_at_the_ends(gap):
    """Against 400 digits; log_softmax resolves -log p to about 1e-16 and no loss may lose more than that."""
    logits = torch.tensor([[gap, 0.0, 0.0]], dtype=torch.float64)
    with localcontext() as context:
        context.prec = 400
        total = Decimal(gap).exp() + 2
        own, other = Decimal(gap).exp() / total, 1 / total
        one, a, q = Decimal(1), Decimal("5.5"), Decimal(3)
        agce = (7 ** Decimal("1.5") - (6 + own) ** Decimal("1.5")) / Decimal("1.5")
        expected = {
            "ce": -own.ln(), "mae": 2 * (one - own), "gce": (one - own ** Decimal("0.7")) / Decimal("0.7"),
            "aue": ((a - own) ** q - (a - 1) ** q) / q, "nce_agce": own.ln() / (own.ln() + 2 * other.ln()) + 4 * agce,
        }
        expected = {name: float(value) for name, value in expected.items()}
    for name, value in expected.items():
        assert float(LOSSES[name](logits, torch.tensor([0]))) == pytest.approx(value, rel=1e-12, abs=3e-15), name


HOSTILE = {
    "equal": torch.zeros(4, 5), "right": 1e4 * torch.eye(5)[[0, 1, 2, 3]], "wrong": 1e4 * torch.eye(5)[[1, 2, 3, 4]],
    "huge": draw(4, 5, scale=1e30, dtype=torch.float32), "tiny": draw(4, 5, scale=1e-30, dtype=torch.float32),
    "offset": draw(4, 5, dtype=torch.float32) - 1e6, "half": draw(4, 5, scale=1e4).half(),
    "brain": draw(4, 5, scale=1e30).bfloat16(), "double": draw(4, 5, scale=1e200),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("autocast", [False, True])
def test_stays_finite(name, case, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value, grad = value_and_gradient(LOSSES[name], HOSTILE[case], torch.arange(4))
    assert value.isfinite() and value >= 0 and grad.isfinite().all()
    assert value.dtype == (torch.float64 if case == "double" else torch.float32)
    if case == "right":
        assert float(value) < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "rcll"])
@pytest.mark.parametrize("p", [1e-8, 0.2, 1 - 1e-7])
def test_a_step_down_raises_p(name, p):
    logits = torch.tensor([[math.log(p), *[math.log((1 - p) / 4)] * 4]], dtype=torch.float64)
    _, grad = value_and_gradient(LOSSES[name], logits, torch.tensor([0]))
    assert grad[0, 0] < 0 and float(grad.sum()) == pytest.approx(0, abs=1e-12)


def test_batch_mean_does_not_depend_on_the_order():
    logits, labels = draw(12, 5), draw_labels(12, 5)
    for loss in LOSSES.values():
        each = [float(loss(logits[i : i + 1], labels[i : i + 1])) for i in range(12)]
        assert float(loss(logits, labels)) == pytest.approx(math.fsum(each) / 12, rel=1e-12)
        assert float(loss(logits.flip(0), labels.flip(0))) == pytest.approx(float(loss(logits, labels)), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in ROBUST_LOSSES if name != "rcll"])
@pytest.mark.parametrize("logits,labels,words", [
    (torch.zeros(4), torch.tensor([0] * 4), "logits must be"), (torch.zeros(0, 3), torch.tensor([]).long(), "logits must be"),
    (torch.zeros(2, 3, 4), torch.tensor([0] * 2), "logits must be"), (torch.zeros(4, 1), torch.tensor([0] * 4), "K >= 2"),
    (torch.zeros(4, 3).long(), torch.tensor([0] * 4), "float"), (torch.zeros(4, 3), torch.zeros(4), r"\(4,\) int64"),
    (torch.zeros(4, 3), torch.zeros(4).int(), r"\(4,\) int64"), (torch.zeros(4, 3), torch.tensor([0] * 3), r"\(4,\) int64"),
    (torch.zeros(4, 3), torch.tensor([[0]] * 4), r"\(4,\) int64"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "0..2, found 0..3"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, -100]), "0..2, found -100..2"),
])
def test_rejects_wrong_batches(name, logits, labels, words):
    with pytest.raises(ValueError, match=words):
        build_robust_loss(name, 3, 0.3)(logits, labels)


@pytest.mark.parametrize("build", [
    lambda: GCELoss(0), lambda: GCELoss(1.1), lambda: GCELoss(float("nan")), lambda: AUELoss(1, 1), lambda: AUELoss(2, 0),
    lambda: AUELoss(float("nan"), 1), lambda: NCEAGCELoss(a=0), lambda: NCEAGCELoss(q=-1), lambda: NCEAGCELoss(nce_weight=-1),
    lambda: NCEAGCELoss(0, 0), lambda: NCEAGCELoss(agce_weight=float("nan")),
])
def test_rejects_wrong_parameters(build):
    with pytest.raises(ValueError, match="found"):
        build()


def test_the_builder():
    built = {name: build_robust_loss(name, 10, 0.25) for name in ROBUST_LOSSES}
    assert list(built) == ["rcll", "ce", "mae", "gce", "aue", "nce_agce"]
    types = [RobustConcentratingLoss, CELoss, MAELoss, GCELoss, AUELoss, NCEAGCELoss]
    assert [type(loss) for loss in built.values()] == types
    assert (built["rcll"].alpha, built["rcll"].num_classes, built["rcll"].clip) == (0.25, 10, True)
    assert built["gce"].q == 0.7 and (built["aue"].a, built["aue"].q) == (5.5, 3)
    for clusters, expected in ((2, (1, 4, 6, 1.5)), (21, (1, 4, 6, 1.5)), (40, (10, 0.1, 1.8, 3)), (100, (10, 0.1, 1.8, 3))):
        loss = build_robust_loss("nce_agce", clusters, 0.3)
        assert (loss.nce_weight, loss.agce_weight, loss.a, loss.q) == expected
    for loss in built.values():
        assert not list(loss.parameters()) and not loss.state_dict()


@pytest.mark.parametrize("name,hint", [
    ("rcl", "'rcll'"), ("nce+agce", "'nce_agce'"), ("CE", "found 'CE'"), ("AUL", "found 'AUL'"), (None, "None"),
])
def test_the_builder_names_the_nearest(name, hint):
    with pytest.raises(ValueError, match="expected a robust loss of rcll, ce, mae.*" + hint.replace("+", r"\+")):
        build_robust_loss(name, 10, 0.3)


@pytest.mark.parametrize("name", ROBUST_LOSSES)
def test_the_builder_checks_the_number_of_clusters(name):
    with pytest.raises(ValueError, match="num_c"):
        build_robust_loss(name, 1, 0.3)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module `own_losses` on the path, as a file in the root folder would be."""
    lines = ["from torch import nn", "class Half(nn.Module):", "    def forward(self, logits, pseudo_labels):",
             "        return 0.5 * nn.functional.cross_entropy(logits, pseudo_labels)", "class Plain: pass", ""]
    (tmp_path / "own_losses.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_losses"
    sys.modules.pop("own_losses", None)


def test_the_builder_takes_a_loss_of_the_users_own(own_module):
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
    found = build_robust_loss(f"{own_module}:Half", 5, 0.3)(logits, labels)
    assert float(found) == pytest.approx(0.5 * float(CELoss()(logits, labels)), rel=1e-6)


@pytest.mark.parametrize("name,error,message", [
    ("own_losses:Hal", ValueError, "expected class 'Hal' in module 'own_losses'"),
    ("own_lossses:Half", ValueError, "a file own_lossses.py in the root folder: No module named 'own_lossses'"),
    (":Half", ValueError, "expected class 'Half' in module ''"),
    ("own_losses:", ValueError, "expected class ''"),
    ("own_losses:Plain", TypeError, "own_losses:Plain must be an nn.Module with forward"),
])
def test_the_builder_says_what_is_wrong_with_it(own_module, name, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build_robust_loss(name, 5, 0.3)


def test_the_settings_know_the_same_names():
    assert options.ROBUST_LOSSES == ROBUST_LOSSES
