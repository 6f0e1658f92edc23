"""Which run's pseudo-labels step 2 learns from: those of a named run, or of the newest finished one of step 1."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.pseudo_labels import COMMAND, posteriors_path, pseudo_label_path, read_origin, read_posteriors, read_pseudo_labels
from datasets.samples import PairedSamples
from utils.engine.run_log import RunLog
from utils.errors import UserError
from utils.settings.data_options import DataConfig

VIEW_NOISE = 0.02  # by which the agreement of two random views of some hundred samples changes from draw to draw


def exported_folder(run: RunLog, given: str | None) -> Path:
    """Return where a run writes its pseudo-labels: the folder given as `run.pseudo_labels`, else one of its own."""
    return Path(given) if given else run.folder / "pseudo_labels"


def labels_of_run(folder: str | Path, data: DataConfig) -> Path:
    """Return the folder of the pseudo-labels that a run of step 1, or a round of step 2, wrote.

    Raises:
        UserError: if the run has not finished, lacks a modality of step 2's settings `data`, or another one has replaced its
            files.
    """
    run = RunLog.open(folder)
    config = run.config()
    command = COMMAND if "pla" in config else "python train_step2.py"
    labels = exported_folder(run, (config.get("run") or {}).get("pseudo_labels"))
    for name in data.modalities:
        path = pseudo_label_path(labels, data.dataset, name)
        if not path.is_file():
            raise UserError(f"{folder} has no {path}: finish it with {command} --resume {folder}, and give both steps the same data")
        writer = read_origin(path).get("run_id")
        if labels != run.folder / "pseudo_labels" and writer != run.run_id:
            raise UserError(f"{path} is not of {folder} any more, but of run {writer}; {command} --resume {folder} writes it again")
    return labels


def newest_labels(runs: Path, data: DataConfig) -> Path:
    """Return `labels_of_run` of the newest run below `runs`, by its name, that is finished.

    Raises:
        UserError: if there is none, saying what is wrong with the newest.
    """
    problem = "no run is there"
    for config in sorted(runs.glob("*T*Z-seed*/config.yaml"), reverse=True):
        try:
            return labels_of_run(config.parent, data)
        except UserError as error:
            problem = str(error) if problem == "no run is there" else problem
    raise UserError(
        f"no finished run of step 1 below {runs}: {problem}. Run {COMMAND} first, or name one with --from RUN or "
        "rdl.pseudo_labels=FOLDER"
    )


@dataclass(frozen=True)
class PseudoLabels:
    """The pseudo-labels of one training set.

    Attributes:
        labels: modality -> (N,) int64 on the CPU.
        confidence: modality -> (N,) float32, the posterior of the label's cluster; None if it was not asked for.
        num_clusters: K.
        origin: what the files say of the run that wrote them, see `read_origin`.
        paths: modality -> file.
    """

    labels: dict[str, Tensor]
    confidence: dict[str, Tensor] | None
    num_clusters: int
    origin: dict[str, Any]
    paths: dict[str, Path]


def load_pseudo_labels(
    folder: str, samples: PairedSamples, data: DataConfig, num_clusters: int | None = None, confidence: bool = False
) -> PseudoLabels:
    """Read the pseudo-label file of every modality.

    Args:
        folder: of the files; samples: of training; data: settings of the run that will learn from them.
        num_clusters: K, for files without a meta file.
        confidence: whether to read the posteriors too.
    Raises:
        UserError: as `read_pseudo_labels`, and if the files disagree on K, come from different runs, were made with another
            pairing or of other samples under the same names, or by a round that did not help.
    """
    lists = samples.lists
    paths = {name: pseudo_label_path(folder, data.dataset, name) for name in lists}
    read = {name: read_pseudo_labels(path, lists[name], dataset=data.dataset, num_clusters=num_clusters) for name, path in paths.items()}
    counts = {name: count for name, (_, count) in read.items()}
    if len(set(counts.values())) != 1:
        raise UserError(f"the pseudo-label files in {folder} disagree on the number of clusters: {counts}")
    origins = {name: read_origin(path) for name, path in paths.items()}
    runs = {name: origin.get("run_id") for name, origin in origins.items()}
    if len(set(runs.values())) != 1:  # the run was cut off between two files: cluster ids would not mean the same
        raise UserError(
            f"the pseudo-label files in {folder} come from different runs: {runs}; repeat {COMMAND}, or the --resume of one of them"
        )
    origin, num_clusters = next(iter(origins.values())), next(iter(counts.values()))
    pairing = origin.get("pairing", data.pairing)
    if pairing != data.pairing:
        raise UserError(
            f"the labels in {folder} were made with data.pairing: {pairing}, this run has {data.pairing}; what the labels of one "
            "run taught must not pass as another: use the same pairing in both steps"
        )
    check_samples(folder, origin, samples)
    check_it_helped(folder, origin)
    labels = {name: torch.from_numpy(values) for name, (values, _) in read.items()}
    sure = None
    if confidence:
        shape = (len(next(iter(labels.values()))), num_clusters)
        beliefs = read_posteriors(posteriors_path(folder, data.dataset), labels, origin.get("run_id"), *shape)
        sure = {name: torch.from_numpy(rows).gather(1, labels[name][:, None]).squeeze(1) for name, rows in beliefs.items()}
    return PseudoLabels(labels, sure, num_clusters, origin, paths)


def check_samples(folder: str | Path, origin: Mapping[str, Any], samples: PairedSamples) -> None:
    """Refuse the labels of other samples that had the same names: files are numbered anew when a collection grows.

    Args:
        folder: of the pseudo-labels; origin: what they say of the run that wrote them; samples: of the run that will learn from them.
    Raises:
        UserError: if rows and shape of an array are the same, and its content is not.
    """
    made_of = origin.get("inputs")
    differing = {
        name: {key for key in now if made_of[name].get(key) != now[key]}
        for name, now in samples.contents.items() if isinstance(made_of, dict) and isinstance(made_of.get(name), dict)
    }
    others = [name for name, keys in differing.items() if keys == {"array"}]
    if others:
        raise UserError(
            f"the labels in {folder} were made of other samples of {', '.join(others)} than there are now under the same names: repeat "
            f"{COMMAND}. If they are the same objects, prepared anew, remove \"inputs\" from the .meta.json files in {folder}"
        )


def check_it_helped(folder: str | Path, origin: Mapping[str, Any]) -> None:
    """Stop the rounds when one has not helped: its modalities, or the views of a sample, agree less than before; no label is read.

    Args:
        folder: of the pseudo-labels; origin: what they say of the run that wrote them, see `read_origin`.
    Raises:
        UserError: if that was a round, and did not help.
    """
    clusters, mean = origin.get("clusters") or {}, lambda shares: sum(shares.values()) / len(shares) if shares else None
    for what, now, before, slack in (
        ("its modalities agree on {:.4f} of the objects, after {:.4f}", origin.get("agreement"), clusters.get("agreement_before"), 0),
        ("views of a sample agree to {:.4f} beyond chance, after {:.4f}", mean(origin.get("reliability")),
         mean(clusters.get("reliability_before")), VIEW_NOISE),
    ):
        if None not in (now, before) and now < before - slack:
            raise UserError(
                f"the round that wrote {folder} did not help: {what.format(now, before)} before it. Take the run before it as the "
                "result, or change the settings of the round"
            )
