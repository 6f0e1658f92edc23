"""Every method of the table learns: on synthetic pairs it retrieves far above chance and above its untrained state."""

import dataclasses

import pytest
import torch
from compared import CLASSES, context_of, embed, encoders_of, needs_cca_zoo, pairs, retrieval, train

from baselines import METHODS, revgrad, scl
from baselines.method import ShallowMethod

TRAIN, TEST = 256, 150
SHORT = {
    "pt_fuch": {"rounds": 2, "private_epochs": 2, "global_epochs": 3, "batch_size": 64, "learning_rate": 1e-3},
    "meda": {"rounds": 3}, "meda_oracle": {"rounds": 3},
}
NEEDS_CCA_ZOO = {"cca", "kcca", "mcca", "dcca", "dccae", "meda", "meda_oracle"}


def adam(dim, batch, epochs, rate, decay=0.0, betas=(0.9, 0.999), schedule="constant", clip=None):
    return dim, batch, epochs, "adam", rate, decay, betas, False, schedule, clip


def sgd(batch, rate, nesterov=False):
    return 256, batch, 70, "sgd", rate, 5e-4, (0.9, 0.999), nesterov, "constant", None


CONTRAST = {"beta": 0.9, "memory": 0.4, "temperature": 0.9, "negatives": 4096, "margin": 0.2, "smoothing": 1, "shift": 1}
PUBLISHED = {  # training, or the width alone of a method without a learner's; its options
    "cca": (128, {"ridge": 1e-3}),
    "kcca": (128, {"kernel": "rbf", "landmarks": 1000, "ridge": 0.1}),
    "mcca": (128, {"ridge": 1e-3}),
    "dcca": (adam(64, 1024, 100, 1e-3), {"ridge": 1e-3}),
    "dccae": (adam(64, 1024, 100, 1e-3), {"ridge": 1e-3, "reconstruction": 1e-3, "hidden": 1024}),
    "revgrad": (sgd(50, 1e-2, nesterov=True), {"source": "labels", "transfer": True, "temperature": 0.22}),
    "meda": (128, {"ridge": 1e-3, "subspace": 20, "neighbours": 10, "lam": 10, "eta": 0.1, "rho": 1, "rounds": 10, "tau": 1, "pairs": 2500, "map": True}),
    "djsrh": (sgd(32, 1e-2), {"mu": 1.5, "eta": 0.4, "beta": 0.5, "intra": 0.1, "similarity": "rescaled"}),
    "jdsh": (sgd(32, 1e-2), {
        "first": 0.4, "second": 0.3, "joint": 0.3, "mu": 1.4, "intra": 0.1, "left": 0.1, "right": 0.2, "similarity": "rescaled", "batches": 50,
        "left_share": 0.05, "right_share": 0.95, "low_share": 1e-3, "high_share": 0.999,
    }),
    "dgcpn": (sgd(32, 5e-3), {
        "second": 0.5, "coherence": 0.3, "neighbours": 0.4, "kappa": 1.5, "graph_weight": 1, "consistency_weight": 1, "similarity": "rescaled",
        "scale": 2,
    }),
    "ucch": (adam(256, 256, 70, 1e-4, 1e-6, clip=1), CONTRAST),
    "scl": (adam(512, 256, 200, 1e-4, betas=(0.5, 0.999)), {"alpha": 10, "beta": 0.01, "gamma": 1, "temperature": 0.5, "dropout": 0.5, "critic_width": 64}),
    "pt_fuch": (256, CONTRAST | {
        "rounds": 20, "private_epochs": 5, "global_epochs": 5, "clients": 1, "batch_size": 256, "learning_rate": 1e-4, "dirichlet": 0.1,
        "smallest_client": 32,
    }),
    "cfrh": (sgd(32, 1e-2), {
        "first": 0.4, "second": 0.3, "fused": 0.3, "mu": 1.5, "intra": 0.1, "reconstruction": 0.01, "similarity": "rescaled", "hidden": 1024,
    }),
    "rono": (adam(256, 128, 50, 1e-4, 1e-5), {
        "rdc": 1, "mg": 1, "crc": 1, "theta": 0.3, "a": 0.05, "warmup": 0.5, "vanilla": False, "temperature": 0.22,
    }),
    "mrl": (adam(256, 128, 100, 1e-4, betas=(0.5, 0.999), schedule="cosine"), {"beta": 0.5, "tau1": 1, "tau2": 1}),
}


@pytest.mark.parametrize("name", [*PUBLISHED, "revgrad_oracle", "meda_oracle"])
def test_the_defaults_are_the_published_ones(name):
    method = METHODS[name].load()
    training = method.dim if issubclass(method, ShallowMethod) else dataclasses.astuple(method.training_defaults)
    assert (training, method.defaults) == PUBLISHED[name.removesuffix("_oracle")]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_to_retrieve(name, monkeypatch):
    monkeypatch.setattr(revgrad, "DISCRIMINATOR_WIDTH", 64)
    monkeypatch.setattr(scl, "CRITIC_INPUT", 64)
    if name in NEEDS_CCA_ZOO:
        needs_cca_zoo()
    features, labels = pairs(TRAIN)
    unseen, truth = pairs(TEST, seed=1)
    given = labels if METHODS[name].labels in ("noisy labels", "source labels") else None
    context = context_of(name, features, given, dim=16, settings=SHORT.get(name, {}))
    torch.manual_seed(0)
    if issubclass(METHODS[name].load(), ShallowMethod):
        method = METHODS[name].load()()
        method.fit(features, context)
        after, before = retrieval({key: method.transform(key, rows) for key, rows in unseen.items()}, truth), 1 / CLASSES
    else:
        method, encoders = METHODS[name].load()(context), encoders_of(context)
        before = retrieval(embed(encoders, unseen), truth)
        train(method, encoders)
        after = retrieval({key: method.represent(key, rows) for key, rows in embed(encoders, unseen).items()}, truth)
    assert before < 0.4 and after > before + 0.2 and after > 0.5
