"""Preparation of any folder of 3D models through its command: every file is right or listed with its reason."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train_step1
from datasets.lists import read_labelled_list
from datasets.prepare import objects
from datasets.prepare.ownership import read_journal
from datasets.prepare.readers.collection import Item, make_tasks, read_folder, read_npz, remarks
from datasets.prepare.readers.objects import joined, read_cloud, read_npz_parts, read_parts
from datasets.prepare.shapes.looks import look_of
from datasets.prepare.shapes.mesh import MeshError, triangle_areas
from datasets.samples import load_test_samples, load_training_samples
from utils.errors import UserError
from utils.settings.config import load_config
from utils.settings.options import Step1Config, Step2Config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SMALL = ["--size", "16", "--views", "1", "--num-points", "32", "--workers", "1"]
BOX = (1.0, 2.0, 4.0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory of its own, with the shared configurations."""
    shutil.copytree(CONFIGS / "shared", tmp_path / "configs/shared")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, data) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def exports(mesh) -> dict[str, bytes]:
    """Name -> a file of the mesh in every format, and in both kinds of PLY and STL."""
    made = {f"{suffix}.{suffix}": mesh.export(file_type=suffix) for suffix in ("off", "obj", "stl", "ply", "glb")}
    made |= {"ascii.ply": mesh.export(file_type="ply", encoding="ascii"), "text.stl": mesh.export(file_type="stl_ascii")}
    return {name: data.encode() if isinstance(data, str) else data for name, data in made.items()}


def textured_box(trimesh):
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 8, 4))
    box = trimesh.creation.box(BOX)
    uv = 0.9 * box.vertices[:, 1:] / BOX[1:] + 0.5  # at 1 a texture begins anew
    return trimesh.Trimesh(box.vertices, box.faces, visual=trimesh.visual.TextureVisuals(uv=uv, image=picture), process=False)


def extents(root: Path, entry: dict) -> np.ndarray:
    name = next(name for name in entry["files"] if "Mesh" in name)
    faces = np.load(root / name)
    corners = (faces[:, None, :3] + faces[:, 3:12].reshape(-1, 3, 3)).reshape(-1, 3)
    return np.ptp(corners, axis=0) / np.ptp(corners, axis=0).max()


def hostile(source: Path, trimesh) -> dict[str, str]:
    """Write files that cannot be used; return name -> what must be said of each."""
    ball = trimesh.creation.icosphere(subdivisions=1)
    broken = trimesh.Trimesh(ball.vertices.copy(), ball.faces, process=False)
    broken.vertices[3] = np.nan
    reasons = {}
    for name, data in exports(ball).items():
        reasons |= {f"ball/empty-{name}": "an empty file", f"ball/cut-{name}": "", f"ball/nan-{name}": "finite|fit"}
        for kind, content in (("empty", b""), ("cut", data[: int(0.7 * len(data))]), ("nan", exports(broken)[name])):
            put(source / f"ball/{kind}-{name}", content)
    loaded = {"noise.glb": os.urandom(999), "noise.stl.stl": os.urandom(999), "text.ply": "hello", "lines.obj": "v 0 0 0\nv 1 1 1\nl 1 2\n",
              "packed.gltf": '{"extensionsRequired": ["KHR_draco_mesh_compression"]}', "dot.off": "OFF\n3 1 0\n1 1 1\n1 1 1\n1 1 1\n3 0 1 2\n"}
    said = ("cannot be read", "cannot be read|cut short|finite|place", "not a readable PLY", "no face", "KHR_draco", "one place")
    for (name, data), reason in zip(loaded.items(), said, strict=True):
        put(source / "ball" / name, data)
        reasons[f"ball/{name}"] = reason
    os.symlink("/nowhere", source / "ball/link.obj")
    os.mkfifo(source / "ball/pipe.obj")
    np.save(source / "ball/cloud.npy", ball.vertices)
    put(source / "loose.obj", exports(ball)["obj.obj"])
    put(source / "box/obj.stl", exports(ball)["stl.stl"])
    return reasons | {"ball/link.obj": "regular file", "ball/pipe.obj": "regular file", "ball/cloud.npy": "a point cloud among meshes",
                      "loose.obj": "in no class folder", "box/obj.stl": "same folder as box/obj.obj"}


def test_every_file_is_right_or_listed(here, trimesh, renderer, monkeypatch, capsys):
    monkeypatch.setattr(objects, "probe_renderer", lambda: None)
    source, root = here / "modèles 模", here / "out"
    box, reasons = trimesh.creation.box(BOX), hostile(source, trimesh)
    good = {f"box/{name}": data for name, data in exports(box).items()}
    good |= {"ball/obj.obj": exports(trimesh.creation.icosphere())["obj.obj"], "box/Ünï 'x'.obj": good["box/obj.obj"]}
    good[os.fsdecode(b"box/caf\xe9.STL")] = good["box/stl.stl"]
    good["ball/triangle.off"] = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0.5\n3 0 1 2\n"
    good["box/millimetres.stl"] = trimesh.creation.box(np.multiply(BOX, 1000)).export(file_type="stl")
    scene = trimesh.Scene([trimesh.creation.box()])
    scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([3, 0, 0]))
    good["box/scene.glb"] = scene.export(file_type="glb")
    for name, data in good.items():
        put(source / name, data)
    put(source / "box/readme.txt", "x"), put(source / "box/._a.obj", "junk")
    objects.main(["--name", "mine", "--root", str(source), "--output", str(root), "--unit", "mm", *SMALL])
    printed = capsys.readouterr().out
    rows = list(csv.reader((root / "skipped.csv").read_text(encoding="utf-8").splitlines()))[1:]
    assert dict(rows).keys() == reasons.keys()
    assert f"{len(reasons)} of {len(reasons) + len(good)} objects skipped" in printed and "1 .txt" in printed
    for name, reason in rows:
        assert re.search(reasons[name], reason), (name, reason)
    entries = {entry["name"]: entry for entry in read_journal(root)[1].values() if "files" in entry}
    assert entries.keys() == {os.fsencode(name).decode(errors="backslashreplace") for name in good}
    for name, entry in entries.items():
        if name.startswith("box/") and "scene" not in name:
            across = (1, 4, 2) if name.endswith("glb") else BOX  # y is up in GLB
            np.testing.assert_allclose(extents(root, entry), np.divide(across, 4), atol=1e-4, err_msg=name)
    assert entries["box/millimetres.stl"]["size"] == pytest.approx(4.0) and entries["box/obj.obj"]["size"] == pytest.approx(0.004)
    np.testing.assert_allclose(extents(root, entries["box/scene.glb"]), [1, 0.25, 0.25], atol=1e-4)
    assert entries["box/scene.glb"]["size"] == pytest.approx(4.0) and entries["ball/triangle.off"]["faces_after"] == 1
    names, labels = read_labelled_list(root / "mine_Mesh_train_list.txt", modality="Mesh", root=root, num_classes=2)
    by_number = {entry["number"]: name for name, entry in entries.items()}
    assert [("ball", "box").index(by_number[int(number)].split("/")[0]) for number in names.instance_ids] == labels.tolist()
    for step, kind in ((1, Step1Config), (2, Step2Config)):
        assert f"python train_step{step}.py --config configs/mine/step{step}.yaml" in printed
        data = load_config(kind, f"configs/mine/step{step}.yaml").data
        assert (data.dataset, data.num_classes, len(data.modalities), data.num_points, data.eval_subsets) == ("mine", 2, 4, 32, 1)
    stored = {path.name: path.stat().st_mtime_ns for path in (root / ".arrays").glob("*.npy")}
    load_test_samples(data, torch.device("cpu"), load_training_samples(data, torch.device("cpu")))
    assert stored == {path.name: path.stat().st_mtime_ns for path in (root / ".arrays").glob("*.npy")} and len(stored) == 8


@pytest.mark.parametrize("name", ["off.off", "stl.stl", "text.stl", "ply.ply", "ascii.ply", "glb.glb"])
def test_no_cut_file_passes_for_a_smaller_mesh(tmp_path, trimesh, name):
    data, path = exports(trimesh.creation.box(BOX))[name], tmp_path / name
    assert len(read_parts(put(path, data), False)[0][1]) == 12
    for end in range(0, len(data), 17):
        try:
            assert len(read_parts(put(path, data[:end]), False)[0][1]) == 12 and end > len(data) - 3
        except Exception:  # make_object turns what trimesh raises into a reason
            continue


PLY = "ply\nformat {kind} 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n" \
      "element face {count}\nproperty list uchar int vertex_indices\nend_header\n"


@pytest.mark.parametrize("kind,order", [("ascii", ""), ("binary_little_endian", "<"), ("binary_big_endian", ">")])
@pytest.mark.parametrize("split", range(7))
def test_ply_files_of_polygons(tmp_path, trimesh, kind, order, split):
    corners = trimesh.creation.box(BOX).vertices
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = [part for row, quad in enumerate(quads) for part in ([quad] if row >= split else [quad[:3], [quad[0], *quad[2:]]])]
    if order:
        body = corners.astype(order + "f4").tobytes() + b"".join(bytes([len(face)]) + np.array(face, order + "i4").tobytes() for face in faces)
    else:
        body = "".join("%g %g %g\n" % tuple(row) for row in corners) + "".join(f"{len(face)} {' '.join(map(str, face))}\n" for face in faces)
        body = body.encode()
    data, path = PLY.format(kind=kind, count=len(faces)).encode() + body, tmp_path / "a.ply"
    for texture in (False, True):
        vertices, triangles = joined(read_parts(put(path, data), texture))
        assert len(triangles) == 12 and triangle_areas(vertices, triangles).sum() == pytest.approx(2 * (2 + 4 + 8))
    for end in range(len(data) - len(body), len(data) - 2, 1 if split in (0, 3) else 13):
        with pytest.raises(MeshError):
            read_parts(put(path, data[:end]), False)


def test_stl_files_of_several_solids_and_with_more_behind_them(tmp_path, trimesh):
    text, path = trimesh.creation.box(BOX).export(file_type="stl_ascii"), tmp_path / "a.stl"
    both = f"{text}\n{text}\n"
    assert len(joined(read_parts(put(path, both), False))[1]) == 24
    for share in (0.55, 0.7, 0.9, 0.97):
        with pytest.raises(Exception, match="cut short|cannot|incorrect|."):
            read_parts(put(path, both[: int(share * len(both))]), False)
    assert len(read_parts(put(path, trimesh.creation.box(BOX).export(file_type="stl") + b"made by hand"), False)[0][1]) == 12


def changed(data: bytes, change) -> bytes:
    """A GLB file whose description `change` has changed in place."""
    size = int.from_bytes(data[12:16], "little")
    content = json.loads(data[20 : 20 + size])
    change(content)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    header = b"glTF" + (2).to_bytes(4, "little") + (len(data) - size + len(text)).to_bytes(4, "little") + len(text).to_bytes(4, "little")
    return header + data[16:20] + text + data[20 + size :]


@pytest.mark.parametrize("change,words", [
    (lambda content: content.update(extensionsRequired=["EXT_of_mine"]), "EXT_of_mine"),
    (lambda content: content.update(extensionsUsed=["EXT_mesh_gpu_instancing"]), "instancing"),
    (lambda content: content["meshes"][0]["primitives"][0].update(mode=6), "a triangle fan"),
    (lambda content: [accessor.update(normalized=True) for accessor in content["accessors"]], "normalised integer"),
    (lambda content: [accessor.update(sparse={"count": 1}) for accessor in content["accessors"]], "sparse"),
    (lambda content: content["nodes"][0].update(camera=0, children=[1]), "below a camera"),
    (lambda content: [node.update(camera=0) for node in content["nodes"] if "mesh" in node], "of or below a camera"),
    (lambda content: content["nodes"][0].update(skin=0), "a skin"),
    (lambda content: content.pop("scenes"), "no scene shows"),
    (lambda content: content["scenes"][0].update(nodes=[]), "no scene shows"),
    (lambda content: content["meshes"][0].update(weights=[0, 0.5]), "a morph target"),
    (lambda content: content["meshes"][0].update(weights=[0, 0]), None),
    (lambda content: content.update(extensionsUsed=["KHR_lights_punctual"], extensionsRequired=["KHR_materials_unlit"]), None),
])
def test_what_trimesh_passes_over_in_gltf_files_is_refused(tmp_path, trimesh, change, words):
    path = put(tmp_path / "a.glb", changed(trimesh.creation.box(BOX).export(file_type="glb"), change))
    if words is None:
        assert len(read_parts(path, False)[0][1]) == 12
    else:
        with pytest.raises(MeshError, match=f"not read: .*{words}"):
            read_parts(path, False)


def test_a_damaged_texture_does_not_cost_its_object(tmp_path, trimesh):
    data = textured_box(trimesh).export(file_type="glb")
    start = data.index(b"IDAT") + 6
    path = put(tmp_path / "a.glb", data[:start] + bytes(6) + data[start + 6 :])
    for texture in (False, True):
        ((_, triangles, look),) = read_parts(path, texture)
        assert len(triangles) == 12 and look is None
    assert read_parts(put(path, data), True)[0][2] is not None


def test_textures_are_drawn_where_they_are_asked_for(here, trimesh, renderer, monkeypatch, capsys):
    monkeypatch.setattr(objects, "probe_renderer", lambda: None)
    box = textured_box(trimesh)
    put(here / "models/a.glb", box.export(file_type="glb"))
    box.export(here / "models/b.obj")
    for kind, extra in (("neutral", []), ("painted", ["--texture"])):
        objects.main(["--name", kind, "--root", "models", *SMALL, "--up", "z", *extra])
        pictures = [np.asarray(Image.open(path)).astype(int) for path in Path(f"dataset/{kind}").rglob("RGBImg*.png")]
        assert len(pictures) == 2
        for red, _, blue in (np.moveaxis(picture, -1, 0) for picture in pictures):
            rows = [np.nonzero(excess > 100)[0] for excess in (blue - red, red - blue)]
            assert [len(found) > 5 for found in rows] == [kind == "painted"] * 2
            assert kind == "neutral" or rows[0].mean() < rows[1].mean() - 2  # the upper half of the texture is blue
    for number in range(2):
        put(here / f"bare/{number}.stl", trimesh.creation.box((1, 2, 2 + number)).export(file_type="stl"))
    assert "drawn neutral" not in capsys.readouterr().out
    objects.main(["--name", "bare", "--root", "bare", *SMALL, "--texture"])
    assert "note: 2 objects have no colour or texture that was found" in capsys.readouterr().out


def test_textures_take_the_factor_of_their_material_and_no_quantised_coordinates(trimesh):
    box = textured_box(trimesh)
    box.visual.material = trimesh.visual.material.PBRMaterial(baseColorTexture=box.visual.material.image)
    assert (look_of(box)[1] == np.asarray(box.visual.material.baseColorTexture)).all()
    box.visual.material.baseColorFactor = (0, 255, 51, 255)
    assert look_of(box)[1][0, 0].tolist() == [0, 0, 51] and look_of(box)[1][7, 7].tolist() == [0, 0, 0]
    box.visual.uv = np.rint(box.visual.uv * 255)
    assert look_of(box) is None
    box.visual.uv = np.rint(box.visual.uv / 255)  # repeats
    assert look_of(box) is not None


def test_parts_that_trimesh_puts_on_one_place_keep_theirs(tmp_path):
    """Equal legs of a table with indices that count backwards, which trimesh takes from the end of the file."""
    text = []
    for x, y in ((0, 0), (9, 0), (9, 9), (0, 9)):
        text += ["g leg", *(f"v {x + a} {y + b} {c}" for a in (0, 1) for b in (0, 1) for c in (0, 5)), "f -8 -7 -5 -6", "f -8 -7 -3 -4", "f -2 -1 -3 -4"]
    path = put(tmp_path / "legs.obj", "\n".join([*text, ""]))
    for texture in (False, True):
        vertices, triangles = joined(read_parts(path, texture))
        assert np.ptp(vertices[triangles], axis=(0, 1)).tolist() == [10, 10, 5]


@pytest.mark.parametrize("change,kept", [({}, True), ({"texCoord": 0, "extensions": {"KHR_texture_transform": {"scale": [1, 1]}}}, True),
                                         ({"texCoord": 1}, False), ({"extensions": {"KHR_texture_transform": {"offset": [0.5, 0]}}}, False)])
def test_a_texture_that_lies_elsewhere_is_not_drawn(tmp_path, trimesh, change, kept):
    alter = lambda content: content["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"].update(change)
    path = put(tmp_path / "a.glb", changed(textured_box(trimesh).export(file_type="glb"), alter))
    ((_, triangles, look),) = read_parts(path, True)
    assert (look is not None) == kept and len(triangles) == 12


def test_no_colour_is_invented_and_none_lost(tmp_path, trimesh):
    box, red = trimesh.creation.box(BOX), np.tile(np.array([200, 20, 20, 255], np.uint8), (8, 1))
    plain = box.export(file_type="obj").splitlines()
    faces = [re.sub(r"(\d+)(//\d+)?", r"\1/1", line) if line.startswith("f ") else line for line in plain]
    path = put(tmp_path / "a.obj", "\n".join(["mtllib lost.mtl", "usemtl lost", "vt 0.5 0.5", *faces]))
    ((_, triangles, look),) = read_parts(path, True)
    assert len(triangles) == 12 and look is None  # where trimesh makes a gray texture
    box.visual.vertex_colors = red
    for factor, green in ((None, 20), ([1, 1, 1, 1], 20), ([1, 0.5, 1, 1], 10)):

        def paint(content, factor=factor):
            if factor:
                content["materials"] = [{"pbrMetallicRoughness": {"baseColorFactor": factor}}]
                content["meshes"][0]["primitives"][0]["material"] = 0

        look = read_parts(put(tmp_path / "a.glb", changed(box.export(file_type="glb"), paint)), True)[0][2]
        assert look.shape == (12, 3) and np.abs(look.astype(int) - [200, green, 20]).max() <= 1


def test_a_texture_may_lie_beside_the_folder_of_its_model(tmp_path, trimesh):
    """As in ShapeNet: models/model_normalized.obj and .mtl, images/texture0.png."""
    models, images = tmp_path / "1/models", tmp_path / "1/images"
    models.mkdir(parents=True), images.mkdir()
    textured_box(trimesh).export(models / "model.obj", mtl_name="model.mtl")
    (picture,) = re.findall(r"map_Kd (\S+)", (models / "model.mtl").read_text())
    (models / picture).rename(images / picture)
    (models / "model.mtl").write_text((models / "model.mtl").read_text().replace(picture, f"../images/{picture}"))
    ((_, triangles, look),) = read_parts(models / "model.obj", True)
    assert look is not None and read_parts(models / "model.obj", False)[0][2] is None and len(triangles) == 12
    shutil.rmtree(images)
    assert read_parts(models / "model.obj", True)[0][2] is None


@pytest.mark.parametrize("written", ["-s 1 1 1 Wood 2.png", "-clamp on -o 0.5 -mm 0 1 Wood 2.png", "maps\\Wood 2.png", r"C:\x\wood 2.PNG", r"MAPS\WOOD 2.png", "Maps/Wood 2.png"])
def test_pictures_are_found_by_the_names_that_other_systems_write(tmp_path, trimesh, written):
    textured_box(trimesh).export(tmp_path / "model.obj", mtl_name="model.mtl")
    material = (tmp_path / "model.mtl").read_text()
    (picture,) = re.findall(r"map_Kd (\S+)", material)
    place = tmp_path / ("maps" if written.lower().startswith("maps") else "") / "Wood 2.png"
    place.parent.mkdir(exist_ok=True), (tmp_path / picture).rename(place)
    put(tmp_path / "model.mtl", material.replace(picture, written))
    assert read_parts(tmp_path / "model.obj", True)[0][2] is not None
    place.unlink()
    assert read_parts(tmp_path / "model.obj", True)[0][2] is None


def test_buffers_are_found_by_the_escaped_names_of_gltf(tmp_path, trimesh):
    for name, content in trimesh.creation.box(BOX).export(file_type="gltf").items():
        put(tmp_path / name.replace("gltf_buffer", "ein Würfel"), content.replace(b"gltf_buffer", b"ein%20W%C3%BCrfel"))
    assert len(read_parts(tmp_path / "model.gltf", False)[0][1]) == 12


@pytest.mark.parametrize("faces", [0, 1])
def test_text_has_more_digits_than_the_single_precision_that_its_header_promises(tmp_path, trimesh, faces):
    points = np.random.default_rng(0).uniform(size=(40, 3)) + [691000, 5335000, 500]
    header = ["ply", "format ascii 1.0", "element vertex 40", *(f"property float {axis}" for axis in "xyz"), "property uchar red"]
    header += ["element face 1", "property list uchar int vertex_indices"] * faces + ["end_header"]
    rows = [f"{' '.join(f'{value:.6f}' for value in row)} 7" for row in points] + ["3 0 1 2"] * faces
    path = put(tmp_path / "a.ply", "\n".join([*header, *rows, ""]))
    read = read_parts(path, False)[0][0][:3] if faces else read_cloud(path)[0]
    assert np.abs(read - points[: len(read)]).max() < 1e-5
    if faces:
        with pytest.raises(MeshError, match="beyond single precision"):
            read_parts(put(path, path.read_text().replace(rows[0].split()[0], "1e39")), False)
    values = points.astype("<f4").tobytes()  # of a binary file the header is as it is, whatever a comment says
    binary = ["ply", "format binary_little_endian 1.0", "comment was format ascii 1.0", *header[2:6], "end_header", ""]
    assert np.abs(read_cloud(put(tmp_path / "b.ply", "\n".join(binary).encode() + values))[0] - points).max() < 1


def test_clouds_of_other_sizes_in_the_halves_and_one_test_object_train(here, capsys):
    rng = np.random.default_rng(0)
    for split, count, sizes in (("train", 16, [700]), ("test", 1, [40])):
        for number in range(count):
            put(here / f"scans/{split}/x/y", "")
            np.save(here / f"scans/{split}/x/{number}.npy", rng.normal(size=(sizes[0], 3)) * [1, 1, 1 + number % 2])
    objects.main(["--name", "scans", "--root", "scans", *SMALL[:4], "--num-points", "512", "--workers", "1"])
    said = capsys.readouterr().out
    assert "arrays for configs/scans/step1.yaml in" in said and "note: one class alone, so every score will be 100 %" in said
    assert load_config(Step1Config, "configs/scans/step1.yaml").data.num_points == 40
    quick = ["optim.epochs=1", "pla.mlm_only_epochs=0", "run.figures=false", "model.point_width=32", "model.num_neighbors=4", "data.image_size=16",
             "data.image_resize=16", "model.embedding_dim=8", "run.device=cpu"]
    train_step1.main(["--config", "configs/scans/step1.yaml", "--set", *quick])
    (run,) = Path("runs/scans/step1").iterdir()
    evaluate.main(["--run", str(run)])
    assert "all pairs" in capsys.readouterr().out


def test_a_configuration_that_does_not_fit_is_named_in_place_of_the_commands(here, capsys):
    for number in range(8):
        (here / "scans").mkdir(exist_ok=True), np.save(here / f"scans/{number}.npy", np.random.default_rng(number).normal(size=(40, 3)))
    make = lambda *more: objects.main(["--name", "scans", "--root", "scans", *SMALL, *more])
    make(), make()
    assert capsys.readouterr().out.count("train on it") == 2
    before = (here / "dataset/scans/skipped.csv").stat().st_mtime_ns
    make("--output", "other")
    said = capsys.readouterr().out
    assert "configs/scans/step1.yaml does not fit: made was root other, it has dataset/scans. Change" in said and "train on it" not in said
    make("--output", str(here / "dataset/scans"))
    assert "train on it" in capsys.readouterr().out
    assert (here / "dataset/scans/skipped.csv").stat().st_mtime_ns == before  # a folder that is complete may be read-only


def test_what_clouds_cannot_do_or_too_few_objects_is_said(here, capsys):
    for number in range(2):
        (here / "scans").mkdir(exist_ok=True), np.save(here / f"scans/{number}.npy", np.random.default_rng(number).normal(size=(40, 3)))
    with pytest.raises(UserError, match="--texture is for meshes, and these are clouds"):
        objects.main(["--name", "two", "--root", "scans", "--texture", *SMALL])
    objects.main(["--name", "two", "--root", "scans", *SMALL])
    said = capsys.readouterr().out
    assert "1 training object, both steps need 2" in said and "train on it" not in said


def test_unlabelled_clouds_train_and_evaluation_asks_for_labels(here, capsys):
    rng = np.random.default_rng(0)
    for number in range(24):
        points = rng.normal(size=(40, 3)) * [1, 1 + number % 3, 1] + 1e6
        put(here / "scans/x", "")
        np.save(here / f"scans/{number}.npy", points) if number % 2 else np.savez(here / f"scans/{number}.npz", points=points)
    np.save(here / "scans/far.npy", np.concatenate([points, points[:1] + 1e3])), np.save(here / "scans/nan.npy", np.full((40, 3), np.nan)), np.save(here / "scans/few.npy", np.eye(3)), np.save(here / "scans/flat.npy", np.ones(40))
    mixed = np.array([{}], dtype=object)
    np.savez(here / "scans/mixed.npz", meta=mixed, points=points), np.savez(here / "scans/none.npz", meta=mixed)
    objects.main(["--name", "scans", "--root", "scans", *SMALL])
    said = capsys.readouterr().out
    assert "5 of 30 objects skipped" in said and "30 objects, no classes, split by hash, 0.8 for training" in said
    assert "far.npy: its points cover no pixel" in said and "none.npz: expected an array points, or one other of floats of shape (n, 3), found meta" in said
    rows = Path("dataset/scans/scans_PointCloud_train_list.txt").read_text().splitlines()
    assert all(row.endswith(".npy") for row in rows) and np.load(Path("dataset/scans") / rows[0]).shape == (32, 3)
    assert not Path("dataset/scans/scans_Mesh_train_list.txt").exists()
    train_step1.main(["--config", "configs/scans/step1.yaml", "--set", "optim.epochs=1", "run.device=cpu",
                      "data.modalities=[GrayImg,PointCloud]", "data.image_size=16", "data.image_resize=16", "model.point_width=32",
                      "model.embedding_dim=16", "run.figures=false"])
    (run,) = Path("runs/scans/step1").iterdir()
    assert "no evaluation" in (run / "log.txt").read_text() and list(run.glob("pseudo_labels/*PointCloud*.txt"))
    with pytest.raises(UserError, match="evaluation needs labels"):
        evaluate.main(["--run", str(run)])


@pytest.mark.parametrize("arrays,words", [
    (np.zeros((3, 2048)), "transposed"), (np.zeros((480, 640)), r"\(n, 12\).*\(480, 640\)$"), (np.zeros((500, 18)), r"\(n, 12\)"),
    (np.zeros((40, 2)), r"\(n, 3\)"), ({"points": np.zeros((3, 2048))}, "transposed"), ({"depth": np.zeros((480, 640))}, "found depth"),
    ({"faces": np.zeros((3, 3), int), "vertices": np.zeros((4, 3))}, "a mesh in .npz"), ({"ids": np.zeros((9, 3), int)}, "found ids"),
    ({"a": np.zeros((9, 3)), "b": np.zeros((9, 3))}, "one other of floats"),
    ({"xyz": np.zeros((9, 3), int), "Normals": np.zeros((9, 3))}, "found xyz, Normals"), ({"coord": np.zeros((9, 3), int), "rgb": np.zeros((9, 3))}, "found coord"),
])
def test_no_cloud_is_made_of_other_arrays(tmp_path, arrays, words):
    path = tmp_path / ("a.npz" if isinstance(arrays, dict) else "a.npy")
    np.savez(path, **arrays) if isinstance(arrays, dict) else np.save(path, arrays)
    with pytest.raises(MeshError, match=words):
        read_cloud(path)


def test_clouds_in_the_forms_that_people_have(tmp_path):
    points, path = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32), tmp_path / "a.npz"
    for arrays in ({"xyz": points, "labels": np.zeros((9, 3), int), "id": np.zeros(3)}, {"xyz_normal": points, "Colors": points}, {"points": points, "faces": np.zeros((3, 3), int)}):
        np.savez(path, **arrays)
        assert (read_cloud(path)[0] == points[:, :3]).all()
    for kind in ("uint8", "int16", "uint16", "float16", int):
        np.save(tmp_path / "a.npy", np.abs(points * 9).astype(kind))
        read = read_cloud(tmp_path / "a.npy")[0]
        assert read.shape == (9, 3) and read.dtype == np.float64  # which a change of sign, as of an axis, does not wrap


@pytest.mark.parametrize("broken", range(5))
def test_one_bad_file_never_stops_a_small_collection(here, broken):
    for number in range(5):
        points = np.random.default_rng(number).normal(size=(40, 3))
        np.save(here / f"scans_{number}.npy", points) if number != broken else put(here / f"scans_{number}.npy", b"\x93NUMPY")
    objects.main(["--name", "few", "--root", ".", "--output", str(here.parent / f"out-{broken}"), *SMALL])
    manifest = json.loads((here.parent / f"out-{broken}/manifest.json").read_text())
    assert sum(manifest["counts"].values()) == 4 and min(manifest["counts"].values()) > 0
    assert [entry["name"] for entry in manifest["left_out"]] == [f"scans_{broken}.npy"]


def test_files_that_are_known_to_be_bad_take_no_place_in_a_split():
    items = [Item(f"{n}.obj", "", "", None, reason="an empty file" if n % 3 else None) for n in range(60)]
    tasks, _, reasons = make_tasks(items, 0.8, False, 1)
    assert len(reasons) == 40 and [task.split for task in tasks if task.name not in reasons].count("test") == 4


def test_a_damaged_file_does_not_hide_another_format_of_it(here, trimesh, renderer, monkeypatch, capsys):
    monkeypatch.setattr(objects, "probe_renderer", lambda: None)
    for name, mesh in (("a", trimesh.creation.box(BOX)), ("b", trimesh.creation.icosphere()), ("c", trimesh.creation.box())):
        put(here / f"m/{name}.obj", exports(mesh)["obj.obj"]), put(here / f"m/{name}.stl", exports(mesh)["stl.stl"])
    for name in ("a.glb", "a.obj", "c.obj", "c.stl"):
        put(here / f"m/{name}", "junk")
    objects.main(["--name", "m", "--root", "m", *SMALL])
    entries = {entry["name"]: entry for entry in read_journal(Path("dataset/m"))[1].values() if "files" in entry}
    assert entries.keys() == {"a.glb", "b.obj"} and entries["a.glb"]["read"] == "a.stl" and "read" not in entries["b.obj"]
    np.testing.assert_allclose(extents(Path("dataset/m"), entries["a.glb"]), np.divide(BOX, 4), atol=1e-4)  # its own axis is z
    skipped = dict(csv.reader(Path("dataset/m/skipped.csv").read_text().splitlines()[1:]))
    assert skipped.keys() == {"a.glb", "a.obj", "b.stl", "c.obj", "c.stl"} and "5 of 7 objects skipped" in capsys.readouterr().out
    assert "cannot be read" in skipped["a.glb"] and "no face" in skipped["a.obj"] and "; c.stl: " in skipped["c.obj"]


def test_copies_in_any_format_have_one_original(tmp_path):
    for name, content in (("a.obj", "1"), ("b.obj", "2"), ("c.glb", "3"), ("c.obj", "1"), ("c.stl", "2"), ("d.stl", "2"), ("e.obj", "4")):
        put(tmp_path / name, content)
    originals = {item.name: item.original for item in read_folder(tmp_path)[0] if not item.reason}
    assert originals == {**dict.fromkeys(("a.obj", "b.obj", "c.glb", "d.stl"), "a.obj"), "e.obj": "e.obj"}


def test_gltf_files_are_known_by_their_buffers_too(tmp_path):
    for name in "ab":
        put(tmp_path / f"{name}/scene.gltf", json.dumps({"buffers": [{"uri": "my%20scene.bin"}, {"uri": "data:," + 999 * "x"}, {}]}))
        put(tmp_path / f"{name}/my scene.bin", name)
    first, second = read_folder(tmp_path)[0]
    assert not first.reason and first.sha256 != second.sha256 and first.original != second.original
    put(tmp_path / "b/my scene.bin", "a")
    assert len({item.sha256 for item in read_folder(tmp_path)[0]}) == 1


def layout(folder: Path, *names: str) -> dict[str, tuple]:
    for name in names:
        put(folder / name, "x")
    return {item.name: (item.object_class, item.split) for item in read_folder(folder)[0]}


def test_layouts(tmp_path):
    assert layout(tmp_path / "a", "train/x/1.obj", "test/x/1.obj") == {"test/x/1.obj": ("x", "test"), "train/x/1.obj": ("x", "train")}
    assert layout(tmp_path / "b", "x/train/1.off", "y/test/1.off") == {"x/train/1.off": ("x", "train"), "y/test/1.off": ("y", "test")}
    assert layout(tmp_path / "c", "x/1/models/m.obj", "2.obj") == {"2.obj": (None, None), "x/1/models/m.obj": ("x", None)}
    assert layout(tmp_path / "d", "train/1.obj", "bus/1.obj") == {"bus/1.obj": ("bus", None), "train/1.obj": ("train", None)}
    with pytest.raises(UserError, match="train/, test/ and files, val/"):
        layout(tmp_path / "e", "train/1.obj", "test/1.obj", "val/1.obj", "1.obj")
    assert layout(tmp_path / "g", "Train/x/1.obj", "TEST/x/1.obj")["TEST/x/1.obj"] == ("x", "test")
    with pytest.raises(UserError, match="class folders of .* train/, test/ and files, val/"):
        layout(tmp_path / "h", "x/train/1.obj", "x/test/1.obj", "y/val/1.obj", "y/1.obj")
    put(tmp_path / "far/1.obj", "x"), (tmp_path / "i/y").mkdir(parents=True)
    (tmp_path / "i/x").symlink_to(tmp_path / "far"), (tmp_path / "i/y/again").symlink_to(tmp_path / "i")
    (tmp_path / "i/a").symlink_to(tmp_path / "i/y")  # the same folder under another name: its files count once, under their own
    assert layout(tmp_path / "i", "y/2.obj") == {"x/1.obj": ("x", None), "y/2.obj": ("y", None)}
    with pytest.raises(UserError, match="found none"):
        layout(tmp_path / "f", "1.fbx")
    assert layout(tmp_path / "j", "02691156/one/models/m.obj") == {"02691156/one/models/m.obj": ("02691156", None)}


@pytest.mark.parametrize("names,words", [
    (("train/x/1.obj", "val/x/1.obj"), "holds train/, val/; expected train/ and test/, or class folders: rename them, or give --root one"),
    (("Train/x/1.obj", "Train/y/1.obj"), "holds train/; expected"), (("Net/train/x/1.obj", "Net/test/x/1.obj"), "holds Net/ alone.*give --root .*Net$"),
    (("Net/x/train/1.obj", "Net/y/test/1.obj"), "holds Net/ alone.*give --root .*Net$"),
])
def test_a_folder_beside_or_above_the_one_that_is_meant(tmp_path, names, words):
    with pytest.raises(UserError, match=words):
        layout(tmp_path, *names)


def test_what_makes_scores_worthless_is_said(tmp_path):
    for number, name in enumerate(("train/x/1.obj", "train/y/1.obj", "test/x/1.obj", "test/x/2.obj")):
        put(tmp_path / name, f"{min(number, 2)}")
    put(tmp_path / "test/x/3.obj", "1")
    items = read_folder(tmp_path)[0]
    entries = [{"name": item.name, "label": int(item.object_class == "y"), "split": item.split, "files": {}} for item in items]
    copies = "content of training objects in the test half, 1 times: scores will count what was learned by heart"
    assert remarks(items, ["x", "y"], entries) == [copies, "1 of 2 classes have no test object: y"]
    assert "one class alone" in remarks(items, ["x"], entries)[-1]
    assert "1 objects have no colour" in remarks(items, [], [{**entries[0], "neutral": True}, *entries[1:]])[-1]
    unread = [{**entry, "left_out": "broken"} for entry in entries if entry["name"] == "test/x/3.obj"]
    del unread[0]["files"]
    assert remarks(items, [], [entry for entry in entries if entry["name"] != "test/x/3.obj"] + unread) == []


def test_what_is_passed_over_is_named(tmp_path):
    for name in ("x/train/1.obj", "x/test/deep/2.obj", "x/test/a.MTL", "x/test/b.mtl", "y/test/1.obj", "y/train/readme", ".git/c/d"):
        put(tmp_path / name, "x")
    (tmp_path / "z").mkdir()
    assert read_folder(tmp_path)[1] == [
        "1 without suffix", "2 .mtl", "the folder y/train, without a model", "the folder z, without a model"
    ]


def test_split_and_numbers_owe_nothing_to_the_class(tmp_path):
    items = [Item(f"{kind}/{n}.obj", "", "", kind) for kind, count in (("a", 60), ("b", 40), ("few", 3)) for n in range(count)]
    tasks, classes, reasons = make_tasks(items, 0.8, True, 10)
    assert classes == ["a", "b"] and reasons == {f"few/{n}.obj": "class few has 3 objects, --min-class-size is 10" for n in range(3)}
    assert sum(task.split == "train" for task in tasks) == round(0.8 * 103) and [task.number for task in tasks] == list(range(103))
    labels = [task.label for task in tasks if task.label is not None]
    assert np.mean(np.diff(labels) != 0) > 0.3 and {task.label for task in tasks if task.split == "test"} >= {0, 1}
    as_stl = [Item(item.name.replace("obj", "stl"), "", "", item.object_class) for item in items]
    assert [(t.name[:-3], t.split) for t in make_tasks(as_stl, 0.8, True, 10)[0]] == [(t.name[:-3], t.split) for t in tasks]
    assert all(task.label is None for task in make_tasks(items, 0.8, False, 10)[0]) and not make_tasks(items, 0.8, False, 10)[2]


def test_ids_with_a_dot_in_an_archive_are_split_by_all_of_their_name():
    items = [Item(f"scan.{number:04d}", str(number), "", "abcd"[number // 10]) for number in range(40)]
    tasks = make_tasks(items, 0.8, True, 10)[0]
    assert len({task.label for task in tasks if task.split == "test"}) > 2 and np.mean(np.diff([task.label for task in tasks]) != 0) > 0.3


def test_copies_stay_in_one_split(tmp_path):
    for number in range(20):
        put(tmp_path / f"a/{number:02d}.obj", f"{number % 4}")
    items = read_folder(tmp_path)[0]
    assert [item.original for item in items] == [f"a/{number % 4:02d}.obj" for number in range(20)]
    tasks = make_tasks(items, 0.5, True, 1)[0]
    splits = [{task.split for task in tasks if int(task.name[2:4]) % 4 == kind} for kind in range(4)]
    assert all(len(found) == 1 for found in splits) and set.union(*splits) == {"train", "test"}


def write_meshes(path: Path, **changes) -> Path:
    arrays = {
        "vertices": np.array([[0, 0, 0], [30000, 0, 0], [0, 30000, 0], [0, 0, 0], [0, 15000, 0], [0, 0, 15000], [9, 9, 9]], np.int16),
        "faces": np.array([[0, 1, 2], [0, 1, 2], [0, 1, 3]], np.int32), "vertex_offset": np.array([0, 3, 7]), "face_offset": np.array([0, 1, 3]),
        "label": np.array([1, 0]), "classes": np.array(["a", "b"]), "instance_id": np.array(["m1", "m2"]),
    }
    np.savez(path, **{**arrays, **changes})
    return path


def test_mesh_archives(tmp_path):
    path = write_meshes(tmp_path / "a.npz")
    assert [(item.name, item.object_class, item.place) for item in read_npz(path)] == [("m1", "b", "0"), ("m2", "a", "1")]
    vertices, faces, _ = read_npz_parts(path, 1)[0]
    assert vertices[:3].tolist() == [[0, 0, 0], [0, 0.5, 0], [0, 0, 0.5]] and faces.tolist() == [[0, 1, 2], [0, 1, 3]]
    np.savez(tmp_path / "clouds.npz", points=np.zeros((2, 3)))
    with pytest.raises(UserError, match="clouds.npz: expected the arrays vertices, faces, .*docs/data.md.*, found points$"):
        read_npz(tmp_path / "clouds.npz")
    with pytest.raises(UserError, match="none.npz: no such file"):
        read_npz(tmp_path / "none.npz")
    with pytest.raises(MeshError, match="do not fit"):
        read_npz_parts(write_meshes(tmp_path / "b.npz", faces=np.array([[0, 1, 3]] * 3)), 0)
    for number, (key, value) in enumerate({"vertex_offset": [0, 3], "face_offset": [0, 2, 1], "label": [0, 2], "instance_id": ["m", "m"]}.items()):
        with pytest.raises(UserError, match=key):
            read_npz(write_meshes(tmp_path / f"{number}.npz", **{key: np.array(value)}))


@pytest.mark.parametrize("key,value,found", [
    ("label", np.array([1.0, 0.0]), "float64 (2,)"), ("label", np.array([[1], [0]]), "int64 (2, 1)"), ("label", np.array([True, False]), "bool (2,)"),
    ("faces", np.zeros((3, 3)), "float64 (3, 3)"), ("faces", np.zeros((3, 3), np.uint64), "uint64 (3, 3)"),
    ("face_offset", np.array([0.0, 1.0, 3.0]), "float64 (3,)"), ("instance_id", np.array("m1"), "<U2 ()"), ("classes", np.ones(2), "float64 (2,)"),
])
def test_mesh_archives_of_other_types_are_refused(tmp_path, key, value, found):
    with pytest.raises(UserError, match=f"expected {key} of .* in [12] dimensions?, found {re.escape(found)}$"):
        read_npz(write_meshes(tmp_path / "a.npz", **{key: value}))


def test_mesh_archives_with_names_of_bytes_and_integers(tmp_path):
    path = write_meshes(tmp_path / "a.npz", classes=np.array([b"caf\xe9", "é".encode()]), instance_id=np.array([7, 12]), label=np.array([1, 0], np.uint8))
    assert [(item.name, item.object_class) for item in read_npz(path)] == [("7", "é"), ("12", r"caf\xe9")]
    for key, value in (("label", [0]), ("vertex_offset", np.array([0, 9, 7], np.uint32)), ("face_offset", np.array([0, 5, 3], np.uint64))):
        with pytest.raises(UserError, match=key):
            read_npz(write_meshes(tmp_path / f"{key}.npz", **{key: np.array(value)}))


def test_refusals(here):
    put(here / "m/1.obj", "x"), put(here / "configs/theirs/step1.yaml", "optim: {epochs: 1}")
    for arguments, words in (
        (["--name", "x"], "--root DIR or --npz"), (["--name", "a b", "--root", "m"], "letters"),
        (["--name", "x", "--root", "m", "--split", "1"], "between 0 and 1"), (["--name", "x", "--root", "none"], "not a folder"),
        (["--name", "x", "--root", "m", "--min-class-size", "-3"], "at least 1, found -3"),
        (["--name", "x", "--root", "m", "--output", "m/out"], "lies in --root"), (["--name", "theirs", "--root", "m"], "another --name"),
    ):
        with pytest.raises(UserError, match=words):
            objects.main([*arguments, *SMALL])
    shutil.rmtree(here / "configs/shared")
    with pytest.raises(UserError, match="no configs/shared here.*run the command in the folder of the repository"):
        objects.main(["--name", "x", "--root", "m", *SMALL])
    assert sorted(path.name for path in here.iterdir()) == ["configs", "m"]
