"""Any collection of 3D models: what a folder or an archive of meshes holds, and how one of them is read. Called by
`datasets.prepare.objects`.
"""

import hashlib
import io
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datasets.prepare.ownership import SPLITS
from datasets.prepare.readers.modelnet import read_arrays
from datasets.prepare.readers.obj import read_obj
from datasets.prepare.readers.off import read_off
from datasets.prepare.readers.pcd import read_pcd
from datasets.prepare.shapes.looks import Part, look_of
from datasets.prepare.shapes.mesh import MeshError, triangle_areas
from utils.errors import UserError

MESHES = (".glb", ".gltf", ".obj", ".ply", ".off", ".stl")
GLTF = (".glb", ".gltf")  # by their standard in metres and y up
CLOUDS = (".npz", ".npy", ".pcd")
FORMATS = (*MESHES, *CLOUDS)  # of files of one name in one folder, the first of these is taken
COMPRESSIONS = (b"KHR_draco_mesh_compression", b"EXT_meshopt_compression")  # trimesh goes on where it cannot unpack them
NPZ_ARRAYS = ("vertices", "faces", "vertex_offset", "face_offset", "label", "classes", "instance_id")
NPZ_UNIT = 30000


@dataclass(frozen=True)
class Item:
    """One object of a collection.

    Attributes:
        name: unique, for messages; place: path of its file, or its row in an archive; sha256: of the file.
        object_class: of its folder, if it lies in one; split: "train" or "test", if the collection says so.
        is_cloud: whether it has points alone; reason: why it cannot be taken, if that is known before it is read.
        original: name of the first one of the same content, of files.
    """

    name: str
    place: str
    sha256: str
    object_class: str | None
    split: str | None = None
    is_cloud: bool = False
    reason: str | None = None
    original: str | None = None


def read_folder(folder: Path) -> tuple[list[Item], Counter]:
    """List the models below a folder: FILE, CLASS/FILE, {train,test}/CLASS/FILE or CLASS/{train,test}/FILE; hidden ones are ignored.

    Returns:
        The objects, and how many files of other kinds there are, by suffix.
    Raises:
        UserError: when there is none, or train/ and test/ lie among class folders.
    """
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    paths = [path for path in files if path.suffix.lower() in FORMATS]
    if not paths:
        raise UserError(f"{folder}: expected files {' '.join(FORMATS)} in it or in class folders, found none")
    names = [os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace") for path in paths]  # may be printed
    places = [tuple(name.split("/")[:-1]) for name in names]
    levels = [{place[depth] if len(place) > depth else None for place in places} for depth in (0, 1)]
    if set(SPLITS) < levels[0]:
        others = ", ".join(sorted(f"{name}/" if name else "files" for name in levels[0] - set(SPLITS)))
        raise UserError(f"{folder} holds train/, test/ and {others}; expected these two alone, or class folders alone")
    depth = levels.index(set(SPLITS)) if set(SPLITS) in levels else None
    items = []
    for path, name, place in zip(paths, names, places, strict=True):
        split = None if depth is None else place[depth]
        classes = place if depth is None else (*place[:depth], *place[depth + 1 :])
        items.append(_examine(Item(name, str(path), "", classes[0] if classes else None, split)))
    items = _of_one_format(items)
    first = {item.sha256: item.name for item in reversed(items) if not item.reason}
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in FORMATS)
    return [replace(item, original=first.get(item.sha256)) for item in items], others


def _examine(item: Item) -> Item:
    """Return it with the sha256 of its file and what that is, or the reason why it cannot be a model."""
    path = Path(item.place)
    if not path.is_file():
        return replace(item, reason="no regular file, or a link to nothing")
    try:
        data = path.read_bytes()
    except OSError as error:
        return replace(item, reason=f"cannot be read: {error.strerror}")
    reason = None if data else "an empty file"
    return replace(item, sha256=hashlib.sha256(data).hexdigest(), is_cloud=is_cloud(path, data), reason=reason)


def is_cloud(path: Path, data: bytes) -> bool:
    """Whether a file holds points alone, as far as its name and the header of a PLY file tell."""
    suffix = path.suffix.lower()
    return suffix in CLOUDS or (suffix == ".ply" and _promised(data, "vertex") > 0 == _promised(data, "face"))


def _promised(data: bytes, element: str) -> int:
    """Return how many of a kind of element the header of a PLY file promises."""
    found = re.search(rb"element\s+%s\s+(\d+)" % element.encode(), data.partition(b"end_header")[0])
    return int(found[1]) if found else 0


def _of_one_format(items: list[Item]) -> list[Item]:
    """Take one format alone of those of one name in one folder: two could put one object into both splits."""
    stem, taken = (lambda item: Path(item.place).with_suffix("")), {}
    for item in sorted(items, key=lambda item: FORMATS.index(Path(item.place).suffix.lower())):
        if not item.reason:
            taken.setdefault(stem(item), item)
    reasons = [item.reason or f"the same name in the same folder as {taken[stem(item)].name}, which is taken" for item in items]
    return [item if taken.get(stem(item)) is item else replace(item, reason=reason) for item, reason in zip(items, reasons, strict=True)]


def read_npz(path: Path) -> list[Item]:
    """List the meshes of an archive, with the arrays `NPZ_ARRAYS`.

    `vertices` (V, 3) int16 in units of 1 / 30000, `faces` (F, 3) into those of their mesh, `vertex_offset` and `face_offset`
    (N + 1,), `label` (N,) into `classes`, `instance_id` (N,).

    Raises:
        UserError: when it is missing, damaged, or its arrays do not fit together.
    """
    arrays, digest = _archive(path), hashlib.sha256(path.read_bytes()).hexdigest()
    ids = arrays["instance_id"].tolist()
    for offsets, rows in (("vertex_offset", "vertices"), ("face_offset", "faces")):
        found, shape = arrays[offsets], arrays[rows].shape
        if len(found) != len(ids) + 1 or (np.diff(found) < 0).any() or (found[0], found[-1], 3) != (0, *shape):
            raise UserError(f"{path}: expected {offsets} of {len(ids)} meshes over {rows} (n, 3), found {found.shape} over {shape}")
    if len(set(ids)) < len(ids) or not set(arrays["label"].tolist()) <= set(range(len(arrays["classes"]))):
        raise UserError(f"{path}: expected different instance_id, and label that are positions in classes")
    classes = arrays["classes"][arrays["label"]].tolist()
    return [Item(name, str(row), digest, kind) for row, (name, kind) in enumerate(zip(ids, classes, strict=True))]


def read_npz_parts(path: Path, row: int) -> list[Part]:
    """Return one mesh of an archive, as `read_parts` does."""
    arrays = _archive(path)
    vertices, faces = (
        arrays[rows][slice(*arrays[offsets][row : row + 2])] for offsets, rows in (("vertex_offset", "vertices"), ("face_offset", "faces"))
    )
    return _checked([(vertices / NPZ_UNIT, faces, None)])


@lru_cache(maxsize=1)
def _archive(path: Path) -> dict[str, np.ndarray]:
    return read_arrays(path, NPZ_ARRAYS)


def read_parts(path: Path, texture: bool) -> list[Part]:
    """Read the mesh of a file: all parts of a scene, moved to their places.

    OFF and OBJ files have readers of their own; with `texture`, trimesh's reading counts where it finds the same surface.

    Returns:
        At least one part; with a look if `texture` and the file has one.
    Raises:
        MeshError: when it is cut short, has no triangle, a vertex that is not finite, or lacks one. trimesh's readers raise
            anything on other damages.
    """
    suffix, data = path.suffix.lower(), path.read_bytes()
    if suffix not in (".off", ".obj"):
        return _scene(path, data, texture)
    own = [(*(read_off if suffix == ".off" else read_obj)(data), None)]
    seen = _scene(path, data, texture) if texture else own
    areas = [sum(triangle_areas(vertices, triangles).sum() for vertices, triangles, _ in parts) for parts in (own, seen)]
    return seen if np.isclose(*areas, rtol=1e-4) else own


def vertical_axis(path: str, up: str | None) -> str:
    """Return the vertical axis of a file: the given one, else y in GLB and GLTF, as their standard says, and z in all others."""
    return up or ("y" if path.lower().endswith(GLTF) else "z")


def joined(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices (V, 3) and triangles (T, 3) of parts as one mesh."""
    starts = np.cumsum([0, *(len(vertices) for vertices, *_ in parts)])
    triangles = np.concatenate([triangles + start for (_, triangles, _), start in zip(parts, starts, strict=False)])
    return np.concatenate([vertices for vertices, *_ in parts]), triangles


def _load(path: Path, data: bytes) -> list[Any]:
    """Return the meshes, clouds and paths of a file, moved to their places; a MeshError if they are compressed."""
    import trimesh
    packed = [name.decode() for name in COMPRESSIONS if path.suffix.lower() in GLTF and name in data]
    if packed:
        raise MeshError(f"compressed with {packed[0]}; export it uncompressed")
    resolver = trimesh.resolvers.FilePathResolver(str(path))  # finds textures and buffers; a path must be UTF-8 to be loaded
    scene = trimesh.load_scene(io.BytesIO(data), file_type=path.suffix[1:].lower(), resolver=resolver, process=False)
    return scene.dump()


def _scene(path: Path, data: bytes, texture: bool) -> list[Part]:
    meshes = [mesh for mesh in _load(path, data) if len(getattr(mesh, "faces", ()))]
    found, promised = sum(len(mesh.faces) for mesh in meshes), _promised(data, "face") if path.suffix.lower() == ".ply" else 1
    if found < promised:
        raise MeshError(f"empty or cut short: {found} triangles, of at least {promised}")
    return _checked([(np.asarray(mesh.vertices), np.asarray(mesh.faces), look_of(mesh) if texture else None) for mesh in meshes])


def _checked(parts: list[Part]) -> list[Part]:
    for vertices, triangles, _ in parts:
        if not len(triangles) or triangles.min() < 0 or triangles.max() >= len(vertices):
            raise MeshError(f"{len(triangles)} triangles that do not fit the {len(vertices)} vertices")
        if not np.isfinite(vertices[triangles]).all():
            raise MeshError("a vertex is not finite")
    return parts


def read_cloud(path: Path) -> tuple[np.ndarray, int]:
    """Read a PCD or PLY file, the points of a GLB or GLTF file, an .npy array (n, 3 or more), or of an .npz file the array `points`, else
    the first such one.

    Returns:
        (n, 3) points, and how many of a PCD file were dropped as not valid.
    Raises:
        MeshError: when it is cut short or holds no points. trimesh and NumPy raise anything on other damages.
    """
    suffix, data = path.suffix.lower(), path.read_bytes()
    if suffix == ".pcd":
        return read_pcd(data)
    least = max(_promised(data, "vertex"), 1) if suffix == ".ply" else 1
    if suffix in (".ply", *GLTF):
        points = np.concatenate([part.vertices for part in _load(path, data) if not len(getattr(part, "faces", ()))])
    else:
        points = _array(path)
    if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu" or len(points) < least:
        raise MeshError(f"expected numbers of shape (n, 3) with n >= {least}, found {points.dtype} {points.shape}")
    return points[:, :3], 0


def _array(path: Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        for name in sorted(loaded.files, key=lambda name: name != "points"):
            with suppress(ValueError):  # of objects, which are never unpickled
                array = loaded[name]
                if name == "points" or (array.ndim == 2 and array.shape[1] >= 3):
                    return array
        raise MeshError(f"expected an array points, or another of shape (n, 3), found {', '.join(loaded.files) or 'none'}")
