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


def test_training_list_has_no_labels(tmp_path):
    path = make(tmp_path, ["a_1.png 3", "b_02.png 0"], files=["a_1.png", "b_02.png"])
    samples = read(path)
    assert [field.name for field in fields(SampleList)] == ["path", "modality", "names", "files", "instance_ids"]
    assert samples.names == ("a_1.png", "b_02.png") and samples.instance_ids == ("1", "02") and len(samples) == 2
    assert samples.files == (tmp_path / "a_1.png", tmp_path / "b_02.png")
    path.write_text("a_1.png 0\nb_02.png 3\n")
    assert read(path) == samples  # permuting labels changes nothing


def test_labels_are_optional_for_training_only(tmp_path):
    path = make(tmp_path, ["a_1.png", "b_2.png"], files=["a_1.png", "b_2.png"])
    assert read(path).names == ("a_1.png", "b_2.png")
    with pytest.raises(ValueError, match="row 1.*without a label"):
        read(path, read_labelled_list)


def test_labelled_list(tmp_path):
    path = make(tmp_path, ["a_1.png 3", "b_2.png 0"], files=["a_1.png", "b_2.png"])
    samples, labels = read(path, read_labelled_list, num_classes=4)
    assert samples == read(path)
    assert labels.dtype == np.int64 and labels.tolist() == [3, 0]


def test_blank_lines_crlf_bom_and_spaces_in_paths(tmp_path):
    path = make(
        tmp_path, ["my dir/a 1.png 3", "", "  ", "my dir/b 2.png 0", ""], files=["my dir/a 1.png", "my dir/b 2.png"],
        encoding="utf-8-sig", newline="\r\n",
    )
    samples, labels = read(path, read_labelled_list)
    assert samples.names == ("my dir/a 1.png", "my dir/b 2.png") and labels.tolist() == [3, 0]


def test_paths_relative_to_the_current_directory(tmp_path, monkeypatch):
    path = make(tmp_path, ["./dataset/a_1.png 3"], files=["dataset/a_1.png"])
    with pytest.raises(UserError):
        read(path, root=tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert read(path, root=tmp_path / "elsewhere").files[0].is_file()


def test_own_instance_id(tmp_path):
    path = make(tmp_path, ["chair-7_view3.png"], files=["chair-7_view3.png"])
    assert read(path).instance_ids == ("3",)
    assert read(path, instance_id=r"^(\w+-\d+)_").instance_ids == ("chair-7",)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, "empty"),
        (["\n \n"], {}, "empty"),
        (["a_1.png x"], {}, "row 1.*integer label.*'x'"),
        (["a_1.png 1.5"], {}, "row 1.*integer label"),
        (["a_1.png 2 1"], {}, "row 1.*more columns"),
        (["a_1.png 0", "b_2.png 5"], {"num_classes": 5}, r"row 2: label 5 is outside 0\.\.4"),
        (["a_1.png 0", "b_2.png -1"], {}, "row 2: label -1 is outside"),
        (["a_1.png 9223372036854775808"], {}, "row 1: .*64 bits, found label '9223372036854775808'"),
        (["a_1.png " + "9" * 5000], {}, "row 1: .*64 bits"),
        (["a_1.png 0", "b_2.png"], {}, "row 2.*all rows carry a label or none"),
        (["a_1.png 0", "", "a_1.png 0"], {}, "row 2: path .*row 1"),
        (["a_1.png 0", "c_1.png 0"], {}, "row 2: instance id '1' is already in row 1"),
        (["x.png 0"], {}, "row 1.*finds no id"),
        (["a_1.png 0"], {"instance_id": "("}, "not a regular expression"),
        (["a_1.png 0"], {"instance_id": r"\d+"}, "needs a group"),
        (["a_1.png 0"], {"modality": "Mesh2"}, "unknown modality"),
    ],
)
def test_bad_lists_are_refused(tmp_path, rows, options, words):
    path = make(tmp_path, rows, files=["a_1.png", "b_2.png", "c_1.png", "x.png"])
    with pytest.raises(ValueError, match=words):
        read(path, **options)


def test_missing_things_are_named(tmp_path):
    path = make(tmp_path, ["a_1.png 0", "gone_2.png 0"], files=["a_1.png"])
    with pytest.raises(UserError, match="row 2.*gone_2.png"):
        read(path)
    for dataset, words in (("digits", "datasets.prepare_digits"), ("mnist3d", "datasets.prepare_mnist3d"), ("own", "docs/data.md")):
        with pytest.raises(UserError, match=words):
            read(default_list_path(tmp_path / "none", dataset, "RGBImg", "train"))


@pytest.mark.parametrize("content, row", [(b"\x93NUMPY\xff\xfe", 1), ("a_1.png 0\n\nb_2.png 0\n".encode("utf-16"), 1), (b"a_1.png 0\n\n\xe9_2.png 0\n", 2)])
def test_other_encodings_are_named_with_their_row(tmp_path, content, row):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"list.txt, row {row}: expected UTF-8"):
        read(tmp_path / "list.txt")


def test_any_label_that_fits_64_bits(tmp_path):
    path = make(tmp_path, ["a_1.png 20231128123456", "b_2.png 9223372036854775807"], files=["a_1.png", "b_2.png"])
    assert read(path, read_labelled_list)[1].tolist() == [20231128123456, 2**63 - 1]


def sample_list(path, ids, tmp_path):
    files = tuple(tmp_path / f"{path}_{i}.png" for i in ids)
    return SampleList(tmp_path / path, "RGBImg", tuple(f.name for f in files), files, tuple(ids))


def test_pairing(tmp_path):
    first, same = sample_list("a", ["1", "2", "3"], tmp_path), sample_list("b", ["1", "2", "3"], tmp_path)
    check_paired([first, same])
    with pytest.raises(ValueError, match=r"row 2 is not the same object: id 2 in .*a, id 3 in .*c; .*--authors"):
        check_paired([first, same, sample_list("c", ["1", "3", "2"], tmp_path)])
    with pytest.raises(ValueError, match="a has 3 rows, .*d has 2"):
        check_paired([first, sample_list("d", ["1", "2"], tmp_path)])
    with pytest.raises(ValueError, match="at least one"):
        check_paired([])


def test_disjoint(tmp_path):
    train, test = sample_list("a", ["1", "2"], tmp_path), sample_list("b", ["1", "2"], tmp_path)
    check_disjoint(train, test)
    with pytest.raises(ValueError, match="row 2"):
        check_disjoint(train, sample_list("a", ["9", "2"], tmp_path))


def test_default_path(tmp_path):
    assert default_list_path(tmp_path, "mnist3d", "GrayImg", "test") == tmp_path / "mnist3d_GrayImgs_test_list.txt"
    with pytest.raises(ValueError, match="split"):
        default_list_path(tmp_path, "mnist3d", "GrayImg", "valid")
