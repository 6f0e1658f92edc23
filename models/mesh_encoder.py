"""Mesh encoder: MeshNet (Feng et al., AAAI 2019) with a linear projection to the common space.

A mesh is one array: row f of `faces` (F, 18) is centre 3, the vectors from the centre to the three corners 9, normal 3,
and the indices of the faces across the edges (1,2), (2,3), (3,1), stored as float (exact below 2^24); a face without a
neighbour there names itself. `datasets.mesh_faces` makes such arrays. Submodules are named as in the public checkpoint.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

FACE_CHANNELS = 18
STRUCTURAL = 64 + 64 + 3  # channels of rotate convolution, kernel correlation and normal


class MeshNet(nn.Module):
    """Spatial and structural descriptors of every face, two mesh convolutions, maximum over the faces, and a projection.

    Meshes of a batch are brought to one size by repeating faces, as published: the maximum is unaffected, the batch
    statistics of training see the repeated faces more than once.

    Args:
        embedding_dim: D, dimension of the common space.
        width: channels of the fused and of the pooled feature; 1024 as published. Smaller widths are for CPU
            configurations and leave the last two layers of the public checkpoint out.
        mask_ratio: share of the faces hidden from the maximum in training, a fresh draw from torch's global generator
            for every batch; 0.95 as published. Evaluation takes the maximum over all faces.
        conv_width: channels after the first mesh convolution, half of those after the second; 256 as published. The
            public checkpoint needs 256.
    Raises:
        ValueError: for sizes below 1 or a mask_ratio outside [0, 1).
    """

    def __init__(self, embedding_dim: int, width: int = 1024, mask_ratio: float = 0.95, conv_width: int = 256) -> None:
        super().__init__()
        if min(embedding_dim, width, conv_width) < 1 or not 0 <= mask_ratio < 1:
            raise ValueError("MeshNet needs embedding_dim, width, conv_width >= 1 and 0 <= mask_ratio < 1, found "
                             f"{embedding_dim}, {width}, {conv_width}, {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.spatial_descriptor = nn.Sequential(OrderedDict(spatial_mlp=_mlp(3, 64, 64)))
        self.structural_descriptor = StructuralDescriptor()
        first, second = conv_width, 2 * conv_width
        self.mesh_conv1 = MeshConvolution(64, STRUCTURAL, first, first)
        self.mesh_conv2 = MeshConvolution(first, first, second, second)
        self.fusion_mlp = _mlp(second + second, width)
        self.concat_mlp = _mlp(first + second + width, width)
        self.head = nn.Sequential(nn.Linear(width, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))

    def forward(self, faces: Tensor) -> Tensor:
        """Map meshes (B, F, 18) float32 to embeddings (B, D), not normalised.

        Raises:
            ValueError: on another shape, or a type that cannot hold face indices.
        """
        if faces.dim() != 3 or faces.shape[1] < 1 or faces.shape[2] != FACE_CHANNELS:
            raise ValueError(f"MeshNet expects faces of shape (B, F >= 1, {FACE_CHANNELS}), found {tuple(faces.shape)}")
        if faces.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"MeshNet expects float32 faces, found {faces.dtype}: it cannot hold the neighbour indices")
        neighbours = faces[:, :, 15:].long()  # (B, F, 3)
        centres, corners, normals = faces[:, :, :15].transpose(1, 2).split((3, 9, 3), dim=1)  # (B, 3 | 9 | 3, F)
        spatial0 = self.spatial_descriptor(centres)
        structural = self.structural_descriptor(corners, normals, neighbours)
        spatial1, structural = self.mesh_conv1(spatial0, structural, neighbours)
        spatial2, structural = self.mesh_conv2(spatial1, structural, neighbours)
        fused = self.fusion_mlp(torch.cat([spatial2, structural], dim=1))
        features = self.concat_mlp(torch.cat([spatial1, spatial2, fused], dim=1))  # (B, width, F)
        return self.head(self._visible(features).amax(dim=2))

    def _visible(self, features: Tensor) -> Tensor:
        if not self.training or self.mask_ratio == 0:
            return features
        count = features.shape[2]
        kept = max(1, round(count * (1 - self.mask_ratio)))
        return features[:, :, torch.randperm(count, device=features.device)[:kept]]


class StructuralDescriptor(nn.Module):
    """Shape of every face and of its neighbourhood: rotate convolution, kernel correlation and normal, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.FRC = FaceRotateConvolution()
        self.FKC = FaceKernelCorrelation()
        self.structural_mlp = _mlp(STRUCTURAL, STRUCTURAL, STRUCTURAL)

    def forward(self, corners: Tensor, normals: Tensor, neighbours: Tensor) -> Tensor:
        """Map corner vectors (B, 9, F), normals (B, 3, F) and neighbours (B, F, 3) int64 to (B, 131, F)."""
        return self.structural_mlp(torch.cat([self.FRC(corners), self.FKC(normals, neighbours), normals], dim=1))


class FaceRotateConvolution(nn.Module):
    """One MLP over the three ordered corner pairs of a face, averaged: the starting corner does not matter.

    The pairs go through the MLP together. The published code sends them one after the other, so that each BatchNorm has
    three sets of batch statistics and training does depend on the starting corner; in evaluation both are the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rotate_mlp = _mlp(6, 32, 32)
        self.fusion_mlp = _mlp(32, 64, 64)

    def forward(self, corners: Tensor) -> Tensor:
        """Map corner vectors (B, 9, F) to (B, 64, F)."""
        vectors = corners.unflatten(1, (3, 3))  # (B, corner, xyz, F)
        pairs = torch.cat([vectors, vectors.roll(-1, dims=1)], dim=2)  # (B, pair, 6, F)
        rotated = self.rotate_mlp(pairs.transpose(1, 2).flatten(2))  # (B, 32, 3 * F)
        return self.fusion_mlp(rotated.unflatten(2, (3, -1)).mean(dim=2))


class FaceKernelCorrelation(nn.Module):
    """Gaussian correlation of the normals around a face with learnt sets of unit vectors.

    Args:
        num_kernels: K.
        sigma: width of the Gaussian, in units of the unit sphere of normals.
    """

    VECTORS = 4  # per kernel; as many as normals: the face's own and three neighbours'

    def __init__(self, num_kernels: int = 64, sigma: float = 0.2) -> None:
        super().__init__()
        self.sigma = sigma
        self.weight_alpha = nn.Parameter(torch.rand(1, num_kernels, self.VECTORS) * math.pi)
        self.weight_beta = nn.Parameter(torch.rand(1, num_kernels, self.VECTORS) * 2 * math.pi)
        self.bn = nn.BatchNorm1d(num_kernels)

    def correlate(self, normals: Tensor, neighbours: Tensor) -> Tensor:
        """Mean over the 4 x 4 pairs (normal n, kernel vector w) of exp(-|n - w|^2 / (2 sigma^2)).

        A normal gives the same response wherever it occurs, so each is compared once and the responses are gathered.
        Differences, not products: half-precision matrix units would blur a distance that is divided by sigma^2.

        Args:
            normals: (B, 3, F) float; neighbours: (B, F, 3) int64.
        Returns:
            (B, K, F) in [0, 1].
        """
        alpha, beta = self.weight_alpha[0], self.weight_beta[0]  # (K, 4)
        vectors = torch.stack([alpha.sin() * beta.cos(), alpha.sin() * beta.sin(), alpha.cos()])  # (3, K, 4)
        distance = sum((normals[:, axis, None, None] - vectors[axis, :, :, None]).square() for axis in range(3))
        response = torch.exp(distance / (-2 * self.sigma**2)).mean(dim=2)  # (B, K, 4, F) -> (B, K, F)
        return (response + gather_neighbours(response, neighbours).sum(dim=3)) / 4

    def forward(self, normals: Tensor, neighbours: Tensor) -> Tensor:
        """The normalised and rectified correlation, (B, K, F); arguments as for `correlate`."""
        return self.bn(self.correlate(normals, neighbours)).relu()


class MeshConvolution(nn.Module):
    """Combines both features of a face (spatial output) and aggregates over its three neighbours (structural output)."""

    def __init__(self, spatial_in: int, structural_in: int, spatial_out: int, structural_out: int) -> None:
        super().__init__()
        self.combination_mlp = _mlp(spatial_in + structural_in, spatial_out)
        self.concat_mlp = nn.Sequential(
            nn.Conv2d(2 * structural_in, structural_in, kernel_size=1), nn.BatchNorm2d(structural_in), nn.ReLU()
        )
        self.aggregation_mlp = _mlp(structural_in, structural_out)

    def forward(self, spatial: Tensor, structural: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C_spatial, F) and (B, C_structural, F) with neighbours (B, F, 3) int64 to the two outputs."""
        combined = self.combination_mlp(torch.cat([spatial, structural], dim=1))
        conv, bn, relu = self.concat_mlp
        # The convolution of a concatenated pair (own, neighbour) is the sum of two, each needed once per face.
        own_weight, neighbour_weight = conv.weight.flatten(1).chunk(2, dim=1)  # (C, C) each
        own = own_weight @ structural + conv.bias[:, None]
        pairs = own[..., None] + gather_neighbours(neighbour_weight @ structural, neighbours)  # (B, C, F, 3)
        return combined, self.aggregation_mlp(relu(bn(pairs)).amax(dim=3))


def gather_neighbours(features: Tensor, neighbours: Tensor) -> Tensor:
    """Return (B, C, F, 3), the features (B, C, F) of the neighbours (B, F, 3) int64 of every face, mesh by mesh."""
    index = neighbours.flatten(1)[:, None].expand(-1, features.shape[1], -1)  # (B, C, 3 * F)
    return features.gather(2, index).unflatten(2, (-1, 3))


def _mlp(*channels: int) -> nn.Sequential:
    layers = []
    for c_in, c_out in zip(channels[:-1], channels[1:]):
        layers += [nn.Conv1d(c_in, c_out, kernel_size=1), nn.BatchNorm1d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)
