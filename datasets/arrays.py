"""Loads the files of a sample list into one array per modality, checking each file. Called by `datasets.samples`."""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.lists import SampleList
from utils.errors import UserError

MAX_POINTS = 2048


def load_images(sample_list: SampleList, resize: int) -> np.ndarray:
    """Read all images of a list.

    Images that are square, of one size and not larger than `resize` keep their size (they are enlarged on the device
    later); otherwise the shorter side of each becomes `resize` (bilinear) and the centre square is cut out.

    Args:
        sample_list: of a modality of kind "image".
        resize: side in pixels.
    Returns:
        (N, 3, S, S) uint8. Of GrayImg, three equal channels: the luminance, so its list may point at colour pictures.
    Raises:
        UserError: on an unreadable or non-8-bit image (names file and row) or resize < 1.
    """
    if resize < 1:
        raise UserError(f"resize must be at least 1 pixel, found {resize}")
    sizes = {_with_image(sample_list, row, lambda image: image.size) for row in range(len(sample_list))}
    width, height = next(iter(sizes))
    native = len(sizes) == 1 and width == height <= resize
    side = width if native else resize
    images = np.empty((len(sample_list), 3, side, side), dtype=np.uint8)
    gray = sample_list.modality == "GrayImg"
    for row in range(len(sample_list)):
        images[row] = _with_image(sample_list, row, lambda image: _square(image, None if native else resize, gray))
    return images


def _with_image(sample_list: SampleList, row: int, use):
    """Open the image of one row and return use(image); any failure names file and row."""
    file = sample_list.files[row]
    try:
        with Image.open(file) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{sample_list.path}, row {row + 1}: {file} is not a readable 8-bit image ({error})") from error


def _square(image: Image.Image, resize: int | None, gray: bool) -> np.ndarray:
    """Return (3, S, S) uint8, resized and cropped unless `resize` is None; with `gray`, three times the luminance."""
    if image.mode[0] in "IF":
        raise UserError(f"pixel mode {image.mode}")
    image = image.convert("RGB")
    image = image.convert("L").convert("RGB") if gray else image
    if resize is not None:
        scale = resize / min(image.size)
        size = tuple(max(resize, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - resize) // 2, (size[1] - resize) // 2
        image = image.crop((left, top, left + resize, top + resize))
    return np.asarray(image).transpose(2, 0, 1)


def load_points(
    sample_list: SampleList, max_points: int = MAX_POINTS, seed: int = 0, unit_sphere: bool = True
) -> np.ndarray:
    """Read all point clouds of a list, with the same number of points each.

    That number P is the size of the largest cloud, at most `max_points`. Larger clouds lose a random part (drawn from
    `seed` and the instance id, so the row does not matter); smaller ones repeat their points in order.

    Args:
        sample_list: of a modality of kind "points": .npy files of shape (n, 3).
        max_points: upper limit of P.
        seed: of the draw.
        unit_sphere: move the mean of each stored cloud to the origin and scale its largest norm to 1.
    Returns:
        (N, P, 3) float32.
    Raises:
        UserError: on an unreadable file, another shape or type, an empty cloud, NaN or infinity (names file and row), or
            max_points < 1.
    """
    if max_points < 1:
        raise UserError(f"max_points must be at least 1, found {max_points}")
    clouds = []
    for row, (file, instance_id) in enumerate(zip(sample_list.files, sample_list.instance_ids, strict=True), start=1):
        points = _read_cloud(file, f"{sample_list.path}, row {row}: {file}")
        if unit_sphere:
            points = _to_unit_sphere(points)
        if len(points) > max_points:
            rng = np.random.default_rng([seed, zlib.crc32(instance_id.encode())])
            points = points[rng.choice(len(points), max_points, replace=False)]
        clouds.append(points.astype(np.float32))
    stored = max(len(points) for points in clouds)
    return np.stack([points[np.arange(stored) % len(points)] for points in clouds])


def _read_cloud(file: Path, where: str) -> np.ndarray:
    try:
        points = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{where} is not a readable .npy array of numbers ({error})") from error
    if not isinstance(points, np.ndarray):
        raise UserError(f"{where}: expected one .npy array, found an archive of several")
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0 or points.dtype.kind not in "fiu":
        raise UserError(f"{where}: expected numbers of shape (n, 3) with n >= 1, found shape {points.shape} and dtype {points.dtype}")
    points = points.astype(np.float64)
    bad = np.flatnonzero(~(np.abs(points) <= np.finfo(np.float32).max).all(axis=1))
    if len(bad):
        raise UserError(f"{where}: expected finite float32 coordinates, found {points[bad[0]]} at point {bad[0]} ({len(bad)} such points)")
    return points


def _to_unit_sphere(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(axis=0)
    radius = np.linalg.norm(points, axis=1).max()
    return points / radius if radius > 0 else points  # a cloud of one repeated point stays at the origin
