"""Image encoder: torchvision's ResNet18 with a linear projection to the common space."""

import torch
import torchvision
from torch import Tensor, nn

from models.kernels.small_maps import use_products


class ResNet18(nn.Module):
    """ResNet18 trunk, global average pool, Linear and BatchNorm1d to the common space.

    Gray images come as three equal channels, so that the ImageNet stem serves both. The trunk starts random; weights are
    loaded by `models.build.load_pretrained` alone.

    Args:
        embedding_dim: D, dimension of the common space.
        stages: residual stages kept, 1 to 4. Four are the published network; three are for CPU configurations with
            32-pixel images, where the last stage would see a 1 x 1 map at half of the cost.
    """

    def __init__(self, embedding_dim: int, stages: int = 4) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18(weights=None)
        feature_dim = 64 * 2 ** (stages - 1)
        for dropped in range(stages + 1, 5):
            setattr(self.backbone, f"layer{dropped}", nn.Identity())
        self.backbone.fc = nn.Identity()
        self.backbone.to(memory_format=torch.channels_last)
        use_products(self.backbone)
        self.head = nn.Sequential(nn.Linear(feature_dim, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) float, ImageNet-normalised, to embeddings (B, D), not normalised."""
        return self.head(self.backbone(images.contiguous(memory_format=torch.channels_last)))
