"""What both training scripts do between opening a run and its report: load, train with checkpoints, export, score, draw."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.annotation import Annotation
from datasets.label_runs import exported_folder
from datasets.pseudo_labels import posteriors_path, pseudo_label_path, read_origin, write_posteriors, write_pseudo_labels
from datasets.samples import PairedSamples, describe_samples, load_test_samples, load_training_samples
from models.build import load_pretrained
from models.pretrained import labels_read_by
from utils.engine.learner import StageLearner
from utils.engine.run_log import RunLog
from utils.engine.session import Session, fit
from utils.errors import MissingLabelsError
from utils.evaluation.report import finish, report_pretrained
from utils.evaluation.tables import Evaluator
from utils.files import read_json
from utils.settings.config import config_hash

FEATURES_NOTE = "features.json"  # what `baselines.features` says of the features beside it


def run_stage(
    session: Session, build: Callable[[PairedSamples], StageLearner],
    export: Callable[[Session, StageLearner], None] = lambda session, learner: None, report: Callable[..., None] = finish,
) -> StageLearner:
    """Train one stage to its last epoch, or go on where the session's checkpoint stopped.

    Args:
        session: from `utils.engine.session.open_session`.
        build: makes the learner from the training samples, which carry no labels.
        export: what follows the last epoch and precedes the report; every process calls it.
        report: as `utils.evaluation.report.finish`.
    Returns:
        The trained learner.
    Raises:
        UserError: on bad data or settings. Whatever ends the run also goes to its log.txt.
    """
    config, run, device = session.config, session.run, session.device
    with run.failures_logged():
        samples = load_training_samples(config.data, device)
        learner = build(samples)
        run.log(circumstances(samples, session))
        if config.model.reads_labels:
            run.log(f"READS LABELS: what this run starts from has read the {config.model.reads_labels}; its scores are not unsupervised")
        evaluator, pictures = _load_evaluator(session, samples, learner)
        if session.checkpoint is None:
            inherited = learner.load_initial_weights()
            if inherited:
                run.log(f"initial weights of every encoder: {inherited}")
            else:
                report_pretrained(run, load_pretrained(learner.encoders, config.model.pretrained))
        fit(session, learner, evaluator)
        export(session, learner)
        report(run, evaluator, pictures, config.run.figures)
    return learner


def mark_labels(config: Any, run: str | None, origin: str | None = None) -> Any:
    """Return the settings of a new run with `model.reads_labels` saying whose labels its start, or its features, have read, if any.

    Args:
        config: of either stage; run: folder of the one whose encoders this one takes over; origin: what its pseudo-labels say.
    Raises:
        UserError: on a damaged weight file.
    """
    note = Path(config.data.root) / FEATURES_NOTE
    of_features = read_json(note).get("reads_labels") if config.data.features and note.is_file() else None
    before = RunLog.open(run).config()["model"].get("reads_labels") if run else None
    sources = [config.model.pretrained[name] for name in config.data.modalities]
    files = [source for source in sources if source not in ("none", "imagenet") and Path(source).exists()]
    pairs = f"class pairs of {config.data.dataset}" if config.data.pairing == "class" else None
    read = (config.model.reads_labels, before, origin, of_features, pairs, *map(labels_read_by, files))
    texts = sorted(set(filter(None, read)))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, reads_labels="; ".join(texts) or None))


def _load_evaluator(
    session: Session, samples: PairedSamples, learner: StageLearner
) -> tuple[Evaluator | None, Mapping[str, Tensor]]:
    """Return what scores the test set, and its arrays; nothing, with one line in the log, if it has no lists or no labels."""
    config, device = session.config, session.device
    try:
        test, labels = load_test_samples(config.data, device, samples)
    except MissingLabelsError as reason:
        session.run.log(f"no evaluation: {reason}")
        return None, {}
    describe = lambda: describe_samples(learner.encoders, learner.classifiers, test, config.data, device)
    return Evaluator(describe, labels, config.eval.representation, config.eval.ranking), test.arrays


def write_annotation(
    session: Session, learner: StageLearner, folder: str | None, annotation: Annotation, clusters: Mapping[str, Any]
) -> None:
    """Write a run's pseudo-labels and posteriors for (another round of) step 2; the main process writes.

    Args:
        session, learner: of the run; the learner's `samples` are the ones annotated.
        folder: given by the settings, or None for the run's own.
        annotation: what to write.
        clusters: plain values on how the clusters came about, with "num_clusters" and "method"; kept in the meta files.
    """
    config, run = session.config, session.run
    if not run.writes:
        return
    place, dataset, noted = exported_folder(run, folder), config.data.dataset, run.folder / "env.json"
    environment = read_json(noted) if noted.is_file() else {}  # of the commit that trained, which a resume may not be
    provenance = {
        "run_id": run.run_id, "stage": learner.stage, "epoch": config.optim.epochs, "config_hash": config_hash(config),
        "git_sha": environment.get("git_sha"), "seed": config.run.seed, "pairing": config.data.pairing,
        "reads_labels": config.model.reads_labels, "inputs": learner.samples.contents,
        "agreement": annotation.agreement, "reliability": annotation.reliability, "clusters": dict(clusters),
    }
    for name, labels in annotation.ids.items():
        path = pseudo_label_path(place, dataset, name)
        replaced = read_origin(path).get("run_id", "an unknown run") if path.exists() else run.run_id
        write_pseudo_labels(
            path, learner.samples.lists[name], labels.numpy(), dataset=dataset, num_clusters=clusters["num_clusters"],
            provenance=provenance,
        )
        run.log(f"wrote {path}" + (f", replacing that of {replaced}" if replaced != run.run_id else ""))
    posteriors, own = ({name: rows.numpy() for name, rows in found.items()} for found in (annotation.posteriors, annotation.own))
    write_posteriors(posteriors_path(place, dataset), posteriors, own, run.run_id)
    facts = [f"{clusters['num_clusters']} clusters ({clusters['method']})"]
    if annotation.agreement is not None:
        facts.append(f"the modalities agree on {annotation.agreement:.3f} of the objects")
    facts += [f"reliability of {name} {share:.3f}" for name, share in annotation.reliability.items()]
    run.log("; ".join(facts))


def circumstances(samples: PairedSamples, session: Session) -> str:
    """Say what may change speed or the last bits of a run."""
    places = ", ".join(dict.fromkeys(str(array.device) for array in samples.arrays.values()))
    size = sum(array.nbytes for array in samples.arrays.values()) / 2**20
    kmeans = "scikit-learn" if session.device.type == "cpu" else "utils.evaluation.device_kmeans"
    return (
        f"{size:.0f} MiB of samples on {places}; k-means of {kmeans}; TF32 in products: {torch.backends.cuda.matmul.allow_tf32}, "
        f"in convolutions: {torch.backends.cudnn.allow_tf32}; {torch.get_num_threads()} CPU threads"
    )
