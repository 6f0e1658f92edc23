"""What the departures of the authors' published code are made of, see docs/fidelity.md: labels, pairs, memory rows and a loss.

`oracle_labels` and `class_pairs` read ground truth, which `baselines.release_protocol` gives them.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.true_labels import count_classes
from datasets.annotation import Annotation
from datasets.label_runs import PseudoLabels
from datasets.samples import PairedSamples
from train_step1 import PLALearner
from train_step2 import RDLLearner
from utils.engine.seed import derive_seed, generator_for
from utils.errors import UserError
from utils.evaluation.clustering import clustering_accuracy
from utils.modalities import MODALITIES
from utils.settings.options import Step1Config, Step2Config

CHUNK = 1024  # rows of the similarity matrix held at once
SAME_INSTANCE = 302 / 5000  # shares of the published training lists, image against point cloud
OTHER_CLASS = 182 / 5000


def farthest_labels(embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pseudo-labels of the authors' export: ground truth, looked up at the farthest cross-modal sample.

    For sample i the row r of smallest cosine similarity in the other modality is found; its pseudo-label is entry r of the
    label column of the sample's *own* modality. With rows paired by object this is the label of the farthest object. Of
    several other modalities the last one counts, as in the authors' loop.

    Args:
        embeddings: modality -> (N, D) unit-norm rows, on any device; one N, as all variants start from paired rows.
        labels: modality -> (N,) int64 ground truth on the CPU.
    Returns:
        modality -> (N,) int64 on the CPU.
    """
    chosen = {}
    for name, rows in embeddings.items():
        other = embeddings[[key for key in embeddings if key != name][-1]]
        farthest = torch.cat([(part @ other.T).argmin(dim=1) for part in rows.split(CHUNK)])  # (N,)
        chosen[name] = labels[name][farthest.cpu()]
    return chosen


def pair_by_class(samples: PairedSamples, labels: Mapping[str, Tensor], seed: int) -> tuple[PairedSamples, dict[str, Tensor]]:
    """Reorder the rows of every 3D modality by `class_pair_order`; the 2D ones keep their order, as they agree in the lists.

    Args:
        samples: rows paired by object, of 2D and of 3D modalities; labels: modality -> (N,) int64 in the same order.
        seed: of the draw; equal seeds give equal pairs in both stages.
    """
    solid = [name for name in samples.lists if not MODALITIES[name].is_2d]
    if not 0 < len(solid) < len(samples.lists):
        raise UserError(f"class pairs join 2D and 3D samples: data.modalities needs one of each, found {list(samples.lists)}")
    lists, arrays, truth = dict(samples.lists), dict(samples.arrays), dict(labels)
    for name in solid:
        order = class_pair_order(labels[name].numpy(), derive_seed(seed, "class pairs", name))
        index, rows = torch.from_numpy(order), lists[name]
        moved = {key: tuple(getattr(rows, key)[row] for row in order) for key in ("names", "files", "instance_ids")}
        lists[name] = dataclasses.replace(rows, **moved)
        arrays[name] = arrays[name][index.to(arrays[name].device)]
        truth[name] = labels[name][index]
    return PairedSamples(lists, arrays), truth


def class_pair_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw which sample takes each row: itself in 6.04 % of the rows, one of another class in 3.64 %, else of the same class.

    The counts are rounded, that of the mismatches to an even number of at least two. A class with a single sample left
    after the first two draws keeps it in its row.

    Args:
        labels: (N,) integers; a UserError says that the classes are too few or too unequal for that many mismatches.
    Returns:
        (N,) int64, a permutation of 0..N-1.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    crossing = 2 * max(1, round(len(labels) * OTHER_CLASS / 2))
    mine = labels[shuffled]
    turn = [(mine[:place] == value).sum() for place, value in enumerate(mine)]
    across = shuffled[np.argsort(turn, kind="stable")[:crossing]]  # taken from the classes in turn
    if np.unique(labels[across], return_counts=True)[1].max() > crossing / 2:
        raise UserError(f"{crossing} rows should join two classes, but one class has more than half of them: use more classes")
    order = np.arange(len(labels))
    across = across[np.argsort(labels[across], kind="stable")]
    order[across] = np.roll(across, crossing // 2)  # no class fills half of them, so each meets another
    moved = shuffled[~np.isin(shuffled, across)][round(len(labels) * SAME_INSTANCE) :]
    for value in np.unique(labels[moved]):
        rows = moved[labels[moved] == value]
        order[rows] = np.roll(rows, 1)
    return order


def pair_shares(samples: PairedSamples, labels: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how the rows of the first 2D and the first 3D modality are paired, as shares of all rows that sum to 1."""
    first, second = (next(name for name in samples.lists if MODALITIES[name].is_2d == flat) for flat in (True, False))
    same = np.equal(*(samples.lists[name].instance_ids for name in (first, second)))
    alike = (labels[first] == labels[second]).numpy()
    return {
        "same_instance": float(same.mean()), "other_instance_same_class": float((alike & ~same).mean()),
        "other_class": float((~alike).mean()),
    }


class ReleasePLA(PLALearner):
    """Step 1 with the departures `oracle_labels` and `shuffled_memory`.

    Args beyond those of `PLALearner`:
        labels: modality -> (N,) int64 ground truth on the CPU; read with `oracle_labels` alone.
    Attributes:
        kept: with `oracle_labels`, accuracy and pseudo-labels, modality -> (N,), of the best epoch so far.
    """

    def __init__(
        self, config: Step1Config, samples: PairedSamples, device: torch.device, departures: frozenset[str], labels: Mapping[str, Tensor],
    ) -> None:
        super().__init__(config, samples, device)
        self.departures, self.labels = departures, labels
        self.kept: tuple[float, dict[str, Tensor]] = -1.0, {}

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train one epoch (1-based); with `oracle_labels`, make its pseudo-labels and keep them for the export if none were better."""
        losses = super().train_epoch(epoch)
        if "oracle_labels" not in self.departures:
            return losses
        chosen = farthest_labels({name: features.embeddings for name, features in self.describe().items()}, self.labels)
        accuracy = sum(clustering_accuracy(chosen[name], self.labels[name]) for name in chosen) / len(chosen)
        self.kept = max(self.kept, (accuracy, chosen), key=lambda entry: entry[0])  # of equal ones the first
        return {**losses, "oracle_accuracy": accuracy}

    def cluster(self, epoch: int) -> None:
        """Fill and cluster the banks; with `shuffled_memory`, their rows then come in the order of a shuffled epoch.

        The authors' code writes row k for the k-th sample of a shuffled pass, another one for each modality, and reads and
        updates row i for sample i from then on. The k-means centres do not depend on the order of the rows.
        """
        super().cluster(epoch)
        record = self.clusters["record"]  # goes to the files of pseudo-labels
        record["departures"] = sorted(self.departures)
        if "oracle_labels" in self.departures:
            record["num_clusters"] = count_classes(self.config.data, self.labels)
        for name, bank in self.banks.items() if "shuffled_memory" in self.departures else ():
            order = torch.randperm(len(bank), generator=generator_for(self.config.run.seed, "order of the bank", name, epoch))
            bank.memory.copy_(bank.memory[order.to(self.device)])

    def annotate(self) -> Annotation:
        """Return the pseudo-labels to export."""
        found = super().annotate()
        return dataclasses.replace(found, ids=self.kept[1]) if "oracle_labels" in self.departures else found

    def state_dict(self) -> dict:
        """As `PLALearner.state_dict`, with the labels kept."""
        return {**super().state_dict(), "kept": self.kept}

    def load_state_dict(self, state: dict) -> None:
        """As `PLALearner.load_state_dict`."""
        super().load_state_dict(state)
        self.kept = state["kept"]


class BatchClippedLoss(nn.Module):
    """RCLL as the authors' code has it: the sum of two means over the (B, K) probabilities, of those above 1 / B and of the others.

    Entries above 1 / B each count the value (-log p)^alpha (1 - p) of their row, p the pseudo-label's probability, which is
    itself never clipped; so a row weighs as often as it has classes above 1 / B. Entries at or below 1 / B each count
    (log B)^alpha (1 - 1 / B), whose mean is that constant. B stands where Eq. 12 has K because the authors' code counts the
    tensor objects of the label vector. A side without entries counts 0 here; the mean of nothing makes the authors' loss NaN.
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
