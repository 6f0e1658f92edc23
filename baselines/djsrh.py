"""DJSRH: S. Su, Z. Zhong, C. Zhang, "Deep joint-semantics reconstructing hashing", ICCV 2019.

Codes h = tanh(sqrt(t) z) at epoch t = 1, 2, ... reconstruct a target S of frozen features, per batch of B pairs:

    S~ = beta Sx + (1 - beta) Sy,   S = mu [(1 - eta) S~ + (eta / B) S~ S~^T]
    L = l mse(cos(Hx, Hx), S) + mse(cos(Hx, Hy), S) + l mse(cos(Hy, Hy), S)

mu > 1 asks pairs for more than the largest cosine, so that the loss has a floor above 0. From the release: mu 1.5, eta 0.4, l 0.1,
batch 32, SGD 0.9, weight decay 5e-4.

Ours, as its text features are of no use here: beta 0.5; `similarity` rescaled (`baselines.hashing`); learning rate 1e-2 for both
modalities (published 1e-3 for the image backbone, which is frozen when heads are trained); 256 dimensions, ranked by h.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from baselines.hashing import GraphHashMethod, cosine
from baselines.method import SHARE


class DJSRH(GraphHashMethod):
    """Deep joint-semantics reconstructing hashing."""

    defaults = {"mu": 1.5, "eta": 0.4, "beta": 0.5, "intra": 0.1, "similarity": "rescaled"}
    limits = {"eta": SHARE, "beta": SHARE}

    def target(self, index: Tensor) -> Tensor:
        """Return S (B, B) of samples (B,)."""
        options = self.context.settings
        first, second = self.similarity(index)
        joint = options["beta"] * first + (1 - options["beta"]) * second
        return options["mu"] * ((1 - options["eta"]) * joint + options["eta"] / len(index) * joint @ joint.T)

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        first, second = self.codes(embeddings)
        target, intra = self.target(index), self.context.settings["intra"]
        inner = F.mse_loss(cosine(first, first), target) + F.mse_loss(cosine(second, second), target)
        return intra * inner + F.mse_loss(cosine(first, second), target)
