"""Make any folder of 3D models, or an archive of meshes, in every modality, with a configuration to train on it.

python -m datasets.prepare_objects --name NAME --root DIR [--output dataset/NAME] [--split 0.8] [--labels folder|none]
python -m datasets.prepare_objects --name NAME --npz MESHES.npz
"""

import argparse
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from datasets.prepare.configurations import MARK, SHARED, misfits, write_configs
from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import SPLITS, mesh_packages, read_journal
from datasets.prepare.parallel import add_writer_options, user_path
from datasets.prepare.readers.collection import Item, make_tasks, mostly_clouds, read_folder, read_npz, remarks
from datasets.prepare.readers.modelnet import to_z_up
from datasets.prepare.readers.objects import FORMATS, GLTF, joined, read_cloud, read_npz_parts, read_parts, vertical_axis
from datasets.prepare.recipe import Recipe, add_recipe_options, modalities_of_cloud, modalities_of_mesh, thinned
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, normalise
from datasets.prepare.shapes.render import probe_renderer
from datasets.prepare.writer import SKIPPED, ObjectTask, write_dataset, write_skipped
from utils.errors import UserError
from utils.settings.options import DataConfig

UNITS = {"mm": 0.001, "cm": 0.01, "in": 0.0254, "m": 1.0}
NPZ_CLASS_SIZE = 10
FEWEST = 2  # training objects


@dataclass(frozen=True)
class ObjectRecipe(Recipe):
    """A `Recipe` and how files are read: their vertical axis, None for that of the format; their unit of lengths, if known; whether
    pictures show textures. `max_faces` is None for clouds.
    """

    up: str | None
    unit: str | None
    texture: bool


def make_object(
    recipe: ObjectRecipe, archive: Path | None, reasons: Mapping[str, str], task: ObjectTask
) -> tuple[dict[str, np.ndarray], dict]:
    """Make all modalities of the object in the file, or row of the archive of meshes, `task.member`; where it cannot be used, of the
    first of `task.others` that can.

    Args:
        reasons: name -> why an object is left out without being read.
    Returns:
        As `modalities_of_mesh` or `modalities_of_cloud`; facts: `size`, the longest side, in metres where the unit is known,
        `points`, the number of points, `neutral`, where textures are asked for and it has no look, and, of one of the others, `read`,
        its name, and `unread`, name -> reason.
    """
    if task.name in reasons:
        raise MeshError(reasons[task.name])
    unread = {}
    for place in (task.member, *task.others):
        name = task.name.removesuffix(Path(task.member).suffix) + Path(place).suffix
        try:
            arrays, facts = _make(recipe, archive, replace(task, member=place))
        except MeshError as error:
            unread[name] = str(error)
        else:
            return arrays, {**facts, "read": name, "unread": unread} if unread else facts
    raise MeshError("; ".join([unread.pop(task.name), *(f"{name}: {reason}" for name, reason in unread.items())]))


def _make(recipe: ObjectRecipe, archive: Path | None, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    try:
        arrays, facts = (_from_cloud if recipe.max_faces is None else _from_mesh)(recipe, archive, task)
    except (MeshError, UserError):
        raise
    except Exception as error:  # libraries raise anything on a damaged file
        raise MeshError(f"cannot be read or worked with: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if arrays["GrayImg"][0].min() == 255:
        raise MeshError("its first picture is blank: it is flat and seen from the side")
    return arrays, {**facts, "points": len(arrays["PointCloud"])}


def _from_cloud(recipe: ObjectRecipe, _: None, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    points, dropped = read_cloud(Path(task.member))
    cloud = thinned(normalise(to_z_up(points, vertical_axis(task.member, recipe.up))), recipe, task.name).astype(np.float32)
    return modalities_of_cloud(recipe, cloud), {"dropped_points": dropped, "size": _size(points, recipe.unit)}


def _from_mesh(recipe: ObjectRecipe, archive: Path | None, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    parts = read_npz_parts(archive, int(task.member)) if archive else read_parts(Path(task.member), recipe.texture)
    parts = [(to_z_up(vertices, vertical_axis(task.member, recipe.up)), *rest) for vertices, *rest in parts]
    vertices, triangles = clean_mesh(*joined(parts))
    painted = parts if any(look is not None for *_, look in parts) else ()
    arrays, facts = modalities_of_mesh(recipe, vertices, triangles, task.name, parts=painted)
    facts |= {"neutral": True} if recipe.texture and not painted else {}
    return arrays, {**facts, "size": _size(vertices, "m" if task.member.lower().endswith(GLTF) else recipe.unit)}


def _size(points: np.ndarray, unit: str | None) -> float:
    return float(np.ptp(points, axis=0).max() * UNITS.get(unit, 1.0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the data set, in file names and configs/NAME")
    parser.add_argument("--root", metavar="DIR", type=user_path, help=f"models ({' '.join(FORMATS)}), in class folders or not; only read")
    parser.add_argument("--npz", metavar="FILE", type=user_path, help="meshes in one archive, see docs/data.md")
    parser.add_argument("--output", metavar="DIR", type=user_path, help="where it goes; default dataset/NAME")
    parser.add_argument("--split", type=float, default=0.8, help="training share, where there are no folders train/ and test/")
    parser.add_argument("--labels", choices=("folder", "none"), default="folder", help="whether the class folders are labels")
    parser.add_argument("--min-class-size", type=int, help=f"smaller classes are left out; default 1, with --npz {NPZ_CLASS_SIZE}")
    parser.add_argument("--up", choices=("x", "y", "z"), help="vertical axis; default y in GLB and GLTF, z in all others")
    parser.add_argument("--unit", choices=tuple(UNITS), help="of lengths, for `size` in objects.jsonl; GLB and GLTF have metres")
    parser.add_argument("--texture", action="store_true", help="pictures show the colours and textures that files have")
    add_recipe_options(parser)
    add_writer_options(parser)
    return parser


def _check(options: argparse.Namespace, output: Path, configs: Path) -> None:
    DataConfig(dataset=options.name)  # refuses a name that cannot be part of file names
    if not SHARED.is_dir():
        raise UserError(f"found no {SHARED} here, which configurations of new data extend: run the command in the folder of the repository")
    if options.min_class_size is not None and options.min_class_size < 1:
        raise UserError(f"--min-class-size must be at least 1, found {options.min_class_size}")
    if bool(options.root) == bool(options.npz):
        raise UserError("expected --root DIR or --npz FILE")
    if not 0 < options.split < 1:
        raise UserError(f"--split must be between 0 and 1, found {options.split}")
    if options.root and not options.root.is_dir():
        raise UserError(f"--root {options.root} is not a folder")
    if options.root and output.resolve().is_relative_to(options.root.resolve()):
        raise UserError(f"--output {output} lies in --root {options.root}; what is made there would be taken for models")
    foreign = [path for path in configs.glob("*.yaml") if not path.read_text(encoding="utf-8", errors="replace").startswith(MARK)]
    if foreign:
        raise UserError(f"{foreign[0]} is not of this command; choose another --name")


def _settings(options: argparse.Namespace, recipe: ObjectRecipe, items: Sequence[Item], classes: list[str]) -> dict:
    clouds, content = recipe.max_faces is None, "".join(f"{item.name} {item.sha256}\n" for item in items)
    return {
        "format": 2, "dataset": options.name, "generator": "datasets.prepare_objects", "pictures": "splat" if clouds else "mesh",
        "modalities": ["RGBImg", "GrayImg", "PointCloud", *([] if clouds else ["Mesh"])], "classes": classes, "split": options.split,
        "input_sha256": hashlib.sha256(content.encode()).hexdigest(), **asdict(recipe),
        "packages": {} if clouds else mesh_packages("trimesh"),
    }


def _skipped(manifest: Mapping, entries: Collection[Mapping]) -> dict[str, str]:
    """Return name -> reason of the objects that are left out, and of the files in whose place others were read."""
    read = {entry.get("read") for entry in entries}
    skipped = {entry["name"]: entry["left_out"] for entry in manifest["left_out"] if entry["name"] not in read}
    for entry in entries:
        skipped |= entry.get("unread", {})
    return skipped


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    output, configs = options.output or Path("dataset") / options.name, Path("configs") / options.name
    _check(options, output, configs)
    items, passed_over = (read_npz(options.npz), []) if options.npz else read_folder(options.root)
    clouds, least = mostly_clouds(items), options.min_class_size or (NPZ_CLASS_SIZE if options.npz else 1)
    if clouds and options.texture:
        raise UserError("--texture is for meshes, and these are clouds, whose pictures are always neutral: leave it out")
    labelled = options.labels == "folder" and any(item.object_class for item in items)
    tasks, classes, reasons = make_tasks(items, options.split, labelled, least)
    named = f"{len(classes)} classes ({', '.join(classes[:8])}{', ...' * (len(classes) > 8)})" if classes else "no classes"
    print(f"{len(items)} objects, {named}, split {'as in the folders' if items[0].split else f'by hash, {options.split} for training'}")
    recipe = ObjectRecipe.of(options, meshes=not clouds)
    settings = _settings(options, recipe, items, classes)
    if not clouds:
        probe_renderer()
    make = partial(make_object, recipe, options.npz, reasons)
    _, manifest = write_dataset(output, settings, tasks, make, workers=options.workers, overwrite=options.overwrite)
    entries = read_journal(output)[1].values()
    write_skipped(output / SKIPPED, skipped := _skipped(manifest, entries))
    print(f"{len(skipped)} of {len(tasks)} objects skipped, with their reasons in {output / SKIPPED}")
    if passed_over:
        print("passed over:", ", ".join(passed_over))
    print("".join(f"note: {remark}\n" for remark in remarks(items, classes, entries)), end="")
    made = [entry for entry in entries if "files" in entry]
    points = min(max(entry["points"] for entry in made if entry["split"] == split) for split in SPLITS)  # arrays are as wide as that
    size = manifest["counts"]["train"]
    write_configs(configs, settings, output, size, points, options.overwrite)
    if differing := misfits(configs / "step1.yaml", settings, output):
        print(f"{configs}/step1.yaml does not fit: {'; '.join(differing)}. Change it, or repeat the command with --overwrite")
        return
    store_arrays(output, options.name)
    if not classes:
        print("no labels: both steps train without them; evaluation will say that it needs them")
    if size < FEWEST:
        print(f"{size} training object, both steps need {FEWEST}: add objects or choose another --split, and repeat this with --overwrite")
        return
    print(f"train on it:\n  python train_step1.py --config {configs}/step1.yaml\n  python train_step2.py --config {configs}/step2.yaml")
