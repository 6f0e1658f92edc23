"""Make the `digits` data set from scikit-learn's 1,797 embedded handwritten digits. No download.

python -m datasets.prepare_digits [--root dataset/digits] [--points 1024]
"""

import argparse
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from datasets.mesh_faces import MAX_FACES, mesh_to_faces
from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import SPLITS
from datasets.prepare.parallel import add_writer_options, user_path
from datasets.prepare.shapes.digit import colourise, digit_to_point_cloud, extrude_digit, gray_image, project_rgb
from datasets.prepare.writer import ObjectTask, write_dataset
from utils.errors import UserError

RGB_MODES = ("projection", "colourised")
NUM_TRAIN = 1437
SEED = 0  # of the split and of the points kept
STROKE_THRESHOLD = 0.5  # of the brightest pixel; the recipe lights every non-zero pixel, so the blurred rim must go


@dataclass(frozen=True)
class DigitSplit:
    """Digits of one split: images (N, 28, 28) uint8, labels (N,) int64 for the list files, ids (N,) int64, unique."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def sha256(self) -> str:
        """Return the hash of everything this split is made from."""
        parts = (self.images.astype(np.uint8), self.labels.astype(np.int64), self.ids.astype(np.int64))
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def make_digit(num_points: int, rgb: str, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make the four modalities of the digit `task.image`.

    Args:
        num_points: points to keep, drawn by split and id without replacement and in random order; 0 keeps all, shuffled.
        rgb: "projection" (of the full cloud) or "colourised" (digit).
    Returns:
        "RGBImg" (1, 30, 30, 3) uint8, "GrayImg" (1, 30, 30) uint8, "PointCloud" (n, 3) float32, "Mesh" (F, 18) float32; no facts.
    """
    try:
        points = digit_to_point_cloud(task.image)
    except UserError as error:
        raise UserError(f"{task.name}: {error}") from error
    rng = np.random.default_rng((SEED, SPLITS.index(task.split), task.number))
    keep = min(num_points or len(points), len(points))
    return {
        "RGBImg": (project_rgb(points) if rgb == "projection" else colourise(task.image))[None],
        "GrayImg": gray_image(task.image)[None],
        "PointCloud": points[rng.permutation(len(points))[:keep]].astype(np.float32),
        "Mesh": mesh_to_faces(*extrude_digit(task.image, MAX_FACES)),
    }, {}


def write_digits(
    root: str | Path, dataset: str, splits: dict[str, DigitSplit], *, num_points: int, rgb: str = "projection", source: str,
    workers: int = 1, overwrite: bool = False,
) -> bool:
    """Write all files of a data set of digits, see `write_dataset` and `make_digit`.

    Args:
        root: data folder; dataset: prefix of the list files; splits: "train" and "test"; source: a line on the origin.
    Returns:
        False if the same data were there already and nothing was done.
    """
    if num_points < 0 or rgb not in RGB_MODES:
        raise UserError(f"expected num_points >= 0 and rgb one of {RGB_MODES}, found {num_points} and {rgb!r}")
    settings = {
        "format": 3, "dataset": dataset, "generator": "datasets.prepare.digits", "source": source,
        "modalities": ["RGBImg", "GrayImg", "PointCloud", "Mesh"], "num_points": num_points, "rgb": rgb, "max_faces": MAX_FACES,
        "seed": SEED, "input_sha256": {name: split.sha256() for name, split in splits.items()},
    }
    tasks = [
        ObjectTask(number, f"{name} digit with id {number}", name, label, image=image)
        for name, split in splits.items()
        for number, label, image in zip(split.ids.tolist(), split.labels.tolist(), split.images, strict=True)
    ]
    make = partial(make_digit, num_points, rgb)
    return write_dataset(root, settings, tasks, make, workers=workers, overwrite=overwrite)[0]


def enlarge_digit(image: np.ndarray) -> np.ndarray:
    """Turn an (8, 8) digit with values in 0..16 into MNIST's (28, 28) uint8: three times larger (bicubic), faint pixels black, framed."""
    large = np.asarray(Image.fromarray(image.astype(np.float32)).resize((24, 24), Image.Resampling.BICUBIC))
    large = np.clip(large * (255 / 16), 0, 255)
    large = np.where(large >= STROKE_THRESHOLD * large.max(), large, 0)
    return np.pad(np.rint(large).astype(np.uint8), 2)


def digits_splits() -> dict[str, DigitSplit]:
    """Return the 1,437 training and 360 test digits; the split is a seeded permutation that never sees the labels.

    Ids are positions in scikit-learn's array.
    """
    source = load_digits()
    images = np.stack([enlarge_digit(image) for image in source.images])
    order = np.random.default_rng(SEED).permutation(len(images))
    parts = {"train": np.sort(order[:NUM_TRAIN]), "test": np.sort(order[NUM_TRAIN:])}
    return {name: DigitSplit(images[ids], source.target[ids].astype(np.int64), ids) for name, ids in parts.items()}


def add_digit_options(parser: argparse.ArgumentParser, root: str, points: int) -> None:
    """Add the options of a data set of digits with these defaults."""
    parser.add_argument("--root", type=user_path, default=root, help="where the data set goes")
    parser.add_argument("--points", type=int, default=points, help="points stored per cloud; 0: the full surface, 0.3 MB each")
    parser.add_argument("--rgb", choices=RGB_MODES, default="projection", help="RGBImg shows the cloud or the coloured digit")
    add_writer_options(parser)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_digit_options(parser, "dataset/digits", 1024)
    options = parser.parse_args(arguments)
    write_digits(
        options.root, "digits", digits_splits(), source="sklearn.datasets.load_digits", num_points=options.points,
        rgb=options.rgb, workers=options.workers, overwrite=options.overwrite,
    )
    store_arrays(options.root, "digits")
