"""The files of a collection: which ones there are, what an encoder reads of one, and its shape for a 3D view."""

import io
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

from datasets.arrays import MAX_POINTS, load_images, load_points, read_array, to_unit_sphere
from datasets.lists import SampleList, text_rows
from datasets.mesh_faces import load_faces
from datasets.prepare.readers.obj import read_obj
from datasets.prepare.readers.off import read_off
from datasets.prepare.readers.pcd import read_pcd
from datasets.prepare.shapes.mesh import MeshError, normalise, sample_surface, simplified_faces
from utils.errors import UserError
from utils.modalities import FACE_CHANNELS, MODALITIES
from utils.settings.options import DataConfig

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SHAPES = {".npy", ".pcd", ".off", ".obj", ".ply", ".stl", ".glb"}
VIEW_POINTS, VIEW_FACES, BALL = 1024, 50_000, 0.025  # of a 3D view; the radius of its points in unit spheres
OCTAHEDRON = np.array([(x, y, z) for x in (0, 3) for y in (1, 4) for z in (2, 5)])  # corners +x +y +z -x -y -z
OCTAHEDRON = np.where((OCTAHEDRON >= 3).sum(axis=1, keepdims=True) % 2, OCTAHEDRON[:, ::-1], OCTAHEDRON)  # outsides out
Shape = tuple[np.ndarray, np.ndarray | None]  # points or vertices (V, 3), triangles (T, 3) of a mesh


class Unusable(UserError):
    """A file that cannot be described. `code` is stable: missing, outside, name, type, empty or unreadable."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def list_collection(place: str) -> Iterator[tuple[str, Unusable | None]]:
    """Yield the absolute path of every file of a folder, of a list of files, or of one file, with what is wrong with it.

    Rows of a list are `path`, or `path label` as in the lists of a data set, whose labels are dropped; paths are relative to the
    folder of the list or absolute. Nothing outside of that folder is reached by `..` or a link, unless a row says so in full.
    """
    root = os.path.abspath(os.path.expanduser(place))
    if os.path.isdir(root):
        found = ((os.path.join(folder, name), root) for folder, _, names in sorted(os.walk(root)) for name in sorted(names))
    elif Path(root).suffix.lower() in PICTURES | SHAPES:
        found = iter([(root, None)])
    elif os.path.isfile(root):
        folder = os.path.dirname(root)
        rows = [_without_label(row, folder) for row in text_rows(Path(root).read_bytes(), Path(root), "path")]
        found = ((os.path.join(folder, row), None if os.path.isabs(row) else folder) for row in rows)
    else:
        raise UserError(f"collection {place} does not exist: give a folder, a list of files, or a file")
    for path, bound in found:
        yield os.path.normpath(path), _wrong(path, bound and os.path.realpath(bound))


def _without_label(row: str, root: str) -> str:
    return row if os.path.isfile(os.path.join(root, row)) else re.sub(r"\s+[+-]?\d+$", "", row)


def _wrong(path: str, root: str | None) -> Unusable | None:
    """Say what can be seen without reading a file; `root` is the real folder that it must be in, if any."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Unusable("name", "its name is not UTF-8")
    if "\0" in path:
        return Unusable("name", "its name holds a zero byte")
    if root and os.path.commonpath([os.path.realpath(path), root]) != root:
        return Unusable("outside", f"it leads out of {root}")
    if not os.path.isfile(path):
        return Unusable("missing", "there is no such file")
    if Path(path).suffix.lower() not in PICTURES | SHAPES:
        return Unusable("type", f"expected one of {' '.join(sorted(PICTURES | SHAPES))}")
    return None if os.path.getsize(path) else Unusable("empty", "it has no content")


def modality_of(path: str, modalities: tuple[str, ...], wanted: str | None = None) -> str:
    """Return the modality as which a file is seen: the wanted one, else the first of the run's that it can be.

    Raises:
        Unusable: if no modality, or not the wanted one, can be made of such a file: a cloud has no faces, a shape no picture.
    """
    picture = Path(path).suffix.lower() in PICTURES
    fitting = [name for name in ([wanted] if wanted else modalities) if MODALITIES[name].is_2d == picture]
    if not picture and len(fitting) > 1:
        fitting.sort(key=lambda name: (MODALITIES[name].kind == "mesh") != (read_shape(path)[1] is not None))
    if not fitting:
        raise Unusable("type", f"a {'picture' if picture else 'shape'} is no {' or '.join([wanted] if wanted else modalities)}")
    return fitting[0]


def read_sample(path: str, modality: str, data: DataConfig) -> np.ndarray:
    """Read one file as evaluation reads it, by the loaders of `datasets`: (1, 3, S, S), (1, P, 3) or (1, F, 18), as `PairedSamples`.

    Clouds of fewer points than evaluation takes and meshes of fewer faces than `data.max_faces` repeat theirs.

    Raises:
        Unusable: if it cannot be read as this modality.
    """
    kind, file, match = MODALITIES[modality].kind, Path(path), re.search(data.instance_id, Path(path).stem)
    modality_of(path, (modality,))
    identity = match[1] if match and match[1] else Path(path).stem
    try:
        with TemporaryDirectory() as folder:
            file = file if kind == "image" else _as_stored(path, kind, data.max_faces, Path(folder))
            rows = SampleList(Path(path), modality, (path,), (file,), (identity,))
            if kind == "image":
                return load_images(rows, data.image_resize)
            points = kind == "points"
            (array,) = load_points(rows, max(MAX_POINTS, data.num_points)) if points else load_faces(rows, data.max_faces)
    except (MeshError, UserError, OSError) as error:
        if isinstance(error, Unusable):
            raise
        where = f"{path}, row 1: "  # of the loaders, about a list of one file
        raise Unusable("unreadable", str(error).removeprefix(where).removeprefix(str(file)).lstrip(": ")) from error
    count = data.num_points * data.eval_subsets if points else data.max_faces
    return array[np.arange(count) % len(array)][None]


def _as_stored(path: str, kind: str, max_faces: int, folder: Path) -> Path:
    """Return the .npy file of a prepared data set that shows this shape: itself, or one written into the folder."""
    stored = Path(path).suffix.lower() == ".npy"
    if stored and (_stored_array(path).shape[-1] == FACE_CHANNELS) == (kind == "mesh"):
        return Path(path)
    vertices, triangles = read_shape(path)
    if triangles is not None:
        vertices = normalise(vertices)
    if kind == "mesh":
        if triangles is None:
            raise Unusable("type", "a cloud of points is no mesh")
        array = simplified_faces(vertices, triangles, max_faces)[0]
    else:
        seed = zlib.crc32(Path(path).stem.encode())
        array = vertices if triangles is None else sample_surface(vertices, triangles, MAX_POINTS, seed)
    np.save(folder / "shape.npy", array.astype(np.float32))
    return folder / "shape.npy"


def _stored_array(path: str) -> np.ndarray:
    array = read_array(SampleList(Path(path).parent, "PointCloud", (path,), (Path(path),), ("",)), 0)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or array.shape[1] not in (3, FACE_CHANNELS):
        raise Unusable("unreadable", f"expected numbers of shape (n, 3) or (F, {FACE_CHANNELS}), found {array.dtype} {array.shape}")
    return array


def read_shape(path: str) -> Shape:
    """Read a cloud or a mesh; an Unusable, MeshError or UserError says why it is none. Nothing is ever unpickled."""
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        array = _stored_array(path)
        if array.shape[1] == 3:
            return array, None
        corners = array[:, None, :3] + array[:, 3:12].reshape(-1, 3, 3)
        return corners.reshape(-1, 3), np.arange(3 * len(array)).reshape(-1, 3)
    content = Path(path).read_bytes()
    if suffix == ".pcd":
        return read_pcd(content)[0], None
    if suffix in (".off", ".obj"):
        return (read_off if suffix == ".off" else read_obj)(content)
    return _read_with_trimesh(io.BytesIO(content), suffix)


def _read_with_trimesh(stream: BinaryIO, suffix: str) -> Shape:
    import trimesh
    try:
        scene = trimesh.load_scene(stream, file_type=suffix[1:])
        parts = scene.dump()
    except Exception as error:  # whatever its readers stumble over in a damaged file
        raise Unusable("unreadable", f"not a readable {suffix} file: {error}") from error
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    clouds = [np.asarray(part.vertices) for part in parts if isinstance(part, trimesh.PointCloud)]
    if not meshes and not clouds:
        raise Unusable("unreadable", f"no mesh and no cloud in this {suffix} file")
    if not meshes:
        return np.concatenate(clouds), None
    mesh = trimesh.util.concatenate(meshes)
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def view_of(path: str) -> bytes:
    """Return a small GLB of a shape, z up: its mesh, or its points (at most `VIEW_POINTS`) as small octahedra."""
    import trimesh
    vertices, triangles = read_shape(path)
    if triangles is not None and len(triangles) > VIEW_FACES:
        vertices, triangles = sample_surface(vertices, triangles, VIEW_POINTS, seed=0), None
    vertices = to_unit_sphere(vertices.astype(np.float64), vertices.mean(axis=0, dtype=np.float64))
    if triangles is None:
        vertices = vertices[np.random.default_rng(0).permutation(len(vertices))[:VIEW_POINTS]]
        corners = np.concatenate([np.eye(3), -np.eye(3)]) * BALL
        triangles = (6 * np.arange(len(vertices))[:, None, None] + OCTAHEDRON).reshape(-1, 3)
        vertices = (vertices[:, None] + corners).reshape(-1, 3)
    depth = np.clip(vertices[:, :1] / 2 + 0.5, 0, 1)
    colors = np.concatenate([[25, 50, 120] + depth * [90, 140, 130], np.full_like(depth, 255)], axis=1).astype(np.uint8)
    mesh = trimesh.Trimesh(vertices[:, [1, 2, 0]], triangles, vertex_colors=colors, process=False)  # glTF: y up, seen from z
    return mesh.export(file_type="glb")
