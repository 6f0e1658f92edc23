"""Retrieval metrics over a full gallery ranked by cosine similarity; one ranking pass serves all of them."""

import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from utils.engine.seed import generator_for
from utils.evaluation.ranking import DiffusionRanking

Array = Tensor | np.ndarray
SCORE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}  # upper bound of one float64 score matrix; a CPU's should stay in its caches
RANKINGS = ("plain", "diffusion")
RECALL_RANKS = (1, 5, 10)
LONGEST_ROW = 1.5  # with which two rows have a dot product that fits into a ranking key
SCORE_STEPS = 1e12  # per unit of cosine: equal ones that differ by summation order alone (1e-16) must tie


def _tensor(values: Array) -> Tensor:
    """Torch refuses NumPy's reversed views and warns of read-only arrays, hence the copy."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _embeddings(name: str, values: Array, similarity: str = "cosine") -> Tensor:
    values = _tensor(values).detach()
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be a non-empty (rows, D) array, got shape {tuple(values.shape)}")
    bad = (~torch.isfinite(values).all(dim=1)).nonzero()
    if len(bad):
        raise ValueError(f"{name} has {len(bad)} rows with NaN or infinity, first at row {int(bad[0])}")
    values = values.to(torch.float64)
    if similarity == "dot":
        if float(values.norm(dim=1).max()) > LONGEST_ROW:
            raise ValueError(f"{name} must have rows of norm at most {LONGEST_ROW:g} to be compared by dot products")
        return values
    values = values / values.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)  # squares of 1e-170 or 1e160 are no numbers
    return torch.nn.functional.normalize(values, dim=1, eps=1e-300)  # a zero row stays zero: cosine 0 to everything


def _labels(name: str, values: Array, rows: int | None = None) -> Tensor:
    values = _tensor(values)
    if values.ndim != 1 or (rows is not None and len(values) != rows):
        raise ValueError(f"{name} must have shape ({'rows' if rows is None else rows},), got {tuple(values.shape)}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {values.dtype}")
    return values.to(torch.int64)


def _prepare(
    query: Array, query_labels: Array, gallery: Array, gallery_labels: Array, similarity: str = "cosine"
) -> tuple[Tensor, ...]:
    query, gallery = _embeddings("query", query, similarity), _embeddings("gallery", gallery, similarity)
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"query and gallery must have one width D, got {query.shape[1]} and {gallery.shape[1]}")
    if query.device != gallery.device:
        raise ValueError(f"query and gallery must be on one device, got {query.device} and {gallery.device}")
    query_labels = _labels("query_labels", query_labels, len(query)).to(query.device)
    gallery_labels = _labels("gallery_labels", gallery_labels, len(gallery)).to(query.device)
    return query, query_labels, gallery, gallery_labels


def _ranked_relevance(
    query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, seed: int, exclude_self: bool = False,
    ranking: str = "plain",
) -> Iterator[Tensor]:
    """Yield (B, G) bool chunks in query order: entry [i, k] tells whether rank k + 1 has the class of query i.

    One sort of integers ranks a chunk: the score in the upper bits, below it the place of the item in a gallery shuffled by
    the seed, so that equal scores come in an order that owes nothing to the order of the files, and in the last bit the
    relevance. With `exclude_self`, query i is gallery item i and is left out of its own ranking: (B, G - 1).
    """
    rows = max(1, SCORE_BYTES.get(query.device.type, SCORE_BYTES["cpu"]) // (8 * len(gallery)))
    order = torch.randperm(len(gallery), generator=generator_for(seed, "gallery order")).to(query.device)
    gallery, gallery_labels, own = gallery[order], gallery_labels[order], order.argsort()
    graph = DiffusionRanking(gallery) if ranking == "diffusion" else None
    columns = gallery.T.contiguous()
    place_bits = max(1, (len(order) - 1).bit_length())
    scale = min(SCORE_STEPS, 2.0 ** (59 - place_bits))  # a score of LONGEST_ROW squared and the bits below it fit into 63
    places = torch.arange(len(order), device=query.device) << 1
    for start, chunk, chunk_labels in zip(range(0, len(query), rows), query.split(rows), query_labels.split(rows), strict=True):
        itself = own[start : start + len(chunk)] if exclude_self else None
        scores = chunk @ columns if graph is None else graph.scores(chunk, itself)
        keys = scores.mul_(-scale).round_().long()  # (B, G), best first
        keys = (keys << (place_bits + 1)).bitwise_or_(places).bitwise_or_(gallery_labels == chunk_labels.unsqueeze(1))
        if exclude_self:
            keys.scatter_(1, itself.unsqueeze(1), torch.iinfo(torch.int64).max)
        relevant = (_sorted_rows(keys) & 1).bool()
        yield relevant[:, :-1] if exclude_self else relevant


def _sorted_rows(keys: Tensor) -> Tensor:
    """Sort every row of integers; NumPy's sort uses the CPU's vector units, torch's does not."""
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values


def _average_precision(relevant: Tensor) -> Tensor:
    """(B, G) bool -> (B,) float64; 0 where nothing is relevant."""
    hits = relevant.cumsum(dim=1, dtype=torch.float64)  # (B, G) whole numbers, hence exact
    count = hits[:, -1].clamp(min=1)
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device, dtype=torch.float64)
    return hits.div_(ranks).mul_(relevant).sum(dim=1) / count


def _recall(k: int) -> Callable[[Tensor], Tensor]:
    return lambda relevant: relevant[:, :k].any(dim=1).to(torch.float64)


def _ndcg(relevant: Tensor) -> Tensor:
    gains = 1 / torch.log2(torch.arange(2, relevant.shape[1] + 2, dtype=torch.float64))
    best = torch.cat([gains.new_zeros(1), gains.cumsum(0)])  # by number of relevant items; CUDA's cumsum is not repeatable
    ideal = best.to(relevant.device)[relevant.sum(dim=1)]  # (B,)
    return relevant.to(torch.float64) @ gains.to(relevant.device) / ideal.clamp(min=best[1])


def _evaluate(
    inputs: tuple[Tensor, ...], scores: Mapping[str, Callable[[Tensor], Tensor]], seed: int, exclude_self: bool = False,
    ranking: str = "plain",
) -> dict[str, float]:
    """Mean over queries of every per-query score, from one pass over the ranking."""
    # Results have their place beforehand: kept beside a chunk's matrices, they would hinder glibc from reusing that memory
    values = {name: inputs[0].new_empty(len(inputs[0])) for name in scores}
    start = orphans = 0
    for relevant in _ranked_relevance(*inputs, seed, exclude_self, ranking):
        orphans += int((~relevant.any(dim=1)).sum())
        for name, score in scores.items():
            values[name][start : start + len(relevant)] = score(relevant)
        start += len(relevant)
    if orphans:
        warnings.warn(f"{orphans} of {len(inputs[0])} queries have no relevant gallery item and score 0", stacklevel=3)
    return {name: float(found.mean()) for name, found in values.items()}


def mean_average_precision(query: Array, query_labels: Array, gallery: Array, gallery_labels: Array, *, seed: int = 0) -> float:
    """mAP@All: mean over queries of the average precision over the whole gallery, ranked by cosine similarity.

    A query without any relevant gallery item scores 0 and is counted in a warning. Ties are broken by a shuffle of
    the gallery with `seed`. Memory is bounded: queries go in chunks of at most `SCORE_BYTES`. Runs on the device
    of the inputs, in float64.

    Args:
        query: (Q, D) embeddings; need not have unit norm; a zero row has cosine 0 to everything.
        query_labels: (Q,) integers.
        gallery: (G, D) embeddings on the device of `query`.
        gallery_labels: (G,) integers.
        seed: of the tie-breaking shuffle.
    Returns:
        mAP in [0, 1].
    Raises:
        ValueError: on wrong shapes, empty sets, NaN or infinite values, labels that are not integers.
    """
    inputs = _prepare(query, query_labels, gallery, gallery_labels)
    return _evaluate(inputs, {"map": _average_precision}, seed)["map"]


def retrieval_metrics(
    query: Array, query_labels: Array, gallery: Array, gallery_labels: Array, *, seed: int = 0, exclude_self: bool = False,
    ranking: str = "plain", similarity: str = "cosine",
) -> dict[str, float]:
    """All retrieval metrics of one task from a single ranking pass.

    Args: as `mean_average_precision`.
        exclude_self: query i is gallery item i and may not find itself (search within one modality).
        ranking: "plain" by similarity, or "diffusion" over the gallery's neighbour graph (`DiffusionRanking`).
        similarity: "cosine", or "dot" for rows of norm at most LONGEST_ROW, as `Features.represent` gives them.
    Returns: {"map": ..., "r@K": the share of queries with a relevant item among the first K, for every K of RECALL_RANKS, "ndcg":
        with binary relevance and discount 1 / log2(rank + 1)}, means over the queries in [0, 1].
    Raises: ValueError as `mean_average_precision`, and with `exclude_self` for sets of different size or of one item.
    """
    inputs = _prepare(query, query_labels, gallery, gallery_labels, similarity)
    if exclude_self and (len(query) != len(gallery) or len(gallery) < 2):
        raise ValueError(f"exclude_self needs one set of at least 2 items on both sides, got {len(query)} and {len(gallery)}")
    scores = {"map": _average_precision, **{f"r@{k}": _recall(k) for k in RECALL_RANKS}, "ndcg": _ndcg}
    return _evaluate(inputs, scores, seed, exclude_self, ranking)


def chance_map(query_labels: Array, gallery_labels: Array) -> float:
    """Expected mAP of a uniformly random ranking, exact.

    With R relevant items among G, rank k is relevant with probability R / G, and an earlier rank is relevant as well
    with probability (R - 1) / (G - 1), so E[AP] = (1 / G) sum_k [1 / k + (R - 1) / (G - 1) * (k - 1) / k].

    Returns:
        Mean of E[AP] over the queries, of integer labels (Q,) and (G,); queries without a relevant item count as 0.
    """
    queries, gallery = _labels("query_labels", query_labels).cpu(), _labels("gallery_labels", gallery_labels).cpu()
    if len(queries) == 0 or len(gallery) == 0:
        raise ValueError(f"labels must not be empty, got {len(queries)} queries and {len(gallery)} gallery items")
    size = len(gallery)
    harmonic = (1 / torch.arange(1, size + 1, dtype=torch.float64)).sum() / size  # (1 / G) sum_k 1 / k
    classes, counts = gallery.unique(return_counts=True)
    values, weights = queries.unique(return_counts=True)
    relevant = (counts * (values.unsqueeze(1) == classes)).sum(dim=1)  # (number of query classes,)
    expected = harmonic + (relevant - 1) / max(size - 1, 1) * (1 - harmonic)
    expected = torch.where(relevant > 0, expected, 0.0)
    return float((expected * weights).sum() / len(queries))
