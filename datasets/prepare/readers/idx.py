"""MNIST: its idx files, their download, and whether they are the digits of 3D MNIST. Called by `datasets.prepare.mnist3d`."""

import gzip
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from datasets.prepare.digits import DigitSplit
from datasets.prepare.shapes.digit import DIGIT_SIZE
from utils.errors import UserError

SPLIT_SIZES = {"train": 5000, "test": 1000}
IDX_STEMS = {"train": "train", "test": "t10k"}
FILES = tuple(f"{stem}-{kind}-ubyte" for stem in IDX_STEMS.values() for kind in ("images-idx3", "labels-idx1"))
CLASS_COUNTS = {
    "train": (479, 563, 488, 493, 535, 434, 501, 550, 462, 495),
    "test": (85, 126, 116, 107, 110, 87, 87, 99, 89, 94),
}


def read_idx(path: Path) -> np.ndarray:
    """Read one idx file of unsigned bytes, gzip-compressed or not, as a uint8 array of the shape in its header.

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
    raise UserError(f"{folder / name}[.gz] not found: expected the four MNIST files {', '.join(FILES)} (.gz or unpacked) in {folder}")


def read_mnist(folder: str | Path, sizes: Mapping[str, int] = SPLIT_SIZES) -> dict[str, DigitSplit]:
    """Read "train" and "test", the first digits of MNIST's two halves; the id of a digit is its position in the file.

    Args:
        folder: holds the four idx files.
        sizes: most digits per split; a shorter file gives all it has.
    Raises:
        UserError: on a missing or damaged file, or when images and labels do not match.
    """
    splits = {}
    for name, size in sizes.items():
        images_path, labels_path = (_find_idx(Path(folder), file) for file in FILES if file.startswith(IDX_STEMS[name]))
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (DIGIT_SIZE, DIGIT_SIZE) or len(images) == 0:
            raise UserError(f"{images_path}: expected images of 28x28, found shape {images.shape}")
        if labels.shape != images.shape[:1] or labels.max() > 9:
            found = f"found shape {labels.shape} and maximum {labels.max()}"
            raise UserError(f"{labels_path}: expected {len(images)} labels in 0..9, {found}")
        splits[name] = DigitSplit(images[:size], labels[:size].astype(np.int64), np.arange(min(size, len(images))))
    return splits


def download_mnist(folder: str | Path) -> Path:
    """Download MNIST with torchvision and return the folder of its idx files; a UserError says what to fetch where it cannot be had."""
    import torchvision

    try:
        for train in (True, False):
            torchvision.datasets.MNIST(str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"MNIST could not be downloaded ({' '.join(str(error).split())}). Fetch {', '.join(f'{name}.gz' for name in FILES)} "
            "by hand, put them into one folder and run python -m datasets.prepare_mnist3d --mnist FOLDER"
        ) from error
    return Path(folder) / "MNIST" / "raw"


def check_class_counts(splits: dict[str, DigitSplit]) -> None:
    """Check by the number of samples of each class that these are the digits of 3D MNIST.

    A split of another size is a subset or a set of the user's own: that is a warning only. Other class counts are a UserError.
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
