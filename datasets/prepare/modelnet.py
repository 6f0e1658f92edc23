"""ModelNet10 and ModelNet40: official classes and counts, and the readers of their archives. Called by `datasets.prepare_modelnet`."""

import hashlib
import json
import re
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.prepare.object_writer import ObjectTask
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
        """The class, which is the name without the number at its right end."""
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
        UserError: when it is missing, no zip file, or holds no or two data sets.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found: expected ModelNet10.zip or ModelNet40.zip of the Princeton ModelNet project")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a complete zip file ({error}); fetch it again") from error
    found = [(match, entry) for entry in entries if "__MACOSX" not in entry.filename and (match := _MEMBER.fullmatch(entry.filename))]
    datasets = {f"modelnet{match[1]}" for match, _ in found}
    if len(datasets) != 1:
        raise UserError(f"{path}: expected members ModelNet10/CLASS/train/CLASS_0001.off (or ModelNet40), found {sorted(datasets) or 'none'}")
    listing = "".join(f"{entry.filename} {entry.file_size} {entry.CRC}\n" for _, entry in found)
    shapes = tuple(Shape(match[4], match[3], member=entry.filename) for match, entry in found)
    return Source(datasets.pop(), shapes, hashlib.sha256(listing.encode()).hexdigest())


def read_hdf5(folder: str | Path, up: str) -> Source:
    """Read HDF5 clouds with their id2file lists: modelnet40_ply_hdf5_2048, or the sets in antao97's naming.

    Args:
        folder: holds `ply_data_train0.h5` and `ply_data_train_0_id2file.json` (or `train0.h5`, `train0_id2file.json`), ...
        up: "y" (as these sets are stored) or "z", the vertical axis of the clouds; the result has z up.
    Raises:
        UserError: on missing files or lists that do not fit; ImportError: without h5py.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("--points needs h5py: pip install -r requirements-data.txt") from error
    folder = Path(folder)
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
            raise UserError(f"{path}: expected data of shape ({len(names)}, n, 3) as its id2file.json lists, found {clouds.shape}")
        clouds = to_z_up(clouds, up)
        shapes += [Shape(name, match[2], cloud=cloud.astype(np.float32)) for name, cloud in zip(names, clouds, strict=True)]
    classes = {shape.object_class for shape in shapes}
    return _cloud_source("modelnet10" if classes <= set(MODELNET10) else "modelnet40", shapes)


def read_npz(path: str | Path) -> Source:
    """Read modelnet10_points.npz: `points` (N, n, 3) int16 in units of 1/32767, `instance_id`, `split`, `classes`, `label`.

    The clouds stay in the unit sphere, z up.

    Raises:
        UserError: when it is missing, damaged, of another shape, or label and name disagree.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found: expected modelnet10_points.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            points, ids, splits = archive["points"], archive["instance_id"].tolist(), archive["split"].tolist()
            classes = archive["classes"][archive["label"]].tolist()
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable archive with points, instance_id, split, classes and label ({error})") from error
    if points.dtype != np.int16 or points.ndim != 3 or points.shape[2] != 3 or not len(points) == len(ids) == len(splits) == len(classes):
        raise UserError(f"{path}: expected int16 points (N, n, 3) and N ids, splits and labels, found {points.dtype} {points.shape}")
    shapes = [Shape(*row, cloud=cloud.astype(np.float32) / 32767) for *row, cloud in zip(ids, splits, points, strict=True)]
    wrong = next((shape.name for shape, name in zip(shapes, classes, strict=True) if shape.object_class != name), None)
    if wrong is not None or not set(splits) <= {"train", "test"}:
        raise UserError(f"{path}: expected splits train and test and labels as in the names, found {sorted(set(splits))}, {wrong}")
    return _cloud_source("modelnet10", shapes)


def to_z_up(points: np.ndarray, up: str) -> np.ndarray:
    """Turn points (..., 3) whose vertical axis is `up`, "y" or "z", to z up."""
    return points if up == "z" else np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def check_official(source: Source, clouds_only: bool) -> str | None:
    """Compare a source with the official classes and counts.

    Args:
        source: what was read.
        clouds_only: the 9,840 training clouds of modelnet40_ply_hdf5_2048 count as official.
    Returns:
        None, or one line on the first differences.
    """
    official = OFFICIAL[source.dataset]
    found = Counter((shape.object_class, shape.split) for shape in source.shapes)
    expected = Counter({(name, split): n for name, counts in official.items() for split, n in zip(("train", "test"), counts, strict=True)})
    missing = expected - found
    if found == expected or (
        clouds_only and source.dataset == "modelnet40" and not found - expected and sum(missing.values()) == 9843 - HDF5_TRAINING_CLOUDS
        and all(split == "train" for _, split in missing)
    ):
        return None
    differing = sorted(key for key in expected | found if expected[key] != found[key])
    examples = ", ".join(f"{name}/{split}: {found[name, split]} instead of {expected[name, split]}" for name, split in differing[:4])
    total = {split: sum(n for (_, part), n in found.items() if part == split) for split in ("train", "test")}
    return f"{source.dataset}: found {total['train']} / {total['test']} objects, {len(differing)} counts differ ({examples})"


def make_tasks(source: Source, clouds: dict[str, np.ndarray] | None = None) -> list[ObjectTask]:
    """Number the objects and label them by the official class order.

    Numbers follow the hash of the name: they, and so the file names and the order of the lists, tell nothing about the class.

    Args:
        source: what was read.
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


def _cloud_source(dataset: str, shapes: list[Shape]) -> Source:
    digest = hashlib.sha256()
    for shape in shapes:
        digest.update(f"{shape.split} {shape.name} {shape.cloud.shape}\n".encode())
        digest.update(np.ascontiguousarray(shape.cloud).tobytes())
    return Source(dataset, tuple(shapes), digest.hexdigest())
