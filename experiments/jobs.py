"""Turns cells into jobs of the scheduler: command line, what to resume, progress, and the record of a finished run."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.cells import Cell
from experiments.runner import Job
from utils.engine.run_log import REPOSITORY, RunLog, environment
from utils.errors import UserError

TRAINING = ("step1", "step2")
MODULES = {"release_protocol": "baselines.release_protocol",
           "memory_bank": "benchmarks.memory_bank", "loss_shapes": "benchmarks.loss_shapes"}
CURVES = ("epoch", "map/avg", "clipped")
# Files that cannot change what a run computes: results are written while other cells still run, and what a YAML file of --add
# in the root says stands in each cell's command
HARMLESS = (":(exclude)results", ":(exclude,glob)**/*.md", ":(exclude,glob)*.yaml")


def make_job(cell: Cell, root: Path) -> Job:
    """Return the job of a cell with its folder below {root}/cells; `root` is taken from the repository's root."""
    folder, place = root / "cells" / cell.id, REPOSITORY / root / "cells" / cell.id
    return Job(
        cell.id, cell.name, place, lambda device: [sys.executable, *command(cell, folder, device)], lambda: collect(cell, place),
        tuple(need.id for need in cell.needs), cell.epochs, lambda: _epochs_done(place),
        lambda: max((path.stat().st_mtime for path in place.glob("runs/*/*/*/last.pt")), default=0.0),
    )


def command(cell: Cell, folder: Path, device: str) -> list[str]:
    """Return the interpreter's arguments that run a cell from the repository's root.

    Args:
        cell: what to run; a training that left a run folder is resumed, with the settings and device it had.
        folder: of the cell; the cells it needs lie beside it.
        device: "cpu" (one thread) or "cuda:N".
    """
    if cell.stage not in TRAINING:
        release = cell.stage == "release_protocol"
        own = ["--seed", str(cell.seed)] if release else []
        own += ["--device", device, *(["--threads", "1"] if device == "cpu" else [])]
        return ["-m", MODULES[cell.stage], *cell.arguments, *own, "--output", str(folder if release else folder / "metrics.json")]
    script, run = f"train_{cell.stage}.py", _run_folder(REPOSITORY / folder)
    if run is not None:
        return [script, "--resume", str(folder / run.relative_to(REPOSITORY / folder))]
    own = [f"run.seed={cell.seed}", f"run.device={device}", f"run.output={folder / 'runs'}", "run.figures=false"]
    own += ["run.threads=1"] if device == "cpu" else []
    if cell.stage == "step1":
        return [script, *cell.arguments, *own, f"run.pseudo_labels={folder / 'pseudo_labels'}"]
    labels = folder.parent / cell.needs[0].id / "pseudo_labels"
    return [script, *cell.arguments, *own, "run.eval_every=1", f"rdl.pseudo_labels={labels}"]


def collect(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the record of a cell: what it was, its scores, and its curves; a UserError says that it is not finished."""
    record = {"id": cell.id, "stage": cell.stage, "name": cell.name, "seed": cell.seed, "needs": [need.id for need in cell.needs]}
    if cell.stage in TRAINING:
        run = _run_folder(folder)
        if run is None:
            raise UserError(f"{cell.name} ended without a run folder, see {folder}")
        return record | training_scores(run)
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{cell.name} ended without writing {path}")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if cell.stage == "release_protocol":
        scores = {key: value for key, value in metrics.items() if isinstance(value, float) and key.startswith("map/")}
        return record | {"scores": scores, "train_seconds": metrics.get("train_seconds"), "details": metrics.get("details", {})}
    return record | {"measured": metrics}


def training_scores(folder: Path, variant: str | None = None) -> dict[str, Any]:
    """Return scores, training time and curves of a run folder; a UserError says that it is not finished, or lacks the variant."""
    run = RunLog.open(folder)
    epochs, planned, metrics = run.read_epochs(), run.config()["optim"]["epochs"], folder / "metrics.json"
    if not epochs or epochs[-1]["epoch"] != planned or not metrics.is_file():
        lacking = "" if metrics.is_file() else ", no metrics.json"
        raise UserError(f"{folder} is not finished: {len(epochs)} of {planned} epochs{lacking}")
    found = json.loads(metrics.read_text(encoding="utf-8"))
    scores = {key: value for key, value in found.items() if isinstance(value, float)}
    if variant:
        if variant not in found.get("variants", {}):
            known = ", ".join(found.get("variants", {})) or "none yet: run evaluate.py on it"
            raise UserError(f"{metrics} has no scores by {variant!r}; it has {known}")
        scores = {"map/chance": scores["map/chance"], **found["variants"][variant]}
    logged = {key: epochs[-1][key] for key in ("agreement", "cross_nmi", "clipped") if key in epochs[-1]}
    scored = [row for row in epochs if "map/avg" in row]
    return {
        "epochs": planned, "scores": scores | logged, "train_seconds": round(sum(row["seconds/train"] for row in epochs), 1),
        "curve": {key: [row[key] for row in scored] for key in CURVES if scored and all(key in row for row in scored)},
    }


def _run_folder(folder: Path) -> Path | None:
    """The newest run folder of a training cell; a folder without config.yaml was never started."""
    found = sorted(folder.glob("runs/*/*/*/config.yaml"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def _epochs_done(folder: Path) -> int:
    files = folder.glob("runs/*/*/*/metrics.jsonl")
    return max((len(path.read_text(encoding="utf-8", errors="replace").splitlines()) for path in files), default=0)


def code_state(device: str) -> Mapping[str, Any]:
    """Return commit, dirty flag (None: git cannot tell), device, threads and torch version, for the record of an attempt."""
    found = environment(seed=0)
    query = ["git", "-C", str(REPOSITORY), "status", "--porcelain", "--", ".", *HARMLESS]
    try:
        dirty = bool(subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        dirty = None
    name = found["cpu"] if device == "cpu" else found["gpu"]
    threads = 1 if device == "cpu" else None
    return {"commit": found["git_sha"], "dirty": dirty, "device": name, "threads": threads, "torch": found["torch"]}
