"""What the departures make of the training set's ground truth: copied pseudo-labels, and rows paired as in the published lists."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from datasets.lists import read_labelled_list
from datasets.samples import PairedSamples, list_options
from utils.engine.seed import derive_seed
from utils.errors import UserError
from utils.modalities import MODALITIES
from utils.settings.options import DataConfig

CHUNK = 1024  # rows of the similarity matrix held at once
SAME_INSTANCE = 302 / 5000  # shares of the published training lists, image against point cloud
OTHER_CLASS = 182 / 5000


def training_labels(data: DataConfig, samples: PairedSamples) -> dict[str, Tensor]:
    """Return modality -> (N,) int64 ground truth on the CPU, of the lists that samples were loaded from; without labels, a UserError."""
    labels = {}
    for name in samples.lists:
        _, values = read_labelled_list(**list_options(data, name, "train"))
        labels[name] = torch.as_tensor(values)
    return labels


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
    across = _take_turns(shuffled, labels, crossing)
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


def _take_turns(shuffled: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of the rows, taken from the classes in turn, in shuffled order within each."""
    mine = labels[shuffled]
    turn = np.array([(mine[:place] == value).sum() for place, value in enumerate(mine)])
    return shuffled[np.argsort(turn, kind="stable")[:count]]
