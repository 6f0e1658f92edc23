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
        precision: of the trunk's products in training, "float32" or "bfloat16" (weights, statistics and the projection stay in
            float32, and so does all of it in eval mode).
    """

    def __init__(self, embedding_dim: int, stages: int = 4, precision: str = "float32") -> None:
        super().__init__()
        self.precision = precision
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
        images = images.contiguous(memory_format=torch.channels_last)
        if self.precision == "float32" or not self.training:
            return self.head(self.backbone(images))
        with torch.autocast(images.device.type, torch.bfloat16):
            features = self.backbone(images)
        return self.head(features.float())
