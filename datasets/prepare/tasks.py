"""One object to prepare, the making of its files, and its entry in the journal: called by the writer, in its worker processes."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.prepare.ownership import SPLITS
from datasets.prepare.parallel import DIED
from datasets.prepare.shapes.mesh import MeshError
from utils.modalities import MODALITIES


@dataclass(frozen=True)
class ObjectTask:
    """One object to prepare: its number in file names, its name in the source, and where its content comes from.

    Attributes:
        number: unique in its split; name: for messages; split: "train" or "test"; label: for the list files, None for none.
        member: file of its shape, in an archive or a folder; others: the same in other formats.
        cloud: (n, 3) float32 points, z up; image: (28, 28) uint8 digit.
        group: objects of one group go together to the other split where that has no usable object; None: the split is given.
        moved: whether it went there.
    """

    number: int
    name: str
    split: str
    label: int | None
    member: str | None = None
    cloud: np.ndarray | None = None
    image: np.ndarray | None = None
    group: str | None = None
    moved: bool = False
    others: tuple[str, ...] = ()


Make = Callable[[ObjectTask], tuple[dict[str, np.ndarray], dict]]
Records = dict[tuple[str, int], dict]


def printable(name: str) -> str:
    """Return the name of a file with its bytes that are not UTF-8 written as backslash sequences."""
    return os.fsencode(name).decode(errors="backslashreplace")


def files_below(folder: Path, suffixes: Sequence[str] | None = None) -> Iterator[Path]:
    """Yield every file anywhere below a folder, also through links to folders, but no folder twice; hidden ones are ignored.

    Args:
        suffixes: lower-case, of the files wanted in any case, None for all of them.
    """
    seen, folders, links = set(), [folder], []
    while folders or links:
        here = folders.pop() if folders else links.pop(0)  # those reached without a link first: their names count
        if not here.is_dir() or here.resolve() in seen:
            continue
        seen.add(here.resolve())
        inside = sorted(path for path in here.iterdir() if not path.name.startswith("."))
        yield from (path for path in inside if not path.is_dir() and (suffixes is None or path.suffix.lower() in suffixes))
        folders += [path for path in reversed(inside) if path.is_dir() and not path.is_symlink()]
        links += [path for path in inside if path.is_dir() and path.is_symlink()]


def object_file(modality: str, split: str, number: int, view: int = 0) -> str:
    """Return the path of one file relative to the data root; it carries no class. Views after the first have own folders."""
    entry = MODALITIES[modality]
    folder = f"{split}/{entry.folder}" + (f"/view_{view:02d}" if view else "")
    return f"{folder}/{modality}_{split}_{number:06d}.{'png' if entry.kind == 'image' else 'npy'}"


def as_recorded(tasks: Sequence[ObjectTask], records: Records) -> list[ObjectTask]:
    """Return the objects in the splits to which an earlier run has moved their groups."""
    moved = {record["name"]: record["split"] for record in records.values() if record.get("moved")}
    groups = {task.group: moved[task.name] for task in tasks if task.name in moved}
    return [replace(task, split=groups[task.group], moved=True) if task.group in groups else task for task in tasks]


def take_for_empty_split(tasks: Sequence[ObjectTask], records: Records) -> list[ObjectTask]:
    """Take the last group of objects out of the records if all usable ones are of one split; return them as objects of the other."""
    kept = [task for task in tasks if "files" in records.get((task.split, task.number), {})]
    filled, groups = {record["split"] for record in records.values() if "files" in record}, {task.group for task in kept}
    if len(filled) != 1 or None in groups or len(groups) < 2:
        return []
    taken = [task for task in tasks if task.group == kept[-1].group]
    for task in taken:
        del records[task.split, task.number]
    return [replace(task, split=SPLITS[filled == {SPLITS[0]}], moved=True) for task in taken]


def _entry(task: ObjectTask) -> dict:
    return {"number": task.number, "name": task.name, "split": task.split, "label": task.label, **({"moved": True} if task.moved else {})}


def lost(task: ObjectTask) -> dict:
    """Return the journal entry of an object whose process died."""
    return {**_entry(task), "left_out": DIED}


def produce(make: Make, folder: str, task: ObjectTask) -> dict:
    """Make the files of one object and return its journal entry."""
    record = _entry(task)
    try:
        arrays, facts = make(task)
    except MeshError as error:
        return {**record, "left_out": str(error)}
    files = {}
    for modality, array in arrays.items():
        for view, content in enumerate(array if MODALITIES[modality].kind == "image" else array[None]):
            name = object_file(modality, task.split, task.number, view)
            stream, path = io.BytesIO(), Path(folder) / name
            Image.fromarray(content).save(stream, "PNG") if path.suffix == ".png" else np.save(stream, content)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stream.getvalue())
            files[name] = hashlib.sha256(stream.getvalue()).hexdigest()
    return {**record, **facts, "files": files}
