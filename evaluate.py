"""Evaluation of trained runs: mAP@All of every task in one table; writes metrics.json into each run folder."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datasets.label_runs import exported_folder
from datasets.lists import check_disjoint, read_labelled_list
from datasets.pseudo_labels import posteriors_path, pseudo_label_path, read_origin, read_own_ids, read_pseudo_labels
from datasets.samples import PairedSamples, describe_samples, list_options, load_test_samples, load_training_samples
from models.trained import TrainedRun, open_trained
from utils.engine.checkpoint import LAST
from utils.engine.device import select_device
from utils.engine.run_log import RunLog, environment
from utils.engine.session import run_command
from utils.errors import UserError
from utils.evaluation.anchors import Anchors
from utils.evaluation.clustering import clustering_accuracy, nmi, purity
from utils.evaluation.report import label_note, row_name
from utils.evaluation.tables import format_matrix, format_table, retrieval_table, score_variants
from utils.files import atomic_write_json, read_json
from utils.modalities import MODALITIES, task_name
from utils.settings.config import SET, to_dict
from utils.settings.options import Step1Config

QUALITY = ("acc", "purity", "nmi", "reliability", "own_acc")
KEPT = ("oracle", "peak_mib", "row")  # of metrics.json, that no evaluation can know


def evaluate_checkpoint(checkpoint: Path, device: torch.device, overrides: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Score one checkpoint on the test set of its run's configuration, and write metrics.json beside it.

    Args:
        checkpoint: .pt file in a run folder, beside its config.yaml.
        overrides: "section.key=value" texts of where things lie, see `utils.engine.run_log.RESULT_NEUTRAL`.
    Returns:
        Name of the table row, and the scores of `retrieval_table` for what the run's settings compare, with those of
        `score_variants` under "variants", also of the mean over all pictures of an object where there are several.
    Raises:
        UserError: if the run folder, the checkpoint or the test data is missing or broken.
    """
    trained = open_trained(checkpoint, device, overrides)
    run, config, state = trained.run, trained.config, trained.state
    test, labels = load_test_samples(config.data, device)
    features = describe_samples(trained.encoders, trained.classifiers, test, config.data, device)
    anchors = training_anchors(trained, test, device)
    variants = score_variants(features, labels, anchors)
    several = {name: trained.encoders[name] for name, array in test.arrays.items() if array.shape[1] > 1}
    if several and config.data.eval_view == "first":
        whole = dataclasses.replace(config.data, eval_view="mean")
        averaged = features | describe_samples(several, trained.classifiers, test, whole, device)
        variants |= {f"{name}, all pictures": scores for name, scores in score_variants(averaged, labels, anchors).items()}
    rows = {name: values.represent(config.eval.representation) for name, values in features.items()}
    scores: dict[str, Any] = retrieval_table(rows, labels, within=True, ranking=config.eval.ranking)
    scores |= {**pseudo_label_quality(config, run), "variants": variants}
    _write_metrics(run, scores, state["epoch"], config.optim.epochs)
    unfinished = "" if state["epoch"] == config.optim.epochs else f" (epoch {state['epoch']} of {config.optim.epochs})"
    return row_name(to_dict(config)) + unfinished, scores


def training_anchors(trained: TrainedRun, test: PairedSamples, device: torch.device) -> Anchors | None:
    """Describe the training set of a run without its labels; None where rows are no pairs, or with one line of why it cannot serve."""
    data = trained.config.data
    if data.pairing != "instance":
        return None
    try:
        samples = load_training_samples(data, device)
        for name, rows in samples.lists.items():
            check_disjoint(rows, test.lists[name])
        learned = trained.state["learner"]["inputs"]
        if any(learned.get(name, found) != found for name, found in samples.fingerprints.items()):
            raise UserError(f"the training lists in {data.root} are not those that it learned from, so test objects may be among those")
    except UserError as reason:
        print(f"no ranking by way of the training set of {trained.run.folder}: {reason}", file=sys.stderr)
        return None
    found = describe_samples(trained.encoders, trained.classifiers, samples, data, device)
    return Anchors({name: values.embeddings for name, values in found.items()})


def _write_metrics(run: RunLog, scores: dict[str, Any], epoch: int, epochs: int) -> None:
    """Write metrics.json, keeping what the training script alone knows; a folder may be read-only."""
    path = run.folder / "metrics.json"
    scored = {key: value for key, value in environment(seed=0).items() if key.startswith("git_")}
    selection = "last epoch" if epoch == epochs else f"epoch {epoch} of {epochs}, unfinished"
    try:
        before = read_json(path) if path.exists() else {}
        kept = {key: before[key] for key in KEPT if key in before}
        atomic_write_json(path, {**scores, "epoch": epoch, "selection": selection, "scored": scored, **kept, **label_note(run)})
    except (OSError, UserError) as error:
        print(f"scores of {run.folder} are not kept: {error}", file=sys.stderr)


def pseudo_label_quality(config: Step1Config, run: RunLog) -> dict[str, float]:
    """Compare the pseudo-labels of a run with the labels of the training lists, where both are at hand.

    Args:
        config: settings of the run.
        run: only files that this very run wrote are compared.
    Returns:
        "acc/<modality>" (Hungarian), "purity/<modality>" and "nmi/<modality>"; where the export has them, also
        "reliability/<modality>", measured without labels, and "own_acc/<modality>" of the ids that it would have given by itself. Or
        nothing. A diagnostic: it never reaches training, and no table waits for it.
    """
    quality, data = {}, config.data
    folder = exported_folder(run, config.run.pseudo_labels)
    for name in data.modalities:
        path = pseudo_label_path(folder, data.dataset, name)
        try:
            if config.run.pseudo_labels and read_origin(path).get("run_id") != run.run_id:
                return {}
            rows, labels = read_labelled_list(**list_options(data, name, "train"))
            pseudo_labels, _ = read_pseudo_labels(path, rows, dataset=data.dataset)
        except UserError as reason:
            print(f"no comparison of the pseudo-labels of {run.folder} with labels: {reason}", file=sys.stderr)
            return {}
        for key, score in (("acc", clustering_accuracy), ("purity", purity), ("nmi", nmi)):
            quality[f"{key}/{name}"] = score(pseudo_labels, labels)
        reliability, own = read_origin(path).get("reliability") or {}, read_own_ids(posteriors_path(folder, data.dataset), name)
        if name in reliability and own is not None:
            quality |= {f"reliability/{name}": reliability[name], f"own_acc/{name}": clustering_accuracy(own, labels)}
    return quality


def main(argv: list[str] | None = None) -> None:
    """Evaluate the given runs or checkpoints and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="+", default=[], metavar="RUN", help="run folders; their last.pt is evaluated")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="checkpoints inside run folders")
    parser.add_argument("--set", **SET, help="where things lie now, e.g. --set data.root=DIR")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    given = [os.path.join(run, LAST) for run in arguments.run] + arguments.checkpoint
    checkpoints = [Path(os.path.expanduser(path)) for path in given]
    if not checkpoints:
        parser.error("give at least one run folder (--run RUN) or checkpoint (--checkpoint FILE)")
    device = select_device(arguments.device)
    rows = [evaluate_checkpoint(path, device, arguments.overrides) for path in checkpoints]
    print(format_table(rows))
    for name, scores in rows:
        modalities = [name for name in MODALITIES if any(f"map/{task_name(name, other)}" in scores for other in MODALITIES)]
        print(f"\nmAP@All [%] {name}, all pairs (same modality: the query itself is left out)\n{format_matrix(scores, modalities)}")
        chances = {key: value for key, value in scores.items() if "chance" in key}
        variants = [(variant, chances | found) for variant, found in scores["variants"].items()]
        print(f"\n{name}, by what is compared (anchored: by way of the training set; "
              "diffusion is transductive: it uses the whole gallery's neighbour graph)")
        print(format_table(variants))
        quality = [f"{key} {value:.3f}" for key, value in scores.items() if key.split("/")[0] in QUALITY]
        if quality:
            print(f"pseudo-labels {name} against the training labels (diagnostic): {', '.join(quality)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
