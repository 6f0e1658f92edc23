"""DCCAE: W. Wang, R. Arora, K. Livescu, J. Bilmes, "On deep multi-view representation learning", ICML 2015.

DCCA with decoders g_X, g_Y that reconstruct the inputs u_i, w_i from the outputs a_i, b_i, over a batch of m pairs:

    L = -corr(A, B) + lam (1/m) sum_i [|u_i - g_X(a_i)|^2 + |w_i - g_Y(b_i)|^2]

Published: lam chosen on labelled validation data over powers of ten, decoders of three layers that mirror the encoders, other batches for
the second term. Ours: the input is the frozen feature, each column scaled to mean 0 and variance 1, so that lam (1e-3) weighs the same for
both modalities; decoders have one layer of `hidden` 1,024; one batch for both terms; the rest as `baselines.dcca`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from baselines.dcca import DCCA
from baselines.method import COUNT, Context


class DCCAE(DCCA):
    """Deep canonically correlated autoencoders."""

    defaults = {"ridge": 1e-3, "reconstruction": 1e-3, "hidden": 1024}
    limits = {**DCCA.limits, "hidden": COUNT}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.inputs, self.decoders = inputs_and_decoders(context)

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        errors = [
            (self.inputs[name][index] - self.decoders[name](embeddings[name])).square().sum(dim=1).mean()
            for name in self.context.modalities
        ]
        correlation = super().forward(index, embeddings, epoch)
        self.logged |= {"correlation": -correlation, "squared_error": sum(errors)}  # both terms, which one number would hide
        return correlation + self.context.settings["reconstruction"] * sum(errors)


def inputs_and_decoders(context: Context) -> tuple[dict[str, Tensor], nn.ModuleDict]:
    """Return modality -> standardised features (N, d), and modality -> MLP with one layer of `hidden` that maps codes (B, L) to them."""
    inputs, hidden = standardised(context), context.settings["hidden"]
    make = lambda rows: nn.Sequential(nn.Linear(context.dim, hidden), nn.ReLU(), nn.Linear(hidden, rows.shape[1]))
    return inputs, nn.ModuleDict({name: make(rows) for name, rows in inputs.items()})


def standardised(context: Context) -> dict[str, Tensor]:
    """Return modality -> features (N, d) with columns of mean 0 and variance 1; constant columns become 0."""
    found = {}
    for name in context.modalities:
        rows = context.features[name]
        deviation = rows.std(dim=0, correction=0)
        found[name] = (rows - rows.mean(dim=0)) / torch.where(deviation > 1e-6, deviation, torch.inf)
    return found
