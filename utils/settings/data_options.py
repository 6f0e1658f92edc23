"""The data section of the settings, and how a setting is declared. The other sections are in `utils.settings.options`."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from utils.errors import UserError
from utils.modalities import MODALITIES


def option(default: Any, doc: str, **details: Any) -> Any:
    """Declare one setting.

    Args:
        default: its default; dictionaries are copied per instance.
        doc: one line for readers and error messages.
        details: `min`, `max` (inclusive) or `above`, `below` (exclusive), for numbers and numbers inside containers; `path=True`
            for paths, in which ~ is replaced; `formerly`: an earlier name, to be named when it is met.
    """
    metadata = {"doc": doc, **details}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: object, valid: Iterable[object]) -> str:
    """Return ", did you mean X?" or an empty text; for error messages about unknown names."""
    match = difflib.get_close_matches(str(name), map(str, valid), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def check_modalities(key: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in MODALITIES:
            known = ", ".join(MODALITIES)
            raise UserError(f"{key}: unknown modality {name!r}{nearest(name, MODALITIES)} (known: {known})")


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of training samples; evaluation uses none."""

    image_rotation_degrees: float = option(15.0, "rotation drawn from [-x, x], degrees", min=0, max=180)
    image_scale: tuple[float, float] = option((0.8, 1.25), "range of the zoom factor, per axis", above=0)
    image_translate: float = option(0.1, "largest shift, fraction of the side", min=0, max=1)
    image_shear_degrees: float = option(10.0, "shear drawn from [-x, x], degrees", min=0, below=90)
    image_elastic: float = option(0.08, "smooth warp: standard deviation of a 5 x 5 grid of displacements, half sides", min=0)
    image_brightness: float = option(0.1, "brightness offset drawn from [-x, x], images in [0, 1]", min=0, max=1)
    image_contrast: float = option(0.2, "contrast factor drawn from [1 - x, 1 + x]", min=0, max=1)
    image_flip: bool = option(False, "mirror half of the images; off because a mirrored digit is another shape")
    point_rotation_degrees: float = option(15.0, "turn about the vertical axis z, from [-x, x], degrees", min=0, max=180)
    point_tilt_degrees: float = option(15.0, "turn about each horizontal axis, from [-x, x], degrees", min=0, max=180)
    point_scale: tuple[float, float] = option((0.8, 1.25), "range of the scale factor, per axis", above=0)
    point_shear: float = option(0.2, "lean of the horizontal axes with the height, from [-x, x]", min=0)
    point_translate: float = option(0.1, "largest shift per axis, units of the unit sphere", min=0)
    point_warp: float = option(0.08, "smooth warp of clouds and meshes: standard deviation of the displacement, unit spheres", min=0)
    point_jitter: float = option(0.01, "standard deviation of noise per coordinate, units of the unit sphere", min=0)

    def __post_init__(self) -> None:
        for key in ("image_scale", "point_scale"):
            low, high = getattr(self, key)
            if low > high:
                raise UserError(f"data.augment.{key} must be [low, high] with low <= high, got {[low, high]}")


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and in which shape they reach the encoders."""

    dataset: str = option("mnist3d", "name in list files, pseudo-label files and run folders")
    root: str = option("dataset/mnist3d", "prepared data folder", path=True)
    modalities: tuple[str, ...] = option(("RGBImg", "PointCloud"), "the modalities to align, at least two")
    train_lists: dict[str, str] = option({}, "modality -> training list; default: the prepared name under root", path=True)
    test_lists: dict[str, str] = option({}, "modality -> test list; default: the prepared name under root", path=True)
    instance_id: str = option(r"(\d+)$", "expression on the file stem; group 1 is the id that pairs modalities")
    num_classes: int | None = option(None, "number of classes: checks label ranges in evaluation, never used for training", min=1)
    features: dict[str, int] = option(
        {}, "modality -> width of its vectors, for modalities whose files hold features of one view or several, not samples", min=1
    )
    image_size: int = option(224, "side of the encoder's input, pixels", min=8)
    image_resize: int = option(256, "side after resizing, before the crop, pixels", min=8)
    num_points: int = option(1024, "points per cloud", min=2)
    max_faces: int = option(500, "largest number of faces a mesh may have; smaller ones repeat faces", min=1)
    num_views: int = option(1, "pictures per object: the listed one and those in view_01 ... beside it", min=1)
    views: dict[str, int] = option(
        {"RGBImg": 2, "GrayImg": 2},
        "modality -> augmented views of each sample per training step, all positives; of others 1, with positives: views 2", min=1,
    )
    train_view: Literal["random", "first"] = option("random", "which of the num_views pictures a training step sees")
    eval_view: Literal["first", "mean"] = option("first", "evaluation: the listed picture, or the mean embedding of all")
    eval_subsets: int = option(2, "disjoint subsets of a cloud's points to average over in evaluation; each costs a forward pass", min=1)
    pairing: Literal["instance", "class", "none"] = option(
        "instance", "rows of the training lists: one object; one class (made with labels: not unsupervised); unrelated"
    )
    positives: Literal["modalities", "views"] = option(
        "modalities", "positives of the modality-invariance loss: one object's modalities, or two random views of one sample"
    )
    placement: Literal["auto", "device", "host"] = option(
        "auto", "where samples lie: on the training device, or in host memory behind a DataLoader; auto: device if half of its "
        "free memory holds them"
    )
    workers: int = option(2, "processes of the DataLoader with samples on the host; 0 reads in the training process", min=0)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig, metadata={"doc": "random training transforms"})

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", self.dataset):
            raise UserError(f"data.dataset names files and folders: letters, digits, '_', '-', '.' only, got {self.dataset!r}")
        for key in ("modalities", "train_lists", "test_lists", "features", "views"):
            check_modalities(f"data.{key}", getattr(self, key))
        if len(self.modalities) < 2 or len(set(self.modalities)) != len(self.modalities):
            raise UserError(f"data.modalities needs at least two different modalities, got {list(self.modalities)}")
        if self.pairing == "none" and self.positives != "views":
            raise UserError(
                "data.pairing: none leaves the modality-invariance loss without positives across modalities; say what replaces "
                "them with data.positives: views (two random views of one sample)"
            )
        single = [name for name in self.modalities if self.positives == "views" and self.views_of(name) < 2]
        if single:
            raise UserError(f"data.positives: views contrasts at least two views of a sample, found data.views.{single[0]} = 1")
        if self.image_resize < self.image_size:
            raise UserError(f"data.image_resize ({self.image_resize}) must be at least data.image_size ({self.image_size})")
        try:
            groups = re.compile(self.instance_id).groups
        except re.error as error:
            raise UserError(f"data.instance_id is not a regular expression: {self.instance_id!r} ({error})") from error
        if groups != 1:
            raise UserError(f"data.instance_id needs exactly one group, got {groups} in {self.instance_id!r}")

    def kind_of(self, modality: str) -> str:
        """Return the kind of a modality's files, a key of `datasets.kinds.KINDS`."""
        return "features" if modality in self.features else MODALITIES[modality].kind

    def views_of(self, modality: str) -> int:
        """Return how many augmented views of a sample a training step sees."""
        least = 2 if self.positives == "views" else 1
        return self.views.get(modality, least)
