"""Samples of one split in memory, and the batches that training and evaluation cut from them.

Training samples carry no labels: `load_training_samples` drops the label column, `load_test_samples` alone returns it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.kinds import KINDS
from datasets.lists import SampleList, check_disjoint, check_paired, default_list_path, read_labelled_list, read_training_list
from datasets.stored import digest_of, stored_array
from utils.errors import MissingLabelsError, UserError
from utils.evaluation.features import Features, extract_features
from utils.settings.options import DataConfig

DEVICE_SHARE = 0.5  # of the device's free memory that samples may take with data.placement: auto

# What may occur once only in a list: class pairs may show one picture twice; unpaired files need no ids.
UNIQUE = {
    "train": {"instance": ("path", "instance id"), "class": (), "none": ("path",)},
    "test": {"instance": ("path", "instance id"), "class": ("path",), "none": ("path",)},
}


@dataclass(frozen=True)
class PairedSamples:
    """All modalities of one split. With `data.pairing: instance`, row i of every array is one object.

    Attributes:
        lists: modality -> list file it came from.
        arrays: modality -> (N, V, 3, S, S) uint8 pictures, V views each, (N, 1, P, 3) float32 points, or (N, 1, F, 18)
            float32 faces, or (N, V, d) float32 features. N may differ between modalities where rows are not pairs.
            On the CPU they are mapped from files that processes share, see `datasets.stored`: read-only.
        fingerprints: modality -> sha256 of its array, where it is stored with it.
    """

    lists: dict[str, SampleList]
    arrays: dict[str, Tensor]
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of every modality."""
        return {name: len(array) for name, array in self.arrays.items()}

    @property
    def contents(self) -> dict[str, dict[str, Any]]:
        """Modality -> shape of its array, and sha256 of its rows' names and of itself, where that is known.

        Where shape and rows are equal, another array means other samples under the same names.
        """
        rows = lambda name: digest_of([self.lists[name].names, self.lists[name].instance_ids])
        return {
            name: {"shape": list(self.arrays[name].shape), "rows": rows(name), "array": found} for name, found in self.fingerprints.items()
        }


def load_training_samples(data: DataConfig, device: torch.device) -> PairedSamples:
    """Read the training lists of `data.modalities` and their files, without labels.

    Raises:
        UserError: on missing or broken lists and files, or rows that are not paired as `data.pairing` says.
    """
    lists = {name: read_training_list(**list_options(data, name, "train")) for name in data.modalities}
    if data.pairing != "none":
        check_paired(list(lists.values()), by_object=data.pairing == "instance")
    return PairedSamples(lists, *_load(lists, data, device))


def load_test_samples(
    data: DataConfig, device: torch.device, train: PairedSamples | None = None
) -> tuple[PairedSamples, dict[str, Tensor]]:
    """Read the test lists and their labels; for evaluation alone.

    Args:
        device: where training runs; the arrays go there unless `data.placement` says otherwise.
        train: if given, the training samples, which must not share a file with the test set.
    Returns:
        The samples, and modality -> (N,) int64 labels on the CPU.
    Raises:
        MissingLabelsError: if there is no test list at the default place, or a list has no labels.
        UserError: as `load_training_samples`, and if labels are out of range, differ between the modalities of one
            object, or a file is in both splits.
    """
    lists, labels = {}, {}
    for name in data.modalities:
        path = list_path(data, name, "test")
        if name not in data.test_lists and not path.is_file():
            raise MissingLabelsError(f"test list {path} not found; evaluation needs it, see docs/data.md (data.root, data.test_lists)")
        lists[name], labels[name] = read_labelled_list(**list_options(data, name, "test"))
        if train is not None:
            check_disjoint(train.lists[name], lists[name])
    if data.pairing == "instance":
        check_paired(list(lists.values()))
        _check_same_labels(lists, labels)
    samples = PairedSamples(lists, *_load(lists, data, device))
    return samples, {name: torch.as_tensor(values) for name, values in labels.items()}


def _check_same_labels(lists: dict[str, SampleList], labels: dict) -> None:
    first, *others = lists
    for name in others:
        differing = (labels[first] != labels[name]).nonzero()[0]
        if len(differing):
            raise UserError(
                f"{lists[name].path}, row {differing[0] + 1}: label {labels[name][differing[0]]}, but {lists[first].path} "
                f"gives the same object label {labels[first][differing[0]]}"
            )


def describe_samples(
    encoders: Mapping[str, nn.Module], classifiers: Mapping[str, nn.Module], samples: PairedSamples, data: DataConfig,
    device: torch.device,
) -> dict[str, Features]:
    """Return modality -> Features of all samples, in eval mode and without augmentation, on the device.

    Of pictures, the first view is seen, or with `data.eval_view: mean` the mean over the views; of clouds, the first
    `data.num_points` points, or the mean over `data.eval_subsets` disjoint subsets.

    Raises:
        UserError: if some are not of unit norm: too large numbers inside the encoder, as a diverged training leaves.
    """
    features = {}
    for name, encoder in encoders.items():
        array, kind = samples.arrays[name], KINDS[data.kind_of(name)]
        inputs = lambda index: kind.prepare(array[index].to(device), data)  # noqa: B023
        features[name] = extract_features(encoder, classifiers[name], inputs, len(array), array.device)
        norms = torch.linalg.vector_norm(features[name].embeddings, dim=1)
        wrong = int((~(norms > 0.5)).sum())  # NaN is no number above 0.5 either
        if wrong:
            raise UserError(
                f"{wrong} of {len(array)} embeddings of {name} are not finite unit vectors: training diverged; lower "
                "optim.learning_rate or check the data"
            )
    return features


def list_path(data: DataConfig, modality: str, split: str) -> Path:
    """Return the list file of a modality: the configured one, else the prepared name under `data.root`."""
    given = data.train_lists if split == "train" else data.test_lists
    return Path(given[modality]) if modality in given else default_list_path(data.root, data.dataset, modality, split)


def list_options(data: DataConfig, modality: str, split: str) -> dict[str, Any]:
    """Return the arguments of `read_training_list` and `read_labelled_list` for the list file of a modality."""
    return {
        "path": list_path(data, modality, split), "modality": modality, "root": data.root, "instance_id": data.instance_id,
        "num_classes": data.num_classes, "unique": UNIQUE[split][data.pairing],
    }


def _load(lists: dict[str, SampleList], data: DataConfig, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the arrays, on the device if they are to lie there, and what is known of their sha256."""
    found = {name: stored_array(rows, KINDS[data.kind_of(name)], data) for name, rows in lists.items()}
    arrays = {name: array for name, (array, _) in found.items()}
    fingerprints = {name: digest for name, (_, digest) in found.items() if digest}
    needed = sum(array.nbytes for array in arrays.values())
    on_host = device.type == "cpu" or data.placement == "host"
    if on_host or (data.placement == "auto" and needed > torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE):
        return arrays, fingerprints
    return {name: array.to(device) for name, array in arrays.items()}, fingerprints
