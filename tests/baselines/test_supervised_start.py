"""The start that has read labels: what it learns from, what it writes, and that the mark follows it everywhere."""

import json
import shutil

import pytest
import torch
from conftest import TRAIN, write_lists
from stage_runs import REPOSITORY, labels_of, only_run, settings, weights

import evaluate
import train_step1
import train_step2
from baselines import run
from baselines.features import make_features
from baselines.supervised_start import main
from experiments.jobs import training_scores
from models.pretrained import labels_read_by, read_state_dict
from training import mark_labels
from utils.engine.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.settings.config import load_config
from utils.settings.options import Step1Config

READ = "training labels of digits"


def start(root, path, *more):
    arguments = ["--config", str(REPOSITORY / "configs/smoke/step1.yaml"), "--output", str(path), "--set", f"data.root={root}"]
    main([*arguments, "optim.epochs=2", *more])
    return read_state_dict(path)


def test_the_file_depends_on_the_training_labels_and_the_seed_alone(small_digits, tmp_path, capsys):
    first, again = (start(small_digits, tmp_path / name) for name in ("a", "b"))
    assert labels_read_by(tmp_path / "a") == READ and READ.split()[0] not in first
    assert "which has read labels: loss" in capsys.readouterr().out
    write_lists(small_digits, "test", [1] * 16)
    other_test = start(small_digits, tmp_path / "c")
    write_lists(small_digits, "train", [row % 2 for row in range(TRAIN)])
    other_labels = start(small_digits, tmp_path / "d")
    assert all(torch.equal(first[key], again[key]) and torch.equal(first[key], other_test[key]) for key in first)
    assert not torch.equal(first["conv5.weight"], other_labels["conv5.weight"])
    torch.save(first, tmp_path / "e")
    assert labels_read_by(tmp_path / "e") is None


def test_the_mark_follows_the_file_through_both_stages(small_digits, tmp_path, capsys):
    given = start(small_digits, tmp_path / "start.pt")
    more = [f"model.pretrained.PointCloud={tmp_path / 'start.pt'}", "model.freeze=[PointCloud]", "optim.epochs=1"]
    train_step1.main(settings(small_digits, tmp_path, 1, *more))
    found = weights(only_run(tmp_path, 1))
    assert all(torch.equal(found[f".encoders.PointCloud.{key}"], value) for key, value in given.items())  # with its projection
    train_step2.main(settings(small_digits, tmp_path, 2, "optim.epochs=1"))  # fresh encoders, the labels are of that run
    runs = [only_run(tmp_path, step) for step in (1, 2)]
    for folder in runs:
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["reads_labels"] == READ and f"READS LABELS ({READ})" in metrics["row"]
        assert "READS LABELS" in (folder / "log.txt").read_text() and f"reads_labels: {READ}" in (folder / "config.yaml").read_text()
        assert training_scores(folder)["reads_labels"] == READ
    (meta, *_) = sorted(labels_of(tmp_path).glob("*.meta.json"))
    assert json.loads(meta.read_text())["provenance"]["reads_labels"] == READ
    capsys.readouterr()
    evaluate.main(["--run", *map(str, runs), "--device", "cpu"])
    assert capsys.readouterr().out.count("READS LABELS") >= 2
    assert all(json.loads((folder / "metrics.json").read_text())["reads_labels"] == READ for folder in runs)
    assert [labels_read_by(folder) for folder in (runs[0], runs[1] / "last.pt")] == [READ, READ]
    shutil.copy(runs[0] / "last.pt", tmp_path / "astray.pt")
    with pytest.raises(UserError, match="is a checkpoint of a run: give its run folder"):
        labels_read_by(tmp_path / "astray.pt")  # a checkpoint alone does not know
    (runs[0] / "pseudo_labels").rename(tmp_path / "moved")
    train_step1.main(settings(small_digits, tmp_path, 1, *more, "--resume", str(runs[0])))  # its command again
    (meta, *_) = sorted(labels_of(tmp_path).glob("*.meta.json"))
    assert json.loads(meta.read_text())["provenance"]["reads_labels"] == READ


def test_the_mark_follows_features_their_run_and_compared_methods_and_class_pairs_have_one(small_digits, tmp_path):
    start(small_digits, tmp_path / "start.pt")
    smoke, place = str(REPOSITORY / "configs/smoke/step1.yaml"), f"run.output={tmp_path / 'runs'}"
    given = [f"data.root={small_digits}", f"model.pretrained.PointCloud={tmp_path / 'start.pt'}", place]
    note = make_features(smoke, given, "initial", 0, tmp_path / "features", "a command")
    on_features = [f"data.root={tmp_path / 'features'}", *note["settings"], place]
    assert mark_labels(load_config(Step1Config, smoke, on_features), None).model.reads_labels == READ
    for texts in (on_features, given):
        run.main(["ucch", "--config", smoke, "--set", *texts, "optim.epochs=1"])
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/baseline/*/metrics.json")]
    assert [metrics["reads_labels"] for metrics in found] == [READ, READ]
    make_features(smoke, [*given, f"run.output={tmp_path / 'more'}", "optim.epochs=1"], "learned", 0, tmp_path / "learned", "a command")
    (run_of_features,) = (tmp_path / "more/digits/features").iterdir()
    assert labels_read_by(run_of_features) == READ
    assert mark_labels(load_config(Step1Config, smoke, ["data.pairing=class"]), None).model.reads_labels == "class pairs of digits"


def test_a_run_starts_another_one_with_every_weight(small_digits, finished, tmp_path):
    before, names = only_run(finished, 1), ("GrayImg", "PointCloud")
    more = [f"model.pretrained.{name}={before}" for name in names] + ["model.freeze=[GrayImg]", "optim.epochs=1"]
    train_step1.main(settings(small_digits, tmp_path, 1, *more))
    given, found = weights(before), weights(only_run(tmp_path, 1))
    for name in names:
        alike = [torch.equal(found[key], value) for key, value in given.items() if key.startswith(f".encoders.{name}.")]
        assert len(alike) > 20 and all(alike) == (name == "GrayImg")  # heads too; clouds go on learning
    reports = json.loads((only_run(tmp_path, 1) / "initial_weights.json").read_text())
    assert not any(reports[name]["missing"] or reports[name]["skipped"] for name in names)
    assert "G from digits/step1, P from digits/step1" in json.loads((only_run(tmp_path, 1) / "metrics.json").read_text())["row"]
    assert labels_read_by(before) is None
    with pytest.raises(UserError, match="has no encoder of RGBImg, found those of GrayImg, PointCloud"):
        read_state_dict(before, "RGBImg")
    content = load_checkpoint(before / "last.pt")
    for change, message in (({"epoch": 0}, "has not finished"), ({"stage": "baseline"}, "is no start")):
        shutil.copytree(before, tmp_path / message)
        save_checkpoint(tmp_path / message / "last.pt", {**content, **change})
        with pytest.raises(UserError, match=message):
            read_state_dict(tmp_path / message, "GrayImg")


def test_a_run_of_other_starts_has_no_mark(finished):
    for step in (1, 2):
        folder = only_run(finished, step)
        assert "READS" not in (folder / "log.txt").read_text() and "reads_labels" not in json.loads((folder / "metrics.json").read_text())
