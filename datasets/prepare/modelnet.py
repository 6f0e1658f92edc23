"""Make ModelNet10 or ModelNet40 in every modality from its meshes, or, without Mesh, from point clouds alone.

python -m datasets.prepare_modelnet --archive ModelNet10.zip|ModelNet40.zip [--points HDF5_DIR]
python -m datasets.prepare_modelnet --npz modelnet10_points.npz|modelnet40_points.npz
python -m datasets.prepare_modelnet --points HDF5_DIR
python -m datasets.prepare_modelnet --pcd DIR
"""

import argparse
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from datasets.prepare.ownership import package_versions, read_journal
from datasets.prepare.parallel import add_writer_options, user_path
from datasets.prepare.readers.archives import read_member
from datasets.prepare.readers.modelnet import OFFICIAL, Source, check_official, make_tasks, read_archive, read_hdf5, read_npz, to_z_up
from datasets.prepare.readers.off import read_off
from datasets.prepare.readers.pcd import read_pcd, read_pcd_folder
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, farthest_points, normalise, sample_surface, simplified_faces
from datasets.prepare.shapes.render import luminance, probe_renderer, render_views, ring_of_cameras, splat_views
from datasets.prepare.writer import ObjectTask, report, write_dataset
from utils.errors import UserError

CANDIDATES = 4  # surface points drawn per point kept by farthest-point sampling
SAMPLINGS = ("farthest", "surface")
MESH_SIZE, SPLAT_SIZE = 224, 112  # pixels; a thousand points do not fill more
MESH_PACKAGES = ("fast-simplification", "pyvista", "vtk")


@dataclass(frozen=True)
class Recipe:
    """What decides the content of the files, apart from the source; passed to the worker processes."""

    size: int
    views: int
    elevation: float
    num_points: int | None
    sampling: str | None
    max_faces: int | None
    seed: int

    def __post_init__(self) -> None:
        ring_of_cameras(self.views, self.elevation)  # refuses bad values before anything is read
        for key, least in (("size", 8), ("num_points", 1), ("max_faces", 4), ("seed", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"--{key.replace('_', '-')} must be at least {least}, found {value}")


def make_object(recipe: Recipe, archive: Path | None, needs_cloud: bool, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make all modalities of one object.

    Args:
        recipe: sizes and counts; archive: zip file of `task.member`; task: the object.
        needs_cloud: leave the object out if it brings no cloud.
    Returns:
        RGBImg (views, S, S, 3) and GrayImg (views, S, S) uint8, PointCloud (n, 3) float32, Mesh (F, 18) float32 if there is
        one; and the record of the simplification.
    Raises:
        MeshError: when the object cannot be used.
    """
    if needs_cloud and task.cloud is None:
        raise MeshError("the folder of clouds has none of this object")
    cameras = ring_of_cameras(recipe.views, recipe.elevation)
    if archive is None:
        images = splat_views(normalise(task.cloud), cameras, recipe.size)
        return {"RGBImg": images, "GrayImg": luminance(images), "PointCloud": task.cloud}, {}
    vertices, triangles = clean_mesh(*read_off(read_member(archive, task.member)))
    vertices = normalise(vertices)
    faces, record = simplified_faces(vertices, triangles, recipe.max_faces)
    cloud = _sample(vertices, triangles, recipe, task.name) if task.cloud is None else task.cloud
    images = render_views(vertices, triangles, cameras, recipe.size)
    return {"RGBImg": images, "GrayImg": luminance(images), "PointCloud": cloud, "Mesh": faces}, record


def make_from_pcd(recipe: Recipe, up: str, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make the modalities of one object from the PCD file `task.member`, as `make_object` does.

    Its facts are `dropped_points`, how many points of the file were not valid; `up` is the vertical axis of the file, "y" or "z".
    """
    cloud, dropped = read_pcd(Path(task.member).read_bytes())
    arrays, facts = make_object(recipe, None, False, replace(task, cloud=to_z_up(cloud, up)))
    return arrays, {**facts, "dropped_points": dropped}


def _sample(vertices: np.ndarray, triangles: np.ndarray, recipe: Recipe, name: str) -> np.ndarray:
    seed = (recipe.seed, zlib.crc32(name.encode()))
    if recipe.sampling == "surface":
        return sample_surface(vertices, triangles, recipe.num_points, seed).astype(np.float32)
    candidates = sample_surface(vertices, triangles, CANDIDATES * recipe.num_points, seed)
    return farthest_points(candidates, recipe.num_points, seed).astype(np.float32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", metavar="ZIP", type=user_path, help="ModelNet10.zip or ModelNet40.zip: all four modalities")
    parser.add_argument("--points", metavar="HDF5_DIR", type=user_path, help="clouds to take; alone: clouds and splats")
    parser.add_argument("--npz", metavar="FILE", type=user_path, help="modelnet10_points.npz or ...40_...: clouds and splats")
    parser.add_argument("--pcd", metavar="DIR", type=user_path, help="DIR/CLASS/{train,test}/CLASS_0001.pcd: clouds and splats")
    parser.add_argument("--root", type=user_path, help="where it goes; default dataset/modelnet10, modelnet40 or ..._splat")
    parser.add_argument("--size", type=int, help=f"side of the pictures; default {MESH_SIZE}, from points {SPLAT_SIZE}")
    parser.add_argument("--views", type=int, default=12, help="cameras around the object")
    parser.add_argument("--elevation", type=float, default=30.0, help="of the cameras, degrees")
    parser.add_argument("--num-points", type=int, default=2048, help="points drawn from each mesh")
    parser.add_argument("--sampling", choices=SAMPLINGS, default="farthest", help="farthest: any beginning is well spread")
    parser.add_argument("--max-faces", type=int, default=500, help="of the simplified mesh")
    parser.add_argument("--up", choices=("y", "z"), help="vertical axis of the clouds; default y in --points, z in --pcd")
    parser.add_argument("--seed", type=int, default=0, help="of the surface points")
    parser.add_argument("--any-counts", action="store_true", help="accept other than the official counts; noted in the manifest")
    add_writer_options(parser)
    return parser


def _read_sources(options: argparse.Namespace) -> tuple[Source, Source | None]:
    """Return the source of the objects and, if the clouds come from elsewhere, theirs."""
    if bool(options.npz) + bool(options.pcd) + bool(options.archive or options.points) != 1:
        raise UserError("expected --archive ZIP, --archive ZIP --points HDF5_DIR, --points HDF5_DIR, --npz FILE, or --pcd DIR")
    if options.npz:
        return read_npz(options.npz), None
    if options.pcd:
        return read_pcd_folder(options.pcd, options.up or "z"), None
    clouds = read_hdf5(options.points, options.up or "y") if options.points else None
    return (read_archive(options.archive), clouds) if options.archive else (clouds, None)


def _settings(recipe: Recipe, source: Source, clouds: Source | None, official: bool) -> dict:
    meshes = recipe.max_faces is not None
    return {
        "format": 1, "dataset": source.dataset if meshes else f"{source.dataset}_splat", "generator": "datasets.prepare_modelnet",
        "pictures": "mesh" if meshes else "splat",
        "modalities": ["RGBImg", "GrayImg", "PointCloud", *(["Mesh"] if meshes else [])], "official_counts": official,
        "classes": list(OFFICIAL[source.dataset]),
        "input_sha256": {"objects": source.sha256, **({"clouds": clouds.sha256} if clouds else {})}, **asdict(recipe),
        "packages": package_versions(MESH_PACKAGES if meshes else ()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    source, clouds = _read_sources(options)
    difference = check_official(source, hdf5=bool(options.points and not options.archive))
    if difference and not options.any_counts:
        raise UserError(f"{difference}; fetch the complete set, or accept it as it is with --any-counts")
    meshes, sampled = bool(options.archive), bool(options.archive and not clouds)
    recipe = Recipe(
        size=options.size or (MESH_SIZE if meshes else SPLAT_SIZE), views=options.views, elevation=options.elevation,
        num_points=options.num_points if sampled else None, sampling=options.sampling if sampled else None,
        max_faces=options.max_faces if meshes else None, seed=options.seed,
    )
    settings = _settings(recipe, source, clouds, difference is None)
    if meshes:
        probe_renderer()
    tasks = make_tasks(source, {shape.name: shape.cloud for shape in clouds.shapes} if clouds else None)
    root = options.root or Path("dataset") / settings["dataset"]
    make = partial(make_object, recipe, options.archive, bool(clouds))
    if options.pcd:
        make = partial(make_from_pcd, recipe, options.up or "z")
    made, manifest = write_dataset(root, settings, tasks, make, workers=options.workers, overwrite=options.overwrite)
    report(root, made, manifest)
    dropped = [entry["dropped_points"] for entry in read_journal(root)[1].values() if entry.get("dropped_points")]
    if dropped:
        print(f"{sum(dropped)} invalid points dropped from {len(dropped)} clouds (`dropped_points` in objects.jsonl)")
