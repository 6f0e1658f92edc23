"""Photographs and shapes without pairs: the preparation on fabricated files, among them what users really have."""

import csv
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_modelnet import write_npz
from test_writer import snapshot

from datasets.lists import default_list_path, read_labelled_list
from datasets.prepare import inspect, photos
from datasets.prepare.readers.modelnet import make_tasks, read_npz
from utils.errors import UserError

CONFIG = "configs/photos_modelnet40/step1.yaml"


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("bathtub", "table", "zebra"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{name} {number}.{'JPG' if number % 2 else 'png'}")
    write_npz(tmp_path / "clouds.npz", 30)
    return tmp_path


def run(folder, *more):
    photos.main(["--photos", str(folder / "photos"), "--npz", str(folder / "clouds.npz"), "--root", str(folder / "made"), "--any-counts",
                 "--workers", "1", *more])


def inspected(folder):
    small = ("data.num_points=8", "data.eval_subsets=4", "model.num_neighbors=4")
    return ["--set", f"data.root={folder / 'made'}", *small, "--output", str(folder / "sheet.png")]


def rows(folder, modality, split, dataset=photos.DATASET, **more):
    path = default_list_path(folder / "made", dataset, modality, split)
    return read_labelled_list(path, modality=modality, root=folder / "made", instance_id="(.+)", **more)


def test_lists_of_photographs_and_shapes_of_the_shared_classes(source, capsys):
    run(source)
    assert "20 photographs of 2 classes, 0 skipped" in (said := capsys.readouterr().out) and "passed over: zebra" in said
    numbers = {(task.split, task.number): task for task in make_tasks(read_npz(source / "clouds.npz"))}
    for split, count in (("train", 16), ("test", 4)):
        pictures, labels = rows(source, "RGBImg", split)
        assert len(pictures) == count and [Path(path).parent.name for path in pictures.files] == [("bathtub", "table")[k] for k in labels]
        assert pictures.files[0].startswith(str((source / "photos").resolve())) and pictures.names == rows(source, "GrayImg", split)[0].names
        shapes, labels = rows(source, "PointCloud", split)
        tasks = [numbers[split, int(Path(path).stem[-6:])] for path in shapes.files]  # the numbers of modelnet40_splat
        assert [task.name.rsplit("_", 1)[0] for task in tasks] == [("bathtub", "table")[k] for k in labels]
        assert all((np.load(path) == task.cloud).all() for path, task in zip(shapes.files, tasks))
    before = snapshot(source / "made")
    run(source)
    assert "already prepared" in capsys.readouterr().out and snapshot(source / "made") == before
    inspect.main([CONFIG, *inspected(source)])
    assert "FAILED" not in capsys.readouterr().out and (source / "sheet.png").stat().st_size > 1000


def test_class_pairs_have_one_label_in_a_row_and_say_that_they_read_it(source, capsys):
    run(source)
    before = snapshot(source / "made")
    for _ in range(2):
        run(source, "--pairing", "class")
        assert "not unsupervised" in capsys.readouterr().out
    assert before.items() <= snapshot(source / "made").items()
    found = {name: rows(source, name, "train", "photos_modelnet40_class", unique=()) for name in ("RGBImg", "GrayImg", "PointCloud")}
    shapes, labels = rows(source, "PointCloud", "train")
    assert found["PointCloud"][0].names == shapes.names and all((other == labels).all() for _, other in found.values())
    assert set(found["RGBImg"][0].names) <= set(rows(source, "RGBImg", "train")[0].names)
    manifest = json.loads((source / "made/photos_modelnet40_class_pairs.json").read_text())
    assert manifest["uses_labels_for_training_pairs"] and manifest["counts"]["train"] == dict.fromkeys(found, len(labels))
    inspect.main([CONFIG.replace("40", "40_class"), *inspected(source)])
    assert "FAILED" not in capsys.readouterr().out


def test_the_half_of_a_photograph_depends_on_its_name_alone(source):
    run(source)
    chosen = {Path(path).name for path in rows(source, "RGBImg", "test")[0].files}
    for number, path in enumerate((source / "photos").glob("*/*")):
        Image.new("RGB", (30 + number, 30), (9, 8, 7)).save(path)
    with pytest.raises(UserError, match="other settings or input"):
        run(source)
    run(source, "--overwrite")
    assert {Path(path).name for path in rows(source, "RGBImg", "test")[0].files} == chosen


def test_copies_of_a_photograph_lie_in_the_half_of_the_first(source, capsys):
    for number in (1, 3, 5, 7, 9):
        path = source / f"photos/bathtub/bathtub {number}.JPG"
        path.with_name(f"copy of {number}.jpg").write_bytes(path.read_bytes())
    (source / "photos/table/another.jpg").write_bytes((source / "photos/bathtub/bathtub 1.JPG").read_bytes())
    run(source)
    contents = [{Path(path).read_bytes() for path in rows(source, "RGBImg", split)[0].files} for split in ("train", "test")]
    assert min(map(len, contents)) > 0 and not contents[0] & contents[1]
    assert "6 photographs are copies of others, and lie in their half; 1 lie in several classes" in capsys.readouterr().out
    for path in (source / "photos").glob("*/*"):
        Image.new("RGB", (30, 30), (9, 8, 7)).save(path, "PNG")
    with pytest.raises(UserError, match="leave one half empty"):
        run(source, "--overwrite")


def chunk(name, data):
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def test_names_links_folders_and_damages_of_any_kind_are_listed_or_passed_over(source, capsys):
    tables = source / "photos/table"
    whole, end = (tables / "table 0.png").read_bytes(), chunk(b"IEND", b"")
    (tables / "profile.png").write_bytes(whole.removesuffix(end) + chunk(b"iCCP", b"") + end)  # Pillow raises an IndexError
    for name in ("x\n1.png", "x\r1.png", os.fsdecode(b"caf\xe9.png"), "album.jpg/inside.png", ".hidden/a.png", "a.gif", "b.GIF", "notes"):
        (tables / name).parent.mkdir(exist_ok=True), (tables / name).write_bytes(whole)
    (tables / "link.jpg").symlink_to("/nowhere"), os.mkfifo(tables / "pipe.jpg")
    (source / "elsewhere").mkdir(), (source / "elsewhere/one.png").write_bytes(whole), (tables / "more").symlink_to(source / "elsewhere")
    (source / "photos" / os.fsdecode(b"caf\xe9")).mkdir()
    run(source)
    said = capsys.readouterr().out
    assert "22 photographs of 2 classes, 6 skipped" in said and r"passed over: caf\xe9, zebra" in said
    assert "files of other kinds, passed over: 1 without suffix, 2 .gif" in said
    listed = dict(list(csv.reader((source / "made/skipped.csv").open(newline="")))[1:])
    for name, words in (("x\n1", "line break"), ("x\r1", "line break"), (r"caf\xe9", "not UTF-8"), ("profile", "index out of range")):
        assert re.search(words, listed.pop(f"table/{name}.png"))
    assert listed == dict.fromkeys(("table/link.jpg", "table/pipe.jpg"), "no regular file, or a link to nothing")
    assert sum(len(rows(source, "RGBImg", split)[0]) for split in ("train", "test")) == 22


def test_unreadable_photographs_are_listed_with_their_reason(source, capsys):
    whole = (source / "photos/table/table 3.JPG").read_bytes()
    (source / "photos/table/table 3.JPG").write_bytes(whole[: len(whole) // 2])
    (source / "photos/bathtub/empty.jpg").touch()
    (source / "photos/bathtub/notes.txt").write_text("no picture")
    run(source)
    assert "19 photographs of 2 classes, 2 skipped" in capsys.readouterr().out
    listed = dict(csv.reader((source / "made/skipped.csv").open()))
    assert not any("0x" in reason for reason in listed.values())  # the same text every time
    assert set(listed) == {"object", "table/table 3.JPG", "bathtub/empty.jpg"} and all(listed.values())
    names = [Path(path).name for split in ("train", "test") for path in rows(source, "RGBImg", split)[0].files]
    assert len(names) == 19 and "table 3.JPG" not in names
    counts = json.loads((source / f"made/{photos.DATASET}_pairs.json").read_text())["counts"]
    assert counts["train"]["RGBImg"] + counts["test"]["RGBImg"] == 19


@pytest.mark.parametrize("spoil,message", [
    (lambda folder: [path.unlink() for path in (folder / "table").iterdir()], r"no photograph .* in table; fill or remove"),
    (lambda folder: [path.write_bytes(b"") for path in (folder / "table").iterdir()], "no photograph of table can be read"),
    (lambda folder: [path.rename(folder / f"my {path.name}") for path in list(folder.iterdir())], "expected folders named after classes"),
])
def test_folders_that_cannot_be_used(source, spoil, message):
    spoil(source / "photos")
    with pytest.raises(UserError, match=message):
        run(source)
    assert not (source / "made").exists()
