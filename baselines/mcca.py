"""MCCA: J. Rupnik, J. Shawe-Taylor, "Multi-view canonical correlation analysis", SiKDD 2010 (the sum of correlations).

With centred views V_1..V_M (M >= 2) and S_ab their covariances,

    maximise sum_{a != b} p_a^T S_ab p_b   subject to   sum_a p_a^T (S_aa + r_a I) p_a = 1,

the generalised eigenproblem of the blocks off and on the diagonal, solved by cca-zoo. For M = 2 it is CCA.

Left open by RoMo: which views were fitted; as its rows of CCA and MCCA differ, not two. Ours: one joint fit on all modalities that the
context names, every one of a data set, from which each task is served. Preparation and `ridge` as in `baselines.cca`; the ridge of
each block keeps pictures that differ in colour alone from ruling the joint spectrum. Fitted on two modalities alone
(`data.modalities` of a run names two), it is `baselines.cca` with the same ridge, and has its scores.
"""

from baselines.cca import CCA


class MCCA(CCA):
    """Joint linear CCA of two or more modalities."""

    model = "MCCA"
