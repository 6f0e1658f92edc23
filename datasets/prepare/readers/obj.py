"""Reads OBJ meshes with trimesh, and refuses what trimesh reads wrongly without a word. Called by `datasets.prepare_mi3dor`."""

import io
import re

import numpy as np

from datasets.prepare.readers.off import MeshError

VERTEX_ZERO = re.compile(rb"^f .*(?<= )0(?:/| |$)", re.MULTILINE)
SHORT_FACE = re.compile(rb"\nf(?: \S+){0,2}\n\Z")
COUNTED_BACKWARDS = re.compile(rb"^f .*(?<= )-", re.MULTILINE)


def read_obj(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Parse the geometry of an OBJ file; materials, textures and normals are ignored, polygons become fans of triangles.

    Args:
        data: bytes of the file.
    Returns:
        vertices (V, 3) float64 and triangles (T, 3) int64 into them.
    Raises:
        MeshError: when it is no OBJ file, has no faces, names a vertex that does not exist, or counts vertices backwards
            (negative indices) before the last of them is given.
        ImportError: naming requirements-data.txt, without trimesh.
    """
    try:
        import trimesh
    except ImportError as error:
        raise ImportError("OBJ meshes need trimesh: pip install -r requirements-data.txt") from error
    lines = (b" ".join(line.split(b"#", 1)[0].split()) for line in data.removeprefix(b"\xef\xbb\xbf").splitlines())
    text = b"\n" + b"\n".join(line for line in lines if line) + b"\n"  # trimesh overlooks indented lines and tabs
    if VERTEX_ZERO.search(text):
        raise MeshError("a face names vertex 0; they count from 1")
    if COUNTED_BACKWARDS.search(text) and text.rfind(b"\nv ") > text.find(b"\nf "):
        raise MeshError("faces count backwards (negative indices) before the last vertex is given; use positive indices")
    if SHORT_FACE.search(text):
        raise MeshError("the last face has fewer than three corners: the file is cut short")
    try:
        mesh = trimesh.load(
            io.BytesIO(text), file_type="obj", force="mesh", process=False, skip_materials=True, group_material=False
        )
        vertices, triangles = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces, dtype=np.int64)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise MeshError(f"not a readable OBJ file: {error}") from error
    if not triangles.size:
        raise MeshError("an empty mesh: no face with three corners")
    if vertices.shape[1:] != (3,) or triangles.shape[1:] != (3,) or not np.isfinite(vertices).all():
        raise MeshError(f"expected vertices of three finite coordinates, found shape {vertices.shape} or NaN")
    return vertices, triangles
