"""Cluster ids without labels: how many communities the embeddings form, and whom of the modalities to believe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx
import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from utils.evaluation.clustering import joint_then_per_modality
from utils.evaluation.ranking import nearest

NEIGHBOURS = 15
RESOLUTIONS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SEEDS = 2  # runs by which resolutions are judged
RUNS = 9  # at the one that is taken, of which the most typical run counts
CONFIRMED = 0.7  # agreement of two graphs below which they confirm no number of clusters
FINE, MEMBERS = 6.0, 5  # resolution of the over-clustering that is taken then, if its communities have so many members on average
CERTAIN = 1e-3  # least disagreement assumed, so that no modality's odds are infinite


def neighbour_graph(rows: Tensor) -> networkx.Graph:
    """Return the graph of the NEIGHBOURS nearest neighbours of unit rows (N, D), weighted by cosine; a ValueError for too few rows."""
    if len(rows) <= NEIGHBOURS:
        raise ValueError(f"communities need more than {NEIGHBOURS} rows, found {len(rows)}")
    graph = networkx.empty_graph(len(rows))
    columns, similarities = nearest(rows, rows, NEIGHBOURS, own=torch.arange(len(rows)))
    for row, (near, weights) in enumerate(zip(columns.tolist(), similarities.clamp(min=0).tolist())):
        graph.add_weighted_edges_from((row, column, weight) for column, weight in zip(near, weights))
    return graph


def agreement_of_partitions(found: Mapping[str, list[list[np.ndarray]]], name: str) -> list[float]:
    """Return, per resolution, how well the communities of one graph are confirmed by the other graphs.

    The adjusted Rand index with the communities of each other graph at the resolution that fits best, its mean over the other
    graphs and the seeds; 0 for a single community, which any other confirms. A split or a merger that only this graph sees lowers
    it, so its maximum over the resolutions tells the number of clusters, and over the graphs, which one sees them best.

    Args:
        found: graph -> per resolution, coarse to fine, the ids (N,) of some runs; at least two graphs of the same objects.
        name: of the one to judge.
    """
    others = [partitions for other, partitions in found.items() if other != name]
    fit = lambda ids, seed, partitions: max(adjusted_rand_score(ids, near[seed]) for near in partitions) if ids.any() else 0.0
    return [
        float(np.mean([fit(ids, seed, partitions) for seed, ids in enumerate(runs) for partitions in others])) for runs in found[name]
    ]


def most_typical(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the partition with the highest mean adjusted Rand index with all: some runs merge a part of one kind with another."""
    return max(runs, key=lambda ids: sum(adjusted_rand_score(ids, other) for other in runs))


def _louvain(graph: networkx.Graph, resolution: float, seed: int) -> np.ndarray:
    """Return the communities of the N nodes (Blondel et al. 2008) as ids (N,) int64, the largest one first."""
    communities = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed % 2**32)
    ids = np.empty(len(graph), dtype=np.int64)
    for number, members in enumerate(sorted(communities, key=len, reverse=True)):
        ids[list(members)] = number
    return ids


@dataclass(frozen=True)
class Clusters:
    """A clustering of the objects that all modalities show.

    Attributes:
        centroids: modality -> (K, D) unit rows, on the CPU.
        ids: (N,) int64 of the objects, where communities were found; None after k-means, which gives every modality its own.
        record: plain values on how it came about, for the log and the pseudo-labels' provenance.
    """

    centroids: dict[str, Tensor]
    ids: Tensor | None
    record: dict


def cluster_objects(rows: Mapping[str, Tensor], num_clusters: int | str, trusted: bool, seed: int) -> Clusters:
    """Cluster the embeddings of all modalities, to start the classifiers from (Sec. III-C).

    Args:
        rows: modality -> (N, D) unit rows; for "auto" and "fine", row i of all of them is one object.
        num_clusters: K of the paper's joint k-means, then one per modality from its centres; or "auto": the communities of the
            neighbour graph of the mean embeddings. Where the other graphs confirm them at no resolution, many small ones are
            taken: modularity merges groups that are small beside the whole (Fortunato and Barthelemy 2007), and kinds that are
            split cost step 2 less than kinds that are merged. "fine" takes these whatever is confirmed. Where they would have fewer
            than MEMBERS members on average, both keep the resolution that is confirmed best.
        trusted: of these, take those of one modality's own graph instead: the one that the other graphs confirm best.
        seed: of the starts.
    """
    if not isinstance(num_clusters, str):
        centroids = joint_then_per_modality(list(rows.values()), num_clusters, seed)[1]
        return Clusters(dict(zip(rows, map(Tensor.cpu, centroids))), None, {"num_clusters": num_clusters, "method": "k-means"})
    spaces = {**rows, "mean": F.normalize(sum(rows.values()), dim=1)}
    graphs = {name: neighbour_graph(values) for name, values in spaces.items()}
    repeat = lambda graph, resolution: [_louvain(graph, resolution, seed + offset) for offset in range(SEEDS)]
    found = {name: [repeat(graph, resolution) for resolution in RESOLUTIONS] for name, graph in graphs.items()}
    confirmed = {name: agreement_of_partitions(found, name) for name in (rows if trusted else ["mean"])}
    best = max(confirmed, key=lambda name: max(confirmed[name]))
    place = int(np.argmax(confirmed[best]))
    resolution, runs, graph = RESOLUTIONS[place], found[best][place], graphs[best]
    if num_clusters == "fine" or max(confirmed[best]) < CONFIRMED:
        finer = _louvain(graph, FINE, seed)
        if len(finer) >= MEMBERS * (finer.max() + 1):
            resolution, runs = FINE, [finer]
    runs = [*runs, *(_louvain(graph, resolution, seed + offset) for offset in range(len(runs), RUNS))]
    ids = torch.from_numpy(most_typical(runs))
    members = F.one_hot(ids).float().T  # (K, N)
    centroids = {name: F.normalize(members.to(values.device) @ values, dim=1).cpu() for name, values in rows.items()}
    trials = {
        name: [{"resolution": resolution, "num_clusters": [int(ids.max()) + 1 for ids in runs], "agreement": round(score, 4),
                "stability": round(float(adjusted_rand_score(*runs)), 4)}
               for resolution, runs, score in zip(RESOLUTIONS, found[name], scores)]
        for name, scores in confirmed.items()
    }
    record = {
        "num_clusters": len(members), "method": f"Louvain communities of {best}" + ", over-clustered" * (resolution == FINE),
        "resolution": resolution, "trials": trials,
    }
    return Clusters(centroids, ids, record)


def view_agreement(views: Sequence[Tensor]) -> float:
    """How far two augmented views of a sample give the same most likely cluster: a modality's reliability without labels.

    Agreement beyond chance, (a - c) / (1 - c), a the share of samples with equal ids, c that of two independent draws from the
    views' histograms (Cohen 1960). 1 for equal ids, about 0 for unrelated ones, and 0 where all views fall into one cluster.

    Args:
        views: two tensors (N, K) of posteriors or logits.
    """
    first, second = (F.one_hot(view.argmax(dim=1), view.shape[1]).double() for view in views)  # (N, K)
    equal, chance = float((first * second).sum(dim=1).mean()), float(first.mean(dim=0) @ second.mean(dim=0))
    return max(0.0, (equal - chance) / (1 - chance)) if chance < 1 else 0.0


def trust(agreement: Mapping[str, float]) -> dict[str, float]:
    """Return modality -> weight, of sum 1: in proportion to the odds a / (1 - a) of its `view_agreement`; equal ones if all are 0."""
    odds = {name: share / max(1 - share, CERTAIN) for name, share in agreement.items()}
    odds = odds if any(odds.values()) else dict.fromkeys(odds, 1.0)
    return {name: value / sum(odds.values()) for name, value in odds.items()}


def fuse(posteriors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted mean (N, K) of the modalities' posteriors (N, K) of the same objects."""
    return sum(weights[name] * rows for name, rows in posteriors.items()) / sum(weights[name] for name in posteriors)
