"""Meshes -> cleaned, in the unit sphere, as surface points, with at most 500 faces. Called by the preparation commands.

The simplification needs `requirements-data.txt`; everything else needs NumPy alone.
"""

import numpy as np

from datasets.arrays import box_centre, to_unit_sphere
from datasets.mesh_faces import mesh_to_faces
from datasets.prepare.ownership import required
from utils.errors import UserError

Seed = int | tuple[int, ...]
Mesh = tuple[np.ndarray, np.ndarray]

WELD_TOLERANCE = 1e-6  # of the longest side of the bounding box
SMALLEST_EXTENT = 1e-100  # its square must be a number, and so must that of its inverse
PRE_FACES = 4000  # VTK's decimation is slow above, fast-simplification is unsafe below
PRE_AREA_CHANGE = 0.1
MOST_FACES = 50_000  # that VTK's decimation is given
MIN_AREA_RATIO = 0.7
MIN_SILHOUETTE = 0.8
SILHOUETTE_CELLS = 32
SILHOUETTE_POINTS = 20_000
LARGEST_GRID = 64


class MeshError(ValueError):
    """A mesh or cloud that cannot be used; the preparation leaves its object out of every modality and lists it."""


def normalise(points: np.ndarray) -> np.ndarray:
    """Apply `datasets.arrays.to_unit_sphere` with the centre of the bounding box to (n, 3) points.

    Raises:
        MeshError: when a coordinate is not finite or all points coincide.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise MeshError(f"expected finite points of shape (n, 3), found shape {points.shape} or NaN")
    points = to_unit_sphere(points, box_centre(points))
    if not points.any():
        raise MeshError(f"the {len(points)} points are all in one place")
    return points


def clean_mesh(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weld coinciding vertices (V, 3), drop triangles (T, 3) without area or repeated, and unused vertices; order and winding stay.

    Raises:
        MeshError: when no triangle is left.
    """
    used, triangles = np.unique(triangles, return_inverse=True)  # first, so that a stray vertex does not set the scale
    vertices, triangles = vertices[used].astype(np.float64), triangles.reshape(-1, 3)
    extent = float(np.ptp(vertices, axis=0).max()) if len(vertices) else 0.0
    if not extent > 0:
        raise MeshError(f"the {len(vertices)} vertices are all in one place")
    if not SMALLEST_EXTENT < extent < 1 / SMALLEST_EXTENT:
        raise MeshError(f"the mesh measures {extent:.1e}, beyond what can be computed with; found in a damaged file")
    cells = np.rint((vertices - vertices.min(axis=0)) / (extent * WELD_TOLERANCE)).astype(np.int64)
    _, first, merged = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    vertices, triangles = vertices[first], merged.reshape(-1)[triangles]
    _, kept = np.unique(np.sort(triangles, axis=1), axis=0, return_index=True)  # double-sided copies go as well
    triangles = triangles[np.sort(kept)]
    triangles = triangles[triangle_areas(vertices, triangles) > (extent * WELD_TOLERANCE) ** 2]
    if not len(triangles):
        raise MeshError("no triangle has an area")
    used, triangles = np.unique(triangles, return_inverse=True)
    return vertices[used], triangles.reshape(-1, 3)


def triangle_areas(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Return the (T,) areas of triangles (T, 3) over vertices (V, 3)."""
    corners = vertices[triangles]
    return np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1) / 2


def sample_surface(vertices: np.ndarray, triangles: np.ndarray, count: int, seed: Seed) -> np.ndarray:
    """Draw (count, 3) points uniformly from the surface of triangles (T, 3) over vertices (V, 3): one by its area, then a place in it.

    Raises:
        MeshError: when no triangle has an area.
    """
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(triangle_areas(vertices, triangles))
    if not len(cumulative) or not cumulative[-1] > 0:
        raise MeshError(f"none of the {len(triangles)} triangles has an area to draw points from")
    chosen = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
    corners = vertices[triangles[np.minimum(chosen, len(triangles) - 1)]]  # (count, 3, 3)
    u, v = rng.random((2, count, 1))
    folded = u + v > 1  # the unit square folded onto the unit triangle
    u, v = np.where(folded, 1 - u, u), np.where(folded, 1 - v, v)
    return corners[:, 0] + u * (corners[:, 1] - corners[:, 0]) + v * (corners[:, 2] - corners[:, 0])


def farthest_points(points: np.ndarray, count: int, seed: Seed) -> np.ndarray:
    """Pick (count, 3) well-spread points of (n, 3): the first at random, then always the one farthest from those picked.

    Raises:
        UserError: when count is outside 1..n.
    """
    if not 1 <= count <= len(points):
        raise UserError(f"count must be in 1..{len(points)}, found {count}")
    picked = np.empty(count, dtype=np.int64)
    picked[0] = np.random.default_rng(seed).integers(len(points))
    distance = np.full(len(points), np.inf)
    columns = np.ascontiguousarray(points.T)
    for row in range(1, count):
        offset = columns - columns[:, picked[row - 1], None]
        np.minimum(distance, np.einsum("dn,dn->n", offset, offset), out=distance)
        picked[row] = distance.argmax()
    return points[picked]


def simplify(vertices: np.ndarray, triangles: np.ndarray, max_faces: int = 500) -> tuple[Mesh, dict]:
    """Reduce a mesh to at most `max_faces` triangles.

    Large meshes first go through fast-simplification, whose result counts only if it keeps the area, very large ones otherwise
    through vertex clustering; then VTK's quadric decimation; vertex clustering takes over where that fails or ruins the shape and
    the clustered silhouette is better.

    Args:
        vertices: (V, 3) float; triangles: (T, 3) int.
    Returns:
        The mesh (cleaned even where nothing is to be reduced) and its record: faces_before, faces_after, area_ratio,
        silhouette (smallest overlap of the three axis views, 0..1), method, flagged (area or silhouette badly kept).
    Raises:
        MeshError: when the mesh is empty or nothing of it is left. UserError: when a library is missing.
    """
    original = clean_mesh(vertices, triangles)
    if len(original[1]) <= max_faces:
        return original, _record(original, original, "none")
    reduced, methods = original, []
    if len(reduced[1]) > PRE_FACES:
        reduced, methods = _presimplify(original)
    if len(reduced[1]) > MOST_FACES:
        reduced, methods = _cluster(*original, max(PRE_FACES, max_faces)), ["clustering"]
    mesh, record = None, {"flagged": True}
    decimated = _decimate(*reduced, max_faces)
    if decimated is not None and len(decimated[1]) <= max_faces:
        mesh, record = decimated, _record(original, decimated, "+".join([*methods, "quadric"]))
    if record["flagged"]:
        clustered = _cluster(*original, max_faces)
        other = _record(original, clustered, "clustering")
        if mesh is None or other["silhouette"] > record["silhouette"]:
            mesh, record = clustered, other
    return mesh, record


def simplified_faces(vertices: np.ndarray, triangles: np.ndarray, max_faces: int) -> tuple[np.ndarray, dict]:
    """Return `mesh_to_faces` (F, 18) of the simplified mesh and the record of `simplify`; a MeshError when no face is left."""
    small, record = simplify(vertices, triangles, max_faces)
    try:
        return mesh_to_faces(*small), record
    except UserError as error:
        raise MeshError(f"no mesh is left after simplification: {error}") from error


def silhouette_overlap(first: Mesh, second: Mesh) -> float:
    """Return the smallest intersection over union, 0..1, of the silhouettes of two meshes along the three axes.

    Silhouettes are the cells of a 32 x 32 grid over both meshes in which one of 20,000 surface points lies.
    """
    clouds = [sample_surface(*mesh, SILHOUETTE_POINTS, seed=0) for mesh in (first, second)]
    low = np.min([cloud.min(axis=0) for cloud in clouds], axis=0)
    extent = max(np.max([cloud.max(axis=0) - low for cloud in clouds]), 1e-12)
    cells = [np.minimum((cloud - low) / extent * SILHOUETTE_CELLS, SILHOUETTE_CELLS - 1).astype(np.int64) for cloud in clouds]
    overlaps = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        lit = np.zeros((2, SILHOUETTE_CELLS, SILHOUETTE_CELLS), dtype=bool)
        for picture, cell in zip(lit, cells, strict=True):
            picture[tuple(cell[:, axes].T)] = True
        overlaps.append(float(lit.all(axis=0).sum() / lit.any(axis=0).sum()))
    return min(overlaps)


def _record(original: Mesh, mesh: Mesh, method: str) -> dict:
    ratio = float(triangle_areas(*mesh).sum() / triangle_areas(*original).sum())
    overlap = 1.0 if mesh is original else silhouette_overlap(original, mesh)
    return {
        "faces_before": len(original[1]), "faces_after": len(mesh[1]), "area_ratio": round(ratio, 4),
        "silhouette": round(overlap, 4), "method": method, "flagged": ratio < MIN_AREA_RATIO or overlap < MIN_SILHOUETTE,
    }


def _presimplify(original: Mesh) -> tuple[Mesh, list[str]]:
    """Reduce to `PRE_FACES` if that keeps the area, else return the original."""
    fast_simplification = required("fast_simplification", "mesh simplification")
    vertices, triangles = fast_simplification.simplify(
        original[0].astype(np.float32), original[1].astype(np.int32), target_count=PRE_FACES
    )
    try:
        mesh = clean_mesh(np.asarray(vertices, dtype=np.float64), np.asarray(triangles, dtype=np.int64))
    except MeshError:
        return original, []
    change = abs(triangle_areas(*mesh).sum() / triangle_areas(*original).sum() - 1)
    kept = len(mesh[1]) < len(original[1]) and change <= PRE_AREA_CHANGE
    return (mesh, ["fast"]) if kept else (original, [])


def _decimate(vertices: np.ndarray, triangles: np.ndarray, max_faces: int) -> Mesh | None:
    """Return VTK's quadric decimation, or None when it leaves nothing."""
    if len(triangles) <= max_faces:
        return vertices, triangles
    mesh = required("pyvista", "mesh simplification").PolyData.from_regular_faces(vertices, triangles)
    reduced = mesh.decimate(1 - (max_faces - 0.5) / len(triangles), volume_preservation=True)
    try:
        return clean_mesh(np.asarray(reduced.points, dtype=np.float64), np.asarray(reduced.regular_faces, dtype=np.int64))
    except MeshError:
        return None


def _cluster(vertices: np.ndarray, triangles: np.ndarray, max_faces: int) -> Mesh:
    """Merge the vertices in each cell of the finest grid, found by bisection, that leaves at most `max_faces` faces."""
    mesh, coarse, fine = None, 2, LARGEST_GRID
    while coarse <= fine:
        grid = (coarse + fine) // 2
        found = _merged(vertices, triangles, grid)
        if found is None or len(found[1]) <= max_faces:
            mesh, coarse = found or mesh, grid + 1
        else:
            fine = grid - 1
    if mesh is None:
        raise MeshError(f"vertex clustering leaves nothing with 1 to {max_faces} faces of {len(triangles)}")
    return mesh


def _merged(vertices: np.ndarray, triangles: np.ndarray, grid: int) -> Mesh | None:
    """Merge the vertices in each cell of one grid; None when no face is left."""
    low, extent = vertices.min(axis=0), np.ptp(vertices, axis=0).max()
    cells = np.minimum((vertices - low) / extent * grid, grid - 1).astype(np.int64)
    _, merged = np.unique(cells @ [grid * grid, grid, 1], return_inverse=True)
    centres = np.stack([np.bincount(merged, vertices[:, axis]) for axis in range(3)], axis=1) / np.bincount(merged)[:, None]
    try:
        return clean_mesh(centres, merged[triangles])
    except MeshError:
        return None
