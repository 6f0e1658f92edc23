"""MRL: P. Hu et al., "Learning cross-modal retrieval with noisy labels", CVPR 2021.

Supervised, with one noisy label y per pair. Unit embeddings z; class centres C (L, K) of unit norm, shared by the modalities, start
orthogonal and are normalised before every step; p = softmax(C^T z / tau1):

    Lr = sum over modalities of mean log(1 - p_y)            steeper for large p_y: easy, clean samples lead
    Lc = the contrastive loss of the pairs at temperature tau2 (`losses.ModalityInvarianceLoss`)
    L = beta Lr + (1 - beta) Lc

Published: Adam 1e-4, 100 epochs, tau1 = tau2 = 1, beta 0.5, and from the release betas (0.5, 0.999), a cosine schedule. At tau1 = 1 unit
vectors keep p_y below 1; 1 - p_y is held above 1e-6 for smaller ones. Ours: batch 128, 256 dimensions, the MLP that every method
here trains in place of the published heads of two layers of 4,096; ranked: z.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.method import POSITIVE, SHARE, Context, Method, Training
from losses import ModalityInvarianceLoss

SMALLEST = 1e-6  # of 1 - p_y


class MRL(Method):
    """Multimodal robust learning."""

    training_defaults = Training(dim=256, batch_size=128, epochs=100, learning_rate=1e-4, betas=(0.5, 0.999), schedule="cosine")
    defaults = {"beta": 0.5, "tau1": 1.0, "tau2": 1.0}
    limits = {"beta": SHARE, "tau1": POSITIVE, "tau2": POSITIVE}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.centres = nn.Parameter(nn.init.orthogonal_(torch.empty(context.dim, context.num_clusters)))
        self.pairs = ModalityInvarianceLoss(context.settings["tau2"])

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        options, labels = self.context.settings, self.context.labels[index]
        with torch.no_grad():
            self.centres.copy_(F.normalize(self.centres, dim=0))
        both = [F.normalize(embeddings[name], dim=1) for name in self.context.modalities]
        clustering = sum(robust_clustering(rows @ self.centres / options["tau1"], labels) for rows in both)
        return options["beta"] * clustering + (1 - options["beta"]) * self.pairs(torch.stack(both))


def robust_clustering(logits: Tensor, labels: Tensor) -> Tensor:
    """Return Lr of one modality, mean log(1 - p_y), from logits (B, K) and labels (B,)."""
    log_others = torch.logsumexp(logits.scatter(1, labels[:, None], -torch.inf), dim=1) - torch.logsumexp(logits, dim=1)
    return log_others.clamp_min(math.log(SMALLEST)).mean()
