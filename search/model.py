"""The trained run behind an index: describes files as evaluation does, and knows what its similarities mean."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.pseudo_labels import file_hash
from datasets.samples import PairedSamples, describe_samples, load_training_samples
from models.trained import open_trained
from utils.engine.session import LAST
from utils.errors import UserError
from utils.evaluation.features import Features
from utils.modalities import MODALITIES

PREPROCESSING = ("image_size", "image_resize", "num_points", "max_faces", "eval_subsets", "instance_id")
CALIBRATION_PAIRS = 2000  # training samples that the similarities are measured on
QUANTILES = 101
REACHED = 0.95  # share of the unrelated queries below the level
INK = 64  # difference of tone from the ground, of 255


class Model:
    """The last checkpoint of a run.

    Args:
        folder: run folder; device: where its encoders run.
        overrides: "section.key=value" of where things lie, as `evaluate.py --set`.
    Attributes:
        identity: what an index remembers of it: run folder, hash of the checkpoint, preprocessing.
        widths: representation -> number of values.
    """

    def __init__(self, folder: str, device: torch.device, overrides: Sequence[str] = ()) -> None:
        checkpoint = Path(folder).expanduser() / LAST
        trained = open_trained(checkpoint, device, overrides)
        self.data, self.scores, self.device = trained.config.data, trained.config.eval, device
        if self.data.features:
            raise UserError(f"{folder} learned from stored features of {', '.join(self.data.features)}: files cannot be described by it")
        self.encoders, self.classifiers = trained.encoders, trained.classifiers
        dim, clusters = trained.config.model.embedding_dim, trained.state["learner"]["num_clusters"]
        self.widths = {"embedding": dim, "posterior": clusters, "joint": dim + clusters}
        self.identity = {
            "run": str(checkpoint.parent.resolve()), "checkpoint": file_hash(checkpoint),
            "preprocessing": {key: getattr(self.data, key) for key in PREPROCESSING},
        }

    def check(self, info: Mapping[str, Any], place: str) -> None:
        """Raise a UserError, with the command that mends it, unless this model made the index."""
        for key in ("checkpoint", "preprocessing"):
            if info[key] != self.identity[key]:
                raise UserError(
                    f"{place} was made with another model: {key} {info[key]} of {info['run']}, found {self.identity[key]} in "
                    f"{self.identity['run']}. Give that run with --run, or describe the collection anew: python search.py build "
                    f"--run {self.identity['run']} --collection {info['collection']} --index NEW_INDEX"
                )

    def describe(self, modality: str, samples: Sequence[np.ndarray]) -> Features:
        """Describe samples of `search.files.read_sample`, which may differ in shape, in their order."""
        shape = lambda place: samples[place].shape
        order, parts = sorted(range(len(samples)), key=shape), []
        for _, places in groupby(order, key=shape):
            arrays = {modality: torch.from_numpy(np.stack([samples[place] for place in places]))}
            parts.append(self._features(PairedSamples({}, arrays))[modality])
        join = lambda name: torch.cat([getattr(part, name).cpu() for part in parts])[torch.tensor(order).argsort()]
        return Features(join("embeddings"), join("posteriors"))

    def _features(self, samples: PairedSamples) -> dict[str, Features]:
        encoders = {name: self.encoders[name] for name in samples.arrays}
        return describe_samples(encoders, self.classifiers, samples, self.data, self.device)

    def calibrate(self, modality: str) -> dict[str, dict[str, Any]]:
        """Measure on the training samples, without labels, what cosines to items of a modality mean.

        Returns:
            Query modality -> "quantiles" of the cosine of random pairs; "level", which the best cosine of an unrelated query
            stays below in `REACHED` of the cases: all samples that the model puts into the cluster of the query are taken
            away from what it is compared with; "kept", the share of the queries above the level when none but its own
            partner is taken away. For pictures also "ground" and "fill", see `search.app`.
        """
        train, rng = load_training_samples(self.data, self.device), np.random.default_rng(0)
        count = min(CALIBRATION_PAIRS, *train.counts.values())
        chosen = {name: torch.from_numpy(rng.permutation(size)[:count]) for name, size in train.counts.items()}
        if self.data.pairing != "none":  # rows are pairs
            chosen = dict.fromkeys(chosen, chosen[modality])
        arrays = {name: array[chosen[name].to(array.device)] for name, array in train.arrays.items()}
        features = self._features(PairedSamples({}, arrays))
        tones = {name: _tone(array) for name, array in arrays.items() if MODALITIES[name].is_2d}
        return {name: _meaning(query, features[modality]) | tones.get(name, {}) for name, query in features.items()}


def _meaning(query: Features, gallery: Features) -> dict[str, Any]:
    cosines = query.embeddings @ gallery.embeddings.T
    own = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    alike = query.posteriors.argmax(dim=1)[:, None] == gallery.posteriors.argmax(dim=1)
    level = float(cosines.masked_fill(alike | own, -1).amax(dim=1).double().quantile(REACHED))
    kept = (cosines.masked_fill(own, -1).amax(dim=1) >= level).double().mean()
    quantiles = np.quantile(cosines[~own].cpu().numpy(), np.linspace(0, 1, QUANTILES))
    return {"quantiles": quantiles.tolist(), "level": level, "kept": float(kept)}


def _tone(pictures: Tensor) -> dict[str, float]:
    """Return the tone 0..255 around what (N, V, 3, S, S) pictures show, and the share of the side that it takes: both medians."""
    tones = pictures[:, 0].float().mean(dim=1).cpu().numpy()  # (N, S, S)
    grounds = np.median(np.concatenate([tones[:, 0], tones[:, -1], tones[:, :, 0], tones[:, :, -1]], axis=1), axis=1)
    boxes = [Image.fromarray(np.abs(tone - ground) > INK).getbbox() or (0, 0, 1, 1) for tone, ground in zip(tones, grounds)]
    extents = [max(right - left, low - top) for left, top, right, low in boxes]
    return {"ground": float(np.median(grounds)), "fill": float(np.median(extents)) / tones.shape[-1]}
