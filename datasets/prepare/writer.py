"""Writes a prepared data set of digits, in parallel: files, list files and a manifest. Called by the preparation commands."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.lists import default_list_path
from datasets.mesh_faces import MAX_FACES, mesh_to_faces
from datasets.prepare.parallel import run_tasks
from datasets.prepare.shapes.digit import colourise, digit_to_point_cloud, extrude_digit, gray_image, project_rgb
from utils.engine.checkpoint import atomic_write_json, atomic_write_text
from utils.errors import UserError
from utils.modalities import MODALITIES

FOLDERS = {name: MODALITIES[name].folder for name in ("RGBImg", "GrayImg", "PointCloud", "Mesh")}  # what `make_sample` makes
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
            raise UserError(
                f"images, labels and distinct ids must be equally many, found {len(self.images)}, {len(self.labels)} and "
                f"{len(set(self.ids.tolist()))}"
            )

    def sha256(self) -> str:
        """Return the hash of everything this split is made from."""
        parts = (self.images.astype(np.uint8), self.labels.astype(np.int64), self.ids.astype(np.int64))
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class DigitTask:
    """One digit to write: image (28, 28) uint8, seed of its point subset, and its name for messages."""

    name: str
    split: str
    sample_id: int
    image: np.ndarray
    seed: tuple[int, ...]


def sample_name(modality: str, split: str, sample_id: int) -> str:
    """Return the path of one file relative to the data root; it carries no class."""
    suffix = "png" if MODALITIES[modality].kind == "image" else "npy"
    return f"{split}/{FOLDERS[modality]}/{modality}_{split}_{sample_id:06d}.{suffix}"


def make_sample(image: np.ndarray, num_points: int, rgb: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make the four modalities of one digit.

    Args:
        image: (28, 28) uint8.
        num_points: points to keep, drawn without replacement and in random order; 0 keeps all, shuffled.
        rgb: "projection" (of the full cloud) or "colourised" (digit).
        rng: source of the draw.
    Returns:
        "RGBImg" (30, 30, 3) uint8, "GrayImg" (30, 30) uint8, "PointCloud" (n, 3) float32, "Mesh" (F, 18) float32.
    """
    points, _ = digit_to_point_cloud(image)
    keep = min(num_points or len(points), len(points))
    return {
        "RGBImg": project_rgb(points) if rgb == "projection" else colourise(image),
        "GrayImg": gray_image(image),
        "PointCloud": points[rng.permutation(len(points))[:keep]].astype(np.float32),
        "Mesh": mesh_to_faces(*extrude_digit(image, MAX_FACES)),
    }


def write_dataset(
    root: str | Path, dataset: str, splits: dict[str, DigitSplit], *, num_points: int, rgb: str = "projection", seed: int = 0,
    source: str, workers: int = 1,
) -> bool:
    """Write all files of a data set; the lists and then the manifest come last, so that a broken run is never read.

    Everything is first made in `root/.partial` and then moved. A run that was cut off goes on with the digits that are not
    there yet.

    Args:
        root: data folder, made if need be.
        dataset: prefix of the list files.
        splits: "train" and "test".
        num_points, rgb: see `make_sample`.
        seed: of the point subsets; source: one line on the origin, for the manifest; workers: processes.
    Returns:
        False if the same data were there already and nothing was done.
    Raises:
        UserError: on a bad option, or if `root` holds train/ or test/ folders that no preparation made.
    """
    root = Path(root)
    if num_points < 0 or rgb not in RGB_MODES:
        raise UserError(f"expected num_points >= 0 and rgb one of {RGB_MODES}, found {num_points} and {rgb!r}")
    settings = {
        "format": 2, "dataset": dataset, "generator": "datasets.prepare.writer", "source": source, "num_points": num_points, "rgb": rgb,
        "max_faces": MAX_FACES, "seed": seed, "input_sha256": {name: split.sha256() for name, split in splits.items()},
        "counts": {name: len(split.ids) for name, split in splits.items()},
    }
    if _is_complete(root, dataset, settings):
        return False
    _check_root(root)
    staging = root / STAGING
    _open_staging(staging, settings)
    todo = [
        DigitTask(f"{name} digit with id {sample_id}", name, sample_id, image, (seed, number, sample_id))
        for number, (name, split) in enumerate(splits.items())
        for sample_id, image in zip(split.ids.tolist(), split.images, strict=True)
        if not all((staging / sample_name(modality, name, sample_id)).is_file() for modality in FOLDERS)
    ]
    for _ in run_tasks(partial(_write_sample, staging, num_points, rgb), todo, workers):
        pass
    content = {name: _content_hashes(staging, name, split.ids.tolist()) for name, split in splits.items()}
    _publish(root, dataset, splits)
    atomic_write_json(root / MANIFEST, {**settings, "content_sha256": content})
    shutil.rmtree(staging, ignore_errors=True)
    return True


def _open_staging(staging: Path, settings: dict) -> None:
    """Keep what an interrupted run with the same settings has left, else start with empty folders."""
    note = staging / MANIFEST
    if not note.is_file() or json.loads(note.read_text(encoding="utf-8")) != settings:
        shutil.rmtree(staging, ignore_errors=True)
    for split in settings["counts"]:
        for folder in FOLDERS.values():
            (staging / split / folder).mkdir(parents=True, exist_ok=True)
    atomic_write_json(note, settings)


def _write_sample(staging: Path, num_points: int, rgb: str, task: DigitTask) -> None:
    """Write the files of one digit; each appears complete or not at all."""
    try:
        sample = make_sample(task.image, num_points, rgb, np.random.default_rng(task.seed))
    except ValueError as error:
        raise UserError(f"{task.name}: {error}") from error
    for modality, array in sample.items():
        path = staging / sample_name(modality, task.split, task.sample_id)
        unfinished = staging / f"{path.name}.tmp"
        with open(unfinished, "wb") as file:
            np.save(file, array) if path.suffix == ".npy" else Image.fromarray(array).save(file, "PNG")
        os.replace(unfinished, path)


def _content_hashes(staging: Path, split: str, ids: list[int]) -> dict[str, str]:
    """Read all files back; return modality -> sha256 of the arrays in order."""
    hashes = {}
    for modality in FOLDERS:
        digest = hashlib.sha256()
        for sample_id in ids:
            path = staging / sample_name(modality, split, sample_id)
            array = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
            digest.update(array.tobytes())
        hashes[modality] = digest.hexdigest()
    return hashes


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
            raise UserError(
                f"{root / name} exists, but {root} has no {MANIFEST}: it was not made by a preparation command and would be "
                "replaced; choose another --root or move it away"
            )
