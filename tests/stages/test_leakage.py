"""Ground-truth labels must not reach training: the firewall, tested from outside and from inside."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TRAIN, write_lists
from stage_runs import REPOSITORY, assert_same_result, distinct, settings, smoke_samples

import train_step1
import train_step2
from datasets import lists, samples


@pytest.mark.parametrize("kind", ["permuted", "constant", "absent"])
def test_training_labels_change_no_bit_of_either_stage(finished, small_digits, tmp_path, kind):
    labels = {
        "permuted": np.random.default_rng(5).permutation(10).repeat(TRAIN // 10).tolist(),
        "constant": [3] * TRAIN,
        "absent": [None] * TRAIN,
    }[kind]
    write_lists(small_digits, "train", labels)
    train_step1.main(distinct(small_digits, tmp_path, 1))
    train_step2.main(distinct(small_digits, tmp_path, 2))
    for step in (1, 2):
        assert_same_result(finished, tmp_path, step)


def test_test_labels_change_no_bit_either(finished, small_digits, tmp_path):
    write_lists(small_digits, "test", [7] * 16)
    train_step1.main(distinct(small_digits, tmp_path, 1))
    assert_same_result(finished, tmp_path, 1)


def test_training_samples_have_no_labels(small_digits):
    _, training = smoke_samples(small_digits)
    names = [field.name for field in dataclasses.fields(training)]
    assert names == ["lists", "arrays", "fingerprints"] and all(len(text) == 64 for text in training.fingerprints.values())
    for rows in training.lists.values():
        values = [getattr(rows, field.name) for field in dataclasses.fields(rows)]
        assert not any("label" in field.name for field in dataclasses.fields(rows))
        assert not any(isinstance(value, (np.ndarray, torch.Tensor)) for value in values)


def test_labels_have_few_doors_and_training_imports_none_of_the_baselines():
    folders = ("baselines", "benchmarks", "datasets", "experiments", "losses", "models", "scripts", "search", "utils", ".")
    files = [path.relative_to(REPOSITORY) for folder in folders
             for path in (REPOSITORY / folder).glob("*.py" if folder == "." else "**/*.py")]
    doors = {str(path) for path in files if "read_labelled_list" in (REPOSITORY / path).read_text()}
    assert doors == {
        "baselines/true_labels.py", "datasets/lists.py", "datasets/samples.py", "datasets/prepare/checks.py",
        "datasets/prepare/readers/authors.py", "evaluate.py",
    }
    naming = lambda word: {str(path) for path in files if re.search(rf"\b{word}\b", (REPOSITORY / path).read_text())}
    assert naming("noisy_labels") == {"baselines/noisy_labels.py", "baselines/run.py"}  # the door of all compared methods
    assert naming("true_labels") == {  # the others are commands of their own
        "baselines/true_labels.py", "baselines/ceiling.py", "baselines/noisy_labels.py", "baselines/supervised_start.py",
        "baselines/unpaired.py", "baselines/release_protocol.py", "baselines/departures.py",
    }
    program = "import train_step1, train_step2, evaluate, reproduce, sys; print([name for name in sys.modules if 'baselines' in name])"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True).stdout == "[]\n"


def test_training_never_calls_the_labelled_reader_on_a_training_list(small_digits, tmp_path, monkeypatch):
    read = lists.read_labelled_list
    seen = []

    def recording(path, **arguments):
        seen.append(str(path))
        return read(path, **arguments)

    monkeypatch.setattr(samples, "read_labelled_list", recording)
    train_step1.main(settings(small_digits, tmp_path, 1, "optim.epochs=1", "pla.mlm_only_epochs=0"))
    assert seen and all("test_list" in path for path in seen)
