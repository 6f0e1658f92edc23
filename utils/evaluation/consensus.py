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
SEEDS = 3
CERTAIN = 1e-3  # least share of disagreeing views assumed, so that no modality's odds are infinite


@dataclass(frozen=True)
class Communities:
    """A clustering by Louvain's method, and how the number of clusters was found.

    Attributes:
        ids: (N,) int64 in 0..num_clusters-1.
        num_clusters: K.
        resolution: the one chosen.
        trials: one entry per resolution: "resolution", "num_clusters" of every seed, and "stability", the mean adjusted Rand
            index between the seeds of this resolution and those of the next ones.
    """

    ids: Tensor
    num_clusters: int
    resolution: float
    trials: list[dict]

    @property
    def stability(self) -> float:
        """That of the resolution chosen."""
        return max(trial["stability"] for trial in self.trials)


def find_communities(rows: Tensor, seed: int) -> Communities:
    """Cluster unit rows (N, D) into as many communities as their neighbour graph has.

    Louvain's method (Blondel et al. 2008) on the graph of NEIGHBOURS nearest neighbours, weighted by cosine, at every one of
    RESOLUTIONS with SEEDS seeds. The resolution whose clusterings agree best with each other and with those of the neighbouring
    resolutions is taken: a number of clusters that survives a change of the resolution is one of the data.

    Raises:
        ValueError: for fewer rows than neighbours.
    """
    if len(rows) <= NEIGHBOURS:
        raise ValueError(f"communities need more than {NEIGHBOURS} rows, found {len(rows)}")
    graph = _neighbour_graph(rows)
    found = [[_louvain(graph, resolution, seed + offset) for offset in range(SEEDS)] for resolution in RESOLUTIONS]
    stability = []
    for place, own in enumerate(found):
        around = [ids for near in found[max(0, place - 1) : place + 2] for ids in near]
        scores = [adjusted_rand_score(one, other) for one in own for other in around if one is not other]
        stability.append(float(np.mean(scores)) if max(map(np.max, own)) > 0 else 0.0)  # one cluster agrees with itself
    best = int(np.argmax(stability))
    trials = [
        {"resolution": resolution, "num_clusters": [int(ids.max()) + 1 for ids in own], "stability": score}
        for resolution, own, score in zip(RESOLUTIONS, found, stability)
    ]
    ids = torch.from_numpy(found[best][0])
    return Communities(ids, int(ids.max()) + 1, RESOLUTIONS[best], trials)


def _neighbour_graph(rows: Tensor) -> networkx.Graph:
    graph = networkx.empty_graph(len(rows))
    columns, similarities = nearest(rows, rows, NEIGHBOURS, own=0)
    for row, (near, weights) in enumerate(zip(columns.tolist(), similarities.clamp(min=0).tolist())):
        graph.add_weighted_edges_from((row, column, weight) for column, weight in zip(near, weights))
    return graph


def _louvain(graph: networkx.Graph, resolution: float, seed: int) -> np.ndarray:
    """Return (N,) ids, the largest community first."""
    communities = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed % 2**32)
    ids = np.empty(len(graph), dtype=np.int64)
    for number, members in enumerate(sorted(communities, key=len, reverse=True)):
        ids[list(members)] = number
    return ids


@dataclass(frozen=True)
class Clusters:
    """A clustering of the objects that all modalities show.

    Attributes:
        centroids: modality -> (K, D) unit rows.
        ids: (N,) int64 of the objects, where communities were found; None after k-means, which gives every modality its own.
        record: plain values on how it came about, for the log and the pseudo-labels' provenance.
    """

    centroids: dict[str, Tensor]
    ids: Tensor | None
    record: dict

    def to(self, device: str | torch.device) -> "Clusters":
        """Return the same with its centroids on a device."""
        return Clusters({name: rows.to(device) for name, rows in self.centroids.items()}, self.ids, self.record)


def cluster_objects(rows: Mapping[str, Tensor], num_clusters: int | str, trusted: bool, seed: int) -> Clusters:
    """Cluster the embeddings of all modalities, to start the classifiers from (Sec. III-C).

    Args:
        rows: modality -> (N, D) unit rows; for "auto", row i of all of them is one object.
        num_clusters: K of the paper's joint k-means, then one per modality from its centres; or "auto": the communities of the
            neighbour graph of the mean embeddings.
        trusted: with "auto", also look at the graph of each modality by itself, and take the most stable clustering of all.
        seed: of the starts.
    """
    if num_clusters != "auto":
        centroids = joint_then_per_modality(list(rows.values()), num_clusters, seed)[1]
        return Clusters(dict(zip(rows, centroids)), None, {"num_clusters": num_clusters, "method": "k-means"})
    graphs = {"mean": F.normalize(sum(rows.values()), dim=1), **(rows if trusted else {})}
    found = {name: find_communities(values, seed) for name, values in graphs.items()}
    best = max(found, key=lambda name: found[name].stability)
    communities = found[best]
    members = F.one_hot(communities.ids, communities.num_clusters).float().T  # (K, N)
    centroids = {name: F.normalize(members.to(values.device) @ values, dim=1) for name, values in rows.items()}
    record = {
        "num_clusters": communities.num_clusters, "method": f"Louvain communities of {best}", "resolution": communities.resolution,
        "stability": {name: round(values.stability, 4) for name, values in found.items()}, "trials": communities.trials,
    }
    return Clusters(centroids, communities.ids, record)


def view_agreement(views: Sequence[Tensor]) -> float:
    """Share of samples to which two augmented views give the same most likely cluster: a modality's reliability without labels.

    Args:
        views: two tensors (N, K) of posteriors or logits.
    """
    first, second = views
    return float((first.argmax(dim=1) == second.argmax(dim=1)).float().mean())


def trust(agreement: Mapping[str, float]) -> dict[str, float]:
    """Return modality -> weight, of sum 1: in proportion to the odds a / (1 - a) of its `view_agreement`."""
    odds = {name: share / max(1 - share, CERTAIN) for name, share in agreement.items()}
    total = sum(odds.values()) or 1.0
    return {name: value / total for name, value in odds.items()}


def fuse(posteriors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Return the weighted mean (N, K) of the modalities' posteriors (N, K) of the same objects."""
    return sum(weights[name] * rows for name, rows in posteriors.items()) / sum(weights[name] for name in posteriors)
