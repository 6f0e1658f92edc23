"""UCCH: P. Hu et al., "Unsupervised contrastive cross-modal hashing", IEEE TPAMI 45(3), 2023.

Unit codes h = hat(tanh z) of both modalities, a memory row v_i per pair and its key k_i = sign(v_i) / sqrt(L):

    P(i|h) = exp(<h, k_i> / t) / (exp(<h, k_i> / t) + sum_j exp(<h, k_rj> / t)),  r_1..r_Kn uniform
    Lc = -(1/B) sum_i [log P(i|hx_i) + log P(i|hy_i)];   after the step v_i <- hat(delta v_i + (1 - delta) (hx_i + hy_i) / 2)
    M = Hx Hy^T;  S_ij = M_ij if M_ij >= M_ii - m else M_ij - eps;   Lr = (1/B) sum_i [m + k log sum_j exp(S_ij / k) - S_ii]
    L = beta Lc + (1 - beta) (Lr of M + Lr of M^T)

From paper and release: delta 0.4, t 0.9 (soft on purpose), Kn 4096, m 0.2, beta 0.9, k = eps = 1, Adam 1e-4 with weight decay 1e-6, norm
clip 1, batch 256; memory starts as random signs; in the first epoch the keys are sign(hx + hy) / sqrt(L) of the batch instead.

Ours: at most N - 1 negatives, drawn once per batch for all its rows, the own key left out where it is drawn; 70 epochs as the other hash
methods (published 20); 256 dimensions, ranked by h; the MLP that every method here trains in place of the published heads of 8,192.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.hashing import HashMethod
from baselines.method import COUNT, POSITIVE, SHARE, Context, Limits, Training
from utils.engine.seed import generator_for

DEFAULTS: Mapping[str, Any] = {
    "beta": 0.9, "memory": 0.4, "temperature": 0.9, "negatives": 4096, "margin": 0.2, "smoothing": 1.0, "shift": 1.0,
}
LIMITS: Limits = {"beta": SHARE, "memory": SHARE, "temperature": POSITIVE, "negatives": COUNT, "smoothing": POSITIVE}


class UnifiedContrast:
    """Lc, Lr and the memory (N, L) of UCCH; `settings` as `DEFAULTS`."""

    def __init__(self, memory: Tensor, settings: Mapping[str, Any]) -> None:
        self.memory, self.settings = memory, settings

    def contrastive(self, index: Tensor, codes: tuple[Tensor, Tensor], warm_up: bool) -> Tensor:
        """Return Lc of unit codes (B, L) of samples (B,), against the batch's own keys in the warm-up, else the memory's."""
        if warm_up:
            keys, drawn = (codes[0] + codes[1]).detach(), index
        else:
            count = min(self.settings["negatives"], len(self.memory) - 1)
            drawn = torch.cat([index, torch.randint(len(self.memory), (count,), device=index.device)])
            keys = self.memory[drawn]
        keys = signs(keys) / math.sqrt(keys.shape[1])  # (B + Kn, L), the first B those of the batch itself
        own = torch.arange(len(index), device=index.device)
        excluded = drawn == index[:, None]  # (B, B + Kn) a sample's own key
        if not warm_up:
            excluded[:, : len(index)] = True  # what others of the batch have is no draw
        excluded[own, own] = False
        logits = [(code @ keys.T / self.settings["temperature"]).masked_fill(excluded, -torch.inf) for code in codes]
        return sum(F.cross_entropy(values, own) for values in logits)

    def ranking(self, similarity: Tensor) -> Tensor:
        """Return Lr of one direction from M (B, B)."""
        options, smoothing = self.settings, self.settings["smoothing"]
        own = similarity.diagonal()
        shifted = torch.where(similarity >= (own - options["margin"])[:, None], similarity, similarity - options["shift"])
        return (options["margin"] + smoothing * torch.logsumexp(shifted / smoothing, dim=1) - own).mean()

    def loss(self, index: Tensor, codes: tuple[Tensor, Tensor], warm_up: bool) -> Tensor:
        """Return L of unit codes (B, L) of both modalities."""
        similarity = codes[0] @ codes[1].T
        ranking = self.ranking(similarity) + self.ranking(similarity.T)
        return self.settings["beta"] * self.contrastive(index, codes, warm_up) + (1 - self.settings["beta"]) * ranking

    @torch.no_grad()
    def update(self, index: Tensor, codes: tuple[Tensor, Tensor]) -> None:
        """Move the memory rows of samples (B,) towards their codes."""
        delta = self.settings["memory"]
        self.memory[index] = F.normalize(delta * self.memory[index] + (1 - delta) * (codes[0] + codes[1]) / 2, dim=1)


def signs(values: Tensor) -> Tensor:
    """Signs of values, 1 for 0, so that every row has the same norm."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def random_memory(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return memory rows (N, L) of random signs and unit norm."""
    return signs(torch.randn(rows, dim, generator=generator)) / math.sqrt(dim)


class UCCH(HashMethod):
    """Unsupervised contrastive cross-modal hashing."""

    training_defaults = Training(dim=256, batch_size=256, epochs=70, learning_rate=1e-4, weight_decay=1e-6, clip=1.0)
    defaults = DEFAULTS
    limits = LIMITS
    memory: Tensor

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        rows = len(context.features[context.modalities[0]])
        memory = random_memory(rows, context.dim, generator_for(context.seed, "ucch memory"))
        self.register_buffer("memory", memory.to(context.device))

    def codes(self, embeddings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, second = super().codes(embeddings)
        return F.normalize(first, dim=1), F.normalize(second, dim=1)

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        return UnifiedContrast(self.memory, self.context.settings).loss(index, self.codes(embeddings), warm_up=epoch == 1)

    def after_step(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> None:
        UnifiedContrast(self.memory, self.context.settings).update(index, self.codes(embeddings))
