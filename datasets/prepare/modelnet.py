"""Make ModelNet10 or ModelNet40 in every modality from its meshes, or, without Mesh, from point clouds alone.

python -m datasets.prepare_modelnet --archive ModelNet10.zip|ModelNet40.zip [--points HDF5_DIR]
python -m datasets.prepare_modelnet --npz modelnet10_points.npz|modelnet40_points.npz
python -m datasets.prepare_modelnet --points HDF5_DIR
python -m datasets.prepare_modelnet --pcd DIR
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import mesh_packages, read_journal
from datasets.prepare.parallel import add_writer_options, user_path
from datasets.prepare.readers.archives import read_member
from datasets.prepare.readers.modelnet import OFFICIAL, Source, check_official, make_tasks, read_archive, read_hdf5, read_npz, to_z_up
from datasets.prepare.readers.off import read_off
from datasets.prepare.readers.pcd import read_pcd, read_pcd_folder
from datasets.prepare.recipe import Recipe, add_recipe_options, modalities_of_cloud, modalities_of_mesh
from datasets.prepare.shapes.mesh import MeshError, clean_mesh
from datasets.prepare.shapes.render import probe_renderer
from datasets.prepare.writer import ObjectTask, write_dataset
from utils.errors import UserError


def make_object(recipe: Recipe, archive: Path | None, needs_cloud: bool, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make the modalities of one object, see `modalities_of_mesh` and, without an archive, `modalities_of_cloud`.

    Args:
        archive: zip file of `task.member`; needs_cloud: leave the object out, by a MeshError, if it brings no cloud.
    """
    if needs_cloud and task.cloud is None:
        raise MeshError("the folder of clouds has none of this object")
    if archive is None:
        return modalities_of_cloud(recipe, task.cloud), {}
    return modalities_of_mesh(recipe, *clean_mesh(*read_off(read_member(archive, task.member))), task.name, task.cloud)


def make_from_pcd(recipe: Recipe, up: str, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make the modalities of one object from the PCD file `task.member`, as `make_object` does.

    Its facts are `dropped_points`, how many points of the file were not valid; `up` is the vertical axis of the file, "y" or "z".
    """
    cloud, dropped = read_pcd(Path(task.member).read_bytes())
    return modalities_of_cloud(recipe, to_z_up(cloud, up)), {"dropped_points": dropped}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", metavar="ZIP", type=user_path, help="ModelNet10.zip or ModelNet40.zip: all four modalities")
    parser.add_argument("--points", metavar="HDF5_DIR", type=user_path, help="clouds to take; alone: clouds and splats")
    parser.add_argument("--npz", metavar="FILE", type=user_path, help="modelnet10_points.npz or ...40_...: clouds and splats")
    parser.add_argument("--pcd", metavar="DIR", type=user_path, help="DIR/CLASS/{train,test}/CLASS_0001.pcd: clouds and splats")
    parser.add_argument("--root", type=user_path, help="where it goes; default dataset/modelnet10, modelnet40 or ..._splat")
    add_recipe_options(parser)
    parser.add_argument("--up", choices=("y", "z"), help="vertical axis of the clouds; default y in --points, z in --pcd")
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
        "packages": mesh_packages() if meshes else {},
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    source, clouds = _read_sources(options)
    is_official = check_official(source, options.any_counts, hdf5=bool(options.points and not options.archive))
    meshes, sampled = bool(options.archive), bool(options.archive and not clouds)
    recipe = Recipe.of(options, meshes, **({} if sampled else {"num_points": None, "sampling": None}))
    settings = _settings(recipe, source, clouds, is_official)
    if meshes:
        probe_renderer()
    tasks = make_tasks(source, {shape.name: shape.cloud for shape in clouds.shapes} if clouds else None)
    root = options.root or Path("dataset") / settings["dataset"]
    make = partial(make_object, recipe, options.archive, bool(clouds))
    if options.pcd:
        make = partial(make_from_pcd, recipe, options.up or "z")
    write_dataset(root, settings, tasks, make, workers=options.workers, overwrite=options.overwrite)
    store_arrays(root, settings["dataset"])
    dropped = [entry["dropped_points"] for entry in read_journal(root)[1].values() if entry.get("dropped_points")]
    if dropped:
        print(f"{sum(dropped)} invalid points dropped from {len(dropped)} clouds (`dropped_points` in objects.jsonl)")
