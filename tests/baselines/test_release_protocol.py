"""The departures of the authors' code: each does what it says, and without any both stages are the real ones, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, write_lists
from stage_runs import assert_same_result, labels_of, log_lines, only_run, settings, weights
from test_departures import SMOKE, step1

import train_step1
import train_step2
import training
from baselines import release_protocol
from baselines.departures import pair_by_class, pair_shares
from baselines.release_protocol import VARIANTS, departures_of, main
from datasets.pseudo_labels import read_pseudo_labels
from models.pretrained import labels_read_by
from utils.errors import UserError


def command(root: Path, out: Path, variant: str, *more: str) -> list[str]:
    short = [f"data.root={root}", "optim.epochs=2"]
    return ["--config-dir", str(SMOKE), "--variant", variant, "--output", str(out), "--device", "cpu", "--threads", "1",
            "--set1", *short, "--set2", *short, *more]


class Trained:
    """Output folders of the variants, each trained when first asked for, and the samples that training and tests saw.

    `ours` is trained on lists without labels, and stopped between its stages once.
    """

    def __init__(self, root: Path, labels: list[int], out: Path) -> None:
        self.root, self.labels, self.out = root, labels, out
        self.trained_on, self.tested_on = {}, {}

    def __call__(self, variant: str) -> Path:
        if variant in self.trained_on:
            return self.out / variant
        write_lists(self.root, "train", [None] * TRAIN if variant == "ours" else self.labels[:TRAIN])
        write_lists(self.root, "test", self.labels[TRAIN:])
        learners, load = {name: getattr(release_protocol, name) for name in ("ReleasePLA", "ReleaseRDL")}, training.load_test_samples
        trained = self.trained_on[variant] = []
        tested = self.tested_on[variant] = []
        call = command(self.root, self.out / variant, variant)
        with pytest.MonkeyPatch.context() as patch:
            for name, real in learners.items():
                patch.setattr(release_protocol, name, lambda config, samples, *more, real=real: (
                    trained.append(samples) or real(config, samples, *more)))
            patch.setattr(training, "load_test_samples", lambda *given: tested.append(load(*given)) or tested[-1])
            if variant == "ours":
                self.stop_between_the_stages(call)
            main(call)
        write_lists(self.root, "train", self.labels[:TRAIN])
        return self.out / variant

    def stop_between_the_stages(self, call: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(release_protocol, "load_pseudo_labels", lambda *_: 1 / 0)
            main(call)
        self.first_checkpoint = (only_run(self.out / "ours", 1) / "last.pt").stat().st_mtime_ns


@pytest.fixture(scope="module")
def trained(tmp_path_factory, _digits_folder) -> Trained:
    return Trained(*_digits_folder, tmp_path_factory.mktemp("variants"))


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_says_what_it_did(trained, variant):
    metrics = metrics_of(trained(variant))
    assert {"selection", "commit", "dirty", "device"} <= metrics.keys()
    assert metrics["variant"] == variant and metrics["seed"] == 0 and metrics["train_seconds"] > 0
    assert metrics["map/avg"] == pytest.approx((metrics["map/GP"] + metrics["map/PG"]) / 2)
    assert metrics["command"].startswith("python -m baselines.release_protocol ") and f"--variant {variant} " in metrics["command"]
    assert ("pairs" in metrics["details"]) == (variant in ("class_pairs", "all"))
    assert ("pseudo_label_accuracy" in metrics["details"]) == (variant in ("oracle_labels", "all"))
    assert not list(trained(variant).glob("runs/**/metrics.json"))  # no run of a variant can pass as one of the real trainers
    (meta, _) = sorted(labels_of(trained(variant)).glob("*.meta.json"))
    assert json.loads(meta.read_text())["provenance"]["clusters"]["departures"] == sorted(departures_of(variant))
    marks = [json.loads(meta.read_text())["provenance"]["reads_labels"], *(labels_read_by(only_run(trained(variant), step)) for step in (1, 2))]
    assert [bool(mark) for mark in marks] == [variant in ("oracle_labels", "class_pairs", "test_selection", "all")] * 3


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


def test_batch_clip_and_test_selection_leave_step_1_alone(trained):
    for variant in ("batch_clip", "test_selection"):
        assert_same_result(trained("ours"), trained(variant), 1)
    for variant in ("oracle_labels", "class_pairs", "shuffled_memory", "all"):
        one, two = weights(only_run(trained("ours"), 1)), weights(only_run(trained(variant), 1))
        same = all(torch.equal(one[key], two[key]) for key in one)
        assert same == (variant == "oracle_labels")  # the labels are exported, step 1 does not train on them


def test_oracle_labels_are_classes_and_step_2_uses_their_number(trained, small_digits):
    folder = trained("oracle_labels")
    _, samples, labels = step1(small_digits)
    for name, token in (("GrayImg", "GrayImgs"), ("PointCloud", "PointCloud")):
        path = labels_of(folder) / f"digits_{token}_train_list_pseudo_labelling.txt"
        values, num_clusters = read_pseudo_labels(path, samples.lists[name], dataset="digits")
        assert num_clusters == 10 and set(values) <= set(labels[name].tolist())
    assert weights(only_run(folder, 2))[".classifiers.GrayImg.3.bias"].shape == (10,)
    assert weights(only_run(trained("ours"), 2))[".classifiers.GrayImg.3.bias"].shape == (6,)


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


def test_the_test_set_is_scored_after_every_epoch_and_the_best_one_counts(trained):
    rows, metrics = log_lines(only_run(trained("test_selection"), 2)), metrics_of(trained("test_selection"))
    assert len(rows) == 2 and metrics["map/avg"] == max(row["map/avg"] for row in rows)
    assert metrics["last_epoch"]["map/avg"] == rows[-1]["map/avg"] == metrics_of(trained("ours"))["map/avg"]


def test_a_repeated_call_trains_nothing_and_gives_the_same_and_another_one_is_refused(trained, small_digits, monkeypatch):
    once = metrics_of(trained("all"))
    monkeypatch.setattr(release_protocol.ReleasePLA, "train_epoch", None)
    monkeypatch.setattr(release_protocol.ReleaseRDL, "train_epoch", None)
    (trained("all") / "metrics.json").unlink()
    main(command(small_digits, trained("all"), "all"))
    for more in (["batch_clip"], ["all", "--seed", "1"], ["all", "--set2", "rdl.alpha=0.5"]):
        with pytest.raises(UserError, match="holds another run"):
            main(command(small_digits, trained("all"), *more))
    assert metrics_of(trained("all")) == once


def test_the_command_lists_its_variants_and_says_what_is_wrong(small_digits, tmp_path, capsys):
    for arguments, said in ((["--list"], [f"\n{name} " for name in VARIANTS]), (["--variant", "ours"], ["--config-dir, --output"]),
                            (["--variant", "oracle"], ["invalid choice: 'oracle'"])):
        with pytest.raises(SystemExit):
            main(arguments)
        printed = "\n" + "".join(capsys.readouterr())
        assert all(words in printed for words in said)
    with pytest.raises(ValueError, match="paired by object"):
        main(command(small_digits, tmp_path / "a", "class_pairs", "--set1", "data.pairing=class"))
    with pytest.raises(UserError, match="step1.yaml"):
        main(["--config-dir", str(tmp_path), "--variant", "ours", "--output", str(tmp_path / "b")])
