"""Diffusion over the gallery's neighbour graph: a ranking that follows the gallery's manifold instead of straight lines.

Zhou et al. 2004; Donoser and Bischof 2013; Iscen et al. 2017. It reads embeddings alone, no label, and is transductive over the
gallery: the graph needs all items of the gallery at hand. A query's list never depends on other queries.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

NEIGHBOURS = 20
ALPHA = 0.98
STEPS = 20
BLOCK_BYTES = 64 * 2**20  # of one block of similarities
UNREACHED = 1e-6  # scale of the similarities that order what diffusion gives no or the same score


class DiffusionRanking:
    """f <- alpha f S + (1 - alpha) f_0, STEPS times, from f = f_0.

    The edge weight of two items is the cube of their similarity (0 for negative ones) where one is among the other's NEIGHBOURS
    nearest; S = D^-1/2 W D^-1/2. f_0 holds the same weights between a query and its NEIGHBOURS nearest gallery items, scaled to
    unit norm, so that no score exceeds 1 by more than UNREACHED.

    Args:
        gallery: (G, D) float rows, compared by dot products: of unit norm for cosines, or posteriors. Their order decides between
            neighbours that are equally near.
        neighbours: `nearest` of the gallery in itself with k = NEIGHBOURS, where it is known already.
    """

    def __init__(self, gallery: Tensor, neighbours: tuple[Tensor, Tensor] | None = None) -> None:
        self.gallery = gallery
        graph = _edges(*(neighbours or nearest(gallery, gallery, NEIGHBOURS, own=torch.arange(len(gallery)))), len(gallery))
        graph = graph.maximum(graph.T)
        degrees = graph.sum(axis=1)
        scale = sparse.diags_array(np.divide(1, np.sqrt(degrees), where=degrees > 0, out=np.zeros_like(degrees)))
        self.graph = (scale @ graph @ scale).tocsr()  # (G, G), symmetric

    def scores(self, queries: Tensor, own: Tensor | None = None) -> Tensor:
        """Return the scores (B, G) float64 of queries (B, D); `own` as in `nearest`: that item is left out of the query's f_0.

        What the diffusion does not reach comes after what it does, in the order of the similarity.
        """
        found = nearest(queries, self.gallery, NEIGHBOURS, own)
        first = _edges(*found, len(self.gallery)).T.toarray()  # (G, B)
        first /= np.linalg.norm(first, axis=0).clip(min=1e-300)
        spread = first
        for _ in range(STEPS):
            spread = ALPHA * (self.graph @ spread) + (1 - ALPHA) * first
        scores = torch.from_numpy(np.ascontiguousarray(spread.T))
        return scores.add_((queries.double() @ self.gallery.double().T).cpu(), alpha=UNREACHED).to(queries.device)


def nearest(queries: Tensor, gallery: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the numbers (B, k) of the nearest gallery items of every query and their similarities, nearest first, on the CPU.

    Args:
        queries: (B, D) and gallery: (G, D) float, compared by dot products, in blocks of bounded memory.
        count: k, fewer if the gallery has fewer.
        own: if given, query i is gallery item own[i] and is not its own neighbour.
    """
    count = min(count, len(gallery) - (own is not None))
    columns, similarities, rows = [], [], max(1, BLOCK_BYTES // (8 * len(gallery)))
    for start, block in zip(range(0, len(queries), rows), queries.split(rows)):
        similarity = block @ gallery.T
        if own is not None:
            similarity.scatter_(1, own[start : start + rows, None].to(block.device), -torch.inf)
        values, index = similarity.topk(count, dim=1)
        columns.append(index.cpu())
        similarities.append(values.cpu())
    return torch.cat(columns), torch.cat(similarities)


def _edges(columns: Tensor, similarities: Tensor, width: int) -> sparse.csr_array:
    """Return the matrix (B, width) of edge weights."""
    weights = similarities.clamp(min=0).double().pow(3).numpy()
    rows = np.repeat(np.arange(len(columns)), columns.shape[1])
    return sparse.csr_array((weights.ravel(), (rows, columns.numpy().ravel())), shape=(len(columns), width))
