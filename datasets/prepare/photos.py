"""Make a data set of photographs and of ModelNet's shapes of the same classes, where nothing but the class joins the two.

python -m datasets.prepare_photos --photos DIR --npz modelnet40_points.npz [--root dataset/photos_modelnet40] [--pairing class|none]
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import SPLITS, check_root, publish_lists
from datasets.prepare.parallel import user_path
from datasets.prepare.photographs import (
    IMAGE_SUFFIXES,
    add_pairing_options,
    examine_photographs,
    find_photographs,
    joint_lists,
    paths_of_pairings,
    with_copies_together,
)
from datasets.prepare.readers.modelnet import OFFICIAL, check_official, make_tasks, read_npz
from datasets.prepare.tasks import files_below, printable
from datasets.prepare.writer import SKIPPED, ObjectTask, write_dataset, write_skipped
from utils.errors import UserError

DATASET, GENERATOR = "photos_modelnet40", "datasets.prepare_photos"


def make_cloud(task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Return the cloud of a task as it is, and no facts."""
    return {"PointCloud": task.cloud}, {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", metavar="DIR", type=user_path, required=True, help="DIR/CLASS/*.jpg, only read")
    parser.add_argument("--npz", metavar="FILE", type=user_path, required=True, help="modelnet40_points.npz")
    parser.add_argument("--root", type=user_path, default=Path("dataset") / DATASET, help="where lists and clouds go")
    add_pairing_options(parser, DATASET)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    source = read_npz(options.npz)
    is_official = check_official(source, options.any_counts)
    official, shown = list(OFFICIAL[source.dataset]), {shape.object_class for shape in source.shapes}
    photographs, classes, others = find_photographs(options.photos, [name for name in official if name in shown])
    labels = {official.index(name): label for label, name in enumerate(classes)}
    tasks = [replace(task, label=labels[task.label]) for task in make_tasks(source) if task.label in labels]
    settings = {
        "format": 1, "dataset": DATASET, "generator": GENERATOR, "modalities": ["PointCloud"], "official_counts": is_official,
        "classes": classes, "input_sha256": {"objects": source.sha256},
    }
    check_root(options.root, settings, options.overwrite)
    hashes, broken = examine_photographs(options.photos, photographs, options.workers)
    kept = with_copies_together([item for item in photographs if item.name not in broken], hashes)
    if {item.split for item in kept} != {*SPLITS}:
        raise UserError(f"--photos {options.photos}: {len(kept)} photographs, whose contents leave one half empty; add some")
    lost = [name for label, name in enumerate(classes) if label not in {item.label for item in kept}]
    if lost:
        raise UserError(f"--photos {options.photos}: no photograph of {', '.join(lost)} can be read; fetch them again or remove the folder")
    _, made = write_dataset(
        options.root, settings, tasks, make_cloud, workers=options.workers, overwrite=options.overwrite,
        dependents=paths_of_pairings(options.root, DATASET, "PointCloud"),
    )
    by_class = options.pairing == "class"
    texts, counts, _, digests = joint_lists(options.photos.resolve(), kept, hashes, tasks, made, 0 if by_class else None)
    dataset = f"{DATASET}_class" if by_class else DATASET
    manifest = {
        "format": 1, "dataset": dataset, "generator": GENERATOR, "pairing": options.pairing,
        **({"uses_labels_for_training_pairs": True} if by_class else {}), "counts": counts, "photographs_sha256": digests,
    }
    publish_lists(options.root, manifest, texts, options.overwrite)
    store_arrays(options.root, dataset)
    write_skipped(options.root / SKIPPED, dict(sorted(broken.items())))
    print(f"{len(kept)} photographs of {len(classes)} classes, {len(broken)} skipped, with their reasons in {options.root / SKIPPED}")
    _report_passed_over(options.photos, classes, others)


def _report_passed_over(root: Path, classes: list[str], folders: list[str]) -> None:
    if folders:
        print(f"folders without shapes, passed over: {', '.join(folders)}")
    suffixes = Counter(printable(path.suffix.lower()) for name in classes for path in files_below(root / name))
    kinds = sorted(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    if kinds:
        print("files of other kinds, passed over:", ", ".join(f"{suffixes[suffix]} {suffix or 'without suffix'}" for suffix in kinds))
