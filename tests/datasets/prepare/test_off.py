"""OFF files: every quirk seen in ModelNet, damage that must be noticed, cleaning, and an independent reader."""

import io
from pathlib import Path

import numpy as np
import pytest

from datasets.prepare.readers.off import read_off
from datasets.prepare.shapes.mesh import MeshError, clean_mesh, triangle_areas

SAMPLES = Path("../shared/data/modelnet_off_samples")
BOX = """0 0 0
2 0 0
2 1 0
0 1 0
0 0 3
2 0 3
2 1 3
0 1 3
"""
QUADS = "4 0 3 2 1\n4 4 5 6 7\n4 0 1 5 4\n4 1 2 6 5\n4 2 3 7 6\n4 3 0 4 7\n"
BOX_AREA = 2 * (2 * 1 + 2 * 3 + 1 * 3)


@pytest.mark.parametrize("text", [
    "OFF\n8 6 0\n" + BOX + QUADS,
    "OFF8 6 0\n" + BOX + QUADS,  # fused, as in ModelNet40
    "OFF 8 6 12\n" + BOX + QUADS,
    "off\n8 6\n" + BOX + QUADS,  # no edge count
    "# made by hand\n\nOFF # magic\n\n8 6 0\n# vertices\n" + BOX + "\n\n" + QUADS + "\n# end\n",
    ("OFF\n8 6 0\n" + BOX + QUADS).replace("\n", "\r\n"),
    "\ufeffOFF\n8 6 0\n" + BOX + QUADS,
    "OFF\n8 6 0\n" + BOX + QUADS.replace("\n", " 255 0 0\n"),
    "COFF\n8 6 0\n" + BOX.replace("\n", " 0.1 0.2 0.3 1\n") + QUADS,
    "OFF\n8 6 0\n" + BOX + QUADS + "3 0 1 2\ntrailing words\n",
    "OFF\n8 7 0\n" + BOX + QUADS.replace("4 0 3 2 1\n", "3 0 3 2\n3 0 2 1 9 9 9\n"),
    "OFF\n8 8 0\n" + BOX + "1 0\n2 0 1\n" + QUADS,
    "OFF\n8 6 0\n" + BOX.replace("2 1 3", "2e0 +1.0 3.") + QUADS,
])
def test_quirks(text):
    vertices, triangles = read_off(text.encode())
    assert vertices.shape == (8, 3) and triangles.shape == (12, 3)
    assert triangle_areas(vertices, triangles).sum() == pytest.approx(BOX_AREA)


@pytest.mark.parametrize("text,words", [
    ("", "found 'nothing'"), (bytes(range(256)) * 4, "expected an OFF file"),
    ("PLY\n8 6 0\n", "expected an OFF file"),
    ("OFF\n", "expected the counts"),
    ("OFF\n8 6 0 0\n" + BOX + QUADS, "expected the counts"),
    ("OFF\n-8 6 0\n" + BOX + QUADS, "expected the counts"),
    ("OFF\n0 0 0\n", "empty mesh"),
    ("OFF\n8 0 0\n" + BOX, "empty mesh"),
    ("OFF\n8 6 0\n" + BOX + QUADS[:30], "6 faces, only 11 lines"),  # trimesh reads this without a word
    ("OFF\n8 6 0\n" + BOX[:20], "lines follow"),
    ("OFF\n8 6 0\n" + BOX + QUADS[:-10] + "4 3 0\n", "k i1 ... ik"),
    ("OFF\n8 6 0\n" + BOX + QUADS.replace("4 0 3 2 1", "0"), "k i1 ... ik"),
    ("OFF\n8 1 0\n" + BOX + "2 0 3\n", "no face has three corners"),
    ("OFF\n8 6 0\n" + BOX + QUADS.replace("4 0 3 2 1", "4 0 3 2 8"), "vertices 0 to 8"),
    ("OFF\n8 6 0\n" + BOX + QUADS.replace("4 0 3 2 1", "4 0 3 2 -1"), "vertices -1 to 7"),
    ("OFF\n8 6 0\n" + BOX + QUADS.replace("4 0 3 2 1", "4 0 3 2.5 1"), "not a readable"),
    ("OFF\n8 6 0\n" + BOX.replace("2 0 0", "2 0") + QUADS, "three coordinates"),
    ("OFF\n8 6 0\n" + BOX.replace("2 0 0", "2 0 x") + QUADS, "not a readable"),
    ("OFF\n8 6 0\n" + BOX.replace("2 0 0", "2 0 nan") + QUADS, "vertex 1 is not finite"),
    ("OFF\n8 6 0\n" + BOX.replace("2 0 0", "2 0 1e999") + QUADS, "vertex 1 is not finite"),
    ("OFF\n" + "9" * 5000 + " 1 0\n", "counts"), ("OFF\n\u0663 1 0\n", "counts"), ("OFF\n1_0 1 0\n", "counts"),
    ("OFF\n3 1 0\n0 0 0\n1e200 0 0\n0 1e200 0\n3 0 1 2\n", "measures"), ("OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n", "one place"),
    ("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "no triangle has an area"),
])
def test_broken_files_are_named_errors(text, words):
    with pytest.raises(MeshError, match=words):
        clean_mesh(*read_off(text if isinstance(text, bytes) else text.encode()))


def test_cleaning():
    vertices, triangles = read_off(("OFF\n8 6 0\n" + BOX + QUADS).encode())
    doubled = np.concatenate([vertices, vertices + 1e-9, [[1e6, 1e6, 1e6]]])  # a second copy and a stray vertex
    soup = np.concatenate([
        triangles, triangles[:, ::-1] + 8,  # the same box again, inside out, on other vertices
        [[0, 0, 1], [0, 1, 9]],  # no area: one index twice, one position twice
    ])
    cleaned, kept = clean_mesh(doubled, soup)
    assert cleaned.shape == (8, 3) and kept.shape == (12, 3)
    np.testing.assert_allclose(cleaned[kept], vertices[triangles], atol=1e-8)
    assert triangle_areas(cleaned, kept).sum() == pytest.approx(BOX_AREA)


def test_as_an_independent_reader():
    trimesh = pytest.importorskip("trimesh", reason="trimesh of requirements-data.txt is not installed")
    if not SAMPLES.is_dir():
        pytest.skip(f"{SAMPLES} is not there")
    files = sorted(SAMPLES.glob("bathtub_*.off"))
    assert len(files) == 5
    for path in files[:2]:
        vertices, triangles = read_off(path.read_bytes())
        other = trimesh.load(io.BytesIO(path.read_bytes()), file_type="off", process=False)
        np.testing.assert_allclose(vertices, other.vertices)
        np.testing.assert_array_equal(triangles, other.faces)
