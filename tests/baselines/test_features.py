"""Frozen features: no label and no pair is read, lists are the source's, and every training runs on them by configuration alone."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import TEST, TRAIN, add_views, write_lists

import train_step1
import train_step2
from baselines import features
from baselines.features import Occupancy, RawImage, make_features
from baselines.stored_features import provenance
from datasets import lists, samples
from datasets.arrays import load_vectors
from datasets.batches import BatchSource
from datasets.kinds import KINDS
from datasets.transforms import prepare_images
from evaluate import evaluate_checkpoint
from models import ResNet18
from utils.errors import UserError
from utils.evaluation.tables import VARIANTS
from utils.settings.config import load_config
from utils.settings.options import Step1Config

SMOKE = "configs/smoke/step1.yaml"


def make(root, tmp_path, kind="random", seed=0, out="features", *more):
    given = [f"data.root={root}", f"run.output={tmp_path / 'runs'}", "optim.epochs=1", "pla.mlm_only_epochs=0", *more]
    return make_features(SMOKE, given, kind, seed, tmp_path / out, "a command")


def vectors(folder, modality="PointCloud", split="train"):
    paths = sorted((folder / split).glob(f"*/{modality}_*.npy"))
    return np.stack([np.load(path) for path in paths])


def on_features(step, folder, tmp_path, note, *more):
    return ["--config", f"configs/smoke/step{step}.yaml", "--set", f"data.root={folder}", *note["settings"],
            f"run.output={tmp_path / 'trained'}", "run.figures=false", *more]


def test_learned_features_owe_nothing_to_labels_and_pairs(small_digits, tmp_path, monkeypatch):
    make(small_digits, tmp_path, "learned", 0, "one")
    monkeypatch.setattr(samples, "read_labelled_list", None)  # nothing may call it
    for labels in ([3] * TRAIN, [None] * TRAIN):
        write_lists(small_digits, "train", labels)
        make(small_digits, tmp_path, "learned", 0, f"label {labels[0]}")
        for modality in ("GrayImg", "PointCloud"):
            one, two = vectors(tmp_path / "one", modality), vectors(tmp_path / f"label {labels[0]}", modality)
            assert one.shape[0] == TRAIN and one.std(axis=0).max() > 0 and np.array_equal(one, two)
    path = small_digits / "digits_PointCloud_train_list.txt"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[1:] + rows[:1]) + "\n")  # row k is now another object
    make(small_digits, tmp_path, "learned", 0, "unpaired")
    assert np.array_equal(vectors(tmp_path / "one", "GrayImg"), vectors(tmp_path / "unpaired", "GrayImg"))


def test_interrupted_features_go_on(small_digits, tmp_path, monkeypatch):
    make(small_digits, tmp_path, "learned", 0, "whole", "optim.epochs=2")
    train = features.ViewsLearner.train_epoch
    monkeypatch.setattr(features.ViewsLearner, "train_epoch", lambda self, epoch: train(self, epoch) if epoch == 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(small_digits, tmp_path, "learned", 0, "cut", "optim.epochs=2", f"run.output={tmp_path / 'broken'}")
    (run,) = (tmp_path / "broken" / "digits" / "features").iterdir()
    seen = []
    monkeypatch.setattr(features.ViewsLearner, "train_epoch", lambda self, epoch: seen.append(epoch) or train(self, epoch))
    given = [f"data.root={small_digits}", f"run.output={tmp_path / 'broken'}", "optim.epochs=2", "pla.mlm_only_epochs=0"]
    make_features(SMOKE, given, "learned", 0, tmp_path / "cut", "a command", str(run))
    assert seen == [2] and np.array_equal(vectors(tmp_path / "whole"), vectors(tmp_path / "cut"))


def test_features_copy_the_lists_print_all_settings_that_a_run_needs_and_are_never_overwritten(small_digits, tmp_path, capsys):
    note = make(small_digits, tmp_path)
    printed = capsys.readouterr().out.partition("--set ")[2].split()
    data = load_config(Step1Config, "configs/features_paper/step1.yaml", printed).data
    assert samples.load_training_samples(data, torch.device("cpu")).counts == {"GrayImg": TRAIN, "PointCloud": TRAIN}
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows, source = ([line.rsplit(" ", 1) for line in (root / f"{name}_PointCloud_{split}_list.txt").read_text().splitlines()]
                        for root, name in ((tmp_path / "features", "digits_random"), (small_digits, "digits")))
        assert len(rows) == count and [label for _, label in rows] == [label for _, label in source]
        assert [path.replace(".npy", "") for path, _ in rows] == [path.replace(".npy", "") for path, _ in source]
    assert make(small_digits, tmp_path) == note and "holds these features" in capsys.readouterr().out
    with pytest.raises(UserError, match="random features of seed 0.*another --out"):
        make(small_digits, tmp_path, seed=1)
    with pytest.raises(UserError, match="holds no features.json"):
        provenance(small_digits)
    (tmp_path / "empty").mkdir(), (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("mine")
    assert make(small_digits, tmp_path, out="empty")["kind"] == "random"
    with pytest.raises(UserError, match="other is there and not of this command"):
        make(small_digits, tmp_path, out="other")


def test_features_of_samples_that_changed_since_are_refused(small_digits, tmp_path):
    root = tmp_path / "digits"
    shutil.copytree(small_digits, root)
    note = make(root, tmp_path)
    assert set(note["contents"]) == {f"{split}/{name}" for split in ("train", "test") for name in ("GrayImg", "PointCloud")}
    first, second = sorted((root / "test").rglob("PointCloud*.npy"))[:2]
    shutil.copy(second, first)
    with pytest.raises(UserError, match=f"features holds features of other samples than {root} has now: remove it"):
        make(root, tmp_path)
    shutil.rmtree(root)
    assert make(root, tmp_path) == note
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is there and not of this command"):
        make(small_digits, tmp_path, out="file")


def test_features_have_a_folder_of_their_own_by_default():
    data = load_config(Step1Config, SMOKE).data
    folders = {str(features.default_folder(data, kind, seed)) for kind in features.SUFFIXES for seed in (0, 1)}
    assert len(folders) == 8 and {"dataset/digits_features", "dataset/digits_raw_seed1"} <= folders


def test_both_stages_run_on_features_by_configuration_alone(small_digits, tmp_path):
    folder = tmp_path / "features"
    note = make(small_digits, tmp_path)
    train_step1.main(on_features(1, folder, tmp_path, note, "optim.epochs=2", "pla.mlm_only_epochs=1"))
    train_step2.main(on_features(2, folder, tmp_path, note, "optim.epochs=1", "rdl.unclipped_epochs=0", "rdl.start=inherited"))
    (run,) = (tmp_path / "trained" / "digits_random" / "step2").iterdir()
    assert (run / "metrics.json").is_file()
    with pytest.raises(UserError, match=r"expected 7 numbers \(data.features.GrayImg\)"):
        train_step1.main(on_features(1, folder, tmp_path, note, "data.features.GrayImg=7"))
    with pytest.raises(UserError, match="model.pretrained.GrayImg must be none"):
        train_step1.main(on_features(1, folder, tmp_path, note, "model.pretrained.GrayImg=imagenet"))


def test_vectors_of_several_views_and_bad_ones_are_named(tmp_path):
    rows = np.arange(12.0).reshape(2, 3, 2)
    for number, row in enumerate(rows):
        np.save(tmp_path / f"x_{number}.npy", row)
    (tmp_path / "list.txt").write_text("x_0.npy\nx_1.npy\n")
    read = lambda: load_vectors(lists.read_training_list(tmp_path / "list.txt", modality="GrayImg", root=tmp_path), 2)
    assert np.array_equal(read(), rows)
    np.save(tmp_path / "x_1.npy", rows[1, :2])
    with pytest.raises(UserError, match="row 2.*2 numbers.*of each of 3 views, found shape"):
        read()
    misshapen = [[[1.0, 2.0]]], [[1.0, 2.0, 3.0]], ["a", "b"], 7.0, np.zeros((0, 2))
    for content, problem in (([1.0, np.nan], "finite"), *((bad, "expected 2 numbers") for bad in misshapen)):
        np.save(tmp_path / "x_0.npy", np.array(content))
        with pytest.raises(UserError, match=f"row 1.*{problem}"):
            read()


def test_initial_features_keep_every_view_and_the_other_modalities_samples(small_digits, tmp_path):
    add_views(small_digits, 3)
    model = ResNet18(16, 2)
    torch.save(model.backbone.state_dict(), tmp_path / "weights.pt")
    views = ["data.num_views=3", "data.views={GrayImg: 2}"]
    note = make(small_digits, tmp_path, "initial", 0, "features", f"model.pretrained.GrayImg={tmp_path / 'weights.pt'}", *views)
    data = load_config(Step1Config, SMOKE, [f"data.root={small_digits}", *views]).data
    pictures = samples.load_training_samples(data, torch.device("cpu")).arrays["GrayImg"]
    rows = vectors(tmp_path / "features", "GrayImg")
    model.eval()
    for view in range(3):
        expected = model.backbone(prepare_images(pictures[:, view], data.image_size, data.image_resize))
        assert torch.allclose(torch.from_numpy(rows[:, view]), expected, atol=1e-5)
    assert not np.allclose(rows[:, 0], rows[:, 1])

    train_step1.main(on_features(1, tmp_path / "features", tmp_path, note, "optim.epochs=1", "pla.mlm_only_epochs=0", *views[1:]))
    (run,) = (tmp_path / "trained" / "digits_initial" / "step1").iterdir()
    scores = evaluate_checkpoint(run / "last.pt", torch.device("cpu"))[1]["variants"]
    assert scores["embedding, all pictures"] != scores["embedding"] and len(scores) == 2 * len(VARIANTS)
    assert note["settings"][1:] == ["data.features.GrayImg=128"] and (run / "pseudo_labels").is_dir()
    own = load_config(Step1Config, SMOKE, [f"data.root={tmp_path / 'features'}", *note["settings"], *views[1:]]).data
    loaded = samples.load_training_samples(own, torch.device("cpu"))
    assert torch.equal(loaded.arrays["PointCloud"], samples.load_training_samples(data, torch.device("cpu")).arrays["PointCloud"])
    assert BatchSource(loaded, own, torch.device("cpu")).views == [2, 1]
    averaged = dataclasses.replace(own, eval_view="mean")
    assert len(KINDS["features"].prepare(loaded.arrays["GrayImg"], averaged)) == 3 and len(KINDS["features"].prepare(loaded.arrays["GrayImg"], own)) == 1
    with pytest.raises(UserError, match="needs weights"):
        make(small_digits, tmp_path, "initial", 0, "nothing")


def test_raw_features_by_hand():
    points = torch.rand(3, 20, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points[0, 0] = 1.0  # on the border of the cube: the last cell
    expected = torch.zeros(3, 16, 16, 16)
    for cloud, rows in enumerate(points.tolist()):
        for x, y, z in rows:
            i, j, k = (min(int((value + 1) * 8), 15) for value in (x, y, z))
            expected[cloud, i, j, k] = 1
    assert torch.equal(Occupancy()(points), expected.flatten(1)) and expected[0, 15, 15, 15] == 1
    images = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    assert torch.equal(RawImage(gray=True)(images), images[:, 0].flatten(1)) and RawImage(gray=False)(images).shape == (2, 48)


def test_raw_and_random_train_nothing(small_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "fit", None)
    assert "data.features.PointCloud=4096" in make(small_digits, tmp_path, "raw")["settings"]
    assert make(small_digits, tmp_path, "random", 0, "random")["settings"][0] == "data.dataset=digits_random"
