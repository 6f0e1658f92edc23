"""Photographs as users have them, and the lists that join them to shapes by nothing but their class. Called by the commands."""

import argparse
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.images import read_image
from datasets.prepare.ownership import SPLITS, list_paths, pairs_path
from datasets.prepare.parallel import DIED, add_writer_options, run_tasks
from datasets.prepare.tasks import ObjectTask, files_below, object_file, printable
from utils.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
TRAINING_SHARE = 0.8
PICTURES = ("RGBImg", "GrayImg")  # both lists name the photographs themselves


@dataclass(frozen=True)
class Item:
    """A photograph or a model; paths are below the folder of its source.

    Attributes:
        name: unique path of the photograph, of the model's OBJ file or, in MI3DOR's track release, of the folder of its views; may be
            printed.
        file: path of the photograph or OBJ file; None for a model without any.
    """

    name: str
    split: str
    label: int
    file: str | None


def find_photographs(root: Path, known: Sequence[str]) -> tuple[list[Item], list[str], list[str]]:
    """List the photographs ROOT/CLASS/*.jpg (also .jpeg, .png, .bmp), 80 % of them for training, in the order of a hash of their names.

    Args:
        known: classes that have shapes; folders of other names are passed over.
    Returns:
        The photographs of both splits; the classes found, in the order of `known`, whose positions are the labels; the other folders.
    Raises:
        UserError: without a folder of a known class, or if one of them is empty.
    """
    folders = sorted(printable(path.name) for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []
    classes = [name for name in known if name in folders]
    if not classes:
        found = ", ".join(folders[:4]) or "none"
        raise UserError(f"--photos {root}: expected folders named after classes such as {', '.join(known[:3])}, found {found}")
    files = [(label, path) for label, name in enumerate(classes) for path in files_below(root / name, IMAGE_SUFFIXES)]
    empty = [name for label, name in enumerate(classes) if label not in {found for found, _ in files}]
    if empty:
        raise UserError(f"--photos {root}: no photograph ({' '.join(IMAGE_SUFFIXES)}) in {', '.join(empty)}; fill or remove the folder")
    names = [path.relative_to(root).as_posix() for _, path in files]
    items = by_name_hash(Item(printable(name), "train", label, name) for name, (label, _) in zip(names, files))
    first_test = round(TRAINING_SHARE * len(items))
    items[first_test:] = [replace(item, split="test") for item in items[first_test:]]
    return items, classes, [name for name in folders if name not in classes]


def by_name_hash(items: Iterable[Item]) -> list[Item]:
    """Sort by the sha256 of the name: an order that tells nothing about the class."""
    return sorted(items, key=lambda item: hashlib.sha256(os.fsencode(item.name)).digest())


def examine_photographs(root: str | Path, images: Sequence[Item], workers: int) -> tuple[dict[str, str], dict[str, str]]:
    """Read every photograph below `root` to its end; return name -> sha256 of the file, and name -> why it cannot be used."""
    hashes, broken = {}, {}
    lost = lambda image: (image.name, "", DIED)
    for name, digest, error in run_tasks(partial(_check_photograph, Path(root).resolve()), images, workers, lost, "photographs"):
        hashes[name] = digest
        broken |= {name: error} if error else {}
    return hashes, broken


def with_copies_together(images: Sequence[Item], hashes: Mapping[str, str]) -> list[Item]:
    """Return photographs with all of one content in the split of the first of them; how many are copies is printed."""
    splits: dict[str, str] = {}
    joined = [replace(image, split=splits.setdefault(hashes[image.name], image.split)) for image in images]
    labels = Counter(digest for digest, _ in {(hashes[image.name], image.label) for image in images})
    if len(splits) < len(images):
        twice = sum(count > 1 for count in labels.values())
        print(f"{len(images) - len(splits)} photographs are copies of others, and lie in their half; {twice} lie in several classes")
    return joined


def _check_photograph(root: Path, image: Item) -> tuple[str, str, str | None]:
    """Return name, sha256, and what is wrong with it, if anything."""
    path, data, error = root / image.file, b"", None
    try:
        _check_path(path)
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.verify()  # checksums of PNG
        read_image(io.BytesIO(data))
    except Exception as failure:  # libraries raise anything on a damaged file
        reason = getattr(failure, "strerror", None) or str(failure) or repr(failure)
        error = re.sub(r" <_io\.BytesIO object at \w+>", "", reason)
    return image.name, hashlib.sha256(data).hexdigest(), error


def _check_path(path: Path) -> None:
    """Raise a UserError for what list files, rows of UTF-8 text, cannot name, and for what is no file."""
    name = os.fsencode(path)
    if b"\n" in name or b"\r" in name:
        raise UserError("its name holds a line break")
    if name.decode(errors="replace") != str(path):
        raise UserError("its name is not UTF-8")
    if not path.is_file():
        raise UserError("no regular file, or a link to nothing")


def draw_of_same_class(images: Sequence[Item], labels: Sequence[int], seed: int) -> list[Item]:
    """Draw one photograph of each label: without replacement within a class, shuffled and started again when it is used up.

    Args:
        images: the photographs to draw from, in any order; labels: of the models to be paired.
    Raises:
        UserError: when a label has no photograph.
    """
    drawn = {}
    for label, count in Counter(labels).items():
        pool = by_name_hash(image for image in images if image.label == label)
        if not pool:
            raise UserError(f"class {label} has {count} training models but no training photograph to pair them with")
        rng = np.random.default_rng([seed, label])
        rounds = [rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))]
        drawn[label] = iter([pool[row] for row in np.concatenate(rounds)])
    return [next(drawn[label]) for label in labels]


def add_pairing_options(parser: argparse.ArgumentParser, dataset: str) -> None:
    """Add what the commands that write such lists share; `dataset` is the prefix of those without pairs."""
    parser.add_argument(
        "--pairing", choices=("none", "class"), default="none",
        help=f"none: unrelated training lists (data set {dataset}); class: rows of one class, made with labels ({dataset}_class)",
    )
    parser.add_argument("--any-counts", action="store_true", help="accept other than the official counts; noted in the manifests")
    add_writer_options(parser)


def paths_of_pairings(root: Path, dataset: str, modality: str) -> list[Path]:
    """Return the lists and manifests of both pairings, which other shapes of this modality outdate."""
    names = (dataset, f"{dataset}_class")
    lists = [path for name in names for path in list_paths(root, name, (*PICTURES, modality)).values()]
    return [*lists, *(pairs_path(root, name) for name in names)]


def joint_lists(
    root: Path, images: Sequence[Item], hashes: Mapping[str, str], tasks: Sequence[ObjectTask], made: Mapping, seed: int | None
) -> tuple[dict[tuple[str, str], str], dict[str, dict[str, int]], dict[str, list[Item]], dict[str, str]]:
    """Make the lists of photographs below `root`, which they name by absolute paths, and of shapes.

    Args:
        hashes: name of a photograph -> sha256; tasks, made: the shapes and their manifest; seed: of class pairs, None for no pairs.
    Returns:
        (modality, split) -> list; split -> modality -> rows; split -> photographs as listed; split -> sha256 of their lines `name sha256`.
    """
    (modality,), left_out = made["modalities"], {entry["name"] for entry in made["left_out"]}
    shapes = [task for task in tasks if task.name not in left_out]
    photographs = {split: by_name_hash(image for image in images if image.split == split) for split in SPLITS}
    if seed is not None:
        print("--pairing class read the class labels to build the training pairs: results with them are not unsupervised")
        photographs["train"] = draw_of_same_class(photographs["train"], [task.label for task in shapes if task.split == "train"], seed)
    texts, digests = {}, {}
    for split, items in photographs.items():
        texts |= dict.fromkeys(((name, split) for name in PICTURES), "".join(f"{root / item.file} {item.label}\n" for item in items))
        rows = (f"{object_file(modality, split, task.number)} {task.label}\n" for task in shapes if task.split == split)
        texts[modality, split] = "".join(rows)
        digests[split] = hashlib.sha256("".join(f"{item.name} {hashes[item.name]}\n" for item in items).encode()).hexdigest()
    counts = {split: {name: texts[name, split].count("\n") for name in (*PICTURES, modality)} for split in SPLITS}
    return texts, counts, photographs, digests
