"""OFF and OBJ files: the forms that exporters and ModelNet write, damage that must be noticed, cleaning, an independent reader."""

import io
from pathlib import Path

import numpy as np
import pytest

from datasets.prepare.readers.obj import read_obj
from datasets.prepare.readers.off import read_off
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, triangle_areas

SAMPLES = Path("../shared/data/modelnet_off_samples")
BOX = "0 0 0\n2 0 0\n2 1 0\n0 1 0\n0 0 3\n2 0 3\n2 1 3\n0 1 3\n"
QUADS = "4 0 3 2 1\n4 4 5 6 7\n4 0 1 5 4\n4 1 2 6 5\n4 2 3 7 6\n4 3 0 4 7\n"
WHOLE = "OFF\n8 6 0\n" + BOX + QUADS
BOX_AREA = 2 * (2 * 1 + 2 * 3 + 1 * 3)


@pytest.mark.parametrize("text", [
    WHOLE, WHOLE.replace("\n", "", 1), WHOLE.replace("OFF\n8 6 0", "OFF 8 6 12"), WHOLE.replace("OFF\n8 6 0", "off\n8 6"),  # fused, no edge count
    "# made by hand\n\nOFF # magic\n\n8 6 0\n# vertices\n" + BOX + "\n\n" + QUADS + "\n# end\n", WHOLE.replace("\n", "\r\n"), "\ufeff" + WHOLE,
    "OFF\n8 6 0\n" + BOX + QUADS.replace("\n", " 255 0 0\n"), "COFF\n8 6 0\n" + BOX.replace("\n", " 0.1 0.2 0.3 1\n") + QUADS,  # colours
    WHOLE + "3 0 1 2\ntrailing words\n", "OFF\n8 8 0\n" + BOX + "1 0\n2 0 1\n" + QUADS, WHOLE.replace("2 1 3", "2e0 +1.0 3."),
    "OFF\n8 7 0\n" + BOX + QUADS.replace("4 0 3 2 1\n", "3 0 3 2\n3 0 2 1 9 9 9\n"),
])
def test_off_forms(text):
    vertices, triangles = read_off(text.encode())
    assert vertices.shape == (8, 3) and triangles.shape == (12, 3)
    assert triangle_areas(vertices, triangles).sum() == pytest.approx(BOX_AREA)


@pytest.mark.parametrize("text,words", [
    ("", "found 'nothing'"), (bytes(range(256)) * 4, "expected an OFF file"), ("PLY\n8 6 0\n", "expected an OFF file"), ("OFF\n", "expected the counts"),
    *((WHOLE.replace("8 6 0", counts), "expected the counts") for counts in ("8 6 0 0", "-8 6 0", "9" * 5000 + " 1 0", "\u0663 1 0", "1_0 1 0")),
    ("OFF\n0 0 0\n", "empty mesh"), ("OFF\n8 0 0\n" + BOX, "empty mesh"), ("OFF\n8 1 0\n" + BOX + "2 0 3\n", "no face has three corners"),
    (WHOLE[:-30], "6 faces, only 11 lines"), ("OFF\n8 6 0\n" + BOX[:20], "lines follow"),  # trimesh reads the first without a word
    (WHOLE[:-10] + "4 3 0\n", "k i1 ... ik"), (WHOLE.replace("4 0 3 2 1", "0"), "k i1 ... ik"),
    *((WHOLE.replace("4 0 3 2 1", face), words) for face, words in (
        ("4 0 3 2 8", "vertices 0 to 8"), ("4 0 3 2 -1", "vertices -1 to 7"), ("4 0 3 2.5 1", "not a readable"))),
    *((WHOLE.replace("2 0 0", vertex, 1), words) for vertex, words in (
        ("2 0", "three coordinates"), ("2 0 x", "not a readable"), ("2 0 nan", "vertex 1 is not finite"), ("2 0 1e999", "vertex 1 is not finite"))),
    *((f"OFF\n3 1 0\n0 0 0\n{second}\n{third}\n3 0 1 2\n", words) for second, third, words in (
        ("1e200 0 0", "0 1e200 0", "measures"), ("0 0 0", "0 0 0", "one place"), ("1 0 0", "2 0 0", "no triangle has an area"))),
])
def test_broken_off_files_are_named_errors(text, words):
    with pytest.raises(MeshError, match=words):
        clean_mesh(*read_off(text if isinstance(text, bytes) else text.encode()))


def test_cleaning():
    vertices, triangles = read_off(WHOLE.encode())
    doubled = np.concatenate([vertices, vertices + 1e-9, [[1e6, 1e6, 1e6]]])  # a second copy and a stray vertex
    soup = np.concatenate([
        triangles, triangles[:, ::-1] + 8,  # the same box again, inside out, on other vertices
        [[0, 0, 1], [0, 1, 9]],  # no area: one index twice, one position twice
    ])
    cleaned, kept = clean_mesh(doubled, soup)
    assert cleaned.shape == (8, 3) and kept.shape == (12, 3)
    np.testing.assert_allclose(cleaned[kept], vertices[triangles], atol=1e-8)
    assert triangle_areas(cleaned, kept).sum() == pytest.approx(BOX_AREA)


def test_as_an_independent_reader(trimesh):
    if not SAMPLES.is_dir():
        pytest.skip(f"{SAMPLES} is not there")
    for path in sorted(SAMPLES.glob("bathtub_*.off"))[:2]:
        vertices, triangles = read_off(path.read_bytes())
        other = trimesh.load(io.BytesIO(path.read_bytes()), file_type="off", process=False)
        np.testing.assert_allclose(vertices, other.vertices)
        np.testing.assert_array_equal(triangles, other.faces)


SHAPES = {  # corners in order, area
    "U": ([(0, 0), (3, 0), (3, 3), (2, 3), (2, 1), (1, 1), (1, 3), (0, 3)], 7.0), "arrow": ([(0, 0), (2, 2), (4, 0), (2, 5)], 6.0),
    "comb": ([(0, 0), (5, 0), (5, 2), (4, 1), (3, 2), (2, 1), (1, 2), (0, 1)], 7.5), "square": ([(0, 0), (1, 0), (1, 1), (0, 1)], 1.0),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("turn", [1, -1])
def test_concave_polygons_are_not_filled_in(name, first, turn):
    corners, area = SHAPES[name]
    places = np.array([(x, 2 * x - y, y) for x, y in np.roll(corners, first, axis=0)[::turn]])  # in a slanting plane
    rows, order = "\n".join("%g %g %g" % tuple(place) for place in places), range(len(places))
    off = read_off(f"OFF\n{len(places)} 1 0\n{rows}\n{len(places)} {' '.join(map(str, order))}\n".encode())
    obj = read_obj("".join(["v " + row + "\n" for row in rows.splitlines()] + ["f"] + [f" {corner + 1}" for corner in order]).encode())
    flat = lambda points: np.abs(np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])[:, 1]) / 2  # of its x, z shadow
    for vertices, triangles in (off, obj):
        assert len(triangles) == len(places) - 2 and flat(vertices[triangles]).sum() == pytest.approx(area)


CORNERS = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\n"


@pytest.mark.parametrize("faces,area", [
    ("f 1 2 3\n", 0.5), ("f 1 2 3 4\nf 1 2 5\n", 1.5), ("vt 0 0\nvn 0 0 1\nf 1/1/1 2/1/1 3/1/1\nf 1//1 2//1 5//1", 1.0),
    ("f -5 -4 -3 -2\n", 1.0), ("f 1 2 3 # comment\n", 0.5), ("g a\nusemtl x\\\nf 1 2 3\ng b\nusemtl y\nf 1 3 4\n", 1.0),
    ("l 1 2\nf 1 2\nf 1 2 3\n", 0.5), ("f -3 -2 -1\nv 5 0 0\nv 6 0 0\nv 5 1 0\nf -3 -2 -1\n", 0.5 + 2**0.5 / 2),
    ("# kept in C:\\\nf 1 2 3\n", 0.5), ("f 1 6 7\nv 2 0 0 1 0.5 0.5 0.5\nv 0 2 0\n", 2.0),
])
@pytest.mark.parametrize("write", [
    str.encode, lambda text: text.replace("\n", "\r\n").encode(), lambda text: text.replace(" ", "\t").encode(),
    lambda text: b"\xef\xbb\xbf# caf\xe9\nmtllib a.mtl\n" + text.encode(), lambda text: text.replace("\n", " \n  ").encode(),
], ids=["plain", "crlf", "tabs", "bom-latin1", "indented"])
def test_obj_forms(faces, area, write):
    vertices, triangles = read_obj(write(CORNERS + faces))
    assert vertices.dtype == np.float64 and triangles.dtype == np.int64
    assert triangle_areas(*clean_mesh(vertices, triangles)).sum() == pytest.approx(area)


@pytest.mark.parametrize("wrap", ["\\\n ", " \\\n", "\\\r\n  ", "\\ \t\n ", "\\ # more\n", "\\\n\\\n ", "\\\n"])
def test_wrapped_obj_lines(wrap):
    whole = "v 0 0 0\n" * 40 + "f 1 2 3 4\nv 7 8 9\nf 5 6 7\n"
    vertices, triangles = read_obj(whole.replace("2 3", f"2{wrap}3").replace("8 9", f"8{wrap}9").encode())
    assert triangles.tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6]] and vertices[-1].tolist() == [7, 8, 9]


@pytest.mark.parametrize("data,words", [
    (b"", "an empty mesh"), (b"# nothing\n", "an empty mesh"), (CORNERS.encode(), "an empty mesh"), (bytes(range(256)) * 9, "an empty mesh"),
    *((CORNERS.encode() + faces, words) for faces, words in (
        (b"f 1 2\n", "cut short"), (b"f 1 2 3\nf 1 \\", "cut short"), (b"f 1 2 3\nf", "cut short"), (b"f 1//9 2//9 3//", "cut short"), (b"f 1/8 2/8 3", "cut short"), (b"f 1 2 9\n", "vertex 9 of 5"),
        (b"f 1 2 99999999999999999999\n", "vertex 99999999999999999999 of 5"), (b"f a b c\n", "not a readable"), (b"f 2 0 1\n", "vertex 0"),
        (b"f 0/1 1/1 2/1\n", "vertex 0"), (b"f -9 -2 -1\n", "vertex -9"))),
    (b"v 0 x 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not a readable"), (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
    (b"v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "three finite coordinates"), (b"v 0 0 0\nv 1 0\nv 0 1 0\nf 1 2 3\n", "not a readable"),
])
def test_obj_files_that_cannot_be_used(data, words):
    with pytest.raises(MeshError, match=words):
        read_obj(data)


def test_a_cut_obj_file_is_refused_or_its_faces_but_the_last_are_the_first_of_the_whole():
    data = (CORNERS + "".join(f"f {a}/7/9 {b}/7/9 {c}/7/9\n" for a, b, c in ((1, 2, 3), (1, 3, 4), (1, 2, 5), (2, 3, 5)))).encode()
    whole, read = read_obj(data)[1].tolist(), 0
    for end in range(len(data)):
        try:
            faces = read_obj(data[:end])[1].tolist()
        except MeshError:
            continue
        read += 1
        assert faces == whole[: len(faces)]
    assert read <= 3 * len(whole)  # after a line, within its newline, and where the last number is still one
