"""Modality-invariance loss (MLM, Eq. 13-14): pulls the modalities of one object together. Used by both stages."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ModalityInvarianceLoss(nn.Module):
    """Contrastive loss over all samples of all modalities of a batch.

    Eq. 13: the probability of anchor v_i of modality m is the sum of exp(v_i . v_i^n / tau_2) over the other
    modalities n, divided by the sum of exp(v_i . v / tau_2) over every other embedding v of the batch. The anchor itself
    is left out of both sums: the printed equation keeps it, where it is the constant exp(1 / tau_2) and drowns the
    positives. Eq. 14: the mean of -log P over the B objects, summed over the M modalities.

    Args:
        temperature: tau_2, dimensionless, > 0, else a ValueError.
        self_term: keep the anchor in both sums, as Eq. 13 is printed.
    """

    def __init__(self, temperature: float, self_term: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature (tau_2) must be > 0, found {temperature}")
        self.temperature = temperature
        self.self_term = self_term

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the loss of one batch, a scalar in nats, float32 (float64 for float64 input).

        Args:
            embeddings: (M >= 2, B >= 2, D) float of any norm, else a ValueError; those of one index i are of one object.
        """
        if embeddings.dim() != 3 or embeddings.shape[0] < 2 or embeddings.shape[1] < 2:
            raise ValueError(f"embeddings must be (M >= 2, B >= 2, D), found {tuple(embeddings.shape)}")
        num_modalities, batch_size, dim = embeddings.shape
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
            rows = F.normalize(embeddings, dim=-1).reshape(-1, dim)  # (M*B, D)
            similarity = rows @ rows.T / self.temperature  # (M*B, M*B)
            if not self.self_term:
                itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
                similarity = similarity.masked_fill(itself, -torch.inf)
            log_all = torch.logsumexp(similarity, dim=1)  # (M*B,)
            same_object = similarity.view(num_modalities, batch_size, num_modalities, batch_size)
            same_object = same_object.diagonal(dim1=1, dim2=3)  # (M, M, B), -inf where m == n is left out
            log_positive = torch.logsumexp(same_object, dim=1).reshape(-1)  # (M*B,)
            return (log_all - log_positive).sum() / batch_size
