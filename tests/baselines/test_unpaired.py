"""Matching without pairs: fabricated sets whose right answer is known, and the command on a miniature of the bridge."""


import numpy as np
import pytest
import torch

import train_step1
from baselines import unpaired
from baselines.cca import unit_rows
from baselines.features import _write_list, make_features
from baselines.matching import agree, agreement, centroids_of, match_clusters, next_round, shared_axes, soft_clusters, standardise
from datasets.lists import SampleList, default_list_path, read_labelled_list
from experiments.records import read_records
from models import ResNet18
from utils.errors import UserError
from utils.evaluation.metrics import mean_average_precision

CLASSES, WIDTH = 6, 40


def two_sets(sizes, others, shift=0.0, noise=0.5, seed=0):
    """Rows and labels of two sets around the same class means; the second one is shifted and scaled."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(CLASSES, WIDTH))
    labels = [np.repeat(np.arange(CLASSES), counts) for counts in (sizes, others)]
    rows = [means[found] + noise * rng.normal(size=(len(found), WIDTH)) for found in labels]
    return (rows[0], rows[1] * (1 + shift) + 3 * shift * rng.normal(size=WIDTH)), labels


def clusterings(rows, seed=0):
    return [soft_clusters(rows, rows, count, seed + count) for count in (5, 6, 8)]


def precision(found, labels):
    codes = [torch.from_numpy(part) for part in (found[0].test, found[1].test)]
    return mean_average_precision(codes[0], torch.from_numpy(labels[0]), codes[1], torch.from_numpy(labels[1]))


@pytest.mark.parametrize("how", ["soft", "hungarian", "gromov"])
def test_shifted_sets_of_other_sizes_are_joined(how):
    if how == "gromov":
        pytest.importorskip("ot", reason="POT of requirements-baselines.txt is not installed")
    rows, labels = two_sets([20, 10, 12, 8, 10, 14], [6, 18, 10, 12, 9, 15], shift=0.6)
    first, second = (standardise(part, part) for part in rows)
    spaces = [(first, second)]
    found = agree(clusterings(first), clusterings(second), spaces, how)
    assert precision(found, labels) > 0.85
    wrong = agree(clusterings(first), clusterings(second), [(first, np.random.default_rng(1).permutation(second))], how)
    assert precision(wrong, labels) < 0.6 and agreement(wrong, first, second) + 0.2 < agreement(found, first, second)
    again = agree(clusterings(first), clusterings(second), next_round(found, first, spaces), how)
    assert precision(again, labels) > precision(found, labels) - 0.02


def test_structure_is_matched_where_no_direction_is_shared():
    pytest.importorskip("ot", reason="POT of requirements-baselines.txt is not installed")
    rng = np.random.default_rng(0)
    first = unit_rows(np.cumsum(rng.normal(size=(CLASSES, 4)), axis=0))
    order = rng.permutation(CLASSES)
    turned = np.zeros((CLASSES, 8))
    turned[:, 4:] = first[order]
    padded = np.concatenate([first, np.zeros((CLASSES, 4))], axis=1)  # every cosine with the turned ones is 0
    shares = match_clusters(padded, turned, "gromov")
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    assert (order[shares.argmax(axis=1)] == np.arange(CLASSES)).all()


def test_formulas_against_slow_ones():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(9, 5)) + 4
    expected = (rows - rows.mean(axis=0)) / (rows.std(axis=0) + 1e-6)
    np.testing.assert_allclose(standardise(rows, rows), [row / np.sqrt((row**2).sum()) for row in expected])
    first, second = unit_rows(rng.normal(size=(50, 6))), unit_rows(rng.normal(size=(8, 6)))
    axes = shared_axes(first, second, 3)
    spread = np.mean([sum(np.outer(row, row) for row in side) / len(side) for side in (first, second)], axis=0)
    values = np.sort(np.linalg.eigvalsh(spread))[::-1][:3]
    np.testing.assert_allclose(np.diag(axes.T @ spread @ axes), np.sqrt(values))
    clusters = soft_clusters(first, second, 4, seed=0)
    assert clusters.test.shape == (8, 4) and np.allclose(clusters.train.sum(axis=1), 1)
    slow = np.array([sum(clusters.train[i, k] ** 2 * first[i] for i in range(50)) for k in range(4)])
    slow /= np.linalg.norm(slow, axis=1, keepdims=True)
    np.testing.assert_allclose(centroids_of(clusters, first), unit_rows(slow - slow.mean(axis=0)))
    cosines = rng.uniform(-1, 1, size=(2, 3, 3))
    best = max(np.ndindex(3, 3, 3), key=lambda p: (len(set(p)) == 3, sum(cosines[0][k] @ cosines[1][p[k]] for k in range(3))))
    assert (match_clusters(*cosines, "hungarian").argmax(axis=1) == best).all()
    soft = np.array([[np.exp(10 * sum(one * two)) for two in cosines[1]] for one in cosines[0]])
    np.testing.assert_allclose(match_clusters(*cosines, "soft"), (soft / soft.sum(axis=1, keepdims=True) + soft / soft.sum(axis=0)) / 2)


def test_a_kind_of_many_clusters_shares_one():
    """Three of four first clusters are of the kind that fills one second cluster: one to one, two of them go astray."""
    kinds = unit_rows(np.eye(4) - 0.25)
    first = unit_rows(kinds[[0, 0, 0, 1]] + 0.05 * np.random.default_rng(0).normal(size=(4, 4)))
    assert (match_clusters(first, kinds, "soft").argmax(axis=1) == [0, 0, 0, 1]).all()
    assert (match_clusters(first, kinds, "hungarian").argmax(axis=1) == [0, 0, 0, 1]).sum() == 2


@pytest.fixture
def small(monkeypatch):
    """Fabricated sides of the bridge."""
    for name, value in {"CLUSTERS": (5, 6), "STARTS": 1, "CLASSES": 6, "DIMENSIONS": (8,), "ROUNDS": 2, "COUPLINGS": ("hungarian",)}.items():
        monkeypatch.setattr(unpaired, name, value)
    (photos, pictures), labels = two_sets([20, 10, 12, 8, 10, 14], [6, 18, 10, 12, 9, 15], shift=0.6)
    halves = lambda rows: {"train": rows[::2], "test": rows[1::2]}
    clouds = unit_rows(pictures @ np.random.default_rng(1).normal(size=(WIDTH, 12)))  # another space, of which only the pairs tell
    seen = unit_rows(photos @ np.random.default_rng(1).normal(size=(WIDTH, 12)))
    names = (unpaired.PICTURE, unpaired.SHAPE)
    test, train = ({name: found[start::2] for name, found in zip(names, labels)} for start in (1, 0))
    return unpaired.Sets(*map(halves, (photos, pictures, seen, clouds)), {name: torch.from_numpy(rows) for name, rows in test.items()}, train)


def test_training_labels_reach_the_marked_row_alone(small):
    rows = dict(unpaired.rows_of(small, seed=0))
    shuffled = {name: np.random.default_rng(0).permutation(found) for name, found in small.classes.items()}
    other = dict(unpaired.rows_of(unpaired.Sets(**{**vars(small), "classes": shuffled}), seed=0))
    assert list(rows) == list(other) and [name for name in rows if rows[name] != other[name]] == [name for name in rows if "READS" in name]
    matched = [scores for scores in rows.values() if "stability" in scores]
    assert len(matched) == 2 and all(1 > scores["stability"] > 0.5 for scores in matched), matched
    assert all(scores["map/avg"] > 0.6 > 2 * scores["map/chance"] for scores in matched)
    flipped = {name: found.flip(0) for name, found in small.labels.items()}
    unread = unpaired.Sets(**{**vars(small), "labels": flipped, "classes": None})
    assert list(dict(unpaired.rows_of(unread, seed=0))) == [name for name in rows if "READS" not in name]


def test_rows_are_those_of_the_photographs_lists_and_training_labels_are_read_when_asked_for(small_digits, tmp_path, monkeypatch):
    """Photographs are every second digit here, in falling order, and shapes are all digits."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in small_digits.glob("digits_*_list.txt"):
        rows = [f"{small_digits}/{row}\n" for row in path.read_text().splitlines()]
        (photos / path.name).write_text("".join(rows[::-2]))
    for name in ("weights", "others"):
        torch.save(ResNet18(16, 2).backbone.state_dict(), tmp_path / f"{name}.pt")
    given = [f"run.output={tmp_path / 'runs'}", "data.modalities=[RGBImg,PointCloud]"]
    make = lambda root, out, weights="weights": make_features(
        "configs/smoke/step1.yaml", [*given, f"data.root={root}", f"model.pretrained.RGBImg={tmp_path / weights}.pt"], "initial", 0, tmp_path / out, "")
    make(photos, "seen"), make(photos, "foreign", "others")
    note = make(small_digits, "bridge")
    train_step1.main(["--config", "configs/smoke/step1.yaml", "--set", *given, f"data.root={tmp_path / 'bridge'}", *note["settings"],
                      "model.pretrained.RGBImg=none", "optim.epochs=1", "pla.mlm_only_epochs=0", "run.figures=false"])
    (run,) = (tmp_path / "runs/digits_initial/step1").iterdir()
    cpu = torch.device("cpu")
    asked = unpaired.load_sets(tmp_path / "seen", run, None, cpu, reads_labels=True)
    monkeypatch.setattr(unpaired, "true_labels", None)  # nothing may call it
    sets = unpaired.load_sets(tmp_path / "seen", run, tmp_path / "bridge", cpu)
    assert sets.classes is None
    for split, count in (("train", 20), ("test", 8)):
        numbers = range(2 * count - 1, 0, -2)
        stored = [np.load(tmp_path / f"bridge/{split}/rgb_imgs/RGBImg_{split}_{number:06d}.npy")[0] for number in numbers]
        np.testing.assert_array_equal(sets.photos[split], np.stack(stored).astype(np.float64))  # the same pictures, so the same features
        np.testing.assert_array_equal(sets.pictures[split], sets.photos[split])
        assert sets.clouds[split].shape == sets.seen[split].shape == (count, 16)
    truth = [int(row.split()[-1]) for row in (photos / "digits_RGBImgs_train_list.txt").read_text().splitlines()]
    assert {name: rows.tolist() for name, rows in asked.classes.items()} == {"RGBImg": truth, "PointCloud": truth}
    with pytest.raises(UserError, match="make both with the same weights"):
        unpaired.load_sets(tmp_path / "foreign", run, None, cpu)
    path = tmp_path / "bridge/digits_initial_PointCloud_train_list.txt"
    for path in (path, path.with_name("digits_initial_RGBImgs_train_list.txt")):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="lacks 1 train shapes"):
        unpaired.load_sets(tmp_path / "seen", run, None, cpu)


def test_records_of_uncommitted_code_are_refused(tmp_path, monkeypatch):
    facts = {"git_sha": "a" * 40, "git_dirty": True, "gpu": None, "cpu": "some", "threads": 1, "torch": "2"}
    monkeypatch.setattr(unpaired, "environment", lambda seed: facts)
    rows = [("chosen", {"map/RP": 0.5}, 1.0), ("prototypes, READS LABELS", {"map/RP": 0.9}, 1.0)]
    with pytest.raises(UserError, match="uncommitted"):
        unpaired.write_records(tmp_path / "t.jsonl", rows, 0, "python")
    facts["git_dirty"] = False
    unpaired.write_records(tmp_path / "t.jsonl", rows, 0, "python")
    found = read_records(tmp_path / "t.jsonl")
    assert [entry.get("reads_labels") for entry in found] == [None, "training labels of photos_modelnet40"]
    unpaired.write_records(tmp_path / "u.jsonl", rows, 0, "python", "labels of shapes")  # of a bridge that started from them
    assert all("labels of shapes" in entry["reads_labels"] for entry in read_records(tmp_path / "u.jsonl"))


def test_features_of_photographs_that_share_a_name_stay_apart(tmp_path):
    names = tuple(f"{folder}/image_0001.jpg" for folder in ("car", "cup"))
    (tmp_path / "list.txt").write_text("".join(f"{name} {label}\n" for label, name in enumerate(names)))
    source = SampleList(tmp_path / "list.txt", "RGBImg", names, names, names)
    _write_list(tmp_path / "made", "set", "train", source, np.eye(2))
    path = default_list_path(tmp_path / "made", "set", "RGBImg", "train")
    found, labels = read_labelled_list(path, modality="RGBImg", root=tmp_path / "made", instance_id="(.+)")
    assert [np.load(file).tolist() for file in found.files] == [[1, 0], [0, 1]] and labels.tolist() == [0, 1]
