"""Preparation of digits: readers of MNIST, Kaggle and the authors' folder, and what is written of a digit."""

import functools
import gzip
import hashlib
import json
import struct
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from test_writer import paired_lists

from datasets.mesh_faces import mesh_to_faces
from datasets.prepare import digits as prepare_digits
from datasets.prepare import mnist3d
from datasets.prepare.digits import DigitSplit, digits_splits, enlarge_digit, write_digits
from datasets.prepare.readers.authors import join_authors_lists
from datasets.prepare.readers.hdf5 import read_kaggle
from datasets.prepare.readers.idx import FILES, check_class_counts, download_mnist, read_mnist
from datasets.prepare.shapes.digit import colourise, digit_to_point_cloud, extrude_digit, gray_image, project_rgb
from utils.errors import UserError

SIZES = {"train": 4, "test": 2}


def digits(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28), dtype=np.uint8)
    images[:, 10:14, 10:14] = rng.integers(1, 256, (count, 4, 4)) * (rng.random((count, 4, 4)) < 0.7)
    images[:, 10, 10] = 255
    return images


def splits() -> dict[str, DigitSplit]:
    return {n: DigitSplit(digits(c, i), np.arange(c) % 3, np.arange(c) * 2 + i) for i, (n, c) in enumerate(SIZES.items())}


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, pack=gzip.compress, suffix=".gz"):
    for number, (stem, count) in enumerate((("train", 6), ("t10k", 3))):
        for kind, array in (("images-idx3", digits(count, number)), ("labels-idx1", np.arange(count) % 10)):
            (folder / f"{stem}-{kind}-ubyte{suffix}").write_bytes(pack(idx_bytes(array)))


@pytest.mark.parametrize("pack,suffix", [(gzip.compress, ".gz"), (bytes, "")])
def test_read_mnist(tmp_path, pack, suffix):
    write_mnist(tmp_path, pack, suffix)
    read = read_mnist(tmp_path, SIZES)
    np.testing.assert_array_equal(read["train"].images, digits(6, 0)[:4])
    assert read["test"].labels.tolist() == [0, 1] and read["test"].ids.tolist() == [0, 1]


IMAGES = idx_bytes(digits(6, 0))


@pytest.mark.parametrize("name,content,words", [
    ("train-images-idx3", gzip.compress(IMAGES)[:-20], "truncated or corrupt"), ("train-images-idx3", IMAGES[:-5], "header promises"),
    ("train-images-idx3", IMAGES + b"x", "header promises"), ("train-images-idx3", b"\x00\x00\x0d\x03" + IMAGES[4:], "magic"),
    ("train-images-idx3", b"", "magic"), ("train-images-idx3", b"GIF89a", "magic"), ("train-images-idx3", idx_bytes(np.zeros((6, 28, 27))), "28x28"),
    ("train-images-idx3", idx_bytes(np.zeros((0, 28, 28))), "28x28"), ("train-images-idx3", None, "four MNIST files"),
    ("t10k-labels-idx1", idx_bytes(np.zeros(2)), "t10k-labels.*expected 3 labels"), ("t10k-labels-idx1", idx_bytes(np.array([1, 2, 11])), "expected 3 labels"),
])
def test_damaged_mnist_is_refused(tmp_path, name, content, words):
    write_mnist(tmp_path)
    path = tmp_path / f"{name}-ubyte.gz"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_mnist(tmp_path, SIZES)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("harm", [
    None, lambda file: file.unlink(), lambda file: file.write_bytes(b"<html>blocked</html>"), lambda file: file.write_bytes(file.read_bytes()[:-9]),
])
def test_a_download_is_read_and_what_cannot_be_had_is_named_and_can_be_tried_again(tmp_path, monkeypatch, harm):
    """From a local server that offers a folder as MNIST's only mirror."""
    write_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole, sums = labels.read_bytes(), [(f"{name}.gz", hashlib.md5((tmp_path / f"{name}.gz").read_bytes()).hexdigest()) for name in FILES]
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", sums)
        if harm:
            harm(labels)
            with pytest.raises(UserError, match="could not be downloaded.*by hand.*--mnist FOLDER"):
                download_mnist(tmp_path / "raw")
            labels.write_bytes(whole)
        splits = read_mnist(download_mnist(tmp_path / "raw"))
        server.shutdown()
    assert splits["train"].images.shape == (6, 28, 28) and splits["test"].labels.tolist() == [0, 1, 2]


def test_other_digits_are_not_3d_mnist():
    with pytest.warns(UserWarning, match="train: .* not the 5000 of 3D MNIST"):
        check_class_counts(splits())
    images, labels = np.zeros((5000, 28, 28), np.uint8), np.zeros(5000, np.int64)
    with pytest.raises(ValueError, match="train: 3D MNIST has class counts"):
        check_class_counts({"train": DigitSplit(images, labels, np.arange(5000))})


def write_kaggle(folder, change=lambda archive: None):
    h5py = pytest.importorskip("h5py")
    for name in ("train", "test"):
        with h5py.File(folder / f"{name}_point_clouds.h5", "w") as archive:
            for key, image in enumerate(digits(12, 0)):
                group = archive.create_group(str(key))
                group["img"], group["points"] = gray_image(image) / 256, digit_to_point_cloud(image)
                group.attrs["label"] = key % 10
            change(archive)


def replaced(name, change):
    """Store something else under a name of group 3."""
    def harm(archive):
        values = change(archive[f"3/{name}"][()])
        del archive[f"3/{name}"]
        archive[f"3/{name}"] = values
    return harm


@pytest.mark.parametrize("harm,words", [
    (replaced("img", lambda values: values * 256 / 255), "group 3.*k/256"), (replaced("points", lambda values: values + 0.1), "group 3.*differ"),
    (replaced("points", lambda values: values[:-1]), "group 3.*shape"), (lambda archive: archive.create_group("readme"), "readme"),
    (lambda archive: archive.pop("3/img"), "not a readable"),
])
def test_kaggle_files_are_read_in_numeric_order_or_refused(tmp_path, harm, words):
    with pytest.raises(UserError, match="train_point_clouds.h5"):
        read_kaggle(tmp_path)
    write_kaggle(tmp_path)  # 12 groups: as strings, "10" would come before "2"
    read = read_kaggle(tmp_path)["train"]
    assert read.ids.tolist() == list(range(12)) and read.labels.tolist() == [key % 10 for key in range(12)]
    np.testing.assert_array_equal(read.images, digits(12, 0))
    write_kaggle(tmp_path, harm)
    with pytest.raises(ValueError, match=words):
        read_kaggle(tmp_path)
    (tmp_path / "train_point_clouds.h5").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable"):
        read_kaggle(tmp_path)


def test_written_digits(tmp_path):
    assert write_digits(tmp_path, "own", splits(), num_points=50, source="test")
    lists, labels = paired_lists(tmp_path, "own", ("RGBImg", "GrayImg", "PointCloud", "Mesh"))
    assert labels == [0, 1, 2, 0] and lists["GrayImg"].names[3] == "train/gray_imgs/GrayImg_train_000006.png"
    image = splits()["train"].images[3]
    full = digit_to_point_cloud(image)
    np.testing.assert_array_equal(np.asarray(Image.open(lists["GrayImg"].files[3])), gray_image(image))
    np.testing.assert_array_equal(np.asarray(Image.open(lists["RGBImg"].files[3])), project_rgb(full))
    order = np.random.default_rng((0, 0, 6)).permutation(len(full))
    np.testing.assert_array_equal(np.load(lists["PointCloud"].files[3]), full[order[:50]].astype(np.float32))
    np.testing.assert_array_equal(np.load(lists["Mesh"].files[3]), mesh_to_faces(*extrude_digit(image)))
    assert json.loads((tmp_path / "manifest.json").read_text())["counts"] == SIZES
    assert not write_digits(tmp_path, "own", splits(), num_points=50, source="test")
    assert write_digits(tmp_path, "own", splits(), num_points=0, rgb="colourised", source="test", overwrite=True)
    np.testing.assert_array_equal(np.asarray(Image.open(lists["RGBImg"].files[3])), colourise(image))
    np.testing.assert_array_equal(np.load(lists["PointCloud"].files[3]), full[order].astype(np.float32))  # complete, but shuffled


def test_bad_options_and_digits_are_refused(tmp_path, monkeypatch):
    for options in ({"num_points": -1}, {"num_points": 5, "rgb": "photo"}):
        with pytest.raises(UserError, match="expected num_points"):
            write_digits(tmp_path / "x", "own", splits(), source="test", **options)
    empty = {"train": DigitSplit(np.zeros((1, 28, 28), np.uint8), np.zeros(1, int), np.array([7]))}
    with pytest.raises(UserError, match="id 7.*no lit pixel"):
        write_digits(tmp_path / "x", "own", empty, num_points=5, source="test")
    twice = {"train": DigitSplit(digits(2, 0), np.zeros(2, int), np.zeros(2, int))}
    with pytest.raises(UserError, match="distinct numbers"):
        write_digits(tmp_path / "x", "own", twice, num_points=5, source="test")
    monkeypatch.setattr(prepare_digits, "digit_to_point_cloud", lambda image: np.zeros(3).reshape(2))
    with pytest.raises(ValueError, match="^cannot reshape"):  # a bug of ours names no digit
        write_digits(tmp_path / "y", "own", splits(), num_points=5, source="test")


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_digits, "digits_splits", splits)
    for _ in range(2):
        prepare_digits.main(["--root", str(tmp_path / "d"), "--points", "9", "--workers", "1"])
    first, arrays, second, _ = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(";")[0] for line in (first, second)] == ["written", "already prepared, nothing to do"]
    assert arrays.startswith("no arrays for configs/digits/step1.yaml: ") and "clouds hold 9 points" in arrays
    write_mnist(tmp_path)
    with pytest.raises(UserError, match="of the data set 'digits', not 'mnist3d'"):
        mnist3d.main(["--root", str(tmp_path / "d")])  # before anything is downloaded into it
    assert not (tmp_path / "d/raw").exists()
    with pytest.warns(UserWarning, match="not the 5000"):
        mnist3d.main(["--mnist", str(tmp_path), "--root", str(tmp_path / "m"), "--points", "9", "--workers", "1"])
    assert json.loads((tmp_path / "m/manifest.json").read_text())["num_points"] == 9


def write_authors(folder):
    """Four objects per split; image rows in the order of ids, cloud rows 0 and 1 exchanged (one pair of two classes)."""
    for split in ("train", "test"):
        for stem, token, suffix, order in (("rgb_imgs/{}_RGBImg", "RGBImgs", "png", [0, 1, 2, 3]), ("point_cloud/{}_PointCloud", "PointCloud", "npy", [1, 0, 2, 3])):
            names = [f"./dataset/3dmnist/{split}/{stem.format(i % 3)}_{split}_{i:06d}.{suffix}" for i in order]
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
            (folder / f"dataset/mnist3d_{token}_{split}_list.txt").write_text("\n".join(f"{name} {i % 3}" for name, i in zip(names, order, strict=True)))


@pytest.mark.parametrize("given", ["dataset", "."])
def test_authors_lists_are_joined_on_id(tmp_path, given):
    with pytest.raises(UserError, match="authors' lists"):
        join_authors_lists(tmp_path, tmp_path / "out")
    write_authors(tmp_path / "release")
    root = tmp_path / "out"
    report = join_authors_lists(tmp_path / "release" / given, root)
    assert report[0] == "train RGBImg-PointCloud: 2 of 4 rows were mispaired, 2 of them across classes; joined on id"
    lists, labels = paired_lists(root, "mnist3d", ("RGBImg", "PointCloud"))
    assert labels == [0, 1, 2, 0] and lists["PointCloud"].files[0].startswith(str((tmp_path / "release").resolve()))
    assert json.loads((root / "manifest.json").read_text())["pairing"] == report


def test_authors_errors(tmp_path):
    write_authors(tmp_path)
    write_digits(tmp_path / "made", "mnist3d", splits(), num_points=9, source="test")
    for source, root, words in ((tmp_path / "dataset", "dataset", "overwritten"), (tmp_path, "made", "other settings or input")):
        with pytest.raises(UserError, match=words):
            join_authors_lists(source, tmp_path / root)
    path = tmp_path / "dataset/mnist3d_PointCloud_train_list.txt"
    rows = path.read_text().split("\n")
    for last, words in (([], "same objects.*000003"), ([rows[-1][:-1] + "1"], "object 000003 different labels")):
        path.write_text("\n".join([*rows[:-1], *last]))
        with pytest.raises(UserError, match=words):
            join_authors_lists(tmp_path, tmp_path / "out")


def test_digits_split_is_fixed_and_complete():
    made, order = digits_splits(), np.random.default_rng(0).permutation(1797)
    assert (made["train"].ids.tolist(), made["test"].ids.tolist()) == (sorted(order[:1437].tolist()), sorted(order[1437:].tolist()))  # labels play no part
    np.testing.assert_array_equal(made["test"].labels, load_digits().target[made["test"].ids])
    for part in made.values():
        assert part.images.dtype == np.uint8 and (part.images.max(axis=(1, 2)) > 0).all()
        assert part.images[:, :2].max() == 0 and part.images[:, :, -2:].max() == 0


def test_enlarged_digit_keeps_strokes():
    image = np.zeros((8, 8))
    image[:, 3] = 16.0
    large = enlarge_digit(image)
    assert large.shape == (28, 28) and large[2:26, 11:14].min() > 127
    assert large[:, :10].max() == 0 and large[:, 15:].max() == 0  # the blurred rim is gone
