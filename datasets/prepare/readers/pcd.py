"""Reads PCD files (Point Cloud Library) with pypcd4, and lists folders of them laid out like ModelNet.

pypcd4 returns what is left of a file that was cut short, and knows one spelling of a header only. So the header is written anew
and compared with the size of the body first.
"""

import hashlib
import io
import re
import struct
from pathlib import Path

import numpy as np

from datasets.prepare.ownership import required
from datasets.prepare.readers.modelnet import MODELNET10, Shape, Source
from datasets.prepare.shapes.mesh import MeshError
from utils.errors import UserError

KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")
ENCODINGS = ("ascii", "binary", "binary_compressed")
MAX_COUNT = 4096  # values of one field; pypcd4 makes a column of each
DAMAGES = (ValueError, KeyError, IndexError, TypeError, RuntimeError, struct.error)  # what pypcd4 raises on them
_PLACE = re.compile(r"(?:(ModelNet(?:10|40))/)?(?P<object_class>[^/]+)/(train|test)/((?P=object_class)_\d+)\.pcd")


def read_pcd(data: bytes) -> tuple[np.ndarray, int]:
    """Parse the content of a PCD file.

    Other fields (rgb, normals, padding) are skipped; VIEWPOINT, the pose of the sensor, is not applied.

    Returns:
        (n, 3) float64 points in file order, and how many points more were dropped because a coordinate was NaN or infinite, which
        is how PCD marks a point that was not measured, or beyond what float32 holds.
    Raises:
        MeshError: when it is no PCD file, has no x, y, z, header and body disagree, or no valid point is left.
        UserError: without pypcd4.
    """
    pypcd4 = required("pypcd4", "a PCD file")
    lines, body = _split(data)
    try:
        meta = pypcd4.MetaData.parse_header([f"{key} {' '.join(words)}" for key, words in lines.items()])
    except DAMAGES as error:
        raise MeshError(f"not a readable PCD header: {' '.join(str(error).split())}") from error
    if len({len(part) for part in (meta.fields, meta.size, meta.type, meta.count)}) > 1 or max(meta.count) > MAX_COUNT:
        raise MeshError(f"FIELDS, SIZE, TYPE and COUNT (at most {MAX_COUNT}) of the PCD header do not fit together: {lines}")
    if not meta.points == meta.width * meta.height > 0:
        raise MeshError(f"expected POINTS >= 1 and equal to WIDTH x HEIGHT, found {meta.points}, {meta.width} and {meta.height}")
    try:
        body = _sized(body, meta.data.value, meta.points, meta.build_dtype().itemsize)
        table = np.atleast_1d(pypcd4.PointCloud.from_fileobj(io.BytesIO(meta.compose_header().encode() + body)).pc_data)
        cloud = np.stack([table[axis].astype(np.float64) for axis in "xyz"], axis=1)
    except DAMAGES as error:
        raise MeshError(f"not a readable {meta.data.value} body of x, y, z: {error}") from error
    valid = (np.abs(cloud) <= np.finfo(np.float32).max).all(axis=1)
    if len(cloud) != meta.points:
        raise MeshError(f"{meta.points} points promised, {len(cloud)} found")
    if not valid.any():
        raise MeshError(f"none of the {meta.points} points is valid")
    return cloud[valid], int((~valid).sum())


def read_pcd_folder(folder: str | Path, up: str) -> Source:
    """List the clouds FOLDER/CLASS/train/CLASS_0001.pcd, also with ModelNet10 or ModelNet40 between FOLDER and CLASS.

    A cloud is parsed when its object is made; `member` is its path. The hash covers names, contents and `up`, "y" or "z", the
    vertical axis. Other files than .pcd, and hidden ones, are ignored.

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


def _split(data: bytes) -> tuple[dict[str, list[str]], bytes]:
    """Return key -> words of the header, completed by what writers leave out, and the body."""
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
    if empty is not None or lines["DATA"][0] not in ENCODINGS:
        raise MeshError(f"the PCD header gives no {empty or f'DATA of {ENCODINGS}'}")
    lines.setdefault("COUNT", ["1"] * len(lines["FIELDS"]))
    if "WIDTH" not in lines or "HEIGHT" not in lines:
        lines.update(WIDTH=lines.get("POINTS", ["none"]), HEIGHT=["1"])
    if "POINTS" not in lines and lines["WIDTH"][0].isdecimal() and lines["HEIGHT"][0].isdecimal():
        lines["POINTS"] = [str(int(lines["WIDTH"][0]) * int(lines["HEIGHT"][0]))]
    if lines["DATA"] == ["ascii"]:  # text may have more digits than the single precision that it promises
        kinds = zip(lines["SIZE"], [*lines["TYPE"], *lines["SIZE"]], strict=False)
        lines["SIZE"] = ["8" if kind == ("4", "F") else kind[0] for kind in kinds]
    return {**lines, "VERSION": ["0.7"]}, data[start:]


def _sized(body: bytes, encoding: str, points: int, stride: int) -> bytes:
    """Return the body as pypcd4 understands it; a ValueError says that it does not hold `points` points of `stride` bytes."""
    if encoding == "ascii":
        rows = [b" ".join(words) for line in body.splitlines() if (words := line.split())]
        body, found = b"\n".join(rows), len(rows)
    elif encoding == "binary":
        found = len(body) // stride
    else:
        packed, size = struct.unpack_from("<II", body)
        found = size / stride if len(body) >= 8 + packed else 0
    if found != points:
        raise ValueError(f"the header promises {points} points, {found:.12g} follow")
    return body
