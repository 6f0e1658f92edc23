"""Which run's pseudo-labels step 2 learns from: those of a named run of step 1, or of the newest finished one."""

from pathlib import Path

from datasets.pseudo_labels import COMMAND, pseudo_label_path, read_origin
from utils.engine.run_log import RunLog
from utils.errors import UserError
from utils.settings.data_options import DataConfig


def exported_folder(run: RunLog, given: str | None) -> Path:
    """Return where a run of step 1 writes its pseudo-labels: the folder given as `run.pseudo_labels`, else one of its own."""
    return Path(given) if given else run.folder / "pseudo_labels"


def labels_of_run(folder: str | Path, data: DataConfig) -> Path:
    """Return the folder of the pseudo-labels that a run of step 1 wrote.

    Args:
        folder: run folder.
        data: settings of step 2; every one of its modalities is needed.
    Raises:
        UserError: if the folder is no run of step 1, the run has not finished, or another one has replaced its files.
    """
    run = RunLog.open(folder)
    config = run.config()
    if "pla" not in config:
        raise UserError(f"{folder} is no run of step 1: give a folder like runs/{data.dataset}/step1/<run-id>")
    labels = exported_folder(run, config["run"]["pseudo_labels"])
    for name in data.modalities:
        path = pseudo_label_path(labels, data.dataset, name)
        if not path.is_file():
            raise UserError(f"{folder} has no {path}: finish it with {COMMAND} --resume {folder}, and give both steps the same data")
        writer = read_origin(path).get("run_id")
        if labels != run.folder / "pseudo_labels" and writer != run.run_id:
            raise UserError(f"{path} is not of {folder} any more, but of run {writer}; {COMMAND} --resume {folder} writes it again")
    return labels


def newest_labels(runs: Path, data: DataConfig) -> Path:
    """Return `labels_of_run` of the newest run below `runs`, by its name, that is finished.

    Raises:
        UserError: if there is none, saying what is wrong with the newest.
    """
    problem = "no run is there"
    for config in sorted(runs.glob("*/config.yaml"), reverse=True):
        try:
            return labels_of_run(config.parent, data)
        except UserError as error:
            problem = str(error) if problem == "no run is there" else problem
    raise UserError(
        f"no finished run of step 1 below {runs}: {problem}. Run {COMMAND} first, or name one with --from RUN or "
        "rdl.pseudo_labels=FOLDER"
    )
