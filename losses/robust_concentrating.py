"""Robust concentrating loss (RCLL, Eq. 11-12): learning from noisy pseudo-labels. Used by step 2."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RobustConcentratingLoss(nn.Module):
    """L(p) = (-log p)^alpha (1 - p) for p > 1/K and the constant L(1/K) below, with p the pseudo-label's probability.

    Samples whose pseudo-label is less likely than chance get no gradient (Eq. 12); alpha -> 0 gives 1 - p, half the
    mean absolute error (Property 1), and a larger alpha moves the loss towards cross-entropy.

    Args:
        alpha: exponent >= 0, else a ValueError; the paper uses 0.25 to 0.35.
        num_classes: K >= 2, else a ValueError, the number of clusters that the pseudo-labels come from.
        clip: False leaves out Eq. 12's constant part, for the first epochs of a randomly started classifier: clusters
            that it gives less than 1/K everywhere would never get a gradient.
    """

    def __init__(self, alpha: float, num_classes: int, clip: bool = True) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, found {alpha}")
        if num_classes < 2:
            raise ValueError(f"num_classes (K) must be >= 2, found {num_classes}")
        self.alpha = alpha
        self.num_classes = num_classes
        self.clip = clip

    def forward(self, logits: Tensor, pseudo_labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch, a dimensionless scalar >= 0.

        Args:
            logits: (B, K) unnormalised scores, any float type; computed in float32 or wider.
            pseudo_labels: (B,) int64 in 0..K-1.
            weights: (B,) float >= 0, with a sum > 0: the mean is weighted by them (ours; the paper has none).
        Raises:
            ValueError: on wrong shapes or types, an empty batch, or on labels outside 0..K-1 (checked on the CPU only; on a
                GPU the check would make every step wait).
        """
        check_batch(logits, pseudo_labels)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must be (B, K = {self.num_classes}), found {tuple(logits.shape)}")
        log_probs = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
        surprise = -log_probs.gather(1, pseudo_labels[:, None]).squeeze(1)  # (B,) -log p >= 0
        # The slope of x^alpha is infinite at 0: keep x above the smallest normal number, where the true slope is 0 too.
        surprise = surprise.clamp_min(torch.finfo(surprise.dtype).tiny)
        if not self.clip:
            return _mean(self._value(surprise), weights)
        # Rounding must not push an exactly uniform prediction (p = 1/K) above the clip level. An overflow above it would
        # reach the gradient of the unused branch as 0 * inf, hence the clamp.
        ceiling = math.log(self.num_classes)
        rounding = 8 * torch.finfo(surprise.dtype).eps * ceiling
        loss = self._value(surprise.clamp_max(ceiling))
        constant = ceiling**self.alpha * (1 - 1 / self.num_classes)
        return _mean(torch.where(surprise < ceiling - rounding, loss, torch.full_like(loss, constant)), weights)

    def _value(self, surprise: Tensor) -> Tensor:
        """(-log p)^alpha (1 - p) from -log p."""
        return surprise.pow(self.alpha) * -torch.expm1(-surprise)

    def clipped_fraction(self, logits: Tensor, pseudo_labels: Tensor) -> Tensor:
        """Return the share of samples with p <= 1/K, which get no gradient, as a scalar in [0, 1]."""
        probs = logits.detach().float().softmax(dim=1)
        return (probs.gather(1, pseudo_labels[:, None]) <= 1 / self.num_classes).float().mean()


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def check_batch(logits: Tensor, pseudo_labels: Tensor) -> None:
    """Raise ValueError unless logits are (B >= 1, K >= 2) float and pseudo_labels (B,) int64, within 0..K-1 if on the CPU."""
    if logits.dim() != 2 or len(logits) == 0 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be (B >= 1, K >= 2) float, found {tuple(logits.shape)} {logits.dtype}")
    if pseudo_labels.shape != logits.shape[:1] or pseudo_labels.dtype != torch.int64:
        raise ValueError(f"pseudo_labels must be ({len(logits)},) int64, found {tuple(pseudo_labels.shape)} {pseudo_labels.dtype}")
    if pseudo_labels.device.type == "cpu":
        low, high = int(pseudo_labels.min()), int(pseudo_labels.max())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"pseudo_labels must lie in 0..{logits.shape[1] - 1}, found {low}..{high}")
