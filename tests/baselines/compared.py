"""Synthetic pairs, contexts and a small training loop for the tests of the compared methods."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from baselines import METHODS
from baselines.method import Context, Method
from utils.evaluation.metrics import mean_average_precision

NAMES = ("GrayImg", "PointCloud")
CPU = torch.device("cpu")
CLASSES = 5


def pairs(count, seed=0, widths=(24, 32), classes=CLASSES, names=NAMES):
    """Features of paired samples and their classes: class and object show in both modalities, through other non-negative maps."""
    world = np.random.default_rng(7)
    centres, maps = world.normal(size=(classes, 8)), [world.normal(size=(8, width)) for width in widths]
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % classes)
    latent = centres[labels] + 0.45 * draw.normal(size=(count, 8))
    features = {name: np.maximum(latent @ m + 0.3 * draw.normal(size=(count, m.shape[1])), 0) for name, m in zip(names, maps)}
    return features, labels


def needs_cca_zoo():
    pytest.importorskip("cca_zoo", reason="needs cca-zoo (requirements-baselines.txt)")


def unit_codes(rows, dim, seed=0):
    """Unit codes (rows, dim) of both modalities in float64."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(rows, dim, generator=draw, dtype=torch.float64), dim=1) for _ in range(2))


def standard(rows):
    """Columns of rows (n, d) with mean 0 and variance 1."""
    return (rows - rows.mean(0)) / rows.std(0)


def context_of(name, features, labels=None, dtype=torch.float32, **changes):
    """The context of a method of the table on features (N, d), as a runner would make it, with changes to fields and settings."""
    method = METHODS[name].load()
    training = getattr(method, "training_defaults", None)
    settings = {**method.defaults, **changes.pop("settings", {})}
    fields = {
        "modalities": tuple(features), "dim": method.dim if training is None else training.dim, "seed": 0, "device": CPU, "settings": settings,
        "batch_size": 64, "epochs": 12, "num_clusters": CLASSES, "labels": None if labels is None else torch.as_tensor(labels),
        "features": {key: torch.as_tensor(rows, dtype=dtype) for key, rows in features.items()},
    }
    return Context(**{**fields, **changes})


def encoders_of(context):
    return nn.ModuleDict({
        name: nn.Sequential(nn.Linear(rows.shape[1], 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, context.dim), nn.BatchNorm1d(context.dim))
        for name, rows in context.features.items()
    })


def embed(encoders, features):
    encoders.eval()
    with torch.no_grad():
        found = {name: encoders[name](torch.as_tensor(rows, dtype=torch.float32)) for name, rows in features.items()}
    encoders.train()
    return found


def train(method: Method, encoders, learning_rate=1e-3):
    """Train as a learner does: shuffled full batches, one optimiser, the method's hooks."""
    context = method.context
    optimizer = torch.optim.Adam([*encoders.parameters(), *method.parameters()], lr=learning_rate)
    for epoch in range(1, context.epochs + 1):
        method.train()
        method.start_epoch(epoch, lambda: embed(encoders, context.features))
        for index in torch.randperm(len(context.features[context.modalities[0]])).split(context.batch_size):
            if len(index) < context.batch_size:
                continue
            embeddings = {name: encoders[name](rows[index]) for name, rows in context.features.items()}
            loss = method(index, embeddings, epoch)
            assert loss.shape == () and torch.isfinite(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step(index, {name: rows.detach() for name, rows in embeddings.items()}, epoch)
    method.eval()
    method.finish(lambda: embed(encoders, context.features))


def retrieval(codes, labels):
    """Mean mAP of both directions from modality -> codes (n, L)."""
    first, second = codes.values()
    return (mean_average_precision(first, labels, second, labels) + mean_average_precision(second, labels, first, labels)) / 2


def cos(a, b):
    """Cosine of two vectors, in plain steps."""
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def cosines(left, right):
    return np.array([[cos(a, b) for b in right] for a in left])


def mse(left, right):
    return float(np.mean((np.asarray(left) - np.asarray(right)) ** 2))
