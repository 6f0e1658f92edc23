"""Pseudo-label files: equality after reading, rows in any order, the authors' format, and every way they can be wrong."""

import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest

from datasets.lists import SampleList
from datasets.pseudo_labels import pseudo_label_path, read_origin, read_pseudo_labels, write_pseudo_labels
from utils.errors import UserError

NAMES = ("./train/a_1.png", "train/my file_2.png", "train/c_3.png", "train/d_4.png")
LABELS = np.array([2, 0, 1, 2])


@pytest.fixture
def samples(tmp_path):
    return SampleList(tmp_path / "list.txt", "RGBImg", NAMES, tuple(tmp_path / n for n in NAMES), ("1", "2", "3", "4"))


@pytest.fixture
def written(tmp_path, samples):
    path = pseudo_label_path(tmp_path / "out", "own", "RGBImg")
    write_pseudo_labels(path, samples, LABELS, dataset="own", num_clusters=3, provenance={"epoch": 4})
    return path


def meta(path):
    return path.with_name(path.name + ".meta.json")


def test_what_is_written_is_read_back(tmp_path, written, samples):
    assert written == tmp_path / "out/own_RGBImgs_train_list_pseudo_labelling.txt"
    assert written.read_bytes() == b"./train/a_1.png 2\ntrain/my file_2.png 0\ntrain/c_3.png 1\ntrain/d_4.png 2\n"
    facts = json.loads(meta(written).read_text())
    assert facts["histogram"] == [1, 1, 2] and facts["count"] == 4 and facts["provenance"] == {"epoch": 4}
    assert (facts["dataset"], facts["modality"], facts["num_clusters"]) == ("own", "RGBImg", 3)
    assert sorted(os.listdir(written.parent)) == sorted([written.name, meta(written).name])  # no temporary file stays
    labels, num_clusters = read_pseudo_labels(written, samples, dataset="own")
    assert labels.tolist() == LABELS.tolist() and labels.dtype == np.int64 and num_clusters == 3


def test_authors_format_in_any_order(tmp_path, samples):
    path = tmp_path / "three.txt"
    rows = [f"{name} {label} {truth}" for name, label, truth in zip(NAMES, LABELS, [9, 8, 7, 6], strict=True)]
    path.write_text("\r\n".join(rows[::-1]) + "\r\n\r\n")
    labels, num_clusters = read_pseudo_labels(path, samples, dataset="own", num_clusters=3)
    assert labels.tolist() == LABELS.tolist() and num_clusters == 3
    path.write_text("\n".join(rows).replace(" 9", " 0"))
    assert read_pseudo_labels(path, samples, dataset="own", num_clusters=3)[0].tolist() == LABELS.tolist()


def test_wrong_clusters_and_meta_files(tmp_path, written, samples):
    with pytest.raises(UserError, match="python train_step1.py"):
        read_pseudo_labels(tmp_path / "none.txt", samples, dataset="own")
    with pytest.raises(UserError, match="expected 5 clusters.*written with 3"):
        read_pseudo_labels(written, samples, dataset="own", num_clusters=5)
    for content in ("{", "[]", "{}", "null"):
        meta(written).write_text(content)
        with pytest.raises(UserError, match="broken file"):
            read_pseudo_labels(written, samples, dataset="own")
    meta(written).unlink()
    for num_clusters, words in ((None, "give num_clusters"), (2, r"outside 0\.\.1")):
        with pytest.raises(UserError, match=words):
            read_pseudo_labels(written, samples, dataset="own", num_clusters=num_clusters)


def test_other_dataset_or_modality(written, samples):
    with pytest.raises(UserError, match="another dataset.*'digits'.*'own'"):
        read_pseudo_labels(written, samples, dataset="digits")
    with pytest.raises(UserError, match="modality 'GrayImg'.*'RGBImg'"):
        read_pseudo_labels(written, replace(samples, modality="GrayImg"), dataset="own")
    meta(written).unlink()
    with pytest.raises(UserError, match="row 3: 'train/c_3.png'.*another dataset"):
        read_pseudo_labels(written, replace(samples, names=(*NAMES[:2], "train/z_3.png", NAMES[3])), dataset="own", num_clusters=3)


@pytest.mark.parametrize("row,words", [  # in place of the third
    ("train/c_3.png 1\ntrain/c_3.png 1\n", "twice"), ("", "cut short.*c_3"), ("\udcff\udcfe\n", "labelling.txt, row 3: expected UTF-8"),
    *((f"train/c_3.png{label}\n", words) for label, words in (
        (" one", "row 3.*integer"), ("", "row 3"), (" 1.0", "row 3.*integer"), (" -1", r"row 3: pseudo-label -1 is outside 0\.\.2"),
        (" 20231128123456", "row 3: pseudo-label 20231128123456 is outside"), (" " + "9" * 30, "row 3: .*integer pseudo-label"))),
])
def test_bad_rows(written, samples, row, words):
    written.write_text(written.read_text().replace("train/c_3.png 1\n", row), errors="surrogateescape")
    with pytest.raises(UserError, match="sha256 differs.*train_step1.py"):
        read_pseudo_labels(written, samples, dataset="own")
    meta(written).unlink()
    with pytest.raises(UserError, match=words):
        read_pseudo_labels(written, samples, dataset="own", num_clusters=3)


def test_writer_refuses(written, samples):
    before = written.read_bytes()
    for bad in (LABELS[:3], LABELS.astype(float), LABELS + 1, LABELS - 1, LABELS[None]):
        with pytest.raises(UserError, match="pseudo-label"):
            write_pseudo_labels(written, samples, bad, dataset="own", num_clusters=3, provenance={})
    assert written.read_bytes() == before


def test_warnings_on_degenerate_clusters(tmp_path, samples):
    path = tmp_path / "labels.txt"
    write_pseudo_labels(path, samples, np.array([0, 0, 0, 1]), dataset="own", num_clusters=3, provenance={})
    with pytest.warns(UserWarning) as caught:
        read_pseudo_labels(path, samples, dataset="own")
    text = " ".join(str(warning.message) for warning in caught)
    assert "1 of 3 clusters are empty" in text and "cluster 0 holds 3 of 4" in text
    write_pseudo_labels(path, samples, LABELS, dataset="own", num_clusters=3, provenance={})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pseudo_labels(path, samples, dataset="own")


def test_a_damaged_origin_names_the_file(written):
    assert read_origin(written) == {"epoch": 4}
    for content in ("[]", '{"provenance": "run"}', '{"provenance": null}', "{"):
        meta(written).write_text(content)
        with pytest.raises(UserError, match="meta.json is damaged"):
            read_origin(written)


def test_authors_relative_paths_find_absolute_ones(tmp_path):
    names = tuple(f"{tmp_path}/dataset/3dmnist/train/{name}" for name in ("a_1.png", "b_2.png"))
    joined = SampleList(tmp_path / "list.txt", "RGBImg", names, names, ("1", "2"))
    path = tmp_path / "release.txt"
    path.write_text("./dataset/3dmnist/train/b_2.png 0 7\n./dataset/3dmnist/train/a_1.png 2 7\n")
    assert read_pseudo_labels(path, joined, dataset="own", num_clusters=3)[0].tolist() == [2, 0]
    for wrong in ("./other/3dmnist/train/a_1.png 0 7\n", "a_1.png 0 7\n"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="another dataset"):
            read_pseudo_labels(path, joined, dataset="own", num_clusters=3)
