"""Reads PCD files (Point Cloud Library) and lists folders of them laid out like ModelNet. Called by `datasets.prepare_modelnet`.

Stricter than the libraries on purpose: a file whose body does not hold what its header promises is an error here.
"""

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.prepare.modelnet import MODELNET10, Shape, Source
from datasets.prepare.readers.off import MeshError
from utils.errors import UserError

KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")
SIZES = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}
ENCODINGS = ("ascii", "binary", "binary_compressed")
_PLACE = re.compile(r"(?:(ModelNet(?:10|40))/)?(?P<object_class>[^/]+)/(train|test)/((?P=object_class)_\d+)\.pcd")


@dataclass(frozen=True)
class _Header:
    """What the header says; the tuples are those of x, y and z. `body` is where it ends."""

    points: int
    encoding: str
    body: int
    formats: tuple[str, ...]
    columns: tuple[int, ...]  # in a row of the ascii encoding, which has `width` of them
    width: int
    offsets: tuple[int, ...]  # bytes in a point of the binary encodings, which has `stride` of them
    stride: int


def read_pcd(data: bytes) -> tuple[np.ndarray, int]:
    """Parse the content of a PCD file.

    Other fields (rgb, normals, padding) are skipped; VIEWPOINT, the pose of the sensor, is not applied.

    Args:
        data: bytes of the file.
    Returns:
        (n, 3) float32 points in file order, and how many points more were dropped because a coordinate was NaN or infinite,
        which is how PCD marks a point that was not measured.
    Raises:
        MeshError: when it is no PCD file, has no x, y, z, header and body disagree, or no valid point is left.
        ImportError: on a compressed file without the package that unpacks it.
    """
    header = _header(data)
    body = data[header.body :]
    try:
        cloud = {"ascii": _ascii, "binary": _binary, "binary_compressed": _compressed}[header.encoding](header, body)
    except (ValueError, struct.error) as error:
        raise MeshError(f"not a readable {header.encoding} body: {error}") from error
    valid = np.isfinite(cloud).all(axis=1)
    if not valid.any():
        raise MeshError(f"none of the {len(cloud)} points is valid")
    return cloud[valid], int((~valid).sum())


def read_pcd_folder(folder: str | Path, up: str) -> Source:
    """List the clouds FOLDER/CLASS/train/CLASS_0001.pcd, also with ModelNet10 or ModelNet40 between FOLDER and CLASS.

    A cloud is parsed when its object is made; `member` is its path. The hash covers names, contents and `up`. Other files than
    .pcd, and hidden ones, are ignored.

    Args:
        folder: holds the classes.
        up: "y" or "z", the vertical axis of the clouds.
    Raises:
        UserError: when there is no cloud, one in another place, or two data sets.
    """
    folder = Path(folder)
    found = [path for pattern in ("*/*/*.pcd", "*/*/*/*.pcd") for path in folder.glob(pattern) if not path.name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: expected CLASS/train/CLASS_0001.pcd ... (or ModelNet10/CLASS/...), found none")
    shapes, tops, digest = [], set(), hashlib.sha256(f"up {up}\n".encode())
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in found):
        match = _PLACE.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: expected CLASS/train/CLASS_0001.pcd or CLASS/test/... below {folder}; move it away")
        tops.add(match[1])
        shapes.append(Shape(match[4], match[3], member=str(path)))
        digest.update(f"{match[3]} {match[4]} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    if len(tops) > 1:
        raise UserError(f"{folder}: expected one data set, found {' and '.join(sorted(str(top or 'classes') for top in tops))}")
    small = {shape.object_class for shape in shapes} <= set(MODELNET10)
    return Source((tops.pop() or ("ModelNet10" if small else "ModelNet40")).lower(), tuple(shapes), digest.hexdigest())


def _header(data: bytes) -> _Header:
    lines, start = {}, 0
    while "DATA" not in lines:
        end = data.find(b"\n", start)
        words = data[start : end if end >= 0 else len(data)].decode("ascii", errors="replace").split()
        if end < 0 or (words and not words[0].startswith("#") and words[0] not in KEYS):
            raise MeshError(f"expected a PCD header that ends with DATA, found {' '.join(words)[:20]!r}")
        if words and words[0] in KEYS:
            lines[words[0]] = words[1:]
        start = end + 1
    empty = next((key for key in ("FIELDS", "SIZE", "TYPE", *lines) if not lines.get(key)), None)
    if empty is not None:
        raise MeshError(f"the PCD header gives no {empty}")
    try:
        return _layout(lines, start)
    except ValueError as error:
        raise MeshError(f"not a readable PCD header: {error}") from error


def _layout(lines: dict[str, list[str]], body: int) -> _Header:
    """Check the lines of a header, and find x, y and z."""
    fields, types = lines["FIELDS"], lines["TYPE"]
    sizes = [int(size) for size in lines["SIZE"]]
    counts = [int(count) for count in lines.get("COUNT", ["1"] * len(fields))]  # PCL too takes 1 without COUNT
    if not len(fields) == len(types) == len(sizes) == len(counts) or min(counts) < 1:
        numbers = f"{len(fields)} FIELDS, {len(types)} TYPE, {len(sizes)} SIZE, {len(counts)} COUNT"
        raise UserError(f"expected as many of each and counts >= 1, found {numbers}, least count {min(counts)}")
    if any(size not in SIZES.get(kind, ()) for kind, size in zip(types, sizes, strict=True)):
        raise UserError(f"unknown combination of TYPE {' '.join(types)} and SIZE {' '.join(map(str, sizes))}")
    grid = int(lines["WIDTH"][0]) * int(lines["HEIGHT"][0]) if "WIDTH" in lines and "HEIGHT" in lines else None
    points = int(lines["POINTS"][0]) if "POINTS" in lines else grid
    sides = [int(lines[key][0]) for key in ("WIDTH", "HEIGHT") if key in lines]
    if points is None or min([points, *sides]) < 1 or grid not in (None, points):
        raise UserError(f"expected POINTS >= 1 and equal to WIDTH x HEIGHT, found {points} and {grid}")
    if lines["DATA"][0] not in ENCODINGS:
        raise UserError(f"expected DATA {', '.join(ENCODINGS)}, found {lines['DATA'][0]!r}")
    if any(fields.count(axis) != 1 or counts[fields.index(axis)] != 1 for axis in "xyz"):
        raise UserError(f"expected one x, y and z each among FIELDS {' '.join(fields)}")
    places = [fields.index(axis) for axis in "xyz"]
    ends = np.cumsum([0, *(size * count for size, count in zip(sizes, counts, strict=True))]).tolist()
    columns = np.cumsum([0, *counts]).tolist()
    return _Header(
        points, lines["DATA"][0], body, tuple(f"<{types[i].lower()}{sizes[i]}" for i in places),
        tuple(columns[i] for i in places), columns[-1], tuple(ends[i] for i in places), ends[-1],
    )


def _ascii(header: _Header, body: bytes) -> np.ndarray:
    rows = [row for line in body.decode("ascii").splitlines() if (row := line.split())]
    _expect(header, len(rows))
    wrong = next((i for i, row in enumerate(rows) if len(row) != header.width), None)
    if wrong is not None:
        raise UserError(f"expected {header.width} values a point, point {wrong} has {len(rows[wrong])}")
    return _to_cloud([np.array([float(row[column]) for row in rows]) for column in header.columns])


def _binary(header: _Header, body: bytes) -> np.ndarray:
    """One point after the other."""
    _expect(header, len(body) // header.stride)
    axes = np.dtype({"names": list("xyz"), "formats": header.formats, "offsets": header.offsets, "itemsize": header.stride})
    points = np.frombuffer(body, axes, header.points)
    return _to_cloud([points[axis] for axis in "xyz"])


def _compressed(header: _Header, body: bytes) -> np.ndarray:
    """Sizes before and after packing, then one field after the other, packed with LZF."""
    try:
        import lzf
    except ImportError as error:
        raise ImportError("binary_compressed PCD files need python-neo-lzf: pip install -r requirements-data.txt") from error
    packed, size = struct.unpack_from("<II", body)
    _expect(header, size / header.stride)
    if len(body) < 8 + packed:
        raise UserError(f"expected {packed} packed bytes, found {len(body) - 8}")
    unpacked = lzf.decompress(body[8 : 8 + packed], size) or b""
    _expect(header, len(unpacked) / header.stride)
    starts = [offset * header.points for offset in header.offsets]
    return _to_cloud([np.frombuffer(unpacked, *place) for place in zip(header.formats, [header.points] * 3, starts, strict=True)])


def _expect(header: _Header, found: float) -> None:
    if found != header.points:
        raise UserError(f"the header promises {header.points} points, {found:.12g} follow")


def _to_cloud(axes: list[np.ndarray]) -> np.ndarray:
    """Stack x, y and z as (n, 3) float32; what float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return np.stack([axis.astype(np.float32) for axis in axes], axis=1)
