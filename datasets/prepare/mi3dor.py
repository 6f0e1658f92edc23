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
from datasets.prepare.ownership import SPLITS, check_root, mesh_packages, publish_lists
from datasets.prepare.parallel import user_path
from datasets.prepare.photographs import PICTURES, add_pairing_options, by_name_hash, joint_lists, paths_of_pairings
from datasets.prepare.readers.mi3dor import Release, check_official, check_photographs, read_release
from datasets.prepare.readers.obj import read_obj
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, normalise, simplified_faces
from datasets.prepare.writer import ObjectTask, write_dataset
from utils.errors import UserError

DATASET = "mi3dor"
GENERATOR = "datasets.prepare_mi3dor"


def make_mesh(root: Path, max_faces: int, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Make the Mesh (F, 18) float32 of the model whose OBJ file is `task.member` below `root`, the folder of the release.

    Its facts are the sha256 of the OBJ file and the record of the simplification.
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
    add_pairing_options(parser, DATASET)
    parser.add_argument("--max-faces", type=int, default=500, help="of the simplified mesh")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of --pairing class")
    return parser


def _read_accepted(options: argparse.Namespace) -> tuple[Release, dict[str, str | None]]:
    """Return the release, and what `check_official` says of it: nothing, unless --any-counts accepts it."""
    release = read_release(options.root)
    differences = check_official(release)
    if any(differences.values()) and not options.any_counts:
        found = "; ".join(line for line in differences.values() if line)
        raise UserError(f"{options.root}: {found}; fetch the complete release, or accept it as it is with --any-counts")
    return release, differences


def main(arguments: list[str] | None = None) -> None:
    """Run the command; `arguments` default to those of the process."""
    options = _parser().parse_args(arguments)
    for key, least in (("max_faces", 4), ("seed", 0), ("workers", 1)):
        if getattr(options, key) < least:
            raise UserError(f"--{key.replace('_', '-')} must be at least {least}, found {getattr(options, key)}")
    packages = mesh_packages()
    release, differences = _read_accepted(options)
    tasks = [ObjectTask(number, m.name, m.split, m.label, m.file) for number, m in enumerate(by_name_hash(release.models))]
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    listing = "".join(f"{task.name} {task.label} {task.member and digest(options.root / task.member)}\n" for task in tasks)
    settings = {
        "format": 1, "dataset": DATASET, "generator": GENERATOR, "modalities": ["Mesh"], "layout": release.layout,
        "official_counts": differences["models"] is None, "class_to_index": release.class_to_index,
        "input_sha256": hashlib.sha256(listing.encode()).hexdigest(), "max_faces": options.max_faces, "packages": packages,
    }
    check_root(options.output, settings, options.overwrite)
    print(f"checking {len(release.images)} photographs, then making {len(release.models)} meshes")
    hashes = check_photographs(options.root, release.images, options.workers)
    make = partial(make_mesh, options.root, options.max_faces)
    _, made = write_dataset(
        options.output, settings, tasks, make, workers=options.workers, overwrite=options.overwrite,
        dependents=paths_of_pairings(options.output, DATASET, "Mesh"),
    )
    by_class = options.pairing == "class"
    dataset, seed = (f"{DATASET}_class", options.seed) if by_class else (DATASET, None)
    texts, counts, photographs, digests = joint_lists(options.root.resolve(), release.images, hashes, tasks, made, seed)
    shown = Counter(image.name for image in photographs["train"])
    training = {hashes[name] for name in shown}
    manifest = {
        "format": 1, "dataset": dataset, "generator": GENERATOR, "layout": made["layout"], "pairing": options.pairing,
        "uses_labels_for_training_pairs": by_class, "seed": seed,
        "official_counts": {kind: line is None for kind, line in differences.items()},
        "class_to_index": made["class_to_index"], "counts": counts,
        "distinct_training_photographs": len(shown), "largest_use_of_one_photograph": max(shown.values()),
        "test_photographs_also_in_training": sum(hashes[image.name] in training for image in photographs["test"]),
        "content_sha256": {split: {**dict.fromkeys(PICTURES, digests[split]), **made["content_sha256"][split]} for split in SPLITS},
    }
    written = publish_lists(options.output, manifest, texts, options.overwrite)
    print(f"{dataset}: lists {'written' if written else 'already there'}; rows {manifest['counts']}")
    store_arrays(options.output, dataset)
