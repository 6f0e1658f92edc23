"""Make the `mnist3d` data set (5,000 / 1,000 digits) from MNIST, from the Kaggle archive or from the authors' folder.

python -m datasets.prepare_mnist3d [--mnist DIR | --kaggle DIR | --authors DIR] [--root dataset/mnist3d] [--points 2048]
"""

import argparse

from datasets.prepare.digits import add_digit_options, write_digits
from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import check_root
from datasets.prepare.parallel import user_path
from datasets.prepare.readers.authors import join_authors_lists
from datasets.prepare.readers.hdf5 import read_kaggle
from datasets.prepare.readers.idx import check_class_counts, download_mnist, read_mnist


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources, folder = parser.add_mutually_exclusive_group(), {"metavar": "DIR", "type": user_path}
    sources.add_argument("--mnist", **folder, help="folder with the four MNIST idx files; without a source they are downloaded")
    sources.add_argument("--kaggle", **folder, help="folder with train_point_clouds.h5 and test_point_clouds.h5")
    sources.add_argument("--authors", **folder, help="the `dataset` folder of the authors' release, with its list files")
    add_digit_options(parser, "dataset/mnist3d", 2048)
    options = parser.parse_args(arguments)
    if options.authors:
        print(*join_authors_lists(options.authors, options.root), sep="\n")
        return store_arrays(options.root, "mnist3d")
    if options.kaggle:
        splits, source = read_kaggle(options.kaggle), "Kaggle 3D MNIST point-cloud files"
    else:
        check_root(options.root, {"dataset": "mnist3d"}, overwrite=False)  # before anything is downloaded into it
        splits, source = read_mnist(options.mnist or download_mnist(options.root / "raw")), "MNIST idx files"
    check_class_counts(splits)
    write_digits(
        options.root, "mnist3d", splits, num_points=options.points, rgb=options.rgb, source=source, workers=options.workers,
        overwrite=options.overwrite,
    )
    store_arrays(options.root, "mnist3d")
