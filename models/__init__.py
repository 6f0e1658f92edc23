"""Encoders, heads and the memory bank of RoMo."""

from models.feature_encoder import FeatureMLP
from models.heads import LinearClassifier, MLPClassifier
from models.image_encoder import ResNet18
from models.memory_bank import MemoryBank
from models.mesh_encoder import MeshNet
from models.point_encoder import DGCNN

__all__ = ["DGCNN", "FeatureMLP", "LinearClassifier", "MLPClassifier", "MemoryBank", "MeshNet", "ResNet18"]
