"""The label door: how labels are made wrong, and that one pair has one label."""

import numpy as np
import pytest
import torch
from conftest import TRAIN, write_lists
from stage_runs import smoke_samples

from baselines.noisy_labels import corrupt, noisy_labels
from utils.errors import UserError

LABELS = np.arange(1000) % 10


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8])
def test_the_share_of_wrong_labels_is_exact(kind, rate):
    noisy = corrupt(LABELS, rate, kind, seed=3)
    wrong = noisy != LABELS
    assert wrong.sum() == round(rate * 1000) and noisy.min() >= 0 and noisy.max() <= 9
    assert np.array_equal(noisy, corrupt(LABELS, rate, kind, seed=3))
    assert rate == 0 or not np.array_equal(noisy, corrupt(LABELS, rate, kind, seed=4))
    if kind == "asymmetric":
        assert np.array_equal(noisy[wrong], (LABELS[wrong] + 1) % 10)


def test_symmetric_noise_takes_every_other_class_alike():
    labels = np.repeat(np.arange(10), 2000)
    noisy = corrupt(labels, 0.9, "symmetric", seed=0)
    counts = np.bincount((noisy - labels)[noisy != labels] % 10, minlength=10)
    assert counts[0] == 0 and abs(counts[1:] - 2000).max() < 200


def test_more_noise_hits_the_same_pairs_and_more():
    few, many = (corrupt(LABELS, rate, "symmetric", seed=0) != LABELS for rate in (0.2, 0.6))
    assert (few & many).sum() == few.sum()


def read(root, rate=0.0, *more):
    config, samples = smoke_samples(root, *more)
    return noisy_labels(config.data, samples, rate, "symmetric", 0)


def test_one_label_per_pair(small_digits):
    truth, noisy = read(small_digits), read(small_digits, 0.5)
    assert truth.shape == (TRAIN,) and truth.dtype == torch.int64 and (truth != noisy).sum() == TRAIN / 2
    listed = [int(line.rsplit(" ", 1)[1]) for line in (small_digits / "digits_GrayImgs_train_list.txt").read_text().splitlines()]
    assert truth.tolist() == listed
    path = small_digits / "digits_PointCloud_train_list.txt"
    kept = path.read_text()
    write_lists(small_digits, "train", [0] * TRAIN)
    (small_digits / "digits_GrayImgs_train_list.txt").write_text(kept.replace("point_cloud/PointCloud", "gray_imgs/GrayImg").replace(".npy", ".png"))
    with pytest.raises(UserError, match="different labels"):
        read(small_digits)
    with pytest.raises(UserError, match="needs data.pairing: instance"):
        read(small_digits, 0.0, "data.pairing=class")
