"""Mesh encoder: MeshNet (Feng et al., AAAI 2019) with a linear projection to the common space.

A mesh is one array: row f of `faces` (F, 18) is centre 3, the vectors from the centre to the three corners 9, normal 3,
and the indices of the faces across the edges (1,2), (2,3), (3,1), stored as float (exact below 2^24); a face without a
neighbour there names itself. `datasets.mesh_faces` makes such arrays. Submodules are named as in the public checkpoint.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels.batch_norm import normalise_and_activate
from models.kernels.mesh_convolution import MeshConvolution, Neighbours, SharedMLP
from utils.modalities import FACE_CHANNELS

BLOCK_ELEMENTS = 2**18  # of the Gaussians worked on at a time on a CPU: near the cache
STRUCTURAL = 64 + 64 + 3  # channels of rotate convolution, kernel correlation and normal


class MeshNet(nn.Module):
    """Spatial and structural descriptors of every face, two mesh convolutions, maximum over the faces, and a projection.

    Meshes of a batch are brought to one size by repeating faces, as published: the maximum is unaffected, the batch
    statistics of training see the repeated faces more than once.

    Args:
        embedding_dim: D, dimension of the common space.
        width: channels of the fused and of the pooled feature; 1024 as published. Smaller widths are for CPU
            configurations and leave the last two layers of the public checkpoint out.
        mask_ratio: in [0, 1), share of the faces hidden from the maximum in training, a fresh draw from torch's global generator
            for every batch; 0.95 as published. Evaluation takes the maximum over all faces.
        conv_width: channels after the first mesh convolution, half of those after the second; 256 as published. The
            public checkpoint needs 256.
    """

    def __init__(self, embedding_dim: int, width: int = 1024, mask_ratio: float = 0.95, conv_width: int = 256) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.spatial_descriptor = nn.Sequential(OrderedDict(spatial_mlp=SharedMLP(3, 64, 64)))
        self.structural_descriptor = StructuralDescriptor()
        first, second = conv_width, 2 * conv_width
        self.mesh_conv1 = MeshConvolution(64, STRUCTURAL, first, first)
        self.mesh_conv2 = MeshConvolution(first, first, second, second)
        self.fusion_mlp = SharedMLP(second + second, width)
        self.concat_mlp = SharedMLP(first + second + width, width)
        self.head = nn.Sequential(nn.Linear(width, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))

    def forward(self, faces: Tensor) -> Tensor:
        """Map meshes (B, F, 18) float32 to embeddings (B, D), not normalised.

        Raises:
            ValueError: on another shape, a type that cannot hold face indices, or neighbours outside of their mesh.
        """
        if faces.dim() != 3 or faces.shape[1] < 1 or faces.shape[2] != FACE_CHANNELS:
            raise ValueError(f"MeshNet expects faces of shape (B, F >= 1, {FACE_CHANNELS}), found {tuple(faces.shape)}")
        if faces.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"MeshNet expects float32 faces, found {faces.dtype}: it cannot hold the neighbour indices")
        neighbours = Neighbours.of(faces[:, :, 15:].long())
        centres, corners, normals = faces[:, :, :15].flatten(0, 1).split((3, 9, 3), dim=1)  # (B * F, 3 | 9 | 3) rows
        spatial0 = self.spatial_descriptor(centres)
        structural = self.structural_descriptor(corners, normals, neighbours)
        spatial1, structural = self.mesh_conv1(spatial0, structural, neighbours)
        spatial2, structural = self.mesh_conv2(spatial1, structural, neighbours)
        fused = self.fusion_mlp(spatial2, structural)
        features = self.concat_mlp(spatial1, spatial2, fused)  # (B * F, width)
        return self.head(self._visible(features.unflatten(0, faces.shape[:2])).max(dim=1).values)

    def _visible(self, features: Tensor) -> Tensor:
        if not self.training or self.mask_ratio == 0:
            return features
        count = features.shape[1]
        kept = max(1, round(count * (1 - self.mask_ratio)))
        return features.index_select(1, torch.randperm(count, device=features.device)[:kept])


class StructuralDescriptor(nn.Module):
    """Shape of every face and of its neighbourhood: rotate convolution, kernel correlation and normal, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.FRC = FaceRotateConvolution()
        self.FKC = FaceKernelCorrelation()
        self.structural_mlp = SharedMLP(STRUCTURAL, STRUCTURAL, STRUCTURAL)

    def forward(self, corners: Tensor, normals: Tensor, neighbours: Neighbours) -> Tensor:
        """Map rows of corner vectors (M, 9) and normals (M, 3) to (M, 131)."""
        return self.structural_mlp(self.FRC(corners), self.FKC(normals, neighbours), normals)


class FaceRotateConvolution(nn.Module):
    """One MLP over the three ordered corner pairs of a face, averaged: the starting corner does not matter.

    The pairs go through the MLP together. The published code sends them one after the other, so that each BatchNorm has
    three sets of batch statistics and training does depend on the starting corner; in evaluation both are the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rotate_mlp = SharedMLP(6, 32, 32)
        self.fusion_mlp = SharedMLP(32, 64, 64)

    def forward(self, corners: Tensor) -> Tensor:
        """Map rows of corner vectors (M, 9) to (M, 64)."""
        vectors = corners.unflatten(1, (3, 3)).transpose(0, 1)  # (corner, M, xyz)
        pairs = torch.cat([vectors, vectors.roll(-1, dims=0)], dim=2)  # (pair, M, 6)
        rotated = self.rotate_mlp(pairs.flatten(0, 1))  # (3 * M, 32)
        return self.fusion_mlp(rotated.unflatten(0, (3, -1)).mean(dim=0))


class FaceKernelCorrelation(nn.Module):
    """Gaussian correlation of the normals around a face with K learnt sets of unit vectors."""

    KERNELS = 64  # K
    VECTORS = 4  # per kernel; as many as normals: the face's own and three neighbours'
    SIGMA = 0.2  # of the Gaussian, in units of the unit sphere of normals

    def __init__(self) -> None:
        super().__init__()
        self.weight_alpha = nn.Parameter(torch.rand(1, self.KERNELS, self.VECTORS) * math.pi)
        self.weight_beta = nn.Parameter(torch.rand(1, self.KERNELS, self.VECTORS) * 2 * math.pi)
        self.bn = nn.BatchNorm1d(self.KERNELS)

    def correlate(self, normals: Tensor, neighbours: Neighbours) -> Tensor:
        """Mean over the 4 x 4 pairs (normal n, kernel vector w) of exp(-|n - w|^2 / (2 sigma^2)).

        A normal gives the same response wherever it occurs, so each is compared once and the responses are added up. The
        distances come from one product, |n|^2 + 1 - 2 n.w, in full precision: they are divided by sigma^2.

        Args:
            normals: (M, 3) float rows.
        Returns:
            (M, K) in [0, 1], up to rounding.
        """
        alpha, beta = self.weight_alpha[0].T, self.weight_beta[0].T  # (4, K)
        vectors = torch.stack([alpha.sin() * beta.cos(), alpha.sin() * beta.sin(), alpha.cos()], dim=2)  # (4, K, 3)
        with torch.autocast(normals.device.type, enabled=False):
            response = _GaussianResponse.apply(normals, vectors, 0.5 / self.SIGMA**2)
            return (response + neighbours.sum(response)) / self.VECTORS**2

    def forward(self, normals: Tensor, neighbours: Neighbours) -> Tensor:
        """The normalised and rectified correlation, (M, K); arguments as for `correlate`."""
        return normalise_and_activate(self.correlate(normals, neighbours), self.bn)


class _GaussianResponse(torch.autograd.Function):
    """Sum over the vectors w of a kernel of exp(-narrow (|n|^2 + 1 - 2 n.w)), a block of normals at a time.

    Of normals (M, 3) and unit vectors (V, K, 3) to (M, K). The Gaussians lie in a buffer near the cache, backwards once more.
    """

    @staticmethod
    def forward(ctx, normals, vectors, narrow):
        ctx.save_for_backward(normals, vectors)
        ctx.narrow = narrow
        response = normals.new_empty(len(normals), vectors.shape[1])
        for rows, gaussians in _gaussians(normals, vectors, narrow):
            torch.sum(gaussians, 1, out=response[rows])
        return response

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        normals, vectors = ctx.saved_tensors
        flat, factor = vectors.flatten(0, 1), 2 * ctx.narrow
        grad_normals, grad_vectors = torch.empty_like(normals) if ctx.needs_input_grad[0] else None, torch.zeros_like(flat)
        for rows, gaussians in _gaussians(normals, vectors, ctx.narrow):
            pull = gaussians.mul_(grad[rows, None]).flatten(1)
            grad_vectors.addmm_(pull.T, normals[rows], alpha=factor)
            if grad_normals is not None:
                grad_normals[rows] = factor * (pull @ flat - pull.sum(1, keepdim=True) * normals[rows])
        return grad_normals, grad_vectors.view_as(vectors), None


def _gaussians(normals: Tensor, vectors: Tensor, narrow: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of normals with their Gaussians (rows, V, K), in a buffer that the next run overwrites."""
    turned = F.pad(vectors.flatten(0, 1).T * (2 * narrow), (0, 0, 0, 1), value=1.0)  # (4, V K); its last row adds the offsets
    rows = torch.cat([normals, (normals.square().sum(dim=1, keepdim=True) + 1) * -narrow], dim=1)
    step = len(rows) if rows.device.type != "cpu" else max(1, BLOCK_ELEMENTS // turned.shape[1])
    buffer = rows.new_empty(min(step, len(rows)), turned.shape[1])
    for start in range(0, len(rows), step):
        chosen = slice(start, min(start + step, len(rows)))
        exponent = torch.mm(rows[chosen], turned, out=buffer[:chosen.stop - start])
        yield chosen, exponent.exp_().unflatten(1, vectors.shape[:2])
