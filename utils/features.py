"""Embeddings of a whole set, in sample order, for clustering, export, evaluation and figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXTRACTION_BATCH = 256


@torch.no_grad()
def extract_embeddings(
    encoders: nn.ModuleDict, views: Callable[[Tensor], list[Tensor]], count: int, device: torch.device
) -> dict[str, Tensor]:
    """Run every encoder in eval mode over samples 0..count-1.

    Args:
        encoders: modality -> encoder; their training mode is restored afterwards.
        views: maps an index tensor (B,) on the device to one input per modality, in the order of `encoders`.
        count: N, number of samples.
        device: where the indices live.
    Returns:
        modality -> (N, D) float32 embeddings with unit-norm rows; row i belongs to sample i.
    """
    rows = {name: [] for name in encoders}
    with evaluation_mode(encoders):
        for index in torch.arange(count, device=device).split(EXTRACTION_BATCH):
            for (name, encoder), view in zip(encoders.items(), views(index)):
                rows[name].append(F.normalize(encoder(view).float(), dim=1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode inside the block and back to what it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
