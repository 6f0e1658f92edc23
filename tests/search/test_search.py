"""search.py on a small trained run: the ranking of evaluate.py, only what changed is described, kills, hostile files, what a score means."""

import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import with_lists
from PIL import Image
from stage_runs import REPOSITORY, labels_of, only_run, settings

if find_spec("lancedb") is None:
    pytest.skip("search needs the packages of requirements-search.txt", allow_module_level=True)
import train_step1
import train_step2
from datasets.prepare.shapes import mesh
from datasets.samples import describe_samples, load_test_samples
from models.trained import open_trained
from search import answers, commands, files, model
from search.answers import search
from search.index import SKIPPED, Index, exists, identity, writing
from search.model import Model
from utils.engine.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.evaluation.features import Features
from utils.evaluation.metrics import retrieval_metrics
from utils.evaluation.ranking import DiffusionRanking

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(_digits_folder):
    return with_lists(_digits_folder)


@pytest.fixture(scope="module")
def run(finished, root, tmp_path_factory):
    """A run of step 2 that averages over two subsets of every cloud."""
    out = tmp_path_factory.mktemp("search")
    quick = ["optim.epochs=2", "data.eval_subsets=2", "data.num_points=24", f"rdl.pseudo_labels={labels_of(finished)}"]
    train_step2.main(settings(root, out, 2, *quick))
    return only_run(out, 2)


def ask(index, *paths, run=None, **options):
    return search(*opened(index, run), list(map(str, paths)), **options)


def opened(index, run=None):
    options = {"index": str(getattr(index, "place", index)), "run": run and str(run), "device": "cpu", "overrides": ()}
    return commands._opened(commands.argparse.Namespace(**options))


def sound(index):
    commands.main(["verify", index.place])  # exits with 1 where anything is wrong
    return True


def paths_of(index, **where):
    return index.rows("path", **where)["path"].to_pylist()


def clouds(root):
    return str(root / "digits_PointCloud_test_list.txt")


def build(run, index, collection, *more):
    commands.main(["build", "--run", str(run), "--collection", str(collection), "--index", str(index), "--device", "cpu", *more])
    return Index(str(index))


@pytest.fixture(scope="module")
def built(run, root, tmp_path_factory):
    index = tmp_path_factory.mktemp("built") / "index"
    build(run, index, clouds(root))
    return index


@pytest.fixture
def copied(built, tmp_path):
    shutil.copytree(built, tmp_path / "index")
    return Index(str(tmp_path / "index"))


@pytest.mark.parametrize("representation,ranking,query,gallery", [
    ("posterior", "plain", "GrayImg", "PointCloud"), ("embedding", "diffusion", "GrayImg", "PointCloud"),
    ("joint", "plain", "PointCloud", "GrayImg"), ("posterior", "diffusion", "PointCloud", "GrayImg"),
])
def test_every_query_is_ranked_as_evaluation_ranks_it(run, root, tmp_path, representation, ranking, query, gallery):
    trained = open_trained(run / "last.pt", CPU)
    test, labels = load_test_samples(trained.config.data, CPU)
    features = describe_samples(trained.encoders, trained.classifiers, test, trained.config.data, CPU)
    rows = {name: values.represent(representation).double() for name, values in features.items()}
    listing = {name: test.lists[name].path for name in rows}
    index = build(run, tmp_path / "index", listing[gallery], "--modality", gallery, "--representation", representation)
    paths = {name: [os.path.abspath(file) for file in test.lists[name].files] for name in rows}
    found = ask(index, *paths[query], count=len(index), ranking=ranking)
    scores = DiffusionRanking(rows[gallery]).scores(rows[query]) if ranking == "diffusion" else rows[query] @ rows[gallery].T
    equal = 0
    for number, answer in enumerate(found):
        order = [paths[gallery].index(row["path"]) for row in answer["results"]]
        assert sorted(order) == list(range(len(index)))
        np.testing.assert_allclose([row["score"] for row in answer["results"]], scores[number][order], atol=2e-6)
        assert (scores[number][order].diff() < 2e-6).all()  # no items change places but those that single precision cannot tell apart
        if order == scores[number].argsort(descending=True).tolist():
            equal += 1
            one = retrieval_metrics(rows[query][[number]], labels[query][[number]], rows[gallery], labels[gallery], ranking=ranking,
                                    similarity="dot")
            relevant = (labels[gallery][order] == labels[query][number]).numpy()
            precision = (np.cumsum(relevant) / np.arange(1, len(order) + 1))[relevant].mean() if relevant.any() else 0
            assert precision == pytest.approx(one["map"], abs=1e-9)
    assert equal > 0.8 * len(found)


def rows_of(index):
    rows = index.rows("path", "sha256", "vector").to_pylist()
    return {row["path"]: (row["id"], row["sha256"], tuple(row["vector"])) for row in rows}


def test_only_what_changed_is_described(run, root, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "shapes"
    shutil.copytree(root / "test" / "point_cloud", folder)
    names = sorted(os.listdir(folder))
    extra = folder / names[-1]
    kept = extra.read_bytes()
    extra.unlink()
    index, counted, original = build(run, folder / "index", folder), [], Model.describe
    counting = lambda self, arrays: (counted.append(*map(len, arrays.values())), original(self, arrays))[1]
    monkeypatch.setattr(Model, "describe", counting)  # counts the files that are given to the encoders
    before = rows_of(index)
    build(run, folder / "index", folder)
    assert counted == [] and paths_of(index, where=SKIPPED) == []  # an index inside of its collection is no part of it
    extra.write_bytes(kept)
    np.save(folder / names[0], np.load(folder / names[0])[::-1] * [1, 2, 3])
    (folder / names[1]).unlink()
    for dry in (["--dry-run"], []):
        capsys.readouterr()
        commands.main(["add", index.place, str(folder), *dry])
        said = capsys.readouterr().out
        assert "1 new, 1 changed" in said and ("would be" in said) == bool(dry) and (rows_of(index) == before) == bool(dry)
    assert counted == [2]
    commands.main(["update", index.place])
    after = rows_of(index)
    assert "1 gone" in capsys.readouterr().out and counted == [2]
    assert {Path(path).name for path in after} == {*names} - {names[1]}
    assert all(after[path] == before[path] for path in after if Path(path).name not in (names[0], names[-1]))
    assert sound(index)
    commands.main(["remove", index.place, str(folder / names[2]), "/not/there"])
    assert len(index) == len(names) - 2 and sound(index)
    commands.main(["remove", index.place, str(folder)])
    assert len(index) == 0 and sound(index)
    with pytest.raises(UserError, match="holds no item"):
        ask(index, extra)


def test_an_update_follows_what_is_missing_broken_repaired_and_gone(run, root, tmp_path, capsys):
    first, second, third, lost = (Path(shutil.copy(path, tmp_path)) for path in sorted((root / "test" / "point_cloud").iterdir())[:4])
    (tmp_path / "list.txt").write_text("\n".join(path.name for path in (first, second, third, lost)))
    kept, late = first.read_bytes(), third.read_bytes()
    third.unlink(), lost.unlink()
    index = build(run, tmp_path / "index", tmp_path / "list.txt")
    assert sorted(paths_of(index, where=SKIPPED)) == [str(third), str(lost)]
    first.write_bytes(b"no cloud any more"), third.write_bytes(late)
    with pytest.raises(SystemExit):
        commands.main(["verify", index.place])
    commands.main(["update", index.place])
    commands.main(["stats", index.place])
    said = capsys.readouterr().out
    assert f"changed: {first}" in said and f"skipped {first}: unreadable" in said and sound(index)
    assert sorted(paths_of(index)) == [str(second), str(third)] and paths_of(index, where=SKIPPED) == [str(first)]
    first.write_bytes(kept), second.write_bytes(b"")
    commands.main(["update", index.place])
    assert sorted(paths_of(index)) == [str(first), str(third)] and paths_of(index, where=SKIPPED) == [str(second)]
    second.unlink()
    commands.main(["update", index.place])
    assert paths_of(index, where=SKIPPED) == [] and len(index) == 2 and sound(index)


def test_whatever_goes_wrong_with_a_file_skips_that_file_alone(run, root, tmp_path, monkeypatch):
    pictures, originals = tmp_path / "pictures", (commands.read_sample, commands.picture_of, files.load_images)
    shutil.copytree(root / "test" / "gray_imgs", pictures)
    names = sorted(map(str, pictures.iterdir()))

    def load(rows, resize):
        if str(rows.path) in names[:2]:
            raise MemoryError if str(rows.path) == names[0] else ZeroDivisionError("of a library")
        return originals[2](rows, resize)

    def read(path, *given):
        sample = originals[0](path, *given)
        if path == names[2]:
            os.remove(path)
        return sample

    def draw(path, *given):
        if path == names[3]:
            raise MemoryError
        return originals[1](path, *given)

    for place, name, changed in ((files, "load_images", load), (commands, "read_sample", read), (commands, "picture_of", draw)):
        monkeypatch.setattr(place, name, changed)
    index = build(run, tmp_path / "index", pictures, "--modality", "GrayImg")
    skipped = {row["path"]: row for row in index.rows("path", "code", "reason", where=SKIPPED).to_pylist()}
    assert sorted(skipped) == names[:4] and sorted(paths_of(index)) == names[4:] and {row["code"] for row in skipped.values()} == {"unreadable"}
    for name, words in zip(names, ("MemoryError", "of a library", "No such file", "MemoryError")):
        assert words in skipped[name]["reason"]


@pytest.mark.parametrize("name,modality,packages", [
    ("scan.pcd", "PointCloud", "pypcd4"), ("solid.stl", "PointCloud", "trimesh"), ("solid.off", "Mesh", "pyvista and fast_simplification"),
])
def test_missing_packages_are_one_message_at_the_start(run, three, tmp_path, monkeypatch, name, modality, packages):
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / name).write_text("not to be read")
    monkeypatch.setattr(files, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"needs {packages}: pip install .*requirements-data.txt"):
        build(three if modality == "Mesh" else run, tmp_path / "index", tmp_path / "things", "--modality", modality)
    assert not exists(str(tmp_path / "index"))
    (tmp_path / "things" / name).rename(tmp_path / "things" / "cloud.npy")
    assert len(build(run, tmp_path / "index", tmp_path / "things")) == 0  # nothing to install for it
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(UserError, match="needs fast-simplification .*pip install"):  # of a query
        mesh._presimplify((np.eye(3), np.array([[0, 1, 2]])))


KILLING = """
import os, signal, sys, threading, time
from search import commands, index
calls, stop, delay = [], int(sys.argv.pop(1)), float(sys.argv.pop(1))
def counting(name):
    original = getattr(index.Index, name)
    def counted(self, *given):
        calls.append(name)
        if len(calls) == stop:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        original(self, *given)
        time.sleep(60 * (len(calls) >= stop))
    setattr(index.Index, name, counted)
counting("put"), counting("delete")
commands.BATCH = 5
commands.main(sys.argv[1:])
"""


def test_a_build_add_or_remove_killed_in_or_after_a_write_is_finished_by_the_same_command(run, root, tmp_path, monkeypatch):
    index, folder = str(tmp_path / "index"), root / "test" / "point_cloud"
    names = sorted(map(str, folder.iterdir()))
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(names[:12]))
    monkeypatch.setattr(commands, "BATCH", 5)
    for kills, command, expected in (  # the number of the write, and seconds after its beginning; the repeat of a killed build is killed too
        ([(2, 0.003), (3, 0.5)], ["build", "--run", str(run), "--collection", str(listing), "--index", index], names[:12]),
        ([(2, 0.001)], ["add", index, str(folder)], names), ([(1, 0.002)], ["remove", index, *names[:3]], names[3:]),
    ):
        for stop, delay in kills:
            program = [sys.executable, "-c", KILLING, str(stop), str(delay), *command]
            killed = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        commands.main(command)
        assert sorted(paths_of(Index(index))) == expected and sound(Index(index))


def test_a_second_writer_is_refused_at_once_and_readers_are_not(run, copied, root):
    place, paths = copied.place, sorted(paths_of(copied))
    remove = ["remove", place, paths[0]]
    with writing(place, new=False):
        for command in (["build", "--run", str(run), "--collection", clouds(root), "--index", place], ["add", place, clouds(root)],
                        ["update", place], remove):
            with pytest.raises(UserError, match=f"another search.py changes {place} at this moment"):
                commands.main(command)
        commands.main([*remove, "--dry-run"])
        commands.main(["verify", place])
        assert len(ask(place, paths[0], count=3)[0]["results"]) == 3
    commands.main(remove)
    assert sorted(paths_of(copied)) == paths[1:]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bomb():
    """A PNG that promises 40,000 x 40,000 pixels."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def hostile(folder):
    """Write files that are no picture or shape; return name -> (code, words of the reason)."""
    stream = io.BytesIO()
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(stream, "PNG")
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(folder / "unpickled")], dtype=object), allow_pickle=True)
    content = {
        "empty.npy": (b"", "empty", "no content"), "empty.png": (b"", "empty", "no content"), "text.png": (b"hello", "unreadable", "cannot identify"),
        "huge.png": (bomb(), "unreadable", "decompression bomb"), "deep.png": (stream.getvalue(), "unreadable", "more than 8 bits"),
        "notes.txt": (b"hello", "type", "expected one of"), "raw.npy": (pickle.dumps(Payload(folder / "unpickled")), "unreadable", "not a readable"),
        "objects.npy": (objects.getvalue(), "unreadable", "not a readable .npy"), "short.off": (b"OFF\n8 6 0\n0 0 0\n", "unreadable", "promises 8 vertices"),
        "flat.obj": (b"v 0 0 0\nf 1 1 1\n", "unreadable", "one place"),
    }
    for name, (data, _, _) in content.items():
        (folder / name).write_bytes(data)
    np.save(folder / "nan.npy", np.full((9, 3), np.nan))
    (folder / "away.npy").symlink_to("/etc/hostname")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.npy")).touch()
    return {name: row[1:] for name, row in content.items()} | {"nan.npy": ("unreadable", "finite"), "away.npy": ("outside", "leads out of"),
                                                                "caf\\xe9.npy": ("name", "not UTF-8")}


def test_hostile_files_are_skipped_with_a_stable_code_and_are_no_queries(run, root, tmp_path, capsys):
    folder = tmp_path / "collection"
    folder.mkdir()
    expected = hostile(folder)
    shutil.copy(next((root / "test" / "point_cloud").iterdir()), folder / "good 1.npy")
    index = build(run, tmp_path / "index", folder)
    said = capsys.readouterr().err
    rows = {Path(row["path"]).name: row for row in index.rows("path", "code", "reason", where=SKIPPED).to_pylist()}
    pictures = {name for name in expected if name.endswith(".png")} - {"empty.png"}
    assert rows.keys() == expected.keys() and len(index) == 1 and sound(index)
    pair = opened(index)
    for name, (code, words) in expected.items():
        assert (rows[name]["code"], name) == ("type" if name in pictures else code, name)
        assert words in rows[name]["reason"] or name in pictures
        assert f"skipped {folder / name}: {rows[name]['code']}: " in said
        if code not in ("outside", "name"):
            with pytest.raises(UserError, match=f"{name} is no query: .*{words}"):
                search(*pair, [str(folder / name)])
    with pytest.raises(UserError, match="is no query: there is no such file"):
        ask(index, folder / "../../lost.png")
    assert not (folder / "unpickled").exists()
    listing = tmp_path / "collection" / "list.txt"
    listing.write_text("good 1.npy 7\n../secret.npy\nlost.npy\nbad\0name.npy\n")
    index = build(run, tmp_path / "listed", listing)
    assert sorted(index.rows("code", where=SKIPPED)["code"].to_pylist()) == ["missing", "name", "outside"] and len(index) == 1


def test_impossible_options_and_places_are_refused(run, built, root, tmp_path):
    picture = next((root / "test" / "gray_imgs").iterdir())
    for options, words in (({"count": 0}, "-k must be at least 1"), ({"modality": "RGBImg"}, "GrayImg or PointCloud.* found --as RGBImg")):
        with pytest.raises(UserError, match=words):
            ask(built, picture, **options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        build(run, tmp_path / "file", clouds(root))
    with pytest.raises(UserError, match="nothing does not exist"):
        build(run, tmp_path / "index", tmp_path / "nothing")
    assert not exists(str(tmp_path / "index"))


def test_a_picture_turned_by_its_exif_is_the_same_query_and_any_shape_of_picture_one(run, root, tmp_path):
    data, plain = Model(str(run), CPU).data, str(next((root / "test" / "gray_imgs").iterdir()))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees
    Image.open(plain).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "exif.png", exif=turned)
    found, expected = (files.read_sample(str(path), "GrayImg", data) for path in (tmp_path / "exif.png", plain))
    np.testing.assert_array_equal(found, expected)
    Image.new("L", (40_000, 30)).save(tmp_path / "wide.png")
    assert files.read_sample(str(tmp_path / "wide.png"), "GrayImg", data).shape == (1, 3, 36, 36)


def test_another_model_is_refused_with_the_command_that_mends_it(run, copied, root, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    save_checkpoint(other / "last.pt", load_checkpoint(run / "last.pt") | {"epoch": 1})
    for call in (lambda: ask(copied, run=other), lambda: build(other, copied.place, clouds(root))):
        with pytest.raises(UserError, match=f"another model.*python search.py build --run {other} --index {copied.place}.new"):
            call()
    with pytest.raises(UserError, match="was built with representation embedding"):
        build(run, copied.place, clouds(root), "--representation", "joint")
    with pytest.raises(UserError, match="--ann needs"):
        ask(copied, next((root / "test" / "gray_imgs").iterdir()), ann=True)


@pytest.fixture(scope="module")
def three(root, tmp_path_factory):
    """A run of step 1 with two modalities of shapes."""
    out = tmp_path_factory.mktemp("three modalities")
    train_step1.main(settings(root, out, 1, "data.modalities=[GrayImg,PointCloud,Mesh]", "optim.epochs=1"))
    return only_run(out, 1)


@pytest.mark.parametrize("options", [
    ["--modality", "GrayImg", "--representation", "joint", "--no-graph"], ["--modality", "Mesh"], ["--modality", "PointCloud", "--up", "x"],
])
def test_the_command_that_mends_a_refused_model_runs(run, three, root, tmp_path, options):
    trained, place, other = three if "Mesh" in options else run, tmp_path / "an index", tmp_path / "another run"
    folder = {"GrayImg": "gray_imgs", "Mesh": "mesh", "PointCloud": "point_cloud"}[options[1]]
    shutil.copytree(root / "test" / folder, tmp_path / "my things")
    before = build(trained, place, tmp_path / "my things", *options).info
    shutil.copytree(trained, other)
    save_checkpoint(other / "last.pt", load_checkpoint(trained / "last.pt") | {"epoch": 1000})
    with pytest.raises(UserError, match="another model") as caught:
        ask(place, next((tmp_path / "my things").iterdir()), run=other)
    commands.main(shlex.split(re.search("python search.py (build .*)", str(caught.value))[1]))
    index = Index(f"{place}.new")
    assert len(index) == 16 and index.info["run"] == str(other)
    assert all(index.info[name] == before[name] for name in ("collection", "modality", "representation", "graph", "up"))


def test_an_index_and_its_answers_say_that_the_model_reads_labels(run, root, tmp_path, capsys):
    marked = shutil.copytree(run, tmp_path / "marked")
    text = (marked / "config.yaml").read_text()
    (marked / "config.yaml").write_text(text.replace("reads_labels: null", "reads_labels: training labels of x"))
    index = build(marked, tmp_path / "index", clouds(root))
    commands.main(["stats", index.place])
    assert "reads_labels: training labels of x" in capsys.readouterr().out
    query = ["query", index.place, str(next((root / "test" / "gray_imgs").iterdir())), "-k", "2"]
    for form in ([], ["--json"], ["--csv"], ["--html", str(tmp_path / "out.html")]):
        commands.main([*query, *form])
        assert "training labels of x" in (tmp_path / "out.html").read_text() if "--html" in form else capsys.readouterr().out, form
    commands.main(["query", index.place, *query[2:], "--json"])
    assert json.loads(capsys.readouterr().out.partition("out.html\n")[2])[0]["reads_labels"] == "training labels of x"


def test_what_a_cosine_means_is_measured_without_labels(monkeypatch):
    rng = np.random.default_rng(0)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
    query, gallery = (unit(rng.standard_normal((40, 3))) for _ in range(2))
    beliefs = [rng.dirichlet(np.ones(4), 40) for _ in range(2)]
    wrap = lambda rows, posteriors: Features(torch.from_numpy(rows).float(), torch.from_numpy(posteriors).float())
    found = model._meaning(wrap(query, beliefs[0]), wrap(gallery, beliefs[1]))
    random, unrelated = [], []
    for i in range(40):
        cosines = {j: float(query[i] @ gallery[j]) for j in range(40) if j != i}
        random += cosines.values()
        unrelated.append(max(value for j, value in cosines.items() if beliefs[0][i].argmax() != beliefs[1][j].argmax()))
    assert found["level"] == pytest.approx(np.quantile(unrelated, 0.95), abs=1e-6)
    np.testing.assert_allclose(found["quantiles"], np.quantile(random, np.linspace(0, 1, 101)), atol=1e-6)
    pictures = torch.full((5, 1, 3, 20, 20), 10, dtype=torch.uint8)
    pictures[:, :, :, 4:14, 8:11] = 240
    assert model._tone(pictures) == {"ground": 10, "fill": 0.5}


def test_the_verdict_is_of_the_whole_collection_for_any_ranking_and_count(run, root, tmp_path):
    index, model = opened(build(run, tmp_path / "index", clouds(root), "--representation", "posterior"))
    meaning, pictures = index.info["calibration"]["GrayImg"], sorted(map(str, (root / "test" / "gray_imgs").iterdir()))
    for level in (meaning["level"], 1.01, -1.0):
        meaning["level"] = level
        whole, lower = search(index, model, pictures, len(index)), 0
        best = [max(row["cosine"] for row in answer["results"]) for answer in whole]
        for count, ranking in ((1, "plain"), (1, "diffusion"), (4, "plain"), (4, "diffusion")):
            for answer, nearest in zip(search(index, model, pictures, count, ranking), best):
                assert answer["nothing_like_this"] == (nearest < level) and f"best cosine {nearest:.3f}" in answer["verdict"]
                assert ("nothing like this in the collection: best cosine" in answers.as_text([answer])) == (nearest < level)
                lower += max(row["cosine"] for row in answer["results"]) < nearest
        assert lower  # not all of these lists hold the nearest item
    for row in whole[0]["results"]:
        assert row["farther"] == pytest.approx(np.mean(np.array(meaning["quantiles"]) < row["cosine"]), abs=0.02)


@pytest.mark.parametrize("step,gone", [("pick", 2), ("pick", 16), ("nearest", 16)])
def test_items_that_are_removed_during_a_query_are_left_out(copied, root, monkeypatch, step, gone):
    (index, model), original = opened(copied), getattr(Index, step)
    picture = str(next((root / "test" / "gray_imgs").iterdir()))
    order = [row["path"] for row in search(index, model, [picture], 16)[0]["results"]]
    removing = lambda *given, **options: (copied.delete(map(identity, order[:gone])), original(*given, **options))[1]
    monkeypatch.setattr(Index, step, removing)
    (answer,) = search(index, model, [picture], 4)
    assert [row["path"] for row in answer["results"]] == order[gone:4] and (answer["nothing_like_this"] or gone < 16)
    assert answers.as_html([answer]).count("<figure>") == 1 + len(order[gone:4]) and answers.as_text([answer])


def test_one_form_of_answers_at_a_time(built, tmp_path, capsys):
    for forms in (["--json", "--csv"], ["--json", "--html", str(tmp_path / "out.html")], ["--csv", "--html", str(tmp_path / "out.html")]):
        with pytest.raises(SystemExit):
            commands.main(["query", str(built), "x.png", *forms])
        assert "not allowed with" in capsys.readouterr().err


def test_answers_as_json_csv_and_one_offline_page(built, root, tmp_path, capsys):
    pictures = [str(path) for path in sorted((root / "test" / "gray_imgs").iterdir())[:2]]
    shape = str(next((root / "test" / "point_cloud").iterdir()))
    commands.main(["query", str(built), *pictures, shape, "-k", "3", "--json"])
    first, _, last = json.loads(capsys.readouterr().out)
    assert first["query"] == pictures[0] and [row["rank"] for row in first["results"]] == [1, 2, 3]
    assert last["modality"] == "PointCloud" and last["results"][0]["path"] == shape and last["results"][0]["cosine"] == pytest.approx(1)
    commands.main(["query", str(built), pictures[0], "-k", "3", "--csv"])
    assert [line.split(",")[3] for line in capsys.readouterr().out.splitlines()] == ["rank", "1", "2", "3"]
    commands.main(["query", str(built), *pictures, "-k", "3", "--html", str(tmp_path / "out.html")])
    text = (tmp_path / "out.html").read_text()
    assert text.count("data:image/png;base64,") == 2 * 4 and "http" not in text and "src=" in text
    rows = [{"rank": 1, "path": "/a/<script>\x1b[2J.off", "score": 1.0, "cosine": 1.0, "farther": 1.0}]
    evil = {"query": "<img>\n.png", "modality": "GrayImg", "nothing_like_this": False, "verdict": "", "results": rows, "pictures": [b""] * 2}
    assert "<script>" not in answers.as_html([evil]) and "<img>" not in answers.as_html([evil])
    assert "\x1b" not in answers.as_text([evil]) and answers.as_text([evil]).count("\n") == 2


def y_up(points):
    """z up to y up, as GLB files have it."""
    return np.stack([points[:, 0], points[:, 2], -points[:, 1]], axis=1)


TETRAHEDRON = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 2\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


def test_the_vertical_axis_is_that_of_the_index_and_need_not_be_repeated(run, tmp_path):
    pytest.importorskip("trimesh", reason="search needs the packages of requirements-search.txt")
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 2]])
    text = lambda points: "".join(f"v {x} {y} {z}\n" for x, y, z in points) + "f 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
    for folder, points in (("lying", y_up(corners)), ("upright", corners)):
        for path in (tmp_path / folder / "solid.obj", tmp_path / f"more {folder}" / "solid.obj"):
            path.parent.mkdir()
            path.write_text(text(points))
    expected = rows_of(build(run, tmp_path / "one", tmp_path / "upright"))[str(tmp_path / "upright/solid.obj")][2]
    index = build(run, tmp_path / "two", tmp_path / "lying", "--up", "y")
    commands.main(["add", index.place, str(tmp_path / "more lying")])
    assert {vector for _, _, vector in rows_of(index).values()} == {expected}
    cosine = lambda folder, up=None: ask(index, tmp_path / folder / "solid.obj", up=up)[0]["results"][0]["cosine"]
    assert cosine("lying") == cosine("upright", "z") == pytest.approx(1) and cosine("upright") < 0.9999
    for command in (["build", "--run", str(run), "--collection", str(tmp_path / "lying"), "--index", index.place], ["add", index.place, str(tmp_path)], ["update", index.place]):
        with pytest.raises(UserError, match="was built with up y"):
            commands.main([*command, "--up", "x"])
    assert len(build(run, index.place, tmp_path / "lying", "--up", "y")) == 2


def test_meshes_become_points_and_every_shape_a_view(run, root, tmp_path):
    trimesh = pytest.importorskip("trimesh", reason="search needs the packages of requirements-search.txt")
    path = tmp_path / "solid.off"
    path.write_text(TETRAHEDRON)
    for suffix in ("ply", "stl", "glb"):
        mesh = trimesh.load(path)
        mesh.vertices = y_up(mesh.vertices) if suffix == "glb" else mesh.vertices
        mesh.export(tmp_path / f"solid.{suffix}")
    data = Model(str(run), CPU).data
    for name in ("solid.off", "solid.ply", "solid.stl", "solid.glb"):
        sample = files.read_sample(str(tmp_path / name), "PointCloud", data)
        assert sample.shape == (1, 48, 3) and np.linalg.norm(sample, axis=2).max() <= 1 + 1e-6
        mesh = trimesh.load(io.BytesIO(files.view_of(str(tmp_path / name))), file_type="glb", force="mesh")
        extents = mesh.bounds[1] - mesh.bounds[0]
        assert len(mesh.faces) == 4 and extents[1] == pytest.approx(2 * extents[0], rel=1e-5)  # z up became y up
    whole = {suffix: (tmp_path / f"solid.{suffix}").read_bytes() for suffix in ("ply", "glb")}
    size = lambda place, more: (int.from_bytes(whole["glb"][place : place + 4], "little") + more).to_bytes(4, "little")
    used = b'{"extensionsUsed": ["KHR_draco_mesh_compression"],   '
    more = len(used) - 1  # a multiple of 4, as chunks are
    packed = whole["glb"][:8] + size(8, more) + size(12, more) + whole["glb"][16:20] + used + whole["glb"][21:]
    for name, content in (("head.ply", whole["ply"][:60]), ("cut.ply", whole["ply"][:-9]), ("cut.glb", whole["glb"][:-9]), ("packed.glb", packed)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(files.Unusable, match="compressed" if name == "packed.glb" else None) as caught:
            files.read_sample(str(tmp_path / name), "PointCloud", data)
        assert (name, caught.value.code) == (name, "unreadable")
    for suffix, made in (("ply", trimesh.PointCloud(np.eye(3))), ("glb", trimesh.Scene(trimesh.PointCloud(y_up(np.eye(3)))))):
        made.export(tmp_path / f"points.{suffix}")
        points, triangles = files.read_shape(str(tmp_path / f"points.{suffix}"))
        assert triangles is None and sorted(points.tolist()) == sorted(np.eye(3).tolist())
    cloud = next((root / "test" / "point_cloud").iterdir())
    view = trimesh.load(io.BytesIO(files.view_of(str(cloud))), file_type="glb", force="mesh")
    assert len(view.faces) == 20 * 48 and view.volume > 0  # balls whose outsides face out
    with pytest.raises(files.Unusable, match="it is no GrayImg"):
        files.modality_of(str(cloud), ["GrayImg"])
