"""Relational loss: a modality that moves takes over which samples a frozen one finds alike. Used by both stages with `mlm.relations`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelationLoss(nn.Module):
    """Kullback-Leibler divergence between the neighbourhoods that two modalities give the samples of a batch.

    p_ij is the softmax over j != i of the cosine of samples i and j divided by the temperature: of the target's embeddings, and
    q_ij of those that learn. The loss is the mean over i of sum_j p_ij log(p_ij / q_ij); the target gets no gradient. It ignores a
    common rotation, so another loss must bring the modalities into one space.

    Args:
        temperature: dimensionless, > 0, else a ValueError.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, found {temperature}")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one batch, a scalar in nats >= 0, float32 (float64 for float64 input).

        Args:
            embeddings: (V, B >= 3, D) float of any norm, V views, else a ValueError; target: (W, B, E), whose mean direction counts.
        """
        if embeddings.dim() != 3 or target.dim() != 3 or embeddings.shape[1] != target.shape[1] or target.shape[1] < 3:
            raise ValueError(f"expected (V, B >= 3, D) and (W, B, E), found {tuple(embeddings.shape)} and {tuple(target.shape)}")
        with torch.autocast(embeddings.device.type, enabled=False):
            wanted = self._rows(F.normalize(_wide(target.detach()), dim=2).mean(dim=0, keepdim=True))  # (1, B, B - 1)
            found = self._rows(_wide(embeddings))  # (V, B, B - 1)
            return F.kl_div(found, wanted.expand_as(found), log_target=True, reduction="sum") / (found.shape[0] * found.shape[1])

    def _rows(self, embeddings: Tensor) -> Tensor:
        """Return (V, B, B - 1): the log-probability that each sample gives to the others."""
        rows = F.normalize(embeddings, dim=2)
        others = ~torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
        similarity = (rows @ rows.mT / self.temperature)[:, others].view(len(rows), rows.shape[1], -1)
        return F.log_softmax(similarity, dim=2)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
