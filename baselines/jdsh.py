"""JDSH: S. Liu et al., "Joint-modal distribution-based similarity hashing", SIGIR 2020.

Codes h = tanh(sqrt(t) z) at epoch t = 1, 2, ...; per batch of B pairs, with hat(.) of rows of unit norm:

    S0 = a Sx + b Sy + c (Sh + Sh^T) / 2,   Sh = hat(Sx) hat(Sy)^T,   a + b + c = 1
    distribution-based weighting, thresholds t_l < t_r:
      S0 < t_l:  S0 <- (1 + L1 exp(-(S0 - min))) S0        S0 > t_r:  S0 <- (1 + L2 exp(S0 - max)) S0
    S = mu S0
    L = g [mse(cos(Hx, Hx), S) + mse(cos(Hy, Hy), S)] + 2 mse(cos(Hx, Hy), S) - (1 / B) sum_i cos(hx_i, hy_i)

From the release: (a, b, c) = (0.4, 0.3, 0.3), mu 1.4, g 0.1, (L1, L2) = (0.1, 0.2), batch 32, SGD 0.9, rate 1e-2, weight decay 5e-4.

Ours: its constants t_l, t_r, min, max belong to AlexNet and bags of words; here they are percentiles of S0 off the diagonal (5, 95, 0.1,
99.9: `left_share` ...) in `batches` random batches of the training set. `similarity` rescaled (`baselines.hashing`); 256 dimensions;
ranked by h.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.hashing import GraphHashMethod, cosine
from baselines.method import COUNT, SHARE, Context
from utils.engine.seed import generator_for
from utils.errors import UserError


class JDSH(GraphHashMethod):
    """Joint-modal distribution-based similarity hashing."""

    defaults = {
        "first": 0.4, "second": 0.3, "joint": 0.3, "mu": 1.4, "intra": 0.1, "left": 0.1, "right": 0.2, "similarity": "rescaled",
        "batches": 50, "left_share": 0.05, "right_share": 0.95, "low_share": 0.001, "high_share": 0.999,
    }
    limits = {"batches": COUNT, **dict.fromkeys(("left_share", "right_share", "low_share", "high_share"), SHARE)}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        options, generator, rows = context.settings, generator_for(context.seed, "jdsh"), next(iter(context.features.values()))
        if options["left_share"] >= options["right_share"]:
            raise UserError(f"method.options.left_share must be below right_share, {options['right_share']}, got {options['left_share']}")
        if not math.isclose(total := options["first"] + options["second"] + options["joint"], 1):
            raise UserError(f"method.options.first, second and joint must sum to 1, got {total:g}")
        size = min(context.batch_size, len(rows))
        others = ~torch.eye(size, dtype=torch.bool)
        batches = (torch.randperm(len(rows), generator=generator)[:size].to(rows.device) for _ in range(options["batches"]))
        found = torch.cat([self.joint(index).cpu()[others] for index in batches])
        shares = [options[f"{name}_share"] for name in ("left", "right", "low", "high")]
        self.thresholds = tuple(np.quantile(found.numpy(), shares).tolist())

    def joint(self, index: Tensor) -> Tensor:
        """Return S0 (B, B) of samples (B,) before the weighting."""
        options = self.context.settings
        first, second = self.similarity(index)
        both = cosine(first, second)
        return options["first"] * first + options["second"] * second + options["joint"] * (both + both.T) / 2

    def target(self, index: Tensor) -> Tensor:
        """Return S (B, B) of samples (B,)."""
        options, joint = self.context.settings, self.joint(index)
        left, right, low, high = self.thresholds
        weight = torch.ones_like(joint)
        weight = torch.where(joint < left, 1 + options["left"] * torch.exp(-(joint - low)), weight)
        weight = torch.where(joint > right, 1 + options["right"] * torch.exp(joint - high), weight)
        return options["mu"] * weight * joint

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        first, second = self.codes(embeddings)
        target, across = self.target(index), cosine(first, second)
        inner = F.mse_loss(cosine(first, first), target) + F.mse_loss(cosine(second, second), target)
        return self.context.settings["intra"] * inner + 2 * F.mse_loss(across, target) - across.diagonal().mean()
