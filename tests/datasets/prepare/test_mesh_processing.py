"""Surface points, farthest points, simplification, and pictures: cameras, splats and (where VTK works) renderings."""

from pathlib import Path

import numpy as np
import pytest
from conftest import need_data_packages

from datasets.prepare.readers.off import read_off
from datasets.prepare.shapes import mesh as mesh_processing
from datasets.prepare.shapes import render
from datasets.prepare.shapes.mesh import (
    MeshError,
    clean_mesh,
    farthest_points,
    normalise,
    sample_surface,
    silhouette_overlap,
    simplify,
    triangle_areas,
)
from datasets.prepare.shapes.render import Camera, estimate_surface, probe_renderer, render_views, ring_of_cameras, splat_views
from utils.errors import UserError

SAMPLES = Path("../shared/data/modelnet_off_samples")


def grid_mesh(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Waves over the unit square with 2 * side^2 triangles."""
    x, y = (np.indices((side + 1, side + 1)) / side).reshape(2, -1)
    corner = (np.arange(side)[:, None] * (side + 1) + np.arange(side)).ravel()[:, None]
    triangles = np.concatenate([corner + [0, side + 1, side + 2], corner + [0, side + 2, 1]])
    return np.stack([x, y, 0.3 * np.sin(5 * x) * np.cos(4 * y)], axis=1), triangles


def sphere_points(count: int) -> np.ndarray:
    height = 1 - 2 * (np.arange(count) + 0.5) / count  # the golden spiral
    angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
    return np.stack([np.sqrt(1 - height**2) * np.cos(angle), np.sqrt(1 - height**2) * np.sin(angle), height], axis=1)


def test_unit_sphere():
    points = normalise(np.array([[10.0, 0, 0], [14, 0, 0], [10, 2, 0], [11, 1, 0]]))
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    np.testing.assert_allclose((points.min(axis=0) + points.max(axis=0)) / 2, 0, atol=1e-12)
    for bad in (np.zeros((4, 3)), np.full((4, 3), np.nan), np.zeros((0, 3)), np.zeros((4, 2))):
        with pytest.raises(MeshError):
            normalise(bad)


def test_surface_points_follow_the_area():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [8, 0, 0], [5, 2, 0], [9, 9, 9]])
    triangles = np.array([[0, 1, 2], [6, 6, 6], [3, 4, 5]])  # areas 0.5, 0, 3
    points = sample_surface(vertices, triangles, 20_000, seed=3)
    large = points[:, 0] > 2
    assert large.mean() == pytest.approx(3 / 3.5, abs=0.01)
    np.testing.assert_allclose(points[large].mean(axis=0), vertices[[3, 4, 5]].mean(axis=0), atol=0.03)  # uniform inside
    inside = points[~large]
    assert inside.min() >= 0 and inside[:, :2].sum(axis=1).max() <= 1 + 1e-12 and (points[:, 2] == 0).all()
    np.testing.assert_array_equal(points, sample_surface(vertices, triangles, 20_000, seed=3))
    assert (points != sample_surface(vertices, triangles, 20_000, seed=(3, 1))).any()
    with pytest.raises(MeshError, match="none of the 1"):
        sample_surface(vertices, triangles[1:2], 5, seed=0)


def test_farthest_points_against_a_slow_loop():
    points = np.random.default_rng(0).normal(size=(60, 3))
    picked = farthest_points(points, 20, seed=1)
    chosen = [picked[0]]
    for _ in range(19):
        distances = [min(np.linalg.norm(p - c) for c in chosen) for p in points]
        chosen.append(points[int(np.argmax(distances))])
    np.testing.assert_array_equal(picked, chosen)
    np.testing.assert_array_equal(picked[:7], farthest_points(points, 7, seed=1))
    assert len(np.unique(farthest_points(points, 60, seed=0), axis=0)) == 60
    for count in (0, 61):
        with pytest.raises(ValueError, match="1..60"):
            farthest_points(points, count, seed=0)


@pytest.mark.parametrize("side,method", [(4, "none"), (30, "quadric"), (60, "fast+quadric")])  # 32, 1,800 and 7,200 faces
def test_simplification_keeps_a_smooth_surface(side, method):
    need_data_packages("pyvista", "fast_simplification")
    mesh = grid_mesh(side)
    small, record = simplify(*mesh)
    assert len(small[1]) == record["faces_after"] <= 500 and record["faces_before"] == 2 * side**2 and record["method"] == method
    assert record["area_ratio"] == pytest.approx(1, abs=0.03) and record["silhouette"] > 0.9 and not record["flagged"]
    assert record["area_ratio"] == pytest.approx(triangle_areas(*small).sum() / triangle_areas(*mesh).sum(), abs=1e-4)
    flat = mesh[0] * [1, 1, 0]
    assert silhouette_overlap((flat, mesh[1]), (flat * [0.5, 1, 1], mesh[1])) == pytest.approx(0.5, abs=0.06)


def test_a_ruinous_reduction_is_not_accepted(monkeypatch):
    """Ninety boxes far apart: whichever way is taken, the record says what was lost."""
    need_data_packages("pyvista")
    corners = b"0 0 0\n1 0 0\n1 1 0\n0 1 0\n0 0 1\n1 0 1\n1 1 1\n0 1 1\n"
    box, faces = read_off(b"OFF 8 6 0\n" + corners + b"4 0 3 2 1\n4 4 5 6 7\n4 0 1 5 4\n4 1 2 6 5\n4 2 3 7 6\n4 3 0 4 7\n")
    places = np.stack(np.meshgrid(np.arange(10), np.arange(9), [0]), axis=-1).reshape(-1, 1, 3) * 3.0
    vertices = (box + places).reshape(-1, 3)
    triangles = (faces + 8 * np.arange(90)[:, None, None]).reshape(-1, 3)
    small, record = simplify(vertices, triangles)
    assert len(small[1]) <= 500 and record["silhouette"] == round(silhouette_overlap((vertices, triangles), small), 4)
    assert record["flagged"] == (record["area_ratio"] < 0.7 or record["silhouette"] < 0.8)
    monkeypatch.setattr(mesh_processing, "_decimate", lambda *_: None)
    small, record = simplify(vertices, triangles)
    assert 1 <= len(small[1]) <= 500 and record["method"] == "clustering"


def triangle_soup(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Small triangles anywhere in the unit cube, none of which shares a vertex with another."""
    rng = np.random.default_rng(0)
    corners = rng.random((count, 1, 3)) + 0.01 * rng.normal(size=(count, 3, 3))
    return corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3)


@pytest.mark.parametrize("mesh,method,searches", [(grid_mesh(708), "fast+quadric", 0), (triangle_soup(100_000), "clustering", 2)])
def test_no_mesh_is_too_large(monkeypatch, mesh, method, searches):
    """A million faces, and a hundred thousand that fast-simplification cannot reduce: VTK never sees them, few grids are tried."""
    need_data_packages("pyvista", "fast_simplification")
    given, grids = [], []
    decimate, merged = mesh_processing._decimate, mesh_processing._merged
    monkeypatch.setattr(mesh_processing, "_decimate", lambda *mesh: [given.append(len(mesh[1])), decimate(*mesh)][1])
    monkeypatch.setattr(mesh_processing, "_merged", lambda *mesh: [grids.append(mesh[2]), merged(*mesh)][1])
    small, record = simplify(*mesh)
    assert 100 < len(small[1]) <= 500 and record["faces_before"] >= 100_000 and record["method"].startswith(method)
    assert given[0] <= mesh_processing.PRE_FACES and len(grids) <= 6 * searches


def test_bisection_finds_the_finest_grid():
    mesh = grid_mesh(30)
    sizes = {grid: len(mesh_processing._merged(*mesh, grid)[1]) for grid in range(2, 65)}
    finest = max(grid for grid, size in sizes.items() if size <= 500)
    np.testing.assert_array_equal(mesh_processing._cluster(*mesh, 500)[1], mesh_processing._merged(*mesh, finest)[1])
    with pytest.raises(MeshError, match="leaves nothing"):
        mesh_processing._cluster(*mesh, 1)


def test_cameras_and_a_machine_without_graphics(monkeypatch):
    cameras = ring_of_cameras()
    assert [camera.azimuth for camera in cameras] == [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 330, 0]
    assert {camera.elevation for camera in cameras} == {30}
    np.testing.assert_allclose(Camera(0, 0).axes(), [[0, 1, 0], [0, 0, 1], [1, 0, 0]], atol=1e-12)
    for camera in cameras:
        np.testing.assert_allclose(camera.axes() @ camera.axes().T, np.eye(3), atol=1e-12)
        assert np.linalg.det(camera.axes()) == pytest.approx(1) and camera.axes()[1, 2] > 0  # not mirrored, z points up
    for bad in ({"count": 0}, {"elevation": 90}):
        with pytest.raises(UserError, match="at least one camera"):
            ring_of_cameras(**bad)
    monkeypatch.setattr(render.sys, "executable", "false")
    with pytest.raises(UserError, match="requirements-data.txt.*libegl1"):
        probe_renderer()


def ink(image: np.ndarray) -> np.ndarray:
    return (image < 255).any(axis=-1)


def test_splats_lie_on_the_surface_close_it_and_ignore_repeated_points():
    (sphere,) = splat_views(sphere_points(800), [Camera(30, 30)], 48)
    assert np.pi * 20**2 < ink(sphere).sum() < np.pi * 24**2  # a closed disc: radius 48 / (2 * 4.2 * tan 15) = 21.3 pixels
    np.testing.assert_array_equal(sphere, splat_views(np.repeat(sphere_points(800), 8, axis=0), [Camera(30, 30)], 48)[0])
    normals, radii = estimate_surface(sphere_points(600))
    assert np.abs((normals * sphere_points(600)).sum(axis=1)).min() > 0.97
    spacing = np.sqrt(4 * np.pi / 600)
    assert 0.7 * spacing < radii.min() and radii.max() < 1.8 * spacing
    with pytest.raises(MeshError, match="more than 16 different points"):
        splat_views(sphere_points(16), ring_of_cameras(1), 16)


def slow_splat(points: np.ndarray, camera: Camera, size: int) -> np.ndarray:
    """One view by loops: every disc against the ray of every pixel."""
    normals, radii = estimate_surface(points)
    scale, viewer = size / (2 * np.tan(np.radians(15))), np.array([0, 0, render.DISTANCE])
    fragments = {}
    for centre, normal, radius in zip(points @ camera.axes().T, normals @ camera.axes().T, radii, strict=True):
        normal = normal if normal @ (viewer - centre) >= 0 else -normal
        light = sum((max(normal @ np.array(d) / np.linalg.norm(d), 0) * np.array(c) for d, c in render.LIGHTS), np.full(3, render.AMBIENT))
        for row, column in np.ndindex(size, size):
            ray = np.array([(column + 0.5 - size / 2) / scale, (size / 2 - row - 0.5) / scale, -1])
            depth = -(normal @ (viewer - centre)) / min(normal @ ray, -0.05)
            weight = 1 - ((viewer + ray * depth - centre) ** 2).sum() / radius**2
            if weight > 0:
                fade = 1 - render.DEPTH_SHADE * np.clip((depth - render.DISTANCE + 1) / 2, 0, 1)
                fragments.setdefault((row, column), []).append((depth, weight, render.ALBEDO * np.minimum(light, 1) * fade))
    image = np.full((size, size, 3), 255.0)
    for place, found in fragments.items():
        front = [f for f in found if f[0] <= min(g[0] for g in found) + render.BLEND_DEPTH]
        image[place] = 255 * sum(w * c for _, w, c in front) / sum(w for _, w, _ in front)
    return image


@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["few and large discs", "small discs"])
def test_splats_against_slow_loops(spread, monkeypatch):
    monkeypatch.setattr(render, "WINDOW_VALUES", 100)  # several parts of one width
    points = np.concatenate([sphere_points(40), spread * sphere_points(20) * [1, 0.1, 1]])
    for camera in (Camera(30, 30), Camera(200, -40)):
        np.testing.assert_allclose(splat_views(points, [camera], 20)[0], slow_splat(points, camera, 20), atol=0.501)


def test_renderings_agree_with_splats(renderer):
    if not SAMPLES.is_dir():
        pytest.skip(f"{SAMPLES} is not there")
    vertices, triangles = clean_mesh(*read_off((SAMPLES / "bathtub_0002.off").read_bytes()))
    vertices = normalise(vertices)
    cameras = [Camera(30, 30), Camera(100, 30), Camera(270, 10)]
    images = render_views([(vertices, triangles, None)], cameras, 56)
    assert images.shape == (3, 56, 56, 3) and images.dtype == np.uint8 and (images[:, 0, 0] == 255).all()
    assert all((images[i] != images[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))  # every camera took its own picture
    np.testing.assert_array_equal(images[1], render_views([(vertices, triangles, None)], cameras[1:2], 56)[0])
    splats = splat_views(sample_surface(vertices, triangles, 3000, seed=0), cameras, 56)
    for image, splat in zip(images, splats, strict=True):
        both, either = ink(image) & ink(splat), ink(image) | ink(splat)
        assert both.sum() / either.sum() > 0.8


def test_the_five_real_meshes():
    need_data_packages("pyvista", "fast_simplification")
    if not SAMPLES.is_dir():
        pytest.skip(f"{SAMPLES} is not there")
    before = {}
    for path in sorted(SAMPLES.glob("bathtub_*.off")):
        (_, triangles), record = simplify(*read_off(path.read_bytes()))
        before[path.stem[-1]] = record["faces_before"]
        assert 300 < len(triangles) <= 500 and record["area_ratio"] > 0.95 and record["silhouette"] > 0.95
    assert before == {"1": 1969, "2": 332, "3": 15696, "4": 2985, "5": 30722}  # 3,546 ... 30,734 with the double-sided copies
