"""What a method of the comparison is: two base classes, what they may read before training, and how a deep one is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

Limits = Mapping[str, Mapping[str, Any]]  # option -> min, max (inclusive), above, below, and doc, as of `data_options.option`
COUNT, POSITIVE, NOT_NEGATIVE, SHARE = {"min": 1}, {"above": 0}, {"min": 0}, {"min": 0, "max": 1}


@dataclass(frozen=True)
class Training:
    """Optimisation of a deep method for training on features, as its paper or release has it, but for what its docstring calls ours.

    Attributes:
        dim: L, width of the common space; clip: largest norm of the gradient, None for any; the rest as in `OptimConfig`.
    """

    dim: int = 256
    batch_size: int = 256
    epochs: int = 70
    optimizer: Literal["adam", "sgd"] = "adam"  # sgd: momentum 0.9
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    nesterov: bool = False
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None


@dataclass(frozen=True)
class Context:
    """All that a method may read before training.

    Attributes:
        modalities: 2D ones first; two of them but for MCCA.
        features: modality -> (N, d) float32 frozen features of the training pairs on `device`, row i is one object. Trained on
            features: the inputs themselves. End to end: the shared features if they are given, else what the initial encoders say.
        dim: L; batch_size, epochs: of this run; seed: of this run, for `utils.engine.seed.generator_for`.
        num_clusters: K of pseudo-labels, or the number of classes where labels are read.
        labels: (N,) int64 on `device`; None unless the table `baselines.METHODS` says that the method reads labels.
        settings: the method's own options, its `defaults` with what the user has set.
    """

    modalities: tuple[str, ...]
    features: Mapping[str, Tensor]
    dim: int
    batch_size: int
    epochs: int
    seed: int
    device: torch.device
    num_clusters: int
    labels: Tensor | None
    settings: Mapping[str, Any]


class Method(nn.Module):
    """A deep method: a loss on embeddings, with whatever parameters and buffers it has of its own.

    The learner owns the encoders (`Context.dim` wide, linear output with BatchNorm, no activation), batches and optimiser; it trains
    the method's parameters with the encoders', and keeps its buffers in the checkpoint. Random draws come from a generator made
    from `context.seed` and the epoch, or from torch's global one, which is seeded per epoch: a resumed run then repeats them.

    Attributes:
        logged: name -> number (a scalar tensor) that `forward` puts there to be watched; its mean over an epoch goes to metrics.jsonl
            as "method/NAME".
        defaults: option -> default of `method.options`, whose type it has; limits: of those that are numbers, default NOT_NEGATIVE.
    """

    training_defaults: ClassVar[Training] = Training()
    defaults: ClassVar[Mapping[str, Any]] = {}
    limits: ClassVar[Limits] = {}

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.logged: dict[str, Tensor] = {}

    def start_epoch(self, epoch: int, embeddings: Callable[[], dict[str, Tensor]]) -> None:
        """Prepare an epoch (1-based); `embeddings` gives modality -> (N, L) of all training samples, in eval mode, without gradient."""

    def forward(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> Tensor:
        """Return the scalar loss of a batch: sample numbers (B,), modality -> (B, L) embeddings with gradient, the epoch (1-based)."""
        raise NotImplementedError

    def after_step(self, index: Tensor, embeddings: Mapping[str, Tensor], epoch: int) -> None:
        """Update memories and the like after the optimiser's step; the embeddings are those of `forward`, detached."""

    def finish(self, embeddings: Callable[[], dict[str, Tensor]]) -> None:
        """Close training after the last epoch, e.g. fit a linear map into buffers that `__init__` has made."""

    def represent(self, name: str, embeddings: Tensor) -> Tensor:
        """Map embeddings (n, L) of a modality to the continuous code that is ranked by cosine; a hash code is its sign."""
        return embeddings


class ShallowMethod:
    """A method with a closed form on features: fitted once, without epochs."""

    dim: ClassVar[int] = 128  # default of the width of the common space
    defaults: ClassVar[Mapping[str, Any]] = {}
    limits: ClassVar[Limits] = {}

    def fit(self, features: Mapping[str, np.ndarray], context: Context) -> None:
        """Fit on modality -> (N, d) float64 training features, row i is one object."""
        raise NotImplementedError

    def transform(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Map features (n, d) of a modality to the common space, (n, L), to be ranked by cosine."""
        raise NotImplementedError
