"""python -m datasets.inspect: what it counts, which check reports which defect, and what the contact sheet shows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import TEST, TRAIN
from PIL import Image

from datasets.prepare import inspect
from datasets.prepare.checks import read_lists
from datasets.prepare.inspect import load_data_config, make_block
from utils.engine.session import run_command
from utils.errors import UserError
from utils.evaluation.tables import align
from utils.figures.contact_sheet import Block, Tile, draw_contact_sheet

ROOT = Path(__file__).resolve().parents[3]
CONFIG = str(ROOT / "configs/smoke/step1.yaml")
PAIR = "data.modalities=[GrayImg,PointCloud]"
CHECKS = {
    "parse": "list files exist and parse", "exist": "listed files exist", "pairs": "rows are paired",
    "labels": "labels agree between modalities", "splits": "training and test are disjoint", "load": "every file loads",
    "counts": "lists are as long as the manifest says",
}


@pytest.fixture
def data(small_digits, tmp_path):
    """A copy that may be broken: GrayImg and PointCloud alone, with a manifest."""
    root = tmp_path / "data"
    shutil.copytree(small_digits, root)
    for path in root.glob("*_list.txt"):
        if "GrayImgs" not in path.name and "PointCloud" not in path.name:
            path.unlink()
    (root / "manifest.json").write_text(json.dumps({"counts": {"train": TRAIN, "test": TEST}}))
    return root


@pytest.fixture(autouse=True)
def sheets(monkeypatch):
    """What the command would draw; drawing itself takes long and is tested apart."""
    recorded = []
    monkeypatch.setattr(inspect, "TILE_PIXELS", 30)
    monkeypatch.setattr(inspect, "draw_contact_sheet", lambda *arguments: recorded.append(arguments))
    return recorded


def list_file(root, token, split):
    return root / f"digits_{token}_{split}_list.txt"


def edit(root, token, split, change):
    """Replace the rows of a list by change(rows)."""
    path = list_file(root, token, split)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def relabel(labels):
    return lambda rows: [f"{row.rsplit(maxsplit=1)[0]} {labels}".strip() for row in rows]


def report(root, capsys, *overrides):
    """Run the command; return its exit code, check -> its lines of the report, and the whole output."""
    code, sheet = 0, str(root / "sheet.png")
    try:
        inspect.main([CONFIG, "--set", f"data.root={root}", PAIR, *overrides, "--output", sheet, "--samples", "1"])
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr().out
    found, current = {}, None
    for line in output.splitlines():
        continued = current if line.startswith(" " * 40) else None
        current = next((key for key, name in CHECKS.items() if line.startswith(name)), continued)
        if current:
            found[current] = (found.get(current, "") + "\n" + line[40:]).strip()
    return code, found, output


def failures(found):
    return {key for key, text in found.items() if "FAILED" in text}


def test_sound_data_pass_every_check(data, capsys, sheets):
    code, found, output = report(data, capsys)
    assert code == 0 and list(found) == list(CHECKS) and all(text.startswith("ok") for text in found.values())
    assert f"GrayImg        {TRAIN}    {TEST}" in output and "root        " + str(data) in output
    (title, columns, blocks, path), = sheets
    assert title == "digits, pairing: instance" and columns == ["GrayImg", "PointCloud"] and path == data / "sheet.png"
    assert [(block.title, len(block.rows)) for block in blocks] == [("train", 1), ("test", 1)]


def test_counts_per_class_by_loops(data, capsys):
    (data / "manifest.json").write_text(json.dumps({"classes": ["zero", "one"]}))
    _, found, output = report(data, capsys)
    expected = {}
    for split in ("train", "test"):
        for row in list_file(data, "PointCloud", split).read_text().split("\n")[:-1]:
            expected.setdefault(int(row.split()[1]), {"train": 0, "test": 0})[split] += 1
    table = [line.split() for line in output.split("class ")[1].split("\n\n")[0].splitlines()[1:]]
    assert {int(row[0]): {"train": int(row[-2]), "test": int(row[-1])} for row in table} == expected
    assert [row[1] for row in table[:2]] == ["zero", "one"] and len(table[2]) == 3
    assert "nothing to compare" in found["counts"]


def test_the_manifest_of_the_lists_completes_that_of_the_objects(data, capsys):
    (data / "manifest.json").write_text(json.dumps({"counts": {"train": 7, "test": 7}, "class_to_index": {"one": 1, "zero": 0}}))
    counts = {split: {"GrayImg": size, "PointCloud": size} for split, size in (("train", TRAIN), ("test", TEST))}
    (data / "digits_pairs.json").write_text(json.dumps({"counts": counts}))
    code, found, output = report(data, capsys, "data.pairing=none", "data.positives=views")
    assert code == 0 and found["counts"] == "ok" and "\n0 zero" in output and "\n1 one" in output
    counts["test"]["PointCloud"] = 1
    (data / "digits_pairs.json").write_text(json.dumps({"counts": counts}))
    assert failures(report(data, capsys, "data.pairing=none", "data.positives=views")[1]) == {"counts"}


def test_classes_are_counted_per_list_where_the_modalities_differ(data, capsys):
    edit(data, "PointCloud", "test", relabel(7))
    _, _, output = report(data, capsys)
    header = next(line for line in output.splitlines() if line.startswith("class"))
    assert header.split() == ["class", "train", "test", "GrayImg", "test", "PointCloud"]


@pytest.mark.parametrize("label, lines", [(lambda row: 20231128123456 + row % 3, 3), (lambda row: 10**18 + row, 21)])
def test_labels_are_counted_by_value(data, capsys, monkeypatch, label, lines):
    monkeypatch.setattr(inspect, "MAX_CLASSES", 20)
    for split in ("train", "test"):
        for token in ("GrayImgs", "PointCloud"):
            edit(data, token, split, lambda rows: [f"{row.split()[0]} {label(number)}" for number, row in enumerate(rows)])
    code, _, output = report(data, capsys, "data.num_classes=null", "pla.num_clusters=3")
    table = output.split("\nclass ")[1].split("\n\n")[0].splitlines()[1:]
    assert code == 0 and len(table) == lines and table[0].split()[0] == str(label(0))


def test_training_lists_without_labels_are_fine(data, capsys):
    for token in ("GrayImgs", "PointCloud"):
        edit(data, token, "train", relabel(""))
    code, found, output = report(data, capsys)
    assert code == 0 and "without labels: train GrayImg, train PointCloud" in output
    assert "train: fewer than two lists with labels" in found["labels"]


def test_test_lists_without_labels_are_not(data, capsys):
    edit(data, "GrayImgs", "test", relabel(""))
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"parse"} and "evaluation needs labels; add the class" in found["parse"]


def test_a_missing_file(data, capsys, sheets):
    (data / "test/point_cloud/PointCloud_test_000004.npy").unlink()
    code, found, output = report(data, capsys)
    assert code == 1 and failures(found) == {"exist"} and len(found) == len(CHECKS)
    assert all(text in found["exist"] for text in ("row 5", "PointCloud_test_000004.npy", "prepare the data again"))
    others = set(CHECKS) - {"parse", "exist"}
    assert all("without test PointCloud: no readable list" in found[key] for key in others)
    assert "PointCloud     40     -" in output and len(sheets) == 1


def test_a_missing_list(data, capsys):
    list_file(data, "GrayImgs", "train").unlink()
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"parse"}
    assert "digits_GrayImgs_train_list.txt not found; make it with" in found["parse"]


def test_all_lists_missing(data, capsys, sheets):
    for path in data.glob("*_list.txt"):
        path.unlink()
    code, found, output = report(data, capsys)
    assert code == 1 and found["parse"].count("FAILED") == 4
    assert all(found[key].startswith("not run") for key in CHECKS if key != "parse")
    assert "no contact sheet" in output and "no list with labels" in output and not sheets


def test_broken_rows_of_two_lists_are_both_reported(data, capsys):
    edit(data, "GrayImgs", "train", lambda rows: [*rows, rows[0]])
    edit(data, "PointCloud", "test", lambda rows: [rows[0].rsplit(maxsplit=1)[0] + " 12", *rows[1:]])
    _, found, _ = report(data, capsys)
    assert failures(found) == {"parse"} and found["parse"].count("FAILED") == 2
    assert "already in row 1" in found["parse"] and "label 12 is outside 0..9" in found["parse"]


def test_shuffled_rows(data, capsys):
    edit(data, "PointCloud", "train", lambda rows: rows[::-1])
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"pairs"}  # labels are compared by object, so they still agree
    assert "row 1 is not the same object: id 000000" in found["pairs"] and "digits_PointCloud_train_list.txt" in found["pairs"]


def test_a_wrong_label(data, capsys):
    def swap(rows):
        name, label = rows[6].split()
        return [*rows[:6], f"{name} {(int(label) + 1) % 10}", *rows[7:]]
    edit(data, "GrayImgs", "train", swap)
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"labels"}
    assert "1 labels differ" in found["labels"] and found["labels"].count("row 7") == 2


def test_a_shared_file(data, capsys):
    for token in ("GrayImgs", "PointCloud"):
        shared = list_file(data, token, "train").read_text().splitlines()[3]
        edit(data, token, "test", lambda rows: [*rows[:3], shared, *rows[4:]])
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"splits"} and found["splits"].count("FAILED") == 2
    assert "GrayImg_train_000003.png is in the training list" in found["splits"] and "warning" not in found["splits"]


def test_a_copied_file_is_a_warning(data, capsys):
    shutil.copy(data / "train/gray_imgs/GrayImg_train_000009.png", data / "test/gray_imgs/GrayImg_test_000002.png")
    code, found, _ = report(data, capsys)
    assert code == 0 and "warning: 1 test files of GrayImg" in found["splits"] and found["splits"].startswith("ok")
    assert "GrayImg_test_000002.png and" in found["splits"] and "GrayImg_train_000009.png" in found["splits"]


def test_files_that_do_not_load(data, capsys):
    np.save(data / "train/point_cloud/PointCloud_train_000002.npy", np.full((48, 3), np.nan, np.float32))
    (data / "test/gray_imgs/GrayImg_test_000001.png").write_bytes(b"no image")
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"load"} and found["load"].count("FAILED") == 2
    assert "row 3" in found["load"] and "GrayImg_test_000001.png is not a readable" in found["load"]


def test_too_few_points_for_the_configuration(data, capsys):
    _, found, _ = report(data, capsys, "data.num_points=4096")
    assert failures(found) == {"load"} and "fewer than data.num_points = 4096" in found["load"]


@pytest.mark.parametrize("manifest,words", [
    ({"counts": {"train": TRAIN, "test": TEST + 1}}, f"{TEST} rows, the manifest says {TEST + 1}"),
    ({"counts": {"test": {"PointCloud": 3}}}, "the manifest says 3"),
    ([1], "expected a JSON object, found list"), ("{", "not valid JSON"),
])
def test_a_manifest_that_disagrees(data, capsys, manifest, words):
    (data / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    code, found, _ = report(data, capsys)
    assert code == 1 and failures(found) == {"counts"} and words in found["counts"]


def test_pairs_of_one_class(data, capsys):
    edit(data, "PointCloud", "train", lambda rows: rows[::-1])
    code, found, _ = report(data, capsys, "data.pairing=class")
    assert code == 1 and failures(found) == {"labels"} and "not unsupervised" in found["pairs"]
    edit(data, "GrayImgs", "train", lambda rows: rows[::-1])
    edit(data, "PointCloud", "test", lambda rows: rows[:5])
    assert report(data, capsys, "data.pairing=class")[0] == 0
    edit(data, "PointCloud", "train", lambda rows: rows[:7])
    _, found, _ = report(data, capsys, "data.pairing=class")
    assert failures(found) == {"pairs"} and "has 7" in found["pairs"]


def test_no_pairs_at_all(data, capsys):
    edit(data, "PointCloud", "train", lambda rows: rows[5:20])
    code, found, _ = report(data, capsys, "data.pairing=none", "data.positives=views")
    assert code == 0 and "no row is a pair" in found["pairs"] and found["labels"] == "ok"


def blocks_of(data, *overrides, count=4):
    config = load_data_config(CONFIG, [f"data.root={data}", PAIR, *overrides])
    return [make_block(config, read_lists(config)[0], split, count, ["zero", "one"]) for split in ("train", "test")]


def test_the_sheet_shows_the_files_of_evenly_spread_rows(data):
    train, test = blocks_of(data)
    assert [title for title, _ in train.rows] == ["000000", "000013", "000026", "000039"]
    label = int(list_file(data, "GrayImgs", "test").read_text().splitlines()[5].split()[1])
    assert test.rows[1][0] == f"000005\nclass {label}" + {0: " zero", 1: " one"}.get(label, "")
    picture = np.asarray(Image.open(data / "train/gray_imgs/GrayImg_train_000026.png"))
    assert np.array_equal(train.rows[2][1][0].image, np.repeat(picture[..., None], 3, axis=2))
    assert not any(tile.wrong or tile.caption for block in (train, test) for _, tiles in block.rows for tile in tiles)


def test_the_sheet_marks_what_does_not_match(data):
    edit(data, "PointCloud", "train", lambda rows: [rows[1], rows[0], *rows[2:14]])
    np.save(data / "test/point_cloud/PointCloud_test_000000.npy", np.zeros(3))
    train, test = blocks_of(data)
    clouds = [tiles[1] for _, tiles in train.rows]
    assert [(tile.caption, tile.wrong) for tile in clouds] == [("000001", True), ("", False), ("no row", True), ("no row", True)]
    assert test.rows[0][1][1] == Tile(None, "unreadable", True)
    list_file(data, "PointCloud", "train").unlink()
    assert blocks_of(data)[0].rows[0][1][1].caption == "list not read"


def test_unpaired_lists_are_spread_one_by_one(data):
    edit(data, "PointCloud", "train", lambda rows: rows[10:13])
    train, test = blocks_of(data, "data.pairing=none", "data.positives=views")
    captions = [[tile.caption for tile in tiles] for _, tiles in train.rows]
    assert captions == [["000000", "000010"], ["000013", "000011"], ["000026", "000012"], ["000039", "no row"]]
    assert {title for title, _ in [*train.rows, *test.rows]} == {""} and "class" in test.rows[0][1][0].caption


def test_modalities_prepared_beside_get_a_column_and_the_checks(data, capsys):
    for split, size in (("train", TRAIN), ("test", TEST)):
        rows = list_file(data, "GrayImgs", split).read_text()
        list_file(data, "RGBImgs", split).write_text(rows)
    _, found, output = report(data, capsys)
    assert "beside them RGBImg" in output and not failures(found)
    assert all(len(tiles) == 3 for block in blocks_of(data) for _, tiles in block.rows)
    edit(data, "RGBImgs", "test", lambda rows: rows[::-1])
    _, found, _ = report(data, capsys)
    assert failures(found) == {"pairs"}
    list_file(data, "RGBImgs", "train").unlink()  # only the configured modalities must be there
    assert "parse" not in failures(report(data, capsys)[1])


def test_the_drawn_sheet_has_a_red_frame_only_where_something_is_wrong(tmp_path):
    blue = np.full((8, 8, 3), (0, 0, 255), np.uint8)
    for name, wrong in (("a", False), ("b", True)):
        block = Block("train", [("x", [Tile(blue), Tile(blue, "y", wrong)])] * 2)
        draw_contact_sheet("T", ["One", "Two"], [block], tmp_path / f"{name}.png")
        pixels = (matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3] * 255).round()
        assert bool((np.abs(pixels - [215, 48, 39]).max(axis=2) <= 2).any()) == wrong
        assert (np.abs(pixels - [0, 0, 255]).max(axis=2) <= 2).sum() > 4 * 100 * 100  # four tiles
    for columns, blocks in (([], []), (["A"], []), (["A"], [Block("x", [])]), (["A"], [Block("x", [("", [])])])):
        with pytest.raises(ValueError, match="a contact sheet needs blocks of rows"):
            draw_contact_sheet("T", columns, blocks, tmp_path / "c.png")


def test_both_stages_and_overrides_are_read(tmp_path):
    assert load_data_config(str(ROOT / "configs/smoke/step2.yaml"), ["rdl.alpha=0.2", "data.num_points=8"]).num_points == 8
    assert load_data_config(CONFIG, ["pla.tau_1=0.4"]).dataset == "digits"
    (tmp_path / "bad.yaml").write_text("data: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_data_config(str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="no configuration file"):
        load_data_config(str(tmp_path / "none.yaml"))


def test_tables_are_aligned():
    assert align([["a", "bb"], ["xyz", 1], ["q", 1000]]) == "a      bb\nxyz     1\nq    1000"


def test_the_command_ends_with_1_on_a_failed_check_and_2_on_a_bad_call(data, tmp_path, monkeypatch, capsys):
    np.save(data / "train/point_cloud/PointCloud_train_000002.npy", np.zeros((0, 3)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    broken = subprocess.run(
        [sys.executable, "-m", "datasets.inspect", CONFIG, "--set", f"data.root={data}", PAIR, "--samples", "1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )
    assert broken.returncode == 1 and "FAILED" in broken.stdout and broken.stderr == ""
    assert matplotlib.image.imread(tmp_path / "digits_contact_sheet.png").ndim == 3  # drawn, at the default place
    monkeypatch.setattr(sys, "argv", ["inspect", CONFIG, "--samples", "0"])
    assert run_command(inspect.main) == 2 and capsys.readouterr().err == "error: --samples must be at least 1, found 0\n"
