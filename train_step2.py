"""Step 2, robust discriminative learning (RDL): trains fresh encoders on the noisy pseudo-labels that step 1 wrote."""

import sys

import torch
from torch import Tensor, nn

from datasets.batches import BatchSource
from datasets.pseudo_labels import pseudo_label_origin, pseudo_label_path, read_pseudo_labels
from datasets.samples import PairedSamples, embed_samples, load_test_samples, load_training_samples
from losses import ModalityInvarianceLoss, RobustConcentratingLoss, build_robust_loss
from models import MLPClassifier
from models.build import build_encoders, load_pretrained
from utils.engine.learner import StageLearner
from utils.engine.seed import BatchGenerator
from utils.engine.session import fit, open_session, parse_arguments, run_command
from utils.errors import UserError
from utils.evaluation.report import finish, report_pretrained
from utils.evaluation.tables import Evaluator
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


def load_pseudo_labels(
    config: Step2Config, samples: PairedSamples, device: torch.device
) -> tuple[dict[str, Tensor], int]:
    """Read the pseudo-label file of every modality; return modality -> (N,) int64 on the device, and K.

    Raises:
        UserError: as `read_pseudo_labels`, and if the files disagree on K or come from different runs.
    """
    labels, counts, runs = {}, {}, {}
    for name, rows in samples.lists.items():
        path = pseudo_label_path(config.rdl.pseudo_labels, config.data.dataset, name)
        values, counts[name] = read_pseudo_labels(
            path, rows, dataset=config.data.dataset, num_clusters=config.rdl.num_clusters
        )
        labels[name] = torch.from_numpy(values).to(device)
        runs[name] = pseudo_label_origin(path, "run_id")
        made_with = pseudo_label_origin(path, "pairing") or config.data.pairing
        if made_with != config.data.pairing:
            raise UserError(
                f"{path} was made with data.pairing: {made_with}, this run has {config.data.pairing}; what the labels of one run "
                "taught must not pass as another: use the same pairing in both steps"
            )
    if len(set(counts.values())) != 1:
        raise UserError(f"the pseudo-label files in {config.rdl.pseudo_labels} disagree on the number of clusters: {counts}")
    if len(set(runs.values())) != 1:  # step 1 was cut off between two files: cluster ids would not mean the same
        raise UserError(
            f"the pseudo-label files in {config.rdl.pseudo_labels} come from different runs of step 1: {runs}; repeat "
            "python train_step1.py, or its --resume"
        )
    return labels, next(iter(counts.values()))


def main(argv: list[str] | None = None) -> None:
    """Train step 2 on the pseudo-labels and report the test scores of the last epoch."""
    session = open_session(Step2Config, "step2", parse_arguments(__doc__, argv), DEFAULT_CONFIG)
    config = session.config
    samples = load_training_samples(config.data, session.device)
    pseudo_labels, num_clusters = load_pseudo_labels(config, samples, session.device)
    test, labels = load_test_samples(config.data, session.device, samples)
    learner = RDLLearner(config, samples, pseudo_labels, num_clusters, session.device)
    if session.checkpoint is None:
        report_pretrained(session.run, load_pretrained(learner.encoders, config.model.pretrained))
    evaluator = Evaluator(lambda: embed_samples(learner.encoders, test, config.data, session.device), labels)
    fit(session, learner, evaluator, "step2")
    finish(session.run, evaluator, test.arrays, config.run.figures)


if __name__ == "__main__":
    sys.exit(run_command(main))
