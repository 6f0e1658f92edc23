"""Reads the geometry of OBJ meshes. Called by `datasets.prepare_mi3dor`.

Our own, since trimesh 5.2 misreads without a word what exporters write: negative indices before the last vertex, indented lines, tabs,
vertex 0, comments that end in a backslash, and faces wrapped by a backslash that other blanks follow.
"""

import re
from collections.abc import Iterator

import numpy as np

from datasets.prepare.readers.polygons import triangulate
from datasets.prepare.shapes.mesh import MeshError


def read_obj(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices (V, 3) float64 and faces (T, 3) int64 of an OBJ file; polygons are cut, everything else is passed over.

    OBJ files do not say how much they hold: one that is cut short is noticed only where its last face shows it.

    Raises:
        MeshError: when it is no OBJ file, has no faces, ends within a face, or names a vertex that does not exist.
    """
    vertices, polygons, corners, face = [], [], [0, 0, 0], []
    try:
        for keyword, *fields in _statements(data):
            if keyword == b"v":
                vertices.append([float(field) for field in fields[:3]])
            elif keyword == b"f":
                face, corners = fields, [_vertex(int(field.split(b"/")[0]), len(vertices)) for field in fields]
                polygons += [corners] if len(corners) > 2 else []  # faces of one or two corners have no area and are passed over
        table = np.array(vertices, dtype=np.float64)
    except ValueError as error:
        raise MeshError(f"not a readable OBJ file: {error}") from error
    parts = {tuple(map(bool, field.split(b"/"))) for field in face}  # which the last face gives of its corners
    if len(corners) < 3 or (len(parts) > 1 and not data.endswith((b"\n", b"\r"))):
        raise MeshError("the last face lacks a corner or a part of one: the file is cut short")
    if not polygons:
        raise MeshError("an empty mesh: no face with three corners")
    if table.ndim != 2 or table.shape[1] != 3 or not np.isfinite(table).all():
        raise MeshError(f"expected vertices of three finite coordinates, found shape {table.shape} or NaN")
    most = max(map(max, polygons))
    if most >= len(table):
        raise MeshError(f"a face names vertex {most + 1} of {len(table)}")
    return table, triangulate(polygons, table)


def _statements(data: bytes) -> Iterator[list[bytes]]:
    """Yield the words of every line; a line that ends in a backslash goes on in the next one, comments do not count."""
    wrapped: list[bytes] = []
    for line in re.split(rb"\r\n|\r|\n", data.removeprefix(b"\xef\xbb\xbf")):
        content = line.split(b"#", 1)[0].rstrip()
        words = [*wrapped, *content.rstrip(b"\\").split()]
        wrapped = words if content.endswith(b"\\") and words and words[0] in (b"v", b"f") else []
        if words and not wrapped:
            yield words
    if wrapped:
        yield wrapped


def _vertex(index: int, given: int) -> int:
    """Return the 0-based index of what a face names: from 1, or backwards from the last vertex given so far."""
    if index == 0 or index < -given:
        raise ValueError(f"a face names vertex {index}; there are {given} so far, and they count from 1")
    return index - 1 if index > 0 else given + index
