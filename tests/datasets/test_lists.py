"""List files: what is accepted, what is refused and with which words, and that labels never come along."""

from dataclasses import fields

import numpy as np
import pytest

from datasets.lists import SampleList, check_disjoint, check_paired, default_list_path, read_labelled_list, read_training_list
from utils.errors import UserError


def make(root, rows, name="own_RGBImgs_train_list.txt", files=(), encoding="utf-8", newline="\n"):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    path = root / name
    path.write_bytes(newline.join(rows).encode(encoding))
    return path


def read(path, reader=read_training_list, **options):
    return reader(path, **{"modality": "RGBImg", "root": path.parent, **options})


def test_training_lists_carry_no_labels_and_labelled_lists_do(tmp_path):
    path = make(tmp_path, ["a_1.png 20231128123456", "b_02.png 9223372036854775807"], files=["a_1.png", "b_02.png"])
    samples, labels = read(path, read_labelled_list)
    assert labels.dtype == np.int64 and labels.tolist() == [20231128123456, 2**63 - 1]
    assert [field.name for field in fields(SampleList)] == ["path", "modality", "names", "files", "instance_ids"]
    assert samples == SampleList(path, "RGBImg", ("a_1.png", "b_02.png"), (str(tmp_path / "a_1.png"), str(tmp_path / "b_02.png")), ("1", "02"))
    for text in ("a_1.png 9\nb_02.png 3\n", "a_1.png\nb_02.png\n"):
        path.write_text(text)
        assert read(path) == samples  # other labels or none change nothing
    with pytest.raises(ValueError, match="row 1.*without a label"):
        read(path, read_labelled_list)


def test_spellings_of_rows_and_own_instance_ids(tmp_path):
    path = make(
        tmp_path, ["my dir/a 1.png 3", "", "  ", "my dir/chair-7_view2.png 0", ""], files=["my dir/a 1.png", "my dir/chair-7_view2.png"],
        encoding="utf-8-sig", newline="\r\n",
    )
    samples, labels = read(path, read_labelled_list)
    assert samples.names == ("my dir/a 1.png", "my dir/chair-7_view2.png") and labels.tolist() == [3, 0] and samples.instance_ids == ("1", "2")
    assert read(path, instance_id=r"^(\w+)[- ]\d").instance_ids == ("a", "chair")


def test_paths_relative_to_the_current_directory(tmp_path, monkeypatch):
    path = make(tmp_path, ["./dataset/a_1.png 3"], files=["dataset/a_1.png"])
    with pytest.raises(UserError):
        read(path, root=tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert read(path, root=tmp_path / "elsewhere").files == ("dataset/a_1.png",)


@pytest.mark.parametrize(("rows", "options", "words"), [
    ([], {}, "empty"), (["\n \n"], {}, "empty"), (["a_1.png x"], {}, "row 1.*integer label.*'x'"),
    (["a_1.png 1.5"], {}, "row 1.*integer label"), (["a_1.png 2 1"], {}, "row 1.*more columns"),
    (["a_1.png 0", "b_2.png 5"], {"num_classes": 5}, r"row 2: label 5 is outside 0\.\.4"),
    (["a_1.png 0", "b_2.png -1"], {}, "row 2: label -1 is outside"),
    (["a_1.png 9223372036854775808"], {}, "row 1: .*64 bits, found label '9223372036854775808'"),
    (["a_1.png " + "9" * 5000], {}, "row 1: .*64 bits"), (["a_1.png 0", "b_2.png"], {}, "row 2.*all rows carry a label or none"),
    (["a_1.png 0", "", "a_1.png 0"], {}, "row 2: path .*row 1"), (["a_1.png 0", ".//./a_1.png 0"], {}, "row 2: path .*row 1"),
    (["a_1.png 0", "c_1.png 0"], {}, "row 2: instance id '1' is already in row 1"), (["x.png 0"], {}, "row 1.*finds no id"),
    (["a_1.png 0"], {"instance_id": "("}, "not a regular expression"), (["a_1.png 0"], {"instance_id": r"\d+"}, "needs a group"),
    (["a_1.png 0"], {"modality": "Mesh2"}, "unknown modality"),
])
def test_bad_lists_are_refused(tmp_path, rows, options, words):
    path = make(tmp_path, rows, files=["a_1.png", "b_2.png", "c_1.png", "x.png"])
    with pytest.raises(ValueError, match=words):
        read(path, **options)


def test_missing_things_are_named(tmp_path):
    path = make(tmp_path, ["a_1.png 0", "gone_2.png 0"], files=["a_1.png"])
    with pytest.raises(UserError, match="row 2.*gone_2.png"):
        read(path)
    for dataset, words in (
        ("digits", "datasets.prepare_digits"), ("mnist3d", "datasets.prepare_mnist3d"), ("own", "docs/data.md"),
        ("digits_features", "baselines.features --config configs/digits_small/step1.yaml"),
    ):
        with pytest.raises(UserError, match=words):
            read(default_list_path(tmp_path / "none", dataset, "RGBImg", "train"))


@pytest.mark.parametrize("content, row", [(b"\x93NUMPY\xff\xfe", 1), ("a_1.png 0\n\nb_2.png 0\n".encode("utf-16"), 1), (b"a_1.png 0\n\n\xe9_2.png 0\n", 2)])
def test_other_encodings_are_named_with_their_row(tmp_path, content, row):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"list.txt, row {row}: expected UTF-8"):
        read(tmp_path / "list.txt")


def test_pairs_and_splits(tmp_path):
    def listed(path, *ids):
        names = tuple(f"{path}_{i}.png" for i in ids)
        return SampleList(tmp_path / path, "RGBImg", names, tuple(str(tmp_path / name) for name in names), ids)

    first, same = listed("a", "1", "2", "3"), listed("b", "1", "2", "3")
    check_paired([first, same])
    check_disjoint(first, same)
    with pytest.raises(UserError, match=r"row 2 is not the same object: id 2 in .*a, id 3 in .*c; .*--authors"):
        check_paired([first, same, listed("c", "1", "3", "2")])
    with pytest.raises(UserError, match="a has 3 rows, .*d has 2"):
        check_paired([first, listed("d", "1", "2")])
    with pytest.raises(UserError, match="row 2"):
        check_disjoint(first, listed("a", "9", "2"))
