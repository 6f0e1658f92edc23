"""Cluster ids of the training samples from what the modalities believe, each weighed by how far it can be trusted; no labels.

Both stages end with it: step 1 with its classifiers g, a round of step 2 with its classifiers h.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from datasets.kinds import KINDS
from datasets.samples import PairedSamples, describe_samples
from utils.engine.seed import BatchGenerator, generator_for
from utils.evaluation.consensus import fuse, trust, view_agreement
from utils.evaluation.features import extract_features
from utils.settings.options import DataConfig


@dataclass(frozen=True)
class Annotation:
    """Pseudo-labels of one training set.

    Attributes:
        ids: modality -> (N,) int64 on the CPU, z of Sec. III-D; the same in all modalities where beliefs were fused.
        posteriors: modality -> (N, K) float32 on the CPU, what the ids were decided on.
        own: modality -> (N,) int64, the ids that each modality by itself would give; the same as `ids` where nothing was fused.
        reliability: modality -> `consensus.view_agreement` of two augmented views; empty for features of one view.
        agreement: share of objects whose modalities, each by itself, give the same id; None without pairs.
    """

    ids: dict[str, Tensor]
    posteriors: dict[str, Tensor]
    own: dict[str, Tensor]
    reliability: dict[str, float]
    agreement: float | None

    def with_ids(self, ids: Tensor) -> "Annotation":
        """Return the same beliefs with other ids (N,), alike in all modalities."""
        return replace(self, ids=dict.fromkeys(self.ids, ids))

    @classmethod
    def of(cls, posteriors: Mapping[str, Tensor], method: str, reliability: Mapping[str, float], paired: bool) -> "Annotation":
        """Decide on ids.

        Args:
            posteriors: modality -> (N, K).
            method: "none" (every modality its own, as in the paper), "mean" or "trusted" (weights by `consensus.trust`).
            reliability: modality -> `view_agreement`; used by "trusted", which without it is "mean".
            paired: row i of all modalities is one object; needed to fuse.
        """
        posteriors = {name: rows.cpu() for name, rows in posteriors.items()}
        own = {name: rows.argmax(dim=1) for name, rows in posteriors.items()}
        ids = torch.stack(list(own.values())) if paired else None
        agreement = float((ids == ids[0]).all(dim=0).float().mean()) if paired else None
        if method != "none":
            weights = trust(reliability) if method == "trusted" and reliability else dict.fromkeys(posteriors, 1.0)
            posteriors = dict.fromkeys(posteriors, fuse(posteriors, weights))
        return cls({name: rows.argmax(dim=1) for name, rows in posteriors.items()}, posteriors, own, dict(reliability), agreement)


def annotate(
    encoders: Mapping[str, nn.Module], classifiers: Mapping[str, nn.Module], samples: PairedSamples, data: DataConfig,
    device: torch.device, method: str, seed: int,
) -> Annotation:
    """Return the pseudo-labels of the training set that encoders and classifiers give, by a method of `Annotation.of`.

    The seed is that of the augmented views that measure reliability.
    """
    features = describe_samples(encoders, classifiers, samples, data, device)
    posteriors = {name: values.posteriors for name, values in features.items()}
    reliability = measure_reliability(encoders, classifiers, samples, data, device, seed)
    return Annotation.of(posteriors, method, reliability, data.pairing != "none")


def measure_reliability(
    encoders: Mapping[str, nn.Module], classifiers: Mapping[str, nn.Module], samples: PairedSamples, data: DataConfig,
    device: torch.device, seed: int,
) -> dict[str, float]:
    """Return modality -> `view_agreement` of two augmented views of every sample, in eval mode; of features, two stored views.

    Nothing, if some modality's features are of one view: it would look wholly reliable.
    """
    if any(name in data.features and samples.arrays[name].shape[1] < 2 for name in encoders):
        return {}
    shares = {}
    for name, encoder in encoders.items():
        array, kind = samples.arrays[name], KINDS[data.kind_of(name)]
        views = []
        for view in range(2):
            numbers = BatchGenerator(generator_for(seed, "reliability", name, view, device=device))
            stored = view if name in data.features else 0
            inputs = lambda index: [kind.augment(array[index, stored].to(device), data, numbers)]  # noqa: B023
            views.append(extract_features(encoder, classifiers[name], inputs, len(array), array.device).posteriors)
        shares[name] = view_agreement(views)
    return shares
