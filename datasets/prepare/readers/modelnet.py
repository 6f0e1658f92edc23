"""ModelNet10 and ModelNet40: official classes and counts, readers of their archives. Called by `datasets.prepare.modelnet`."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.prepare.ownership import SPLITS, required
from datasets.prepare.readers.archives import READ_ERRORS, list_members, problem
from datasets.prepare.writer import ObjectTask
from utils.errors import UserError

# Alphabetical, as in the HDF5 point clouds; the position is the label. (train, test) objects.
MODELNET40 = {
    "airplane": (626, 100), "bathtub": (106, 50), "bed": (515, 100), "bench": (173, 20), "bookshelf": (572, 100),
    "bottle": (335, 100), "bowl": (64, 20), "car": (197, 100), "chair": (889, 100), "cone": (167, 20), "cup": (79, 20),
    "curtain": (138, 20), "desk": (200, 86), "door": (109, 20), "dresser": (200, 86), "flower_pot": (149, 20),
    "glass_box": (171, 100), "guitar": (155, 100), "keyboard": (145, 20), "lamp": (124, 20), "laptop": (149, 20),
    "mantel": (284, 100), "monitor": (465, 100), "night_stand": (200, 86), "person": (88, 20), "piano": (231, 100),
    "plant": (240, 100), "radio": (104, 20), "range_hood": (115, 100), "sink": (128, 20), "sofa": (680, 100),
    "stairs": (124, 20), "stool": (90, 20), "table": (392, 100), "tent": (163, 20), "toilet": (344, 100),
    "tv_stand": (267, 100), "vase": (475, 100), "wardrobe": (87, 20), "xbox": (103, 20),
}
MODELNET10 = {
    name: MODELNET40[name]
    for name in ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")
}
OFFICIAL = {"modelnet10": MODELNET10, "modelnet40": MODELNET40}
# What modelnet40_ply_hdf5_2048 lacks: 9,840 training clouds instead of 9,843.
HDF5_TRAINING_CLOUDS = 9840
_MEMBER = re.compile(r"(?:.*/)?ModelNet(10|40)/(?P<object_class>[^/]+)/(train|test)/((?P=object_class)_\d+)\.off")
_HDF5 = re.compile(r"(ply_data_)?(train|test)_?(\d+)\.h5")


@dataclass(frozen=True)
class Shape:
    """One object of a source; `name` is its instance id, e.g. night_stand_0001.

    Its shape is `member`, a mesh inside the archive or the path of a PCD file, or `cloud`, (n, 3) float32 with z up.
    """

    name: str
    split: str
    member: str | None = None
    cloud: np.ndarray | None = None

    @property
    def object_class(self) -> str:
        """The name without the number at its right end."""
        return self.name.rsplit("_", 1)[0]


@dataclass(frozen=True)
class Source:
    """The objects of one archive; `sha256` identifies its content."""

    dataset: str
    shapes: tuple[Shape, ...]
    sha256: str


def read_archive(path: str | Path) -> Source:
    """List the meshes of ModelNet10.zip or ModelNet40.zip; other files in it (macOS metadata, README) are ignored.

    The hash covers names, sizes and checksums of the meshes as the archive states them.

    Raises:
        UserError: when it is missing, no zip file, packed in a way Python cannot read, or holds no or two data sets.
    """
    entries = list_members(path, _MEMBER)
    found = [(_MEMBER.fullmatch(entry.filename), entry) for entry in entries]
    datasets = {f"modelnet{match[1]}" for match, _ in found}
    if len(datasets) != 1:
        members = "ModelNet10/CLASS/train/CLASS_0001.off (or ModelNet40)"
        raise UserError(f"{path}: expected members {members}, found {sorted(datasets) or 'none'}")
    listing = "".join(f"{entry.filename} {entry.file_size} {entry.CRC}\n" for _, entry in found)
    shapes = tuple(Shape(match[4], match[3], member=entry.filename) for match, entry in found)
    return Source(datasets.pop(), shapes, hashlib.sha256(listing.encode()).hexdigest())


def read_hdf5(folder: str | Path, up: str) -> Source:
    """Read HDF5 clouds with their id2file lists: modelnet40_ply_hdf5_2048, or the sets in antao97's naming.

    Args:
        folder: holds `ply_data_train0.h5` and `ply_data_train_0_id2file.json` (or `train0.h5`, `train0_id2file.json`), ...
        up: "y" (as these sets are stored) or "z", the vertical axis of the clouds; the result has z up.
    Raises:
        UserError: on missing files, lists that do not fit, or without h5py.
    """
    h5py, folder = required("h5py", "--points"), Path(folder)
    parts = sorted((int(match[3]), path, match) for path in folder.glob("*.h5") if (match := _HDF5.fullmatch(path.name)))
    if not parts:
        raise UserError(f"{folder}: expected ply_data_train0.h5 ... ply_data_test1.h5 (or train0.h5 ...), found none")
    shapes = []
    for number, path, match in parts:
        names = _id2file(folder / f"{match[1] or ''}{match[2]}{'_' if match[1] else ''}{number}_id2file.json")
        try:
            with h5py.File(path, "r") as file:
                clouds = file["data"][()]
        except (OSError, KeyError) as error:
            raise UserError(f"{path}: not a readable HDF5 file with `data` ({error}); fetch it again") from error
        if clouds.ndim != 3 or clouds.shape[2] != 3 or len(clouds) != len(names):
            raise UserError(f"{path}: expected data of shape ({len(names)}, n, 3) as in its id2file.json, found {clouds.shape}")
        clouds = to_z_up(clouds, up)
        shapes += [Shape(name, match[2], cloud=cloud.astype(np.float32)) for name, cloud in zip(names, clouds, strict=True)]
    return _cloud_source(shapes)


def read_npz(path: str | Path) -> Source:
    """Read modelnet10_points.npz or modelnet40_points.npz; the clouds stay in the unit sphere, z up.

    Arrays: `points` (N, n, 3) int16 in units of 1/32767, `instance_id`, `split` and `label` (N,), `classes`; others are ignored.

    Raises:
        UserError: when it is missing, damaged, of another shape, or label and name disagree.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found: expected modelnet10_points.npz or modelnet40_points.npz")
    arrays = read_arrays(path, ("points", "instance_id", "split", "label", "classes"))
    points, ids, splits = arrays["points"], arrays["instance_id"].tolist(), arrays["split"].tolist()
    rows = {len(arrays[name]) for name in ("points", "instance_id", "split", "label")}
    texts = {arrays[name].dtype.kind for name in ("instance_id", "split", "classes")} == {"U"}
    if points.dtype != np.int16 or points.ndim != 3 or points.shape[2] != 3 or len(rows) > 1 or not texts:
        found = f"{points.dtype} {points.shape}, lengths {sorted(rows)}, ids {arrays['instance_id'].dtype}"
        raise UserError(f"{path}: expected int16 points (N, n, 3) and N ids, splits (both texts) and labels, found {found}")
    try:
        classes = arrays["classes"][arrays["label"]].tolist()
    except IndexError as error:
        raise UserError(f"{path}: expected labels that are positions in classes ({error})") from error
    shapes = [Shape(*row, cloud=cloud.astype(np.float32) / 32767) for *row, cloud in zip(ids, splits, points, strict=True)]
    wrong = next((shape.name for shape, name in zip(shapes, classes, strict=True) if shape.object_class != name), None)
    if wrong is not None or not set(splits) <= {"train", "test"}:
        found = f"{sorted(set(splits))}, {wrong}"
        raise UserError(f"{path}: expected splits train and test and labels as in the names, found {found}")
    return _cloud_source(shapes)


def to_z_up(points: np.ndarray, up: str) -> np.ndarray:
    """Turn points (..., 3) whose vertical axis is `up`, "x", "y" or "z", to z up."""
    if up == "x":
        return np.roll(points, -1, axis=-1)
    return points if up == "z" else np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def check_official(source: Source, any_counts: bool, hdf5: bool = False) -> bool:
    """Return whether a source has the official classes and counts; with `hdf5`, ModelNet40 may lack three clouds, as its HDF5 set does.

    Raises:
        UserError: on other counts, with the first differences, unless `any_counts`.
    """
    found = Counter((shape.object_class, shape.split) for shape in source.shapes)
    official = OFFICIAL[source.dataset].items()
    expected = Counter({(name, split): n for name, counts in official for split, n in zip(SPLITS, counts, strict=True)})
    missing = expected - found
    few = not found - expected and missing.total() == 9843 - HDF5_TRAINING_CLOUDS and all(split == "train" for _, split in missing)
    if found == expected or (hdf5 and source.dataset == "modelnet40" and few):
        return True
    if any_counts:
        return False
    differing = sorted(key for key in expected | found if expected[key] != found[key])
    examples = ", ".join(f"{'/'.join(key)}: {found[key]} instead of {expected[key]}" for key in differing[:4])
    total = " / ".join(str(sum(n for (_, part), n in found.items() if part == split)) for split in SPLITS)
    raise UserError(
        f"{source.dataset}: found {total} objects, {len(differing)} counts differ ({examples}); fetch the complete set, or accept "
        "it as it is with --any-counts"
    )


def make_tasks(source: Source, clouds: dict[str, np.ndarray] | None = None) -> list[ObjectTask]:
    """Number the objects and label them by the official class order.

    Numbers follow the hash of the name: they, and so the file names and the order of the lists, tell nothing about the class.

    Args:
        clouds: name -> cloud to use instead of sampling the mesh; names without one keep None.
    Raises:
        UserError: on an unknown class or a name that occurs twice.
    """
    labels = {name: label for label, name in enumerate(OFFICIAL[source.dataset])}
    names = Counter(shape.name for shape in source.shapes)
    wrong = [shape.name for shape in source.shapes if shape.object_class not in labels or names[shape.name] > 1]
    if wrong:
        raise UserError(f"{source.dataset}: object {wrong[0]} occurs twice or is of no class of {', '.join(labels)}")
    ordered = sorted(source.shapes, key=lambda shape: hashlib.sha256(shape.name.encode()).digest())
    return [
        ObjectTask(
            number, shape.name, shape.split, labels[shape.object_class], shape.member,
            shape.cloud if clouds is None else clouds.get(shape.name),
        )
        for number, shape in enumerate(ordered)
    ]


def _id2file(path: Path) -> list[str]:
    """Return the instance ids of one part, from strings such as airplane/airplane_0001.ply."""
    if not path.is_file():
        raise UserError(f"{path} not found; it alone says which object each cloud is")
    try:
        return [Path(name).stem for name in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: expected a JSON list of file names ({error})") from error


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return arrays of an .npz file by name, each read to its end; a UserError names the one that cannot be."""
    member, arrays = names[0], {}
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = archive.files
            for member in names if set(names) <= set(found) else ():
                arrays[member] = archive[member]
    except (*READ_ERRORS, KeyError, AttributeError, TypeError) as error:
        raise UserError(problem(path, f"{member}.npy", error)) from error
    if not arrays:
        raise UserError(f"{path}: expected the arrays {', '.join(names)} (docs/data.md), found {', '.join(found) or 'none'}")
    return arrays


def _cloud_source(shapes: list[Shape]) -> Source:
    """Return the source of clouds; those of ModelNet10's classes alone are ModelNet10."""
    digest = hashlib.sha256()
    for shape in shapes:
        digest.update(f"{shape.split} {shape.name} {shape.cloud.shape}\n".encode())
        digest.update(np.ascontiguousarray(shape.cloud).tobytes())
    small = {shape.object_class for shape in shapes} <= set(MODELNET10)
    return Source("modelnet10" if small else "modelnet40", tuple(shapes), digest.hexdigest())
