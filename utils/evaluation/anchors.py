"""Ranking by way of the training objects: a sample moves towards those that it is nearest to. It reads embeddings alone, no label.

What a query is compared by depends on the training set and itself, never on other queries or the gallery. Averaging with neighbours is
query expansion and database augmentation (Chum et al. 2007; Turcot and Lowe 2009), here with neighbours of the training set, whose pairs
say where an object lies in the other modalities too; whitening: Jegou and Chum 2012.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.evaluation.ranking import nearest

NEIGHBOURS = 10
POWER = 0.6  # of the whitening: 0 leaves rows as they are, 1 makes all directions alike
FLOOR = 1e-4  # least strength of a direction, beside the strongest


class Anchors:
    """x~ = W (x - mu_m), W = C^(-POWER/2); then x~ + sum_i w_i a_i / sum_i w_i, i over the NEIGHBOURS training samples nearest to x~.

    mu_m is the mean of a modality's training rows, C the second moment of all modalities' centred unit rows; rows have unit norm after
    every step. a_i is the mean over the modalities of training object i's x~, w_i the cube of the cosine (0 for negative ones) with its
    x~ in the modality of x.

    Args:
        embeddings: modality -> (N, D) float unit rows of the training set; row i of all modalities is one object.
    """

    def __init__(self, embeddings: Mapping[str, Tensor]) -> None:
        rows = {name: values.double().cpu() for name, values in embeddings.items()}
        self.means = {name: values.mean(dim=0) for name, values in rows.items()}
        centred = F.normalize(torch.cat([values - self.means[name] for name, values in rows.items()]), dim=1)
        strengths, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        scales = strengths.clamp(min=FLOOR * float(strengths[-1]) or 1.0).pow(-POWER / 2)
        self.whitening = axes * scales @ axes.T  # (D, D)
        self.samples = {name: self._whiten(name, values) for name, values in rows.items()}
        self.objects = torch.stack(list(self.samples.values())).mean(dim=0)  # (N, D)

    def place(self, name: str, embeddings: Tensor) -> Tensor:
        """Return (B, D) float32 unit rows for embeddings (B, D) of one modality, on their device; to be compared by dot products."""
        rows = self._whiten(name, embeddings.double().cpu())
        columns, cosines = nearest(rows, self.samples[name], NEIGHBOURS)
        weights = cosines.clamp(min=0).pow(3)
        weights /= weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        near = F.embedding_bag(columns, self.objects, per_sample_weights=weights, mode="sum")
        return F.normalize(rows + near, dim=1).float().to(embeddings.device)

    def _whiten(self, name: str, rows: Tensor) -> Tensor:
        return F.normalize((rows - self.means[name]) @ self.whitening, dim=1)
