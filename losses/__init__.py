"""The losses of RoMo: self-matching (step 1), robust concentrating (step 2) and modality invariance (both)."""

from losses.modality_invariance import ModalityInvarianceLoss
from losses.robust_concentrating import RobustConcentratingLoss
from losses.self_matching import ESTIMATORS, SelfMatchingLoss

__all__ = ["ESTIMATORS", "ModalityInvarianceLoss", "RobustConcentratingLoss", "SelfMatchingLoss"]
