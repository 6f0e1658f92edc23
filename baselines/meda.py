"""MEDA: J. Wang et al., "Visual domain adaptation with manifold embedded distribution alignment", ACM Multimedia 2018.

One kernel classifier of n source and m target rows, in turns with pseudo-labels of the target:

    beta = ((A + lam M + rho Lap) K + eta I)^-1 A Y,   scores F = K beta
    A: 1 on source rows, 0 on target; Y: one-hot source labels; K: RBF kernel of rows mapped by the geodesic flow kernel, sqrt(G) phi
    M = (1 - mu) M_0 + mu sum_c M_c,  M_c = e_c e_c^T, e_c = 1 / n_c on the source, -1 / m_c on the target rows of class c (M_0: all rows)
    mu = 1 - d_0 / (d_0 + sum_c d_c),  d = 2 (1 - 2 err) of a linear classifier of the domains;  Lap: normalised, of the cosine p-NN graph

As M has rank K + 1, the system is factorised once and updated by the Woodbury identity. Pseudo-labels start as 1-NN from the source.

Source labels: by default PSEUDO-LABELS OF THE IMAGE MODALITY, k-means of its features (see `baselines.revgrad`); the true ones make it
"MEDA, true source labels", which is not unsupervised. From the release: subspace 20, p 10, lam 10, eta 0.1, rho 1, T 10.

Ours: one space is needed, so both modalities are first mapped by ridge CCA of the pairs (`baselines.cca`, 128 dimensions) to unit rows; at
most `pairs` pairs (2,500, evenly spaced) are fitted; the kernel's bandwidth is the median distance; err is that of halves held out; ranked:
[hat(z); tau hat(softmax F)], tau 1, or the beliefs alone (`map: false`); new samples by F(z) = k(z, Z) beta, so that no test sample
takes part in the fit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse
from scipy.linalg import lu_factor, lu_solve
from scipy.special import softmax
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier, kneighbors_graph
from sklearn.svm import LinearSVC

from baselines.cca import CCA, unit_rows
from baselines.kcca import bandwidth
from baselines.method import COUNT, POSITIVE, Context, ShallowMethod
from baselines.revgrad import source_labels
from utils.errors import UserError

SMALLEST_CLASS = 4  # rows of each domain, below which a class has no distance of its own


def flow_kernel_root(source: np.ndarray, target: np.ndarray, subspace: int) -> np.ndarray:
    """Return sqrt(G) (D, D) of the geodesic flow between the PCA subspaces of rows (n, D) and (m, D): G = int_0^1 Phi(t) Phi(t)^T dt."""
    first, second = (np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][:subspace].T for rows in (source, target))
    left, cosines, right = np.linalg.svd(first.T @ second)
    angles = np.arccos(cosines.clip(-1, 1))
    start = first @ left  # Phi(t) = start cos(t angle) + away sin(t angle), both (D, d)
    away = (second @ right.T - start * cosines) / np.maximum(np.sin(angles), 1e-12)
    same = np.sinc(2 * angles / np.pi) / 2  # sin(2 a) / (4 a)
    mixed = (1 - np.cos(2 * angles)) / (4 * np.maximum(angles, 1e-12))
    kernel = (start * (0.5 + same)) @ start.T + (away * (0.5 - same)) @ away.T
    kernel += (start * mixed) @ away.T + (away * mixed) @ start.T
    values, vectors = np.linalg.eigh(kernel)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


class AlignedClassifier:
    """The kernel classifier of source rows (n, D) with labels (n,) in 0..K-1 and target rows (m, D)."""

    def __init__(self, num_classes: int, settings: Mapping[str, Any]) -> None:
        self.num_classes, self.settings = num_classes, settings

    def fit(self, source: np.ndarray, labels: np.ndarray, target: np.ndarray) -> "AlignedClassifier":
        options = self.settings
        self.rows, self.gamma = np.concatenate([source, target]), bandwidth(np.concatenate([source, target]))
        kernel = rbf_kernel(self.rows, gamma=self.gamma)
        known = np.arange(len(self.rows)) < len(source)
        system = known[:, None] * kernel + options["rho"] * self._laplacian() @ kernel
        system[np.diag_indices_from(system)] += options["eta"]
        factors = lu_factor(system, overwrite_a=True, check_finite=False)
        wanted = np.zeros((len(self.rows), self.num_classes))
        wanted[np.arange(len(source)), labels] = 1
        plain = lu_solve(factors, wanted)
        pseudo = KNeighborsClassifier(1).fit(source, labels).predict(target)
        marginal = domain_distance(source, target)
        for _ in range(options["rounds"]):
            spread = self._discrepancy(source, labels, target, pseudo, marginal)  # E (n + m, K + 1), M = E E^T
            solved, seen = lu_solve(factors, spread), spread.T @ kernel
            inner = np.eye(spread.shape[1]) + options["lam"] * seen @ solved
            self.coefficients = plain - options["lam"] * solved @ np.linalg.solve(inner, seen @ plain)
            pseudo = (kernel[len(source) :] @ self.coefficients).argmax(axis=1)
        return self

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Return F (n, K) of rows (n, D)."""
        return rbf_kernel(rows, self.rows, gamma=self.gamma) @ self.coefficients

    def _laplacian(self) -> sparse.csr_array:
        neighbours, others = self.settings["neighbours"], len(self.rows) - 1
        if neighbours > others:
            raise UserError(f"method.options.neighbours: expected at most {others}, the other rows of both domains, found {neighbours}")
        graph = kneighbors_graph(self.rows, neighbours, metric="cosine", mode="distance")
        graph.data = np.maximum(1 - graph.data, 0)  # cosine similarity
        graph = graph.maximum(graph.T)
        scale = 1 / np.sqrt(np.maximum(np.asarray(graph.sum(axis=1)).ravel(), 1e-12))
        return sparse.eye_array(len(scale)) - sparse.diags_array(scale) @ graph @ sparse.diags_array(scale)

    def _discrepancy(
        self, source: np.ndarray, labels: np.ndarray, target: np.ndarray, pseudo: np.ndarray, marginal: float
    ) -> np.ndarray:
        """Return E (n + m, K + 1) with M = E E^T; classes without rows in a domain are left out."""
        chosen = [(np.ones(len(labels), bool), np.ones(len(pseudo), bool))] + [(labels == c, pseudo == c) for c in range(self.num_classes)]
        columns = [np.concatenate([s / max(s.sum(), 1), t / -max(t.sum(), 1)]) * (s.any() and t.any()) for s, t in chosen]
        conditional = [domain_distance(source[s], target[t]) for s, t in chosen[1:]]
        share = 1 - marginal / max(marginal + sum(conditional), 1e-12)  # mu
        weights = np.array([1 - share] + [share] * self.num_classes)
        return np.stack(columns, axis=1) * np.sqrt(weights)


def domain_distance(source: np.ndarray, target: np.ndarray) -> float:
    """Return d = 2 (1 - 2 err) in [0, 2] of a linear classifier of rows (n, D) and (m, D), 0 for too few rows."""
    if min(len(source), len(target)) < SMALLEST_CLASS:
        return 0.0
    domain = np.repeat([0, 1], [len(source), len(target)])
    accuracy = cross_val_score(LinearSVC(dual=False), np.concatenate([source, target]), domain, cv=2, scoring="balanced_accuracy").mean()
    return 2 * max(2 * float(accuracy) - 1, 0.0)


class MEDA(ShallowMethod):
    """Manifold embedded distribution alignment, images as source and 3D as target."""

    defaults = {
        "ridge": 1e-3, "subspace": 20, "neighbours": 10, "lam": 10.0, "eta": 0.1, "rho": 1.0, "rounds": 10, "tau": 1.0, "pairs": 2500,
        "map": True,
    }
    limits = {
        **dict.fromkeys(("subspace", "neighbours", "rounds"), COUNT), "pairs": {"min": 2},
        "eta": POSITIVE,  # without it the system of a round may be singular
    }

    def fit(self, features: Mapping[str, np.ndarray], context: Context) -> None:
        self.settings, (image, other) = context.settings, context.modalities
        self.cca = CCA()
        self.cca.fit(features, context)
        count = len(features[image])
        chosen = np.linspace(0, count - 1, min(count, self.settings["pairs"])).astype(int)
        labels = source_labels(context).cpu().numpy()[chosen]
        source, target = (self._common(name, features[name][chosen]) for name in (image, other))
        self.root = flow_kernel_root(source, target, min(self.settings["subspace"], source.shape[1]))
        self.classifier = AlignedClassifier(context.num_clusters, self.settings)
        self.classifier.fit(source @ self.root, labels, target @ self.root)

    def _common(self, name: str, rows: np.ndarray) -> np.ndarray:
        return unit_rows(self.cca.transform(name, rows))

    def transform(self, name: str, rows: np.ndarray) -> np.ndarray:
        mapped = self._common(name, rows) @ self.root
        beliefs = unit_rows(softmax(self.classifier.scores(mapped), axis=1))
        return np.concatenate([unit_rows(mapped), self.settings["tau"] * beliefs], axis=1) if self.settings["map"] else beliefs
