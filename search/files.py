"""The files of a collection: which ones there are, what an encoder reads of one, and its shape for a 3D view."""

import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps

from datasets.arrays import MAX_POINTS, load_images, load_points, to_unit_sphere
from datasets.images import read_image
from datasets.lists import SampleList, text_rows
from datasets.mesh_faces import load_faces
from datasets.prepare.readers.modelnet import to_z_up
from datasets.prepare.readers.objects import FORMATS, GLTF, MESHES, is_cloud, joined, read_cloud, read_parts, vertical_axis
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, normalise, sample_surface, simplified_faces
from utils.errors import UserError
from utils.figures.thumbnails import thumbnail
from utils.modalities import FACE_CHANNELS, MODALITIES
from utils.settings.options import DataConfig

SUFFIXES = {True: (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"), False: FORMATS}  # by `Modality.is_2d`
THUMBNAIL = 96  # pixels
VIEW_POINTS, VIEW_FACES, BALL = 1024, 50_000, 0.025  # of a 3D view; the radius of its points in unit spheres
FAR, NEAR = (25, 50, 120, 255), (115, 190, 250, 255)  # its colours


class Unusable(UserError):
    """A file that cannot be described. `code` is stable: missing, outside, name, type, empty or unreadable."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@contextmanager
def reading(path: str, where: str = "") -> Iterator[None]:
    """Turn whatever goes wrong with one file into an Unusable, whose text does not begin with `where`."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:  # libraries raise anything on a damaged file
        known = isinstance(error, (MeshError, UserError, OSError))
        said = str(error).removeprefix(where).lstrip(": ") if known else f"not a readable {Path(path).suffix.lower()} file: {error!r}"
        raise Unusable("unreadable", said) from error


def need_packages(paths: Iterable[str], modality: str) -> None:
    """Refuse a collection that packages are missing for, before the first of its files is read."""
    suffixes = {Path(path).suffix.lower() for path in paths}.intersection(SUFFIXES[MODALITIES[modality].is_2d])
    reduced = MESHES if MODALITIES[modality].kind == "mesh" else ()
    readers = {"trimesh": (".ply", ".stl", *GLTF), "plyfile": (".ply",), "pypcd4": (".pcd",)}
    readers |= dict.fromkeys(("pyvista", "fast_simplification"), reduced)
    missing = [name for name, read in readers.items() if suffixes.intersection(read) and find_spec(name) is None]
    if missing:
        raise UserError(f"the collection needs {' and '.join(missing)}: pip install -r requirements-search.txt -r requirements-data.txt")


def list_collection(place: str) -> Iterator[tuple[str, str | None]]:
    """Yield the absolute path of every file of a folder, of a list of files, or of one file, and the folder that it must lie in, if any.

    Rows of a list are `path`, or `path label` as in the lists of a data set, whose labels are dropped; paths are relative to the
    folder of the list, out of which they may not lead by `..` or a link, or absolute.
    """
    root = os.path.abspath(os.path.expanduser(place))
    if os.path.isdir(root):
        found = ((os.path.join(folder, name), root) for folder, _, names in sorted(os.walk(root)) for name in sorted(names))
    elif root.lower().endswith((*SUFFIXES[True], *SUFFIXES[False])):
        found = iter([(root, None)])
    elif os.path.isfile(root):
        folder = os.path.dirname(root)
        rows = text_rows(Path(root).read_bytes(), Path(root), "path")
        rows = (row if os.path.isfile(os.path.join(folder, row)) else re.sub(r"\s+[+-]?\d+$", "", row) for row in rows)
        found = ((os.path.join(folder, row), None if os.path.isabs(row) else folder) for row in rows)
    else:
        raise UserError(f"collection {place} does not exist: give a folder, a list of files, or a file")
    for path, bound in found:
        yield os.path.normpath(path), bound and os.path.realpath(bound)


def modality_of(path: str, modalities: Sequence[str], root: str | None = None) -> str:
    """Return the first of some modalities as which a file can be seen, by its name; `root` is the real folder that it must be in, if any.

    Raises:
        Unusable: if there is no such file, or it is of none of the modalities: a shape is no picture.
    """
    if "\0" in path or path.encode(errors="ignore").decode() != path:
        raise Unusable("name", "its name is not UTF-8 or holds a zero byte")
    if root and os.path.commonpath([os.path.realpath(path), root]) != root:
        raise Unusable("outside", f"it leads out of {root}")
    if not os.path.isfile(path):
        raise Unusable("missing", "there is no such file")
    if not os.path.getsize(path):
        raise Unusable("empty", "it has no content")
    fitting = [name for name in modalities if path.lower().endswith(SUFFIXES[MODALITIES[name].is_2d])]
    if not fitting:
        expected = {suffix for name in modalities for suffix in SUFFIXES[MODALITIES[name].is_2d]}
        raise Unusable("type", f"it is no {' or '.join(modalities)}: expected one of {' '.join(sorted(expected))}")
    if len(fitting) > 1 and not MODALITIES[fitting[0]].is_2d:
        fitting.sort(key=lambda name: (MODALITIES[name].kind == "mesh") != (read_shape(path)[1] is not None))
    return fitting[0]


def read_sample(path: str, modality: str, data: DataConfig, up: str | None = None) -> np.ndarray:
    """Read one file as evaluation reads it, by the loaders of `datasets`: (1, 3, S, S), (1, P, 3) or (1, F, 18), as `PairedSamples`.

    Clouds of fewer points than evaluation takes and meshes of fewer faces than `data.max_faces` repeat theirs. `up` is the vertical
    axis of shapes, see `vertical_axis`; an Unusable says why the file cannot be read as this modality.
    """
    kind, found = MODALITIES[modality].kind, re.search(data.instance_id, Path(path).stem)
    with TemporaryDirectory() as folder:
        file = path if kind == "image" else os.path.join(folder, "shape.npy")  # the loaders read .npy files alone
        rows = SampleList(Path(path), modality, (path,), (file,), (found and found[1] or Path(path).stem,))
        with reading(path, rows.where(0)):
            if kind == "image":
                return load_images(rows, data.image_resize)
            np.save(file, _prepared(path, kind, data.max_faces, up))
            (array,) = load_faces(rows, data.max_faces) if kind == "mesh" else load_points(rows, max(MAX_POINTS, data.num_points))
    count = data.max_faces if kind == "mesh" else data.num_points * data.eval_subsets
    return array[np.arange(count) % len(array)][None]


def _prepared(path: str, kind: str, max_faces: int, up: str | None) -> np.ndarray:
    """Return the array that the file of a prepared data set would hold of this shape."""
    vertices, triangles = read_shape(path, up)
    if triangles is None:
        if kind == "mesh":
            raise Unusable("type", "a cloud of points is no mesh")
        return vertices
    if kind == "mesh" and path.lower().endswith(".npy"):
        return np.load(path)
    vertices, triangles = clean_mesh(vertices, triangles)
    vertices = normalise(vertices)
    if kind == "mesh":
        return simplified_faces(vertices, triangles, max_faces)[0]
    return sample_surface(vertices, triangles, MAX_POINTS, seed=zlib.crc32(Path(path).stem.encode()))


def read_shape(path: str, up: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the points (n, 3) of a cloud, or vertices (V, 3) and triangles (T, 3) of a mesh, z up; an Unusable says why it is neither.

    Nothing is ever unpickled. `up` is the vertical axis of the file, see `vertical_axis`; arrays of faces are z up, as they were prepared.
    """
    file, axis = Path(path), vertical_axis(path, up)
    with reading(path):
        if path.lower().endswith(".npy") and (faces := np.load(file, allow_pickle=False)).shape[1:] == (FACE_CHANNELS,):
            corners = faces[:, None, :3] + faces[:, 3:12].reshape(-1, 3, 3)
            return corners.reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3)
        if not is_cloud(file, file.read_bytes()):
            try:
                vertices, triangles = joined(read_parts(file, texture=False))
                return to_z_up(vertices, axis), triangles
            except MeshError:
                if not path.lower().endswith(GLTF):  # which may hold points alone
                    raise
        return to_z_up(read_cloud(file)[0], axis), None


def picture_of(path: str, modality: str, sample: np.ndarray) -> bytes:
    """Return a PNG thumbnail of a file that was read as `sample`; pictures keep their colours."""
    if MODALITIES[modality].is_2d:
        picture = ImageOps.fit(read_image(path), (THUMBNAIL, THUMBNAIL))
    else:
        picture = Image.fromarray(thumbnail(modality, sample[0], THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def view_of(path: str, up: str | None = None) -> bytes:
    """Return a small GLB of a shape, z up: its mesh, or its points (at most `VIEW_POINTS`) as small balls."""
    import trimesh
    vertices, triangles = read_shape(path, up)
    if triangles is not None and len(triangles) > VIEW_FACES:
        vertices, triangles = sample_surface(vertices, triangles, VIEW_POINTS, seed=0), None
    vertices = to_unit_sphere(vertices.astype(np.float64), vertices.mean(axis=0, dtype=np.float64))
    if triangles is None:
        ball = trimesh.creation.icosphere(subdivisions=0, radius=BALL)
        vertices = np.random.default_rng(0).permutation(vertices)[:VIEW_POINTS]
        triangles = (len(ball.vertices) * np.arange(len(vertices))[:, None, None] + ball.faces).reshape(-1, 3)
        vertices = (vertices[:, None] + ball.vertices).reshape(-1, 3)
    colors = trimesh.visual.color.linear_color_map((vertices[:, 0] + 1) / 2, np.array([FAR, NEAR], np.uint8))
    mesh = trimesh.Trimesh(vertices[:, [1, 2, 0]], triangles, vertex_colors=colors, process=False)  # glTF: y up, seen from z
    return mesh.export(file_type="glb")
