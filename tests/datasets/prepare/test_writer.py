"""The writer, with toy objects: what it makes, what it keeps when cut off anywhere, and what it refuses to touch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.lists import SampleList, check_paired, default_list_path, read_labelled_list
from datasets.prepare import parallel, writer
from datasets.prepare.shapes.mesh import MeshError
from datasets.prepare.writer import ObjectTask, write_dataset
from utils.errors import UserError

SETTINGS = {"dataset": "own", "modalities": ["RGBImg", "PointCloud"], "size": 4, "packages": {"vtk": "1"}}
TASKS = [ObjectTask(n // 2, f"thing {n}", ("train", "test")[n % 2], n % 3) for n in range(10)]
FILES = 3 * len(TASKS)  # two views and a cloud of each
CUTS = {  # step -> calls of it at which a run is cut off
    "produce": (1, 2, 10), "_write_journal": (1, 2, 3), "atomic_write_json": (1,), "atomic_write_text": (1, 2, 3, 5, 7),
    "os.replace": (1, 2, 3, 20), "_discard": (1,),
}


def make(size: int, made: list | None, stop: int, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Two pictures and a cloud; interrupts at the task after `stop`, unless it is negative."""
    if made is not None:
        if len(made) == stop:
            raise KeyboardInterrupt
        made.append(task.name)
    value = 10 * task.number + (task.split == "test")
    return {"RGBImg": np.full((2, size, size, 3), value, np.uint8), "PointCloud": np.full((size, 3), value, np.float32)}, {"fact": size}


def write(root: Path, made: list | None = None, stop: int = -1, size: int = 4, tasks=TASKS, workers: int = 1, **more) -> bool:
    settings = {**SETTINGS, "size": size, **{key: more.pop(key) for key in ("dataset", "packages") if key in more}}
    return write_dataset(root, settings, tasks, partial(make, size, made, stop), workers=workers, **more)[0]


def slow(task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    time.sleep(0.2)
    return make(4, None, -1, task)


def dies(names: str, task: ObjectTask) -> tuple[dict[str, np.ndarray], dict]:
    """Its process is killed by the objects of some names, as the system does when memory is short."""
    if re.search(names, task.name):
        os.kill(os.getpid(), signal.SIGKILL)
    return make(4, None, -1, task)


def snapshot(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and path.parent.name != ".arrays")  # which holds times
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def paired_lists(root: Path, dataset: str, modalities: Sequence[str]) -> tuple[dict[str, SampleList], list[int]]:
    """The training lists of a prepared data set, which pair their rows, and the labels that all of them give."""
    read = {name: read_labelled_list(default_list_path(root, dataset, name, "train"), modality=name, root=root) for name in modalities}
    check_paired([rows for rows, _ in read.values()])
    (labels,) = {tuple(values.tolist()) for _, values in read.values()}
    return {name: rows for name, (rows, _) in read.items()}, list(labels)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("writer") / "whole"
    write(root)
    return snapshot(root)


def test_what_is_written(tmp_path, whole):
    assert write(tmp_path)
    lists, labels = paired_lists(tmp_path, "own", SETTINGS["modalities"])
    assert labels == [task.label for task in TASKS if task.split == "train"]
    picture = Path(lists["RGBImg"].files[3])
    assert lists["RGBImg"].names[3] == "train/rgb_imgs/RGBImg_train_000003.png" and (np.asarray(Image.open(picture)) == 30).all()
    assert (picture.parent / "view_01" / picture.name).is_file() and np.load(lists["PointCloud"].files[3]).dtype == np.float32
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 5, "test": 5} and manifest["left_out"] == [] and manifest["packages"] == {"vtk": "1"}
    assert len(snapshot(tmp_path)) == FILES + 4 + 2 and not (tmp_path / ".preparing").exists()
    write(tmp_path / "parallel", workers=2)
    assert snapshot(tmp_path / "parallel") == whole


@pytest.mark.parametrize("before", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("step,call", [(step, call) for step, calls in CUTS.items() for call in calls])
def test_cut_off_anywhere_nothing_is_lost_and_the_next_run_ends_the_same(tmp_path, monkeypatch, whole, step, call, before):
    if before:
        write(tmp_path, size=6)
        (tmp_path / "train/rgb_imgs/notes.txt").write_text("mine")
    old, calls = snapshot(tmp_path), []
    original = os.replace if step == "os.replace" else getattr(writer, step)

    def dies(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(f"datasets.prepare.writer.{step}", dies)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, overwrite=before)
    if step != "_discard" and not (tmp_path / ".preparing/manifest.json").is_file():  # nothing has been moved yet
        assert old.items() <= snapshot(tmp_path).items() and (tmp_path / "manifest.json").is_file() == before
    write(tmp_path, overwrite=before)
    found = snapshot(tmp_path)
    assert (found.pop("train/rgb_imgs/notes.txt", None) == b"mine") == before and found == whole
    assert not (tmp_path / ".preparing").exists()


def test_no_object_is_made_twice(tmp_path, whole):
    made = []
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, made, stop=4)
    assert not list(tmp_path.glob("*")) or [path.name for path in tmp_path.glob("*")] == [".preparing"]
    with open(tmp_path / ".preparing/objects.jsonl", "a") as journal:
        journal.write('{"number": 4, "na')  # the line a killed run was writing
    (tmp_path / ".preparing/train/rgb_imgs/RGBImg_train_000099.png").write_bytes(b"left behind")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, made, stop=7)
    write(tmp_path, made)
    assert made == [task.name for task in TASKS] and snapshot(tmp_path) == whole


def test_a_damaged_or_lost_file_is_made_again_and_no_other_and_dependents_go_when_objects_change(tmp_path, whole):
    pairs, made = tmp_path / "own_pairs.json", []
    write(tmp_path)
    pairs.write_text("{}")
    (tmp_path / "train/rgb_imgs/view_01/RGBImg_train_000002.png").write_bytes(b"x")
    (tmp_path / "test/point_cloud/PointCloud_test_000001.npy").unlink()
    assert write(tmp_path, made, dependents=[pairs]) and made == ["thing 3", "thing 4"]
    (tmp_path / "own_RGBImgs_test_list.txt").unlink()
    assert write(tmp_path, made, dependents=[pairs]) and len(made) == 2 and snapshot(tmp_path) == {**whole, pairs.name: b"{}"}
    assert write(tmp_path, size=6, overwrite=True, dependents=[pairs]) and not pairs.exists()


def stat_of(path: Path) -> list[str]:
    """State, parent, group ... of a process that is no zombie; nothing of one that is, or is gone."""
    try:
        fields = path.read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields[0] != "Z" else []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc which processes there are")
def test_killed(tmp_path, whole):
    """`kill -9` of a run with two workers after its first objects, which end with it, then again."""
    code = "from test_writer import *; write_dataset(sys.argv[1], SETTINGS, TASKS, slow, workers=2)"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[3])])
    command, quiet = [sys.executable, "-c", code, tmp_path / "cut"], subprocess.DEVNULL
    child = subprocess.Popen(command, start_new_session=True, stderr=quiet, env={**os.environ, "PYTHONPATH": paths})
    journal, deadline, made = tmp_path / "cut/.preparing/objects.jsonl", time.time() + 120, []
    while time.time() < deadline and child.poll() is None and not (journal.is_file() and len(journal.read_bytes().splitlines()) > 2):
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "cut/manifest.json").exists()
    alive = lambda: [path for path in Path("/proc").glob("[0-9]*/stat") if stat_of(path)[2:3] == [str(child.pid)]]
    while alive() and time.time() < deadline:
        time.sleep(0.05)
    assert not alive()
    write(tmp_path / "cut", made)
    assert snapshot(tmp_path / "cut") == whole and len(made) < len(TASKS)


def test_an_object_that_kills_its_process_is_listed_and_tried_again_next_time(tmp_path, whole, monkeypatch):
    made, manifest = write_dataset(tmp_path, SETTINGS, TASKS, partial(dies, "thing 4"), workers=2)
    assert [(entry["name"], entry["left_out"]) for entry in manifest["left_out"]] == [("thing 4", parallel.DIED)]
    assert manifest["counts"] == {"train": 4, "test": 5}
    write(tmp_path, again := [])
    assert made and again == ["thing 4"] and snapshot(tmp_path) == whole
    with pytest.raises(UserError, match="no usable object in the train split: 2 of 2 are left out"):
        write_dataset(tmp_path / "new", SETTINGS, TASKS[:2], partial(dies, ""), workers=2)
    assert (tmp_path / "new/skipped.csv").read_text().count("its process died") == 2
    monkeypatch.setattr(parallel, "_run_pool", lambda *_: iter(()))
    with pytest.raises(UserError, match="die before they have anything to do"):
        write(tmp_path / "none", workers=2)


@pytest.mark.parametrize("stop", [None, "moved", "before"])
def test_an_empty_split_takes_a_whole_group_from_the_other(tmp_path, monkeypatch, stop):
    """Objects 3 and 4 are copies; also when the run is cut off just before or after they were moved, or repeated."""
    tasks = [ObjectTask(n, f"thing {n}", "test" if n == 5 else "train", None, group=str(min(n, 3))) for n in range(6)]

    def broken(task):
        if task.number == 5:
            raise MeshError("no good")
        return make(4, None, -1, task)

    def cut_off(*arguments):
        found = writer_take(*arguments)
        if stop == "before" or not found:
            raise KeyboardInterrupt
        return found

    writer_take = writer.take_for_empty_split
    if stop:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(writer, "take_for_empty_split", cut_off)
            write_dataset(tmp_path, SETTINGS, tasks, broken)
    for again in (False, True):
        made, manifest = write_dataset(tmp_path, SETTINGS, tasks, broken)
        assert made == (not again) and manifest["counts"] == {"train": 3, "test": 2} and len(manifest["left_out"]) == 1
        assert sorted(path.name for path in (tmp_path / "test/point_cloud").iterdir()) == [f"PointCloud_test_{n:06d}.npy" for n in (3, 4)]
        assert len(list(tmp_path.rglob("*.npy"))) == 5
    (tmp_path / "test/point_cloud/PointCloud_test_000003.npy").unlink()
    assert write_dataset(tmp_path, SETTINGS, tasks, broken)[1]["counts"] == {"train": 3, "test": 2} and len(list(tmp_path.rglob("*.npy"))) == 5
    with pytest.raises(UserError, match="no usable object in the test split: 1 of 3"):  # of one group alone
        write_dataset(tmp_path / "new", SETTINGS, tasks[3:], broken)
    assert (tmp_path / "new/skipped.csv").read_text().splitlines() == ["object,reason", "thing 5,no good"]


def test_other_settings_need_overwrite_and_a_failure_leaves_the_data(tmp_path, whole):
    write(tmp_path)
    with pytest.raises(UserError, match="other settings or input .size: 4 instead of 6.*--overwrite"):
        write(tmp_path, size=6)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [], stop=3, size=6, overwrite=True)
    assert whole.items() <= snapshot(tmp_path).items()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not write(tmp_path)  # the finished data are still those of the first settings
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", [], stop=3, size=6)
    with pytest.raises(UserError, match="size: 6 instead of 8"):  # nor is a half-built set thrown away
        write(tmp_path / "new", size=8)
    made = []
    assert write(tmp_path, made, size=6, overwrite=True) and len(made) == 7  # three were there already
    assert np.load(tmp_path / "train/point_cloud/PointCloud_train_000000.npy").shape == (6, 3)
    write(tmp_path, tasks=TASKS[:4], overwrite=True)
    assert len(list((tmp_path / "train").rglob("*.*"))) == 6  # fewer objects leave no files of the others


def test_other_package_versions_change_nothing_but_are_recorded(tmp_path, whole):
    write(tmp_path)
    assert not write(tmp_path, packages={"vtk": "2"}) and snapshot(tmp_path) == whole
    (tmp_path / "test/point_cloud/PointCloud_test_000001.npy").unlink()
    assert write(tmp_path, packages={"vtk": "2"})
    assert json.loads((tmp_path / "manifest.json").read_text())["packages"] == {"vtk": "1, 2"}
    made = []
    assert write(tmp_path, made, packages={"vtk": "2"}, overwrite=True) and len(made) == len(TASKS)
    assert json.loads((tmp_path / "manifest.json").read_text())["packages"] == {"vtk": "2"}


def put(root: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"mine")
    return dict.fromkeys(names, b"mine")


def test_files_of_others_stay(tmp_path):
    write(tmp_path)
    others = put(tmp_path, "train/rgb_imgs/.DS_Store", "train/rgb_imgs/notes.txt", "test/Thumbs.db", "raw/mnist.gz", "my_list.txt")
    assert not write(tmp_path) and write(tmp_path, size=6, overwrite=True) and others.items() <= snapshot(tmp_path).items()


@pytest.mark.parametrize("name", ["train/precious.txt", "test/.DS_Store", "own_RGBImgs_train_list.txt", ".preparing/notes.txt"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_data_that_no_preparation_made_are_refused(tmp_path, name, overwrite):
    others = put(tmp_path, name)
    with pytest.raises(UserError, match="no preparation command made it"):
        write(tmp_path, overwrite=overwrite)
    assert snapshot(tmp_path) == others


def test_the_folder_of_another_data_set_is_refused(tmp_path, whole):
    write(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="of the data set 'own', not 'other'"):
            write(tmp_path, dataset="other", overwrite=overwrite)
    assert snapshot(tmp_path) == whole
    (tmp_path / "objects.jsonl").unlink()  # the manifest says it too
    with pytest.raises(UserError, match="of the data set 'own', not 'other'"):
        write(tmp_path, dataset="other")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        write(tmp_path)


def test_unusable_objects_are_left_out_of_everything(tmp_path, capsys):
    def broken(task):
        if task.name == "thing 4" or (task.split == "test" and task.label == 9):
            raise MeshError("no good")
        return make(4, None, -1, task)

    _, manifest = write_dataset(tmp_path, SETTINGS, TASKS, broken)
    assert "left out of every modality: train thing 4: no good" in capsys.readouterr().out
    assert manifest["counts"] == {"train": 4, "test": 5} and manifest["left_out"][0]["name"] == "thing 4"
    assert not list(tmp_path.rglob("*_000002.*"))[3:] and not write_dataset(tmp_path, SETTINGS, TASKS, broken)[0]
    tasks = [ObjectTask(0, "a", "train", 0), ObjectTask(0, "b", "test", 9)]
    with pytest.raises(UserError, match="no usable object in the test split"):
        write_dataset(tmp_path / "new", SETTINGS, tasks, broken)
    assert not (tmp_path / "new/manifest.json").exists()


def test_bad_calls_and_disks_are_one_message(tmp_path, monkeypatch, capsys):
    from utils.engine.session import run_command  # here alone: the worker processes of other tests import this file

    for tasks, workers in (([], 1), (TASKS[:1] * 2, 1), (TASKS, 0)):
        with pytest.raises(UserError, match="distinct numbers and at least one worker"):
            write(tmp_path, tasks=tasks, workers=workers)
    (tmp_path / "file").touch()
    for root in ("file", "file/below"):
        assert run_command(lambda root=root: write(tmp_path / root)) == 2
        assert capsys.readouterr().err.startswith("error: ")
    original = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda self, data: original(self, data[:0] if "PointCloud" in self.name else data))
        with pytest.raises(UserError, match="thing 0 do not read back.*run the same command again"):
            write(tmp_path / "lossy")
    assert not (tmp_path / "lossy/manifest.json").exists()

    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path / "full")
