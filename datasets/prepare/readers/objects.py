"""Reads one 3D model, from its file or from an archive of meshes. Called by `datasets.prepare.objects` and by search."""

import io
import json
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

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
UNREAD = {"KHR_draco_mesh_compression", "EXT_meshopt_compression", "EXT_mesh_gpu_instancing"}  # extensions that trimesh passes over
READ = ("KHR_materials", "KHR_texture", "EXT_texture", "KHR_lights", "KHR_mesh_quantization")  # those that files may require
TRIANGLE_FAN = 6  # a mode of GLTF
NPZ_ARRAYS = ("vertices", "faces", "vertex_offset", "face_offset", "label", "classes", "instance_id")
NPZ_UNIT = 30000
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

    OFF, OBJ and PLY files have readers of their own. Of these trimesh's reading counts, with `texture`, where it finds the same surface,
    and of binary PLY files, which it notices to be cut short and reads fast, where every face is a triangle.

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
    areas = [sum(triangle_areas(vertices, triangles).sum() for vertices, triangles, _ in parts) for parts in (own, seen)]
    return seen if seen and np.isclose(*areas, rtol=1e-4) else own


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
    unread = _unread(data) if gltf else ()
    if unread:
        raise MeshError(f"not read: {', '.join(unread)}; export it without, uncompressed")
    # finds buffers, in and below the folder of the file, and textures, anywhere; a path must be UTF-8 to be loaded
    resolver = Neighbours(str(path), allow_anywhere=texture)
    plain = {"skip_materials": True} if gltf and not texture else {}
    scene = trimesh.load_scene(io.BytesIO(data), file_type=path.suffix[1:].lower(), resolver=resolver, process=False, **plain)
    for mesh in scene.geometry.values() if gltf and texture else ():
        keep_vertex_colours(mesh)
    return scene.dump()


def _unread(data: bytes) -> list[str]:
    """Return what of a GLB or GLTF file trimesh would pass over without a word; nothing of a damaged one, where it says so."""
    found = []
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        content = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")] if data[:4] == b"glTF" else data)
        needed = [name for name in content.get("extensionsRequired", ()) if not name.startswith(READ)]
        found += sorted({*needed, *UNREAD.intersection(content.get("extensionsUsed", ()))})
        drawn, nodes = [entry for mesh in content["meshes"] for entry in mesh["primitives"]], content.get("nodes", [])
        found += ["geometry of or below a camera"] * any("camera" in node and {"children", "mesh"} & node.keys() for node in nodes)
        found += ["meshes that no scene shows"] * (not any(scene.get("nodes") for scene in content.get("scenes", ())))
        found += ["a skin"] * any("skin" in node for node in nodes)
        found += ["a morph target with a weight"] * any(any(made.get("weights", ())) for made in (*nodes, *content["meshes"]))
        found += ["a triangle fan"] * any(entry.get("mode") == TRIANGLE_FAN for entry in drawn)
        places = [content["accessors"][entry["attributes"]["POSITION"]] for entry in drawn]
        corners = [content["accessors"][entry["indices"]] for entry in drawn if "indices" in entry]
        found += ["normalised integer positions"] * any(entry.get("normalized") for entry in places)
        found += ["a sparse accessor"] * any("sparse" in entry for entry in places + corners)
    return found


def _stl(data: bytes) -> tuple[bytes, int]:
    """Return the content of an STL file, without what follows a binary one, and how many triangles it promises."""
    count = int.from_bytes(data[80:84], "little")
    if 84 <= 84 + 50 * count <= len(data):
        return data[: 84 + 50 * count], count
    return data, len(re.findall(rb"(?m)^\s*facet\b", data.lower()))


def _scene(path: Path, data: bytes, texture: bool) -> list[Part]:
    data, promised = _stl(data) if path.suffix.lower() == ".stl" else (data, _promised(data, "face"))
    meshes = [mesh for mesh in _load(path, data, texture) if len(getattr(mesh, "faces", ()))]
    found, promised = sum(len(mesh.faces) for mesh in meshes), max(promised, 1)
    if found < promised:
        raise MeshError(f"empty, cut short or of points alone: {found} triangles, of at least {promised}")
    return _checked([(np.asarray(mesh.vertices), np.asarray(mesh.faces), look_of(mesh) if texture else None) for mesh in meshes])


def _painted(path: Path, data: bytes) -> list[Part]:
    """As `_scene` with textures, or without if one of them is damaged."""
    with suppress(Exception):
        return _scene(path, data, texture=True)
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
    the one such array of floats.

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
        found = [array for array in arrays.values() if _has_points(array) and array.dtype.kind == "f"]
        if len(found) != 1:
            raise MeshError(f"expected an array points, or one other of floats of shape (n, 3), found {', '.join(loaded.files) or 'none'}")
        return found[0]
