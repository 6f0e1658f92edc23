"""Step 2, robust discriminative learning (RDL): trains on the noisy pseudo-labels that step 1, or an earlier round, wrote."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from datasets.annotation import annotate
from datasets.batches import BatchSource
from datasets.label_runs import PseudoLabels, check_it_helped, labels_of_run, load_pseudo_labels, newest_labels
from datasets.pseudo_labels import file_hash, pseudo_label_path, read_origin
from datasets.samples import PairedSamples
from losses import ModalityInvarianceLoss, RelationLoss, RobustConcentratingLoss, build_robust_loss
from models.build import build_classifiers, build_encoders
from training import mark_labels, run_stage, write_annotation
from utils.engine.checkpoint import LAST
from utils.engine.learner import StageLearner
from utils.engine.seed import BatchGenerator
from utils.engine.session import Session, open_session, run_command, stage_parser
from utils.errors import UserError
from utils.evaluation.report import LABEL_NOTE
from utils.files import atomic_write_json
from utils.settings.options import Step2Config

DEFAULT_CONFIG = "configs/mnist3d/step2.yaml"


class RDLLearner(StageLearner):
    """Encoders, MLP classifiers h and optimiser of step 2 (Algorithm 1, second half); the samples carry no labels but these pseudo-labels.

    Raises:
        UserError: on a robust loss that cannot be built, or `rdl.start: inherited` without a checkpoint that fits.
    """

    def __init__(self, config: Step2Config, samples: PairedSamples, pseudo_labels: PseudoLabels, device: torch.device) -> None:
        self.samples, self.source_labels, self.num_clusters = samples, pseudo_labels, pseudo_labels.num_clusters
        self.pseudo_labels = {name: values.to(device) for name, values in pseudo_labels.labels.items()}
        self.confidence = {name: values.to(device) for name, values in (pseudo_labels.confidence or {}).items()}
        encoders = build_encoders(config.data, config.model, config.run.sync_batchnorm)
        classifiers = build_classifiers(encoders, config.model, self.num_clusters)
        learned = {f"pseudo-labels of {name}": values for name, values in self.pseudo_labels.items()}
        inputs = samples.arrays | samples.fingerprints | learned
        super().__init__("step2", config, BatchSource(samples, config.data, device), inputs, encoders, classifiers, device)
        try:
            self.robust = build_robust_loss(config.rdl.loss, self.num_clusters, config.rdl.alpha).to(device)
        except (ValueError, TypeError) as error:  # a loss of the user's own that is not there or does not fit
            raise UserError(f"rdl.loss: {error}") from error
        self.unclipped = RobustConcentratingLoss(config.rdl.alpha, self.num_clusters, clip=False)
        self.modality_invariance = ModalityInvarianceLoss(config.rdl.tau_2, config.mlm.self_term)
        self.relation = RelationLoss()

    def load_initial_weights(self) -> str | None:
        """Start the encoders where the run that wrote the pseudo-labels ended, if `rdl.start` says so; return its checkpoint."""
        if self.config.rdl.start == "fresh":
            return None
        return self.load_encoders(next(iter(self.source_labels.paths.values())).parent.parent / LAST, "rdl.start: inherited")

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based); in the first ones RCLL is not clipped, see `docs/method.md`."""
        clipped = self.config.rdl.loss != "rcll" or epoch > self.config.rdl.unclipped_epochs
        self.loss = self.robust if clipped else self.unclipped
        return super().train_epoch(epoch)

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """One step on Eq. 4."""
        embeddings = self.embed(raw, generator)
        mlm = self.invariance(embeddings)
        robust = clipped = 0
        for name, chosen, views in zip(self.encoders, index, embeddings):
            logits = self.classifiers[name](views.float().flatten(0, 1))  # (V * B, K)
            labels = self.pseudo_labels[name][chosen].repeat(len(views))
            weights = (self.confidence[name][chosen].repeat(len(views)),) if self.confidence else ()
            robust = robust + self.loss(logits, labels, *weights)
            clipped = clipped + self.unclipped.clipped_fraction(logits, labels) / len(embeddings)
        weight = self.config.rdl.lambda_2
        self.optimise(weight * (self.config.rdl.loss_scale * robust) + (1 - weight) * mlm)
        return {f"loss/{self.config.rdl.loss}": robust.detach(), "loss/mlm": mlm.detach(), "clipped": clipped}


def choose_pseudo_labels(config: Step2Config, source: str | None) -> Step2Config:
    """Return the settings with the folder of pseudo-labels filled in, marked if the run that wrote them has read labels.

    Args:
        config: settings; its `rdl.pseudo_labels`, if given, stays.
        source: run folder; by default that of the newest finished step 1 of the data set below `run.output`.
    Raises:
        UserError: if both are given, or there is no finished run.
    """
    data, given = config.data, config.rdl.pseudo_labels
    if source and given:
        raise UserError(f"two places of pseudo-labels: --from {source} and rdl.pseudo_labels={given}; give one of them")
    if not given:
        folder = labels_of_run(source, data) if source else newest_labels(Path(config.run.output) / data.dataset / "step1", data)
        config = dataclasses.replace(config, rdl=dataclasses.replace(config.rdl, pseudo_labels=str(folder)))
    written = pseudo_label_path(config.rdl.pseudo_labels, data.dataset, data.modalities[0])
    return mark_labels(config, None, read_origin(written).get("reads_labels"))


def note_origin(session: Session, labels: PseudoLabels) -> None:
    """Write pseudo_labels.json: the run that made the labels, its commit and seed, K, and the hash of every file."""
    run = session.run
    note = {
        "folder": str(session.config.rdl.pseudo_labels), "num_clusters": labels.num_clusters,
        **{key: labels.origin.get(key) for key in ("run_id", "git_sha", "seed")},
        "sha256": {name: file_hash(path) for name, path in labels.paths.items()},
    }
    made_by = f"run {note['run_id']} (commit {note['git_sha']})" if note["run_id"] else "an unknown run"
    run.log(f"pseudo-labels of {made_by}, K = {labels.num_clusters}, from {note['folder']}")
    if run.writes and not (run.folder / LABEL_NOTE).is_file():  # on resume, the first one stays
        atomic_write_json(run.folder / LABEL_NOTE, note)


def export(session: Session, learner: RDLLearner) -> None:
    """Write fused pseudo-labels for another round. All processes must call it, the main one writes."""
    config = session.config
    method = config.rdl.fuse if config.data.pairing != "none" else "none"
    found = annotate(
        learner.encoders, learner.classifiers, learner.samples, config.data, session.device, method, config.run.seed
    )
    before = learner.source_labels
    clusters = {"num_clusters": before.num_clusters, "method": f"a round on the labels of {before.origin.get('run_id')}"}
    known = {f"{key}_before": before.origin.get(key) for key in ("agreement", "reliability")}
    write_annotation(session, learner, config.run.pseudo_labels, found, clusters | known)


def main(argv: list[str] | None = None) -> None:
    """Train step 2 on the pseudo-labels, for as many rounds as `rdl.rounds` says, and report the test scores of the last epoch."""
    parser = stage_parser(
        __doc__, "run folder whose pseudo-labels to learn: of step 1, or of a round of step 2; default: the newest of step 1"
    )
    further = sys.argv[1:] if argv is None else argv
    while further is not None:
        further = further_round(train_round(parser.parse_args(further)))


def train_round(arguments: argparse.Namespace) -> Session | None:
    """Train one round; return its session, or None if the run had been trained to its end before."""
    choose = lambda config: choose_pseudo_labels(config, arguments.source)
    session = open_session(Step2Config, "step2", arguments, DEFAULT_CONFIG, choose)

    def build(samples: PairedSamples) -> RDLLearner:
        rdl = session.config.rdl
        labels = load_pseudo_labels(rdl.pseudo_labels, samples, session.config.data, rdl.num_clusters, rdl.confidence)
        note_origin(session, labels)
        return RDLLearner(session.config, samples, labels, session.device)

    over = session.checkpoint is not None and session.checkpoint["epoch"] >= session.config.optim.epochs
    run_stage(session, build, export)
    return None if over else session


def further_round(session: Session | None) -> list[str] | None:
    """Return the command line of the round that follows a run, or None: it was the last one, or did not help, as its log then says."""
    if session is None or (session.config.rdl.rounds == 1 and not session.run.writes):
        return None
    config, run, last = session.config, session.run, session.config.rdl.rounds == 1
    folder = labels_of_run(run.folder, config.data)
    try:
        check_it_helped(folder, read_origin(pseudo_label_path(folder, config.data.dataset, config.data.modalities[0])))
    except UserError as reason:
        run.log(f"{'warning' if last else 'no further round'}: {reason}")
        return None
    if last:
        return None
    settings = ["rdl.pseudo_labels=null", f"rdl.rounds={config.rdl.rounds - 1}"]
    return ["--config", str(run.folder / "config.yaml"), "--from", str(run.folder), "--set", *settings]


if __name__ == "__main__":
    sys.exit(run_command(main))
