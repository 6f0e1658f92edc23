"""KCCA: D. R. Hardoon, S. Szedmak, J. Shawe-Taylor, "Canonical correlation analysis: an overview", Neural Computation 16(12), 2004.

With centred kernel matrices Kx, Ky (N, N) of the two modalities,

    maximise alpha^T Kx Ky beta   subject to   alpha^T (Kx^2 + kappa Kx) alpha = beta^T (Ky^2 + kappa Ky) beta = 1;

without kappa any two modalities correlate perfectly. The exact solution costs O(N^3). Here it is ridge CCA (`baselines.cca`) on
Nystroem features Phi (N, M) of M landmarks, the same pairs for both modalities; for M = N it is the exact one, kappa = r (N - 1).

Left open by RoMo: kernel, bandwidth and kappa. Ours: an RBF kernel exp(-|u - v|^2 / (2 s^2)), s the median distance of training rows,
1,000 `landmarks`, `ridge` 0.1 in units of the mean variance; `ridge: 0` chooses it as Hardoon et al. do, by the largest gap between the
spectrum of the pairs and that of shuffled pairs. `kernel: linear` is CCA, for tests.
"""

from collections.abc import Mapping

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.kernel_approximation import Nystroem

from baselines.cca import Preparation, ridge_cca
from baselines.method import COUNT, Context, ShallowMethod
from utils.engine.seed import derive_seed
from utils.errors import UserError

RIDGES = (0.001, 0.01, 0.1, 1.0)  # among which `ridge: 0` chooses
MEDIAN_ROWS = 1000


class KCCA(ShallowMethod):
    """Kernel CCA by Nystroem features."""

    defaults = {"kernel": "rbf", "landmarks": 1000, "ridge": 0.1}
    limits = {"landmarks": COUNT}

    def fit(self, features: Mapping[str, np.ndarray], context: Context) -> None:
        kernel, landmarks = context.settings["kernel"], context.settings["landmarks"]
        if kernel not in ("rbf", "linear"):
            raise UserError(f"method.options.kernel must be 'rbf' or 'linear', found {kernel!r}")
        seed = derive_seed(context.seed, "kcca") % 2**32  # one for both: the same landmark pairs
        self.prepared = {name: Preparation() for name in context.modalities}
        self.maps, views = {}, []
        for name in context.modalities:
            rows = self.prepared[name].fit(features[name])
            gamma = bandwidth(rows) if kernel == "rbf" else None
            self.maps[name] = Nystroem(kernel, gamma=gamma, n_components=min(landmarks, len(rows)), random_state=seed)
            views.append(self.maps[name].fit_transform(rows))
        model = ridge_cca(views, context.dim, context.settings["ridge"] or widest_gap(views, context.dim, seed))
        self.means = dict(zip(context.modalities, model.means_, strict=True))
        self.weights = dict(zip(context.modalities, model.weights_, strict=True))

    def transform(self, name: str, rows: np.ndarray) -> np.ndarray:
        return (self.maps[name].transform(self.prepared[name].apply(rows)) - self.means[name]) @ self.weights[name]


def bandwidth(rows: np.ndarray) -> float:
    """Return gamma = 1 / (2 s^2) of the RBF kernel, s the median distance of rows (N, d); of many, evenly spaced ones are taken."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MEDIAN_ROWS)).astype(int)
    return 1 / (2 * max(float(np.median(pdist(rows[chosen]))), 1e-12) ** 2)


def widest_gap(views: list[np.ndarray], dim: int, seed: int) -> float:
    """Return the ridge of RIDGES for which the correlations of pairs and of shuffled pairs (L,) are farthest apart."""
    order = np.random.default_rng(seed).permutation(len(views[0]))

    def correlations(pair: list[np.ndarray], ridge: float) -> np.ndarray:
        model = ridge_cca(pair, dim, ridge)
        left, right = (view - mean for view, mean in zip(pair, model.means_, strict=True))
        return np.diag(model.weights_[0].T @ left.T @ right @ model.weights_[1]) / (len(left) - 1)

    def gap(ridge: float) -> float:
        return float(np.linalg.norm(correlations(views, ridge) - correlations([views[0], views[1][order]], ridge)))

    return max(RIDGES, key=gap)
