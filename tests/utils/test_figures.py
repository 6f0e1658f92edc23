"""Figures: files are written, pixels show what they should."""

import subprocess
import sys

import matplotlib.image
import numpy as np

from utils.figures import plots as figures
from utils.figures.contact_sheet import RIGHT, WRONG, draw_retrieval
from utils.figures.plots import plot_curves, plot_tsne


def pixels(path):
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)


def test_curves(tmp_path):
    epochs = [{"epoch": e, "loss/mlm": 2 / e, "loss/ssm": None if e < 3 else -e, "map/RP": 0.1 * e} for e in (1, 2, 3, 4)]
    plot_curves(epochs, tmp_path / "new" / "curves.png")
    plain = pixels(tmp_path / "new" / "curves.png")
    assert plain.shape[:2] == (900, 1200)
    plot_curves([*epochs[:-1], {**epochs[-1], "map/chance": 0.15}], tmp_path / "chance.png")
    assert not np.array_equal(pixels(tmp_path / "chance.png"), plain)
    plot_curves([{"epoch": 1}], tmp_path / "bare.png")  # neither losses nor scores


def test_tsne(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    embeddings = {name: generator.normal(size=(30, 4)) for name in ("RGBImg", "PointCloud")}
    labels = np.arange(30) % 3
    for name in ("a", "b"):
        plot_tsne(embeddings, dict.fromkeys(embeddings, labels), tmp_path / f"{name}.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    sizes = []
    monkeypatch.setattr(figures, "MAX_TSNE_ROWS", 10)
    monkeypatch.setattr(figures, "_project", lambda rows: sizes.append([len(r) for r in rows]) or np.zeros((sum(sizes[-1]), 2)))
    many = {"RGBImg": np.arange(30), "PointCloud": np.arange(7)}  # 30 classes need the long palette; sizes may differ
    plot_tsne({**embeddings, "PointCloud": embeddings["PointCloud"][:7]}, many, tmp_path / "c.png")
    assert sizes == [[10, 7]]


def test_tsne_of_any_labels(tmp_path, monkeypatch):
    """Timestamps, one class per object: colours by value, and no legend of hundreds of lines."""
    monkeypatch.setattr(figures, "_project", lambda rows: np.random.default_rng(0).normal(size=(sum(map(len, rows)), 2)))
    labels = 20231128123456 + np.arange(300) * 10**9
    plot_tsne({"RGBImg": np.ones((300, 2))}, {"RGBImg": labels}, tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    assert image.shape[:2] == (1050, 1275) and len(np.unique(image[200:850, 100:800].reshape(-1, 3), axis=0)) > 100
    assert (image[150:, -120:] == 255).all() and (image[:150, -120:] < 255).any()  # two lines of legend at the top


def test_retrieval_frames(tmp_path):
    white = np.full((8, 8, 3), 255, dtype=np.uint8)
    gallery = {4: white, 9: white}  # a mapping: only the ranked items are needed
    for correct, colors in ((True, (True, False)), (False, (False, True))):
        draw_retrieval([white, white], gallery, np.array([[4, 9], [9, 4]]), np.full((2, 2), correct), tmp_path / "a.png", "RP")
        image = pixels(tmp_path / "a.png")
        frames = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (RIGHT, WRONG)]
        assert tuple(bool((np.abs(image - frame).max(axis=-1) <= 2).any()) for frame in frames) == colors


def test_import_is_light():
    code = "import sys, utils.figures.plots; sys.exit('matplotlib' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
