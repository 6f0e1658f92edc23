"""Any collection of 3D models: what a folder or an archive of meshes holds, and its splits. Called by `datasets.prepare.objects`."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from datasets.prepare.ownership import SPLITS
from datasets.prepare.readers.objects import FORMATS, is_cloud, read_archive
from datasets.prepare.tasks import ObjectTask, files_below, printable
from utils.errors import UserError

HALVES = {*SPLITS, "val", "valid", "validation"}


@dataclass(frozen=True)
class Item:
    """One object of a collection.

    Attributes:
        name: unique, for messages; place: path of its file, or its row in an archive; sha256: of the file.
        object_class: of its folder, if it lies in one; split: "train" or "test", if the collection says so.
        is_cloud: whether it has points alone; reason: why it cannot be taken, if that is known before it is read.
        original: name of the first one of the same content, of files; others: files of other formats, to be read where this cannot be.
    """

    name: str
    place: str
    sha256: str
    object_class: str | None
    split: str | None = None
    is_cloud: bool = False
    reason: str | None = None
    original: str | None = None
    others: tuple["Item", ...] = ()


def read_folder(folder: Path) -> tuple[list[Item], list[str]]:
    """List the models below a folder: FILE, CLASS/FILE, {train,test}/CLASS/FILE or CLASS/{train,test}/FILE, in any case.

    Returns:
        The objects, and in words what is passed over: files of other kinds, by suffix, and class folders without a model.
    Raises:
        UserError: when there is none, or train/ and test/ lie among others.
    """
    files = list(files_below(folder))
    paths = [path for path in files if path.suffix.lower() in FORMATS]
    if not paths:
        raise UserError(f"{folder}: expected files {' '.join(FORMATS)} in it or in class folders, found none")
    names = [printable(path.relative_to(folder).as_posix()) for path in paths]
    places = [tuple(name.split("/")[:-1]) for name in names]
    levels = [{place[depth].lower() if len(place) > depth else "" for place in places} for depth in (0, 1)]
    depth = next((depth for depth, level in enumerate(levels) if set(SPLITS) <= level), None)
    _check_root(folder, places, levels[0], depth)
    if depth is not None and levels[depth] != set(SPLITS):
        others = ", ".join(sorted(f"{name}/" if name else "files" for name in levels[depth] - set(SPLITS)))
        where = f"{folder} holds" if depth == 0 else f"the class folders of {folder} hold"
        raise UserError(f"{where} train/, test/ and {others}; expected these two alone, or none of them")
    items = []
    for path, name, place in zip(paths, names, places, strict=True):
        split = None if depth is None else place[depth].lower()
        classes = place if depth is None else (*place[:depth], *place[depth + 1 :])
        items.append(_examine(Item(name, str(path), "", classes[0] if classes else None, split)))
    suffixes = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in FORMATS)
    passed_over = [f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(suffixes.items())]
    filled = {above for path in paths for above in path.parents}
    folders = sorted(path for level in ("*", "*/*")[: 1 if depth is None else 2] for path in folder.glob(level) if path.is_dir())
    bare = [path.relative_to(folder) for path in folders if path not in filled and path.parent in {folder, *filled}]
    passed_over += [f"the folder {printable(path.as_posix())}, without a model" for path in bare if path.name[0] != "."]
    return _with_originals(_of_one_format(items)), passed_over


def _check_root(folder: Path, places: list[tuple[str, ...]], first: set[str], depth: int | None) -> None:
    """Refuse a folder above or beside the one that is meant, whose halves or whose own name would pass for classes."""
    deeper = {place[2].lower() if len(place) > 2 else "" for place in places}
    if len(first) == 1 and first != {""} and ((depth == 1 and deeper != {""}) or (depth is None and deeper == set(SPLITS))):
        inner = folder / Path(places[0][0])
        raise UserError(f"{folder} holds {inner.name}/ alone, with train/ and test/ or class folders with these in it: give --root {inner}")
    if depth is None and first <= HALVES:
        names = ", ".join(f"{name}/" for name in sorted(first))
        raise UserError(f"{folder} holds {names}; expected train/ and test/, or class folders: rename them, or give --root one of them")


def remarks(items: Sequence[Item], classes: Sequence[str], entries: Collection[Mapping]) -> list[str]:
    """Say what makes scores of a finished data set worthless, copies or classes in the wrong halves, and how many objects are neutral.

    Args:
        entries: of its journal.
    """
    found, splits, kept = [], {}, {entry["name"] for entry in entries if "files" in entry}
    for item in (item for item in items if item.split and item.name in kept):
        splits.setdefault(item.original, []).append(item.split)
    copies = sum(halves.count("test") for halves in splits.values() if set(halves) == set(SPLITS))
    if copies:
        found.append(f"content of training objects in the test half, {copies} times: scores will count what was learned by heart")
    labels = {split: {entry["label"] for entry in entries if entry["split"] == split and "files" in entry} for split in SPLITS}
    for split in SPLITS:
        bare = [name for label, name in enumerate(classes) if label not in labels[split]]
        if bare:
            found.append(f"{len(bare)} of {len(classes)} classes have no {split} object: {', '.join(bare[:8])}{', ...' * (len(bare) > 8)}")
    if len(classes) == 1:
        found.append("one class alone, so every score will be 100 %: does --root lie a folder too high?")
    neutral = sum("neutral" in entry for entry in entries)
    if neutral:
        found.append(f"{neutral} objects have no colour or texture that was found, and are drawn neutral")
    return found


def _examine(item: Item) -> Item:
    """Return it with the sha256 of its file and what that is, or the reason why it cannot be a model."""
    path = Path(item.place)
    if not path.is_file():
        return replace(item, reason="no regular file, or a link to nothing")
    try:
        data = path.read_bytes()
        buffers = [buffer.read_bytes() for buffer in _buffers(path, data)]
    except OSError as error:
        return replace(item, reason=f"cannot be read: {error.strerror}")
    reason = None if data else "an empty file"
    return replace(item, sha256=hashlib.sha256(b"".join([data, *buffers])).hexdigest(), is_cloud=is_cloud(path, data), reason=reason)


def _buffers(path: Path, data: bytes) -> list[Path]:
    """Return the files beside a GLTF file that hold its shape; none where it is damaged."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        if path.suffix.lower() == ".gltf":
            files = [path.parent / unquote(buffer.get("uri", "")) for buffer in json.loads(data)["buffers"]]
            return [file for file in files if os.path.isfile(file)]
    return []


def _of_one_format(items: list[Item]) -> list[Item]:
    """Take one format alone of those of one name in one folder: two could put one object into both splits."""
    stem, groups = (lambda item: Path(item.place).with_suffix("")), {}
    for item in sorted(items, key=lambda item: FORMATS.index(Path(item.place).suffix.lower())):
        if not item.reason:
            groups.setdefault(stem(item), []).append(item)
    found = []
    for item in items:
        taken, *others = groups.get(stem(item), [item])
        if item is taken:
            item = replace(item, others=tuple(other for other in others if other.is_cloud == item.is_cloud))
        elif not item.reason:
            item = replace(item, reason=f"the same name in the same folder as {taken.name}, which is taken; read where that cannot be")
        found.append(item)
    return found


def _with_originals(items: list[Item]) -> list[Item]:
    """Name the original of each: of objects that share the content of a file, in any of their formats, the first."""
    first: dict[str, str] = {}
    for item in (item for item in items if not item.reason):
        hashes = [file.sha256 for file in (item, *item.others)]
        known = {first[digest] for digest in hashes if digest in first}
        name = min(known, default=item.name)
        if len(known) > 1:
            first = {digest: name if other in known else other for digest, other in first.items()}
        first |= dict.fromkeys(hashes, name)
    return [replace(item, original=first.get(item.sha256)) for item in items]


def read_npz(path: Path) -> list[Item]:
    """List the meshes of an archive, with the arrays `NPZ_ARRAYS`.

    `vertices` (V, 3) int16 in units of 1 / 30000, `faces` (F, 3) into those of their mesh, `vertex_offset` and `face_offset`
    (N + 1,), `label` (N,) into `classes`, `instance_id` (N,); the last two of text, bytes or integers.

    Raises:
        UserError: when it is missing, damaged, or its arrays are of other types or do not fit together.
    """
    arrays, digest = read_archive(path), hashlib.sha256(path.read_bytes()).hexdigest()
    for name, array in arrays.items():
        _check_array(path, name, array)
    ids, names = _texts(arrays["instance_id"]).tolist(), _texts(arrays["classes"])
    for offsets, rows in (("vertex_offset", "vertices"), ("face_offset", "faces")):
        found, shape = arrays[offsets], arrays[rows].shape
        if len(found) != len(ids) + 1 or (found[1:] < found[:-1]).any() or (found[0], found[-1], 3) != (0, *shape):
            raise UserError(f"{path}: expected {offsets} of {len(ids)} meshes over {rows} (n, 3), found {found.shape} over {shape}")
    labels = arrays["label"].tolist()
    if len(set(ids)) < len(ids) or len(labels) != len(ids) or not set(labels) <= set(range(len(names))):
        raise UserError(f"{path}: expected different instance_id, and for each a label that is a position in classes")
    return [Item(name, str(row), digest, str(names[label])) for row, (name, label) in enumerate(zip(ids, labels, strict=True))]


def _check_array(path: Path, name: str, array: np.ndarray) -> None:
    expected, kinds = "integers of at most 63 bits", "iu"
    if name in ("vertices", "classes", "instance_id"):
        expected, kinds = ("numbers", "iuf") if name == "vertices" else ("text, bytes or integers", "USiu")
    ndim, wide = 2 if name in ("vertices", "faces") else 1, kinds == "iu" and not np.can_cast(array.dtype, np.int64)
    if array.dtype.kind not in kinds or array.ndim != ndim or wide:
        raise UserError(f"{path}: expected {name} of {expected} in {ndim} dimension{'s'[: ndim - 1]}, found {array.dtype} {array.shape}")


def _texts(array: np.ndarray) -> np.ndarray:
    return np.char.decode(array, "utf-8", "backslashreplace") if array.dtype.kind == "S" else array.astype(str)


def make_tasks(items: Sequence[Item], share: float, labelled: bool, least: int) -> tuple[list[ObjectTask], list[str], dict[str, str]]:
    """Number, split and label the objects of a collection.

    Numbers, and a split that the collection lacks, follow the hash of the name, not the class; copies of one file stay in one split.

    Args:
        share: of the training split; labelled: whether class folders are labels; least: objects of a class that is kept.
    Returns:
        All objects; the classes, in the order of their labels; and name -> why an object is left out.
    """
    original = lambda item: item.original or item.name
    stem = lambda name: name.rsplit(".", 1)[0] if name.lower().endswith(FORMATS) else name  # rows of an archive have no suffix
    ordered = sorted(items, key=lambda item: hashlib.sha256(stem(original(item)).encode()).digest())
    clouds = mostly_clouds(items)
    reasons = {item.name: reason for item in ordered if (reason := _reason(item, clouds, labelled))}
    usable = [item for item in ordered if item.name not in reasons]
    sizes = Counter(item.object_class for item in usable)
    labels = {name: label for label, name in enumerate(sorted(name for name in sizes if sizes[name] >= least))} if labelled else {}
    first_test = min(max(round(share * len(usable)), 1), len(usable) - 1)
    splits = {original(item): "test" for item in usable[-1:]}  # neither split is empty while two contents differ
    for place, item in enumerate(usable):
        splits.setdefault(original(item), "train" if place < first_test else "test")
        if labelled and item.object_class not in labels:
            reasons[item.name] = f"class {item.object_class} has {sizes[item.object_class]} objects, --min-class-size is {least}"
    return [
        ObjectTask(
            number, item.name, item.split or splits.get(original(item), "train"), labels.get(item.object_class), item.place,
            others=tuple(other.place for other in item.others), group=None if item.split else original(item),
        )
        for number, item in enumerate(ordered)
    ], list(labels), reasons


def _reason(item: Item, clouds: bool, labelled: bool) -> str | None:
    """Return why an object cannot be taken, as far as it can be said of it alone."""
    if item.reason:
        return item.reason
    if item.is_cloud != clouds:
        return "a point cloud among meshes" if item.is_cloud else "a mesh among point clouds"
    return "in no class folder; --labels none takes it" if labelled and item.object_class is None else None


def mostly_clouds(items: Sequence[Item]) -> bool:
    """Whether more of the usable objects are clouds than are meshes."""
    kinds = Counter(item.is_cloud for item in items if not item.reason)
    return kinds[True] > kinds[False]
