"""python -m datasets.inspect: what it counts, which check reports which defect, and what the contact sheet shows."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import TEST, TRAIN
from PIL import Image

from datasets.kinds import KINDS
from datasets.prepare import inspect
from datasets.prepare.checks import Check, read_lists, run_checks
from datasets.prepare.inspect import load_data_config, make_block
from utils.engine.session import run_command
from utils.figures.contact_sheet import Block, Tile, draw_contact_sheet

ROOT = Path(__file__).resolve().parents[3]
CONFIG = str(ROOT / "configs/smoke/step1.yaml")
PAIR = "data.modalities=[GrayImg,PointCloud]"
UNPAIRED = ["data.pairing=none", "data.positives=views"]
CHECKS = {
    "parse": "list files exist and parse", "exist": "listed files exist", "pairs": "rows are paired",
    "labels": "labels agree between modalities", "splits": "training and test are disjoint", "load": "every file loads",
    "counts": "lists are as long as the manifest says",
}


@pytest.fixture
def data(small_digits, tmp_path):
    """A copy that may be broken: GrayImg and PointCloud alone, with a manifest."""
    root = tmp_path / "data"
    shutil.copytree(small_digits, root, ignore=shutil.ignore_patterns("*RGB*_list.txt", "*Mesh*_list.txt"))
    manifest({"counts": {"train": TRAIN, "test": TEST}})(root)
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


def edit(token, split, change):
    """A harm: the rows of a list become change(rows)."""
    def harm(root):
        path = list_file(root, token, split)
        path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")

    return harm


def relabel(label):
    """The labels become label(row number), none for an empty text."""
    return lambda rows: [f"{row.split()[0]} {label(number)}".strip() for number, row in enumerate(rows)]


def manifest(content, name="manifest.json"):
    return lambda root: (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


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


def test_sound_data_pass_every_check_and_are_counted(data, capsys, sheets):
    manifest({"classes": ["zero", "one"]}, "digits_pairs.json")(data)
    code, found, output = report(data, capsys)
    assert code == 0 and list(found) == list(CHECKS) and all(text.startswith("ok") for text in found.values())
    assert f"GrayImg        {TRAIN}    {TEST}" in output and "root        " + str(data) in output
    (title, columns, blocks, path), = sheets
    assert title == "digits, pairing: instance" and columns == ["GrayImg", "PointCloud"] and path == data / "sheet.png"
    assert [(block.title, len(block.rows)) for block in blocks] == [("train", 1), ("test", 1)]
    labels = {split: [int(row.split()[1]) for row in list_file(data, "PointCloud", split).read_text().splitlines()] for split in ("train", "test")}
    table = [line.split() for line in output.split("class ")[1].split("\n\n")[0].splitlines()[1:]]
    assert {int(row[0]): tuple(map(int, row[-2:])) for row in table} == {
        label: tuple(rows.count(label) for rows in labels.values()) for label in {*labels["train"], *labels["test"]}}
    assert [row[1] for row in table[:2]] == ["zero", "one"] and len(table[2]) == 3


def test_the_manifest_of_the_lists_completes_that_of_the_objects(data, capsys):
    manifest({"counts": {"train": 7, "test": 7}, "class_to_index": {"one": 1, "zero": 0}})(data)
    for clouds, failed in ((TEST, set()), (1, {"counts"})):
        counts = {"train": {"GrayImg": TRAIN, "PointCloud": TRAIN}, "test": {"GrayImg": TEST, "PointCloud": clouds}}
        manifest({"counts": counts}, "digits_pairs.json")(data)
        code, found, output = report(data, capsys, *UNPAIRED)
        assert code == bool(failed) and failures(found) == failed and "\n0 zero" in output and "\n1 one" in output


@pytest.mark.parametrize("label, lines", [(lambda row: 20231128123456 + row % 3, 3), (lambda row: 10**18 + row, 21)])
def test_labels_are_counted_by_value_and_per_list_where_the_modalities_differ(data, capsys, monkeypatch, label, lines):
    monkeypatch.setattr(inspect, "MAX_CLASSES", 20)
    for split in ("train", "test"):
        for token in ("GrayImgs", "PointCloud"):
            edit(token, split, relabel(label))(data)
    any_label = "data.num_classes=null", "pla.num_clusters=3"
    code, _, output = report(data, capsys, *any_label)
    table = output.split("\nclass ")[1].split("\n\n")[0].splitlines()[1:]
    assert code == 0 and len(table) == lines and table[0].split()[0] == str(label(0))
    edit("PointCloud", "test", relabel(lambda row: 7))(data)
    header = next(line for line in report(data, capsys, *any_label)[2].splitlines() if line.startswith("class"))
    assert header.split() == ["class", "train", "test", "GrayImg", "test", "PointCloud"]


def test_all_lists_missing(data, capsys, sheets):
    for path in data.glob("*_list.txt"):
        path.unlink()
    code, found, output = report(data, capsys)
    assert code == 1 and found["parse"].count("FAILED") == 2  # test lists may be absent
    assert all(found[key].startswith("not run") for key in CHECKS if key != "parse")
    assert "no contact sheet" in output and "no list with labels" in output and not sheets


def wrong_label(rows):
    name, label = rows[6].split()
    return [*rows[:6], f"{name} {(int(label) + 1) % 10}", *rows[7:]]


def share(token):
    return lambda root: edit(token, "test", lambda rows: [*rows[:3], list_file(root, token, "train").read_text().splitlines()[3], *rows[4:]])(root)


def copy(root):
    shutil.copy(root / "train/gray_imgs/GrayImg_train_000009.png", root / "test/gray_imgs/GrayImg_test_000002.png")


def unloadable(root):
    np.save(root / "train/point_cloud/PointCloud_train_000002.npy", np.full((48, 3), np.nan, np.float32))
    (root / "test/gray_imgs/GrayImg_test_000001.png").write_bytes(b"no image")


BARE = relabel(lambda row: "")
REVERSED = edit("PointCloud", "train", lambda rows: rows[::-1])
UNLABELLED = [edit("GrayImgs", "train", BARE), edit("PointCloud", "train", BARE)]
UNREAD = [f"{key}: without test PointCloud: no readable list" for key in list(CHECKS)[2:]]


@pytest.mark.parametrize("harms,overrides,failed,words", [  # "check: words of its report"
    (UNLABELLED, [], "", ["labels: train: fewer than two lists with labels"]),
    ([edit("GrayImgs", "test", BARE)], [], "parse", ["parse: evaluation needs labels; add the class"]),
    ([edit("GrayImgs", "test", BARE), edit("PointCloud", "test", BARE)], [], "", ["parse: training runs, evaluation is skipped"]),
    ([lambda root: [list_file(root, name, "test").unlink() for name in ("GrayImgs", "PointCloud")]], [], "",
     ["parse: training runs, evaluation is skipped"]),
    ([lambda root: list_file(root, "GrayImgs", "test").unlink()], [], "parse", ["parse: GrayImgs_test_list.txt: expected rows"]),
    ([lambda root: (root / "test/point_cloud/PointCloud_test_000004.npy").unlink()], [], "exist",
     ["exist: prepare the data again", "exist: row 5", "exist: PointCloud_test_000004.npy", *UNREAD]),
    ([lambda root: list_file(root, "GrayImgs", "train").unlink()], [], "parse", ["parse: GrayImgs_train_list.txt not found; make it with"]),
    ([edit("GrayImgs", "train", lambda rows: [*rows, rows[0]]), edit("PointCloud", "test", lambda rows: [*rows[1:], rows[0].split()[0] + " 12"])],
     [], "parse", ["parse: already in row 1", "parse: label 12 is outside 0..9"]),
    ([REVERSED], [], "pairs", ["pairs: row 1 is not the same object: id 000000", "pairs: digits_PointCloud_train_list.txt"]),
    ([edit("GrayImgs", "train", wrong_label)], [], "labels", ["labels: 1 labels differ", "labels: row 7"]),
    ([share("GrayImgs"), share("PointCloud")], [], "splits", ["splits: GrayImg_train_000003.png is in the training list"]),
    ([copy], [], "", ["splits: warning: 1 test files of GrayImg", "splits: GrayImg_test_000002.png and", "splits: GrayImg_train_000009.png"]),
    ([unloadable], [], "load", ["load: row 3", "load: GrayImg_test_000001.png is not a readable"]),
    ([], ["data.num_points=4096"], "load", ["load: fewer than data.num_points = 4096"]),
    ([manifest({"counts": {"train": TRAIN, "test": TEST + 1}})], [], "counts", [f"counts: {TEST} rows, the manifest says {TEST + 1}; correct it, or remove it"]),
    ([manifest({"counts": {"test": {"PointCloud": 3}}})], [], "counts", ["counts: the manifest says 3"]),
    ([manifest([1])], [], "counts", ["counts: expected a JSON object, found a list"]),
    ([manifest("{")], [], "counts", ["counts: manifest.json is damaged"]),
    ([manifest({})], [], "", ["counts: nothing to compare"]),
    ([REVERSED], ["data.pairing=class"], "labels", ["pairs: not unsupervised"]),
    ([REVERSED, edit("GrayImgs", "train", lambda rows: rows[::-1]), edit("PointCloud", "test", lambda rows: rows[:5])],
     ["data.pairing=class"], "", []),
    ([edit("PointCloud", "train", lambda rows: rows[:7])], ["data.pairing=class"], "pairs", ["pairs: has 7"]),
    ([edit("PointCloud", "train", lambda rows: rows[5:20])], UNPAIRED, "", ["pairs: no row is a pair"]),
])
def test_every_defect_is_reported_by_its_check_alone(data, capsys, sheets, harms, overrides, failed, words):
    for harm in harms:
        harm(data)
    code, found, output = report(data, capsys, *overrides)
    assert code == bool(failed) and failures(found) == set(failed.split()) and list(found) == list(CHECKS) and len(sheets) == 1
    assert all(text in found[check] for check, text in (entry.split(": ", 1) for entry in words))
    assert ("without labels: train GrayImg, train PointCloud" in output) == (harms is UNLABELLED)


def blocks_of(data, *overrides, count=4):
    config = load_data_config(CONFIG, [f"data.root={data}", PAIR, *overrides])
    return [make_block(config, read_lists(config)[0], split, count, ["zero", "one"]) for split in ("train", "test")]


def test_the_sheet_shows_the_files_of_evenly_spread_rows_and_marks_what_does_not_match(data):
    train, test = blocks_of(data)
    assert [title for title, _ in train.rows] == ["000000", "000013", "000026", "000039"]
    label = int(list_file(data, "GrayImgs", "test").read_text().splitlines()[5].split()[1])
    assert test.rows[1][0] == f"000005\nclass {label}" + {0: " zero", 1: " one"}.get(label, "")
    picture = np.asarray(Image.open(data / "train/gray_imgs/GrayImg_train_000026.png"))
    assert np.array_equal(train.rows[2][1][0].image, np.repeat(picture[..., None], 3, axis=2))
    assert not any(tile.wrong or tile.caption for block in (train, test) for _, tiles in block.rows for tile in tiles)
    edit("PointCloud", "train", lambda rows: [rows[1], rows[0], *rows[2:14]])(data)
    np.save(data / "test/point_cloud/PointCloud_test_000000.npy", np.zeros(3))
    train, test = blocks_of(data)
    clouds = [tiles[1] for _, tiles in train.rows]
    assert [(tile.caption, tile.wrong) for tile in clouds] == [("000001", True), ("", False), ("no row", True), ("no row", True)]
    assert test.rows[0][1][1] == Tile(None, "unreadable", True)
    list_file(data, "PointCloud", "train").unlink()
    assert blocks_of(data)[0].rows[0][1][1].caption == "list not read"


def test_unpaired_lists_are_spread_one_by_one(data):
    edit("PointCloud", "train", lambda rows: rows[10:13])(data)
    train, test = blocks_of(data, *UNPAIRED)
    captions = [[tile.caption for tile in tiles] for _, tiles in train.rows]
    assert captions == [["000000", "000010"], ["000013", "000011"], ["000026", "000012"], ["000039", "no row"]]
    assert {title for title, _ in [*train.rows, *test.rows]} == {""} and "class" in test.rows[0][1][0].caption


def test_modalities_prepared_beside_get_a_column_and_the_checks(data, capsys):
    for split in ("train", "test"):
        list_file(data, "RGBImgs", split).write_text(list_file(data, "GrayImgs", split).read_text())
    _, found, output = report(data, capsys)
    assert "beside them RGBImg" in output and not failures(found)
    assert all(len(tiles) == 3 for block in blocks_of(data) for _, tiles in block.rows)
    edit("RGBImgs", "test", lambda rows: rows[::-1])(data)
    assert failures(report(data, capsys)[1]) == {"pairs"}
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


def test_captions_of_any_length_stay_off_the_pictures(tmp_path):
    blue = np.full((8, 8, 3), (0, 0, 255), np.uint8)
    rows = [("", [Tile(blue, "RGBImg_test_000000_of_a_long_name\nclass 12 a name\nthree")] * 2)] * 3
    draw_contact_sheet("T", ["One", "Two"], [Block("test", rows)], tmp_path / "a.png")
    picture = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round()
    seen = (np.abs(picture - [0, 0, 255]).max(axis=2) <= 2)
    lines, columns = (np.flatnonzero(np.diff(seen.any(axis=axis).astype(int))).reshape(-1, 2) + 1 for axis in (1, 0))
    assert (len(lines), len(columns)) == (3, 2) and all(seen[a:b, c:d].all() for a, b in lines for c, d in columns)
    gaps = [picture[b:c, columns[0][1] + 6 : columns[1][0] - 6] for (_, b), (c, _) in zip(lines, lines[1:])]
    assert all((gap == 255).all() for gap in gaps)  # nor do they reach into each other
    with pytest.raises(ValueError, match="shorter"):
        draw_contact_sheet("T", ["One", "Two", "Three"], [Block("test", rows)], tmp_path / "b.png")


def test_the_command_ends_with_1_on_a_failed_check_and_2_on_a_bad_call(data, tmp_path, monkeypatch, capsys):
    unloadable(data)
    broken = subprocess.run(
        [sys.executable, "-m", "datasets.inspect", str(ROOT / "configs/smoke/step2.yaml"), "--set", f"data.root={data}", PAIR, "--samples", "1"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )
    assert broken.returncode == 1 and "FAILED" in broken.stdout and broken.stderr == ""
    assert matplotlib.image.imread(tmp_path / "digits_contact_sheet.png").ndim == 3  # drawn, at the default place
    (tmp_path / "bad.yaml").write_text("data: [")
    for bad, words in (([CONFIG, "--samples", "0"], "--samples must be at least 1"), (["none.yaml"], "no configuration file"), ([str(tmp_path / "bad.yaml")], "YAML")):
        monkeypatch.setattr(sys, "argv", ["inspect", *bad])
        assert run_command(inspect.main) == 2 and words in capsys.readouterr().err


def test_features_are_checked_and_shown_as_such(data, capsys, sheets):
    for split in ("train", "test"):
        rows = list_file(data, "GrayImgs", split).read_text().splitlines()
        list_file(data, "GrayImgs", split).write_text("".join(f"{row.replace('.png', '.npy')}\n" for row in rows))
        for row in rows:
            np.save(data / row.split()[0].replace(".png", ".npy"), np.ones((2, 5)))
    code, found, _ = report(data, capsys, "data.features.GrayImg=5")
    assert code == 0 and not failures(found)
    assert failures(report(data, capsys, "data.features.GrayImg=4")[1]) == {"load"}
    assert blocks_of(data, "data.features.GrayImg=5")[0].rows[0][1][0].caption == "5 numbers"


def test_a_bug_of_ours_is_no_finding_about_the_data(data, monkeypatch):
    settings = load_data_config(CONFIG, [f"data.root={data}", PAIR])
    lists, _ = read_lists(settings)
    broken = replace(KINDS["points"], load=lambda *given: np.zeros(3).reshape(2))
    monkeypatch.setitem(KINDS, "points", broken)
    for run in (lambda: list(run_checks(settings, lists)), lambda: make_block(settings, lists, "train", 2, []),
                lambda: Check("any").attempt(broken.load)):
        with pytest.raises(ValueError, match="cannot reshape"):
            run()
