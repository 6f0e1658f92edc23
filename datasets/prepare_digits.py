"""Command: make the `digits` data set from scikit-learn's 1,797 embedded handwritten digits. No download.

python -m datasets.prepare_digits [--root dataset/digits] [--points 1024]
"""

import argparse
import os
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from datasets.prepare.writer import RGB_MODES, DigitSplit, write_dataset
from utils.engine.session import run_command
from utils.errors import UserError

NUM_TRAIN = 1437
SPLIT_SEED = 0
STROKE_THRESHOLD = 0.5  # of the brightest pixel; the recipe lights every non-zero pixel, so the blurred rim must go


def enlarge_digit(image: np.ndarray) -> np.ndarray:
    """Turn an 8x8 digit into the format of MNIST.

    Args:
        image: (8, 8) float, 0..16.
    Returns:
        (28, 28) uint8: enlarged three times (bicubic), pixels below half of the maximum set to zero, framed by 2 pixels.
    Raises:
        UserError: on another shape or values outside 0..16.
    """
    if image.shape != (8, 8) or not (image.min() >= 0 and 0 < image.max() <= 16):
        raise UserError(f"expected an (8, 8) image with values in 0..16 and some ink, found {image.shape}, {image.min()} to {image.max()}")
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
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    parts = {"train": np.sort(order[:NUM_TRAIN]), "test": np.sort(order[NUM_TRAIN:])}
    return {name: DigitSplit(images[ids], source.target[ids].astype(np.int64), ids) for name, ids in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="dataset/digits", help="where the data set goes")
    parser.add_argument("--points", type=int, default=1024, help="points stored per cloud; 0 = the full surface set")
    parser.add_argument("--rgb", choices=RGB_MODES, default="projection", help="what RGBImg shows: the cloud or the coloured digit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    options = parser.parse_args(arguments)
    made = write_dataset(
        options.root, "digits", digits_splits(), num_points=options.points, rgb=options.rgb, source="sklearn.datasets.load_digits",
        workers=options.workers,
    )
    print(f"{options.root}: {'written' if made else 'already prepared, nothing to do'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
