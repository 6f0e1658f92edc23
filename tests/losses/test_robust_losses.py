"""Losses on pseudo-labels, RCLL and those compared with it: slow formulas, slopes, published limits and constants, hostile batches."""

import math
import re
import sys
from decimal import Decimal, localcontext

import pytest
import torch
from loss_checks import DTYPES, TOLERANCE, draw, draw_labels, softmax, value_and_gradient

from losses import ROBUST_LOSSES, AUELoss, CELoss, GCELoss, MAELoss, NCEAGCELoss, RobustConcentratingLoss, build_robust_loss
from utils.settings import options

# The formulas, in Python floats, as the papers print them: from the list of all p and the label y.


def rcll(alpha):
    def formula(p, y):
        kept = max(p[y], 1 / len(p))
        return (-math.log(kept)) ** alpha * (1 - kept)

    return formula


def gce(q):
    return lambda p, y: (1 - p[y] ** q) / q


def aue(a, q):
    return lambda p, y: ((a - p[y]) ** q - (a - 1) ** q) / q


def nce_agce(v, w, a, q):
    return lambda p, y: v * math.log(p[y]) / sum(map(math.log, p)) + w * ((a + 1) ** q - (a + p[y]) ** q) / q


CASES = {
    "ce": (CELoss(), lambda p, y: -math.log(p[y])),
    "mae": (MAELoss(), lambda p, y: sum(abs((k == y) - value) for k, value in enumerate(p))),
    "gce": (GCELoss(), gce(0.7)), "gce_q_small": (GCELoss(0.05), gce(0.05)),
    "aue": (AUELoss(), aue(5.5, 3)), "aue_mnist": (AUELoss(3, 0.1), aue(3, 0.1)), "aue_steep": (AUELoss(1.01, 0.5), aue(1.01, 0.5)),
    "nce_agce": (NCEAGCELoss(), nce_agce(1, 4, 6, 1.5)), "nce_agce_100": (NCEAGCELoss(10, 0.1, 1.8, 3), nce_agce(10, 0.1, 1.8, 3)),
    "agce_mnist": (NCEAGCELoss(0, 1, 4, 0.2), nce_agce(0, 1, 4, 0.2)), "nce": (NCEAGCELoss(1, 0), nce_agce(1, 0, 6, 1.5)),
    **{f"rcll_{alpha}": (RobustConcentratingLoss(alpha, 5), rcll(alpha)) for alpha in (0.0, 1e-3, 0.3, 1.0, 2.5)},
}
LOSSES = {name: loss for name, (loss, _) in CASES.items()}


def slow(formula, logits, labels):
    rows = logits.double().tolist()
    return sum(formula(softmax(row), label) for row, label in zip(rows, labels.tolist(), strict=True)) / len(rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_loops(name, batch, dtype):
    loss, formula = CASES[name]
    logits, labels = draw(batch, 5, scale=3, dtype=dtype), draw_labels(batch, 5)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, -7.3, 1e4])
def test_uniform_logits_are_clipped_for_every_class_count(dtype, offset):
    for classes in [*range(2, 70), 100, 127, 365, 1000, 4096, 10007]:
        logits, labels = torch.full((2, classes), offset, dtype=dtype), torch.tensor([0, classes - 1])
        loss = RobustConcentratingLoss(0.3, classes)
        value, grad = value_and_gradient(loss, logits, labels)
        assert not grad.any(), classes
        assert float(value) == pytest.approx(math.log(classes) ** 0.3 * (1 - 1 / classes), rel=1e-5)
        assert loss.clipped_fraction(logits, labels) == 1, classes


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_does_not_push_a_chance_level_sample_above_the_clip(dtype):
    for classes in range(4, 200):
        probs = torch.full((1, classes), 1 / classes, dtype=torch.float64)
        probs[0, 1], probs[0, 2] = 1.5 / classes, 0.5 / classes  # p = 1/K exactly, the others uneven
        _, grad = value_and_gradient(RobustConcentratingLoss(0.3, classes), probs.log().to(dtype), torch.tensor([0]))
        assert not grad.any(), classes


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_samples_below_chance_get_the_constant_and_no_gradient(alpha):
    logits, labels, loss = draw(200, 6, scale=4), draw_labels(200, 6), RobustConcentratingLoss(alpha, 6)
    p = logits.softmax(1)[torch.arange(200), labels]
    _, grad = value_and_gradient(loss, logits, labels)
    below = p <= 1 / 6
    assert 20 < below.sum() < 180 and not grad[below].any() and (grad[~below].abs().sum(1) > 0).all()
    assert float(loss(logits[below], labels[below])) == pytest.approx(math.log(6) ** alpha * (1 - 1 / 6), rel=1e-12)
    assert float(loss.clipped_fraction(logits, labels)) == pytest.approx(float(below.double().mean()), abs=1e-6)
    _, unclipped = value_and_gradient(RobustConcentratingLoss(alpha, 6, clip=False), logits, labels)
    assert (unclipped.abs().sum(1) > 0).all() and torch.equal(unclipped[~below], grad[~below])
    for classes, margin in ((2, 1e-4), (10, 1e-2), (365, 1e-4)):  # just above and just below
        row = torch.zeros(1, classes)
        row[0, 0] = margin
        assert value_and_gradient(RobustConcentratingLoss(alpha, classes), row, torch.tensor([0]))[1][0, 0] < 0
        assert not value_and_gradient(RobustConcentratingLoss(alpha, classes), -row, torch.tensor([0]))[1].any()


@pytest.mark.parametrize("gap", [-745.0, -100.0, -20.0, 20.0, 100.0])
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


GAPS = torch.tensor([0.0, 1e-30, 1e-7, 15, 17, 40, 88, 104, 750, 1e4])
HOSTILE = {
    "equal": torch.zeros(4, 5), "right": 1e4 * torch.eye(5)[[0, 1, 2, 3]], "wrong": 1e4 * torch.eye(5)[[1, 2, 3, 4]],
    "gaps": torch.cat([GAPS, -GAPS])[:, None] * torch.eye(5)[0], "huge": draw(4, 5, scale=1e30, dtype=torch.float32),
    "tiny": draw(4, 5, scale=1e-30, dtype=torch.float32), "offset": draw(4, 5, dtype=torch.float32) - 1e6,
    "half": draw(4, 5, scale=1e4).half(), "brain": draw(4, 5, scale=1e30).bfloat16(), "double": draw(4, 5, scale=1e200),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("autocast", [False, True])
def test_stays_finite(name, case, autocast):
    labels = torch.zeros(20).long() if case == "gaps" else torch.arange(4)
    value, grad = value_and_gradient(LOSSES[name], HOSTILE[case], labels, autocast=autocast)
    assert value.isfinite() and value >= 0 and grad.isfinite().all() and grad.abs().max() < 30
    assert value.dtype == (torch.float64 if case == "double" else torch.float32)
    if case == "right":
        assert float(value) < 1e-6 and grad.abs().max() < 1e-6  # p -> 1: nothing left to learn


def test_a_steep_rcll_stays_finite_below_chance():
    value, grad = value_and_gradient(RobustConcentratingLoss(50.0, 6), 1e4 * draw(50, 6).sign().float(), torch.arange(50) % 6)
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("name", ROBUST_LOSSES)
@pytest.mark.parametrize("logits,labels,words", [
    (torch.zeros(4), torch.tensor([0] * 4), "logits must be"), (torch.zeros(0, 3), torch.tensor([]).long(), "logits must be"),
    (torch.zeros(2, 3, 4), torch.tensor([0] * 2), "logits must be"), (torch.zeros(4, 1), torch.tensor([0] * 4), "logits must be"),
    (torch.zeros(4, 3).long(), torch.tensor([0] * 4), "float"), (torch.zeros(4, 3), torch.zeros(4), r"\(4,\) int64"),
    (torch.zeros(4, 3), torch.tensor([0] * 3), r"\(4,\) int64"), (torch.zeros(4, 3), torch.tensor([[0]] * 4), r"\(4,\) int64"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "0..2, found 0..3"),
    (torch.zeros(4, 3), torch.tensor([0, 1, 2, -100]), "0..2, found -100..2"),
])
def test_rejects_wrong_batches(name, logits, labels, words):
    with pytest.raises(ValueError, match="K = 4"):
        RobustConcentratingLoss(0.3, 4)(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=words):
        build_robust_loss(name, 3, 0.3)(logits, labels)


@pytest.mark.parametrize("build", [
    lambda: GCELoss(0), lambda: GCELoss(1.1), lambda: GCELoss(float("nan")), lambda: AUELoss(1, 1), lambda: AUELoss(2, 0),
    lambda: AUELoss(float("nan"), 1), lambda: NCEAGCELoss(a=0), lambda: NCEAGCELoss(q=-1), lambda: NCEAGCELoss(nce_weight=-1),
    lambda: NCEAGCELoss(0, 0), lambda: NCEAGCELoss(agce_weight=float("nan")), lambda: RobustConcentratingLoss(-0.1, 4),
    lambda: RobustConcentratingLoss(float("nan"), 4), lambda: RobustConcentratingLoss(0.3, 1),
    *[lambda name=name: build_robust_loss(name, 1, 0.3) for name in ROBUST_LOSSES],
])
def test_rejects_wrong_parameters(build):
    with pytest.raises(ValueError, match="found"):
        build()


def test_the_builder():
    assert options.ROBUST_LOSSES == ROBUST_LOSSES  # the settings refuse other names before any data is read
    built = {name: build_robust_loss(name, 10, 0.25) for name in ("rcll", "ce", "mae", "gce", "aue", "nce_agce")}
    assert [type(loss) for loss in built.values()] == [RobustConcentratingLoss, CELoss, MAELoss, GCELoss, AUELoss, NCEAGCELoss]
    assert (built["rcll"].alpha, built["rcll"].num_classes, built["rcll"].clip) == (0.25, 10, True)
    assert built["gce"].q == 0.7 and (built["aue"].a, built["aue"].q) == (5.5, 3)
    for clusters, expected in ((2, (1, 4, 6, 1.5)), (21, (1, 4, 6, 1.5)), (40, (10, 0.1, 1.8, 3)), (100, (10, 0.1, 1.8, 3))):
        loss = build_robust_loss("nce_agce", clusters, 0.3)
        assert (loss.nce_weight, loss.agce_weight, loss.a, loss.q) == expected


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module `own_losses` on the path, as a file in the root folder would be."""
    (tmp_path / "own_losses.py").write_text("from losses import MAELoss as Half\nclass Plain: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_losses"
    sys.modules.pop("own_losses", None)


@pytest.mark.parametrize("name,error,message", [
    ("rcl", ValueError, "expected a robust loss of rcll, ce, mae, gce, aue, nce_agce, or module:Class, found 'rcl'"),
    (None, ValueError, "found None"),
    ("own_losses:Hal", ValueError, "expected class 'Hal' in module 'own_losses'"),
    ("own_lossses:Half", ValueError, "a file own_lossses.py in the root folder: No module named 'own_lossses'"),
    (":Half", ValueError, "expected class 'Half' in module ''"), ("own_losses:", ValueError, "expected class ''"),
    ("own_losses:Plain", TypeError, "own_losses:Plain must be an nn.Module with forward"),
])
def test_the_builder_takes_a_loss_of_the_users_own_or_says_what_is_wrong(own_module, name, error, message):
    assert type(build_robust_loss(f"{own_module}:Half", 5, 0.3)) is MAELoss
    with pytest.raises(error, match=re.escape(message)):
        build_robust_loss(name, 5, 0.3)
