"""CCA: H. Hotelling, "Relations between two sets of variates", Biometrika 28, 1936; with a ridge (Vinod 1976).

With centred features U (N, dX) and W (N, dY) of one pair per row,

    Sxx = U^T U / (N - 1) + r_x I,   Syy = W^T W / (N - 1) + r_y I,   Sxy = U^T W / (N - 1)
    maximise tr(Px^T Sxy Py)  subject to  Px^T Sxx Px = Py^T Syy Py = I

whose solution is the singular value decomposition of Sxx^-1/2 Sxy Syy^-1/2; samples are ranked by the cosine of their projections.
The solution is cca-zoo's (scikit-learn's iterative CCA does not reach it).

Left open by RoMo: features, width and ridge of its row. Ours: rows of unit norm, 128 dimensions, and `ridge` (1e-3) in units of the
mean variance of a modality, r = ridge tr(S) / d. Without a ridge, dX + dY near N gives correlations of 1 and a score at chance.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from baselines.method import Context, ShallowMethod
from utils.errors import UserError


def load_model(name: str) -> type:
    """Return a linear model of cca-zoo, which only this comparison needs; a UserError says how to get it."""
    try:
        return getattr(importlib.import_module("cca_zoo.linear"), name)
    except ImportError as error:
        raise UserError(f"this method needs cca-zoo ({error}): python -m pip install -r requirements-baselines.txt") from error


class Preparation:
    """Rows of unit norm, less their training mean, without the columns that do not vary in training."""

    def fit(self, rows: np.ndarray) -> np.ndarray:
        """Learn mean and columns from training rows (N, d); return them prepared, (N, d') float64."""
        rows = unit_rows(rows)
        self.kept = np.ptp(rows, axis=0) > 1e-12
        if not self.kept.any():
            raise UserError(f"features of {len(rows)} samples do not differ from one another: nothing can be fitted on them")
        self.mean = rows[:, self.kept].mean(axis=0)
        return rows[:, self.kept] - self.mean

    def apply(self, rows: np.ndarray) -> np.ndarray:
        """Return other rows (n, d) prepared alike, (n, d')."""
        return unit_rows(rows)[:, self.kept] - self.mean


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scale rows (n, d) to unit norm in float64; a zero row stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def ridge_cca(views: Sequence[np.ndarray], dim: int, ridge: float, model: str = "RidgeCCA") -> Any:
    """Fit ridge CCA to views (N, d), of which it subtracts the means; the model has `means_` and `weights_` (d, L) of each.

    Args:
        dim: wanted L; fewer where a view has fewer columns or a lower rank.
        ridge: in units of the mean variance of each view.
        model: of cca-zoo, for two views or more.
    """
    deviations = [max(float(view.var(axis=0, ddof=1).mean()) ** 0.5, 1e-150) for view in views]  # of a column
    rank = np.linalg.matrix_rank if model == "MCCA" else lambda view: view.shape[1]  # RidgeCCA itself cuts to the rank
    width = min(dim, *(int(rank(view - view.mean(axis=0))) for view in views))
    # of views of mean variance 1, S + ridge I is (1 + ridge) ((1 - c) S + c I), with one factor for all of them
    fitted = load_model(model)(n_components=width, shrinkage=[ridge / (1 + ridge)] * len(views))
    fitted.fit([view / deviation for view, deviation in zip(views, deviations, strict=True)])
    fitted.means_ = [mean * deviation for mean, deviation in zip(fitted.means_, deviations, strict=True)]
    fitted.weights_ = [weights / deviation / (1 + ridge) ** 0.5 for weights, deviation in zip(fitted.weights_, deviations, strict=True)]
    return fitted


class CCA(ShallowMethod):
    """Linear CCA of the two modalities of a task."""

    defaults = {"ridge": 1e-3}
    model = "RidgeCCA"

    def fit(self, features: Mapping[str, np.ndarray], context: Context) -> None:
        self.prepared = {name: Preparation() for name in context.modalities}
        views = [self.prepared[name].fit(features[name]) for name in context.modalities]
        model = ridge_cca(views, context.dim, context.settings["ridge"], self.model)
        self.weights = dict(zip(context.modalities, model.weights_, strict=True))

    def transform(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.prepared[name].apply(rows) @ self.weights[name]
