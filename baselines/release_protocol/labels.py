"""The training set's ground truth, and the pseudo-labels that the authors' code copies from it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from datasets.lists import read_labelled_list
from datasets.samples import UNIQUE, PairedSamples, list_path
from utils.errors import UserError
from utils.settings.options import DataConfig

CHUNK = 1024  # rows of the similarity matrix held at once


def training_labels(data: DataConfig, samples: PairedSamples) -> dict[str, Tensor]:
    """Read the label column of the lists that the samples were loaded from; a list without labels is a UserError.

    Returns:
        modality -> (N,) int64 on the CPU, row i belongs to row i of the samples.
    """
    labels = {}
    for name in samples.lists:
        _, values = read_labelled_list(
            list_path(data, name, "train"), modality=name, root=data.root, instance_id=data.instance_id,
            num_classes=data.num_classes, unique=UNIQUE["train"][data.pairing],
        )
        labels[name] = torch.as_tensor(values)
    return labels


def farthest_labels(embeddings: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pseudo-labels of the authors' export: ground truth, looked up at the farthest cross-modal sample.

    For sample i the row r of smallest cosine similarity in the other modality is found; its pseudo-label is entry r of the
    label column of the sample's *own* modality. With rows paired by object this is the label of the farthest object. Of
    several other modalities the last one counts, as in the authors' loop.

    Args:
        embeddings: modality -> (N, D) unit-norm rows, on any device.
        labels: modality -> (N,) int64 ground truth on the CPU.
    Returns:
        modality -> (N,) int64 on the CPU.
    Raises:
        UserError: if the modalities differ in their numbers of samples.
    """
    counts = {name: len(rows) for name, rows in embeddings.items()}
    if len(set(counts.values())) != 1:
        raise UserError(f"labels are looked up by row, so all modalities need as many samples, found {counts}")
    chosen = {}
    for name, rows in embeddings.items():
        other = embeddings[[key for key in embeddings if key != name][-1]]
        farthest = torch.cat([(part @ other.T).argmin(dim=1) for part in rows.split(CHUNK)])  # (N,)
        chosen[name] = labels[name][farthest.cpu()]
    return chosen
