"""RONO: Y. Feng et al., "RONO: robust discriminative learning with noisy labels for 2D-3D cross-modal retrieval", CVPR 2023.

Supervised, with one noisy label y per pair. Unit embeddings z, class centres c_k (learned, unit norm), cbar = (1/K) sum_k c_k, n = 2B rows
of both modalities, epoch t = 0, 1, ..., v = min(t / (Tw - 1), 1):

    RDCL: L_rdc = (1 - v) L' + v L_full
          L'     = (1 / (a n)) sum [exp(<cbar, z>) - exp(((K + 1) / K) <c_y, z>)]                           warm-up
          L_full = -(1 / (a n)) sum |exp(<cbar, z>) - exp(<c_y, z>) + theta|
    MG:   the contrastive loss of the pairs at temperature 0.22 (`losses.ModalityInvarianceLoss`)
    CRC:  5 mean(1 - p_y) of each modality, summed; p of one head L-128-K for both
    L = rdc L_rdc + mg MG + crc CRC

A sample with exp(<c_y, z>) > exp(<cbar, z>) + theta counts as clean and is pulled to its centre, any other is pushed away from it. As
either is rewarded without end, the warm-up is needed. From the release (3D MNIST): theta 0.3, a 0.05, Tw 25 of 50 epochs, all weights 1,
batch 128, weight decay 1e-5, centres drawn normally. The equations follow the release.

Ours: `warmup` is Tw's share of the epochs, 0 for L_full from the start; `vanilla` keeps L' throughout, a row of the published ablation; one
rate of 1e-4 for all (published 5e-5 for images) and weight decay on the centres, too, of which only the direction counts; the head reads
embeddings before they are normalised, and no layer has the release's dropout of 0.4; ranked: z. Watched: the share of clean samples,
which should exceed that of right labels.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.method import POSITIVE, SHARE, Context, Method, Training
from losses import ModalityInvarianceLoss

HEAD_WIDTH = 128
CRC_SCALE = 5.0


class RONO(Method):
    """Robust discriminative learning with noisy labels."""

    training_defaults = Training(dim=256, batch_size=128, epochs=50, learning_rate=1e-4, weight_decay=1e-5)
    defaults = {
        "rdc": 1.0, "mg": 1.0, "crc": 1.0, "theta": 0.3, "a": 0.05, "warmup": 0.5, "vanilla": False, "temperature": 0.22,
    }
    limits = {"a": POSITIVE, "warmup": SHARE, "temperature": POSITIVE}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.centres = nn.Parameter(torch.randn(context.num_clusters, context.dim))
        self.head = nn.Sequential(nn.Linear(context.dim, HEAD_WIDTH), nn.ReLU(), nn.Linear(HEAD_WIDTH, context.num_clusters))
        self.gap = ModalityInvarianceLoss(context.settings["temperature"])

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        options, labels = self.context.settings, self.context.labels[index]
        found = [embeddings[name] for name in self.context.modalities]
        both = [F.normalize(rows, dim=1) for rows in found]
        loss = options["rdc"] * self.discriminative(torch.cat(both), torch.cat([labels, labels]), epoch)
        believed = [self.head(rows).softmax(dim=1).gather(1, labels[:, None]) for rows in found]  # p_y (B, 1) each
        consistency = CRC_SCALE * sum((1 - values).mean() for values in believed)
        return loss + options["mg"] * self.gap(torch.stack(both)) + options["crc"] * consistency

    def discriminative(self, rows: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Return L_rdc of unit rows (n, L) and their labels (n,)."""
        options, centres = self.context.settings, F.normalize(self.centres, dim=1)
        mean, own = rows @ centres.mean(dim=0), (rows * centres[labels]).sum(dim=1)  # <cbar, z> and <c_y, z>, (n,)
        classes = len(centres)
        warm = (mean.exp() - ((classes + 1) / classes * own).exp()).mean()
        if options["vanilla"]:
            return warm / options["a"]
        self.logged["clean"] = (own.exp() > mean.exp() + options["theta"]).float().mean()
        full = -(mean.exp() - own.exp() + options["theta"]).abs().mean()
        share = progress(epoch, self.context.epochs, options["warmup"])
        return ((1 - share) * warm + share * full) / options["a"]


def progress(epoch: int, epochs: int, warmup: float) -> float:
    """Return v of an epoch (1-based): from 0 in the first to 1 at the end of the warm-up, which is a share of the epochs."""
    last = math.ceil(warmup * epochs) - 1  # Tw - 1
    return min((epoch - 1) / last, 1.0) if last > 0 else 1.0
