"""Step 2, robust discriminative learning (RDL): trains fresh encoders on the noisy pseudo-labels that step 1 wrote."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.batches import BatchSource
from datasets.label_runs import labels_of_run, newest_labels
from datasets.pseudo_labels import file_hash, pseudo_label_path, read_origin, read_pseudo_labels
from datasets.samples import PairedSamples
from losses import ModalityInvarianceLoss, RobustConcentratingLoss, build_robust_loss
from models import MLPClassifier
from models.build import build_encoders
from training import run_stage
from utils.engine.checkpoint import atomic_write_json
from utils.engine.learner import StageLearner
from utils.engine.seed import BatchGenerator
from utils.engine.session import Session, open_session, run_command, stage_parser
from utils.errors import UserError
from utils.evaluation.report import LABEL_NOTE
from utils.settings.options import Step2Config

DEFAULT_CONFIG = "configs/mnist3d/step2.yaml"


class RDLLearner(StageLearner):
    """Fresh encoders, MLP classifiers h and optimiser of step 2 (Algorithm 1, second half).

    Args:
        config: settings of step 2.
        samples: training samples, without labels.
        pseudo_labels: modality -> (N,) int64 on the device.
        num_clusters: K of the pseudo-labels.
        device: where everything lives.
    """

    def __init__(
        self, config: Step2Config, samples: PairedSamples, pseudo_labels: dict[str, Tensor], num_clusters: int,
        device: torch.device,
    ) -> None:
        self.pseudo_labels = pseudo_labels
        dim, hidden = config.model.embedding_dim, config.model.classifier_hidden
        encoders = build_encoders(config.data.modalities, config.model, config.run.sync_batchnorm)
        classifiers = nn.ModuleDict({name: MLPClassifier(dim, hidden, num_clusters) for name in encoders})
        inputs = {**samples.arrays, **{f"pseudo-labels of {name}": values for name, values in pseudo_labels.items()}}
        super().__init__("step2", config, BatchSource(samples, config.data, device), inputs, encoders, classifiers, device)
        try:
            self.robust = build_robust_loss(config.rdl.loss, num_clusters, config.rdl.alpha).to(device)
        except (ValueError, TypeError) as error:  # a loss of the user's own that is not there or does not fit
            raise UserError(f"rdl.loss: {error}") from error
        self.unclipped = RobustConcentratingLoss(config.rdl.alpha, num_clusters, clip=False)
        self.modality_invariance = ModalityInvarianceLoss(config.rdl.tau_2, config.mlm.self_term)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based); in the first ones RCLL is not clipped, see `docs/method.md`."""
        clipped = self.config.rdl.loss != "rcll" or epoch > self.config.rdl.unclipped_epochs
        self.loss = self.robust if clipped else self.unclipped
        return super().train_epoch(epoch)

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """One step on Eq. 4."""
        embeddings = self.embed(raw, generator)
        mlm = self.invariance(raw, embeddings, generator)
        robust = clipped = 0
        for name, chosen, rows in zip(self.encoders, index, embeddings):
            logits, labels = self.classifiers[name](rows.float()), self.pseudo_labels[name][chosen]
            robust = robust + self.loss(logits, labels)
            clipped = clipped + self.unclipped.clipped_fraction(logits, labels) / len(embeddings)
        weight = self.config.rdl.lambda_2
        self.optimise(weight * (self.config.rdl.loss_scale * robust) + (1 - weight) * mlm)
        return {f"loss/{self.config.rdl.loss}": robust.detach(), "loss/mlm": mlm.detach(), "clipped": clipped}


def choose_pseudo_labels(config: Step2Config, source: str | None) -> Step2Config:
    """Return the settings with the folder of pseudo-labels filled in.

    Args:
        config: settings; its `rdl.pseudo_labels`, if given, stays.
        source: run folder of step 1; by default the newest finished one of the data set below `run.output`.
    Raises:
        UserError: if both are given, or there is no finished run.
    """
    data, given = config.data, config.rdl.pseudo_labels
    if source and given:
        raise UserError(f"two places of pseudo-labels: --from {source} and rdl.pseudo_labels={given}; give one of them")
    if given:
        return config
    folder = labels_of_run(source, data) if source else newest_labels(Path(config.run.output) / data.dataset / "step1", data)
    return dataclasses.replace(config, rdl=dataclasses.replace(config.rdl, pseudo_labels=str(folder)))


def load_pseudo_labels(session: Session, samples: PairedSamples) -> tuple[dict[str, Tensor], int]:
    """Read the pseudo-label file of every modality, and note in the run folder and its log whose they are.

    Args:
        session: its settings name the folder.
        samples: the training set.
    Returns:
        Modality -> (N,) int64 on the device, and K.
    Raises:
        UserError: as `read_pseudo_labels`, and if the files disagree on K, come from different runs, or were made with
            another pairing.
    """
    data, folder = session.config.data, session.config.rdl.pseudo_labels
    paths = {name: pseudo_label_path(folder, data.dataset, name) for name in samples.lists}
    read = {
        name: read_pseudo_labels(path, samples.lists[name], dataset=data.dataset, num_clusters=session.config.rdl.num_clusters)
        for name, path in paths.items()
    }
    counts = {name: count for name, (_, count) in read.items()}
    if len(set(counts.values())) != 1:
        raise UserError(f"the pseudo-label files in {folder} disagree on the number of clusters: {counts}")
    origins = {name: read_origin(path) for name, path in paths.items()}
    runs = {name: origin.get("run_id") for name, origin in origins.items()}
    if len(set(runs.values())) != 1:  # step 1 was cut off between two files: cluster ids would not mean the same
        raise UserError(
            f"the pseudo-label files in {folder} come from different runs of step 1: {runs}; repeat python train_step1.py, or "
            "its --resume"
        )
    origin, num_clusters = next(iter(origins.values())), next(iter(counts.values()))
    pairing = origin.get("pairing", data.pairing)
    if pairing != data.pairing:
        raise UserError(
            f"the labels in {folder} were made with data.pairing: {pairing}, this run has {data.pairing}; what the labels of one "
            "run taught must not pass as another: use the same pairing in both steps"
        )
    _note_origin(session, paths, origin, num_clusters)
    return {name: torch.from_numpy(labels).to(session.device) for name, (labels, _) in read.items()}, num_clusters


def _note_origin(session: Session, paths: Mapping[str, Path], origin: Mapping[str, Any], num_clusters: int) -> None:
    """Write pseudo_labels.json: the run that made the labels, its commit and seed, K, and the hash of every file."""
    run = session.run
    note = {
        "folder": str(session.config.rdl.pseudo_labels), "num_clusters": num_clusters,
        **{key: origin.get(key) for key in ("run_id", "git_sha", "seed")},
        "sha256": {name: file_hash(path) for name, path in paths.items()},
    }
    made_by = f"step-1 run {note['run_id']} (commit {note['git_sha']})" if note["run_id"] else "an unknown run"
    run.log(f"pseudo-labels of {made_by}, K = {num_clusters}, from {note['folder']}")
    if run.writes and not (run.folder / LABEL_NOTE).is_file():  # on resume, the first one stays
        atomic_write_json(run.folder / LABEL_NOTE, note)


def main(argv: list[str] | None = None) -> None:
    """Train step 2 on the pseudo-labels and report the test scores of the last epoch."""
    parser = stage_parser(__doc__)
    parser.add_argument("--from", dest="source", metavar="RUN", help="run folder of step 1 whose pseudo-labels to learn; default: the newest")
    arguments = parser.parse_args(argv)
    if arguments.source and arguments.resume:
        parser.error("--from beside --resume: a run keeps its pseudo-labels")
    choose = lambda config: choose_pseudo_labels(config, arguments.source)
    session = open_session(Step2Config, "step2", arguments, DEFAULT_CONFIG, choose)

    def build(samples: PairedSamples) -> RDLLearner:
        return RDLLearner(session.config, samples, *load_pseudo_labels(session, samples), session.device)

    run_stage(session, build)


if __name__ == "__main__":
    sys.exit(run_command(main))
