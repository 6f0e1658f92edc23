"""Seconds per object of the mesh route: `python -m benchmarks.mesh_preparation --meshes DIR_OF_OFF_FILES`.

Reads, cleans, simplifies, samples and draws (12 views) every OFF file of a folder as `datasets.prepare_modelnet` does, one
after the other, and extrapolates to ModelNet40.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

from benchmarks.floors import start, timed, write_report
from datasets.prepare.readers.modelnet import MODELNET40
from datasets.prepare.readers.off import read_off
from datasets.prepare.recipe import MESH_SIZE, Recipe, modalities_of_mesh
from datasets.prepare.shapes.mesh import clean_mesh
from utils.engine.session import run_command
from utils.errors import UserError

MODELNET40_OBJECTS = sum(map(sum, MODELNET40.values()))
RECIPE = Recipe(size=MESH_SIZE, views=12, elevation=30.0, num_points=2048, sampling="farthest", max_faces=500, seed=0)


def main(argv: list[str] | None = None) -> None:
    """Time every mesh, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--meshes", type=Path, required=True, help="folder of OFF files")
    parser.add_argument("--workers", type=int, default=2, help="processes assumed by the extrapolation")
    args, report = start("mesh_preparation", parser, argv)
    files = sorted(args.meshes.glob("*.off"))
    if not files:
        raise UserError(f"{args.meshes} holds no .off file; give a folder of ModelNet meshes")
    prepare(files[0])  # imports and the first drawing are not counted
    rows = {}
    for file in files:
        found, seconds = timed(partial(prepare, file), args.device)
        rows[file.stem] = {"seconds": seconds, **found}
        print(f"{file.stem:20s} {seconds:6.2f} s, {found}")
    mean = statistics.mean(row["seconds"] for row in rows.values())
    hours = mean * MODELNET40_OBJECTS / args.workers / 3600
    print(f"mean {mean:.2f} s per object; all {MODELNET40_OBJECTS} objects of ModelNet40 on {args.workers} cores, extrapolated: "
          f"{hours:.1f} h")
    report |= {"objects": rows, "mean_seconds": mean, "modelnet40_hours_extrapolated": hours}
    write_report("mesh_preparation", report, args.output)


def prepare(file: Path) -> dict[str, float]:
    """Make all modalities of an OFF file; return its faces before and after, and the record of the simplification."""
    vertices, triangles = clean_mesh(*read_off(file.read_bytes()))
    arrays, record = modalities_of_mesh(RECIPE, vertices, triangles, file.stem)
    return {"faces": len(triangles), "faces_left": len(arrays["Mesh"]), **record}


if __name__ == "__main__":
    sys.exit(run_command(main))
