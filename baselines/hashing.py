"""What the hashing methods share: relaxed codes, cosine matrices and the similarity of frozen features."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.method import Context, Method, Training
from utils.errors import UserError

RANGE_ROWS = 2000  # that the range of similarities is measured on


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Return cosines (B, C) of rows (B, L) and (C, L); a zero row has cosine 0 to everything."""
    return F.normalize(left, dim=1) @ F.normalize(right, dim=1).T


class FeatureSimilarity:
    """Cosines of frozen features, mapped to [-1, 1] with 1 on the diagonal, by the sample numbers of a batch.

    The papers map a cosine s to 2 s - 1, which takes features without negative entries for granted; those of other features leave
    [-1, 1], and all cosines of pooled activations lie close together.

    Args:
        features: (N, d) float.
        rule: "rescaled", ours: smallest and largest cosine of two training samples become -1 and 1; "published": 2 s - 1.
    """

    def __init__(self, features: Tensor, rule: str) -> None:
        if rule not in ("rescaled", "published"):
            raise UserError(f"method.options.similarity must be 'rescaled' or 'published', found {rule!r}")
        self.rows = F.normalize(features, dim=1)
        self.low, self.high = self._range() if rule == "rescaled" else (0.0, 1.0)

    def _range(self) -> tuple[float, float]:
        count = min(len(self.rows), RANGE_ROWS)
        rows = self.rows[torch.linspace(0, len(self.rows) - 1, count).long()]
        others = (rows @ rows.T)[~torch.eye(count, dtype=torch.bool, device=rows.device)]
        low, high = float(others.min()), float(others.max())
        return (low, high) if high > low else (low - 1, low + 1)  # all alike: 0 everywhere

    def __call__(self, index: Tensor) -> Tensor:
        """Return the similarities (B, B) of samples (B,)."""
        rows = self.rows[index]
        scaled = (2 * (rows @ rows.T - self.low) / (self.high - self.low) - 1).clamp(-1, 1)
        return scaled.fill_diagonal_(1)


class HashMethod(Method):
    """A method whose code is tanh(alpha z), of embeddings z; its sign is the binary code. alpha is 1 where a subclass does not set it."""

    alpha: Tensor

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.register_buffer("alpha", torch.ones((), device=context.device))

    def represent(self, name: str, embeddings: Tensor) -> Tensor:
        return torch.tanh(self.alpha * embeddings)

    def codes(self, embeddings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the relaxed codes (B, L) of both modalities."""
        first, second = self.context.modalities
        return self.represent(first, embeddings[first]), self.represent(second, embeddings[second])


class GraphHashMethod(HashMethod):
    """A hash method that learns a target similarity of frozen features, computed per batch.

    alpha = sqrt(epoch) drives the code towards its sign; the last epoch's alpha is used for retrieval.
    """

    training_defaults = Training(dim=256, batch_size=32, epochs=70, optimizer="sgd", learning_rate=1e-2, weight_decay=5e-4)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        rule = context.settings["similarity"]
        self.similarities = [FeatureSimilarity(context.features[name], rule) for name in context.modalities]

    def start_epoch(self, epoch: int, embeddings: Callable[[], dict[str, Tensor]]) -> None:
        self.alpha.fill_(epoch**0.5)

    def similarity(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return Sx and Sy (B, B) of samples (B,)."""
        first, second = self.similarities
        return first(index), second(index)
