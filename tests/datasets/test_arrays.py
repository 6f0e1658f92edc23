"""Loading images and clouds into arrays: geometry, determinism, and refusal of broken files by name and row."""

import numpy as np
import pytest
from PIL import Image

from datasets.arrays import load_images, load_points
from datasets.lists import SampleList


def as_list(files, modality="RGBImg"):
    root = files[0].parent
    return SampleList(root / "list.txt", modality, tuple(f.name for f in files), tuple(files), tuple(f.stem for f in files))


def save_images(root, *arrays, suffix="png"):
    files = []
    for number, array in enumerate(arrays):
        files.append(root / f"{number}.{suffix}")
        Image.fromarray(array).save(files[-1])
    return as_list(files)


def save_clouds(root, *arrays):
    files = []
    for number, array in enumerate(arrays):
        files.append(root / f"{number}.npy")
        np.save(files[-1], array)
    return as_list(files, "PointCloud")


def test_small_square_images_keep_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    colour, gray = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), rng.integers(0, 256, (6, 6), dtype=np.uint8)
    images = load_images(save_images(tmp_path, colour, gray), 8)
    assert images.shape == (2, 3, 6, 6) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(images[1], np.stack([gray] * 3))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12), (3, 7)])
def test_other_images_are_resized_and_cropped(tmp_path, shape):
    flat = np.full((*shape, 3), 90, dtype=np.uint8)
    assert load_images(save_images(tmp_path, flat), 8).shape == (1, 3, 8, 8)
    assert load_images(save_images(tmp_path, flat, np.full((8, 8, 3), 90, np.uint8)), 8).min() == 90


def test_centre_crop_takes_the_middle(tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    assert load_images(save_images(tmp_path, wide), 8)[0, :, :, 1:-1].min() == 255


def test_broken_images_are_named(tmp_path):
    good = save_images(tmp_path, np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = good.files[1].read_bytes()
    for content in (data[: len(data) // 2], b"no image", b""):
        good.files[1].write_bytes(content)
        with pytest.raises(ValueError, match=r"list.txt, row 2: .*1\.png"):
            load_images(good, 64)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(good.files[1])
    with pytest.raises(ValueError, match="row 2.*8-bit"):
        load_images(good, 64)
    with pytest.raises(ValueError, match="at least 1"):
        load_images(good, 0)


def test_points_unit_sphere(tmp_path):
    cloud = np.random.default_rng(0).normal(3, 5, (40, 3))
    points = load_points(save_clouds(tmp_path, cloud))
    centred = cloud - cloud.mean(0)
    assert points.shape == (1, 40, 3) and points.dtype == np.float32
    np.testing.assert_allclose(points[0], centred / np.sqrt((centred**2).sum(1).max()), atol=1e-6)
    np.testing.assert_allclose(load_points(save_clouds(tmp_path, cloud), unit_sphere=False)[0], cloud, rtol=1e-6)
    assert load_points(save_clouds(tmp_path, np.ones((4, 3)))).tolist() == np.zeros((1, 4, 3)).tolist()


def test_short_clouds_repeat_and_long_ones_are_sampled(tmp_path):
    long, short = np.arange(30.0).reshape(10, 3), np.arange(9.0).reshape(3, 3)
    points = load_points(save_clouds(tmp_path, long, short), max_points=7, unit_sphere=False)
    assert points.shape == (2, 7, 3)
    np.testing.assert_array_equal(points[1], short[[0, 1, 2, 0, 1, 2, 0]])
    rows = points[0, :, 0].astype(int) // 3
    assert len(set(rows)) == 7  # without replacement
    np.testing.assert_array_equal(points[0], long[rows])


def test_sampling_depends_on_the_object_not_on_the_row(tmp_path):
    samples = save_clouds(tmp_path, *np.random.default_rng(0).normal(size=(3, 20, 3)))
    points, turned = load_points(samples, 5), load_points(as_list(samples.files[::-1], "PointCloud"), 5)
    np.testing.assert_array_equal(points, turned[::-1])
    assert (points != load_points(samples, 5, seed=1)).any()


@pytest.mark.parametrize(
    "bad",
    [
        np.array([[0, 0, np.nan]]), np.array([[0, np.inf, 0]]), np.zeros((0, 3)), np.zeros((5, 4)), np.zeros(3), np.zeros((2, 5, 3)),
        np.array([["a", "b", "c"]]), np.zeros((5, 3), dtype=complex),
    ],
)
def test_bad_clouds_are_named(tmp_path, bad):
    samples = save_clouds(tmp_path, np.zeros((5, 3)), bad)
    with pytest.raises(ValueError, match=r"list.txt, row 2: .*1\.npy"):
        load_points(samples)


def test_pickles_archives_and_broken_files_are_refused(tmp_path):
    samples = save_clouds(tmp_path, np.zeros((5, 3)))
    np.save(samples.files[0], np.array([[{}, 1, 2]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="row 1"):
        load_points(samples)
    with open(samples.files[0], "wb") as stream:
        np.savez(stream, a=np.zeros((5, 3)))
    with pytest.raises(ValueError, match="row 1.*archive"):
        load_points(samples)
    for content in (b"", b"\x93NUMPY", b"text"):
        samples.files[0].write_bytes(content)
        with pytest.raises(ValueError, match="row 1"):
            load_points(samples)


def test_coordinates_beyond_float32_are_refused(tmp_path):
    np.save(tmp_path / "cloud_1.npy", np.full((4, 3), 1e300))
    rows = SampleList(tmp_path / "list.txt", "PointCloud", ("cloud_1.npy",), (tmp_path / "cloud_1.npy",), ("1",))
    with pytest.raises(ValueError, match="row 1.*finite float32"):
        load_points(rows)
