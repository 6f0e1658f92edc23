"""DCCA: G. Andrew, R. Arora, J. Bilmes, K. Livescu, "Deep canonical correlation analysis", ICML 2013.

Of the outputs A, B (m, L) of a batch of m pairs, centred,

    S11 = A^T A / (m - 1) + r I,  S22 alike,  S12 = A^T B / (m - 1);   T = S11^-1/2 S12 S22^-1/2 = E D F^T
    maximise corr(A, B) = tr D                                                     the sum of all L canonical correlations
    d corr / dA = (2 A G11 + B G12^T) / (m - 1),  G12 = S11^-1/2 E F^T S22^-1/2,  G11 = -1/2 S11^-1/2 E D E^T S11^-1/2

and after training a linear CCA of all training outputs, which makes the two comparable: corr does not change under invertible maps.
The gradient is this closed form, in float64; differentiating the decomposition divides by gaps of eigenvalues.

Published: full batches, L-BFGS, layer-wise pretraining; ports: r 1e-3, Adam 1e-3, batch 800. Ours: batches of 1,024 (N if that is less),
64 dimensions, Adam 1e-3, 100 epochs; the encoder is the MLP that every method here trains. When L nears m the statistic is m - 1 for noise,
too: with fewer than 4 L pairs in a batch a warning says so.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from baselines.cca import load_model, ridge_cca
from baselines.method import POSITIVE, Context, Method, Training


class TotalCorrelation(torch.autograd.Function):
    """corr(A, B) of outputs (m, L) with ridge r, a float64 scalar; with the closed-form gradient."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, ridge: float) -> Tensor:
        a, b = (rows.double() - rows.double().mean(dim=0) for rows in (first, second))
        scale = len(a) - 1
        root_a, root_b = (inverse_root(rows.T @ rows / scale, ridge) for rows in (a, b))
        left, correlations, right = torch.linalg.svd(root_a @ (a.T @ b / scale) @ root_b)
        cross = root_a @ left @ right @ root_b
        own_a = -0.5 * root_a @ (left * correlations) @ left.T @ root_a
        own_b = -0.5 * root_b @ (right.T * correlations) @ right @ root_b
        ctx.save_for_backward((2 * a @ own_a + b @ cross.T) / scale, (2 * b @ own_b + a @ cross) / scale)
        ctx.types = first.dtype, second.dtype
        return correlations.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        first, second = (gradient * saved for saved in ctx.saved_tensors)
        return first.to(ctx.types[0]), second.to(ctx.types[1]), None


def inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """Return (S + r I)^-1/2 of a covariance S (L, L)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors / (values.clamp_min(0) + ridge).sqrt()) @ vectors.T


class DCCA(Method):
    """Deep CCA."""

    training_defaults = Training(dim=64, batch_size=1024, epochs=100, learning_rate=1e-3)
    defaults = {"ridge": 1e-3}
    limits = {"ridge": POSITIVE}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        load_model("RidgeCCA")  # if it is missing, that is said before the training
        if context.batch_size < 4 * context.dim:
            warnings.warn(
                f"DCCA with batches of {context.batch_size} pairs and {context.dim} dimensions: with fewer than four pairs per "
                "dimension even noise correlates, use larger batches or a smaller width", stacklevel=2,
            )
        for position, _ in enumerate(context.modalities):
            self.register_buffer(f"mean_{position}", torch.zeros(context.dim, dtype=torch.float64, device=context.device))
            identity = torch.eye(context.dim, dtype=torch.float64, device=context.device)
            self.register_buffer(f"map_{position}", identity)

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        first, second = (embeddings[name] for name in self.context.modalities)
        return -TotalCorrelation.apply(first, second, self.context.settings["ridge"])

    @torch.no_grad()
    def finish(self, embeddings: Callable[[], dict[str, Tensor]]) -> None:
        outputs = embeddings()
        views = [outputs[name].double().cpu().numpy() for name in self.context.modalities]
        model = ridge_cca(views, self.context.dim, self.context.settings["ridge"])
        for position, (mean, weights) in enumerate(zip(model.means_, model.weights_, strict=True)):
            getattr(self, f"mean_{position}").copy_(torch.as_tensor(mean))
            linear = getattr(self, f"map_{position}").zero_()
            linear[:, : weights.shape[1]] = torch.as_tensor(weights)

    def represent(self, name: str, embeddings: Tensor) -> Tensor:
        position = self.context.modalities.index(name)
        mean, linear = getattr(self, f"mean_{position}"), getattr(self, f"map_{position}")
        return ((embeddings.double() - mean) @ linear).to(embeddings.dtype)
