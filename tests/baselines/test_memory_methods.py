"""UCCH's losses and memory against slow loops in float64, and the rounds of PT-FUCH."""

import copy

import numpy as np
import pytest
import torch
from compared import CLASSES, NAMES, context_of, cos, cosines, mse, pairs, unit_codes
from torch import nn
from torch.nn import functional as F

from baselines.pt_fuch import PTFUCH, Client, Networks, average, batches, distillation, prototype_loss, split
from baselines.ucch import DEFAULTS, UCCH, UnifiedContrast, random_memory, signs
from models.build import build_encoders
from utils.errors import UserError
from utils.settings.data_options import DataConfig
from utils.settings.options import ModelConfig

FEATURES, _ = pairs(60)
INDEX = torch.tensor([3, 17, 41, 8, 59, 22])


def contrast(rows=9, dim=5, **settings):
    memory = F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    return UnifiedContrast(memory, {**DEFAULTS, **settings})


def test_ucch_contrast_against_a_slow_loop(monkeypatch):
    loss, codes, index = contrast(), unit_codes(3, 5, seed=1), torch.tensor([4, 0, 7])
    drawn = torch.tensor([1, 4, 4, 8, 0, 2, 2, 6])  # own rows of samples 0 and 1 among them, some drawn twice
    asked = []
    monkeypatch.setattr(torch, "randint", lambda rows, size, **k: asked.append((rows, *size)) or drawn)
    keys = np.where(loss.memory.numpy() < 0, -1, 1) / np.sqrt(5)
    wanted = 0.0
    for code in codes:
        for row, i in zip(code.numpy(), index.tolist()):
            positive = np.exp(row @ keys[i] / 0.9)
            wanted -= np.log(positive / (positive + sum(np.exp(row @ keys[j] / 0.9) for j in drawn.tolist() if j != i))) / 3
    assert loss.contrastive(index, codes, warm_up=False).item() == pytest.approx(wanted, rel=1e-9)
    contrast(negatives=4).contrastive(index, codes, warm_up=False)
    assert asked == [(9, 8), (9, 4)]  # at most all but the own one


def test_ucch_warm_up_uses_the_keys_of_the_batch():
    loss, codes = contrast(), unit_codes(3, 5, seed=1)
    keys = np.where(sum(code.numpy() for code in codes) < 0, -1, 1) / np.sqrt(5)
    wanted = 0.0
    for code in codes:
        scores = np.exp(code.numpy() @ keys.T / 0.9)
        wanted -= np.log(np.diag(scores) / scores.sum(1)).mean()
    assert loss.contrastive(torch.tensor([4, 0, 7]), codes, warm_up=True).item() == pytest.approx(wanted, rel=1e-9)


def test_ucch_ranking_loss():
    loss, (x, y) = contrast(margin=0.2, smoothing=0.7, shift=0.5), unit_codes(5, 5, seed=1)
    similarity = (x @ y.T).numpy()
    wanted = 0.0
    for i in range(5):
        kept = [s if s >= similarity[i, i] - 0.2 else s - 0.5 for s in similarity[i]]
        wanted += (0.2 + 0.7 * np.log(sum(np.exp(s / 0.7) for s in kept)) - similarity[i, i]) / 5
    assert loss.ranking(x @ y.T).item() == pytest.approx(wanted, rel=1e-9)
    wide = contrast(margin=100.0)  # every pair within the margin: plain softmax ranking
    assert wide.ranking(x @ y.T).item() == pytest.approx(100 + F.cross_entropy(x @ y.T, torch.arange(5)).item(), rel=1e-9)


def test_ucch_memory():
    method = UCCH(context_of("ucch", FEATURES, dim=16, batch_size=6))
    start = method.memory.clone()
    assert torch.allclose(start.norm(dim=1), torch.ones(60)) and start.abs().unique().tolist() == [0.25]
    embeddings = {name: torch.randn(6, 16, requires_grad=True) for name in NAMES}
    loss = method(INDEX, embeddings, 2)
    loss.backward()
    assert torch.equal(method.memory, start) and not method.memory.requires_grad and list(method.parameters()) == []
    method.after_step(INDEX, {name: rows.detach() for name, rows in embeddings.items()}, 2)
    x, y = (F.normalize(torch.tanh(rows.detach()), dim=1) for rows in embeddings.values())
    assert torch.allclose(method.memory[INDEX], F.normalize(0.4 * start[INDEX] + 0.6 * (x + y) / 2, dim=1), atol=1e-6)
    untouched = [i for i in range(60) if i not in INDEX.tolist()]
    assert torch.equal(method.memory[untouched], start[untouched])
    assert torch.allclose(method.memory.norm(dim=1), torch.ones(60))
    both = [method(INDEX, embeddings, 2).item() for _ in range(2)]
    assert np.isfinite(both).all() and both[0] != both[1]  # 59 negatives drawn anew
    assert method(INDEX, embeddings, 1).item() == method(INDEX, embeddings, 1).item()  # none in the warm-up


def test_both_terms_of_ucch_count():
    loss, codes, index = contrast(), unit_codes(3, 5, seed=1), torch.tensor([4, 0, 7])
    for beta, active in ((1.0, "contrastive"), (0.0, "ranking")):
        only = contrast(beta=beta).loss(index, codes, warm_up=True)
        similarity = codes[0] @ codes[1].T
        parts = {"contrastive": loss.contrastive(index, codes, True), "ranking": loss.ranking(similarity) + loss.ranking(similarity.T)}
        assert only.item() == pytest.approx(parts[active].item(), rel=1e-9)
    assert signs(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [-1, 1, 1]


def test_prototype_and_distillation_losses():
    draw = torch.Generator().manual_seed(0)
    outputs = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2)]
    teacher = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2)]
    centres = torch.randn(5, 3, generator=draw, dtype=torch.float64)
    softmax = lambda v: np.exp(v) / np.exp(v).sum()
    wanted = 0.0
    for i in range(4):
        scores = [np.array([cos(phi[i].numpy(), c) for c in centres.numpy()]) for phi in outputs]
        target = sum(softmax(s / 0.81) for s in scores) / 2
        wanted += sum((target * np.log(target / softmax(s / 0.26))).sum() for s in scores) / 2 / 4
    assert prototype_loss(outputs, centres).item() == pytest.approx(wanted, rel=1e-9)
    parts = [[cosines(a.numpy(), b.numpy()) for a in pair for b in pair] for pair in (outputs, teacher)]
    assert distillation(outputs, teacher).item() == pytest.approx(sum(mse(a, b) for a, b in zip(*parts)), rel=1e-9)


def test_the_private_loss_divides_by_a_constant():
    rows = [torch.randn(12, 6), torch.randn(12, 7)]
    server = nn.ModuleList([nn.Linear(6, 4), nn.Linear(7, 4)])
    memories = [random_memory(12, 4, torch.Generator().manual_seed(i)) for i in range(2)]
    client = Client(server, rows, 3, {**PTFUCH.defaults, "private_epochs": 1, "global_epochs": 0}, memories)
    client.train_round(server, None, seed=0)
    index = torch.arange(12)
    outputs = [encoder(part).detach().requires_grad_() for encoder, part in zip(client.private.encoders, rows)]
    off = 0.001 * F.one_hot(client.ids, 3)
    clustering = sum(F.cross_entropy(phi @ client.prototypes.T - off, client.ids) for phi in outputs)
    taught = distillation([torch.tanh(phi) for phi in outputs], client.teacher)
    wanted = torch.autograd.grad(clustering + taught / max(clustering.item(), 0.01), outputs)
    found = torch.autograd.grad(client.private_loss(index, outputs), outputs)
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted))


def test_rounds_share_global_weights_and_keep_private_ones():
    torch.manual_seed(0)
    rows = [torch.as_tensor(FEATURES[name], dtype=torch.float32) for name in NAMES]
    server = nn.ModuleList([nn.Linear(part.shape[1], 8) for part in rows])
    before = copy.deepcopy(server.state_dict())
    memories = [random_memory(60, 8, torch.Generator().manual_seed(i)) for i in range(2)]
    client = Client(server, rows, 4, {**PTFUCH.defaults, "private_epochs": 1, "global_epochs": 1, "learning_rate": 1e-2}, memories)
    client.train_round(server, None, seed=0)
    assert all(torch.equal(server.state_dict()[key], value) for key, value in before.items())  # the server averages, clients do not write
    private = copy.deepcopy(client.private.encoders.state_dict())
    assert any(not torch.equal(private[key], before[key]) for key in before)
    assert any(not torch.equal(client.shared.encoders.state_dict()[key], before[key]) for key in before)
    client.settings = {**client.settings, "private_epochs": 0, "global_epochs": 0}
    client.train_round(server, client.prototypes, seed=1)
    assert all(torch.equal(client.shared.encoders.state_dict()[key], value) for key, value in before.items())
    assert all(torch.equal(client.private.encoders.state_dict()[key], value) for key, value in private.items())


def test_networks_train_on_both_terms_and_remember():
    rows, terms, seen = [torch.randn(12, 6), torch.randn(12, 7)], [torch.zeros((), requires_grad=True) for _ in range(2)], []
    networks = Networks(nn.ModuleList([nn.Linear(6, 4), nn.Linear(7, 4)]), torch.zeros(12, 4), PTFUCH.defaults)
    networks.contrast.loss = lambda index, codes, warm_up: seen.append(warm_up) or terms[0]
    networks.contrast.update = lambda index, codes: seen.append((index, codes))
    for _ in range(2):
        networks.train_epoch(rows, lambda index, outputs: terms[1])
    assert seen[::2] == [True, False] and [term.grad for term in terms] == [2, 2]
    for index, codes in seen[1::2]:
        wanted = [F.normalize(encoder(part[index]).tanh(), dim=1) for encoder, part in zip(networks.encoders, rows)]
        assert len(index) == 12 and all(torch.equal(*both) for both in zip(codes, wanted))
    assert networks.optimizer.defaults["lr"] == 1e-4 and networks.optimizer.defaults["weight_decay"] == 1e-6
    networks.train_epoch(rows, lambda index, outputs: 1e6 * sum(phi.square().sum() for phi in outputs))
    assert sum(part.grad.square().sum() for part in networks.encoders.parameters()).sqrt().item() == pytest.approx(1)  # the clip


@pytest.mark.parametrize("scale,problem", [(1.0, None), (1e38, "outputs are not finite")])
def test_rows_of_zeros_cluster_and_rows_that_overflow_are_named(scale, problem):
    rows = [torch.randn(12, 6) * scale, torch.randn(12, 7) * scale]
    rows[0][::3], rows[1][::3] = 0, 0
    server = nn.ModuleList([nn.Linear(6, 4, bias=False), nn.Linear(7, 4, bias=False)])
    client = Client(server, rows, 3, PTFUCH.defaults, [torch.zeros(12, 4)] * 2)
    if problem:
        nn.init.constant_(client.private.encoders[0].weight, 9)
        with pytest.raises(UserError, match=problem):
            client._cluster(0)
    else:
        client._cluster(0)
        assert len(client.ids[::3].unique()) == 1 and client.prototypes.isfinite().all()


def test_what_a_client_trains_on(monkeypatch):
    rows, trained = [torch.randn(12, 6), torch.randn(12, 7)], []
    first, server = (nn.ModuleList([nn.Linear(6, 4), nn.Linear(7, 4)]) for _ in range(2))
    monkeypatch.setattr(Networks, "train_epoch", lambda self, rows, further: trained.append((self, further)))
    client = Client(first, rows, 3, {**PTFUCH.defaults, "private_epochs": 1, "global_epochs": 1}, [torch.zeros(12, 4)] * 2)
    outputs, centres = [torch.randn(5, 4) for _ in rows], torch.randn(3, 4)
    for known in (None, centres):
        client.train_round(server, known, seed=0)
        (private, private_loss), (shared, shared_loss) = trained[-2:]
        assert private is client.private and private_loss == client.private_loss and shared is client.shared
        wanted = sum(prototype_loss(outputs, c) for c in (client.prototypes, client.prototypes if known is None else known))
        assert shared_loss(torch.arange(5), outputs).item() == pytest.approx(wanted.item())
        assert all(torch.equal(codes, encoder(part).tanh()) for codes, encoder, part in zip(client.teacher, server, rows))


def test_the_server_weighs_clients_by_their_rows():
    states = [{"w": torch.tensor([1.0, 5.0]), "n": torch.tensor(3)}, {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(9)}]
    mean = average(states, [10, 20])
    assert torch.allclose(mean["w"], torch.tensor([3.0, 3.0])) and int(mean["n"]) == 3
    assert all(torch.equal(average(states[:1], [7])[key], value) for key, value in states[0].items())


def test_clients_get_skewed_shares_of_every_sample_once():
    labels = np.repeat(np.arange(6), 200)
    parts = split(labels, 10, 0.1, seed=0)
    assert len(parts) == 10 and sorted(np.concatenate(parts).tolist()) == list(range(1200))
    largest = [max((labels[part] == label).sum() for part in parts) / 200 for label in range(6)]
    assert np.mean(largest) > 0.4  # an even split has 0.1
    assert all(len(a) == len(b) and (a == b).all() for a, b in zip(parts, split(labels, 10, 0.1, seed=0)))


def test_several_clients_learn_one_pair_of_networks(monkeypatch):
    features, _ = pairs(200)
    told, train = [], Client.train_round
    monkeypatch.setattr(Client, "train_round", lambda self, server, known, seed: told.append(known) or train(self, server, known, seed))
    settings = {"rounds": 2, "private_epochs": 1, "global_epochs": 1, "clients": 3, "batch_size": 32}
    found = []
    for _ in range(2):
        method = PTFUCH()
        method.fit(features, context_of("pt_fuch", features, dim=8, settings=settings))
        found.append(method.transform("PointCloud", features["PointCloud"][:9]))
    built = build_encoders(DataConfig(modalities=NAMES, features={name: rows.shape[1] for name, rows in features.items()}), ModelConfig(embedding_dim=8))
    assert [str(encoder) for encoder in method.server] == [str(encoder) for encoder in built.values()]  # of all other methods
    assert found[0].shape == (9, 8) and np.array_equal(*found)
    assert np.allclose(found[0], method.server[1](torch.as_tensor(features["PointCloud"][:9], dtype=torch.float32)).tanh().detach(), atol=1e-6)
    assert told[0] is None and told[-1].shape == (CLASSES, 8)
    few, _ = pairs(20)
    with pytest.raises(UserError, match="none of 3 clients has 32 of the 20 pairs"):
        PTFUCH().fit(few, context_of("pt_fuch", few, dim=8, settings=settings))
    assert [len(index) for index in batches(70, 32, torch.device("cpu"))] == [32, 32]
    assert [len(index) for index in batches(20, 32, torch.device("cpu"))] == [20]
