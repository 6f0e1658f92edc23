"""Meshes as arrays of faces: made from vertices and triangles, read from files, padded. `mesh_transforms` turns batches of them.

Row f of a mesh (F, 18) float32 is centre 3, vectors from the centre to the corners 9, unit normal 3, and the indices of
the faces across the edges (1,2), (2,3), (3,1), the face itself where there is none. `models.MeshNet` reads this array.
"""

import zlib

import numpy as np

from datasets.arrays import Allocate, box_centre, longest, read_array, to_unit_sphere
from datasets.lists import SampleList
from utils.errors import UserError
from utils.modalities import FACE_CHANNELS

MAX_FACES = 500
FLATNESS = 1e-6  # a face whose height is below this share of its longest edge has no area and no normal


def mesh_to_faces(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Turn a triangle mesh into the array of its faces; coordinates are kept as they are.

    Vertices at equal positions are welded and faces without area dropped, before neighbours are looked up. Where more
    than two faces share an edge, the neighbour is the one of lowest index that is not the face itself.

    Args:
        vertices: (V, 3) float; triangles: (T, 3) integer indices of vertices.
    Returns:
        (F, 18) float32, F <= T, in the order of the triangles.
    Raises:
        UserError: on another shape, NaN or infinity, an index out of range, or a mesh without any face of positive area.
    """
    vertices, triangles = np.asarray(vertices, dtype=np.float64), np.asarray(triangles)
    _check_mesh(vertices, triangles)
    positions, welded = np.unique(vertices, axis=0, return_inverse=True)
    triangles = welded.reshape(-1)[triangles]
    corners = positions[triangles]  # (T, corner, xyz)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(normals, axis=1)  # of the parallelogram
    longest = np.linalg.norm(corners - np.roll(corners, -1, axis=1), axis=2).max(axis=1)
    kept = area > FLATNESS * longest**2
    if not kept.any():
        raise UserError(f"expected at least one face of positive area, found none among {len(triangles)} triangles")
    corners, normals = corners[kept], normals[kept] / area[kept, None]
    centres = corners.mean(axis=1)
    vectors = (corners - centres[:, None]).reshape(-1, 9)
    return np.concatenate([centres, vectors, normals, _neighbours(triangles[kept])], axis=1).astype(np.float32)


def _check_mesh(vertices: np.ndarray, triangles: np.ndarray) -> None:
    shapes = f"{vertices.shape} and {triangles.shape} of {triangles.dtype}"
    if vertices.ndim != 2 or vertices.shape[1] != 3 or triangles.ndim != 2 or triangles.shape[1] != 3:
        raise UserError(f"a mesh is vertices (V, 3) and triangles (T, 3), found shapes {shapes}")
    if triangles.dtype.kind not in "iu" or len(triangles) == 0:
        raise UserError(f"a mesh needs at least one triangle of integer indices, found shapes {shapes}")
    bad = np.flatnonzero(~np.isfinite(vertices).all(axis=1))
    if len(bad):
        raise UserError(f"expected finite coordinates, found {vertices[bad[0]]} at vertex {bad[0]} ({len(bad)} such vertices)")
    outside = np.flatnonzero(((triangles < 0) | (triangles >= len(vertices))).any(axis=1))
    if len(outside):
        raise UserError(f"expected vertex indices in 0..{len(vertices) - 1}, found {triangles[outside[0]]} in triangle {outside[0]}")


def _neighbours(triangles: np.ndarray) -> np.ndarray:
    """Return (F, 3), the face across the edges (1,2), (2,3), (3,1) of every face."""
    edges = np.sort(np.stack([triangles, np.roll(triangles, -1, axis=1)], axis=2), axis=2).reshape(-1, 2)
    face = np.arange(len(edges)) // 3
    _, edge, uses = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    edge = edge.reshape(-1)
    order = np.argsort(edge, kind="stable")  # the faces of one edge stand together, lowest index first
    first = np.cumsum(uses) - uses
    lowest, second = face[order[first]], face[order[np.minimum(first + 1, first + uses - 1)]]
    return np.where(lowest[edge] != face, lowest[edge], second[edge]).reshape(-1, 3)


def load_faces(sample_list: SampleList, max_faces: int = MAX_FACES, allocate: Allocate = np.empty) -> np.ndarray:
    """Read all meshes of a list, in the unit sphere about their bounding boxes; smaller ones repeat some of their faces after their own.

    Args:
        sample_list: of a modality of kind "mesh": .npy files of shape (F, 18), see the module.
        max_faces: no mesh may have more.
    Returns:
        (N, F, 18) float32, F of the largest.
    Raises:
        UserError: on an unreadable file or an array that is no such mesh (names file and row).
    """
    stored = min(max_faces, longest(sample_list))
    meshes = allocate((len(sample_list), stored, FACE_CHANNELS), np.float32)
    for row, name in enumerate(sample_list.instance_ids):
        faces = read_array(sample_list, row)
        _check_faces(faces, max_faces, sample_list.where(row))
        faces = _to_unit_sphere(faces)
        rng = np.random.default_rng([0, zlib.crc32(name.encode())])
        meshes[row] = np.concatenate([faces, faces[rng.integers(len(faces), size=stored - len(faces))]])
    return meshes


def _check_faces(faces: np.ndarray, max_faces: int, where: str) -> None:
    if faces.ndim != 2 or faces.shape[1] != FACE_CHANNELS or faces.dtype.kind != "f":
        raise UserError(f"{where}: expected floats of shape (F, {FACE_CHANNELS}), found shape {faces.shape} and dtype {faces.dtype}")
    if not 1 <= len(faces) <= max_faces:
        raise UserError(f"{where}: expected 1 to {max_faces} faces, found {len(faces)}; simplify the mesh or raise the limit")
    neighbours, vectors = faces[:, 15:], faces[:, 3:12].reshape(-1, 3, 3)
    if not np.isfinite(faces).all():
        raise UserError(f"{where}: expected finite numbers, found NaN or infinity")
    wrong = np.flatnonzero(((neighbours < 0) | (neighbours >= len(faces)) | (neighbours % 1 != 0)).any(axis=1))
    if len(wrong):
        raise UserError(f"{where}: expected neighbours in 0..{len(faces) - 1}, found {neighbours[wrong[0]]} at face {wrong[0]}")
    if (np.abs(vectors.sum(axis=1)) > 1e-3 * np.abs(vectors).max()).any():
        raise UserError(f"{where}: columns 3 to 11 must be corners minus centre, found vectors that do not add up to zero")


def _to_unit_sphere(faces: np.ndarray) -> np.ndarray:
    faces = faces.astype(np.float64)
    corners = (faces[:, None, :3] + faces[:, 3:12].reshape(-1, 3, 3)).reshape(-1, 3)
    corners = to_unit_sphere(corners, box_centre(corners)).reshape(-1, 3, 3)
    faces[:, :3] = corners.mean(axis=1)
    faces[:, 3:12] = (corners - faces[:, None, :3]).reshape(-1, 9)
    return faces.astype(np.float32)
