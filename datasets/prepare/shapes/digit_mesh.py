"""A handwritten digit as a watertight mesh: the outline of its pixels, extruded. Called by the preparation commands; ours, not 3D MNIST's."""

import numpy as np
import shapely

from datasets.prepare.shapes.digit_cloud import HALF_DEPTH, digit_to_point_cloud, gray_image
from utils.errors import UserError

CHAMFER = 0.2  # pixels cut from two corners that meet in one point, where the surface would not be a manifold
TOLERANCES = (0.0, 0.75, 1.0, 1.5, 2.0, 3.0)  # pixels the outline may move; 0.71 flattens the steps of a slanted stroke


def extrude_digit(image: np.ndarray, max_faces: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Extrude the outline of a digit, in the frame of `digit_to_point_cloud`: its points lie on this surface.

    Every non-zero pixel is a unit square. Where two squares touch in one corner only, both lose `CHAMFER` of it. An
    outline of too many corners is simplified (Douglas-Peucker, parts and holes are kept), with the first of `TOLERANCES`
    that gives few enough faces.

    Args:
        image: (28, 28) uint8; every non-zero pixel is lit, whatever its intensity.
        max_faces: largest number of triangles.
    Returns:
        vertices (V, 3) float64, x = depth, y = right, z = up, longest side 1, origin at the mean of the digit's point
        cloud; and triangles (T, 3) int64 with outward orientation, every edge in exactly two of them.
    Raises:
        UserError: on another shape or dtype, when no pixel is lit, or when no tolerance gives `max_faces` or fewer.
    """
    points, _ = digit_to_point_cloud(image)
    region = _pixel_region(gray_image(image) > 0)
    scale = np.ptp(points[:, 0]) / (2 * HALF_DEPTH)
    shift = points[:, 1:].min(axis=0) - scale * np.array(region.bounds[:2])
    for tolerance in TOLERANCES:
        simple = region.simplify(tolerance)
        if not simple.is_valid:
            continue
        outline, triangles = _extrude(simple)
        if len(triangles) <= max_faces:
            flat = scale * outline + shift
            depth = np.repeat([HALF_DEPTH * scale, -HALF_DEPTH * scale], len(flat))
            return np.column_stack([depth, np.tile(flat, (2, 1))]), triangles
    raise UserError(
        f"the digit needs {len(triangles)} faces even with its outline moved by up to {TOLERANCES[-1]} pixels: expected at "
        f"most {max_faces}; raise the limit or leave the sample out, it has too many separate parts"
    )


def _pixel_region(lit: np.ndarray):
    """The union of the lit pixels as a shapely (multi)polygon, y = column and z = -row; no two corners coincide."""
    rows, cols = np.nonzero(lit)
    squares = shapely.box(cols - 0.5, -rows - 0.5, cols + 0.5, -rows + 0.5)
    upper, lower = lit[:-1], lit[1:]
    falling = upper[:, :-1] & lower[:, 1:] & ~upper[:, 1:] & ~lower[:, :-1]
    rising = upper[:, 1:] & lower[:, :-1] & ~upper[:, :-1] & ~lower[:, 1:]
    rows, cols = np.nonzero(falling | rising)
    around = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]) * CHAMFER
    diamonds = shapely.polygons(np.column_stack([cols + 0.5, -rows - 0.5])[:, None] + around)
    return shapely.difference(shapely.union_all(squares), shapely.union_all(diamonds))


def _extrude(region) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the outline (V, 2) and the triangles (T, 3) of its extrusion; front 0..V-1, back V..2V-1."""
    rings = shapely.get_rings(shapely.orient_polygons(shapely.get_parts(region)))  # the region lies to the left
    corners, ring = shapely.get_coordinates(rings, return_index=True)
    caps = shapely.get_coordinates(shapely.get_parts(shapely.constrained_delaunay_triangles(region)))
    outline, ids = np.unique(np.concatenate([corners, caps]), axis=0, return_inverse=True)
    same = ring[1:] == ring[:-1]  # rings repeat their first corner at the end
    start, end = ids[: len(ring)][:-1][same], ids[: len(ring)][1:][same]
    front = ids[len(ring) :].reshape(-1, 4)[:, :3]
    first, second, third = outline[front].transpose(1, 0, 2)
    (a, b), (c, d) = (second - first).T, (third - first).T
    front = np.where((a * d < b * c)[:, None], front[:, ::-1], front)  # counter-clockwise seen from +x
    back = len(outline)
    walls = [np.column_stack([end, start, start + back]), np.column_stack([end, start + back, end + back])]
    return outline, np.concatenate([front, front[:, ::-1] + back, *walls])
