"""Builds one encoder per modality from the model settings, with the initial weights that the configuration names."""

from collections.abc import Mapping, Sequence

from torch import nn

import models
from models.pretrained import LoadReport, load_weights
from models.sync_batchnorm import synchronise
from utils.engine import distributed
from utils.errors import UserError
from utils.modalities import MODALITIES
from utils.settings.data_options import DataConfig
from utils.settings.options import ModelConfig


def build_encoders(data: DataConfig, model: ModelConfig, sync_batchnorm: bool = False) -> nn.ModuleDict:
    """Return modality -> encoder, in the order of `data.modalities`, randomly initialised from torch's global generator.

    With sync_batchnorm and several processes, batch statistics are taken over all of them. Those of `model.headless` end with the
    trunk's pooled feature, those of `model.freeze` stay in eval mode and take no gradient.

    Raises:
        UserError: if an encoder without projection has another width than `model.embedding_dim`.
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
    for name in model.headless:
        width = encoders[name].head[0].in_features
        if width != dim:
            raise UserError(f"model.headless: the feature of {name} has {width} dimensions, model.embedding_dim is {dim}; make them equal")
        encoders[name].head = nn.Identity()
    if sync_batchnorm and distributed.world() > 1:
        synchronise(encoders)
    for name in model.freeze:
        encoders[name].eval().requires_grad_(False)
    return encoders


def build_classifiers(modalities: Sequence[str], model: ModelConfig, num_clusters: int, logit_scale: float | None = None) -> nn.ModuleDict:
    """Return modality -> classifier of K clusters: g of step 1 if a scale of its logits is given, else h of step 2."""
    dim = model.embedding_dim
    if logit_scale is not None:
        return nn.ModuleDict({name: models.LinearClassifier(dim, num_clusters, logit_scale) for name in modalities})
    return nn.ModuleDict({name: models.MLPClassifier(dim, model.classifier_hidden, num_clusters) for name in modalities})


def load_pretrained(encoders: nn.ModuleDict, sources: Mapping[str, str]) -> dict[str, LoadReport]:
    """Load the weights that the configuration names into the encoders, modality -> encoder, in place.

    Args:
        sources: modality -> "imagenet", "none" or the path of a weight file or a run, one for every encoder.
    Returns:
        What was loaded, for every modality whose source is not "none".
    Raises:
        UserError: if weights cannot be had or do not fit, or leave a part of a frozen encoder random; random weights never take their
            place in silence.
    """
    reports = {name: load_weights(encoder, sources[name], name) for name, encoder in encoders.items() if sources[name] != "none"}
    for name in (name for name, encoder in encoders.items() if not any(p.requires_grad for p in encoder.parameters())):
        used = reports[name].used if name in reports else ()
        random = [key for key, _ in encoders[name].named_parameters() if key not in used]
        if random:
            raise UserError(
                f"model.freeze: {name} would keep random weights ({', '.join(random[:3])}); name a file that has them in "
                f"model.pretrained.{name}, or drop the projection with model.headless=[{name}]"
            )
    return reports
