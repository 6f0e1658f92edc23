"""Point-cloud encoder: DGCNN (Wang et al., TOG 2019) with a linear projection to the common space."""

import torch
from torch import Tensor, nn

from models.kernels.batch_norm import normalise_and_activate
from models.kernels.edge_conv import SLOPE, EdgeConv
from models.kernels.linear import linear_of_parts

EDGE_CHANNELS = (3, 64, 64, 128, 256)


class DGCNN(nn.Module):
    """Four EdgeConv layers on dynamic k-NN graphs, a point-wise convolution, max and average pool, and a projection.

    Args:
        embedding_dim: D, dimension of the common space.
        k: neighbours per point, the point itself included; 20 for 1,024 points in DGCNN's paper.
        width: channels of the point-wise convolution before pooling (conv5); 1024 as published. Smaller widths are for
            CPU configurations and cannot take conv5 of the public checkpoint.
        edge_conv: "fused", "triton" or "reference", see `models.kernels.edge_conv`.
    """

    def __init__(self, embedding_dim: int, k: int = 20, width: int = 1024, edge_conv: str = "fused") -> None:
        super().__init__()
        pairs = zip(EDGE_CHANNELS[:-1], EDGE_CHANNELS[1:])
        self.edge_convs = nn.ModuleList(EdgeConv(c_in, c_out, k, edge_conv) for c_in, c_out in pairs)
        self.conv5 = nn.Conv1d(sum(EDGE_CHANNELS[1:]), width, kernel_size=1, bias=False)
        self.bn5 = nn.BatchNorm1d(width)
        self.head = nn.Sequential(nn.Linear(2 * width, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))

    def forward(self, points: Tensor) -> Tensor:
        """Map clouds (B, P, 3) float to embeddings (B, D), not normalised; P >= k."""
        layers = []
        features = points
        for edge_conv in self.edge_convs:
            features = edge_conv(features)  # (B, P, C)
            layers.append(features.flatten(0, 1))
        features = linear_of_parts(layers, self.conv5.weight.squeeze(2))  # (B * P, width)
        features = normalise_and_activate(features, self.bn5, SLOPE).view(len(points), -1, self.conv5.out_channels)  # (B, P, width)
        pooled = torch.cat([features.max(dim=1).values, features.mean(dim=1)], dim=1)  # (B, 2 * width)
        return self.head(pooled)
