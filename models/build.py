"""Builds one encoder per modality from the model settings, with the initial weights that the configuration names."""

from collections.abc import Mapping, Sequence

from torch import nn

import models
from models.pretrained import LoadReport, load_dgcnn_checkpoint, load_meshnet_checkpoint, load_resnet18_weights
from models.sync_batchnorm import synchronise
from utils.engine import distributed
from utils.modalities import MODALITIES
from utils.settings.data_options import DataConfig
from utils.settings.options import ModelConfig


def build_encoders(data: DataConfig, model: ModelConfig, sync_batchnorm: bool = False) -> nn.ModuleDict:
    """Return modality -> encoder, in the order of `data.modalities`, randomly initialised from torch's global generator.

    With sync_batchnorm and several processes, batch statistics are taken over all of them.
    """
    dim = model.embedding_dim
    makers = {
        "DGCNN": lambda: models.DGCNN(dim, model.num_neighbors, model.point_width, model.edge_conv),
        "MeshNet": lambda: models.MeshNet(dim, model.mesh_width, model.mesh_mask_ratio, model.mesh_conv_width),
        "ResNet18": lambda: models.ResNet18(dim, model.image_stages),
    }
    make = lambda name: (
        models.FeatureMLP(data.features[name], model.feature_hidden, dim) if name in data.features else makers[MODALITIES[name].encoder]()
    )
    encoders = nn.ModuleDict({name: make(name) for name in data.modalities})
    return synchronise(encoders) if sync_batchnorm and distributed.world() > 1 else encoders


def build_classifiers(modalities: Sequence[str], model: ModelConfig, num_clusters: int, logit_scale: float | None = None) -> nn.ModuleDict:
    """Return modality -> classifier of K clusters: g of step 1 if a scale of its logits is given, else h of step 2."""
    dim = model.embedding_dim
    if logit_scale is not None:
        return nn.ModuleDict({name: models.LinearClassifier(dim, num_clusters, logit_scale) for name in modalities})
    return nn.ModuleDict({name: models.MLPClassifier(dim, model.classifier_hidden, num_clusters) for name in modalities})


def load_pretrained(encoders: nn.ModuleDict, sources: Mapping[str, str]) -> dict[str, LoadReport]:
    """Load the weights that the configuration names into the encoders, modality -> encoder, in place.

    Args:
        sources: modality -> "imagenet", "none" or the path of a weight file, one for every encoder.
    Returns:
        What was loaded, for every modality whose source is not "none".
    Raises:
        UserError: if weights cannot be had or do not fit; random weights never take their place.
    """
    loaders = {"DGCNN": load_dgcnn_checkpoint, "MeshNet": load_meshnet_checkpoint, "ResNet18": load_resnet18_weights}
    return {
        name: loaders[MODALITIES[name].encoder](encoder, sources[name])
        for name, encoder in encoders.items()
        if sources[name] != "none"
    }
