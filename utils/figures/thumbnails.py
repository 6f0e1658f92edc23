"""Small pictures of single samples for people: images as they are, clouds and meshes seen by one and the same camera."""

import numpy as np
from PIL import Image, ImageDraw

from utils.modalities import MODALITIES

YAW, PITCH = np.deg2rad(20), np.deg2rad(12)
CAMERA = np.array([  # rows: towards the camera, right, up; the camera looks along -x, z is up
    [np.cos(PITCH) * np.cos(YAW), -np.cos(PITCH) * np.sin(YAW), np.sin(PITCH)],
    [np.sin(YAW), np.cos(YAW), 0],
    [-np.sin(PITCH) * np.cos(YAW), np.sin(PITCH) * np.sin(YAW), np.cos(PITCH)],
])
LIGHT = np.array([1.0, 0.35, 0.35])  # in the camera's axes: from the viewer, a little from the right and from above
FILL = 0.92  # share of the half side that the farthest point may reach
BALL_RADIUS = 6 / 256  # of a point, as a share of the side
SUPERSAMPLING = 4  # drawn this many times larger and averaged, which smooths the edges


def thumbnail(modality: str, sample: np.ndarray, side: int = 96) -> np.ndarray:
    """Draw one sample of any modality.

    Args:
        modality: key of `MODALITIES`; its kind says what the sample is.
        sample: (3, S, S) uint8 image, (P, 3) points, or (F, 18) faces as in `datasets.mesh_faces`, finite floats; z is up.
        side: of the result in pixels.
    Returns:
        (side, side, 3) uint8.
    """
    draw = {"image": _image_thumbnail, "points": point_cloud_thumbnail, "mesh": mesh_thumbnail}
    return draw[MODALITIES[modality].kind](sample, side)


def _image_thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image; small ones keep their pixels visible."""
    method = Image.Resampling.BILINEAR if image.shape[1] > side else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize((side, side), method))


def point_cloud_thumbnail(points: np.ndarray, side: int = 96) -> np.ndarray:
    """Render a cloud as small shaded balls on white, as `thumbnail`: orthographic, the y-z plane turned slightly, z up, seen from +x."""
    points = np.asarray(points, dtype=np.float64)
    size = SUPERSAMPLING * side
    seen = _to_camera(points)
    columns, rows = _to_pixels(seen, size).T
    depth = _ball_depths(rows, columns, seen[:, 0] * size / 2, size, max(1, round(BALL_RADIUS * size)))
    filled = np.isfinite(depth)
    slope_down, slope_right = np.gradient(np.where(filled, depth, -size))
    normals = np.stack([np.ones_like(depth), -slope_right, slope_down], axis=2)
    colors = _shade(np.where(filled, depth, 0) / size + 0.5, normals)
    return _shrink(np.where(filled[..., None], colors, 255))


def mesh_thumbnail(faces: np.ndarray, side: int = 96) -> np.ndarray:
    """Render a mesh as `point_cloud_thumbnail` does a cloud; far faces are drawn first, near ones over them.

    Both sides of a face are lit alike, since the order of its corners may be arbitrary.
    """
    faces = np.asarray(faces, dtype=np.float64)
    size = SUPERSAMPLING * side
    corners = faces[:, None, :3] + faces[:, 3:12].reshape(-1, 3, 3)
    seen = _to_camera(corners.reshape(-1, 3))
    pixels = _to_pixels(seen, size).reshape(-1, 3, 2)
    depth = seen[:, 0].reshape(-1, 3).mean(axis=1)
    normals = faces[:, 12:15] @ CAMERA.T
    normals *= np.where(normals[:, :1] < 0, -1, 1)  # the side that is seen
    colors = _shade(depth / 2 + 0.5, normals).round().astype(int)
    picture = Image.new("RGB", (size, size), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for face in np.argsort(depth, kind="stable"):
        draw.polygon([tuple(corner) for corner in pixels[face].tolist()], fill=tuple(colors[face].tolist()))
    return _shrink(np.asarray(picture))


def _to_camera(points: np.ndarray) -> np.ndarray:
    """Return (P, 3) near, right, up in [-1, 1]: the bounding box centred, the farthest point at distance 1."""
    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    return points / max(np.linalg.norm(points, axis=1).max(), 1e-12) @ CAMERA.T


def _to_pixels(seen: np.ndarray, size: int) -> np.ndarray:
    """Return (P, 2) column and row in a picture of this side."""
    return size / 2 * (1 + FILL * seen[:, 1:] * [1, -1])


def _shade(closeness: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Return (..., 3) colours in 0..255 from closeness (...), 0 dark to 1 bright, and normals (..., 3) of any length."""
    length = np.maximum(np.linalg.norm(normals, axis=-1), 1e-12)
    light = np.clip(normals @ LIGHT / length, 0, 1)
    tint = np.array([25, 50, 120]) + np.clip(closeness, 0, 1)[..., None] * np.array([90, 140, 130])
    return tint * (0.55 + 0.45 * light[..., None])


def _shrink(picture: np.ndarray) -> np.ndarray:
    """Average blocks of pixels: (size, size, 3) -> (side, side, 3) uint8."""
    side = len(picture) // SUPERSAMPLING
    blocks = picture.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING, 3)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)


def _ball_depths(rows: np.ndarray, columns: np.ndarray, depths: np.ndarray, size: int, radius: int) -> np.ndarray:
    """Depth buffer (size, size) of balls at pixel positions; -inf where there is none."""
    steps = np.arange(-radius, radius + 1)
    down, across = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    inside = down**2 + across**2 <= radius**2
    down, across = down[inside], across[inside]
    bulge = np.sqrt(radius**2 - down**2 - across**2)  # (ball pixels,)
    at_rows = np.clip(rows.round().astype(int)[:, None] + down, 0, size - 1)
    at_columns = np.clip(columns.round().astype(int)[:, None] + across, 0, size - 1)
    buffer = np.full((size, size), -np.inf)
    np.maximum.at(buffer, (at_rows, at_columns), depths[:, None] + bulge)
    return buffer
