"""Classifier heads: the bias-free linear g of step 1 and the MLP h of step 2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearClassifier(nn.Module):
    """Bias-free linear classifier g on unit-norm embeddings; its rows start at k-means centres (Sec. III-C).

    Unit-norm embeddings (D) and rows (K) give cosines in [-1, 1], whose softmax over K is nearly uniform; the factor `scale` on the
    logits is our addition and sets how sharp the first prediction is.
    """

    def __init__(self, embedding_dim: int, num_clusters: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_clusters, embedding_dim))
        nn.init.normal_(self.weight, std=embedding_dim**-0.5)
        self.scale = scale

    @torch.no_grad()
    def start_from(self, centroids: Tensor) -> None:
        """Copy k-means centroids (K, D) into the rows, each scaled to unit norm; another shape is a ValueError."""
        if centroids.shape != self.weight.shape:
            raise ValueError(f"centroids must be {tuple(self.weight.shape)}, found {tuple(centroids.shape)}")
        self.weight.copy_(F.normalize(centroids.to(self.weight), dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map unit-norm embeddings (B, D) to logits (B, K)."""
        return self.scale * F.linear(embeddings, self.weight)

    def classify(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (B, D) of any norm to logits (B, K)."""
        return self(F.normalize(embeddings, dim=1))


class MLPClassifier(nn.Sequential):
    """MLP head h of step 2: embeddings (B, D), any norm, to logits (B, K); the hidden layer has 128 units in the authors' release."""

    def __init__(self, embedding_dim: int, hidden_dim: int, num_clusters: int) -> None:
        layers = nn.Linear(embedding_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_clusters)
        super().__init__(*layers)

    def classify(self, embeddings: Tensor) -> Tensor:
        """As `forward`: embeddings (B, D) of any norm to logits (B, K)."""
        return self(embeddings)
