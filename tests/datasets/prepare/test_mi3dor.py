"""Preparation of MI3DOR through its command: miniatures of both layouts, both pairings, interruption, hostile releases."""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import need_data_packages
from PIL import Image
from test_writer import snapshot

from datasets.lists import default_list_path, read_labelled_list
from datasets.prepare import mi3dor as prepare_mi3dor
from datasets.prepare import ownership
from datasets.prepare.ownership import read_journal
from datasets.prepare.photographs import Item, draw_of_same_class
from datasets.prepare.readers import mi3dor
from datasets.prepare.readers.mi3dor import Release, check_official, read_release
from utils.errors import UserError

need_data_packages("pyvista", "fast_simplification")

BOX = "mtllib none.mtl\nv 0 0 0\nv {0} 0 0\nv {0} 1 0\nv 0 1 0\nv 0 0 1\nv {0} 0 1\nv {0} 1 1\nv 0 1 1\nusemtl red\n" + (
    "f 1 4 3 2\nf 5/1/1 6/1/1 7/1/1 8/1/1\nf 1 2 6 5\nf 2//3 3//3 7//3 6//3\nusemtl blue\nf 3 4 8 7\nf 4 1 5 8\n"
)
TETRA = "v 0 0 0\nv {0} 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
# class: (training photographs, training models, test photographs, test models); more models than photographs in one class
CLASSES = {"arm_chair": (2, 5, 1, 2), "bear_train": (4, 1, 2, 1), "car": (3, 3, 2, 3)}
BROKEN, EMPTY = "car_train_0001", "car_test_0002"
UNUSABLE = {BROKEN: "v 0 0 0\nv 1 0 0\nf 1 2 9\n", EMPTY: ""}


def run(root: Path, output: Path, *more: str) -> None:
    prepare_mi3dor.main(["--root", str(root), "--output", str(output), "--any-counts", "--workers", "1", *more])


def write_folder_release(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, counts in CLASSES.items():
        for split, photographs, models in (("train", *counts[:2]), ("test", *counts[2:])):
            images, meshes = root / f"image/{split}/{name}", root / f"model/{split}/{name}"
            images.mkdir(parents=True)
            meshes.mkdir(parents=True)
            for number in range(photographs):
                suffix = (".JPEG", ".png", ".jpg")[number % 3]
                pixels = rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{name[0]} n0{split}_{number}{suffix}")
            for number in range(models):
                stem = f"{name}_{split}_{number:04d}"
                (meshes / f"{stem}.obj").write_text(UNUSABLE.get(stem, (BOX if number % 2 else TETRA).format(1 + number)))
            (images / "._junk.jpg").write_bytes(b"macOS")
            (meshes / "readme.txt").write_text("no mesh")
    (root / "image/train/.hidden").mkdir()
    return root


def write_track_release(root: Path) -> Path:
    """The same objects as a track release; models of both splits share names, and one has no OBJ file."""
    folder = write_folder_release(root.parent / f"{root.name}_source")
    (root / "split").mkdir(parents=True)
    release = read_release(folder)
    for split in ("train", "test"):
        images, views = [], []
        for item in (item for item in release.images if item.split == split):
            target = Path("data") / item.name
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / item.file, root / target)
            images.append(f"{item.name if split == 'train' else './' + target.as_posix()} {item.label}\r\n")
        for number, item in enumerate(item for item in release.models if item.split == split):
            target = root / f"data/model/{split}/{number:05d}.obj"
            target.parent.mkdir(parents=True, exist_ok=True)
            if (split, number) != ("train", 0):
                shutil.copy(folder / item.file, target)
            views += [f"data/view/{split}/{number:05d}/v_{view:02d}.jpg {item.label}\n" for view in range(12)]
        (root / f"split/shrec2019_Image_{split}.txt").write_text("".join(images))
        (root / f"split/shrec2019_View_{split}.txt").write_text("\n" + "".join(views))
    return root


@pytest.fixture(scope="module")
def folder_release(tmp_path_factory) -> Path:
    return write_folder_release(tmp_path_factory.mktemp("release") / "folder")


@pytest.fixture(scope="module")
def track_release(tmp_path_factory) -> Path:
    return write_track_release(tmp_path_factory.mktemp("release") / "track")


@pytest.fixture(scope="module")
def prepared(folder_release, tmp_path_factory) -> Path:
    """Both pairings in one folder."""
    output = tmp_path_factory.mktemp("out") / "mi3dor"
    for pairing in ("none", "class"):
        run(folder_release, output, "--pairing", pairing)
    return output


def read(output: Path, dataset: str, modality: str, split: str):
    path = default_list_path(output, dataset, modality, split)
    return read_labelled_list(path, modality=modality, root=output, instance_id="(.+)$", num_classes=21, unique=())


def test_both_releases_are_listed(folder_release, track_release):
    release = read_release(folder_release)
    assert release.layout == "folder" and release.class_to_index == {"arm_chair": 0, "bear_train": 1, "car": 2}
    for items, column in ((release.images, 0), (release.models, 1)):
        expected = {(split, label): counts[column + place] for label, counts in enumerate(CLASSES.values()) for split, place in (("train", 0), ("test", 2))}
        assert Counter((item.split, item.label) for item in items) == expected
        assert all((folder_release / item.file).is_file() and item.name == item.file for item in items)
        assert all(item.name.split("/")[1:3] == [item.split, list(CLASSES)[item.label]] for item in items)
    release, source = read_release(track_release), track_release.parent / "track_source"
    assert release.layout == "track" and release.class_to_index is None
    folder = read_release(source)
    for items, originals in ((release.images, folder.images), (release.models, folder.models)):
        assert [(item.split, item.label) for item in items] == [(item.split, item.label) for item in originals]
    for item, original in zip(release.images + release.models[1:], folder.images + folder.models[1:], strict=True):
        assert (track_release / item.file).read_bytes() == (source / original.file).read_bytes()  # 00000.obj is in both splits: each found its own
    assert release.models[0] == Item("data/view/train/00000", "train", 0, None)


@pytest.mark.parametrize("dataset,training", [("mi3dor", 9), ("mi3dor_class", 8)])
def test_lists_and_manifests(prepared, folder_release, dataset, training):
    """Test lists hold everything; unpaired training lists too, in the order of the names' hashes; manifests hash the content."""
    entries, manifest = read_journal(prepared)[1], json.loads((prepared / f"{dataset}_pairs.json").read_text())
    photographs = [item for item in read_release(folder_release).images if dataset == "mi3dor" or item.split == "test"]
    for split in ("train", "test"):
        lists = [default_list_path(prepared, dataset, name, split) for name in ("RGBImg", "GrayImg")]
        assert lists[0].read_bytes() == lists[1].read_bytes()
        rows, labels = read(prepared, dataset, "RGBImg", split)
        names = [os.path.relpath(file, folder_release.resolve()) for file in rows.files]
        assert [list(CLASSES)[label] for label in labels] == [Path(file).parent.name for file in rows.files] and all(Path(name).is_absolute() for name in rows.names)
        if split == "test" or dataset == "mi3dor":
            assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
            assert set(names) == {item.file for item in photographs if item.split == split} and len(names) == len(set(names))
        meshes, labels = read(prepared, dataset, "Mesh", split)
        assert [entries[split, int(name[-10:-4])]["name"].split("/")[2] for name in meshes.names] == [list(CLASSES)[i] for i in labels]
        assert not any(word in "".join(meshes.names) for word in CLASSES)
        pictures = training if split == "train" else 5
        assert manifest["counts"][split] == {"RGBImg": pictures, "GrayImg": pictures, "Mesh": 8 if split == "train" else 5}
        for modality, files, listed in (("GrayImg", rows.files, names), ("Mesh", meshes.files, meshes.names)):
            text = "".join(f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}\n" for name, file in zip(listed, files, strict=True))
            assert manifest["content_sha256"][split][modality] == hashlib.sha256(text.encode()).hexdigest()
    assert manifest["test_photographs_also_in_training"] == 0 and manifest["official_counts"] == {"images": False, "models": False}
    assert (manifest["pairing"], manifest["uses_labels_for_training_pairs"], manifest["seed"]) == (
        ("none", False, None) if dataset == "mi3dor" else ("class", True, 0)
    )
    if dataset == "mi3dor_class":
        (images, labels), (meshes, mesh_labels) = (read(prepared, dataset, modality, "train") for modality in ("RGBImg", "Mesh"))
        assert labels.tolist() == mesh_labels.tolist() and meshes.names == read(prepared, "mi3dor", "Mesh", "train")[0].names
        uses = Counter(images.files)
        assert sorted(count for file, count in uses.items() if Path(file).parent.name == "arm_chair") == [2, 3]
        assert all(count == 1 for file, count in uses.items() if Path(file).parent.name != "arm_chair")
        assert manifest["distinct_training_photographs"] == len(uses) == 5 and manifest["largest_use_of_one_photograph"] == 3


@pytest.mark.parametrize("photographs,models", [(1, 7), (3, 7), (7, 7), (9, 7)])
def test_the_draw_goes_round(photographs, models):
    items = [Item(f"{label}/{number}", "train", label, "") for label in (0, 1) for number in range(photographs)]
    labels, ceiling = [0, 1] * models, -(-models // photographs)
    drawn = draw_of_same_class(items, labels, seed=3)
    uses = Counter(item.name for item in drawn if item.label == 1)
    assert [item.label for item in drawn] == labels and max(uses.values()) == ceiling
    assert min([*uses.values(), *[0] * (photographs - len(uses))]) >= ceiling - 1
    assert drawn == draw_of_same_class(items[::-1], labels, seed=3)  # the order of the input plays no part
    assert photographs == 1 or len({tuple(i.name for i in draw_of_same_class(items, labels, seed)) for seed in range(5)}) == 5
    with pytest.raises(ValueError, match="class 2 has 1 training models but no training photograph"):
        draw_of_same_class(items, [0, 2], seed=3)


def test_meshes(prepared, folder_release):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["class_to_index"] == {"arm_chair": 0, "bear_train": 1, "car": 2} and manifest["counts"] == {"train": 8, "test": 5}
    left_out = {Path(entry["name"]).stem: entry["left_out"].split(":")[0] for entry in manifest["left_out"]}
    assert left_out == {BROKEN: "a face names vertex 9 of 2", EMPTY: "an empty mesh"}
    for entry in (entry for entry in read_journal(prepared)[1].values() if "files" in entry):
        number = int(Path(entry["name"]).stem[-4:])
        faces = np.load(prepared / next(iter(entry["files"])))
        assert faces.dtype == np.float32 and faces.shape == (12 if number % 2 else 4, 18)
        corners = faces[:, None, :3] + faces[:, 3:12].reshape(-1, 3, 3)
        side = 1.0 + number  # the box is side x 1 x 1, its half diagonal becomes 1
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
        assert number % 2 == 0 or area == pytest.approx((4 * side + 2) / (side**2 + 2) * 4, rel=1e-5)
        assert np.linalg.norm(corners, axis=2).max() == pytest.approx(1, rel=1e-5)
        assert entry["source_sha256"] == hashlib.sha256((folder_release / entry["name"]).read_bytes()).hexdigest()


def test_track_release_end_to_end(track_release, tmp_path, capsys):
    run(track_release, tmp_path / "out", "--pairing", "class", "--seed", "5", "--workers", "2")
    text = capsys.readouterr().out
    assert "read the class labels to build the training pairs" in text and "00000: the release holds no OBJ file" in text
    rows, labels = read(tmp_path / "out", "mi3dor_class", "RGBImg", "train")
    assert [Path(file).parent.name for file in rows.files] == [list(CLASSES)[i] for i in labels] and len(rows) == 7
    manifest = json.loads((tmp_path / "out/mi3dor_class_pairs.json").read_text())
    assert manifest["class_to_index"] is None and manifest["layout"] == "track" and manifest["seed"] == 5
    assert not default_list_path(tmp_path / "out", "mi3dor", "RGBImg", "train").exists()


def test_nothing_to_do_the_second_time(prepared, folder_release, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()}
    for pairing in ("none", "class"):
        run(folder_release, prepared, "--pairing", pairing)
        text = capsys.readouterr().out
        assert "already prepared, nothing to do" in text and "lists already there" in text
        assert ("read the class labels" in text) == (pairing == "class")
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*") if path.is_file()} == before
    for option, value in (("--max-faces", "3"), ("--seed", "-1"), ("--workers", "0")):
        with pytest.raises(UserError, match=f"{option} must be at least"):
            run(folder_release, prepared, option, value)


def test_interrupted_lists(prepared, folder_release, tmp_path, monkeypatch):
    """Stopped at every single list or manifest of the class pairing in turn, the next run ends the same."""
    original = ownership.atomic_write_text
    run(folder_release, tmp_path)
    for stop in range(7):
        left = iter(range(stop))
        dies = lambda path, text, left=left: original(path, text) if next(left, None) is not None else pytest.fail("stopped")
        with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception):
            patch.setattr(ownership, "atomic_write_text", dies)
            run(folder_release, tmp_path, "--pairing", "class", "--seed", str(stop + 1))
        assert not (tmp_path / "mi3dor_class_pairs.json").exists() and (tmp_path / "mi3dor_pairs.json").exists()
    run(folder_release, tmp_path, "--pairing", "class")
    assert snapshot(tmp_path) == snapshot(prepared)


def test_other_meshes_remove_the_lists_of_both_pairings(prepared, folder_release, tmp_path):
    shutil.copytree(prepared, tmp_path / "o")
    with pytest.raises(UserError, match="max_faces: 500 instead of 8.*--overwrite"):
        run(folder_release, tmp_path / "o", "--max-faces", "8")
    assert snapshot(tmp_path / "o") == snapshot(prepared)
    run(folder_release, tmp_path / "o", "--max-faces", "8", "--overwrite")
    assert (tmp_path / "o/mi3dor_pairs.json").is_file() and not list((tmp_path / "o").glob("mi3dor_class*"))
    assert [len(np.load(path)) for path in (tmp_path / "o/train/mesh").glob("*.npy")] == [4] * 6  # two boxes cannot be had with so few faces
    run(folder_release, tmp_path / "o", "--pairing", "class", "--max-faces", "8")  # the lists made a moment ago still fit
    assert {path.name for path in (tmp_path / "o").glob("*_pairs.json")} == {"mi3dor_class_pairs.json", "mi3dor_pairs.json"}
    assert len(read(tmp_path / "o", "mi3dor_class", "RGBImg", "train")[0]) == 6


def test_changed_photographs_are_noticed(folder_release, tmp_path):
    release = tmp_path / "r"
    shutil.copytree(folder_release, release)
    run(release, tmp_path / "o")
    before = json.loads((tmp_path / "o/mi3dor_pairs.json").read_text())["content_sha256"]
    test, train = (next((release / f"image/{split}/car").glob("c*.png")) for split in ("test", "train"))
    test.write_bytes(train.read_bytes())
    with pytest.raises(UserError, match="mi3dor_pairs.json was made with other settings or input.*content_sha256 differs"):
        run(release, tmp_path / "o")
    run(release, tmp_path / "o", "--overwrite")
    after = json.loads((tmp_path / "o/mi3dor_pairs.json").read_text())
    assert after["test_photographs_also_in_training"] == 1 and after["content_sha256"]["train"] == before["train"]
    assert after["content_sha256"]["test"] != before["test"]


def test_changed_models_of_the_same_size_are_noticed(folder_release, tmp_path):
    release = tmp_path / "r"
    shutil.copytree(folder_release, release)
    run(release, tmp_path / "o")
    path = next(release.rglob("*.obj"))
    path.write_bytes(re.sub(rb"\d(?=\s*$)", lambda found: b"%d" % (9 - int(found[0])), path.read_bytes()))
    with pytest.raises(UserError, match="input_sha256 differs"):
        run(release, tmp_path / "o")


def test_official_counts(folder_release, tmp_path):
    images = tuple(Item(f"i{s}{c}{n}", s, c, "") for s in ("train", "test") for c in range(21) for n in range(500))
    models = tuple(Item(f"m{s}{n}", s, n % 21, "") for s, count in (("train", 3842), ("test", 3848)) for n in range(count))
    assert check_official(Release("folder", images, models, None)) == {"images": None, "models": None}
    assert check_official(Release("folder", (Item("x", "train", 1, ""), *images[1:]), models[1:], None)) == {
        "images": "expected 10500 / 10500 images, 500 of each of 21 classes, found 10500 / 10500 of 21, 499 to 501 of each",
        "models": "expected 3842 / 3848 models of 21 classes, found 3841 / 3848 of 21, 182 to 184 of each",
    }
    fewer = tuple(Item(m.name, m.split, min(m.label, 19), "") for m in models)
    assert "of 20" in check_official(Release("folder", images, fewer, None))["models"]
    with pytest.raises(ValueError, match="found 9 / 5 of 3.*found 9 / 6 of 3.*--any-counts"):
        prepare_mi3dor.main(["--root", str(folder_release), "--output", str(tmp_path / "o"), "--workers", "1"])
    assert not (tmp_path / "o").exists()


def drop(pattern: str):
    return lambda root: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in list(root.glob(pattern))]


def edit(name: str, change):
    return lambda root: (lambda path: path.write_text(change(path.read_text())))(root / f"split/shrec2019_{name}.txt")


def damage(suffix: str, harm):
    return lambda root: harm(min((root / "image/train/arm_chair").glob(f"a*.{suffix}")))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNREADABLE = "1 of 14 photographs cannot be read: image/train/arm_chair/a.*{} "


@pytest.mark.parametrize("layout,harm,words", [
    ("folder", drop("model"), "for the folder release it lacks model/train, model/test; for the track release it lacks split"),
    ("folder", drop("image/test"), "for the folder release it lacks image/test;"),
    ("folder", drop("image/test/*/*"), "photographs .* of both splits"),
    ("folder", drop("model/*/*/*.obj"), "no OBJ file of any of the 0 models"),
    ("folder", drop("model/train/*/*.obj"), "no usable object in the train split"),
    ("folder", damage("JPEG", halve), UNREADABLE.format("JPEG")), ("folder", damage("png", halve), UNREADABLE.format("png")),
    ("folder", damage("png", lambda path: path.write_bytes(b"<html>not found</html>")), UNREADABLE.format("png")),
    ("folder", damage("png", lambda path: Image.fromarray(np.zeros((20, 20), np.uint16)).save(path)), UNREADABLE.format("png")),
    ("track", drop("split/shrec2019_View_test.txt"), "for the track release it lacks split/shrec2019_View_test.txt"),
    ("track", drop("data/model/*/*.obj"), "no OBJ file of any of the 15 models"),
    ("track", edit("Image_test", lambda text: text.replace(" 1", "")), "row 2: expected `path label`.*contest"),
    ("track", edit("Image_train", lambda text: text.replace(" 2", " 21")), r"row 7: expected .* in 0..20, found '.* 21'"),
    ("track", edit("Image_train", lambda text: text + "image/no.jpg 1\n"), "row 10: image/no.jpg does not exist"),
    ("track", edit("Image_train", lambda text: text + text), r"is listed more than once \(9 such names\)"),
    ("track", edit("View_test", lambda text: text[: text.rindex("data")]), "row 62: expected 12 consecutive .*/00005 with"),
    ("track", edit("View_train", lambda text: text.replace("v_07.jpg 0", "v_07.jpg 1", 1)), r"found 12 with labels \[0, 1\]"),
    ("track", edit("View_train", lambda text: text + text), "data/view/train/00000 is listed more than once"),
    ("track", edit("View_train", lambda text: text + "".join(f"elsewhere/00001/v_{view}.jpg 0\n" for view in range(12))), "00001.obj is listed more than once"),
    ("track", lambda root: shutil.copytree(root / "data/model", root / "data/mesh"), "both data/m.*remove one of them"),
    ("track", lambda root: [(root / path).mkdir(parents=True) for path in mi3dor.LAYOUTS["folder"]], "holds both layouts"),
])
def test_bad_releases(folder_release, track_release, tmp_path, layout, harm, words):
    root = tmp_path / "r"
    shutil.copytree(folder_release if layout == "folder" else track_release, root)
    harm(root)
    with pytest.raises(UserError, match=words):
        run(root, tmp_path / "o")
    assert not list(tmp_path.glob("o/*_list.txt"))
