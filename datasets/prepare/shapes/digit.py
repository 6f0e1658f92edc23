"""One handwritten digit -> surface points, gray image and RGB image (the recipe of 3D MNIST), and a watertight mesh (ours)."""

import numpy as np
import shapely

from utils.errors import UserError

DIGIT_SIZE = 28
FRAME_SIZE = 30
HALF_DEPTH = 3.0  # the digit is extruded from -3 to +3 pixels

VIEW_NORMAL = np.array([1.0, 0.65, 0.0])
BACKGROUND = np.array([0.95, 0.95, 0.85])
VIEW_HALF_WIDTH = 0.68  # of the drawn square, in units of the longer side of the digit; the same for every sample
OVERSAMPLING = 3  # cells stay larger than the spacing of the points, so faces are drawn solid

CHAMFER = 0.2  # pixels cut from two corners that meet in one point, where the surface would not be a manifold
TOLERANCES = (0.0, 0.75, 1.0, 1.5, 2.0, 3.0)  # pixels the outline may move; 0.71 flattens the steps of a slanted stroke


def _face_table() -> tuple[np.ndarray, np.ndarray]:
    """Return the points of the six faces of a voxel: offsets (650, 3) as (r, c, z), and face number (650,)."""
    low, high, g5 = [-0.5], [0.5], np.linspace(-0.5, 0.5, 5)
    near, far, g30 = [HALF_DEPTH], [-HALF_DEPTH], np.linspace(-HALF_DEPTH, HALF_DEPTH, 30)
    faces = [(near, g5, g5), (far, g5, g5), (g30, low, g5), (g30, high, g5), (g30, g5, low), (g30, g5, high)]  # z, slowest, r and c
    zrc = [np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3) for axes in faces]
    return np.concatenate(zrc)[:, [1, 2, 0]], np.repeat(np.arange(6), [len(offsets) for offsets in zrc])


_OFFSETS, _FACE_NUMBERS = _face_table()


def gray_image(image: np.ndarray) -> np.ndarray:
    """Put a digit, (28, 28) uint8, in the middle of a (30, 30) black frame; bytes are kept. A UserError names another shape or dtype."""
    if image.shape != (DIGIT_SIZE, DIGIT_SIZE) or image.dtype != np.uint8:
        raise UserError(f"a digit must be a (28, 28) uint8 array, found shape {image.shape} and dtype {image.dtype}")
    return np.pad(image, (FRAME_SIZE - DIGIT_SIZE) // 2)


def digit_to_point_cloud(image: np.ndarray) -> np.ndarray:
    """Turn a digit into the full surface point set of its extrusion, exactly as 3D MNIST does.

    Every non-zero pixel is a box of 1 x 1 x 6; front and back carry 25 points each, every side without a lit neighbour
    carries 150. Lit pixels come in row-major order, faces as front, back, top, bottom, left, right.

    Args:
        image: (28, 28) uint8; every non-zero pixel is lit, whatever its intensity.
    Returns:
        (M, 3) float64 with M = 50 * lit pixels + 150 * exposed sides, zero mean, longest side 1, x = depth, y = right, z = up.
    Raises:
        UserError: on another shape or dtype, or when no pixel is lit.
    """
    lit = gray_image(image) > 0
    rows, cols = np.nonzero(lit)  # row-major
    if len(rows) == 0:
        raise UserError("the digit has no lit pixel: expected at least one non-zero value in the (28, 28) image, found none")
    always = np.ones(len(rows), dtype=bool)
    emitted = np.stack(  # (lit, 6): which faces each lit pixel shows; the zero frame guarantees the neighbours
        [always, always, ~lit[rows - 1, cols], ~lit[rows + 1, cols], ~lit[rows, cols - 1], ~lit[rows, cols + 1]], axis=1
    )
    pixel, template = np.nonzero(emitted[:, _FACE_NUMBERS])
    centres = np.stack([rows, cols, np.zeros_like(rows)], axis=1).astype(np.float64)
    points = centres[pixel] + _OFFSETS[template]
    # The original first subtracts one axis' minimum from all three axes; centring undoes that, so it is left out.
    extent = np.ptp(points, axis=0).max()
    points = (points - points.mean(axis=0)) / extent
    return np.stack([points[:, 2], points[:, 1], -points[:, 0]], axis=1)  # (r, c, z) -> (z, c, -r)


def copper(value: np.ndarray) -> np.ndarray:
    """Map values (...,) in 0..1 to RGB (..., 3) in 0..1, from black to copper (the well-known linear map)."""
    return np.minimum(1.0, value[..., None] * np.array([1.0 / 0.809524, 0.7812, 0.4975]))


def project_rgb(points: np.ndarray) -> np.ndarray:
    """Draw the orthographic projection of a cloud on the plane with normal (1, 0.65, 0).

    This is our reconstruction of the undocumented RGB images of 3D MNIST: colour is the copper map of the projected y
    coordinate (per sample from its minimum to its maximum) on a background of (0.95, 0.95, 0.85). The viewer stands on
    the side of the normal with z up, so the digit is upright and not mirrored. Scale and centre are the same for every
    cloud. Points are marked on a grid `OVERSAMPLING` times finer, which is then averaged.

    Args:
        points: (M, 3) float, the frame of `digit_to_point_cloud`.
    Returns:
        (30, 30, 3) uint8.
    Raises:
        UserError: when points are not a non-empty, finite (M, 3) array.
    """
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0 or not np.isfinite(points).all():
        raise UserError(f"points must be a non-empty (M, 3) array of finite numbers, found shape {points.shape}")
    normal = VIEW_NORMAL / np.linalg.norm(VIEW_NORMAL)
    projected = points - np.outer(points @ normal, normal)
    right = np.cross([0.0, 0.0, 1.0], normal)  # viewer at +normal, z up
    grid = FRAME_SIZE * OVERSAMPLING
    to_cell = grid / (2 * VIEW_HALF_WIDTH)
    col = np.clip(np.floor((projected @ right + VIEW_HALF_WIDTH) * to_cell), 0, grid - 1).astype(np.int64)
    row = np.clip(np.floor((VIEW_HALF_WIDTH - projected[:, 2]) * to_cell), 0, grid - 1).astype(np.int64)
    y = projected[:, 1]
    canvas = np.tile(BACKGROUND, (grid, grid, 1))
    canvas[row, col] = copper((y - y.min()) / max(np.ptp(y), 1e-12))
    cells = canvas.reshape(FRAME_SIZE, OVERSAMPLING, FRAME_SIZE, OVERSAMPLING, 3)
    return np.rint(cells.mean(axis=(1, 3)) * 255).astype(np.uint8)


def colourise(image: np.ndarray) -> np.ndarray:
    """Colour the gray digit itself: copper from left to right on the background of `project_rgb`, blended by intensity.

    The alternative RGB image, made of the handwriting and not of the cloud: (28, 28) uint8 -> (30, 30, 3) uint8.
    """
    ink = gray_image(image)[..., None] / 255.0  # (30, 30, 1)
    colour = copper(np.linspace(0.0, 1.0, FRAME_SIZE))[None]  # (1, 30, 3)
    return np.rint((ink * colour + (1.0 - ink) * BACKGROUND) * 255).astype(np.uint8)


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
    points = digit_to_point_cloud(image)
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
