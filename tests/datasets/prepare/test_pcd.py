"""PCD files: the three encodings written by hand, damaged files, and the preparation of a folder of them through its command."""

import json
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_modelnet import run

from datasets.prepare import modelnet as prepare_modelnet
from datasets.prepare.ownership import read_journal
from datasets.prepare.readers.modelnet import MODELNET10, MODELNET40
from datasets.prepare.readers.pcd import read_pcd, read_pcd_folder
from datasets.prepare.shapes.mesh import MeshError
from utils.errors import UserError

needs_pypcd4 = pytest.mark.skipif(find_spec("pypcd4") is None, reason="pypcd4 of requirements-data.txt is not installed")

NAN = float("nan")
POINTS = np.array([[0.5, -1.25, 3.0], [1e-3, 2e5, -7.0], [0.1, 0.2, 0.3]])
XYZ = [("x", "F", 4, 1), ("y", "F", 4, 1), ("z", "F", 4, 1)]
# Normals before and an array, colour and padding around the coordinates, which are of three types and in another order.
MIXED = [
    ("normal", "F", 4, 3), ("z", "F", 8, 1), ("rgb", "U", 4, 1), ("_", "U", 1, 3), ("x", "F", 4, 1), ("y", "I", 2, 1),
    ("_", "I", 1, 5),
]
def header(fields, count: int, encoding: str, **changes: str | None) -> bytes:
    lines = {
        "VERSION": "0.7",
        **{key: " ".join(str(field[i]) for field in fields) for i, key in enumerate(("FIELDS", "TYPE", "SIZE", "COUNT"))},
        "WIDTH": str(count), "HEIGHT": "1", "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": str(count), "DATA": encoding, **changes,
    }
    text = "# .PCD v0.7 - Point Cloud Data file format\n" + "".join(f"{k} {v}\n" for k, v in lines.items() if v is not None)
    return text.encode()


def pack_literals(data: bytes) -> bytes:
    """LZF without compression: runs of up to 32 literal bytes, each after its length - 1."""
    return b"".join(bytes([len(data[i : i + 32]) - 1]) + data[i : i + 32] for i in range(0, len(data), 32))


def write_pcd(points, encoding="ascii", fields=XYZ, pack=pack_literals, **changes: str | None) -> bytes:
    """A PCD file, value by value; fields other than x, y, z hold 1, 2, 3, ..."""
    rows = [[[row["xyz".index(name)]] if name in "xyz" else list(range(1, n + 1)) for name, _, _, n in fields] for row in points]
    start = header(fields, len(points), encoding, **changes)
    if encoding == "ascii":
        return start + "".join(" ".join(repr(v) for cell in row for v in cell) + "\n" for row in rows).encode()
    cells = [[np.array(cell).astype(f"<{kind.lower()}{size}").tobytes() for (_, kind, size, _), cell in zip(fields, row)] for row in rows]
    if encoding == "binary":
        return start + b"".join(map(b"".join, cells))
    body = b"".join(b"".join(column) for column in zip(*cells, strict=True))
    return start + struct.pack("<II", len(pack(body)), len(body)) + pack(body)


@pytest.fixture(params=["ascii", "binary", "binary_compressed"])
def encoding(request):
    pytest.importorskip("pypcd4", reason="pypcd4 of requirements-data.txt is not installed")
    return request.param


def test_other_fields_types_and_orders(encoding):
    points = [[0.5, -3, 0.1], [NAN, 4, 0.2], [1.5, 5, 1e-30], [2.5, 6, float("-inf")], [2.5, 6, 1e300]]
    cloud, dropped = read_pcd(write_pcd(points, encoding, MIXED))
    np.testing.assert_allclose(cloud, np.array([points[0], points[2]]), rtol=1e-6)
    assert cloud.dtype == np.float64 and cloud.flags.c_contiguous and cloud.flags.writeable and dropped == 3
    with pytest.raises(MeshError, match="none of the 2 points is valid"):
        read_pcd(write_pcd([[NAN, 0, 0], [0, float("inf"), 0]], encoding))


@needs_pypcd4
@pytest.mark.parametrize("old,new", [
    (b"\n", b"\r\n"), (b" ", b"\t"), (b" ", b"   "), (b"\n", b" \n"), (b"COUNT 1 1 1\n", b""), (b"VERSION 0.7", b"VERSION .5"),
    (b"POINTS 3\n", b""), (b"WIDTH 3\nHEIGHT 1\n", b""), (b"WIDTH 3\nHEIGHT 1", b"HEIGHT 3\nWIDTH 1"), (b"WIDTH", b"# by hand\n\nWIDTH"),
    (b"VIEWPOINT 0 0 0 1", b"VIEWPOINT 1e-5 -2 3 .5"), (b"VIEWPOINT 0 0 0 1 0 0 0\n", b""), (b" 0.3\n", b" 0.3\n\n\n"), (b" 0.3\n", b" 0.3"),
])
def test_what_ascii_writers_do(old, new):
    original = write_pcd(POINTS.tolist())
    assert old in original
    np.testing.assert_array_equal(read_pcd(original.replace(old, new))[0], POINTS)


@pytest.mark.parametrize("changes", [
    {"FIELDS": "x y w"}, {"FIELDS": "x y y"}, {"FIELDS": "x y"}, {"FIELDS": ""}, {"FIELDS": None}, {"SIZE": None}, {"SIZE": "4 4"},
    {"SIZE": "4 4 3"}, {"SIZE": "4 4 -4"}, {"SIZE": "4 4 four"}, {"TYPE": "F F D"}, {"TYPE": None}, {"COUNT": ""}, {"COUNT": "1 1 0"},
    {"COUNT": "1 1 2"}, {"COUNT": "1 1 " + "9" * 40}, {"POINTS": "2"}, {"POINTS": "-3", "WIDTH": "-3"}, {"POINTS": "0", "WIDTH": "0"},
    {"POINTS": "4", "WIDTH": "4"}, {"POINTS": "2", "WIDTH": "2"}, {"POINTS": "many"}, {"POINTS": ""}, {"POINTS": None, "WIDTH": None},
    {"DATA": "ASCII"}, {"DATA": "binary_packed"}, {"DATA": ""},
], ids=str)
def test_wrong_headers(encoding, changes):
    with pytest.raises(MeshError, match="PCD header|body of x, y, z|expected POINTS"):
        read_pcd(write_pcd(POINTS.tolist(), encoding, **changes))


@needs_pypcd4
@pytest.mark.parametrize("data,words", [
    *((data, "expected a PCD header") for data in (
        b"", b"\n\n", b"OFF\n8 6 0\n", b"\x00" * 100, b"\xff\xfe\n" * 10, b"# .PCD v0.7\n", header(XYZ, 1, "ascii")[:-1],
        header(XYZ, 1, "ascii").replace(b"POINTS", b"POINT"), header(XYZ, 1, "ascii").replace(b"DATA ascii\n", b""),
    )),
    *((header(XYZ, 3, "ascii") + rows, words) for rows, words in (
        (b"1 2 3\n4 5\n7 8 9\n", "not a readable"), (b"1 2 3 4\n4 5 6\n7 8 9\n", "not a readable"), (b"1 2 3\n4 5 six\n7 8 9\n", "six"),
        (b"1 2 3\n4 5 \xff\n7 8 9\n", "not a readable"), (b"1 2 3\n#5 5 5\n7 8 9\n", "3 points promised, 2 found"),
        (b"1 2 3\n", "promises 3 points, 1 follow"), (b"1 2 3\n" * 4, "promises 3 points, 4 follow"),
    )),
])
def test_other_files_and_wrong_bodies(data, words):
    with pytest.raises(MeshError, match=words):
        read_pcd(data)


def test_every_cut_is_noticed(encoding):
    """Cut after any byte: an ascii file may lose its last newline, and digits of its last number are not missed by anyone."""
    whole = write_pcd((POINTS + 0.125).tolist(), encoding, XYZ)
    last = whole.rindex(b" ") + 2 if encoding == "ascii" else len(whole)
    for length in range(last):
        with pytest.raises(MeshError):
            read_pcd(whole[:length])


def test_small_things_far_away_keep_their_shape(encoding):
    """Scans in coordinates of the world have eight bytes, of which four would be lost before the cloud is centred."""
    points = np.random.default_rng(0).normal(size=(20, 3)) + [5e5, 5.4e6, 100]
    for size in (8, 4) if encoding == "ascii" else (8,):  # text has all digits, whatever its header promises
        fields = [*((name, "F", size, 1) for name in "xyz"), ("rgb", "U", 4, 1)]
        np.testing.assert_array_equal(read_pcd(write_pcd(points.tolist(), encoding, fields))[0], points)


@needs_pypcd4
def test_bodies_with_more_than_the_header_says():
    import lzf

    whole = write_pcd(POINTS.tolist(), "binary")
    assert len(read_pcd(whole + bytes(11))[0]) == 3  # padding, less than a point
    with pytest.raises(MeshError, match="promises 3 points, 4 follow"):
        read_pcd(whole + bytes(12))
    assert len(read_pcd(write_pcd(np.tile(POINTS, (40, 1)).tolist(), "binary_compressed", pack=lzf.compress))[0]) == 120
    for packed, size in [
        (b"\xff" * 50, 1440), (pack_literals(bytes(1428)), 1440), (pack_literals(bytes(1440)), 1428), (pack_literals(bytes(1440)), 1441),
        (pack_literals(bytes(1452)), 1440), (b"", 1440),
    ]:
        with pytest.raises(MeshError, match="not a readable binary_compressed body"):
            read_pcd(header(XYZ, 120, "binary_compressed") + struct.pack("<II", len(packed), size) + packed)


def write_folder(root: Path, classes=("bathtub", "bed", "night_stand")) -> dict[str, np.ndarray]:
    """Two training clouds and a test cloud of each class; returns name -> points as written."""
    clouds, rng = {}, np.random.default_rng(0)
    for name, encoding in zip(classes, ("ascii", "binary", "binary"), strict=True):
        for number, split in enumerate(("train", "train", "test"), start=1):
            points = rng.normal(size=(60, 3))
            points = (points / np.linalg.norm(points, axis=1, keepdims=True) * [1, 2, 3]).astype(np.float32)
            path = root / name / split / f"{name}_{number:04d}.pcd"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(write_pcd(points.tolist(), encoding))
            clouds[path.stem] = points
    return clouds


def prepared(root: Path) -> tuple[dict, dict[str, dict], dict[str, np.ndarray]]:
    """The manifest, and the journal and the clouds by name."""
    entries = {entry["name"]: entry for entry in read_journal(root)[1].values()}
    files = {name: next((file for file in entry.get("files", ()) if file.endswith(".npy")), None) for name, entry in entries.items()}
    return json.loads((root / "manifest.json").read_text()), entries, {name: np.load(root / file) for name, file in files.items() if file}


@needs_pypcd4
@pytest.mark.parametrize("dataset,labels,classes,up,turn", [
    ("modelnet10_splat", MODELNET10, ("bathtub", "bed", "night_stand"), [], np.eye(3)),
    ("modelnet40_splat", MODELNET40, ("bed", "bench", "chair"), ["--up", "y"], [[1, 0, 0], [0, 0, 1], [0, -1, 0]]),
])
def test_a_folder_end_to_end(tmp_path, capsys, dataset, labels, classes, up, turn):
    clouds, root = write_folder(tmp_path / "in" / ("ModelNet40" if up else "."), classes), tmp_path / "out"
    run("--pcd", tmp_path / "in", "--root", root, *up)
    manifest, entries, stored = prepared(root)
    assert manifest["dataset"] == dataset and manifest["pictures"] == "splat" and manifest["official_counts"] is False
    assert manifest["modalities"] == ["RGBImg", "GrayImg", "PointCloud"] and manifest["counts"] == {"train": 6, "test": 3}
    assert manifest["left_out"] == [] and set(entries) == set(clouds) and "invalid points" not in capsys.readouterr().out
    for name, points in clouds.items():
        np.testing.assert_array_equal(stored[name], points @ np.array(turn, np.float32))  # turned, neither moved nor scaled
        assert entries[name]["label"] == list(labels).index(name[:-5]) and entries[name]["split"] == ("test" if name.endswith("3") else "train")
    if up:  # another axis is another data set
        with pytest.raises(UserError, match="input_sha256.*--overwrite"):
            run("--pcd", tmp_path / "in", "--root", root)


@needs_pypcd4
def test_invalid_points_and_broken_files(tmp_path, capsys):
    points = write_folder(tmp_path / "in")["bed_0001"]
    points[[3, 30], 1] = NAN
    night_stand = tmp_path / "in/night_stand/train/night_stand_0001.pcd"
    for name, content in (
        ("bed/train/bed_0001.pcd", write_pcd(points.tolist(), "binary")), ("bed/train/bed_0002.pcd", write_pcd([[NAN] * 3] * 5)),
        ("bathtub/train/bathtub_0001.pcd", write_pcd([[1.0, 2.0, 3.0]] * 5)), (night_stand, night_stand.read_bytes()[:-1]),
    ):
        (tmp_path / "in" / name).write_bytes(content)
    run("--pcd", tmp_path / "in", "--root", tmp_path / "out")
    manifest, entries, stored = prepared(tmp_path / "out")
    left_out = {entry["name"]: entry["left_out"] for entry in manifest["left_out"]}
    assert sorted(left_out) == ["bathtub_0001", "bed_0002", "night_stand_0001"] and manifest["counts"] == {"train": 3, "test": 3}
    assert "none of the 5 points is valid" in left_out["bed_0002"] and "60 points, 59 follow" in left_out["night_stand_0001"]
    assert "one place" in left_out["bathtub_0001"] and entries["bed_0001"]["dropped_points"] == 2
    np.testing.assert_array_equal(stored["bed_0001"], np.delete(points, [3, 30], axis=0))
    printed = capsys.readouterr().out
    assert "2 invalid points dropped from 1 clouds" in printed and printed.count("left out of every modality") == 3


def test_the_hash_follows_content_and_names_but_not_the_place(tmp_path):
    for folder in ("a", "b/ModelNet10", "renamed", "changed"):
        write_folder(tmp_path / folder)
    (tmp_path / "renamed/bed/test/bed_0003.pcd").rename(tmp_path / "renamed/bed/test/bed_0004.pcd")
    (tmp_path / "changed/bed/test/bed_0003.pcd").write_bytes(b"x")
    first, same, *others = (read_pcd_folder(tmp_path / name, up).sha256 for name, up in (("a", "z"), ("b", "z"), ("a", "y"), ("renamed", "z"), ("changed", "z")))
    assert first == same and len({first, *others}) == 4


@pytest.mark.parametrize("stray", [
    "bed/train/chair_0001.pcd", "bed/valid/bed_0009.pcd", "bed/train/bed.pcd", "ModelNet10/bed/bed_0009.pcd", "ModelNet30/bed/train/bed_0009.pcd",
])
def test_folders_that_do_not_fit(tmp_path, stray):
    with pytest.raises(UserError, match="expected CLASS/train/CLASS_0001.pcd"):
        read_pcd_folder(tmp_path, "z")
    write_folder(tmp_path)
    for ignored in ("README.txt", "bed/train/._bed_0001.pcd", "bed/train/bed_0001.off"):
        (tmp_path / ignored).write_bytes(b"x")
    assert len(read_pcd_folder(tmp_path, "z").shapes) == 9
    path = tmp_path / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=f"{path.name}: expected CLASS/train/CLASS_0001.pcd"):
        read_pcd_folder(tmp_path, "z")
    path.unlink()
    write_folder(tmp_path / "ModelNet10")
    with pytest.raises(UserError, match="one data set, found ModelNet10 and classes"):
        read_pcd_folder(tmp_path, "z")


def test_refusals_of_the_command(tmp_path):
    write_folder(tmp_path / "in")
    write_folder(tmp_path / "both/ModelNet10", ("bed", "sofa", "car"))
    with pytest.raises(UserError, match="modelnet10: found 6 / 3 objects.*--any-counts"):
        prepare_modelnet.main(["--pcd", str(tmp_path / "in"), "--root", str(tmp_path / "out")])
    (tmp_path / "in/bed/test/bed_0001.pcd").write_bytes(b"x")
    for folder, words in (("both", "car_000. occurs twice or is of no class"), ("in", "bed_0001 occurs twice")):
        with pytest.raises(UserError, match=words):
            run("--pcd", tmp_path / folder, "--root", tmp_path / "out")
    assert not (tmp_path / "out").exists()
