"""Reads one 3D model, from its file or from an archive of meshes. Called by `datasets.prepare.objects` and by search."""

import io
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datasets.prepare.readers.gltf import moves_textures, passed_over
from datasets.prepare.readers.modelnet import read_arrays
from datasets.prepare.readers.obj import read_obj
from datasets.prepare.readers.off import read_off
from datasets.prepare.readers.pcd import read_pcd
from datasets.prepare.readers.ply import read_ply, widened
from datasets.prepare.shapes.looks import Part, keep_vertex_colours, look_of
from datasets.prepare.shapes.mesh import MeshError, triangle_areas

MESHES = (".glb", ".gltf", ".obj", ".ply", ".off", ".stl")
GLTF = (".glb", ".gltf")  # by their standard in metres and y up
CLOUDS = (".npz", ".npy", ".pcd")
FORMATS = (*MESHES, *CLOUDS)  # of files of one name in one folder, the first of these is taken
NPZ_ARRAYS = ("vertices", "faces", "vertex_offset", "face_offset", "label", "classes", "instance_id")
NPZ_UNIT = 30000
BESIDE_POINTS = re.compile(r"((point|vertex)_?)?(normals?|colou?rs?|rgba?)", re.IGNORECASE)  # names of other arrays
MOST_COLUMNS = 12  # of a cloud: place, normal, colour and the like


def is_cloud(path: Path, data: bytes) -> bool:
    """Whether a file holds points alone, as far as its name and the header of a PLY file tell."""
    suffix = path.suffix.lower()
    surface = _promised(data, "face") + _promised(data, "tristrips")
    return suffix in CLOUDS or (suffix == ".ply" and _promised(data, "vertex") > 0 == surface)


def _content(path: Path) -> bytes:
    return widened(path.read_bytes()) if path.suffix.lower() == ".ply" else path.read_bytes()


def _promised(data: bytes, element: str) -> int:
    """Return how many of a kind of element the header of a PLY file promises."""
    found = re.search(rb"(?m)^element\s+%s\s+(\d+)" % element.encode(), data.partition(b"end_header")[0])
    return int(found[1]) if found else 0


def read_npz_parts(path: Path, row: int) -> list[Part]:
    """Return one mesh of an archive, as `read_parts` does."""
    arrays = read_archive(path)
    vertices, faces = (
        arrays[rows][slice(*arrays[offsets][row : row + 2])] for offsets, rows in (("vertex_offset", "vertices"), ("face_offset", "faces"))
    )
    return _checked([(vertices / NPZ_UNIT, faces, None)])


@lru_cache(maxsize=1)
def read_archive(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays `NPZ_ARRAYS` of an archive of meshes; a UserError when it is missing or damaged."""
    return read_arrays(path, NPZ_ARRAYS)


def read_parts(path: Path, texture: bool) -> list[Part]:
    """Read the mesh of a file: all parts of a scene, moved to their places.

    OFF, OBJ and PLY files have readers of their own. Of these trimesh's reading counts, with `texture`, where it finds the same surface
    in the same place, and of binary PLY files, which it notices to be cut short and reads fast, where every face is a triangle.

    Returns:
        At least one part; with a look if `texture` and the file has one.
    Raises:
        MeshError: when it is cut short, has no triangle, a vertex that is not finite, or lacks one. trimesh's readers raise
            anything on other damages.
    """
    suffix, data = path.suffix.lower(), _content(path)
    reader = {".off": read_off, ".obj": read_obj, ".ply": read_ply}.get(suffix)
    if reader is None:
        return _painted(path, data) if texture else _scene(path, data, texture=False)
    seen, binary = [], suffix == ".ply" and b"format ascii" not in data.partition(b"end_header")[0]
    if texture or binary:
        with suppress(Exception):  # what trimesh cannot read, the own reader may
            seen = _scene(path, data, texture)
    if binary and sum(len(triangles) for _, triangles, _ in seen) == _promised(data, "face") > 0:
        return seen
    own = _checked([(*reader(data), None)])
    return seen if seen and _same_surface(own, seen) else own


def _same_surface(one: list[Part], other: list[Part]) -> bool:
    """Whether two readings of a file have the same area, bounds and centre."""
    areas, places = [], []
    for vertices, triangles in map(joined, (one, other)):
        corners, area = vertices[triangles], triangle_areas(vertices, triangles)
        centre = (corners.mean(axis=1) * area[:, None]).sum(axis=0) / max(area.sum(), np.finfo(float).tiny)
        areas.append(area.sum())
        places.append([*corners.min(axis=(0, 1)), *corners.max(axis=(0, 1)), *centre])
    size = np.ptp(np.reshape(places[0][:6], (2, 3)), axis=0).max()
    return bool(np.isclose(*areas, rtol=1e-4) and np.allclose(*places, rtol=0, atol=1e-4 * size))


def vertical_axis(path: str, up: str | None) -> str:
    """Return the vertical axis of a file: the given one, else y in GLB and GLTF, as their standard says, and z in all others."""
    return up or ("y" if path.lower().endswith(GLTF) else "z")


def joined(parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices (V, 3) and triangles (T, 3) of parts as one mesh."""
    starts = np.cumsum([0, *(len(vertices) for vertices, *_ in parts)])
    triangles = np.concatenate([triangles + start for (_, triangles, _), start in zip(parts, starts, strict=False)])
    return np.concatenate([vertices for vertices, *_ in parts]), triangles


def _load(path: Path, data: bytes, texture: bool = False) -> list[Any]:
    """Return the meshes, clouds and paths of a file, moved to their places; a MeshError if some are of a kind that is not read."""
    import trimesh

    from datasets.prepare.readers.neighbours import Neighbours

    gltf = path.suffix.lower() in GLTF
    unread = passed_over(data) if gltf else ()
    if unread:
        raise MeshError(f"not read: {', '.join(unread)}; export it without, uncompressed")
    # finds buffers, in and below the folder of the file, and textures, anywhere; a path must be UTF-8 to be loaded
    resolver = Neighbours(str(path), allow_anywhere=texture)
    plain = {"skip_materials": True} if gltf and not texture else {}
    scene = trimesh.load_scene(io.BytesIO(data), file_type=path.suffix[1:].lower(), resolver=resolver, process=False, **plain)
    for mesh in scene.geometry.values() if gltf and texture else ():
        keep_vertex_colours(mesh)
    return scene.dump()


def _stl(data: bytes) -> tuple[bytes, int]:
    """Return the content of an STL file, without what follows a binary one, and how many triangles it promises."""
    count = int.from_bytes(data[80:84], "little")
    if 84 <= 84 + 50 * count <= len(data):
        return data[: 84 + 50 * count], count
    facets, corners = (len(re.findall(rb"(?m)^\s*%s\b" % word, data.lower())) for word in (b"facet", b"vertex"))
    if corners > 3 * facets:
        raise MeshError(f"no STL file: {corners} corners of {facets} triangles")
    return data, facets


def _scene(path: Path, data: bytes, texture: bool) -> list[Part]:
    data, promised = _stl(data) if path.suffix.lower() == ".stl" else (data, _promised(data, "face"))
    meshes = [mesh for mesh in _load(path, data, texture) if len(getattr(mesh, "faces", ()))]
    found, promised = sum(len(mesh.faces) for mesh in meshes), max(promised, 1)
    if found < promised:
        raise MeshError(f"empty, cut short or of points alone: {found} triangles, of at least {promised}")
    return _checked([(np.asarray(mesh.vertices), np.asarray(mesh.faces), look_of(mesh) if texture else None) for mesh in meshes])


def _painted(path: Path, data: bytes) -> list[Part]:
    """As `_scene` with textures, or without if one of them is damaged or lies elsewhere than trimesh puts it."""
    with suppress(Exception):
        return _scene(path, data, texture=not moves_textures(data))
    return _scene(path, data, texture=False)


def _checked(parts: list[Part]) -> list[Part]:
    for vertices, triangles, _ in parts:
        if not len(triangles) or triangles.min() < 0 or triangles.max() >= len(vertices):
            raise MeshError(f"{len(triangles)} triangles that do not fit the {len(vertices)} vertices")
        if not (np.abs(vertices[triangles]) <= np.finfo(np.float32).max).all():
            raise MeshError("a vertex is not finite, or beyond single precision")
    return parts


def read_cloud(path: Path) -> tuple[np.ndarray, int]:
    """Read a PCD or PLY file, the points of a GLB or GLTF file, an .npy array (n, 3 to 12), or of an .npz file the array `points`, else
    the one such array of floats whose name is not that of normals or colours.

    Returns:
        (n, 3) points, and how many of a PCD file were dropped as not valid.
    Raises:
        MeshError: when it is cut short, holds no points, or something else. trimesh and NumPy raise anything on other damages.
    """
    suffix, data = path.suffix.lower(), _content(path)
    if suffix == ".pcd":
        return read_pcd(data)
    least = max(_promised(data, "vertex"), 1) if suffix == ".ply" else 1
    if suffix in (".ply", *GLTF):
        points = np.concatenate([part.vertices for part in _load(path, data) if not len(getattr(part, "faces", ()))])
    else:
        points = _array(path)
    if not _has_points(points) or points.dtype.kind not in "fiu" or len(points) < least:
        turned = "; it looks transposed" if points.ndim == 2 and len(points) <= MOST_COLUMNS < points.shape[1] else ""
        expected = f"expected numbers of shape (n, 3) to (n, {MOST_COLUMNS}) with n >= {least}"
        raise MeshError(f"{expected}, found {points.dtype} {points.shape}{turned}")
    return points[:, :3].astype(np.float64), 0  # integers would not all bear a change of sign


def _has_points(array: np.ndarray) -> bool:
    return array.ndim == 2 and 3 <= array.shape[1] <= MOST_COLUMNS


def _array(path: Path) -> np.ndarray:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if "points" in loaded.files:
            return loaded["points"]
        if {"faces", "triangles"} & set(loaded.files):
            raise MeshError("a mesh in .npz: export it as OFF, OBJ or PLY")
        arrays = {}
        for name in loaded.files:
            with suppress(ValueError):  # of objects, which are never unpickled
                arrays[name] = loaded[name]
        likely = {name: array for name, array in arrays.items() if not BESIDE_POINTS.fullmatch(name)}
        found = [array for array in likely.values() if _has_points(array) and array.dtype.kind == "f"]
        if len(found) != 1:
            raise MeshError(f"expected an array points, or one other of floats of shape (n, 3), found {', '.join(loaded.files) or 'none'}")
        return found[0]
