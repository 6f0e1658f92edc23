"""The learners of both stages with the departures that change training."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.release_protocol.labels import farthest_labels
from datasets.annotation import Annotation
from datasets.label_runs import PseudoLabels
from datasets.samples import PairedSamples
from train_step1 import PLALearner
from train_step2 import RDLLearner
from utils.engine.seed import generator_for
from utils.errors import UserError
from utils.evaluation.clustering import clustering_accuracy
from utils.settings.options import Step1Config, Step2Config


class KeptLabels(nn.Module):
    """The pseudo-labels (M modalities, N samples) of the best epoch so far by accuracy; travels with the checkpoint."""

    def __init__(self, modalities: int, count: int) -> None:
        super().__init__()
        self.register_buffer("labels", torch.zeros(modalities, count, dtype=torch.long))
        self.register_buffer("accuracy", torch.tensor(-1.0, dtype=torch.float64))

    def offer(self, labels: Tensor, accuracy: float) -> None:
        """Keep labels (M, N) if their accuracy is higher than that of all before."""
        if accuracy > self.accuracy:
            self.labels.copy_(labels)
            self.accuracy.fill_(accuracy)


class ReleasePLA(PLALearner):
    """Step 1 with the departures `oracle_labels` and `shuffled_memory`.

    Args beyond those of `PLALearner`:
        labels: modality -> (N,) int64 ground truth on the CPU; read with `oracle_labels` alone.
    """

    def __init__(
        self, config: Step1Config, samples: PairedSamples, device: torch.device, departures: frozenset[str], labels: Mapping[str, Tensor],
    ) -> None:
        super().__init__(config, samples, device)
        self.departures, self.labels = departures, labels
        if "oracle_labels" in departures:
            self.kept = KeptLabels(len(samples.lists), len(next(iter(labels.values()))))
            self.parts = (*self.parts, "kept")

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based); with `oracle_labels`, offer its pseudo-labels to those kept for the export."""
        losses = super().train_epoch(epoch)
        if "oracle_labels" not in self.departures:
            return losses
        chosen = farthest_labels({name: features.embeddings for name, features in self.describe().items()}, self.labels)
        accuracy = sum(clustering_accuracy(chosen[name], self.labels[name]) for name in chosen) / len(chosen)
        self.kept.offer(torch.stack(list(chosen.values())), accuracy)
        return {**losses, "oracle_accuracy": accuracy}

    def cluster(self, epoch: int) -> None:
        """Fill and cluster the banks; with `shuffled_memory`, their rows then come in the order of a shuffled epoch.

        The authors' code writes row k for the k-th sample of a shuffled pass, another one for each modality, and reads and
        updates row i for sample i from then on. The k-means centres do not depend on the order of the rows.
        """
        super().cluster(epoch)
        if "shuffled_memory" in self.departures:
            for name, bank in self.banks.items():
                generator = generator_for(self.config.run.seed, "order of the bank", name, epoch)
                bank.memory.copy_(bank.memory[torch.randperm(len(bank), generator=generator).to(self.device)])

    def annotate(self) -> Annotation:
        """Return the pseudo-labels to export."""
        found = super().annotate()
        if "oracle_labels" not in self.departures:
            return found
        return dataclasses.replace(found, ids=dict(zip(self.encoders, self.kept.labels.cpu().clone())))


class BatchClippedLoss(nn.Module):
    """RCLL as the authors' code has it: the sum of two means over the (B, K) probabilities, of those above 1 / B and of the others.

    Entries above 1 / B each count the value (-log p)^alpha (1 - p) of their row, p the pseudo-label's probability, which is
    itself never clipped; so a row weighs as often as it has classes above 1 / B. Entries at or below 1 / B each count
    (log B)^alpha (1 - 1 / B), whose mean is that constant. B stands where Eq. 12 has K because the authors' code counts the
    tensor objects of the label vector.

    A side without entries counts 0 here; the mean of nothing makes the authors' loss NaN.

    Args:
        alpha: exponent of RCLL, >= 0.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, logits: Tensor, pseudo_labels: Tensor) -> Tensor:
        """Return the loss of a batch: a scalar >= 0.

        Args:
            logits: (B, K) unnormalised scores, B >= 2; computed in float32 or wider.
            pseudo_labels: (B,) int64 in 0..K-1.
        """
        size = len(logits)
        log_probs = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
        surprise = -log_probs.gather(1, pseudo_labels[:, None]).squeeze(1)  # (B,)
        surprise = surprise.clamp_min(torch.finfo(surprise.dtype).tiny)  # the slope of x^alpha is infinite at 0
        values = surprise.pow(self.alpha) * -torch.expm1(-surprise)
        above = (log_probs.detach().exp() > 1 / size).sum(dim=1)  # (B,) how often each row counts
        constant = math.log(size) ** self.alpha * (1 - 1 / size)
        clipped = constant * (above.sum() < logits.numel()).to(values.dtype)
        return (above * values).sum() / above.sum().clamp_min(1) + clipped


class ReleaseRDL(RDLLearner):
    """Step 2 with the departure `batch_clip`: the authors' RCLL after `rdl.unclipped_epochs`; needs `rdl.loss=rcll`."""

    def __init__(
        self, config: Step2Config, samples: PairedSamples, pseudo_labels: PseudoLabels, device: torch.device,
        departures: frozenset[str],
    ) -> None:
        super().__init__(config, samples, pseudo_labels, device)
        if "batch_clip" in departures:
            if config.rdl.loss != "rcll":
                raise UserError(f"batch_clip changes RCLL, but rdl.loss is {config.rdl.loss!r}: set rdl.loss=rcll")
            self.robust = BatchClippedLoss(config.rdl.alpha)
