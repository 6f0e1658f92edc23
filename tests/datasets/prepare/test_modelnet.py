"""Preparation of ModelNet through its command: miniature archives, interruption, objects that cannot be used, the real clouds."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_writer import paired_lists

from datasets.prepare import modelnet
from datasets.prepare.ownership import read_journal
from datasets.prepare.readers.archives import read_member
from datasets.prepare.readers.modelnet import MODELNET10, OFFICIAL, Source, check_official, make_tasks, read_archive, read_hdf5, read_npz
from datasets.prepare.shapes.mesh import MeshError
from utils.errors import UserError

REAL = [(f"modelnet{n}", Path(f"../shared/data/modelnet{n}_points/modelnet{n}_points.npz"), counts) for n, counts in ((10, [3991, 908]), (40, [9843, 2468]))]
BOX = "OFF8 6 0\n0 0 0\n{0} 0 0\n{0} 1 0\n0 1 0\n0 0 1\n{0} 0 1\n{0} 1 1\n0 1 1\n4 0 3 2 1\n4 4 5 6 7\n4 0 1 5 4\n4 1 2 6 5\n4 2 3 7 6\n4 3 0 4 7\n"
NAMES = ["bathtub_0001", "bed_0001", "night_stand_0001", "night_stand_0002", "table_0001"]
SPLATS = ["--any-counts", "--workers", "1", "--views", "2", "--size", "24"]


def write_npz(path: Path, count: int = 6, **changes) -> Path:
    rng = np.random.default_rng(0)
    names = np.array([NAMES[i % 5][:-4] + f"{i:04d}" for i in range(count)])
    points = rng.normal(size=(count, 40, 3))
    points /= np.linalg.norm(points, axis=2, keepdims=True)
    classes = np.array(list(MODELNET10))
    arrays = {
        "points": np.rint(points * 32767).astype(np.int16), "instance_id": names, "classes": classes,
        "split": np.array(["test" if i % 3 == 2 else "train" for i in range(count)]),
        "label": np.array([classes.tolist().index(name.rsplit("_", 1)[0]) for name in names], np.int8),
    }
    np.savez(path, **{**arrays, **changes})
    return path


def run(*arguments: str | Path) -> None:
    modelnet.main([*map(str, arguments), *SPLATS])


@pytest.mark.parametrize("dataset,path,counts", REAL, ids=["10", "40"])
def test_the_real_clouds(dataset, path, counts):
    assert [sum(n[i] for n in OFFICIAL[dataset].values()) for i in (0, 1)] == counts and list(OFFICIAL[dataset]) == sorted(OFFICIAL[dataset])
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    source = read_npz(path)
    assert source.dataset == dataset and check_official(source, any_counts=False)
    tasks = make_tasks(source)
    with np.load(path) as archive:
        row = archive["instance_id"].tolist().index(tasks[0].name)
        assert tasks[0].label == archive["label"][row] and tasks[0].split == archive["split"][row]
        np.testing.assert_array_equal(np.rint(tasks[0].cloud * 32767), archive["points"][row])
    labels = np.array([task.label for task in tasks])
    assert (labels[1:] != labels[:-1]).mean() > 0.7  # the order tells nothing about the class
    training = next(i for i, shape in enumerate(source.shapes) if shape.split == "train")
    fewer = Source(dataset, source.shapes[:training] + source.shapes[training + 3 :], "")
    with pytest.raises(UserError, match="counts differ.*--any-counts"):
        check_official(fewer, any_counts=False)
    assert check_official(fewer, any_counts=True, hdf5=True) == (dataset == "modelnet40")  # only the HDF5 set lacks three


def test_splats_end_to_end(tmp_path):
    root, points = tmp_path / "out", np.load(write_npz(tmp_path / "a.npz"))["points"].copy()
    with pytest.raises(UserError, match="modelnet10: found 4 / 2 objects.*bathtub/test: 1 instead of 50.*--any-counts"):
        modelnet.main(["--npz", str(tmp_path / "a.npz"), "--root", str(root)])
    assert not root.exists()
    points[1] = 0  # all in one place
    run("--npz", write_npz(tmp_path / "a.npz", points=points), "--root", root)
    lists, labels = paired_lists(root, "modelnet10_splat", ("RGBImg", "GrayImg", "PointCloud"))
    kept = [read_journal(root)[1]["train", int(number)] for number in lists["RGBImg"].instance_ids]
    assert len(kept) == 3 and labels == [list(MODELNET10).index(e["name"].rsplit("_", 1)[0]) for e in kept]
    assert not any(name.split("_")[0] in " ".join(lists["RGBImg"].names) for name in MODELNET10)
    with np.load(tmp_path / "a.npz") as archive:
        row = archive["instance_id"].tolist().index(kept[0]["name"])
        stored = np.load(lists["PointCloud"].files[0])
        assert stored.dtype == np.float32 and np.array_equal(stored, archive["points"][row].astype(np.float32) / 32767)
    first = Path(lists["RGBImg"].files[0])
    pictures = first, first.parent / "view_01" / first.name, lists["GrayImg"].files[0]
    first, second, gray = map(np.asarray, map(Image.open, pictures))
    assert first.shape == second.shape == (24, 24, 3) and (first != second).any() and gray.shape == (24, 24)
    np.testing.assert_allclose(gray, first @ [0.299, 0.587, 0.114], atol=0.51)
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 3, "test": 2} and manifest["pictures"] == "splat" and manifest["official_counts"] is False
    assert [e["name"] for e in manifest["left_out"]] == ["bed_0001"] and "one place" in manifest["left_out"][0]["left_out"]


@pytest.mark.parametrize("changes,words", [
    ({"points": np.zeros((6, 40, 3))}, "expected int16 points"), ({"points": np.zeros((5, 40, 3), np.int16)}, "expected int16 points"),
    ({"instance_id": np.arange(6)}, "ids int64"), ({"instance_id": np.array([b"bed_0001"] * 6)}, "both texts"),
    ({"label": np.zeros(6, np.int8)}, "labels as in the names"), ({"split": np.array(["valid"] * 6)}, "expected splits train and test"),
    ({"label": np.full(6, 77, np.int8)}, "positions in classes"),
    ({"instance_id": np.array(["bed_0001"] * 6), "label": np.full(6, 1, np.int8)}, "occurs twice"),
])
def test_bad_npz(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make_tasks(read_npz(write_npz(tmp_path / "a.npz", **changes)))


def test_wrong_sources(tmp_path):
    for read, words in ((read_npz, "modelnet10_points.npz"), (read_archive, "ModelNet10.zip")):
        with pytest.raises(UserError, match=words):
            read(tmp_path / "none")
    for bad in (["--size", "4"], ["--seed", "-1"], ["--views", "0"], ["--elevation", "90"]):
        with pytest.raises(UserError, match="at least"):
            modelnet.main(["--npz", str(write_npz(tmp_path / "a.npz")), "--any-counts", *bad])
    for arguments in ([], ["--npz", "x", "--archive", "y"], *(["--pcd", "d", other, "x"] for other in ("--npz", "--archive", "--points"))):
        with pytest.raises(UserError, match="expected --archive.*or --pcd DIR"):
            modelnet.main(arguments)
    assert read_archive(write_archive(tmp_path / "ModelNet10.zip")).dataset == "modelnet10"
    with zipfile.ZipFile(tmp_path / "ModelNet10.zip", "a") as archive:
        archive.writestr("ModelNet40/car/train/car_0001.off", "x")
    with pytest.raises(UserError, match="modelnet10.*modelnet40"):
        read_archive(tmp_path / "ModelNet10.zip")


def write_hdf5(folder: Path, plain: bool = False) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    folder.mkdir()
    parts = {("train", 0): NAMES[:2], ("train", 1): NAMES[2:3], ("test", 0): NAMES[3:]}
    for (split, number), names in parts.items():
        stem = f"{split}{number}" if plain else f"ply_data_{split}{number}"
        with h5py.File(folder / f"{stem}.h5", "w") as file:
            file["data"] = np.stack([np.eye(3, dtype=np.float32)[np.arange(30) % 3] * (1 + NAMES.index(name)) for name in names])
            file["label"] = np.zeros((len(names), 1), np.uint8)
        ids = f"{stem}_id2file.json" if plain else f"ply_data_{split}_{number}_id2file.json"
        (folder / ids).write_text(json.dumps([f"x/{name}.ply" for name in names]))


@pytest.mark.parametrize("plain", [False, True])
def test_hdf5_clouds(tmp_path, plain):
    write_hdf5(tmp_path / "h", plain)
    source = read_hdf5(tmp_path / "h", up="y")
    assert {shape.name: shape.split for shape in source.shapes} == dict(zip(NAMES, ["train"] * 3 + ["test"] * 2, strict=True))
    cloud = next(shape.cloud for shape in source.shapes if shape.name == "night_stand_0001")
    np.testing.assert_array_equal(cloud[:3], [[3, 0, 0], [0, 0, 3], [0, -3, 0]])  # y became up, not mirrored
    as_stored = {shape.name: shape.cloud for shape in read_hdf5(tmp_path / "h", up="z").shapes}
    assert np.array_equal(as_stored["bathtub_0001"][:3], np.eye(3))
    assert source.dataset == "modelnet10" and [s.object_class for s in source.shapes].count("night_stand") == 2
    with pytest.raises(UserError, match="expected ply_data_train0.h5"):
        read_hdf5(tmp_path, up="y")
    ids = next((tmp_path / "h").glob("*train*1_id2file.json"))
    ids.write_text("[]")
    with pytest.raises(UserError, match=r"expected data of shape \(0, n, 3\)"):
        read_hdf5(tmp_path / "h", up="y")
    ids.unlink()
    with pytest.raises(UserError, match="which object each cloud is"):
        read_hdf5(tmp_path / "h", up="y")


def write_archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for size, (name, split) in enumerate(zip(NAMES, ["train"] * 3 + ["test"] * 2, strict=True), start=1):
            text = BOX.format(size) if name != "bed_0001" else "OFF\n8 6 0\n0 0 0\n"
            archive.writestr(f"ModelNet10/{name.rsplit('_', 1)[0]}/{split}/{name}.off", text)
        for junk in ("ModelNet10/.DS_Store", "__MACOSX/ModelNet10/bed/train/bed_0009.off", "ModelNet10/README.txt"):
            archive.writestr(junk, "junk")
    return path


MEMBER = "ModelNet10/bathtub/train/bathtub_0001.off"


def patched(path: Path, offset: int, value: bytes, signatures=(b"PK\x03\x04", b"PK\x01\x02"), name: str = MEMBER) -> Path:
    """Overwrite two bytes of the headers of one member: 6 its flags, 8 its method, both as in the local header."""
    data = bytearray(path.read_bytes())
    for signature, length, shift in ((b"PK\x03\x04", 30, 0), (b"PK\x01\x02", 46, 2)):
        place = data.find(signature)
        while place >= 0 and data[place + length : place + length + len(name)] != name.encode():
            place = data.find(signature, place + 1)
        if signature in signatures:
            data[place + offset + shift : place + offset + shift + 2] = value
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("offset,value,words", [
    (8, b"\x09\x00", "Deflate64 .9."), (8, b"\x5d\x00", "Zstandard"), (8, b"\x63\x00", "AES"), (8, b"\x4d\x00", "an unknown method"),
    (6, b"\x01\x00", "encryption"),
])
def test_members_that_python_cannot_read_are_one_message(tmp_path, offset, value, words):
    path = patched(write_archive(tmp_path / "a.zip"), offset, value)
    with pytest.raises(UserError, match=rf"{path}, member {MEMBER}: packed with {words}.*pack the folder again as a plain zip"):
        run("--archive", path, "--root", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_split_cut_and_damaged_archives_are_one_message(tmp_path):
    path = write_archive(tmp_path / "a.zip")
    whole, place = path.read_bytes(), path.read_bytes().index(b"bathtub_0001.off") + 20
    # with the shift: the number of the part it starts in, and the checksum
    of_several, wrong_sum = (patched(write_archive(path), offset, value, (b"PK\x01\x02",)).read_bytes() for offset, value in ((32, b"\x01\x00"), (14, b"\0\0")))
    incomplete, damaged = "not a complete zip file .*{}.*join them first", f"{path}, member {MEMBER}: damaged or missing .*fetch the archive again"
    for data, error, words in (
        (of_several, UserError, incomplete.format("last part of several")), (whole[:-30], UserError, incomplete.format("not a zip")),
        (whole[300:], (UserError, MeshError), ""), (b"PK\x03\x04 cut", UserError, incomplete.format("not a zip")),
        (whole[:place] + b"\xff" * 8 + whole[place + 8 :], MeshError, damaged), (wrong_sum, MeshError, damaged),
    ):
        path.write_bytes(data)
        with pytest.raises(error, match=words or None):
            [read_member(path, member) for member in [MEMBER, *(shape.member for shape in read_archive(path).shapes)]]
        modelnet.read_member.__globals__["_open"].cache_clear()


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text", lambda data: data[:200] + b"\xff" * 60 + data[260:],
])
def test_damaged_npz_files_are_one_message(tmp_path, damage):
    path = write_npz(tmp_path / "a.npz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}, member points.npy: .*fetch the archive again"):
        read_npz(path)
    patched(write_npz(path), 8, b"\x09\x00", name="points.npy")
    with pytest.raises(UserError, match="member points.npy: cannot be read.*pack the folder again"):
        read_npz(path)
    np.savez(path, points=np.zeros(3))
    with pytest.raises(UserError, match="^[^,]*a.npz: expected the arrays points, instance_id, split, label, classes .*, found points$"):
        read_npz(path)


def test_meshes_end_to_end(tmp_path, monkeypatch, renderer):
    monkeypatch.setattr(modelnet, "probe_renderer", lambda: None)
    write_hdf5(tmp_path / "h")
    for root, extra in (("sampled", []), ("given", ["--points", tmp_path / "h"])):
        run("--archive", write_archive(tmp_path / "ModelNet10.zip"), "--root", tmp_path / root, "--num-points", "64", *extra)
        manifest = json.loads((tmp_path / root / "manifest.json").read_text())
        assert manifest["counts"] == {"train": 2, "test": 2} and manifest["pictures"] == "mesh"
        assert [entry["name"] for entry in manifest["left_out"]] == ["bed_0001"] and "lines follow" in manifest["left_out"][0]["left_out"]
        rows = (tmp_path / root / "modelnet10_Mesh_train_list.txt").read_text().split()
        faces = np.load(tmp_path / root / rows[0])
        assert faces.shape == (12, 18) and faces.dtype == np.float32
        cloud = np.load(tmp_path / root / rows[0].replace("Mesh", "PointCloud").replace("mesh", "point_cloud"))
        assert cloud.shape == ((64, 3) if root == "sampled" else (30, 3)) and cloud.dtype == np.float32
        if root == "sampled":
            assert np.linalg.norm(cloud, axis=1).max() <= 1 + 1e-6 < 2 * np.linalg.norm(cloud, axis=1).max()
