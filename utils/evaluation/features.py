"""Embeddings and posteriors of a whole set, in sample order, for clustering, export, evaluation and figures."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.engine import distributed

EXTRACTION_BATCH = 256
REPRESENTATIONS = ("embedding", "posterior", "joint")


@dataclass(frozen=True)
class Features:
    """What a trained encoder and its classifier say of N samples of one modality.

    Attributes:
        embeddings: (N, D) float32, unit rows.
        posteriors: (N, K) float32, rows of sum 1: the classifier's probabilities of the K clusters.
    """

    embeddings: Tensor
    posteriors: Tensor

    def represent(self, representation: str) -> Tensor:
        """Return rows to be compared by dot products: one of REPRESENTATIONS.

        Those of embeddings are cosines; those of posteriors the probability that two samples are of one cluster; "joint" is the
        mean of both.
        """
        parts = {"embedding": [self.embeddings], "posterior": [self.posteriors], "joint": [self.embeddings, self.posteriors]}
        rows = parts[representation]
        return torch.cat(rows, dim=1) / len(rows) ** 0.5


@torch.no_grad()
def extract_features(
    encoder: nn.Module, classifier: nn.Module, views: Callable[[Tensor], list[Tensor]], count: int, device: torch.device
) -> Features:
    """Run one encoder and its classifier in eval mode over samples 0..count-1, shared among the processes.

    Args:
        encoder, classifier: of one modality, see `models.heads`; their training mode is restored afterwards.
        views: maps an index tensor (B,) on the device to the encoder's inputs, one per view of the samples.
        count: N, number of samples.
        device: where the indices live.
    Returns:
        The direction of the mean embedding and the mean posterior over the views; row i belongs to sample i.
    """
    embeddings, posteriors = [], []
    with evaluation_mode(encoder, classifier):
        for index in torch.arange(count, device=device)[distributed.own_share(count)].split(EXTRACTION_BATCH):
            rows = torch.stack([encoder(view).float() for view in views(index)])  # (V, B, D)
            posteriors.append(F.softmax(classifier.classify(rows.flatten(0, 1)), dim=1).unflatten(0, rows.shape[:2]).mean(dim=0))
            directions = F.normalize(rows, dim=2)
            embeddings.append(directions[0] if len(rows) == 1 else F.normalize(directions.mean(dim=0), dim=1))
    gather = lambda parts: distributed.gather_shares(torch.cat(parts), count)
    return Features(gather(embeddings), gather(posteriors))


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Switch modules to eval mode inside the block and back to what they were."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.train, module.training)
            module.eval()
        yield
