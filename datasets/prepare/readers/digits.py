"""Readers of the digits 3D MNIST is made from: MNIST idx files, the Kaggle HDF5 files. Called by `datasets.prepare_mnist3d`."""

import gzip
import warnings
import zlib
from pathlib import Path

import numpy as np

from datasets.prepare.shapes.digit_cloud import DIGIT_SIZE, FRAME_SIZE, digit_to_point_cloud
from datasets.prepare.writer import DigitSplit
from utils.errors import UserError

SPLIT_SIZES = {"train": 5000, "test": 1000}
IDX_STEMS = {"train": "train", "test": "t10k"}
KAGGLE_FILES = {"train": "train_point_clouds.h5", "test": "test_point_clouds.h5"}
CLASS_COUNTS = {
    "train": (479, 563, 488, 493, 535, 434, 501, 550, 462, 495),
    "test": (85, 126, 116, 107, 110, 87, 87, 99, 89, 94),
}
CHECKED_CLOUDS = 20  # per Kaggle file; comparing every cloud would take minutes


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzip-compressed or not.

    Args:
        path: the file; compression is recognised by content.
    Returns:
        uint8 array of the shape in the header.
    Raises:
        UserError: on a wrong magic number, a truncated or too long file, or broken compression.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: truncated or corrupt gzip file ({error}); fetch it again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4 or len(data) < 4 + 4 * data[3]:
        raise UserError(f"{path}: expected an idx file of bytes (magic 00 00 08 0n), found first bytes {data[:4].hex(' ')!r}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=data[3], offset=4))
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(body) != expected:
        raise UserError(f"{path}: header promises {shape} = {expected} bytes, found {len(body)}; the file is damaged, fetch it again")
    return body.reshape(shape)


def _find_idx(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"{folder / name}[.gz] not found: expected the four MNIST files train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        f"t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (.gz or unpacked) in {folder}"
    )


def read_mnist(folder: str | Path, sizes: dict[str, int] | None = None) -> dict[str, DigitSplit]:
    """Read the first digits of MNIST's two halves; the id of a digit is its position in the file.

    Args:
        folder: holds the four idx files.
        sizes: most digits per split, 5,000 and 1,000 by default; a shorter file gives all it has.
    Returns:
        "train" and "test".
    Raises:
        UserError: on a missing or damaged file, or when images and labels do not match.
    """
    splits = {}
    for name, size in (sizes or SPLIT_SIZES).items():
        images_path = _find_idx(Path(folder), f"{IDX_STEMS[name]}-images-idx3-ubyte")
        labels_path = _find_idx(Path(folder), f"{IDX_STEMS[name]}-labels-idx1-ubyte")
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (DIGIT_SIZE, DIGIT_SIZE) or len(images) == 0:
            raise UserError(f"{images_path}: expected images of 28x28, found shape {images.shape}")
        if labels.shape != images.shape[:1] or labels.max() > 9:
            raise UserError(
                f"{labels_path}: expected {len(images)} labels in 0..9, found shape {labels.shape} and maximum {labels.max()}"
            )
        splits[name] = DigitSplit(images[:size], labels[:size].astype(np.int64), np.arange(min(size, len(images))))
    return splits


def download_mnist(folder: str | Path) -> Path:
    """Download MNIST with torchvision and return the folder of its idx files.

    Raises:
        FileNotFoundError: when it cannot be had, with what to fetch and where to put it.
    """
    import torchvision

    try:
        for train in (True, False):
            torchvision.datasets.MNIST(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"MNIST could not be downloaded ({error}). Fetch train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
            "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz by hand, put them into one folder and run "
            "python -m datasets.prepare_mnist3d --mnist FOLDER"
        ) from error
    return Path(folder) / "MNIST" / "raw"


def read_kaggle(folder: str | Path) -> dict[str, DigitSplit]:
    """Read the digits of the Kaggle archive's two point-cloud files; ids are the group numbers, i.e. MNIST indices.

    The clouds are made again by our recipe; the point count of every stored cloud, and the coordinates of the first few,
    are compared with it.

    Raises:
        UserError: on a missing or unreadable file, or content that is not 3D MNIST.
        ImportError: without h5py.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("--kaggle needs h5py: pip install h5py") from error
    splits = {}
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
        points, _ = digit_to_point_cloud(images[-1])
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


def check_class_counts(splits: dict[str, DigitSplit]) -> None:
    """Check that these are the digits of 3D MNIST, by the number of samples of each class.

    A split of another size is a subset or a set of the user's own: that is a warning only.

    Raises:
        UserError: on the official size with other class counts.
    """
    for name, split in splits.items():
        found = tuple(np.bincount(split.labels, minlength=10).tolist())
        if len(split.labels) != SPLIT_SIZES[name]:
            warnings.warn(
                f"{name}: {len(split.labels)} digits, not the {SPLIT_SIZES[name]} of 3D MNIST; results on them are not "
                "comparable with published ones", stacklevel=2,
            )
        elif found != CLASS_COUNTS[name]:
            raise UserError(f"{name}: 3D MNIST has class counts {CLASS_COUNTS[name]}, found {found}: these are other digits")
