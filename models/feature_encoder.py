"""Encoder of stored features: an MLP to the common space, for comparisons in which only what is trained on them differs."""

from torch import Tensor, nn


class FeatureMLP(nn.Module):
    """Standardisation, one hidden layer, and the same projection as the other encoders have.

    Args:
        width: d, length of the feature vectors; hidden: width of the hidden layer; embedding_dim: D of the common space.
    """

    def __init__(self, width: int, hidden: int, embedding_dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.BatchNorm1d(width, affine=False), nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(hidden, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, d) float32 to embeddings (B, D), not normalised."""
        return self.head(self.backbone(features))
