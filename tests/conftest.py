"""Shared fixtures: a small prepared data set of real 8x8 digits, and how to run the stages on it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from stage_runs import distinct

from utils.errors import UserError

TRAIN, TEST = 40, 16
FOLDERS = {
    "RGBImg": ("rgb_imgs", "RGBImgs", "png"), "GrayImg": ("gray_imgs", "GrayImgs", "png"),
    "PointCloud": ("point_cloud", "PointCloud", "npy"), "Mesh": ("mesh", "Mesh", "npy"),
}


def need_data_packages(*names: str) -> None:
    """Skip a test without these packages of requirements-data.txt."""
    for name in names:
        pytest.importorskip(name, reason=f"{name} of requirements-data.txt is not installed")


@pytest.fixture(scope="session")
def trimesh():
    return pytest.importorskip("trimesh", reason="trimesh of requirements-data.txt is not installed")


def write_lists(root: Path, split: str, labels: list[int | None], dataset: str = "digits") -> None:
    """(Re)write all list files of a split; a label None leaves the column out."""
    for modality, (folder, token, suffix) in FOLDERS.items():
        rows = [f"{split}/{folder}/{modality}_{split}_{i:06d}.{suffix}" for i in range(len(labels))]
        text = "".join(row + ("\n" if label is None else f" {label}\n") for row, label in zip(rows, labels))
        (root / f"{dataset}_{token}_{split}_list.txt").write_text(text)


def write_samples(root: Path, split: str, images: np.ndarray, seed: int) -> None:
    """Images (30 x 30), a cloud of 48 points on the digit's pixels and its extruded outline per 8 x 8 image."""
    from datasets.mesh_faces import mesh_to_faces
    from datasets.prepare.shapes.digit import extrude_digit

    generator = np.random.default_rng(seed)
    for folder, _, _ in FOLDERS.values():
        (root / split / folder).mkdir(parents=True)
    for i, image in enumerate(images):
        pixels = np.kron((image * 15).astype(np.uint8), np.ones((3, 3), np.uint8))
        gray = Image.fromarray(np.pad(pixels, 3))
        gray.save(root / split / "gray_imgs" / f"GrayImg_{split}_{i:06d}.png")
        ImageOps.colorize(gray, "navy", "orange").save(root / split / "rgb_imgs" / f"RGBImg_{split}_{i:06d}.png")
        faces = mesh_to_faces(*extrude_digit(np.pad(np.where(pixels > 105, pixels, 0), 2).astype(np.uint8)))
        np.save(root / split / "mesh" / f"Mesh_{split}_{i:06d}.npy", faces)
        rows, columns = np.nonzero(image > 7)
        chosen = generator.integers(len(rows), size=48)
        points = np.stack([generator.random(48), columns[chosen] / 8, -rows[chosen] / 8], axis=1)
        np.save(root / split / "point_cloud" / f"PointCloud_{split}_{i:06d}.npy", points.astype(np.float32))


def add_views(root, count):
    """Pictures of further views: view v of an object is uniformly v * 40 bright."""
    for split in ("train", "test"):
        for view in range(1, count):
            folder = root / split / "gray_imgs" / f"view_{view:02d}"
            folder.mkdir(exist_ok=True)
            for file in (root / split / "gray_imgs").glob("*.png"):
                Image.fromarray(np.full((30, 30), view * 40, np.uint8)).save(folder / file.name)


@pytest.fixture(scope="session")
def _digits_folder(tmp_path_factory) -> tuple[Path, list[int]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    root = tmp_path_factory.mktemp("digits")
    write_samples(root, "train", digits.images[:TRAIN], seed=0)
    write_samples(root, "test", digits.images[TRAIN : TRAIN + TEST], seed=1)
    return root, digits.target[: TRAIN + TEST].tolist()


def with_lists(digits_folder: tuple[Path, list[int]]) -> Path:
    """The folder with fresh list files."""
    root, labels = digits_folder
    write_lists(root, "train", labels[:TRAIN])
    write_lists(root, "test", labels[TRAIN:])
    return root


@pytest.fixture
def small_digits(_digits_folder) -> Path:
    """Root of 40 training and 16 test digits in all four modalities, with fresh list files."""
    return with_lists(_digits_folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, _digits_folder) -> Path:
    """Output folder of one uninterrupted step 1 and step 2."""
    root, out = with_lists(_digits_folder), tmp_path_factory.mktemp("finished")
    import train_step1
    import train_step2

    train_step1.main(distinct(root, out, 1))
    train_step2.main(distinct(root, out, 2))
    return out


@pytest.fixture(scope="session")
def renderer() -> None:
    """Skips what draws meshes where that is impossible; found out once, since it takes seconds."""
    from datasets.prepare.shapes.render import probe_renderer

    need_data_packages("pyvista", "fast_simplification")
    try:
        probe_renderer()
    except UserError as error:
        pytest.skip(str(error))
