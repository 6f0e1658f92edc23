"""The losses of RoMo: self-matching (step 1), robust concentrating or a compared loss (step 2), modality invariance (both)."""

from losses.modality_invariance import ModalityInvarianceLoss
from losses.robust import ROBUST_LOSSES, AUELoss, CELoss, GCELoss, MAELoss, NCEAGCELoss, build_robust_loss
from losses.robust_concentrating import RobustConcentratingLoss
from losses.self_matching import ESTIMATORS, SelfMatchingLoss

__all__ = [
    "ESTIMATORS", "ROBUST_LOSSES", "AUELoss", "CELoss", "GCELoss", "MAELoss", "ModalityInvarianceLoss", "NCEAGCELoss",
    "RobustConcentratingLoss", "SelfMatchingLoss", "build_robust_loss",
]
