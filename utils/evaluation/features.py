"""Embeddings of a whole set, in sample order, for clustering, export, evaluation and figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.engine import distributed

EXTRACTION_BATCH = 256


@torch.no_grad()
def extract_embeddings(
    encoder: nn.Module, views: Callable[[Tensor], list[Tensor]], count: int, device: torch.device
) -> Tensor:
    """Run one encoder in eval mode over samples 0..count-1, shared among the processes.

    Args:
        encoder: its training mode is restored afterwards.
        views: maps an index tensor (B,) on the device to the encoder's inputs, one per view of the samples.
        count: N, number of samples.
        device: where the indices live.
    Returns:
        (N, D) float32 embeddings with unit-norm rows, the direction of the mean over the views; row i belongs to sample i.
    """
    rows = []
    with evaluation_mode(encoder):
        for index in torch.arange(count, device=device)[distributed.own_share(count)].split(EXTRACTION_BATCH):
            directions = [F.normalize(encoder(view).float(), dim=1) for view in views(index)]
            rows.append(directions[0] if len(directions) == 1 else F.normalize(torch.stack(directions).mean(dim=0), dim=1))
    return distributed.gather_shares(torch.cat(rows), count)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode inside the block and back to what it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
