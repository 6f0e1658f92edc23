"""Make a data set of photographs and of ModelNet's shapes of the same classes, where nothing but the class joins the two.

python -m datasets.prepare_photos --photos DIR --npz modelnet40_points.npz [--root dataset/photos_modelnet40] [--pairing class|none]
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import SPLITS, check_root, list_paths, pairs_path, publish_lists
from datasets.prepare.parallel import add_writer_options, user_path
from datasets.prepare.readers.mi3dor import IMAGE_SUFFIXES, Item, by_name_hash, draw_of_same_class, examine_photographs, files_below
from datasets.prepare.readers.modelnet import OFFICIAL, check_official, make_tasks, read_npz
from datasets.prepare.writer import SKIPPED, ObjectTask, object_file, report, write_dataset, write_skipped
from utils.errors import UserError

DATASET, GENERATOR, TRAINING_SHARE = "photos_modelnet40", "datasets.prepare_photos", 0.8
PICTURES = ("RGBImg", "GrayImg")  # both lists name the photographs themselves


def find_photographs(root: Path, known: Sequence[str]) -> tuple[list[Item], list[str], list[str]]:
    """List the photographs ROOT/CLASS/*.jpg (also .jpeg, .png, .bmp), 80 % of them for training, in the order of a hash of their names.

    Args:
        known: classes that have shapes; folders of other names are passed over.
    Returns:
        The photographs of both splits; the classes found, in the order of `known`, whose positions are the labels; the other folders.
    Raises:
        UserError: without a folder of a known class, or if one of them is empty.
    """
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []
    classes = [name for name in known if name in folders]
    if not classes:
        found = ", ".join(folders[:4]) or "none"
        raise UserError(f"--photos {root}: expected folders named after classes such as {', '.join(known[:3])}, found {found}")
    files = [(label, path) for label, name in enumerate(classes) for path in files_below(root / name, IMAGE_SUFFIXES)]
    empty = [name for label, name in enumerate(classes) if label not in {found for found, _ in files}]
    if empty:
        raise UserError(f"--photos {root}: no photograph ({' '.join(IMAGE_SUFFIXES)}) in {', '.join(empty)}; fill or remove the folder")
    names = [path.relative_to(root).as_posix() for _, path in files]
    items = by_name_hash(Item(name, "train", label, name) for name, (label, _) in zip(names, files))
    first_test = round(TRAINING_SHARE * len(items))
    items[first_test:] = [replace(item, split="test") for item in items[first_test:]]
    return items, classes, [name for name in folders if name not in classes]


def make_cloud(task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Return the cloud of a task as it is, and no facts."""
    return {"PointCloud": task.cloud}, {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", metavar="DIR", type=user_path, required=True, help="DIR/CLASS/*.jpg, only read")
    parser.add_argument("--npz", metavar="FILE", type=user_path, required=True, help="modelnet40_points.npz")
    parser.add_argument("--root", type=user_path, default=Path("dataset") / DATASET, help="where lists and clouds go")
    parser.add_argument(
        "--pairing", choices=("none", "class"), default="none",
        help=f"none: unrelated training lists (data set {DATASET}); class: rows of one class, made with labels ({DATASET}_class)",
    )
    parser.add_argument("--any-counts", action="store_true", help="accept other than the official counts of shapes; noted in the manifest")
    add_writer_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    source = read_npz(options.npz)
    difference = check_official(source, hdf5=False)
    if difference and not options.any_counts:
        raise UserError(f"{difference}; fetch the complete set, or accept it as it is with --any-counts")
    official, shown = list(OFFICIAL[source.dataset]), {shape.object_class for shape in source.shapes}
    photographs, classes, others = find_photographs(options.photos, [name for name in official if name in shown])
    labels = {official.index(name): label for label, name in enumerate(classes)}
    tasks = [replace(task, label=labels[task.label]) for task in make_tasks(source) if task.label in labels]
    settings = {
        "format": 1, "dataset": DATASET, "generator": GENERATOR, "modalities": ["PointCloud"], "official_counts": difference is None,
        "classes": classes, "input_sha256": {"objects": source.sha256},
    }
    check_root(options.root, settings, options.overwrite)
    hashes, broken = examine_photographs(options.photos, photographs, options.workers)
    kept = [item for item in photographs if item.name not in broken]
    lost = [name for label, name in enumerate(classes) if label not in {item.label for item in kept}]
    if lost:
        raise UserError(f"--photos {options.photos}: no photograph of {', '.join(lost)} can be read; fetch them again or remove the folder")
    paired = f"{DATASET}_class"
    lists = (list_paths(options.root, DATASET, PICTURES), list_paths(options.root, paired, (*PICTURES, "PointCloud")))
    made, manifest = write_dataset(
        options.root, settings, tasks, make_cloud, workers=options.workers, overwrite=options.overwrite,
        dependents=[*(path for paths in lists for path in paths.values()), *(pairs_path(options.root, name) for name in (DATASET, paired))],
    )
    report(options.root, made, manifest)
    left_out = {entry["name"] for entry in manifest["left_out"]}
    _publish(options, kept, hashes, [task for task in tasks if task.name not in left_out])
    write_skipped(options.root / SKIPPED, dict(sorted(broken.items())))
    print(f"{len(kept)} photographs of {len(classes)} classes, {len(broken)} skipped, with their reasons in {options.root / SKIPPED}")
    if others:
        print(f"folders without shapes, passed over: {', '.join(others)}")


def _publish(options: argparse.Namespace, kept: Sequence[Item], hashes: dict[str, str], shapes: Sequence[ObjectTask]) -> None:
    """Write the lists of photographs, with class pairs those of shapes too, and their manifest."""
    root, photographs = options.photos.resolve(), {split: [item for item in kept if item.split == split] for split in SPLITS}
    clouds = {split: [task for task in shapes if task.split == split] for split in SPLITS}
    manifest = {"format": 1, "dataset": DATASET, "generator": GENERATOR, "pairing": options.pairing}
    if options.pairing == "class":
        manifest |= {"dataset": f"{DATASET}_class", "uses_labels_for_training_pairs": True}
        photographs["train"] = draw_of_same_class(photographs["train"], [task.label for task in clouds["train"]], seed=0)
        print("--pairing class read the class labels to build the training pairs: results with them are not unsupervised")
    texts, manifest["counts"], manifest["photographs_sha256"] = {}, {}, {}
    for split, items in photographs.items():
        texts |= dict.fromkeys(((name, split) for name in PICTURES), "".join(f"{root / item.file} {item.label}\n" for item in items))
        if options.pairing == "class":
            rows = (f"{object_file('PointCloud', split, task.number)} {task.label}\n" for task in clouds[split])
            texts["PointCloud", split] = "".join(rows)
        manifest["counts"][split] = {**dict.fromkeys(PICTURES, len(items)), "PointCloud": len(clouds[split])}
        lines = "".join(f"{item.name} {hashes[item.name]}\n" for item in items)
        manifest["photographs_sha256"][split] = hashlib.sha256(lines.encode()).hexdigest()
    publish_lists(options.root, manifest, texts, options.overwrite)
    store_arrays(options.root, manifest["dataset"])
