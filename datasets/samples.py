"""Paired samples of one split in memory, and the batches that training and evaluation cut from them.

Training samples carry no labels: `load_training_samples` drops the label column, `load_test_samples` alone returns it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets import transforms
from datasets.arrays import MAX_POINTS, load_images, load_points
from datasets.lists import SampleList, check_disjoint, check_paired, default_list_path
from datasets.lists import read_labelled_list, read_training_list
from utils.features import extract_embeddings
from utils.modalities import MODALITIES
from utils.options import DataConfig


@dataclass(frozen=True)
class PairedSamples:
    """All modalities of one split; row i of every array is one object.

    Attributes:
        lists: modality -> list file it came from.
        arrays: modality -> (N, 3, S, S) uint8 images or (N, P, 3) float32 points.
    """

    lists: dict[str, SampleList]
    arrays: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


def load_training_samples(data: DataConfig, device: torch.device) -> PairedSamples:
    """Read the training lists of `data.modalities` and their files, without labels.

    Raises:
        FileNotFoundError, ValueError: on missing or broken lists and files, or rows that are not the same object.
    """
    lists = {
        name: read_training_list(
            list_path(data, name, "train"), modality=name, root=data.root, instance_id=data.instance_id,
            num_classes=data.num_classes,
        )
        for name in data.modalities
    }
    return _load(lists, data, device)


def load_test_samples(
    data: DataConfig, device: torch.device, train: PairedSamples | None = None
) -> tuple[PairedSamples, Tensor]:
    """Read the test lists and their labels; for evaluation alone.

    Args:
        data: as for training.
        device: where the arrays go.
        train: if given, the training samples, which must not share a file with the test set.
    Returns:
        The samples and their (N,) int64 labels on the CPU.
    Raises:
        FileNotFoundError, ValueError: as `load_training_samples`, and if labels are missing, out of range, differ between
            the modalities of one object, or a file is in both splits.
    """
    lists, labels = {}, {}
    for name in data.modalities:
        lists[name], labels[name] = read_labelled_list(
            list_path(data, name, "test"), modality=name, root=data.root, instance_id=data.instance_id,
            num_classes=data.num_classes,
        )
        if train is not None:
            check_disjoint(train.lists[name], lists[name])
    samples = _load(lists, data, device)
    first, *others = data.modalities
    for name in others:
        differing = (labels[first] != labels[name]).nonzero()[0]
        if len(differing):
            raise ValueError(
                f"{lists[name].path}, row {differing[0] + 1}: label {labels[name][differing[0]]}, but {lists[first].path} "
                f"gives the same object label {labels[first][differing[0]]}"
            )
    return samples, torch.as_tensor(labels[first])


def training_views(samples: PairedSamples, index: Tensor, data: DataConfig, generator: torch.Generator) -> list[Tensor]:
    """Return one randomly transformed view per modality of the given samples.

    Args:
        samples: the training set; index: (B,) int64 on its device.
        data: sizes and augmentation ranges.
        generator: on the same device; the only source of randomness.
    Returns:
        One float32 tensor per modality, (B, 3, H, W) or (B, P, 3), in the order of `samples.arrays`.
    """
    views = []
    for name, array in samples.arrays.items():
        rows = array[index]
        if MODALITIES[name].kind == "image":
            views.append(transforms.augment_images(rows, data.image_size, data.image_resize, data.augment, generator))
        else:
            views.append(transforms.augment_points(rows, data.num_points, data.augment, generator))
    return views


def evaluation_views(samples: PairedSamples, index: Tensor, data: DataConfig) -> list[Tensor]:
    """Return the deterministic view of every modality; arguments and shapes as in `training_views`."""
    views = []
    for name, array in samples.arrays.items():
        if MODALITIES[name].kind == "image":
            views.append(transforms.prepare_images(array[index], data.image_size, data.image_resize))
        else:
            views.append(transforms.prepare_points(array[index], data.num_points))
    return views


def embed_samples(encoders: nn.ModuleDict, samples: PairedSamples, data: DataConfig) -> dict[str, Tensor]:
    """Return modality -> (N, D) unit-norm embeddings of all samples, in eval mode and without augmentation."""
    device = next(iter(samples.arrays.values())).device
    return extract_embeddings(encoders, lambda index: evaluation_views(samples, index, data), len(samples), device)


def list_path(data: DataConfig, modality: str, split: str) -> Path:
    """Return the list file of a modality: the configured one, else the prepared name under `data.root`."""
    given = data.train_lists if split == "train" else data.test_lists
    return Path(given[modality]) if modality in given else default_list_path(data.root, data.dataset, modality, split)


def _load(lists: dict[str, SampleList], data: DataConfig, device: torch.device) -> PairedSamples:
    check_paired(list(lists.values()))
    arrays = {}
    for name, rows in lists.items():
        if MODALITIES[name].kind == "image":
            arrays[name] = torch.from_numpy(load_images(rows, data.image_resize)).to(device)
        else:
            arrays[name] = torch.from_numpy(load_points(rows, max(MAX_POINTS, data.num_points))).to(device)
            if arrays[name].shape[1] < data.num_points:
                raise ValueError(
                    f"{rows.path}: clouds hold {arrays[name].shape[1]} points, fewer than data.num_points = "
                    f"{data.num_points}; prepare more points or lower data.num_points"
                )
    return PairedSamples(lists, arrays)
