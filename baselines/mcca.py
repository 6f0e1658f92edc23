"""MCCA: J. Rupnik, J. Shawe-Taylor, "Multi-view canonical correlation analysis", SiKDD 2010 (the sum of correlations).

With centred views V_1..V_M (M >= 2) and S_ab their covariances,

    maximise sum_{a != b} p_a^T S_ab p_b   subject to   sum_a p_a^T (S_aa + r_a I) p_a = 1,

the generalised eigenproblem of the blocks off and on the diagonal, solved by cca-zoo. For M = 2 it is CCA.

Left open by RoMo: which views were fitted; as its rows of CCA and MCCA differ, not two. Ours: one joint fit on all modalities that the
context names, every one of a data set, from which each task is served. Preparation and `ridge` as in `baselines.cca`; the ridge of
each block keeps pictures that differ in colour alone from ruling the joint spectrum.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from baselines.cca import Preparation, load_model, shrinkage_of
from baselines.method import Context, ShallowMethod


class MCCA(ShallowMethod):
    """Joint linear CCA of two or more modalities."""

    dim = 128
    defaults: Mapping[str, Any] = {"ridge": 1e-3}

    def fit(self, features: Mapping[str, np.ndarray], context: Context) -> None:
        self.prepared = {name: Preparation() for name in context.modalities}
        views = [self.prepared[name].fit(features[name]) for name in context.modalities]
        shrinkage = [shrinkage_of(view, context.settings["ridge"]) for view in views]
        width = min(context.dim, *(view.shape[1] for view in views))
        model = load_model("MCCA")(n_components=width, shrinkage=shrinkage).fit(views)
        self.weights = dict(zip(context.modalities, model.weights_, strict=True))

    def transform(self, name: str, rows: np.ndarray) -> np.ndarray:
        return self.prepared[name].apply(rows) @ self.weights[name]
