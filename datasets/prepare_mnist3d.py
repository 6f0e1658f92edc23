"""Command: make the `mnist3d` data set (5,000 / 1,000 digits) from MNIST, from the Kaggle archive or from the authors' folder.

python -m datasets.prepare_mnist3d [--mnist DIR | --kaggle DIR | --authors DIR] [--root dataset/mnist3d] [--points 2048]
"""

import argparse
import os
import sys
from pathlib import Path

from datasets.prepare.readers.authors import join_authors_lists
from datasets.prepare.readers.hdf5 import read_kaggle
from datasets.prepare.readers.idx import check_class_counts, download_mnist, read_mnist
from datasets.prepare.writer import RGB_MODES, write_dataset
from utils.engine.session import run_command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--mnist", metavar="DIR", help="folder with the four MNIST idx files; without a source they are downloaded")
    source.add_argument("--kaggle", metavar="DIR", help="folder with train_point_clouds.h5 and test_point_clouds.h5")
    source.add_argument("--authors", metavar="DIR", help="the `dataset` folder of the authors' release, with its list files")
    parser.add_argument("--root", default="dataset/mnist3d", help="where the data set goes")
    parser.add_argument("--points", type=int, default=2048, help="points stored per cloud; 0 = the full surface set (0.3 MB each)")
    parser.add_argument("--rgb", choices=RGB_MODES, default="projection", help="what RGBImg shows: the cloud or the coloured digit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    if options.authors:
        for line in join_authors_lists(options.authors, options.root):
            print(line)
        return
    if options.kaggle:
        splits, source = read_kaggle(options.kaggle), "Kaggle 3D MNIST point-cloud files"
    else:
        folder = options.mnist or download_mnist(Path(options.root) / "raw")
        splits, source = read_mnist(folder), "MNIST idx files"
    check_class_counts(splits)
    made = write_dataset(
        options.root, "mnist3d", splits, num_points=options.points, rgb=options.rgb, source=source, workers=options.workers
    )
    print(f"{options.root}: {'written' if made else 'already prepared, nothing to do'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
