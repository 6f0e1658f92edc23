"""Every method of the table learns: on synthetic pairs it retrieves far above chance and above its untrained state."""

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
