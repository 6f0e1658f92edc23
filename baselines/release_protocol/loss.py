"""RCLL as the authors' code computes it: threshold 1 / batch size, and rows counted once per class."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchClippedLoss(nn.Module):
    """Sum of two means over the entries of the (B, K) matrix of probabilities, on either side of 1 / B.

    Entries above 1 / B each count the value (-log p)^alpha (1 - p) of their row, p the pseudo-label's probability, which is
    itself never clipped; so a row weighs as often as it has classes above 1 / B. Entries at or below 1 / B each count
    (log B)^alpha (1 - 1 / B), whose mean is that constant. B stands where Eq. 12 has K because the authors' code counts the
    tensor objects of the label vector.

    A side without entries counts 0 here; the mean of nothing makes the authors' loss NaN.

    Args:
        alpha: exponent of RCLL, >= 0.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, logits: Tensor, pseudo_labels: Tensor) -> Tensor:
        """Return the loss of a batch: a scalar >= 0.

        Args:
            logits: (B, K) unnormalised scores, B >= 2; computed in float32 or wider.
            pseudo_labels: (B,) int64 in 0..K-1.
        """
        size = len(logits)
        log_probs = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
        surprise = -log_probs.gather(1, pseudo_labels[:, None]).squeeze(1)  # (B,)
        surprise = surprise.clamp_min(torch.finfo(surprise.dtype).tiny)  # the slope of x^alpha is infinite at 0
        values = surprise.pow(self.alpha) * -torch.expm1(-surprise)
        above = (log_probs.detach().exp() > 1 / size).sum(dim=1)  # (B,) how often each row counts
        constant = math.log(size) ** self.alpha * (1 - 1 / size)
        clipped = constant * (above.sum() < logits.numel()).to(values.dtype)
        return (above * values).sum() / above.sum().clamp_min(1) + clipped
