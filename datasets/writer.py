"""Writes a prepared data set of digits: files, list files and a manifest. Called by the preparation commands."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.lists import default_list_path
from datasets.mnist3d import colourise, digit_to_point_cloud, gray_image, project_rgb
from utils.checkpoint import atomic_write_json, atomic_write_text

FOLDERS = {"RGBImg": "rgb_imgs", "GrayImg": "gray_imgs", "PointCloud": "point_cloud"}
SPLITS = ("train", "test")
RGB_MODES = ("projection", "colourised")
MANIFEST = "manifest.json"
STAGING = ".partial"


@dataclass(frozen=True)
class DigitSplit:
    """Digits of one split: images (N, 28, 28) uint8, labels (N,) int64 for the list files, ids (N,) int64, unique."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.labels) == len(self.ids) == len(set(self.ids.tolist())):
            raise ValueError(
                f"images, labels and distinct ids must be equally many, found {len(self.images)}, {len(self.labels)} and "
                f"{len(set(self.ids.tolist()))}"
            )

    def sha256(self) -> str:
        """Return the hash of everything this split is made from."""
        parts = (self.images.astype(np.uint8), self.labels.astype(np.int64), self.ids.astype(np.int64))
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def sample_name(modality: str, split: str, sample_id: int) -> str:
    """Return the path of one file relative to the data root; it carries no class."""
    suffix = "npy" if modality == "PointCloud" else "png"
    return f"{split}/{FOLDERS[modality]}/{modality}_{split}_{sample_id:06d}.{suffix}"


def make_sample(image: np.ndarray, num_points: int, rgb: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make the three modalities of one digit.

    Args:
        image: (28, 28) uint8.
        num_points: points to keep, drawn without replacement and in random order; 0 keeps all, shuffled.
        rgb: "projection" (of the full cloud) or "colourised" (digit).
        rng: source of the draw.
    Returns:
        "RGBImg" (30, 30, 3) uint8, "GrayImg" (30, 30) uint8, "PointCloud" (n, 3) float32.
    """
    points, _ = digit_to_point_cloud(image)
    keep = min(num_points or len(points), len(points))
    return {
        "RGBImg": project_rgb(points) if rgb == "projection" else colourise(image),
        "GrayImg": gray_image(image),
        "PointCloud": points[rng.permutation(len(points))[:keep]].astype(np.float32),
    }


def write_dataset(
    root: str | Path, dataset: str, splits: dict[str, DigitSplit], *, num_points: int, rgb: str = "projection", seed: int = 0,
    source: str,
) -> bool:
    """Write all files of a data set; the lists and then the manifest come last, so that a broken run is never read.

    Everything is first made in `root/.partial` and then moved. A run that was cut off is simply repeated.

    Args:
        root: data folder, made if need be.
        dataset: prefix of the list files.
        splits: "train" and "test".
        num_points, rgb: see `make_sample`.
        seed: of the point subsets; source: one line on the origin, for the manifest.
    Returns:
        False if the same data were there already and nothing was done.
    Raises:
        ValueError: on a bad option, or if `root` holds train/ or test/ folders that no preparation made.
    """
    root = Path(root)
    if num_points < 0 or rgb not in RGB_MODES:
        raise ValueError(f"expected num_points >= 0 and rgb one of {RGB_MODES}, found {num_points} and {rgb!r}")
    settings = {
        "format": 1, "dataset": dataset, "generator": "datasets.writer", "source": source, "num_points": num_points, "rgb": rgb,
        "seed": seed, "input_sha256": {name: split.sha256() for name, split in splits.items()},
        "counts": {name: len(split.ids) for name, split in splits.items()},
    }
    if _is_complete(root, dataset, settings):
        return False
    _check_root(root)
    staging = root / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    content = {
        name: _write_split(staging, name, split, num_points, rgb, (seed, number))
        for number, (name, split) in enumerate(splits.items())
    }
    _publish(root, dataset, splits)
    atomic_write_json(root / MANIFEST, {**settings, "content_sha256": content})
    shutil.rmtree(staging, ignore_errors=True)
    return True


def _write_split(
    staging: Path, name: str, split: DigitSplit, num_points: int, rgb: str, seed: tuple[int, int]
) -> dict[str, str]:
    """Write the files of one split below `staging`; return modality -> sha256 of the arrays in order."""
    hashes = {modality: hashlib.sha256() for modality in FOLDERS}
    for folder in FOLDERS.values():
        (staging / name / folder).mkdir(parents=True)
    for row, sample_id in enumerate(tqdm(split.ids.tolist(), desc=f"{name} samples", unit="digit")):
        rng = np.random.default_rng([*seed, sample_id])
        try:
            sample = make_sample(split.images[row], num_points, rgb, rng)
        except ValueError as error:
            raise ValueError(f"{name} digit with id {sample_id} (row {row + 1}): {error}") from error
        for modality, array in sample.items():
            path = staging / sample_name(modality, name, sample_id)
            np.save(path, array) if modality == "PointCloud" else Image.fromarray(array).save(path)
            hashes[modality].update(array.tobytes())
    return {modality: value.hexdigest() for modality, value in hashes.items()}


def _publish(root: Path, dataset: str, splits: dict[str, DigitSplit]) -> None:
    """Move the staged folders into place and write the lists; without lists the folder is unreadable meanwhile."""
    (root / MANIFEST).unlink(missing_ok=True)
    lists = {(split, modality): default_list_path(root, dataset, modality, split) for split in splits for modality in FOLDERS}
    for path in lists.values():
        path.unlink(missing_ok=True)
    for name in splits:
        if (root / name).exists():
            shutil.rmtree(root / name)
        os.replace(root / STAGING / name, root / name)
    for (name, modality), path in lists.items():
        pairs = zip(splits[name].ids.tolist(), splits[name].labels.tolist(), strict=True)
        atomic_write_text(path, "".join(f"{sample_name(modality, name, i)} {label}\n" for i, label in pairs))


def _is_complete(root: Path, dataset: str, settings: dict) -> bool:
    if not (root / MANIFEST).is_file():
        return False
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return False
    same = isinstance(manifest, dict) and all(manifest.get(key) == value for key, value in settings.items())
    folders = [(split, modality) for split in settings["counts"] for modality in FOLDERS]
    return same and all(
        default_list_path(root, dataset, modality, split).is_file()
        and sum(1 for _ in (root / split / FOLDERS[modality]).glob("*")) == settings["counts"][split]
        for split, modality in folders
    )


def _check_root(root: Path) -> None:
    ours = (root / MANIFEST).exists() or (root / STAGING).exists()
    for name in SPLITS:
        if (root / name).exists() and not ours:
            raise ValueError(
                f"{root / name} exists, but {root} has no {MANIFEST}: it was not made by a preparation command and would be "
                "replaced; choose another --root or move it away"
            )
