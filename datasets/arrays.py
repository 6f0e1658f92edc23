"""Loads the files of a sample list into one array per modality, checking each file. Called by `datasets.samples`."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from datasets.images import image_size, read_image
from datasets.lists import SampleList
from utils.errors import UserError

MAX_POINTS = 2048
LONGEST = 16  # sides: what a picture has beyond that is cut off before it is resized, which would take gigabytes
Allocate = Callable[[tuple[int, ...], type], np.ndarray]


def to_unit_sphere(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Move `centre` (3,) to the origin and scale (n, 3) points so that the largest norm is 1; one repeated point stays at the origin.

    Clouds take their mean, as the networks whose weights they may start from were trained. Meshes take `box_centre`: the mean of
    their vertices would follow how finely each part is cut into faces.
    """
    points = points - centre
    radius = np.linalg.norm(points, axis=1).max()
    return points / radius if radius > 0 else points


def box_centre(points: np.ndarray) -> np.ndarray:
    """Return the (3,) centre of the bounding box of (n, 3) points."""
    return (points.min(axis=0) + points.max(axis=0)) / 2


def load_images(sample_list: SampleList, resize: int, allocate: Allocate = np.empty) -> np.ndarray:
    """Read all images of a list, see `datasets.images`.

    Images that are square, of one size and not larger than `resize` keep their size (they are enlarged on the device
    later); otherwise the shorter side of each becomes `resize` pixels (bilinear) and the centre square is cut out. `allocate` makes
    the array from shape and type.

    Returns:
        (N, 3, S, S) uint8. Of GrayImg, three equal channels: the luminance, so its list may point at colour pictures.
    Raises:
        UserError: on an unreadable or non-8-bit image (names file and row) or resize < 1.
    """
    if resize < 1:
        raise UserError(f"resize must be at least 1 pixel, found {resize}")
    sizes = {_named(sample_list, row, image_size) for row in range(len(sample_list))}
    width, height = next(iter(sizes))
    native = len(sizes) == 1 and width == height <= resize  # a turn by EXIF keeps a square one
    side = width if native else resize
    images = allocate((len(sample_list), 3, side, side), np.uint8)
    for row in range(len(sample_list)):
        image = _named(sample_list, row, read_image)
        image = image.convert("L").convert("RGB") if sample_list.modality == "GrayImg" else image
        images[row] = np.asarray(image if native else _centre_square(image, side)).transpose(2, 0, 1)
    return images


def _named(sample_list: SampleList, row: int, read: Callable[[str], Any]) -> Any:
    """Return read(file of that row); an error gets file and row in front."""
    try:
        return read(sample_list.files[row])
    except UserError as error:
        raise UserError(f"{sample_list.where(row)} is not a readable 8-bit image: {error}") from error


def _centre_square(image: Image.Image, side: int) -> Image.Image:
    cut = [max(0, length - LONGEST * min(image.size)) // 2 for length in image.size]
    image = image.crop((*cut, image.width - cut[0], image.height - cut[1])) if any(cut) else image
    scale = side / min(image.size)
    size = tuple(max(side, round(length * scale)) for length in image.size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def load_points(sample_list: SampleList, max_points: int = MAX_POINTS, allocate: Allocate = np.empty) -> np.ndarray:
    """Read all point clouds of a list, in the unit sphere about their means, with the same number of points each, in any order.

    That number P is the size of the largest cloud, at most `max_points`. The points of a cloud are sorted by coordinates and then
    shuffled, so that one set of points gives the same array however it was stored, and any beginning of it (what evaluation
    takes, see `datasets.transforms.prepare_points`) is a random subset that depends on the instance id, not on the row. Larger
    clouds lose the end, smaller ones repeat.

    Args:
        sample_list: of a modality of kind "points": .npy files of shape (n, 3).
    Returns:
        (N, P, 3) float32.
    Raises:
        UserError: on an unreadable file, another shape or type, an empty cloud, NaN or infinity (names file and row).
    """
    stored = min(max_points, longest(sample_list))
    clouds = allocate((len(sample_list), stored, 3), np.float32)
    for row, instance_id in enumerate(sample_list.instance_ids):
        points = _check_cloud(read_array(sample_list, row), sample_list.where(row))
        points = points[np.lexsort(points.T)]
        points = to_unit_sphere(points, points.mean(axis=0))
        rng = np.random.default_rng([0, zlib.crc32(instance_id.encode())])
        points = points[rng.permutation(len(points))[:stored]]
        clouds[row] = points[np.arange(stored) % len(points)]
    return clouds


def load_vectors(sample_list: SampleList, width: int, allocate: Allocate = np.empty) -> np.ndarray:
    """Read the feature vectors of a list, one .npy file of shape (width,) or, of V views, (V, width) per sample: (N, V, width) float32.

    Raises:
        UserError: on an unreadable file, another shape or type, files of different V, NaN or infinity (names file and row).
    """
    views = 1 if (shape := read_array(sample_list, 0, "r").shape) == (width,) else shape[0] if shape else 1
    rows = allocate((len(sample_list), views, width), np.float32)
    for row in range(len(sample_list)):
        vectors, where = np.atleast_2d(read_array(sample_list, row)), sample_list.where(row)
        if vectors.shape != (views, width) or not views or vectors.dtype.kind not in "fiu":
            wanted = f"{width} numbers (data.features.{sample_list.modality})" + f" of each of {views} views" * (views > 1)
            raise UserError(f"{where}: expected {wanted}, found shape {vectors.shape} and dtype {vectors.dtype}")
        rows[row] = vectors
        if not np.isfinite(rows[row]).all():
            raise UserError(f"{where}: expected finite float32 features, found NaN or infinity")
    return rows


def longest(sample_list: SampleList) -> int:
    """Return the length of the longest array of a list of .npy files, from their headers; at least 1."""
    return max((read_array(sample_list, row, "r").shape or (0,))[0] for row in range(len(sample_list))) or 1


def read_array(sample_list: SampleList, row: int, mmap_mode: str | None = None) -> np.ndarray:
    """Return the one array of a .npy file of a list; a UserError names file and row of one that is none."""
    try:
        array = np.load(sample_list.files[row], mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{sample_list.where(row)} is not a readable .npy array of numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{sample_list.where(row)}: expected one .npy array, found an archive of several")
    return array


def _check_cloud(points: np.ndarray, where: str) -> np.ndarray:
    """Return the points as float64."""
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0 or points.dtype.kind not in "fiu":
        raise UserError(f"{where}: expected numbers of shape (n, 3) with n >= 1, found shape {points.shape} and dtype {points.dtype}")
    points = points.astype(np.float64) + 0.0  # one zero: -0.0 would sort like 0.0 and yet be another number
    bad = np.flatnonzero(~(np.abs(points) <= np.finfo(np.float32).max).all(axis=1))
    if len(bad):
        raise UserError(f"{where}: expected finite float32 coordinates, found {points[bad[0]]} at point {bad[0]} ({len(bad)} such points)")
    return points
