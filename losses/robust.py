"""Robust losses that step 2 can use instead of RCLL (Tables IV and V): CE, MAE, GCE, AUE, NCE+AGCE, and their builder.

All but NCE are functions of p, the pseudo-label's probability. They are computed from -log p, so that value and gradient stay
finite for p -> 0 and p -> 1 without clamping p.
"""

import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses.robust_concentrating import RobustConcentratingLoss, check_batch

ROBUST_LOSSES = ("rcll", "ce", "mae", "gce", "aue", "nce_agce")
MANY_CLASSES = 22  # ours: from here on NCE+AGCE takes the values published for 100 classes, below those for 10


class _LabelLoss(nn.Module):
    """Mean over a batch of a loss of log-probabilities; a subclass says which, in `sample_losses`."""

    def forward(self, logits: Tensor, pseudo_labels: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar >= 0; arguments and errors as `RobustConcentratingLoss.forward`, any K >= 2."""
        check_batch(logits, pseudo_labels)
        surprise = -F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)  # (B, K)
        return self.sample_losses(surprise, surprise.gather(1, pseudo_labels[:, None]).squeeze(1)).mean()

    def sample_losses(self, surprise: Tensor, own: Tensor) -> Tensor:
        """Return (B,) losses from -log p of all classes (B, K) and of the pseudo-label (B,)."""
        raise NotImplementedError


class CELoss(_LabelLoss):
    """Cross-entropy, L = -log p: the loss that wrong pseudo-labels hurt most, since its slope -1/p grows as p falls."""

    def sample_losses(self, surprise: Tensor, own: Tensor) -> Tensor:
        return own


class MAELoss(_LabelLoss):
    """Mean absolute error, L = |e_y - p|_1 = 2 (1 - p) (Ghosh et al., AAAI 2017); released codes scale it differently."""

    def sample_losses(self, surprise: Tensor, own: Tensor) -> Tensor:
        return 2 * _one_minus_p(own)


class GCELoss(_LabelLoss):
    """Generalised cross-entropy, L = (1 - p^q) / q with 0 < q <= 1, published 0.7 (Zhang and Sabuncu, NeurIPS 2018).

    q -> 0 is CE and q = 1 is 1 - p, half of MAE; another q is a ValueError.
    """

    def __init__(self, q: float = 0.7) -> None:
        super().__init__()
        if not 0 < q <= 1:
            raise ValueError(f"q must lie in (0, 1], found {q}")
        self.q = q

    def sample_losses(self, surprise: Tensor, own: Tensor) -> Tensor:
        return -torch.expm1(-self.q * own) / self.q


class AUELoss(_LabelLoss):
    """Asymmetric unhinged loss, L = [(a - p)^q - (a - 1)^q] / q (Zhou et al., ICML 2021).

    Their paper calls it AUL and their code AUE, the name in RoMo's tables, which give no parameters. The asymmetric
    exponential loss of the same paper is another one (AEL).

    a > 1 and q > 0, else a ValueError. Published (5.5, 3) for CIFAR-10 and CIFAR-100, (3, 0.1) for MNIST.
    """

    def __init__(self, a: float = 5.5, q: float = 3.0) -> None:
        super().__init__()
        _check_asymmetric(a, q, least=1)
        self.a, self.q = a, q

    def sample_losses(self, surprise: Tensor, own: Tensor) -> Tensor:
        # With b = a - 1: [(b + (1 - p))^q - b^q] / q without the difference of nearly equal powers at p -> 1.
        base = self.a - 1
        return base**self.q * torch.expm1(self.q * torch.log1p(_one_minus_p(own) / base)) / self.q


class NCEAGCELoss(_LabelLoss):
    """Normalised cross-entropy plus asymmetric GCE, L = v NCE + w AGCE (Zhou et al., ICML 2021).

    NCE = log p / sum_k log p_k, in [0, 1] (Ma et al., ICML 2020); AGCE = [(a + 1)^q - (a + p)^q] / q.

    v, w >= 0, not both 0, and a, q > 0, else a ValueError. Published (1, 4, 6, 1.5) for CIFAR-10, (10, 0.1, 1.8, 3) for CIFAR-100
    and (0, 1, 4, 0.2) for MNIST.
    """

    def __init__(self, nce_weight: float = 1.0, agce_weight: float = 4.0, a: float = 6.0, q: float = 1.5) -> None:
        super().__init__()
        if not (nce_weight >= 0 and agce_weight >= 0 and nce_weight + agce_weight > 0):
            raise ValueError(f"nce_weight and agce_weight must be >= 0 and not both 0, found {nce_weight} and {agce_weight}")
        _check_asymmetric(a, q, least=0)
        self.nce_weight, self.agce_weight, self.a, self.q = nce_weight, agce_weight, a, q

    def sample_losses(self, surprise: Tensor, own: Tensor) -> Tensor:
        normalised = own / surprise.sum(dim=1)  # the sum is at least K log K, so no division by 0
        top = self.a + 1  # a + p = top - (1 - p); written like AUE
        asymmetric = -(top**self.q) * torch.expm1(self.q * torch.log1p(-_one_minus_p(own) / top)) / self.q
        return self.nce_weight * normalised + self.agce_weight * asymmetric


def build_robust_loss(name: str, num_clusters: int, alpha: float) -> nn.Module:
    """Return a loss of step 2 with its published parameters, a module with forward(logits (B, K), pseudo_labels (B,)) -> scalar.

    Args:
        name: one of ROBUST_LOSSES, or "module:Class" for a loss of the user's own, which is built without arguments.
        num_clusters: K >= 2; decides the clip level of "rcll" and the parameters of "nce_agce" (see MANY_CLASSES).
        alpha: exponent of "rcll", unused by the others.
    Raises:
        ValueError: on an unknown name, a module or class that is not there, or num_clusters < 2.
        TypeError: if "module:Class" is no nn.Module that can be built without arguments.
    """
    if num_clusters < 2:
        raise ValueError(f"num_clusters (K) must be >= 2, found {num_clusters}")
    if ":" in str(name):
        return _own_loss(*name.split(":", 1))
    if name not in ROBUST_LOSSES:
        raise ValueError(f"expected a robust loss of {', '.join(ROBUST_LOSSES)}, or module:Class, found {name!r}")
    if name == "rcll":
        return RobustConcentratingLoss(alpha, num_clusters)
    if name == "nce_agce":
        return NCEAGCELoss(10, 0.1, 1.8, 3) if num_clusters >= MANY_CLASSES else NCEAGCELoss(1, 4, 6, 1.5)
    return {"ce": CELoss, "mae": MAELoss, "gce": GCELoss, "aue": AUELoss}[name]()


def _own_loss(module: str, name: str) -> nn.Module:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        where = f"in module {module!r}, a file {module}.py in the root folder"
        raise ValueError(f"expected class {name!r} {where}: {error}") from error
    loss = found()
    if not isinstance(loss, nn.Module):
        raise TypeError(f"{module}:{name} must be an nn.Module with forward(logits (B, K), pseudo_labels (B,)), found {type(loss)}")
    return loss


def _one_minus_p(own: Tensor) -> Tensor:
    """1 - p from -log p, without the cancellation at p -> 1."""
    return -torch.expm1(-own)


def _check_asymmetric(a: float, q: float, least: float) -> None:
    if not (a > least and q > 0):
        raise ValueError(f"expected a > {least} and q > 0, found a = {a} and q = {q}")
