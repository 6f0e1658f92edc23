"""The digit-to-surface recipe against a slow reference, hand-worked cases and the published counts of 3D MNIST."""

from pathlib import Path

import numpy as np
import pytest

from datasets.prepare.shapes.digit import colourise, digit_to_point_cloud, project_rgb

MNIST = Path(__file__).resolve().parents[4] / "shared" / "data" / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.is_dir(), reason="the real MNIST idx files are not in ../shared/data/mnist")


def reference(image: np.ndarray) -> np.ndarray:
    """The recipe as written, with loops, the scaling step that subtracts one minimum from all axes, and a rotation matrix."""
    padded = np.zeros((30, 30))
    padded[1:29, 1:29] = image
    g5, g30, points = np.linspace(-0.5, 0.5, 5), np.linspace(-3, 3, 30), []
    for r in range(30):
        for c in range(30):
            if not padded[r, c]:
                continue
            faces = [([3.0], g5, g5), ([-3.0], g5, g5)]
            faces += [(g30, [-0.5], g5)] if not padded[r - 1, c] else []
            faces += [(g30, [0.5], g5)] if not padded[r + 1, c] else []
            faces += [(g30, g5, [-0.5])] if not padded[r, c - 1] else []
            faces += [(g30, g5, [0.5])] if not padded[r, c + 1] else []
            points += [(r + dr, c + dc, z) for zs, rs, cs in faces for z in zs for dr in rs for dc in cs]
    points = np.array(points)
    extents = points.max(0) - points.min(0)
    axis = int(np.argmax(extents))
    points = (points - points[:, axis].min()) / extents[axis]
    points -= points.mean(0)
    return points @ np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]])  # rows (r, c, z) -> (z, c, -r)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_loop_reference(seed):
    rng = np.random.default_rng(seed)
    image = np.zeros((28, 28), dtype=np.uint8)
    image[seed * 20 : seed * 20 + 8, :5] = rng.integers(1, 256, (8, 5)) * (rng.random((8, 5)) < 0.6)  # touches the border
    points = digit_to_point_cloud(image)
    assert points.dtype == np.float64
    np.testing.assert_allclose(points, reference(image), atol=1e-13)


def ink(rgb: np.ndarray) -> np.ndarray:
    return np.abs(rgb.astype(int) - rgb[0, 0].astype(int)).sum(-1) > 60


def test_projection_is_upright_not_mirrored_and_copper():
    image = np.zeros((28, 28), dtype=np.uint8)
    image[4:24, 6:8] = image[22:24, 6:20] = 200  # an L: stem left, foot right and below
    rgb = project_rgb(digit_to_point_cloud(image))
    assert rgb.shape == (30, 30, 3) and rgb.dtype == np.uint8
    assert tuple(rgb[0, 0]) == (242, 242, 217)
    mask = ink(rgb)
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert rows[-1] - rows[0] >= 20  # fills the frame
    assert mask[rows[2]].sum() < mask[rows[-2]].sum()  # foot below
    assert mask[:, cols[1]].sum() > mask[:, cols[-2]].sum()  # stem left
    inside = [rgb[rows[-3], col].sum() for col in cols[1:-1]]
    assert inside == sorted(inside) and inside[0] < 150 < 400 < inside[-1]  # dark on the left, copper on the right


def test_projection_ignores_point_order_and_bad_clouds_and_images_are_refused():
    image = np.zeros((28, 28), dtype=np.uint8)
    image[3, 3] = 255
    assert np.argwhere(ink(colourise(image))).tolist() == [[4, 4]]
    image[3:5, 4] = 1
    points = digit_to_point_cloud(image)
    assert (ink(project_rgb(points[::-1])) == ink(project_rgb(points))).all()
    for bad in (np.zeros((0, 3)), np.zeros((4, 2)), np.full((4, 3), np.nan)):
        with pytest.raises(ValueError, match="points must be"):
            project_rgb(bad)
    for bad in (np.zeros((28, 28), np.uint8), np.ones((30, 30), np.uint8), np.ones((28, 28))):
        with pytest.raises(ValueError, match="lit pixel|uint8"):
            digit_to_point_cloud(bad)


@needs_mnist
def test_published_counts():
    from datasets.prepare.readers.idx import check_class_counts, read_mnist

    splits = read_mnist(MNIST)
    check_class_counts(splits)
    count = lambda split, row: len(digit_to_point_cloud(splits[split].images[row]))
    assert [count("train", row) for row in range(2)] == [25_700, 26_200]
    assert [count("test", row) for row in range(5)] == [19_000, 25_050, 11_900, 25_250, 21_600]
    assert (count("test", 918), count("test", 876)) == (9_700, 34_800)
    points = digit_to_point_cloud(splits["train"].images[0])
    assert len(np.unique(points.round(9), axis=0)) == 18_770
    np.testing.assert_allclose(np.ptp(points, axis=0)[0], 0.3)
    lit = np.pad(splits["test"].images, ((0, 0), (1, 1), (1, 1))) > 0
    sides = sum((lit & ~np.roll(lit, shift, axis)).sum() for shift in (1, -1) for axis in (1, 2))
    assert 50 * lit.sum() + 150 * sides == 21_950_350  # all 1,000 test digits, counted without the recipe
