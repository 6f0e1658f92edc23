"""Arrays kept in mapped files: equal to what the files give, made again when one changes, never half-written, never in the way."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from time import sleep

import numpy as np
import pytest
import torch
from stage_runs import assert_same_result, distinct, smoke_samples

import train_step1
from datasets import stored
from datasets.kinds import KINDS
from utils.errors import UserError

ALL = "data.modalities=[RGBImg,GrayImg,PointCloud,Mesh]"


@pytest.fixture
def root(small_digits, tmp_path):
    """A copy of the small digits that may be changed."""
    return shutil.copytree(small_digits, tmp_path / "data", ignore=shutil.ignore_patterns(stored.FOLDER))


def kept(root):
    return {path.name: path.stat().st_mtime_ns for path in (root / stored.FOLDER).iterdir() if path.name != ".lock"}


def test_the_stored_arrays_are_those_of_the_files_and_shared(root):
    config, first = smoke_samples(root, ALL)
    before = kept(root)
    _, second = smoke_samples(root, ALL)
    assert kept(root) == before and len(before) == 8
    for name, rows in first.lists.items():
        plain = KINDS[config.data.kind_of(name)].load(rows, config.data)
        assert np.array_equal(plain, second.arrays[name]) and plain.dtype == second.arrays[name].numpy().dtype
        assert first.fingerprints[name] == second.fingerprints[name] == stored.hashlib.sha256(plain).hexdigest()
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else str(root / stored.FOLDER)
    assert str(root / stored.FOLDER) in maps


def test_what_changes_the_array_makes_another_and_what_does_not_makes_none(root):
    _, first = smoke_samples(root)
    cloud = first.lists["PointCloud"].files[3]
    before = kept(root)
    for path in root.glob("*_train_list.txt"):
        path.write_text(path.read_text().replace(" 1\n", " 2\n"))  # labels
    smoke_samples(root, "data.num_points=16", "data.image_size=24")
    assert kept(root) == before
    np.save(cloud, np.load(cloud)[::-1])
    _, second = smoke_samples(root)
    assert second.fingerprints["PointCloud"] == first.fingerprints["PointCloud"]  # another order of the points is the same cloud
    np.save(cloud, np.load(cloud) * [1, 2, 3])
    _, third = smoke_samples(root)
    assert third.fingerprints["PointCloud"] != first.fingerprints["PointCloud"] and not torch.equal(third.arrays["PointCloud"], first.arrays["PointCloud"])
    assert third.fingerprints["GrayImg"] == first.fingerprints["GrayImg"] and len(kept(root)) == len(before)  # old ones are gone
    listed = next(root.glob("*PointCloud_train_list.txt"))
    pictures = next(root.glob("*GrayImgs_train_list.txt"))
    for path in (listed, pictures):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert smoke_samples(root)[1].counts == {"GrayImg": 39, "PointCloud": 39}
    smoke_samples(root, "data.image_resize=40")
    assert len(kept(root)) == len(before) + 2  # another size beside it
    Path(first.lists["GrayImg"].files[0]).write_bytes(b"no picture")
    with pytest.raises(UserError, match="row 1: .*is not a readable"):
        smoke_samples(root)
    assert not [name for name in kept(root) if name.endswith(".tmp")]


def test_arrays_of_an_older_format_go(root, monkeypatch):
    smoke_samples(root)
    before = kept(root)
    monkeypatch.setattr(stored, "FORMAT", stored.FORMAT + 1)
    smoke_samples(root)
    assert len(kept(root)) == len(before) and not set(kept(root)) & set(before)


def test_a_damaged_or_unwritable_store_gives_the_same_arrays(root, monkeypatch):
    _, first = smoke_samples(root)
    arrays = {name: values.clone() for name, values in first.arrays.items()}  # the file itself is what the test damages
    array = next((root / stored.FOLDER).glob("*PointCloud*.npy"))
    content = array.read_bytes()
    array.write_bytes(content[:-4] + b"\0\0\0\0")
    next((root / stored.FOLDER).glob("*GrayImgs*.json")).write_text("{")
    _, second = smoke_samples(root)
    assert second.fingerprints == first.fingerprints and array.read_bytes() == content
    monkeypatch.setattr(stored, "FOLDER", "list.txt/no_folder")
    with pytest.warns(UserWarning, match="takes no file"):
        _, third = smoke_samples(root)
    assert third.fingerprints == {} and all(torch.equal(third.arrays[name], values) for name, values in arrays.items())


def test_starts_at_the_same_time_make_one_array_and_share_it(root):
    config, samples = smoke_samples(root)
    rows, kind, loads = samples.lists["PointCloud"], KINDS["points"], []
    for path in (root / stored.FOLDER).iterdir():
        path.unlink()
    together = Barrier(4)

    def start(_):
        together.wait()
        slow = replace(kind, load=lambda *given: [loads.append(1), sleep(0.1), kind.load(*given)][2])
        return stored.stored_array(rows, slow, config.data)[1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(4))) == [samples.fingerprints["PointCloud"]] * 4
    assert len(loads) == 1


def test_checks_of_other_settings_hold_for_stored_arrays(root):
    smoke_samples(root)
    with pytest.raises(UserError, match="fewer than data.eval_subsets = 2 disjoint"):
        smoke_samples(root, "data.eval_subsets=2")


def test_a_run_resumed_without_the_store_is_the_same_run(finished, small_digits, tmp_path, monkeypatch):
    train_step1.main(distinct(small_digits, tmp_path, 1, "optim.epochs=4"))
    monkeypatch.setattr(stored, "FOLDER", "list.txt/no_folder")
    with pytest.warns(UserWarning, match="takes no file"):
        train_step1.main(["--resume", str(next((tmp_path / "runs/digits/step1").iterdir()))])
    assert_same_result(finished, tmp_path, 1)
