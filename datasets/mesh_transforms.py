"""Batches of meshes, as arrays of faces (see `mesh_faces`), made ready for evaluation and training."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.transforms import random_map, random_warp
from utils.engine.seed import BatchGenerator


def prepare_faces(faces: Tensor) -> Tensor:
    """Evaluation transform: (B, F, 18) with the normals recomputed from the corners, exactly as in training.

    So files made elsewhere, whose stored normals may point the other way, mean the same to both.
    """
    return _assemble(faces[:, :, :3], faces[:, :, 3:12].unflatten(2, (3, 3)), faces[:, :, 15:])


def augment_faces(faces: Tensor, augment, generator: BatchGenerator) -> Tensor:
    """Training transform: rotation, scale per axis, shear and shift per mesh, jitter and starting corner per face.

    As published, the jitter moves the centres alone, so the vectors to the corners move against it. Normals follow from
    the transformed corners.

    Args:
        faces: (B, F, 18) float32, z up; the result is of the same shape.
        augment: ranges, see `utils.settings.data_options.AugmentConfig` (the point_* fields).
        generator: on the device of the faces.
    """
    if augment.point_warp:
        faces = _warp(faces, random_warp(len(faces), augment.point_warp, generator))
    matrix, shift = random_map(len(faces), augment, generator)  # (B, 3, 3), (B, 1, 3)
    noise = generator.randn(*faces.shape[:2], 3) * augment.point_jitter
    turned = generator.randint(3, *faces.shape[:2], 1)
    order = (turned + torch.arange(3, device=faces.device)) % 3  # (B, F, 3), corners and edges alike
    corners = faces[:, :, 3:12].unflatten(2, (3, 3)).gather(2, order[..., None].expand(-1, -1, -1, 3))
    corners = corners @ matrix.transpose(1, 2)[:, None]
    centres = faces[:, :, :3] @ matrix.transpose(1, 2) + shift
    return _assemble(centres + noise, corners - noise[:, :, None], faces[:, :, 15:].gather(2, order))


def _warp(faces: Tensor, displacement: Callable[[Tensor], Tensor]) -> Tensor:
    """Move the vertices by a smooth field; equal vertices of neighbouring faces move alike, so the mesh stays closed."""
    centres = faces[:, :, None, :3]
    vertices = (centres + faces[:, :, 3:12].unflatten(2, (3, 3))).flatten(1, 2)  # (B, F * 3, 3)
    vertices = (vertices + displacement(vertices)).unflatten(1, (-1, 3))  # (B, F, 3, 3)
    centres = vertices.mean(dim=2)
    corners = vertices - centres[:, :, None]
    return torch.cat([centres, corners.flatten(2), faces[:, :, 12:]], dim=2)


def _assemble(centres: Tensor, corners: Tensor, neighbours: Tensor) -> Tensor:
    """Join (B, F, 3), (B, F, 3, 3) and (B, F, 3) with the unit normals of the corners; zero for faces without area."""
    normals = torch.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0], dim=2)
    normals = F.normalize(normals, dim=2, eps=1e-30)
    return torch.cat([centres, corners.flatten(2), normals, neighbours], dim=2)
