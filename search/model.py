"""The trained run behind an index: describes files as evaluation does, and knows what its similarities mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.pseudo_labels import file_hash
from datasets.samples import PairedSamples, describe_samples, load_training_samples
from models.trained import open_trained
from utils.engine.checkpoint import LAST
from utils.errors import UserError
from utils.evaluation.features import Features
from utils.modalities import MODALITIES

PREPROCESSING = ("image_size", "image_resize", "num_points", "max_faces", "eval_subsets", "instance_id")
CALIBRATION_PAIRS = 2000  # training samples that the similarities are measured on
QUANTILES = 101
REACHED = 0.95  # share of the unrelated queries below the level
INK = 64  # difference of tone from the ground, of 255


class Model:
    """The last checkpoint of a run; `overrides` are those of `evaluate.py --set`.

    Attributes:
        widths: representation -> number of values.
        identity: what an index remembers of it.
    """

    def __init__(self, folder: str, device: torch.device, overrides: Sequence[str] = ()) -> None:
        checkpoint = Path(folder).expanduser() / LAST
        trained = open_trained(checkpoint, device, overrides)
        self.data, self.representation, self.device = trained.config.data, trained.config.eval.representation, device
        if self.data.features:
            raise UserError(f"{folder} learned from stored features of {', '.join(self.data.features)}: files cannot be described by it")
        self.encoders, self.classifiers = trained.encoders, trained.classifiers
        dim, clusters = trained.config.model.embedding_dim, trained.state["learner"]["num_clusters"]
        self.widths = {"embedding": dim, "posterior": clusters, "joint": dim + clusters}
        self.identity = {
            "run": str(checkpoint.parent.resolve()), "checkpoint": file_hash(checkpoint),
            "preprocessing": {key: getattr(self.data, key) for key in PREPROCESSING}, "reads_labels": trained.config.model.reads_labels,
        }

    def describe(self, arrays: Mapping[str, Tensor]) -> dict[str, Features]:
        """Return modality -> Features of some `PairedSamples.arrays`."""
        encoders = {name: self.encoders[name] for name in arrays}
        return describe_samples(encoders, self.classifiers, PairedSamples({}, dict(arrays)), self.data, self.device)

    def calibrate(self, modality: str) -> dict[str, dict[str, Any]]:
        """Measure on the training samples, without labels, what cosines to items of a modality mean.

        Returns:
            Query modality -> "quantiles" of the cosine of random pairs; "level", which the best cosine of an unrelated query
            stays below in `REACHED` of the cases: all samples that the model puts into the cluster of the query are taken
            away from what it is compared with. For pictures also "ground" and "fill", see `search.app`.
        """
        train = load_training_samples(self.data, self.device)
        least = min(train.counts.values())
        rows = torch.from_numpy(np.random.default_rng(0).permutation(least)[:CALIBRATION_PAIRS])
        arrays = {name: array[rows * len(array) // least] for name, array in train.arrays.items()}  # as many of each; pairs stay pairs
        features = self.describe(arrays)
        tones = {name: _tone(array) for name, array in arrays.items() if MODALITIES[name].is_2d}
        return {name: _meaning(query, features[modality]) | tones.get(name, {}) for name, query in features.items()}


def _meaning(query: Features, gallery: Features) -> dict[str, Any]:
    cosines = query.embeddings @ gallery.embeddings.T
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    alike = query.posteriors.argmax(dim=1)[:, None] == gallery.posteriors.argmax(dim=1)
    level = float(cosines.masked_fill(alike | own, -1).amax(dim=1).double().quantile(REACHED))
    quantiles = np.quantile(cosines[~own].cpu().numpy(), np.linspace(0, 1, QUANTILES))
    return {"quantiles": quantiles.tolist(), "level": level}


def _tone(pictures: Tensor) -> dict[str, float]:
    """Return the tone 0..255 around what (N, V, 3, S, S) pictures show, and the share of the side that it takes: both medians."""
    tones = pictures[:, 0].float().mean(dim=1)  # (N, S, S)
    grounds = tones[:, [0, -1]].flatten(1).median(dim=1).values  # of the upper and lower edge
    ink = (tones - grounds[:, None, None]).abs() > INK
    extents = torch.maximum(ink.any(dim=1).sum(dim=1), ink.any(dim=2).sum(dim=1)).clamp(min=1)
    return {"ground": float(grounds.median()), "fill": float(extents.median()) / tones.shape[-1]}
