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

    mu_m is the mean of a modality's training rows, C the second moment of the rows (x - mu_m) of all modalities, each of unit norm; no
    direction counts as weaker than FLOOR times the strongest. a_i is the mean over the modalities of training object i's x~, w_i the cube
    of the cosine (0 for negative ones) with its x~ in the modality of x. x~ and the result have unit norm; without any weight the latter
    is x~.

    Args:
        embeddings: modality -> (N, D) float unit rows of the training set; row i of all modalities is one object.
    """

    def __init__(self, embeddings: Mapping[str, Tensor]) -> None:
        self.means = {name: values.double().mean(dim=0).cpu() for name, values in embeddings.items()}
        moments = []
        for name, values in embeddings.items():
            centred = F.normalize(values.double().cpu() - self.means[name], dim=1)
            moments.append(centred.T @ centred / len(centred))
        strengths, axes = torch.linalg.eigh(torch.stack(moments).mean(dim=0))
        scales = strengths.clamp(min=FLOOR * float(strengths[-1]) or 1.0).pow(-POWER / 2)
        self.whitening = axes * scales @ axes.T  # (D, D)
        self.samples = {name: self._whiten(name, values) for name, values in embeddings.items()}
        self.objects = sum(self.samples.values()) / len(self.samples)  # (N, D)

    def place(self, name: str, embeddings: Tensor) -> Tensor:
        """Return (B, D) float32 unit rows for embeddings (B, D) of one modality, on their device; to be compared by dot products."""
        rows = self._whiten(name, embeddings)
        columns, cosines = nearest(rows, self.samples[name], NEIGHBOURS)
        weights = F.normalize(cosines.clamp(min=0).pow(3), p=1, dim=1)
        near = F.embedding_bag(columns, self.objects, per_sample_weights=weights, mode="sum")
        return F.normalize(rows + near, dim=1).to(embeddings.device)

    def _whiten(self, name: str, rows: Tensor) -> Tensor:
        return F.normalize((rows.double().cpu() - self.means[name]) @ self.whitening, dim=1).float()
