"""datasets/mesh_faces.py, mesh_transforms.py and datasets/prepare/shapes/digit.py: faces against slow loops, hostile meshes and files, transforms, digits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from augmentation import generator, only
from scipy.spatial import cKDTree
from sklearn.datasets import load_digits

from datasets.lists import SampleList
from datasets.mesh_faces import load_faces, mesh_to_faces
from datasets.mesh_transforms import augment_faces, prepare_faces
from datasets.prepare.digits import enlarge_digit
from datasets.prepare.shapes.digit import digit_to_point_cloud, extrude_digit

TETRAHEDRON = (np.array([[0.0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]]), np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))


def corners_of(faces):
    """Absolute corners (..., F, 3, 3) of an array or tensor of faces."""
    return faces[..., None, :3] + faces[..., 3:12].reshape(*faces.shape[:-1], 3, 3)


def batch(count=4):
    vertices, triangles = TETRAHEDRON
    return torch.from_numpy(np.stack([mesh_to_faces(vertices * (1 + m) - m, triangles) for m in range(count)]))


def test_a_tetrahedron_by_hand():
    faces = mesh_to_faces(*TETRAHEDRON)
    assert faces[:, 15:].tolist() == [[2, 3, 1], [0, 3, 2], [1, 3, 0], [0, 2, 1]] and faces.dtype == np.float32
    root = 1 / math.sqrt(3)
    np.testing.assert_allclose(faces[:, 12:15], [[0, 0, -1], [0, -1, 0], [-1, 0, 0], [root, root, root]], atol=1e-7)
    np.testing.assert_allclose(faces[:, :3], [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], atol=1e-6)
    corners = TETRAHEDRON[0][TETRAHEDRON[1]]
    np.testing.assert_allclose(faces[:, 3:12].reshape(4, 3, 3), corners - corners.mean(axis=1, keepdims=True), atol=1e-6)


def test_neighbours_of_a_tangled_mesh_by_loops():
    rng = np.random.default_rng(0)
    triangles = np.array([rng.choice(9, 3, replace=False) for _ in range(60)])  # many edges in three faces and more
    triangles = np.concatenate([triangles, triangles[:3], triangles[3:6, ::-1]])  # repeated and double-sided ones
    found = mesh_to_faces(rng.standard_normal((9, 3)), triangles)[:, 15:]
    for face, triangle in enumerate(triangles):
        for k in range(3):
            edge = {triangle[k], triangle[(k + 1) % 3]}
            others = [f for f, other in enumerate(triangles) if f != face and edge <= set(other)]
            assert found[face, k] == (others[0] if others else face)


def test_faces_without_area_are_dropped_equal_positions_welded_and_narrow_faces_kept():
    vertices, triangles = TETRAHEDRON
    expected = mesh_to_faces(vertices, triangles)
    assert np.array_equal(mesh_to_faces(vertices[triangles].reshape(-1, 3) * [1, 1, -1] * [1, 1, -1], np.arange(12).reshape(4, 3)), expected)
    more = np.concatenate([vertices, [[1.5, 0, 0], [1.5, 1e-7, 0]]])
    thin = [[0, 0, 1], [0, 4, 1], [2, 2, 2], [0, 5, 1]]  # a repeated corner, collinear corners, one point, a needle
    assert np.array_equal(mesh_to_faces(more, np.array([thin[0], triangles[0], thin[1], thin[2], *triangles[1:], thin[3]])), expected)
    small = mesh_to_faces(np.array([[0, 0, 0], [1e-9, 0, 0], [0, 1e-9, 0], [5, 0, 0], [9, 0, 0], [9, 1e-3, 0]]), np.arange(6).reshape(2, 3))
    np.testing.assert_allclose(prepare_faces(torch.from_numpy(small)[None])[0, :, 12:15], [[0, 0, 1], [0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("vertices,triangles,message", [
    (np.zeros((3, 2)), [[0, 1, 2]], r"shapes \(3, 2\)"), (np.zeros((3, 3)), [[0, 1, 2, 0]], r"\(1, 4\)"),
    (np.zeros((3, 3)), np.zeros((0, 3), int), "at least one triangle"), (np.zeros((3, 3)), [[0.0, 1.0, 2.0]], "integer"),
    (np.zeros((3, 3)), [[0, 1, 3]], r"0\.\.2, found \[0 1 3\] in triangle 0"), (np.zeros((3, 3)), [[0, -1, 2]], "found"),
    (np.zeros((0, 3)), [[0, 1, 2]], "triangle 0"), (np.array([[0, 0, 0], [1, np.nan, 0], [2, 0, 0]]), [[0, 1, 2]], "vertex 1"),
    (np.zeros((3, 3)), [[0, 1, 2]], "positive area"),
])
def test_broken_meshes_are_refused(vertices, triangles, message):
    with pytest.raises(ValueError, match=message):
        mesh_to_faces(vertices, np.array(triangles))


def sample_list(folder: Path, *arrays) -> SampleList:
    files = tuple(folder / f"Mesh_train_{i:06d}.npy" for i in range(len(arrays)))
    for file, array in zip(files, arrays):
        np.save(file, array)
    return SampleList(folder / "list.txt", "Mesh", tuple(f.name for f in files), files, tuple(f"{i:06d}" for i in range(len(files))))


def test_loading_pads_with_own_faces_and_fits_the_unit_sphere(tmp_path):
    tetrahedron, single = mesh_to_faces(*TETRAHEDRON), mesh_to_faces(np.array([[7.0, 0, 1], [9, 0, 1], [7, 4, 1]]), np.array([[0, 1, 2]]))
    large = mesh_to_faces(np.random.default_rng(0).random((20, 3)), np.random.default_rng(1).permutation(60).reshape(-1, 3) % 20)
    samples = sample_list(tmp_path, single, tetrahedron, large)
    loaded = load_faces(samples)
    assert loaded.shape == (3, len(large), 18) and loaded.dtype == np.float32
    for before, after in zip((single, tetrahedron, large), loaded):
        own, corners = after[: len(before)], corners_of(after)
        assert {face.tobytes() for face in after} == {face.tobytes() for face in own} and np.array_equal(before[:, 12:], own[:, 12:])
        np.testing.assert_allclose(corners.min((0, 1)) + corners.max((0, 1)), 0, atol=1e-6)
        assert np.linalg.norm(corners, axis=2).max() == pytest.approx(1, abs=1e-6)
        scale = np.ptp(corners_of(before)[..., 0]) / np.ptp(corners[..., 0])
        np.testing.assert_allclose(np.diff(corners_of(before), axis=1), scale * np.diff(corners_of(own), axis=1), atol=1e-5)
    turned = SampleList(samples.path, "Mesh", samples.names[::-1], samples.files[::-1], samples.instance_ids[::-1])
    assert np.array_equal(loaded[::-1], load_faces(turned))  # a row's padding does not depend on its place


def changed(column, value):
    faces = mesh_to_faces(*TETRAHEDRON)
    faces[2, column] = value
    return faces


@pytest.mark.parametrize("array,message", [
    (np.zeros((4, 15), np.float32), r"\(4, 15\)"), (np.zeros((0, 18), np.float32), "1 to 500 faces, found 0"),
    (np.zeros((501, 18), np.float32), "found 501; simplify"), (np.zeros((4, 18), int), "int64"), (changed(0, np.nan), "finite"),
    (changed(16, 4), r"0\.\.3, found .* at face 2"), (changed(15, -1), "at face 2"), (changed(17, 0.5), "at face 2"),
    (changed(slice(3, 12), 1.0), "corners minus centre"),
])
def test_broken_files_are_refused_by_name_and_row(tmp_path, array, message):
    with pytest.raises(ValueError, match=rf"list.txt, row 2: .*Mesh_train_000001.npy.*{message}"):
        load_faces(sample_list(tmp_path, mesh_to_faces(*TETRAHEDRON), array))


def test_evaluation_recomputes_the_normals_and_nothing_else():
    faces = batch()
    turned = faces.clone()
    turned[..., 12:15] *= -3
    torch.testing.assert_close(prepare_faces(turned), faces)
    turned[0, 0, 3:12] = 0
    assert prepare_faces(turned)[0, 0, 12:15].tolist() == [0, 0, 0]


def test_the_starting_corner_turns_with_the_neighbours():
    faces = batch(8)
    result, seen = augment_faces(faces, only(), generator()), set()
    for before, after in zip(faces.flatten(0, 1), result.flatten(0, 1)):
        (start,) = [s for s in range(3) if torch.equal(before[15:].roll(-s), after[15:])]
        torch.testing.assert_close(after[3:12], before[3:12].view(3, 3).roll(-start, 0).flatten())
        seen.add(start)
    assert seen == {0, 1, 2}
    torch.testing.assert_close(result[..., [0, 1, 2, 12, 13, 14]], faces[..., [0, 1, 2, 12, 13, 14]])


def test_one_affine_map_per_mesh_jitter_of_centres_alone_and_normals_of_the_result():
    settings = only(point_rotation_degrees=40.0, point_tilt_degrees=20.0, point_scale=(0.5, 2.0), point_shear=0.3, point_translate=0.2)
    faces = batch()
    result = augment_faces(faces, settings, generator(1)).double()
    maps = []
    for before, after in zip(faces.double(), result):
        known = torch.cat([before[:, :3], torch.ones(4, 1, dtype=torch.float64)], dim=1)
        maps.append(torch.linalg.lstsq(known, after[:, :3]).solution)  # (4, 3), exact for the four centres
        moved = corners_of(before) @ maps[-1][:3] + maps[-1][3]
        for face, corners in enumerate(corners_of(after)):
            assert torch.cdist(moved[face], corners).min(dim=1).values.max() < 1e-4
            normal = torch.linalg.cross(corners[1] - corners[0], corners[2] - corners[0])
            torch.testing.assert_close(after[face, 12:15], normal / normal.norm(), rtol=0, atol=1e-5)
            assert (corners.mean(0) - corners_of(after).mean((0, 1))) @ after[face, 12:15] > 0  # still outward
    assert min((a - b).abs().max() for i, a in enumerate(maps) for b in maps[:i]) > 1e-2
    plain, noisy = (augment_faces(batch(200), only(point_jitter=sigma), generator()) for sigma in (0.0, 0.05))
    torch.testing.assert_close(corners_of(noisy), corners_of(plain), rtol=0, atol=1e-3)
    moves = noisy[..., :3] - plain[..., :3]
    assert moves.std().item() == pytest.approx(0.05, rel=0.1) and moves.std(dim=1).min() > 0


def drawn(*boxes):
    """An image with the given boxes (top, left, bottom, right) lit."""
    image = np.zeros((28, 28), np.uint8)
    for top, left, bottom, right in boxes:
        image[top:bottom, left:right] = 200
    return image


RING = drawn((5, 5, 20, 20))
RING[9:15, 9:15] = 0
ISLAND = RING | drawn((11, 11, 13, 13))
DIAGONAL = drawn((4, 4, 10, 10), (10, 10, 16, 16))
POCKET = drawn((5, 5, 20, 20))
POCKET[5:10, 10:12] = POCKET[10:14, 12:14] = 0  # a bay that meets a hole in one corner
SHAPES = {  # image -> parts, holes, points where squares meet in a corner
    "pixel": (drawn((3, 4, 4, 5)), 1, 0, 0), "full": (drawn((0, 0, 28, 28)), 1, 0, 0), "ring": (RING, 1, 1, 0),
    "island": (ISLAND, 2, 1, 0), "diagonal": (DIAGONAL, 2, 0, 1), "pocket": (POCKET, 1, 0, 1),
    "parts": (drawn((2, 2, 6, 6), (2, 10, 9, 12), (20, 3, 22, 25)), 3, 0, 0),
}


def closed(trimesh, vertices, triangles):
    """The mesh in trimesh's eyes: closed, oriented, no vertex unused or twice."""
    assert len(np.unique(vertices, axis=0)) == len(vertices) and set(triangles.ravel()) == set(range(len(vertices)))
    mesh = trimesh.Trimesh(vertices, triangles, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and len(mesh.edges_unique) * 2 == len(mesh.edges)
    return mesh


def scanned(index):
    """One of scikit-learn's digits in the format of MNIST."""
    return enlarge_digit(load_digits().images[index])


def pixel_side(image):
    """In units of the mesh: one over the longest side of the box around the lit pixels, at least the depth of 6."""
    rows, cols = np.nonzero(image)
    return 1 / max(np.ptp(rows) + 1, np.ptp(cols) + 1, 6)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_with_parts_and_holes_are_watertight(trimesh, name):
    image, parts, holes, contacts = SHAPES[name]
    vertices, triangles = extrude_digit(image)
    mesh = closed(trimesh, vertices, triangles)
    assert mesh.euler_number == 2 * parts - 2 * holes
    assert mesh.volume == pytest.approx(6 * ((image > 0).sum() - contacts * 0.2**2) * pixel_side(image) ** 3)
    assert len(mesh_to_faces(vertices, triangles)) == len(triangles)


def test_real_digits_are_watertight_and_small(trimesh):
    for index in range(0, 1797, 80):
        image = scanned(index)
        vertices, triangles = extrude_digit(image)
        whole, volume = closed(trimesh, vertices, triangles), 6 * (image > 0).sum() * pixel_side(image) ** 3
        assert len(triangles) <= 500 and np.ptp(vertices, axis=0).max() == pytest.approx(1)
        assert whole.volume == pytest.approx(volume, rel=2e-3)
        neighbours = mesh_to_faces(vertices, triangles)[:, 15:]
        assert len(neighbours) == len(triangles) and (neighbours != np.arange(len(triangles))[:, None]).all()  # every edge has one
    for limit in (len(triangles) - 1, len(triangles) // 2):  # a simplified outline stays watertight and close
        mesh = closed(trimesh, *extrude_digit(image, max_faces=limit))
        assert len(mesh.faces) <= limit and mesh.euler_number == whole.euler_number and mesh.volume == pytest.approx(volume, rel=0.15)
    with pytest.raises(ValueError, match=r"needs \d+ faces .* at most 500"):
        extrude_digit((np.indices((28, 28)).sum(0) % 2 * 255).astype(np.uint8))


@pytest.mark.parametrize("index", [0, 5, 8])
def test_the_surface_and_the_point_cloud_coincide(trimesh, index):
    image, rng = scanned(index), np.random.default_rng(0)
    mesh, points = closed(trimesh, *extrude_digit(image)), digit_to_point_cloud(image)
    distances = trimesh.proximity.closest_point_naive(mesh, points[rng.choice(len(points), 150)])[1]
    assert distances.max() < 0.15 * pixel_side(image) and np.median(distances) < 1e-9
    surface = np.einsum("tnc,tcx->tnx", rng.dirichlet([1, 1, 1], size=(len(mesh.faces), 5)), mesh.triangles).reshape(-1, 3)
    # Points are up to 0.25 pixels apart on the caps and 0.25 x 0.21 on the walls.
    assert cKDTree(points).query(surface)[0].max() < 0.2 * pixel_side(image)


def test_a_warped_mesh_stays_closed():
    faces = torch.from_numpy(mesh_to_faces(*TETRAHEDRON))[None]
    warped = augment_faces(faces, only(point_warp=0.1), generator())[0]
    corners = corners_of(warped).flatten(0, 1)
    assert len(torch.unique(corners.mul(1e4).round(), dim=0)) == 4  # corners of neighbours moved alike
    assert not torch.allclose(warped[:, :3], faces[0, :, :3], atol=1e-3)
    torch.testing.assert_close(warped[:, 3:12].unflatten(1, (3, 3)).sum(1), torch.zeros(4, 3), rtol=0, atol=1e-5)
