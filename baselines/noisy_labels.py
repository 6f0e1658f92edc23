"""The door through which training labels reach the supervised relatives and the rows with true source labels; no other way in.

Only `baselines.run` may import this module (pyproject.toml, tests/stages/test_leakage.py).
"""

import numpy as np
import torch
from torch import Tensor

from baselines.true_labels import true_labels
from datasets.samples import PairedSamples
from utils.engine.seed import derive_seed
from utils.errors import UserError
from utils.settings.data_options import DataConfig


def noisy_labels(data: DataConfig, samples: PairedSamples, rate: float, kind: str, seed: int) -> Tensor:
    """Return one label per training pair, (N,) int64 on the CPU, of which `corrupt` has made a share wrong.

    Raises:
        UserError: if rows are not pairs, or a modality's labels differ from another's.
    """
    if data.pairing != "instance":
        raise UserError(f"one label per pair needs data.pairing: instance, found {data.pairing}")
    first, *others = true_labels(data, samples).values()
    if any((labels != first).any() for labels in others):
        raise UserError(f"the training lists of {', '.join(samples.lists)} give an object different labels")
    return torch.as_tensor(corrupt(first.numpy(), rate, kind, seed))


def corrupt(labels: np.ndarray, rate: float, kind: str, seed: int) -> np.ndarray:
    """Replace round(rate * N) labels, drawn without replacement, by wrong ones.

    Symmetric: any other class, each as likely as another. Asymmetric: the next class, the last one's is the first. Which pairs
    are hit depends on the seed alone, and those of a lower rate are hit at a higher one too.

    Args:
        labels: (N,) integers of the classes 0..C-1; rate: in [0, 1); kind: "symmetric" or "asymmetric".
    Returns:
        (N,) int64.
    """
    rng, classes = np.random.default_rng(derive_seed(seed, "noisy labels", kind)), int(labels.max()) + 1
    order, shifts = rng.permutation(len(labels)), rng.integers(1, max(classes, 2), size=len(labels))
    hit = order[: round(rate * len(labels))]
    noisy = labels.astype(np.int64)
    noisy[hit] = (noisy[hit] + (shifts[hit] if kind == "symmetric" else 1)) % classes
    return noisy
