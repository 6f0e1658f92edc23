"""Reads the digits of the Kaggle archive of 3D MNIST from its HDF5 files. Called by `datasets.prepare.mnist3d`."""

from pathlib import Path

import numpy as np

from datasets.prepare.digits import DigitSplit
from datasets.prepare.ownership import required
from datasets.prepare.shapes.digit import FRAME_SIZE, digit_to_point_cloud
from utils.errors import UserError

KAGGLE_FILES = {"train": "train_point_clouds.h5", "test": "test_point_clouds.h5"}
CHECKED_CLOUDS = 20  # per file; comparing every cloud would take minutes


def read_kaggle(folder: str | Path) -> dict[str, DigitSplit]:
    """Read the digits of the Kaggle archive's two point-cloud files; ids are the group numbers, i.e. MNIST indices.

    The clouds are made again by our recipe; the point count of every stored cloud, and the coordinates of the first few,
    are compared with it.

    Raises:
        UserError: on a missing or unreadable file, content that is not 3D MNIST, or without h5py.
    """
    h5py, splits = required("h5py", "--kaggle"), {}
    for name, file_name in KAGGLE_FILES.items():
        path = Path(folder) / file_name
        if not path.is_file():
            raise UserError(f"{path} not found: expected {' and '.join(KAGGLE_FILES.values())} of the 3D MNIST archive")
        try:
            with h5py.File(path, "r") as archive:
                splits[name] = _read_groups(archive, path)
        except (OSError, KeyError) as error:
            raise UserError(f"{path}: not a readable 3D MNIST file ({error}); fetch it again") from error
    return splits


def _read_groups(archive, path: Path) -> DigitSplit:
    odd = [key for key in archive if not key.isdigit()]
    if odd or not len(archive):
        raise UserError(f"{path}: expected one group per digit named by its number, found {odd[:3] or 'no group'}")
    images, labels, ids = [], [], sorted(int(key) for key in archive)  # the file itself sorts them as strings
    for number, key in enumerate(ids):
        group = archive[str(key)]
        where = f"{path}, group {key}"
        images.append(_bytes_of(group["img"][()], where))
        labels.append(int(group.attrs["label"]))
        if not 0 <= labels[-1] <= 9:
            raise UserError(f"{where}: expected a label in 0..9, found {labels[-1]}")
        points = digit_to_point_cloud(images[-1])
        stored = group["points"]
        if stored.shape != points.shape:
            raise UserError(f"{where}: the recipe gives points of shape {points.shape}, the file holds {stored.shape}")
        if number < CHECKED_CLOUDS and not np.allclose(stored[()], points, atol=1e-6):
            raise UserError(f"{where}: the stored points differ from the recipe by up to {np.abs(stored[()] - points).max():.3g}")
    return DigitSplit(np.stack(images), np.array(labels, dtype=np.int64), np.array(ids, dtype=np.int64))


def _bytes_of(image: np.ndarray, where: str) -> np.ndarray:
    """Return the (28, 28) uint8 digit of a stored (30, 30) image whose values are bytes / 256."""
    if image.shape != (FRAME_SIZE, FRAME_SIZE):
        raise UserError(f"{where}: expected img of shape (30, 30), found {image.shape}")
    values = np.asarray(image, dtype=np.float64) * 256
    whole = np.rint(values)
    if not np.isfinite(values).all() or np.abs(values - whole).max() > 1e-3 or whole.min() < 0 or whole.max() > 255:
        raise UserError(f"{where}: expected img values k/256 with k in 0..255, found {image.min()} to {image.max()}")
    if whole.sum() != whole[1:-1, 1:-1].sum():
        raise UserError(f"{where}: expected a one-pixel border of zeros around the digit")
    return whole[1:-1, 1:-1].astype(np.uint8)
