"""The departures of the authors' code, one by one: labels, pairs, loss, memory, selection."""

import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN
from stage_runs import REPOSITORY, smoke_samples
from torch.nn import functional as F

from baselines.departures import BatchClippedLoss, ReleasePLA, ReleaseRDL, class_pair_order, farthest_labels, pair_by_class, pair_shares
from baselines.release_protocol import departures_of, scores_of
from baselines.true_labels import true_labels
from datasets.label_runs import PseudoLabels
from utils.errors import UserError
from utils.evaluation.clustering import clustering_accuracy
from utils.settings.config import load_config
from utils.settings.options import Step2Config

CPU = torch.device("cpu")
SMOKE = REPOSITORY / "configs/smoke"


def step1(root: Path, *overrides: str):
    """Smoke settings of step 1, its samples and their ground truth."""
    config, samples = smoke_samples(root, *overrides)
    return config, samples, true_labels(config.data, samples)


def test_farthest_labels_equal_a_slow_loop():
    rows = {name: F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(i)).double(), dim=1)
            for i, name in enumerate("AB")}
    labels = {"A": torch.arange(30) % 4, "B": torch.arange(30) % 7}  # rows of other classes, as the published lists have
    chosen = farthest_labels(rows, labels)
    for own, other in (("A", "B"), ("B", "A")):
        for i in range(30):
            distances = [1 - float(rows[own][i] @ rows[other][r]) for r in range(30)]
            assert chosen[own][i] == labels[own][int(np.argmax(distances))]


def test_the_exported_labels_are_ground_truth_of_the_farthest_sample_in_the_best_epoch(small_digits):
    config, samples, labels = step1(small_digits)
    learner, found = ReleasePLA(config, samples, CPU, departures_of("oracle_labels"), labels), []
    for epoch in (1, 2):
        row = learner.train_epoch(epoch)
        rows = {name: features.embeddings for name, features in learner.describe().items()}
        similarity = rows["GrayImg"] @ rows["PointCloud"].T
        wanted = {"GrayImg": labels["GrayImg"][similarity.argmin(1)], "PointCloud": labels["PointCloud"][similarity.argmin(0)]}
        found.append((sum(clustering_accuracy(wanted[name], labels[name]) for name in wanted) / 2, wanted))
        assert row["oracle_accuracy"] == pytest.approx(found[-1][0])
    accuracy, wanted = max(found, key=lambda entry: entry[0])  # the earlier one of equals
    again = ReleasePLA(config, samples, CPU, departures_of("oracle_labels"), labels)
    again.load_state_dict(learner.state_dict())
    for trained in (learner, again):
        assert trained.kept[0] == pytest.approx(accuracy)
        exported = trained.annotate().ids
        assert exported.keys() == wanted.keys() and all(torch.equal(exported[name], wanted[name]) for name in wanted)
    again.kept = better = (2.0, {})
    again.train_epoch(3)
    assert again.kept is better


def test_pairs_have_the_shares_of_the_published_lists():
    labels = np.random.default_rng(1).choice(10, size=5000, p=np.arange(5, 15) / 95)
    order = class_pair_order(labels, seed=3)
    assert np.array_equal(np.sort(order), np.arange(5000))
    assert (order == np.arange(5000)).sum() == 302
    assert (labels[order] != labels).sum() == 182
    assert ((labels[order] == labels) & (order != np.arange(5000))).sum() == 4516
    assert np.array_equal(order, class_pair_order(labels, seed=3))
    assert not np.array_equal(order, class_pair_order(labels, seed=4))


@pytest.mark.parametrize("labels,crossing", [([0, 1], 2), ([0] * 30 + [1], 2), ([0] * 60 + [1] * 60, 4), (list(range(100)), 4)])
def test_pairs_of_few_or_lonely_classes(labels, crossing):
    labels = np.array(labels)
    order = class_pair_order(labels, seed=0)
    assert np.array_equal(np.sort(order), np.arange(len(labels))) and (labels[order] != labels).sum() == crossing
    for few in ([2] * 40, [0] * 300 + [1]):
        with pytest.raises(UserError, match="use more classes"):
            class_pair_order(np.array(few), seed=0)


def test_samples_files_and_labels_move_together(small_digits):
    _, samples, labels = step1(small_digits)
    paired, truth = pair_by_class(samples, labels, seed=0)
    assert paired.lists["GrayImg"] is samples.lists["GrayImg"]
    assert torch.equal(paired.arrays["GrayImg"], samples.arrays["GrayImg"])
    before, after = samples.lists["PointCloud"], paired.lists["PointCloud"]
    assert sorted(after.names) == sorted(before.names) and after.names != before.names
    order = [before.names.index(name) for name in after.names]
    for field in ("files", "instance_ids"):
        assert list(getattr(after, field)) == [getattr(before, field)[row] for row in order]
    assert torch.equal(paired.arrays["PointCloud"], samples.arrays["PointCloud"][order])
    assert torch.equal(truth["PointCloud"], labels["PointCloud"][order])
    same = [one == two for one, two in zip(paired.lists["GrayImg"].instance_ids, after.instance_ids)]
    other = (truth["GrayImg"] != truth["PointCloud"]).tolist()
    assert pair_shares(paired, truth) == pytest.approx({
        "same_instance": sum(same) / TRAIN, "other_class": 2 / TRAIN, "other_instance_same_class": 1 - (sum(same) + 2) / TRAIN})
    assert sum(other) == 2 and 0.05 <= sum(same) / TRAIN < 0.2
    assert pair_shares(samples, labels) == {"same_instance": 1.0, "other_instance_same_class": 0.0, "other_class": 0.0}
    with pytest.raises(ValueError, match="2D and 3D"):
        pair_by_class(*step1(small_digits, "data.modalities=[RGBImg,GrayImg]")[1:], seed=0)


def loop_loss(logits, labels, alpha):
    """The authors' loss from its description, entry by entry in plain Python."""
    size, above, below = len(logits), [], []
    for row, label in zip(logits.tolist(), labels.tolist()):
        total = sum(math.exp(value) for value in row)
        probs = [math.exp(value) / total for value in row]
        for prob in probs:
            if prob > 1 / size:
                above.append((-math.log(probs[label])) ** alpha * (1 - probs[label]))
            else:
                below.append((-math.log(1 / size)) ** alpha * (1 - 1 / size))
    return (sum(above) / len(above) if above else 0) + (sum(below) / len(below) if below else 0)


@pytest.mark.parametrize("size,classes,scale", [(8, 5, 1), (8, 5, 4), (50, 10, 2), (3, 7, 0.1), (64, 15, 3)])
def test_batch_clipped_loss_equals_the_loop_and_its_gradient(size, classes, scale):
    generator = torch.Generator().manual_seed(size)
    logits = (scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(classes, (size,), generator=generator)
    loss = BatchClippedLoss(0.3)(logits, labels)
    assert loss.item() == pytest.approx(loop_loss(logits, labels, 0.3), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    for place in ((0, 0), (size - 1, classes - 1), (1, int(labels[1]))):
        moved = [logits.detach().clone() for _ in range(2)]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        slope = (loop_loss(moved[0], labels, 0.3) - loop_loss(moved[1], labels, 0.3)) / 2e-6
        assert float(gradient[place]) == pytest.approx(slope, abs=1e-7)


def test_batch_clipped_loss_at_its_ends():
    loss, labels = BatchClippedLoss(0.25), torch.tensor([0, 1])
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    uniform = torch.zeros(2, 5, requires_grad=True)  # every entry at or below 1 / B: the authors' mean of nothing
    for logits in (sure, uniform):
        value = loss(logits, labels)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(logits.grad).all()
    assert float(value) == pytest.approx(math.log(2) ** 0.25 / 2) and uniform.grad.eq(0).all()
    everything = torch.zeros(6, 2)  # and none of them
    assert float(loss(everything, torch.zeros(6, dtype=torch.long))) == pytest.approx(math.log(2) ** 0.25 / 2)


def test_step_2_uses_it_after_the_warm_up_and_for_rcll_alone(small_digits):
    config, samples, _ = step1(small_digits)
    labels = {name: torch.arange(TRAIN) % 6 for name in samples.lists}
    build = lambda *more: ReleaseRDL(
        load_config(Step2Config, str(SMOKE / "step2.yaml"), [f"data.root={small_digits}", *more]), samples,
        PseudoLabels(labels, None, 6, {}, {}), CPU, departures_of("batch_clip"))
    learner = build("rdl.unclipped_epochs=1")
    used = []
    for epoch in (1, 2):
        learner.train_epoch(epoch)
        used.append(type(learner.loss).__name__)
    assert used == ["RobustConcentratingLoss", "BatchClippedLoss"] and learner.loss.alpha == 0.3
    with pytest.raises(ValueError, match="rdl.loss is 'ce'"):
        build("rdl.loss=ce")


def test_bank_rows_come_in_another_order_for_each_modality(small_digits):
    config, samples, labels = step1(small_digits)
    right, wrong = (ReleasePLA(config, samples, CPU, departures_of(name), {}) for name in ("ours", "shuffled_memory"))
    wrong.load_state_dict(right.state_dict())
    orders = {}
    for learner in (right, wrong):
        learner.cluster(2)
    for name, bank in wrong.banks.items():
        reference = right.banks[name].memory
        orders[name] = torch.cdist(bank.memory, reference).argmin(dim=1)
        assert torch.equal(bank.memory, reference[orders[name]]) and not torch.equal(bank.memory, reference)
        assert torch.equal(orders[name].sort().values, torch.arange(TRAIN))
        assert (orders[name] == torch.arange(TRAIN)).float().mean() < 0.25
        assert torch.equal(wrong.classifiers[name].weight, right.classifiers[name].weight)  # the clustering is the same
    assert not torch.equal(*orders.values())


@pytest.mark.parametrize("variant,score,words", [("ours", 0.5, "last epoch"), ("all", 0.6, "best epoch by test score (3 of 4)")])
def test_selection_of_hand_written_scores(variant, score, words):
    rows = [{"epoch": 1}, *({"epoch": epoch, "map/avg": value, "loss/mlm": 1.0} for epoch, value in ((2, 0.4), (3, 0.6), (4, 0.5)))]
    run = types.SimpleNamespace(read_epochs=lambda: rows)
    scores = scores_of(run, departures_of(variant))
    assert scores == {"map/avg": score, "selection": words, "last_epoch": {"map/avg": 0.5}}
