"""The one table of modalities; adding a modality is one entry."""

from dataclasses import dataclass

FACE_CHANNELS = 18  # of a row of a mesh, see `datasets.mesh_faces`


@dataclass(frozen=True)
class Modality:
    """What the rest of the code needs to know of one modality.

    Attributes:
        name: key of a sample in configuration files, file names and dictionaries.
        letter: the paper's letter in task names (RP = RGB image query, point-cloud gallery).
        list_name: token of the list-file names, as in the authors' release.
        folder: of its files in a prepared data set, below {root}/{split}/.
        kind: "image" (files read by Pillow), "points" (.npy arrays (n, 3)) or "mesh" (.npy arrays (F, 18)); selects loader
            and transforms in `datasets.kinds`.
        encoder: class name in `models`.
        is_2d: True for images; tasks always join one 2D and one 3D modality first.
    """

    name: str
    letter: str
    list_name: str
    folder: str
    kind: str
    encoder: str
    is_2d: bool


MODALITIES: dict[str, Modality] = {
    entry.name: entry
    for entry in (
        Modality("RGBImg", "R", "RGBImgs", "rgb_imgs", "image", "ResNet18", True),
        Modality("GrayImg", "G", "GrayImgs", "gray_imgs", "image", "ResNet18", True),
        Modality("PointCloud", "P", "PointCloud", "point_cloud", "points", "DGCNN", False),
        Modality("Mesh", "M", "Mesh", "mesh", "mesh", "MeshNet", False),
    )
}


def task_name(query: str, gallery: str) -> str:
    """Return the paper's task name, e.g. ("RGBImg", "PointCloud") -> "RP"."""
    return MODALITIES[query].letter + MODALITIES[gallery].letter
