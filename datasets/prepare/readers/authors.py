"""Reads the authors' processed 3D MNIST through its list files and pairs it on object ids, for `datasets.prepare.mnist3d`."""

import os
from pathlib import Path

import numpy as np

from datasets.lists import SampleList, default_list_path, read_labelled_list
from datasets.prepare.ownership import MANIFEST, SPLITS, check_root
from utils.errors import MissingFileError, UserError
from utils.files import atomic_write_json, atomic_write_text
from utils.modalities import MODALITIES

DATASET = "mnist3d"


def join_authors_lists(folder: str | Path, root: str | Path) -> list[str]:
    """Write corrected lists below `root` that point at the authors' files; nothing is copied.

    Args:
        folder: the release's `dataset` folder (or the folder above it), with `mnist3d_*_list.txt`.
    Returns:
        One line per split and modality on the rows that were mispaired.
    Raises:
        UserError: on missing lists or files, different ids or labels among the modalities, or a `root` that holds the lists to
            be read or other data.
    """
    lists = [default_list_path(place, DATASET, "PointCloud", "train") for place in (Path(folder), Path(folder) / "dataset")]
    source, root = next((path.parent for path in lists if path.is_file()), None), Path(root)
    if source is None:
        raise UserError(f"{folder}: expected the authors' lists, e.g. {lists[0].name}")
    if root.resolve() == source.resolve():
        raise UserError(f"--root {root} holds the authors' own lists, which would be overwritten; choose another --root")
    settings = {"format": 1, "dataset": DATASET, "generator": "datasets.prepare.readers.authors"}
    check_root(root, settings, overwrite=False)
    modalities = [name for name in MODALITIES if default_list_path(source, DATASET, name, "train").is_file()]
    if "PointCloud" not in modalities or len(modalities) < 2:
        raise UserError(f"{source}: expected the training lists of the point clouds and of images, found {modalities}")
    joined, report = {}, []
    for split in SPLITS:
        read = {name: _read(source, name, split) for name in modalities}
        joined[split] = _join(read, split)
        report += _report(read, split)
    root.mkdir(parents=True, exist_ok=True)
    (root / MANIFEST).unlink(missing_ok=True)
    for split, rows in joined.items():
        for name, text in rows.items():
            atomic_write_text(default_list_path(root, DATASET, name, split), text)
    counts = {split: len(next(iter(rows.values())).splitlines()) for split, rows in joined.items()}
    atomic_write_json(root / MANIFEST, {**settings, "counts": counts, "pairing": report})
    return report


def _read(source: Path, name: str, split: str) -> tuple[SampleList, np.ndarray]:
    """Read one list; its rows start with ./dataset/, so they are relative to the folder above the lists."""
    path = default_list_path(source, DATASET, name, split)
    try:
        return read_labelled_list(path, modality=name, root=source.resolve().parent, num_classes=10)
    except MissingFileError:
        return read_labelled_list(path, modality=name, root=source, num_classes=10)


def _join(read: dict[str, tuple[SampleList, np.ndarray]], split: str) -> dict[str, str]:
    """Return modality -> text of the list in increasing order of ids."""
    tables = {
        name: {i: (file, label) for i, file, label in zip(rows.instance_ids, rows.files, labels.tolist(), strict=True)}
        for name, (rows, labels) in read.items()
    }
    first, *others = tables
    for name in others:
        odd = sorted(set(tables[first]) ^ set(tables[name]))
        if odd:
            raise UserError(f"{split}: {first} and {name} lists do not hold the same objects; ids in only one: {odd[:5]}")
        odd = [i for i in tables[first] if tables[first][i][1] != tables[name][i][1]]
        if odd:
            raise UserError(f"{split}: {first} and {name} lists give object {odd[0]} different labels")
    order = sorted(tables[first], key=int)
    return {name: "".join(f"{os.path.realpath(table[i][0])} {table[i][1]}\n" for i in order) for name, table in tables.items()}


def _report(read: dict[str, tuple[SampleList, np.ndarray]], split: str) -> list[str]:
    clouds, labels = read["PointCloud"]
    lines = []
    for name, (rows, other) in read.items():
        if name != "PointCloud":
            wrong = sum(a != b for a, b in zip(rows.instance_ids, clouds.instance_ids, strict=True))
            found = f"{wrong} of {len(rows)} rows were mispaired, {(labels != other).sum()} of them across classes"
            lines.append(f"{split} {name}-PointCloud: {found}; joined on id")
    return lines
