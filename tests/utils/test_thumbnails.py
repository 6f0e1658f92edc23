"""utils.figures.thumbnails: what is seen, from where, in which order."""

import numpy as np
import pytest

from datasets.mesh_faces import mesh_to_faces
from utils.figures.thumbnails import mesh_thumbnail, point_cloud_thumbnail, thumbnail

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
QUADS = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def box(low, high):
    """Vertices and triangles of a closed box."""
    triangles = [face for a, b, c, d in QUADS for face in ((a, b, c), (a, c, d))]
    return np.array(low) + CORNERS * (np.array(high) - np.array(low)), np.array(triangles)


def join(*meshes):
    starts = np.cumsum([0, *(len(vertices) for vertices, _ in meshes)])
    triangles = [part + start for (_, part), start in zip(meshes, starts)]
    return mesh_to_faces(np.concatenate([vertices for vertices, _ in meshes]), np.concatenate(triangles))


def seen_by_loops(faces, side):
    """Shoot one ray per pixel in float64: (side, side, 3) colours and whether a face was hit, by the nearest hit."""
    yaw, pitch = np.deg2rad(20), np.deg2rad(12)
    towards = np.array([np.cos(pitch) * np.cos(yaw), -np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
    right = np.array([np.sin(yaw), np.cos(yaw), 0])
    up = np.cross(towards, right)
    corners = faces[:, None, :3].astype(np.float64) + faces[:, 3:12].reshape(-1, 3, 3)
    corners -= (corners.min(axis=(0, 1)) + corners.max(axis=(0, 1))) / 2
    corners /= np.linalg.norm(corners, axis=2).max()
    colors, hit = np.full((side, side, 3), 255.0), np.zeros((side, side), bool)
    for row in range(side):
        for column in range(side):
            start = right * ((column + 0.5) / side * 2 - 1) / 0.92 + up * (1 - (row + 0.5) / side * 2) / 0.92
            best = -np.inf
            for a, b, c in corners:
                matrix = np.stack([b - a, c - a, -towards], axis=1)
                if abs(np.linalg.det(matrix)) < 1e-9:
                    continue
                u, v, distance = np.linalg.solve(matrix, start - a)
                if u >= 0 and v >= 0 and u + v <= 1 and distance > best:
                    best = distance
                    normal = np.cross(b - a, c - a) / np.linalg.norm(np.cross(b - a, c - a))
                    normal = normal if normal @ towards >= 0 else -normal
                    light = np.clip(normal @ (towards + 0.35 * right + 0.35 * up), 0, 1)
                    closeness = ((a + b + c) / 3) @ towards / 2 + 0.5
                    colors[row, column] = (np.array([25, 50, 120]) + closeness * np.array([90, 140, 130])) * (0.55 + 0.45 * light)
                    hit[row, column] = True
    return colors, hit


def inner(hit, colors):
    """Pixels whose neighbours show the same face: away from every edge."""
    same = np.ones_like(hit)
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
        same &= (np.roll(colors, shift, axis=(0, 1)) == colors).all(axis=2)
    return same


THICK_L = join(box([-0.4, -0.6, -1], [0.4, 0.1, 1]), box([-0.4, 0.1, -1], [0.4, 0.9, -0.3]))
TWO_BOXES = join(box([-0.2, -0.5, -0.5], [0, 0.5, 0.5]), box([0.5, -0.2, -0.2], [0.7, 0.2, 0.2]))


@pytest.mark.parametrize("faces", [THICK_L, TWO_BOXES])
def test_a_mesh_is_what_rays_hit_first(faces):
    side = 28
    expected, hit = seen_by_loops(faces, side)
    image = mesh_thumbnail(faces, side)
    compared = inner(hit, expected)
    assert (compared & hit).sum() > 40 and (compared & ~hit).sum() > 100
    assert np.abs(expected - image)[compared].max() <= 2


def test_pictures_ignore_position_and_scale_and_a_mesh_its_order_and_the_side_of_its_normals():
    far, near = box([-1.1, -1, -1], [-1, 1, 1]), box([1, -1, -1], [1.1, 1, 1])
    image, moved = mesh_thumbnail(join(near, far)).astype(int), join(far, near)
    moved[::2, 12:15] *= -1
    assert np.array_equal(mesh_thumbnail(moved), image)
    moved[:, :3] = 40 * moved[:, :3] + [3, -7, 5]
    moved[:, 3:12] *= 40
    assert np.abs(mesh_thumbnail(moved) - image).mean() < 0.2
    points = np.random.default_rng(1).normal(size=(50, 3))
    assert np.abs(point_cloud_thumbnail(points).astype(int) - point_cloud_thumbnail(1000 * points + [5, -7, 3])).max() <= 1
    assert (point_cloud_thumbnail(np.zeros((1, 3))) < 255).any()


def test_a_cloud_is_upright_and_not_mirrored():
    generator = np.random.default_rng(0)
    bar = np.stack([np.zeros(300), np.zeros(300), np.linspace(-1, 1, 300)], axis=1)
    foot = np.stack([np.zeros(150), np.linspace(0, 0.8, 150), np.full(150, -1.0)], axis=1)  # an L: towards +y, at the bottom
    image = point_cloud_thumbnail(np.concatenate([bar, foot]) + 0.01 * generator.normal(size=(450, 3)), 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    dark = image.mean(axis=2) < 200
    columns = np.nonzero(dark.any(axis=0))[0]
    rows = np.nonzero(dark.any(axis=1))[0]
    middle, center = (rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2
    assert dark[middle:, center + 1 :].sum() > 20 and dark[:middle, center + 1 :].sum() == 0
    assert (image[0] == 255).all() and (image[:, 0] == 255).all()


def test_images_are_enlarged_by_pixels_and_shrunk_smoothly():
    image = np.random.default_rng(0).integers(0, 256, size=(3, 8, 8), dtype=np.uint8)
    assert np.array_equal(thumbnail("RGBImg", image, 24), np.kron(image.transpose(1, 2, 0), np.ones((3, 3, 1), np.uint8)))
    assert np.array_equal(thumbnail("GrayImg", image, 8), image.transpose(1, 2, 0))
    board = (np.indices((64, 64)).sum(axis=0) % 2 * np.full((3, 1, 1), 255)).astype(np.uint8)
    assert np.abs(thumbnail("RGBImg", board, 8).astype(int) - 127).max() <= 8
