"""Jobs: cells in their folders. How one is run, how far it is, and the record of a finished run."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.cells import Cell
from utils.engine.checkpoint import atomic_write_json, read_json
from utils.engine.run_log import REPOSITORY, RunLog, environment
from utils.errors import UserError

TRAINING = ("step1", "step2")
MODULES = {"release_protocol": "baselines.release_protocol", "features": "baselines.features", "baseline": "baselines.run",
           "memory_bank": "benchmarks.memory_bank", "loss_shapes": "benchmarks.loss_shapes"}
MARKER, STATE = "done.json", "state.json"
WAITING, RUNNING, DONE, FAILED, INTERRUPTED, SKIPPED = "waiting", "running", "done", "failed", "interrupted", "skipped"
# Files that cannot change what a run computes: results are written while other cells still run, and what a YAML file of --add
# in the root says stands in each cell's command
HARMLESS = (":(exclude)results", ":(exclude,glob)**/*.md", ":(exclude,glob)*.yaml")


class Job:
    """A cell, and its folder {root}/cells/{id} with output.log, state.json and, written last, done.json.

    Args:
        root: taken from the repository's root, where every process runs.
    """

    def __init__(self, cell: Cell, root: Path) -> None:
        self.cell, self.path = cell, root / "cells" / cell.id
        self.folder = REPOSITORY / self.path

    @property
    def done(self) -> bool:
        """Whether its marker was written."""
        return (self.folder / MARKER).is_file()

    def state(self) -> dict[str, Any]:
        """Return status, reason of a failure, and attempts."""
        path = self.folder / STATE
        found = read_json(path) if path.is_file() else {"status": WAITING, "attempts": []}
        return {**found, "status": DONE} if self.done else found

    def epochs(self) -> int:
        """Return how many of its cell's epochs are done."""
        logs = [path.read_text(encoding="utf-8", errors="replace") for path in self.folder.glob("runs/*/*/*/metrics.jsonl")]
        trained = max((len(text.splitlines()) for text in logs), default=0)
        return self.cell.epochs if self.done else min(trained, self.cell.epochs)

    def checkpoint(self) -> float:
        """Return when its last checkpoint was written, seconds since the epoch; 0 if there is none."""
        return max((path.stat().st_mtime for path in self.folder.glob("runs/*/*/*/last.pt")), default=0.0)

    def start(self, device: str, lock: int) -> None:
        """Start its process, which goes on where an earlier one stopped and inherits the descriptor `lock`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line, self.device, self.begun = command(self.cell, self.path, device), device, time.monotonic()
        self.attempts = [*self.state()["attempts"], {**code_state(device), "command": " ".join(["python", *line]), "seconds": None}]
        self._keep(RUNNING)  # before the start: whatever kills us then, the next call knows of it
        with open(self.folder / "output.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *line], cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=[lock], env={**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})},
            )

    def conclude(self, stopped: bool) -> None:
        """Note how the ended process went; `stopped`: it was not its own end."""
        self.attempts[-1]["seconds"] = round(time.monotonic() - self.begun, 3)
        try:
            if self.process.returncode != 0:
                raise UserError(f"exit status {self.process.returncode}")
            record = collect(self.cell, self.folder)
        except UserError as error:
            if stopped:
                return self._keep(INTERRUPTED)
            self._keep(FAILED, reason=str(error))
            log = self.folder / "output.log"
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            return tqdm.write("\n  ".join([f"FAILED {self.cell.name}: {error} ({log})", *tail]))
        self._keep(DONE)
        atomic_write_json(self.folder / MARKER, {**record, **provenance(self.attempts)})

    def _keep(self, status: str, **more: Any) -> None:
        atomic_write_json(self.folder / STATE, {"status": status, "attempts": self.attempts, **more})


def provenance(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the attempts of one job: dirty if one was or git could not tell, every commit, the command of the first."""
    commits = dict.fromkeys(entry["commit"] for entry in attempts if entry["commit"])
    return {
        **attempts[-1], "command": attempts[0]["command"], "commit": ", ".join(commits) or None, "attempts": len(attempts),
        "dirty": any(entry["dirty"] is not False for entry in attempts),
        "seconds": round(sum(entry["seconds"] or 0 for entry in attempts), 3),
    }


def code_state(device: str) -> dict[str, Any]:
    """Return commit, dirty flag (None: git cannot tell), device, threads and torch version, for the record of an attempt."""
    found, cpu = environment(seed=0), device == "cpu"
    query = ["git", "-C", str(REPOSITORY), "status", "--porcelain", "--", ".", *HARMLESS]
    try:
        dirty = bool(subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        dirty = None
    return {"commit": found["git_sha"], "dirty": dirty, "device": found["cpu" if cpu else "gpu"], "threads": 1 if cpu else None,
            "torch": found["torch"]}


def command(cell: Cell, folder: Path, device: str) -> list[str]:
    """Return the interpreter's arguments that run a cell from the repository's root.

    Args:
        cell: what to run; a training that left a run folder is resumed, with the settings and device it had.
        folder: of the cell; the cells it needs lie beside it.
        device: "cpu" (one thread) or "cuda:N".
    """
    run = _run_folder(folder)
    own = [f"run.device={device}", f"run.output={folder / 'runs'}", *(["run.threads=1"] if device == "cpu" else [])]
    if cell.stage == "features":
        begun = [] if run is None else ["--resume", str(folder / run.relative_to(REPOSITORY / folder))]
        return ["-m", MODULES["features"], *cell.arguments, *own, "--seed", str(cell.seed), *begun, "--out", str(folder / "features")]
    own += _feature_settings(cell, folder.parent)
    if cell.stage == "baseline" and run is not None:
        return ["-m", MODULES["baseline"], cell.arguments[0], "--resume", str(run)]
    if cell.stage == "baseline":
        return ["-m", MODULES["baseline"], *cell.arguments, *own, "--seed", str(cell.seed)]
    if cell.stage not in TRAINING:
        release = cell.stage == "release_protocol"
        own = [*(["--seed", str(cell.seed)] if release else []), "--device", device, *(["--threads", "1"] if device == "cpu" else [])]
        return ["-m", MODULES[cell.stage], *cell.arguments, *own, "--output", str(folder if release else folder / "metrics.json")]
    script = f"train_{cell.stage}.py"
    if run is not None:
        return [script, "--resume", str(run)]
    own += [f"run.seed={cell.seed}", "run.figures=false"]
    before = [_run_folder(folder.parent / need.id) for need in cell.needs if need.stage in TRAINING]
    if cell.stage == "step1":
        return [script, *cell.arguments, *own, *(f"pla.start={run}" for run in before)]
    return [script, *cell.arguments, *own, "run.eval_every=1", "rdl.rounds=1", "--from", str(before[0])]


def _feature_settings(cell: Cell, cells: Path) -> list[str]:
    """Return the settings with which a training reads the features that it rests on: for its targets if it trains on what they are of."""
    settings = []
    for folder, config in [(cells / need.id / "features", need.arguments[1]) for need in cell.rests_on() if need.stage == "features"]:
        if config in cell.arguments:
            settings.append(f"method.features={folder}")
        else:
            settings += [f"data.root={folder}", *read_json(REPOSITORY / folder / "features.json")["settings"]]
    return settings


def collect(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the record of a cell: what it was, its scores, and its curves; a UserError says that it is not finished."""
    record = {"id": cell.id, "stage": cell.stage, "name": cell.name, "seed": cell.seed, "needs": [need.id for need in cell.needs]}
    if cell.stage in TRAINING:
        run = _run_folder(folder)
        if run is None:
            raise UserError(f"{cell.name} ended without a run folder, see {folder}")
        return record | training_scores(run) | {"variants": read_json(run / "metrics.json").get("variants", {})}
    if cell.stage == "features":
        return record | {"scores": {}, "details": read_json(folder / "features" / "features.json")}
    if cell.stage == "baseline":
        run = _run_folder(folder)
        if run is None or not (run / "metrics.json").is_file():
            raise UserError(f"{cell.name} is not finished, see {folder}")
        metrics = read_json(run / "metrics.json")
        scores = {key: value for key, value in metrics.items() if isinstance(value, float) and "/" in key}
        details = {key: metrics[key] for key in ("reads", "peak_mib", "mode")}
        return record | {"scores": scores, "train_seconds": metrics["seconds"], "details": details}
    metrics = read_json(folder / "metrics.json")
    if cell.stage == "release_protocol":
        scores = {key: value for key, value in metrics.items() if isinstance(value, float) and key.startswith("map/")}
        return record | {"scores": scores, "train_seconds": metrics["train_seconds"], "details": metrics["details"]}
    return record | {"measured": metrics}


def training_scores(folder: Path, variant: str | None = None) -> dict[str, Any]:
    """Return scores, training time and curves of a run folder; a UserError says that it is not finished, or lacks the variant."""
    run = RunLog.open(folder)
    epochs, planned, metrics = run.read_epochs(), run.config()["optim"]["epochs"], folder / "metrics.json"
    if not epochs or epochs[-1]["epoch"] != planned or not metrics.is_file():
        lacking = "" if metrics.is_file() else ", no metrics.json"
        raise UserError(f"{folder} is not finished: {len(epochs)} of {planned} epochs{lacking}")
    found = read_json(metrics)
    scores = {key: value for key, value in found.items() if isinstance(value, float)}
    if variant:
        if variant not in found.get("variants", {}):
            known = ", ".join(found.get("variants", {})) or "none yet: run evaluate.py on it"
            raise UserError(f"{metrics} has no scores by {variant!r}; it has {known}")
        scores = {"map/chance": scores["map/chance"], **found["variants"][variant]}
    logged = {key: epochs[-1][key] for key in ("agreement", "cross_nmi", "clipped") if key in epochs[-1]}
    scored = [row for row in epochs if "map/avg" in row]
    curves = [key for key in ("epoch", "map/avg", "clipped") if scored and all(key in row for row in scored)]
    return {
        "epochs": planned, "scores": scores | logged, "train_seconds": round(sum(row["seconds/train"] for row in epochs), 1),
        "curve": {key: [row[key] for row in scored] for key in curves},
        **{key: found[key] for key in ("reads_labels",) if key in found},
    }


def _run_folder(folder: Path) -> Path | None:
    """The newest run folder of a training cell, both from the repository's root; one without config.yaml was never started."""
    found = sorted((REPOSITORY / folder).glob("runs/*/*/*/config.yaml"), key=lambda path: path.stat().st_mtime)
    return folder / found[-1].parent.relative_to(REPOSITORY / folder) if found else None
