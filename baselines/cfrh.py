"""CFRH: M. Li, Y. Li, M. Ge, L. Ma, "CLIP-based fusion-modal reconstructing hashing", Int. J. Multimedia Information Retrieval 12, 2023.

A RECONSTRUCTION: the public repository lacks model, losses and settings. From the abstract, the figure of the pipeline and the names of
its settings, an autoencoder of each modality, z = Enc(u), h = tanh(sqrt(t) z), rec = Dec(h), learns a fused similarity of the batch:

    S = mu [beta Sx + gamma Sy + eta (Sx Sy^T + Sy Sx^T) / (2 B)]
    L = lambda_ae [|u - rec_x|^2 + |w - rec_y|^2] + mse(cos(Hx, Hy), S) + intra [mse(cos(Hx, Hx), S) + mse(cos(Hy, Hy), S)]

All values are ours: beta, gamma, eta 0.4, 0.3, 0.3, mu 1.5, intra 0.1, lambda_ae 0.01, optimiser and schedule of alpha as JDSH, from
which the repository descends; |.|^2 is the mean over samples and columns, standardised ones; its setting `topk` is left out.
Its image branch takes the frozen features that every method here shares: with CLIP's weights it would read stronger 2D features.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from baselines.dccae import inputs_and_decoders
from baselines.hashing import GraphHashMethod, cosine
from baselines.method import COUNT, Context


class CFRH(GraphHashMethod):
    """CLIP-based fusion-modal reconstructing hashing, without CLIP."""

    defaults = {
        "first": 0.4, "second": 0.3, "fused": 0.3, "mu": 1.5, "intra": 0.1, "reconstruction": 0.01, "similarity": "rescaled",
        "hidden": 1024,
    }
    limits = {"hidden": COUNT}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.inputs, self.decoders = inputs_and_decoders(context)

    def target(self, index: Tensor) -> Tensor:
        """Return S (B, B) of samples (B,)."""
        options = self.context.settings
        first, second = self.similarity(index)
        fused = first @ second.T
        fused = (fused + fused.T) / (2 * len(index))
        return options["mu"] * (options["first"] * first + options["second"] * second + options["fused"] * fused)

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        options, target = self.context.settings, self.target(index)
        codes = dict(zip(self.context.modalities, self.codes(embeddings), strict=True))
        first, second = codes.values()
        inner = F.mse_loss(cosine(first, first), target) + F.mse_loss(cosine(second, second), target)
        errors = sum(F.mse_loss(self.decoders[name](code), self.inputs[name][index]) for name, code in codes.items())
        return options["reconstruction"] * errors + F.mse_loss(cosine(first, second), target) + options["intra"] * inner
