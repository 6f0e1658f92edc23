"""OBJ files: the forms exporters write, and damage that must be noticed."""

import numpy as np
import pytest

from datasets.prepare.readers.obj import read_obj
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, triangle_areas

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
def test_forms(faces, area, write):
    vertices, triangles = read_obj(write(CORNERS + faces))
    assert vertices.dtype == np.float64 and triangles.dtype == np.int64
    assert triangle_areas(*clean_mesh(vertices, triangles)).sum() == pytest.approx(area)


@pytest.mark.parametrize("wrap", ["\\\n ", " \\\n", "\\\r\n  ", "\\ \t\n ", "\\ # more\n", "\\\n\\\n ", "\\\n"])
def test_wrapped_lines(wrap):
    whole = "v 0 0 0\n" * 40 + "f 1 2 3 4\nv 7 8 9\nf 5 6 7\n"
    vertices, triangles = read_obj(whole.replace("2 3", f"2{wrap}3").replace("8 9", f"8{wrap}9").encode())
    assert triangles.tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6]] and vertices[-1].tolist() == [7, 8, 9]


@pytest.mark.parametrize("data,words", [
    (b"", "an empty mesh"), (b"# nothing\n", "an empty mesh"), (CORNERS.encode(), "an empty mesh"), (bytes(range(256)) * 9, "an empty mesh"),
    (CORNERS.encode() + b"f 1 2\n", "cut short"), (CORNERS.encode() + b"f 1 2 3\nf 1 \\", "cut short"), (CORNERS.encode() + b"f 1 2 3\nf", "cut short"),
    (CORNERS.encode() + b"f 1 2 9\n", "vertex 9 of 5"), (CORNERS.encode() + b"f 1 2 99999999999999999999\n", "vertex 99999999999999999999 of 5"),
    (CORNERS.encode() + b"f a b c\n", "not a readable"), (b"v 0 x 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not a readable"),
    (CORNERS.encode() + b"f 2 0 1\n", "vertex 0"), (CORNERS.encode() + b"f 0/1 1/1 2/1\n", "vertex 0"), (CORNERS.encode() + b"f -9 -2 -1\n", "vertex -9"),
    (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"), (b"v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "three finite coordinates"),
    (b"v 0 0 0\nv 1 0\nv 0 1 0\nf 1 2 3\n", "not a readable"),
])
def test_files_that_cannot_be_used(data, words):
    with pytest.raises(MeshError, match=words):
        read_obj(data)
