"""Augmentations one at a time, and the generator they draw from."""

import dataclasses

import torch

from utils.engine.seed import BatchGenerator
from utils.settings.data_options import AugmentConfig

NONE = {
    field.name: (1.0, 1.0) if field.name.endswith("scale") else type(field.default)(0) for field in dataclasses.fields(AugmentConfig)
}


def only(**changes) -> AugmentConfig:
    """No augmentation but the given."""
    return AugmentConfig(**{**NONE, **changes})


def generator(seed: int = 0) -> BatchGenerator:
    return BatchGenerator(torch.Generator().manual_seed(seed))
