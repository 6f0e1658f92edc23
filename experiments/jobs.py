"""What a cell runs, and what it leaves in its folder {root}/cells/{id}: its command, how far it is, the record of a finished one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.cells import Cell
from utils.engine.run_log import REPOSITORY, RunLog
from utils.errors import UserError
from utils.files import read_json

SCRIPTS = {
    "step1": ("train_step1.py",), "step2": ("train_step2.py",),
    "features": ("-m", "baselines.features"), "baseline": ("-m", "baselines.run"), "release_protocol": ("-m", "baselines.release_protocol"),
    "memory_bank": ("-m", "benchmarks.memory_bank"), "loss_shapes": ("-m", "benchmarks.loss_shapes"),
}
TRAINING = ("step1", "step2")
MARKER = "done.json"  # the record of a finished cell


def command(cell: Cell, folder: Path, device: str) -> list[str]:
    """Return the interpreter's arguments that run a cell from the repository's root.

    Args:
        cell: what to run; a training that left a run folder is resumed, with the settings and device it had.
        folder: of the cell, from the repository's root; the cells it needs lie beside it.
        device: "cpu" (one thread) or "cuda:N".
    """
    run, script, seed, cpu = run_folder(folder), SCRIPTS[cell.stage], str(cell.seed), device == "cpu"
    own = [f"run.device={device}", f"run.output={folder / 'runs'}", *["run.threads=1"] * cpu, *_feature_settings(cell, folder.parent)]
    machine = ["--device", device, *["--threads", "1"] * cpu]
    anew = [*script, *cell.arguments]
    training = [*anew, *own, f"run.seed={seed}", "run.figures=false"]
    before = [run_folder(folder.parent / need.id) for need in cell.needs if need.stage in TRAINING]
    match cell.stage:
        case "step1" | "step2" if run:
            return [*script, "--resume", str(run)]
        case "step1":
            return [*training, *(f"pla.start={start}" for start in before)]
        case "step2":
            return [*training, "run.eval_every=1", "rdl.rounds=1", "--from", str(before[0])]
        case "baseline":
            return [*script, cell.arguments[0], "--resume", str(run)] if run else [*anew, *own, "--seed", seed]
        case "features":
            return [*anew, *own, "--seed", seed, *(["--resume", str(run)] if run else []), "--out", str(folder / "features")]
        case "release_protocol":  # goes on by itself
            return [*anew, "--seed", seed, *machine, "--output", str(folder)]
    return [*anew, *machine, "--output", str(folder / "metrics.json")]


def _feature_settings(cell: Cell, cells: Path) -> Iterator[str]:
    """The settings with which a training reads the features that it rests on: for its targets if it trains on what they are of."""
    for need in cell.rests_on():
        features = cells / need.id / "features"
        if need.stage == "features" and need.arguments[1] in cell.arguments:
            yield f"method.features={features}"
        elif need.stage == "features":
            yield from (f"data.root={features}", *read_json(REPOSITORY / features / "features.json")["settings"])


def run_folder(folder: Path) -> Path | None:
    """Return the newest run folder of a cell, like `folder` from the repository's root; one without config.yaml was never started."""
    found = (REPOSITORY / folder).glob("runs/*/*/*/config.yaml")
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest and folder / newest.parent.relative_to(REPOSITORY / folder)


def is_done(folder: Path) -> bool:
    """Whether the record of a cell was written."""
    return (REPOSITORY / folder / MARKER).is_file()


def epochs_done(cell: Cell, folder: Path) -> int:
    """Return how many of its steps are done."""
    logs = (REPOSITORY / folder).glob("runs/*/*/*/metrics.jsonl")
    return cell.steps if is_done(folder) else min(sum(len(path.read_bytes().splitlines()) for path in logs), cell.epochs)


def checkpoint_time(folder: Path) -> float:
    """Return when a cell's last checkpoint was written, seconds since the epoch; 0 if there is none."""
    return max((path.stat().st_mtime for path in (REPOSITORY / folder).glob("runs/*/*/*/last.pt")), default=0.0)


def collect(cell: Cell, folder: Path) -> dict[str, Any]:
    """Return the record of a cell: what it was, its scores, and its curves; a UserError says that it is not finished."""
    record = {"id": cell.id, "stage": cell.stage, "name": cell.name, "seed": cell.seed, "needs": [need.id for need in cell.needs]}
    place, run = REPOSITORY / folder, REPOSITORY / (run_folder(folder) or folder / "runs")
    match cell.stage:
        case "step1" | "step2":
            return record | training_scores(run) | {"variants": read_json(run / "metrics.json").get("variants", {})}
        case "features":
            return record | {"scores": {}, "details": read_json(place / "features" / "features.json")}
        case "baseline":
            found = read_json(run / "metrics.json")
            details = {key: found[key] for key in ("reads", "peak_mib", "mode")}
            return record | {"scores": _scores(found), "train_seconds": found["seconds"], "details": details, **_label_mark(found)}
        case "release_protocol":
            found = read_json(place / "metrics.json")
            return record | {"scores": _scores(found), "train_seconds": found["train_seconds"], "details": found["details"]}
    return record | {"measured": read_json(place / "metrics.json")}


def _label_mark(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Whose labels a run has read, by which tables mark its row; nothing of a run that read none."""
    return {"reads_labels": metrics["reads_labels"]} if "reads_labels" in metrics else {}


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, float) and "/" in key}


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
        **_label_mark(found),
    }
