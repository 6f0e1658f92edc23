"""Reads PLY meshes that trimesh does not: with plyfile, which is slow, but notices where a text ends and knows polygons of any size."""

import io
import re
import warnings

import numpy as np

from datasets.prepare.readers.polygons import triangulate
from datasets.prepare.shapes.mesh import MeshError

SINGLE = re.compile(rb"(?m)^(\s*property\s+)float(?:32)?\b")
TEXT = re.compile(rb"(?m)^\s*format\s+ascii\b")
CORNERS = ("vertex_indices", "vertex_index")


def widened(data: bytes) -> bytes:
    """Return a PLY file whose text is read in double precision: coordinates of the world have more digits than the single they promise."""
    header, end, body = data.partition(b"end_header")
    return SINGLE.sub(rb"\1double", header) + end + body if TEXT.search(header) else data


def read_ply(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices (V, 3) float64 and triangles (T, 3) int64 of a PLY file.

    Raises:
        MeshError: when it is cut short or otherwise damaged, or has no vertices or faces; triangle strips are not read.
    """
    from plyfile import PlyData, PlyParseError
    try:
        with warnings.catch_warnings(action="ignore"):  # where a text ends early
            elements = {element.name: element for element in PlyData.read(io.BytesIO(data)).elements}
    except (PlyParseError, ValueError) as error:
        raise MeshError(f"not a readable PLY file, or cut short: {error}") from error
    named = {name: [entry.name for entry in element.properties] for name, element in elements.items()}
    corners = next((name for name in CORNERS if name in named.get("face", ())), None)
    if corners is None or not {"x", "y", "z"} <= set(named.get("vertex", ())):
        raise MeshError(f"expected vertices x, y, z and faces with {' or '.join(CORNERS)}, found {', '.join(map(str, named)) or 'nothing'}")
    vertices = np.stack([elements["vertex"][axis] for axis in "xyz"], axis=1).astype(np.float64)
    polygons = [face.tolist() for face in elements["face"][corners]]
    used = [corner for polygon in polygons for corner in polygon]
    if not used or min(used) < 0 or max(used) >= len(vertices):
        raise MeshError(f"{len(polygons)} faces that do not fit the {len(vertices)} vertices")
    return vertices, triangulate(polygons, vertices)
