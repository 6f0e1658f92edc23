"""Relational loss: a modality that moves takes its place among a frozen one's samples. Used by both stages with `mlm.relations`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RelationLoss(nn.Module):
    """Kullback-Leibler divergence between how alike two modalities of an object are to the samples of a batch in one of them.

    p_ij is the softmax over j of the cosine of target samples i and j divided by the temperature, q_ij that of the embedding that
    learns, of sample i, and target sample j; the pair itself, j = i, counts. The loss is the mean over i of sum_j p_ij log(p_ij / q_ij);
    the target gets no gradient. It is 0 where every sample stands at its pair, and what the target finds alike is no negative.

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
            embeddings: (V, B >= 2, D) float of any norm, V views, else a ValueError; target: (W, B, D), whose mean direction counts.
        """
        if embeddings.dim() != 3 or target.dim() != 3 or embeddings.shape[1:] != target.shape[1:] or target.shape[1] < 2:
            raise ValueError(f"expected (V, B >= 2, D) and (W, B, D), found {tuple(embeddings.shape)} and {tuple(target.shape)}")
        with torch.autocast(embeddings.device.type, enabled=False):
            anchors = F.normalize(F.normalize(_wide(target.detach()), dim=2).mean(dim=0), dim=1)  # (B, D)
            wanted = F.log_softmax(anchors @ anchors.T / self.temperature, dim=1)  # (B, B)
            found = F.log_softmax(F.normalize(_wide(embeddings), dim=2) @ anchors.T / self.temperature, dim=2)  # (V, B, B)
            return F.kl_div(found, wanted.expand_as(found), log_target=True, reduction="sum") / (found.shape[0] * found.shape[1])


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
