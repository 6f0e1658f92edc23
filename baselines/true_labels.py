"""The door through which `baselines` reads the ground truth of lists, and how encoders are trained with it.

Whoever comes through says so: in the row, the record or the file that it writes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from datasets.lists import read_labelled_list
from datasets.samples import PairedSamples, describe_samples, list_options
from utils.engine.device import select_device, set_threads
from utils.engine.learner import StageLearner
from utils.engine.seed import set_deterministic
from utils.settings.data_options import DataConfig


def true_labels(data: DataConfig, samples: PairedSamples, split: str = "train") -> dict[str, Tensor]:
    """Return modality -> (N,) int64 ground truth on the CPU, of the lists that samples were loaded from; without labels, a UserError."""
    read = {name: read_labelled_list(**list_options(data, name, split))[1] for name in samples.lists}
    return {name: torch.as_tensor(values) for name, values in read.items()}


def count_classes(data: DataConfig, labels: Mapping[str, Tensor]) -> int:
    """Return the number of classes that the settings give, else the one that labels show."""
    return data.num_classes or 1 + max(int(values.max()) for values in labels.values())


def prepare_device(run: Any) -> torch.device:
    """Return the device that a section `run` of settings names, with threads and determinism set as it says."""
    set_threads(run.threads)
    set_deterministic(run.deterministic)
    return select_device(run.device)


def learn(
    learner: StageLearner, test: PairedSamples, truth: Mapping[str, Tensor], name: str
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, float]]:
    """Train a learner of true labels to its last epoch, then score the test set, which selects nothing; `name` begins every line.

    Returns:
        The losses of that epoch; of the test samples modality -> embeddings (N, D), and modality -> share of right classes.
    """
    config = learner.config
    for epoch in range(1, config.optim.epochs + 1):
        losses = learner.train_epoch(epoch)
        print(f"{name}, epoch {epoch}/{config.optim.epochs}: loss {next(iter(losses.values())):.4f}", flush=True)
    features = describe_samples(learner.encoders, learner.classifiers, test, config.data, learner.device)
    right = {name: float((found.posteriors.argmax(dim=1).cpu() == truth[name]).float().mean()) for name, found in features.items()}
    return losses, {name: found.embeddings for name, found in features.items()}, right
