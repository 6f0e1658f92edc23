"""Make MI3DOR, photographs and meshes of 21 classes without instance pairs, from its official release.

python -m datasets.prepare_mi3dor --root DIR [--output dataset/mi3dor] [--pairing class|none]
"""

import argparse
import hashlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from datasets.prepare.first_use import store_arrays
from datasets.prepare.ownership import SPLITS, check_root, list_paths, package_versions, pairs_path, publish_lists
from datasets.prepare.parallel import add_writer_options, user_path
from datasets.prepare.readers.mi3dor import Item, by_name_hash, check_official, check_photographs, draw_of_same_class, read_release
from datasets.prepare.readers.obj import read_obj
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, normalise, simplified_faces
from datasets.prepare.writer import ObjectTask, object_file, report, write_dataset
from utils.errors import UserError

DATASETS = {"none": "mi3dor", "class": "mi3dor_class"}  # pairing -> prefix of the lists
MODALITIES = ("RGBImg", "GrayImg", "Mesh")
MESH_PACKAGES = ("fast-simplification", "pyvista", "vtk")
GENERATOR = "datasets.prepare_mi3dor"


def make_mesh(root: Path, max_faces: int, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make the Mesh of the model whose OBJ file is `task.member` below `root`, the folder of the release.

    Returns:
        "Mesh" -> (F, 18) float32, in the unit sphere; the sha256 of the OBJ file with the record of the simplification.
    Raises:
        MeshError: when the model cannot be used.
    """
    if task.member is None:
        raise MeshError("the release holds no OBJ file of this name")
    data = (root / task.member).read_bytes()
    vertices, triangles = clean_mesh(*read_obj(data))
    faces, record = simplified_faces(normalise(vertices), triangles, max_faces)
    return {"Mesh": faces}, {"source_sha256": hashlib.sha256(data).hexdigest(), **record}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=user_path, required=True, metavar="DIR", help="the unpacked release, which is only read")
    parser.add_argument(
        "--output", type=user_path, default="dataset/mi3dor", help="where meshes and lists go; one folder serves both pairings"
    )
    parser.add_argument(
        "--pairing", choices=tuple(DATASETS), default="none",
        help="none: unrelated training lists (data set mi3dor); class: rows of one class, made with labels (mi3dor_class)",
    )
    parser.add_argument("--max-faces", type=int, default=500, help="of the simplified mesh")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of --pairing class")
    add_writer_options(parser)
    parser.add_argument("--any-counts", action="store_true", help="accept other than the official counts; noted in the manifests")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    for key, least in (("max_faces", 4), ("seed", 0), ("workers", 1)):
        if getattr(options, key) < least:
            raise UserError(f"--{key.replace('_', '-')} must be at least {least}, found {getattr(options, key)}")
    packages = package_versions(MESH_PACKAGES)
    release = read_release(options.root)
    differences = check_official(release)
    if any(differences.values()) and not options.any_counts:
        found = "; ".join(line for line in differences.values() if line)
        raise UserError(f"{options.root}: {found}; fetch the complete release, or accept it as it is with --any-counts")
    tasks = [ObjectTask(number, m.name, m.split, m.label, m.file) for number, m in enumerate(by_name_hash(release.models))]
    sizes = [(options.root / task.member).stat().st_size if task.member else None for task in tasks]
    listing = "".join(f"{task.name} {task.label} {size}\n" for task, size in zip(tasks, sizes, strict=True))
    settings = {
        "format": 1, "dataset": DATASETS["none"], "generator": GENERATOR, "modalities": ["Mesh"], "layout": release.layout,
        "official_counts": differences["models"] is None, "class_to_index": release.class_to_index,
        "input_sha256": hashlib.sha256(listing.encode()).hexdigest(), "max_faces": options.max_faces, "packages": packages,
    }
    check_root(options.output, settings, options.overwrite)
    print(f"checking {len(release.images)} photographs, then making {len(release.models)} meshes")
    hashes = check_photographs(options.root, release.images, options.workers)
    make = partial(make_mesh, options.root, options.max_faces)
    lists = [path for dataset in DATASETS.values() for path in list_paths(options.output, dataset, MODALITIES).values()]
    made, meshes = write_dataset(
        options.output, settings, tasks, make, workers=options.workers, overwrite=options.overwrite,
        dependents=[*lists, *(pairs_path(options.output, dataset) for dataset in DATASETS.values())],
    )
    report(options.output, made, meshes)
    left_out = {entry["name"] for entry in meshes["left_out"]}
    kept = [task for task in tasks if task.name not in left_out]
    photographs = {split: by_name_hash(image for image in release.images if image.split == split) for split in SPLITS}
    if options.pairing == "class":
        labels = [task.label for task in kept if task.split == "train"]
        photographs["train"] = draw_of_same_class(photographs["train"], labels, options.seed)
    _publish(options, differences, photographs, kept, hashes, meshes)


def _publish(
    options: argparse.Namespace, differences: dict, photographs: dict[str, list[Item]], models: list[ObjectTask],
    hashes: dict[str, str], meshes: dict,
) -> None:
    """Write the lists of one pairing and their manifest."""
    dataset, root = DATASETS[options.pairing], options.root.resolve()
    texts, content = {}, {}
    for split, images in photographs.items():
        pictures = "".join(f"{root / image.file} {image.label}\n" for image in images)
        faces = "".join(f"{object_file('Mesh', split, task.number)} {task.label}\n" for task in models if task.split == split)
        texts |= {("RGBImg", split): pictures, ("GrayImg", split): pictures, ("Mesh", split): faces}
        digest = hashlib.sha256("".join(f"{image.name} {hashes[image.name]}\n" for image in images).encode()).hexdigest()
        content[split] = {"RGBImg": digest, "GrayImg": digest, **meshes["content_sha256"][split]}
    shown = Counter(image.name for image in photographs["train"])
    training = {hashes[name] for name in shown}
    manifest = {
        "format": 1, "dataset": dataset, "generator": GENERATOR, "layout": meshes["layout"], "pairing": options.pairing,
        "uses_labels_for_training_pairs": options.pairing == "class",
        "seed": options.seed if options.pairing == "class" else None,
        "official_counts": {kind: line is None for kind, line in differences.items()},
        "class_to_index": meshes["class_to_index"],
        "counts": {split: {name: texts[name, split].count("\n") for name in MODALITIES} for split in SPLITS},
        "distinct_training_photographs": len(shown), "largest_use_of_one_photograph": max(shown.values()),
        "test_photographs_also_in_training": sum(hashes[image.name] in training for image in photographs["test"]),
        "content_sha256": content,
    }
    written = publish_lists(options.output, manifest, texts, options.overwrite)
    print(f"{dataset}: lists {'written' if written else 'already there'}; rows {manifest['counts']}")
    store_arrays(options.output, dataset)
    if options.pairing == "class":
        print("--pairing class read the class labels to build the training pairs: results on mi3dor_class are not unsupervised")
