"""RevGrad (DANN): Y. Ganin, V. Lempitsky, "Unsupervised domain adaptation by backpropagation", ICML 2015.

A classifier g and a domain discriminator D read the embeddings z of both modalities; D's gradient is reversed on its way back:

    L = CE(g(z^X), y) [+ CE(g(z^Y), y)] + BCE(D(GRL_lambda(z)), domain), means over the batch, BCE over both modalities
    lambda = 2 / (1 + exp(-10 p)) - 1, p = progress of the training in [0, 1];  ranked: z

The method needs labels y of a source domain. RoMo does not say which it used. Here, by default, y are PSEUDO-LABELS OF THE IMAGE
MODALITY: k-means (K as for RoMo) of its frozen features of unit norm; no label is read. With true source labels (`context.labels`) it is
"RevGrad, true source labels", which is not unsupervised. `transfer` copies a label to the paired 3D sample (the bracket); without it
two different encoders are aligned at best up to a permutation of clusters, and the score is near chance. `source: pairs` puts the
contrastive loss of the pairs (`temperature`) in the place of the classifier. The row with true labels copies them as well: MI3DOR's
protocol reads no pairs, but there one network serves both domains.

From the release (MI3DOR): 256 dimensions, D 256-1024-1024-1 with ReLU and dropout 0.5, SGD 0.9 with Nesterov, rate 1e-2, weight decay 5e-4.
Ours: an encoder per modality, batches of 50 pairs, 70 epochs, p by epochs, a constant rate in place of 0.01 / (1 + 10 p)^0.75, the same
for the encoders, end to end too (published: a tenth of it for a pretrained network). Watched: the discriminator's accuracy, 0.5 at best.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.method import POSITIVE, Context, Method, Training
from losses import ModalityInvarianceLoss
from utils.errors import UserError
from utils.evaluation.clustering import kmeans

DISCRIMINATOR_WIDTH = 1024


class ReverseGradient(torch.autograd.Function):
    """GRL: identity forward, the gradient times -strength backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def check_clusters(context: Context) -> None:
    """Raise a UserError if there are fewer training pairs than clusters."""
    clusters, count = context.num_clusters, len(context.features[context.modalities[0]])
    if clusters > count:
        raise UserError(f"method.num_clusters: expected at most the number of training pairs, {count}, found {clusters}: lower it")


def source_labels(context: Context) -> Tensor:
    """Return the labels of the source domain (N,): those of the context, or clusters of the image modality's unit features."""
    if context.labels is not None:
        return context.labels
    check_clusters(context)
    rows = F.normalize(context.features[context.modalities[0]], dim=1)
    return kmeans(rows, context.num_clusters, seed=context.seed)[1]


class RevGrad(Method):
    """Unsupervised domain adaptation by gradient reversal."""

    training_defaults = Training(
        dim=256, batch_size=50, epochs=70, optimizer="sgd", learning_rate=1e-2, nesterov=True, weight_decay=5e-4
    )
    defaults = {"source": "labels", "transfer": True, "temperature": 0.22}
    limits = {"temperature": POSITIVE}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if context.settings["source"] not in ("labels", "pairs"):
            raise UserError(f"method.options.source must be 'labels' or 'pairs', found {context.settings['source']!r}")
        width = DISCRIMINATOR_WIDTH
        self.discriminator = nn.Sequential(
            nn.Linear(context.dim, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, 1)
        )
        self.classifier = nn.Linear(context.dim, context.num_clusters)
        self.pairs = ModalityInvarianceLoss(context.settings["temperature"])
        self.labels = source_labels(context) if context.settings["source"] == "labels" else None

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        first, second = (embeddings[name] for name in self.context.modalities)
        return self.source_loss(index, first, second) + self.domain_loss(first, second, strength(epoch, self.context.epochs))

    def source_loss(self, index: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return what shapes the source domain: the classifier's loss or that of the pairs."""
        if self.labels is None:
            return self.pairs(torch.stack([first, second]))
        loss = F.cross_entropy(self.classifier(first), self.labels[index])
        return loss + F.cross_entropy(self.classifier(second), self.labels[index]) if self.context.settings["transfer"] else loss

    def domain_loss(self, first: Tensor, second: Tensor, strength: float) -> Tensor:
        """Return the discriminator's loss on embeddings (B, L) of both domains; it trains them against it."""
        rows = ReverseGradient.apply(torch.cat([first, second]), strength)
        domain = torch.cat([torch.zeros(len(first)), torch.ones(len(second))]).to(rows)
        scores = self.discriminator(rows).squeeze(1)
        self.logged["discriminator_accuracy"] = ((scores > 0) == (domain > 0)).float().mean()
        return F.binary_cross_entropy_with_logits(scores, domain)


def strength(epoch: int, epochs: int) -> float:
    """Return lambda of an epoch (1-based): 0 in the first, near 1 from the middle on."""
    return 2 / (1 + math.exp(-10 * (epoch - 1) / max(epochs - 1, 1))) - 1
