"""The departures of the authors' code: each does what it says, and without any both stages are the real ones, bit for bit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, write_lists
from stage_runs import REPOSITORY, assert_same_result, labels_of, log_lines, only_run, settings, weights
from torch.nn import functional as F

import train_step1
import train_step2
import training
from baselines.release_protocol import protocol
from baselines.release_protocol.__main__ import main
from baselines.release_protocol.labels import class_count, farthest_labels, training_labels
from baselines.release_protocol.learners import KeptLabels, ReleasePLA, ReleaseRDL
from baselines.release_protocol.loss import BatchClippedLoss
from baselines.release_protocol.pairs import class_pair_order, pair_by_class, pair_shares
from baselines.release_protocol.variants import VARIANTS, Departures, departures_of
from datasets.label_runs import PseudoLabels
from datasets.pseudo_labels import read_pseudo_labels
from datasets.samples import load_training_samples
from utils.errors import UserError
from utils.evaluation.clustering import clustering_accuracy
from utils.settings.config import load_config
from utils.settings.options import Step1Config, Step2Config

CPU = torch.device("cpu")
SMOKE = REPOSITORY / "configs/smoke"


def command(root: Path, out: Path, variant: str, *more: str) -> list[str]:
    short = [f"data.root={root}", "optim.epochs=2"]
    return ["--config-dir", str(SMOKE), "--variant", variant, "--output", str(out), "--device", "cpu", "--threads", "1",
            "--set1", *short, "--set2", *short, *more]


def step1(root: Path, *overrides: str):
    """Smoke settings of step 1, its samples and their ground truth."""
    config = load_config(Step1Config, str(SMOKE / "step1.yaml"), [f"data.root={root}", *overrides])
    samples = load_training_samples(config.data, CPU)
    return config, samples, training_labels(config.data, samples)


class Trained:
    """Output folders of the variants, each trained when first asked for, and the samples that training and tests saw.

    `ours` is trained on lists without labels, and stopped between its stages once.
    """

    def __init__(self, root: Path, labels: list[int], out: Path) -> None:
        self.root, self.labels, self.out = root, labels, out
        self.trained_on, self.tested_on = {}, {}

    def __call__(self, variant: str) -> Path:
        if variant not in self.trained_on:
            write_lists(self.root, "train", [None] * TRAIN if variant == "ours" else self.labels[:TRAIN])
            write_lists(self.root, "test", self.labels[TRAIN:])
            with pytest.MonkeyPatch.context() as patch:
                self._record(patch, variant)
                if variant == "ours":
                    self._stop_between_the_stages()
                main(command(self.root, self.out / variant, variant))
            write_lists(self.root, "train", self.labels[:TRAIN])
        return self.out / variant

    def _record(self, patch: pytest.MonkeyPatch, variant: str) -> None:
        self.trained_on[variant], self.tested_on[variant] = [], []
        for name in ("ReleasePLA", "ReleaseRDL"):
            real = getattr(protocol, name)
            patch.setattr(protocol, name, lambda config, samples, *more, real=real: (
                self.trained_on[variant].append(samples) or real(config, samples, *more)))
        load = training.load_test_samples
        patch.setattr(training, "load_test_samples", lambda *given: (
            self.tested_on[variant].append(load(*given)) or self.tested_on[variant][-1]))

    def _stop_between_the_stages(self) -> None:
        def stop(*_):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(protocol, "load_pseudo_labels", stop)
            main(command(self.root, self.out / "ours", "ours"))
        self.first_checkpoint = (only_run(self.out / "ours", 1) / "last.pt").stat().st_mtime_ns


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _digits_folder) -> Trained:
    return Trained(*_digits_folder, tmp_path_factory.mktemp("variants"))


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_list_prints_every_variant_on_one_line(capsys):
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(VARIANTS)
    assert all(len(line.split()) > 4 for line in lines)


def test_each_variant_switches_on_its_own_departure_alone():
    single = set(VARIANTS) - {"ours", "all"}
    assert {name for name in vars(Departures())} == single
    for name in single:
        assert [key for key, value in vars(departures_of(name)).items() if value] == [name]
    assert departures_of("ours") == Departures() and all(vars(departures_of("all")).values())
    assert not departures_of("test_selection").reads_labels and departures_of("class_pairs").reads_labels
    with pytest.raises(ValueError, match="unknown variant 'al'"):
        departures_of("al")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_says_what_it_did(trained, variant):
    metrics = metrics_of(trained(variant))
    assert {"variant", "seed", "map/GP", "map/PG", "map/avg", "selection", "command", "commit", "dirty", "device",
            "train_seconds"} <= metrics.keys()
    assert metrics["variant"] == variant and metrics["seed"] == 0 and metrics["train_seconds"] > 0
    assert metrics["map/avg"] == pytest.approx((metrics["map/GP"] + metrics["map/PG"]) / 2)
    assert metrics["command"].startswith("python -m baselines.release_protocol ")
    assert f"--variant {variant} " in metrics["command"]
    assert ("pairs" in metrics["details"]) == (variant in ("class_pairs", "all"))
    assert ("pseudo_label_accuracy" in metrics["details"]) == (variant in ("oracle_labels", "all"))


def test_without_departures_both_stages_are_the_real_ones_bit_for_bit(trained, small_digits, tmp_path):
    """Though `ours` was trained without any training label, in two sittings."""
    train_step1.main(settings(small_digits, tmp_path, 1, "optim.epochs=2"))
    train_step2.main(settings(small_digits, tmp_path, 2, "optim.epochs=2"))
    for step in (1, 2):
        assert_same_result(tmp_path, trained("ours"), step)
    last = log_lines(only_run(tmp_path, 2))[-1]
    assert metrics_of(trained("ours"))["map/avg"] == last["map/avg"] and last["epoch"] == 2
    assert (only_run(trained("ours"), 1) / "last.pt").stat().st_mtime_ns == trained.first_checkpoint  # not trained again


@pytest.mark.parametrize("variant", ["oracle_labels", "class_pairs"])
def test_the_variants_made_of_labels_need_them(small_digits, tmp_path, variant):
    write_lists(small_digits, "train", [None] * TRAIN)
    with pytest.raises(ValueError, match="without a label"):
        main(command(small_digits, tmp_path, variant))


def test_no_run_of_a_variant_can_pass_as_one_of_the_real_trainers(trained):
    for variant in VARIANTS:
        assert not list(trained(variant).glob("runs/**/metrics.json"))
        (meta, _) = sorted(labels_of(trained(variant)).glob("*.meta.json"))
        assert json.loads(meta.read_text())["provenance"]["variant"] == f"baselines.release_protocol: {variant}"


def test_batch_clip_and_test_selection_leave_step_1_alone(trained):
    for variant in ("batch_clip", "test_selection"):
        assert_same_result(trained("ours"), trained(variant), 1)
    for variant in ("oracle_labels", "class_pairs", "shuffled_memory", "all"):
        one, two = weights(only_run(trained("ours"), 1)), weights(only_run(trained(variant), 1))
        same = all(torch.equal(one[key], two[key]) for key in one)
        assert same == (variant == "oracle_labels")  # the labels are exported, step 1 does not train on them


# oracle_labels


def test_farthest_labels_equal_a_slow_loop():
    rows = {name: F.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(i)).double(), dim=1)
            for i, name in enumerate("AB")}
    labels = {"A": torch.arange(30) % 4, "B": torch.arange(30) % 7}  # rows of other classes, as the published lists have
    chosen = farthest_labels(rows, labels)
    for own, other in (("A", "B"), ("B", "A")):
        for i in range(30):
            distances = [1 - float(rows[own][i] @ rows[other][r]) for r in range(30)]
            assert chosen[own][i] == labels[own][int(np.argmax(distances))]
    with pytest.raises(ValueError, match="as many samples"):
        farthest_labels({"A": rows["A"], "B": rows["B"][:9]}, labels)


def test_the_exported_labels_are_ground_truth_of_the_farthest_sample(small_digits):
    config, samples, labels = step1(small_digits)
    learner = ReleasePLA(config, samples, CPU, departures_of("oracle_labels"), labels)
    accuracies = {}
    for epoch in (1, 2):
        row = learner.train_epoch(epoch)
        rows = {name: features.embeddings for name, features in learner.describe().items()}
        similarity = rows["GrayImg"] @ rows["PointCloud"].T
        wanted = {"GrayImg": labels["GrayImg"][similarity.argmin(1)], "PointCloud": labels["PointCloud"][similarity.argmin(0)]}
        accuracies[epoch] = sum(clustering_accuracy(wanted[name], labels[name]) for name in wanted) / 2, wanted
        assert row["oracle_accuracy"] == pytest.approx(accuracies[epoch][0])
    best = accuracies[1] if accuracies[1][0] >= accuracies[2][0] else accuracies[2]
    exported = learner.annotate().ids
    assert float(learner.kept.accuracy) == pytest.approx(best[0])
    assert all(torch.equal(exported[name], best[1][name]) for name in exported)
    again = ReleasePLA(config, samples, CPU, departures_of("oracle_labels"), labels)
    again.load_state_dict(learner.state_dict())
    assert all(torch.equal(again.annotate().ids[name], exported[name]) for name in exported)


def test_oracle_labels_are_classes_and_step_2_uses_their_number(trained, small_digits):
    folder = trained("oracle_labels")
    _, samples, labels = step1(small_digits)
    for name, token in (("GrayImg", "GrayImgs"), ("PointCloud", "PointCloud")):
        path = labels_of(folder) / f"digits_{token}_train_list_pseudo_labelling.txt"
        values, num_clusters = read_pseudo_labels(path, samples.lists[name], dataset="digits")
        assert num_clusters == 10 and set(values) <= set(labels[name].tolist())
    assert weights(only_run(folder, 2))[".classifiers.GrayImg.3.bias"].shape == (10,)
    assert weights(only_run(trained("ours"), 2))[".classifiers.GrayImg.3.bias"].shape == (6,)


def test_only_a_better_epoch_is_kept():
    kept = KeptLabels(2, 3)
    for labels, accuracy in ((1, 0.5), (2, 0.5), (3, 0.7), (4, 0.6)):
        kept.offer(torch.full((2, 3), labels), accuracy)
    assert kept.labels.eq(3).all() and float(kept.accuracy) == 0.7


def test_class_count_without_a_configured_one(small_digits):
    config, _, _ = step1(small_digits, "data.num_classes=null")
    assert class_count(config.data, {"A": torch.tensor([0, 4]), "B": torch.tensor([1, 2])}) == 5


# class_pairs


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


@pytest.mark.parametrize("labels", [[2] * 40, [0] * 300 + [1]])
def test_pairs_need_enough_classes(labels):
    with pytest.raises(ValueError, match="use more classes"):
        class_pair_order(np.array(labels), seed=0)


def test_samples_files_and_labels_move_together(small_digits):
    config, samples, labels = step1(small_digits)
    paired, truth = pair_by_class(samples, labels, seed=0)
    assert paired.lists["GrayImg"] is samples.lists["GrayImg"]
    assert torch.equal(paired.arrays["GrayImg"], samples.arrays["GrayImg"])
    before, after = samples.lists["PointCloud"], paired.lists["PointCloud"]
    assert sorted(after.names) == sorted(before.names) and after.names != before.names
    for row, name in enumerate(after.names):
        source = before.names.index(name)
        assert after.files[row] == before.files[source] and after.instance_ids[row] == before.instance_ids[source]
        assert torch.equal(paired.arrays["PointCloud"][row], samples.arrays["PointCloud"][source])
        assert truth["PointCloud"][row] == labels["PointCloud"][source]
    shares = pair_shares(paired, truth)
    ids = [(a == b, x == y) for a, b, x, y in zip(
        paired.lists["GrayImg"].instance_ids, after.instance_ids, truth["GrayImg"].tolist(), truth["PointCloud"].tolist())]
    assert shares == pytest.approx({
        "same_instance": sum(same for same, _ in ids) / TRAIN, "other_class": sum(not alike for _, alike in ids) / TRAIN,
        "other_instance_same_class": sum(alike and not same for same, alike in ids) / TRAIN})
    assert shares["other_class"] == 2 / TRAIN and 0.05 <= shares["same_instance"] < 0.2
    assert pair_shares(samples, labels) == {"same_instance": 1.0, "other_instance_same_class": 0.0, "other_class": 0.0}
    with pytest.raises(ValueError, match="2D and 3D"):
        pair_by_class(*step1(small_digits, "data.modalities=[RGBImg,GrayImg]")[1:], seed=0)


@pytest.mark.parametrize("variant", ["class_pairs", "all"])
def test_both_stages_train_on_those_pairs_and_are_tested_on_real_ones(trained, small_digits, variant):
    details = metrics_of(trained(variant))["details"]
    wanted, truth = pair_by_class(*step1(small_digits)[1:], seed=0)
    assert details["pairs"] == pair_shares(wanted, truth)
    assert len(trained.trained_on[variant]) == len(trained.tested_on[variant]) == 2
    for samples in trained.trained_on[variant]:
        assert [rows.names for rows in samples.lists.values()] == [rows.names for rows in wanted.lists.values()]
        assert all(torch.equal(samples.arrays[name], wanted.arrays[name]) for name in samples.arrays)
    for samples, labels in trained.tested_on[variant]:
        assert samples.lists["GrayImg"].instance_ids == samples.lists["PointCloud"].instance_ids
        assert torch.equal(labels["GrayImg"], labels["PointCloud"])


# batch_clip


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


def test_the_threshold_is_one_over_the_batch_and_the_label_is_not_clipped():
    """K = 4 and B = 10: a probability of 0.15 lies between 1 / B and 1 / K; one of 0.05 is below both and still learns."""
    probs = torch.tensor([[0.15, 0.15, 0.15, 0.55]] * 5 + [[0.05, 0.05, 0.05, 0.85]] * 5, dtype=torch.float64)
    logits, labels = probs.log().requires_grad_(), torch.zeros(10, dtype=torch.long)
    loss = BatchClippedLoss(0.5)(logits, labels)
    value = lambda p: math.sqrt(-math.log(p)) * (1 - p)
    # Five rows with four classes above 0.1 count four times each, five rows with one count once.
    assert float(loss) == pytest.approx((20 * value(0.15) + 5 * value(0.05)) / 25 + value(1 / 10))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[:5, 0] < 0).all() and (gradient[5:, 0] < 0).all()


def test_batch_clipped_loss_at_its_ends():
    loss = BatchClippedLoss(0.25)
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    value = loss(sure, torch.tensor([0, 1]))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(sure.grad).all()
    uniform = torch.zeros(2, 5, requires_grad=True)  # every entry at or below 1 / B: the authors' mean of nothing
    value = loss(uniform, torch.tensor([0, 1]))
    value.backward()
    assert float(value) == pytest.approx(math.log(2) ** 0.25 / 2) and uniform.grad.eq(0).all()
    everything = torch.zeros(6, 2)  # and none of them
    assert float(loss(everything, torch.zeros(6, dtype=torch.long))) == pytest.approx(math.log(2) ** 0.25 / 2)
    for logits, labels in ((torch.zeros(1, 3), [0]), (torch.zeros(3), [0, 0, 0]), (torch.zeros(4, 3), [0, 0])):
        with pytest.raises(ValueError, match="B >= 2"):
            loss(logits, torch.tensor(labels))
    with pytest.raises(ValueError, match="alpha"):
        BatchClippedLoss(-0.1)


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


# shuffled_memory


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


# test_selection


def test_the_chosen_epoch_has_the_best_test_score(trained):
    folder = trained("test_selection")
    rows = log_lines(only_run(folder, 2))
    metrics = metrics_of(folder)
    assert [row["epoch"] for row in rows] == [1, 2]
    best = max(rows, key=lambda row: row["map/avg"])
    assert {key: value for key, value in metrics.items() if key.startswith("map/")} == {
        key: value for key, value in best.items() if key.startswith("map/")}
    assert metrics["selection"] == f"best epoch by test score ({best['epoch']} of 2)"
    assert metrics["last_epoch"]["map/avg"] == rows[-1]["map/avg"] == metrics_of(trained("ours"))["map/avg"]


class _Run:
    def read_epochs(self):
        scores = {2: 0.4, 3: 0.6, 4: 0.5}
        return [{"epoch": 1}, *({"epoch": epoch, "map/avg": score, "loss/mlm": 1.0} for epoch, score in scores.items())]


@pytest.mark.parametrize("variant,score,words", [("ours", 0.5, "last epoch"), ("all", 0.6, "best epoch by test score (3 of 4)")])
def test_selection_of_hand_written_scores(variant, score, words):
    scores = protocol._scores(_Run(), departures_of(variant))
    assert scores == {"map/avg": score, "selection": words, "last_epoch": {"map/avg": 0.5}}


# The command


def test_a_repeated_call_trains_nothing_and_gives_the_same(trained, small_digits, monkeypatch):
    once = metrics_of(trained("all"))
    monkeypatch.setattr(protocol.ReleasePLA, "train_epoch", None)
    monkeypatch.setattr(protocol.ReleaseRDL, "train_epoch", None)
    (trained("all") / "metrics.json").unlink()
    main(command(small_digits, trained("all"), "all"))
    assert metrics_of(trained("all")) == once


def test_a_folder_serves_one_request(trained, small_digits):
    before = (trained("ours") / "metrics.json").read_bytes()
    for more in (["batch_clip"], ["ours", "--seed", "1"], ["ours", "--set2", "rdl.alpha=0.5"]):
        with pytest.raises(ValueError, match="holds another run"):
            main(command(small_digits, trained("ours"), *more))
    assert (trained("ours") / "metrics.json").read_bytes() == before


def test_what_is_missing_or_wrong_is_said(small_digits, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--variant", "ours"])
    assert "--config-dir, --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--variant", "oracle"])
    with pytest.raises(ValueError, match="paired by object"):
        main(command(small_digits, tmp_path / "a", "class_pairs", "--set1", "data.pairing=class"))
    with pytest.raises(UserError, match="step1.yaml"):
        main(["--config-dir", str(tmp_path), "--variant", "ours", "--output", str(tmp_path / "b")])
