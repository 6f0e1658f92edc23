"""DGCPN: J. Yu, H. Zhou, Y. Zhan, D. Tao, "Deep graph-neighbor coherence preserving network", AAAI 2021.

Once for the training set, from similarities Ex, Ey in [0, 1] of frozen features (N, N):

    E = (1 - a1) Ex + a1 Ey;   P: the k largest entries of each row of E but its own, divided by their sum, 0 elsewhere
    S = 2 [(1 - a2) E + a2 scale P P^T] - 1                                                      graph-neighbour coherence

and per batch, with M = 1 - I and C_ab = cos(H_a, H_b):

    L(Hx, Hy) = mse(diag(C_xy), kappa) + dw sum_{xx, xy, yy} mse(M C, M S)
              + cw [mse(C_xy, C_xx) + mse(C_xy, C_yy) + mse(C_xx, C_yy) + mse(C_xy, C_xy^T)]
    half-real, half-binary: L(Hx, Hy) + L(Hx, sign Hy) + L(sign Hx, Hy), no gradient through signs.

From the release: a2 0.3, kappa 1.5, dw = cw = 1, k = 0.4 N (its number of neighbours counts those removed), SGD 0.9, rate 5e-3, weight
decay 5e-4, batch 32, h = tanh z. Ours: a1 0.5 (the release's 0.01 says that text was of no use), scale = 2 k (`scale` 2), S clipped to
[-1, 1], similarities rescaled (`baselines.hashing`) so that E lies in [0, 1]; the three terms are summed where the release steps thrice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.hashing import FeatureSimilarity, HashMethod, cosine
from baselines.method import SHARE, Context, Training


def neighbour_distribution(similarity: Tensor, count: int) -> Tensor:
    """Return P (N, N): of each row of a similarity (N, N) > 0 its `count` largest entries but its own, as shares of their sum."""
    others = similarity.clone().fill_diagonal_(-torch.inf)
    values, columns = others.topk(count, dim=1)
    values = values.clamp_min(torch.finfo(values.dtype).tiny)  # a similarity of 0 is a neighbour, too
    return torch.zeros_like(similarity).scatter_(1, columns, values / values.sum(dim=1, keepdim=True))


class DGCPN(HashMethod):
    """Deep graph-neighbour coherence preserving network."""

    training_defaults = Training(dim=256, batch_size=32, epochs=70, optimizer="sgd", learning_rate=5e-3, weight_decay=5e-4)
    defaults = {
        "second": 0.5, "coherence": 0.3, "neighbours": 0.4, "kappa": 1.5, "graph_weight": 1.0, "consistency_weight": 1.0,
        "similarity": "rescaled", "scale": 2.0,
    }
    limits = {
        "second": SHARE, "coherence": SHARE,
        "neighbours": {"above": 0, "max": 1, "doc": "a share of the training pairs: 40 neighbours of 1,000 pairs are 0.04"},
    }

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        options = context.settings
        index = torch.arange(len(context.features[context.modalities[0]]), device=context.device)
        measures = [FeatureSimilarity(context.features[name], options["similarity"]) for name in context.modalities]
        similarity = measures[0](index).lerp_(measures[1](index), options["second"]).add_(1).div_(2)
        count = min(max(round(options["neighbours"] * len(index)), 1), len(index) - 1)
        neighbours = neighbour_distribution(similarity, count)
        coherence = torch.lerp(similarity, options["scale"] * count * neighbours @ neighbours.T, options["coherence"])
        self.target = (2 * coherence - 1).clamp(-1, 1)  # S (N, N)

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        first, second = self.codes(embeddings)
        target = self.target[index][:, index]
        signs = first.detach().sign(), second.detach().sign()
        return self.loss(first, second, target) + self.loss(first, signs[1], target) + self.loss(signs[0], second, target)

    def loss(self, first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        """Return L of codes (B, L) of both modalities and the target (B, B)."""
        options = self.context.settings
        xx, xy, yy = cosine(first, first), cosine(first, second), cosine(second, second)
        others = 1 - torch.eye(len(target), dtype=target.dtype, device=target.device)
        pairs = (xy.diagonal() - options["kappa"]).square().mean()
        graph = sum(F.mse_loss(others * found, others * target) for found in (xx, xy, yy))
        consistency = F.mse_loss(xy, xx) + F.mse_loss(xy, yy) + F.mse_loss(xx, yy) + F.mse_loss(xy, xy.T)
        return pairs + options["graph_weight"] * graph + options["consistency_weight"] * consistency
