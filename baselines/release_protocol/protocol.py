"""Trains both stages of a variant: our protocol, one departure of the authors' code, or all of them; writes its scores."""

import argparse
import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from baselines.release_protocol.labels import pair_by_class, pair_shares, training_labels
from baselines.release_protocol.learners import ReleasePLA, ReleaseRDL
from datasets.label_runs import exported_folder, load_pseudo_labels
from datasets.pseudo_labels import pseudo_label_path, write_pseudo_labels
from datasets.samples import PairedSamples
from train_step2 import note_origin
from training import mark_labels, run_stage
from utils.engine.checkpoint import atomic_write_json, read_json
from utils.engine.run_log import RunLog, origin
from utils.engine.session import Session, open_session
from utils.errors import UserError
from utils.evaluation.tables import Evaluator, format_table
from utils.settings.options import CONFIGS

VARIANTS = {
    "ours": "our protocol: no departure, score of the last epoch",
    "oracle_labels": "pseudo-labels copied from the ground truth at the position of the farthest sample of the other modality",
    "class_pairs": "training rows join different instances, mostly of one class, in the shares of the published lists",
    "batch_clip": "RCLL clips at 1 / batch size instead of 1 / K, and repeats rows",
    "shuffled_memory": "the memory banks are filled in shuffled order but read and updated by sample number",
    "test_selection": "the epoch of step 2 is chosen by its score on the test set",
    "all": "all five departures together",
}
LABELLED = frozenset({"oracle_labels", "class_pairs", "test_selection"})  # departures that read ground truth


def departures_of(variant: str) -> frozenset[str]:
    """Return the names of the departures that a variant, a key of `VARIANTS`, follows; our protocol follows none."""
    single = frozenset(VARIANTS) - {"ours", "all"}
    return single if variant == "all" else single & {variant}


def run_variant(request: argparse.Namespace, command: str) -> None:
    """Train both stages, or go on where an earlier call with the same request stopped, and write OUTPUT/metrics.json.

    Args:
        request: the command line of `python -m baselines.release_protocol`; its output is the folder of this run alone.
        command: how it was called, for the record.
    Raises:
        UserError: on bad settings or data, or if the folder belongs to another request.
    """
    departures = departures_of(request.variant)
    _claim(request)
    first, details = _train_step1(request, departures)
    second = _train_step2(request, departures, exported_folder(first, None))
    atomic_write_json(request.output / "metrics.json", {
        "variant": request.variant, "seed": request.seed, **_scores(second, departures), "details": details, "command": command,
        **_origin([first, second]),
    })


def _claim(request: argparse.Namespace) -> None:
    """Note the request in its folder, or check that it is the one noted there."""
    path, wanted = request.output / "request.json", {key: value for key, value in vars(request).items() if key != "output"}
    if not path.is_file():
        atomic_write_json(path, wanted)
        return
    noted = read_json(path)
    differing = [f"{key}: {noted.get(key)!r} there, {value!r} now" for key, value in wanted.items() if noted.get(key) != value]
    if differing:
        raise UserError(f"{request.output} holds another run ({'; '.join(differing)}): give another --output")


def _open(request: argparse.Namespace, stage: str, *extra: str) -> Session:
    """Open a stage's newest run folder below the output, or a new one."""
    given, runs = request.set1 if stage == "step1" else request.set2, request.output / "runs"
    overrides = [*given, *extra, f"run.seed={request.seed}", f"run.device={request.device}", f"run.output={runs}"]
    overrides += [] if request.threads is None else [f"run.threads={request.threads}"]
    begun = sorted(runs.glob(f"*/{stage}/*/config.yaml"), key=lambda path: path.stat().st_mtime)
    config = str(Path(request.config_dir) / f"{stage}.yaml")
    resume = str(begun[-1].parent) if begun else None
    arguments = argparse.Namespace(config=config, overrides=overrides, resume=resume)
    read = departures_of(request.variant) & LABELLED
    mark = lambda config: mark_labels(config, None, f"labels of {config.data.dataset} ({', '.join(sorted(read))})" if read else None)
    session = open_session(CONFIGS[stage], stage, arguments, config, mark)
    found = session.config.data.pairing
    if found != "instance":
        raise UserError(f"{config}: the variants start from rows paired by object (data.pairing: instance), found {found!r}")
    return session


def _with_departures(session: Session, samples: PairedSamples, departures: frozenset[str]) -> tuple[PairedSamples, dict[str, Tensor]]:
    """Return the training samples and, for the departures that read it, the ground truth; else an empty dictionary."""
    labels = training_labels(session.config.data, samples) if departures & {"oracle_labels", "class_pairs"} else {}
    return pair_by_class(samples, labels, session.config.run.seed) if "class_pairs" in departures else (samples, labels)


def _report(name: str, run: RunLog, evaluator: Evaluator | None, *_: Any) -> None:
    """Log the test scores of the last epoch alone: without a metrics.json no run of a variant can pass as one of the real trainers."""
    if evaluator is None:
        raise UserError("the variants are compared by their test scores: give test lists with labels")
    run.log(format_table([(name, run.read_epochs()[-1])]))


def _train_step1(request: argparse.Namespace, departures: frozenset[str]) -> tuple[RunLog, dict[str, Any]]:
    """Train step 1 and export its pseudo-labels; return its log and what is worth noting about pairs and pseudo-labels."""
    session, details = _open(request, "step1"), {}
    config, run = session.config, session.run

    def build(samples: PairedSamples) -> ReleasePLA:
        samples, labels = _with_departures(session, samples, departures)
        details.update({"pairs": pair_shares(samples, labels)} if "class_pairs" in departures else {})
        return ReleasePLA(config, samples, session.device, departures, labels)

    def export(_: Session, learner: ReleasePLA) -> None:
        num_clusters = config.pla.num_clusters
        if "oracle_labels" in departures:
            num_clusters = config.data.num_classes or max(int(values.max()) for values in learner.labels.values()) + 1
            details["pseudo_label_accuracy"] = float(learner.kept.accuracy)
        origin = {"run_id": run.run_id, "seed": config.run.seed, "variant": f"baselines.release_protocol: {request.variant}",
                  "reads_labels": config.model.reads_labels}
        for name, labels in learner.annotate().ids.items():
            write_pseudo_labels(
                pseudo_label_path(exported_folder(run, None), config.data.dataset, name), learner.samples.lists[name],
                labels.numpy(), dataset=config.data.dataset, num_clusters=num_clusters, provenance=origin,
            )

    run_stage(session, build, export, functools.partial(_report, f"{request.variant}, step 1"))
    return run, details


def _train_step2(request: argparse.Namespace, departures: frozenset[str], labels: Path) -> RunLog:
    """Train step 2 on the pseudo-labels exported to a folder and return its log."""
    every_epoch = ["run.eval_every=1"] if "test_selection" in departures else []
    session = _open(request, "step2", f"rdl.pseudo_labels={labels}", *every_epoch)

    def build(samples: PairedSamples) -> ReleaseRDL:
        samples, _ = _with_departures(session, samples, departures)
        found = load_pseudo_labels(session.config.rdl.pseudo_labels, samples.lists, session.config.data)
        note_origin(session, found)
        return ReleaseRDL(session.config, samples, found, session.device, departures)

    run_stage(session, build, report=functools.partial(_report, f"{request.variant}, step 2"))
    return session.run


def _scores(run: RunLog, departures: frozenset[str]) -> dict[str, Any]:
    """Return the scores of the epoch that counts, how it was chosen, and the mean score of the last epoch."""
    scored = [row for row in run.read_epochs() if "map/avg" in row]
    chosen, selection = scored[-1], "last epoch"
    if "test_selection" in departures:
        chosen = max(scored, key=lambda row: row["map/avg"])
        selection = f"best epoch by test score ({chosen['epoch']} of {scored[-1]['epoch']})"
    scores = {key: value for key, value in chosen.items() if key.startswith("map/")}
    return {**scores, "selection": selection, "last_epoch": {"map/avg": scored[-1]["map/avg"]}}


def _origin(runs: list[RunLog]) -> dict[str, Any]:
    """Return commit, device and training time of both stages; a change of commit between them counts as uncommitted code."""
    first, second = (read_json(run.folder / "env.json") for run in runs)
    dirty = first["git_sha"] != second["git_sha"] or first["git_dirty"] or second["git_dirty"]
    seconds = round(sum(row["seconds/train"] for run in runs for row in run.read_epochs()), 1)
    return {**origin(second), "dirty": dirty, "train_seconds": seconds}
