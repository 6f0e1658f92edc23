"""Pictures of objects from a set of cameras: shaded renderings of meshes, shaded splats of point clouds. Used in preparation.

Both kinds share the camera model, the two lights and the white background. Meshes need `requirements-data.txt`.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from datasets.prepare.ownership import required
from datasets.prepare.shapes.looks import Part, put_on
from datasets.prepare.shapes.mesh import MeshError
from utils.errors import UserError

DISTANCE = 4.2  # frames the unit sphere fully at this view angle
VIEW_ANGLE = 30.0
SUPERSAMPLING = 2
ALBEDO = 0.82  # of the gray material: lit faces stay darker than the background
AMBIENT = 0.28
# Directions towards the lights in camera axes (right, up, towards the viewer), with their colours: a warm key, a cool fill.
LIGHTS = (((-0.45, 0.65, 0.60), (0.72, 0.66, 0.55)), ((0.75, 0.10, 0.65), (0.22, 0.30, 0.42)))
LUMINANCE = (0.299, 0.587, 0.114)
NEIGHBOURS = 16  # of the plane fitted to each point
SPLAT_REACH = 1.1  # radius of a splat in units of the spacing around its point
REACH_MARGIN = 1.1  # a disc off the axis looks larger than its radius
WINDOW_VALUES = 2**15  # per array: what the cache holds; larger ones cost page faults
BLEND_DEPTH = 0.06  # splats this close behind the front one are the same surface
DEPTH_SHADE = 0.35  # how much darker the far end of the unit sphere is than the near end
PROBE_SECONDS = 600
RENDER_HELP = (
    "meshes cannot be drawn on this machine ({reason}). Off-screen rendering needs the packages of requirements-data.txt and, "
    "on Linux, EGL from Mesa: apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libx11-6 libxrender1"
)
FIRST_AZIMUTH = 30.0  # degrees


@dataclass(frozen=True)
class Camera:
    """A viewpoint around the object, z up: degrees of azimuth (0 = on +x, towards +y) and of elevation, below 90."""

    azimuth: float
    elevation: float

    def axes(self) -> np.ndarray:
        """Return the (3, 3) rows right, up and towards-the-viewer of the camera, unit vectors in object coordinates."""
        azimuth, elevation = np.radians([self.azimuth, self.elevation])
        viewer = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
        right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
        return np.stack([right, np.cross(viewer, right), viewer])


def ring_of_cameras(count: int = 12, elevation: float = 30.0) -> tuple[Camera, ...]:
    """Return cameras evenly around the object; the default are the 12 views of the multi-view literature.

    The first stands at 30 degrees and not at 0: it is the one view that evaluation reads, and a front view hides more of
    an aligned object than a three-quarter view does.
    """
    if count < 1 or not -90 < elevation < 90:
        raise UserError(f"expected at least one camera and an elevation between -90 and 90, found {count} and {elevation}")
    return tuple(Camera((FIRST_AZIMUTH + 360.0 * number / count) % 360, elevation) for number in range(count))


def luminance(images: np.ndarray) -> np.ndarray:
    """Turn (..., 3) uint8 RGB into (...) uint8 gray, with the weights of Rec. 601."""
    return np.rint(images @ np.array(LUMINANCE)).astype(np.uint8)


def probe_renderer() -> None:
    """Draw one triangle in a child process, because a machine without the graphics libraries may crash the process.

    A UserError says what to install when the child fails.
    """
    code = (
        "import numpy as np; from datasets.prepare.shapes.render import Camera, render_views; "
        "image = render_views([(np.eye(3), np.array([[0, 1, 2]]), None)], [Camera(45, 30)], 16); raise SystemExit(int(image.min() > 250))"
    )
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(RENDER_HELP.format(reason=f"the probe did not finish in {PROBE_SECONDS} s")) from error
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        reason = lines[-1].removeprefix("utils.errors.UserError: ") if lines else f"the probe ended with code {child.returncode}"
        raise UserError(RENDER_HELP.format(reason=reason))


def render_views(parts: Sequence[Part], cameras: Sequence[Camera], size: int) -> np.ndarray:
    """Draw the parts of a mesh, flat-shaded on both sides, off-screen through VTK.

    Args:
        parts: vertices (V, 3) float inside the unit sphere, z up; triangles (T, 3) int; look, None for neutral gray material.
        cameras: at least one viewpoint; size: side of the pictures in pixels.
    Returns:
        (len(cameras), size, size, 3) uint8 on white, of neutral parts R and B apart only through the colours of the lights.
    Raises:
        UserError: naming requirements-data.txt, when pyvista or a library below it is missing.
    """
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
    pyvista = required("pyvista", "drawing meshes")
    side = size * SUPERSAMPLING
    plotter = pyvista.Plotter(off_screen=True, window_size=(side, side), lighting="none")
    try:
        plotter.set_background("white")
        for vertices, triangles, look in parts:
            mesh = pyvista.PolyData.from_regular_faces(vertices, triangles)
            paint = {"color": (ALBEDO,) * 3, **put_on(mesh, look)}
            plotter.add_mesh(mesh, ambient=AMBIENT, diffuse=1.0, specular=0.0, smooth_shading=False, **paint)
        for direction, colour in LIGHTS:
            plotter.add_light(pyvista.Light(position=direction, color=colour, light_type="camera light"))
        plotter.camera.view_angle = VIEW_ANGLE
        plotter.show(auto_close=False)
        views = [_photograph(plotter, camera) for camera in cameras]
    finally:
        plotter.close()
    blocks = np.stack(views).reshape(len(views), size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


def _photograph(plotter, camera: Camera) -> np.ndarray:
    _, up, viewer = camera.axes()
    view = plotter.camera
    view.position, view.focal_point, view.up = tuple(viewer * DISTANCE), (0.0, 0.0, 0.0), tuple(up)
    view.clipping_range = (DISTANCE - 1.5, DISTANCE + 1.5)
    plotter.render()  # a screenshot alone would repeat the last picture
    return np.asarray(plotter.screenshot(return_img=True))[..., :3]


def splat_views(points: np.ndarray, cameras: Sequence[Camera], size: int) -> np.ndarray:
    """Draw a point cloud as opaque shaded discs with a depth buffer; farther discs are darker. Deterministic.

    Args:
        points: (n, 3) float inside the unit sphere, z up, n > `NEIGHBOURS`.
        cameras: at least one viewpoint; size: side of the pictures in pixels.
    Returns:
        (len(cameras), size, size, 3) uint8 on white.
    Raises:
        MeshError: on too few points.
    """
    distinct = np.unique(points, axis=0)  # clouds padded by repeated points would have no spacing
    points = distinct if len(distinct) < len(points) else points
    normals, radii = estimate_surface(points)
    return np.stack([_splat(points, normals, radii, camera.axes(), size) for camera in cameras])


def estimate_surface(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a plane to the neighbourhood of each of (n, 3) points, n > `NEIGHBOURS`.

    Returns:
        Unit normals (n, 3) of arbitrary sign, and the radii (n,) of discs that close the gaps between neighbours.
    Raises:
        MeshError: on too few points.
    """
    if len(points) <= NEIGHBOURS:
        raise MeshError(f"expected more than {NEIGHBOURS} different points to draw, found {len(points)}")
    distances, index = cKDTree(points).query(points, NEIGHBOURS + 1)
    offsets = points[index] - points[index].mean(axis=1, keepdims=True)  # (n, k + 1, 3)
    values, axes = np.linalg.eigh(offsets.transpose(0, 2, 1) @ offsets)
    flatness = np.clip(1 - values[:, 0] / np.maximum(values[:, 1], 1e-12), 0, 1) ** 2
    # Near corners and thin walls single planes are arbitrary: let flat neighbours vote, regardless of the normals' signs.
    outer = flatness[:, None, None] * axes[:, :, :1] @ axes[:, :, :1].transpose(0, 2, 1)
    _, axes = np.linalg.eigh(outer[index].sum(axis=1))
    spacing = distances[:, 1:6].mean(axis=1)
    return axes[:, :, 2], SPLAT_REACH * np.minimum(spacing, 1.5 * np.median(spacing))


def _splat(points: np.ndarray, normals: np.ndarray, radii: np.ndarray, axes: np.ndarray, size: int) -> np.ndarray:
    """Return one (size, size, 3) uint8 view; every pixel's ray is cut with the planes of the discs that may cover it."""
    centres, normals = points @ axes.T, normals @ axes.T  # camera axes; the viewer stands at (0, 0, DISTANCE)
    heights = DISTANCE - centres[:, 2]  # of the viewer above the centres
    offsets = normals[:, 2] * DISTANCE - (normals * centres).sum(axis=1)  # of the viewer from the planes
    normals *= np.where(offsets < 0, -1.0, 1.0)[:, None]
    scale = size / (2 * np.tan(np.radians(VIEW_ANGLE / 2)))  # pixels per unit of slope
    middle = centres[:, :2] / heights[:, None] * scale * (1, -1) + size / 2  # column, row
    reach = REACH_MARGIN * scale * (radii / heights)[:, None]
    first = np.maximum(np.ceil(middle - reach - 0.5), 0).astype(np.int64)
    last = np.minimum(np.floor(middle + reach - 0.5), size - 1).astype(np.int64)
    widths = (last - first).max(axis=1) + 1
    first = np.minimum(first, size - widths[:, None])
    discs = np.column_stack([centres[:, :2], heights, normals, np.abs(offsets), radii])
    fragments = []
    for width in range(1, widths.max() + 1):
        rows, step = np.flatnonzero(widths == width), max(1, WINDOW_VALUES // width**2)
        for part in (rows[start : start + step] for start in range(0, len(rows), step)):
            places, depth, weight, disc = _cut(discs[part], first[part], int(width), scale, size)
            fragments.append((places, depth, weight, part[disc]))
    if not fragments:
        raise MeshError("its points cover no pixel: nearly all lie in one place, and some far from it")
    places, depth, weight, disc = map(np.concatenate, zip(*fragments, strict=True))
    light = np.full((len(normals), 3), AMBIENT)
    for direction, colour in LIGHTS:
        light += np.maximum(normals @ (np.array(direction) / np.linalg.norm(direction)), 0)[:, None] * colour
    return _compose(places, depth, weight, ALBEDO * np.minimum(light, 1.0), disc, size)


def _cut(discs: np.ndarray, first: np.ndarray, width: int, scale: float, size: int) -> tuple[np.ndarray, ...]:
    """Cut the rays through a window of pixels with each disc's plane.

    Args:
        discs: (n, 8) centre x and y, height of the viewer, normal, offset of the viewer from the plane, radius.
        first: (n, 2) column and row of the window's corner; width: its side; scale: pixels per unit of slope.
    Returns:
        For every hit: flat pixel number, depth, weight > 0 and number of the disc, (m,) each.
    """
    x, y, height, normal_x, normal_y, normal_z, offset, radius = (column[:, None, None] for column in discs.T)
    columns, rows = first[:, :1] + np.arange(width), first[:, 1:] + np.arange(width)
    slope_x = ((columns + 0.5 - size / 2) / scale)[:, None, :]
    slope_y = -((rows + 0.5 - size / 2) / scale)[:, :, None]
    facing = slope_x * normal_x + slope_y * normal_y - normal_z  # (n, row, column)
    depth = -offset / np.minimum(facing, -0.05)  # discs seen edge-on keep some depth
    distance = (slope_x * depth - x) ** 2 + (slope_y * depth - y) ** 2 + (height - depth) ** 2  # from the centre, squared
    weight = (1 - distance / radius**2).reshape(-1)
    hit = np.flatnonzero(weight > 0)
    places = (rows[:, :, None] * size + columns[:, None, :]).reshape(-1)
    return places[hit], depth.reshape(-1)[hit], weight[hit], hit // width**2


def _compose(
    places: np.ndarray, depth: np.ndarray, weight: np.ndarray, light: np.ndarray, disc: np.ndarray, size: int
) -> np.ndarray:
    """Blend, in each pixel, the fragments close behind the nearest one; darken with depth; put white elsewhere.

    Args:
        places: (m,) flat pixel numbers; depth: (m,); weight: (m,) > 0; disc: (m,) rows of light (n, 3) in 0..1.
    """
    nearest = np.full(size**2, np.inf)
    np.minimum.at(nearest, places, depth)
    front = np.flatnonzero(depth <= nearest[places] + BLEND_DEPTH)
    places, weight, disc = places[front], weight[front], disc[front]
    fade = 1 - DEPTH_SHADE * np.clip((depth[front] - (DISTANCE - 1)) / 2, 0, 1)
    total = np.bincount(places, weight, size**2)
    drawn, canvas = total > 0, np.ones((size**2, 3))
    for channel in range(3):
        shade = np.bincount(places, weight * (light[disc, channel] * fade), size**2)
        canvas[drawn, channel] = shade[drawn] / total[drawn]
    return np.rint(canvas * 255).astype(np.uint8).reshape(size, size, 3)
