"""The losses of RoMo: self-matching (step 1), robust concentrating or a compared loss (step 2), modality invariance, relations (both)."""

from losses.modality_invariance import ModalityInvarianceLoss
from losses.relations import RelationLoss
from losses.robust import ROBUST_LOSSES, AUELoss, CELoss, GCELoss, MAELoss, NCEAGCELoss, build_robust_loss
from losses.robust_concentrating import RobustConcentratingLoss
from losses.self_matching import ESTIMATORS, SelfMatchingLoss

__all__ = [
    "ESTIMATORS", "ROBUST_LOSSES", "AUELoss", "CELoss", "GCELoss", "MAELoss", "ModalityInvarianceLoss", "NCEAGCELoss",
    "RelationLoss", "RobustConcentratingLoss", "SelfMatchingLoss", "build_robust_loss",
]
