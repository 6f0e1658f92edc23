"""Seconds per object of the mesh route: `python -m benchmarks.mesh_preparation --meshes DIR_OF_OFF_FILES`.

Reads, cleans, simplifies, samples and draws (12 views) every OFF file of a folder as `datasets.prepare_modelnet` does, one
after the other, and extrapolates to ModelNet40.
"""

import argparse
import statistics
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from benchmarks.floors import start, timed, write_report
from datasets.prepare.modelnet import make_object
from datasets.prepare.readers.modelnet import MODELNET40, make_tasks, read_archive
from datasets.prepare.readers.off import read_off
from datasets.prepare.recipe import MESH_SIZE, Recipe
from datasets.prepare.shapes.mesh import clean_mesh
from utils.engine.session import run_command
from utils.errors import UserError

MODELNET40_OBJECTS = sum(map(sum, MODELNET40.values()))


def main(argv: list[str] | None = None) -> None:
    """Time every mesh, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--meshes", type=Path, required=True, help="folder with CLASS_0001.off ... of ModelNet10 classes")
    parser.add_argument("--workers", type=int, default=2, help="processes assumed by the extrapolation")
    args, report = start("mesh_preparation", parser, argv)
    files = sorted(args.meshes.glob("*.off"))
    if not files:
        raise UserError(f"{args.meshes} holds no .off file; give a folder of ModelNet meshes")
    recipe = Recipe(size=MESH_SIZE, views=12, elevation=30.0, num_points=2048, sampling="farthest", max_faces=500, seed=0)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "ModelNet10.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for file in files:
                target.write(file, f"ModelNet10/{file.stem.rsplit('_', 1)[0]}/train/{file.name}")
        tasks = make_tasks(read_archive(archive))
        make_object(recipe, str(archive), False, tasks[0])  # imports and the first drawing are not counted
        for task in sorted(tasks, key=lambda task: task.name):
            (arrays, record), seconds = timed(partial(make_object, recipe, str(archive), False, task), args.device)
            faces = len(clean_mesh(*read_off((args.meshes / f"{task.name}.off").read_bytes()))[1])
            rows[task.name] = {"seconds": seconds, "faces": faces, "faces_left": len(arrays["Mesh"]), **record}
            print(f"{task.name:20s} {faces:8d} faces -> {len(arrays['Mesh']):4d}, {seconds:6.2f} s, {record}")
    mean = statistics.mean(row["seconds"] for row in rows.values())
    hours = mean * MODELNET40_OBJECTS / args.workers / 3600
    print(f"mean {mean:.2f} s per object; all {MODELNET40_OBJECTS} objects of ModelNet40 on {args.workers} cores, extrapolated: "
          f"{hours:.1f} h")
    report |= {"objects": rows, "mean_seconds": mean, "modelnet40_hours_extrapolated": hours}
    write_report("mesh_preparation", report, args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
