"""Reads OFF meshes as they really occur in ModelNet. Called by `datasets.prepare_modelnet`.

Our own, since trimesh 5.2 reads a file that is cut short inside its face list as a smaller mesh and lets NaN pass, without a word.
"""

import re

import numpy as np

from datasets.prepare.readers.polygons import triangulate
from datasets.prepare.shapes.mesh import MeshError


def read_off(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Parse the content of an OFF file.

    Understood: counts on the line of the magic word, with or without a space (`OFF8 12 0`), COFF, comments, blank lines,
    CRLF, any or no edge count, polygons (cut into triangles), colours after a vertex or a face.

    Returns:
        vertices (V, 3) float64 and triangles (T, 3) int64 into them, in file order.
    Raises:
        MeshError: when it is no OFF file, has no faces, is cut short, or names a vertex that does not exist.
    """
    counts, *body = _content_lines(data)
    fields = counts.split()
    if not (2 <= len(fields) <= 3 and all(re.fullmatch(r"[0-9]{1,15}", field) for field in fields)):
        raise MeshError(f"expected the counts of vertices, faces and edges, found {counts[:40]!r}")
    num_vertices, num_faces = int(fields[0]), int(fields[1])
    if num_vertices < 3 or num_faces < 1:
        raise MeshError(f"an empty mesh: {num_vertices} vertices, {num_faces} faces")
    if len(body) < num_vertices + num_faces:
        raise MeshError(f"the header promises {num_vertices} vertices and {num_faces} faces, only {len(body)} lines follow")
    try:
        vertices = _vertices(body[:num_vertices])
        polygons = _polygons(body[num_vertices : num_vertices + num_faces])
    except (ValueError, OverflowError) as error:
        raise MeshError(f"not a readable vertex or face list: {error}") from error
    if not np.isfinite(vertices).all():
        raise MeshError(f"vertex {np.flatnonzero(~np.isfinite(vertices).all(axis=1))[0]} is not finite")
    least, most = min(map(min, polygons)), max(map(max, polygons))
    if least < 0 or most >= num_vertices:
        raise MeshError(f"faces name vertices {least} to {most}, there are 0 to {num_vertices - 1}")
    return vertices, triangulate(polygons, vertices)


def _content_lines(data: bytes) -> list[str]:
    """Return the lines that hold something; the first one holds the counts, whatever it was glued to."""
    text = data.decode("utf-8-sig", errors="replace")
    lines = [content for line in text.splitlines() if (content := line.split("#", 1)[0].strip())]
    for magic in ("COFF", "OFF"):
        if lines and lines[0].upper().startswith(magic):
            rest = lines[0][len(magic) :].strip()
            return [rest, *lines[1:]] if rest else lines[1:] or ["nothing"]
    raise MeshError(f"expected an OFF file, found {(lines[0][:20] if lines else 'nothing')!r}")


def _vertices(lines: list[str]) -> np.ndarray:
    table = [line.split() for line in lines]
    short = next((row for row in table if len(row) < 3), None)
    if short is not None:
        raise ValueError(f"expected three coordinates, found {' '.join(short)!r}")
    return np.array([row[:3] for row in table], dtype=np.float64)


def _polygons(lines: list[str]) -> list[list[int]]:
    polygons = []
    for line in lines:
        size, *indices = line.split()
        corners = [int(index) for index in indices[: int(size)]]
        if int(size) < 1 or len(corners) != int(size):
            raise ValueError(f"expected `k i1 ... ik`, found {line[:40]!r}")
        polygons += [corners] if len(corners) > 2 else []  # faces of one or two corners have no area and are passed over
    if not polygons:
        raise ValueError("no face has three corners")
    return polygons
