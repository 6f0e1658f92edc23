"""Every setting of the two stages: type, default, limits and meaning, in frozen dataclasses. `utils.config` fills them."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from utils.modalities import MODALITIES


def option(default: Any, doc: str, **limits: float) -> Any:
    """Declare one setting.

    Args:
        default: its default; dictionaries are copied per instance.
        doc: one line for readers and error messages.
        limits: `min`, `max` (inclusive) or `above`, `below` (exclusive), for numbers and numbers inside containers.
    """
    metadata = {"doc": doc, **limits}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: object, valid: Iterable[object]) -> str:
    """Return ", did you mean X?" or an empty text; for error messages about unknown names."""
    match = difflib.get_close_matches(str(name), map(str, valid), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def _check_modalities(key: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in MODALITIES:
            known = ", ".join(MODALITIES)
            raise ValueError(f"{key}: unknown modality {name!r}{nearest(name, MODALITIES)} (known: {known})")


def _check_ordered(key: str, bounds: tuple[float, float]) -> None:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{key} must be [low, high] with low <= high, got {list(bounds)}")


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of training samples; evaluation uses none."""

    image_rotation_degrees: float = option(15.0, "rotation drawn from [-x, x], degrees", min=0, max=180)
    image_scale: tuple[float, float] = option((0.8, 1.25), "range of the zoom factor, per axis", above=0)
    image_translate: float = option(0.1, "largest shift, fraction of the side", min=0, max=1)
    image_shear_degrees: float = option(10.0, "shear drawn from [-x, x], degrees", min=0, below=90)
    image_brightness: float = option(0.1, "brightness offset drawn from [-x, x], images in [0, 1]", min=0, max=1)
    image_contrast: float = option(0.2, "contrast factor drawn from [1 - x, 1 + x]", min=0, max=1)
    image_flip: bool = option(False, "mirror half of the images; off because a mirrored digit is another shape")
    point_rotation_degrees: float = option(15.0, "turn about the vertical axis z, from [-x, x], degrees", min=0, max=180)
    point_tilt_degrees: float = option(15.0, "turn about each horizontal axis, from [-x, x], degrees", min=0, max=180)
    point_scale: tuple[float, float] = option((0.8, 1.25), "range of the scale factor, per axis", above=0)
    point_shear: float = option(0.2, "lean of the horizontal axes with the height, from [-x, x]", min=0)
    point_translate: float = option(0.1, "largest shift per axis, units of the unit sphere", min=0)
    point_jitter: float = option(0.01, "standard deviation of noise per coordinate, units of the unit sphere", min=0)

    def __post_init__(self) -> None:
        _check_ordered("data.augment.image_scale", self.image_scale)
        _check_ordered("data.augment.point_scale", self.point_scale)


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and in which shape they reach the encoders."""

    dataset: str = option("mnist3d", "name in list files, pseudo-label files and run folders")
    root: str = option("dataset/mnist3d", "prepared data folder")
    modalities: tuple[str, ...] = option(("RGBImg", "PointCloud"), "the modalities to align, at least two")
    train_lists: dict[str, str] = option({}, "modality -> training list; default: the prepared name under root")
    test_lists: dict[str, str] = option({}, "modality -> test list; default: the prepared name under root")
    instance_id: str = option(r"(\d+)$", "expression on the file stem; group 1 is the id that pairs modalities")
    num_classes: int | None = option(None, "number of classes: checks label ranges in evaluation, never used for training", min=1)
    image_size: int = option(224, "side of the encoder's input, pixels", min=8)
    image_resize: int = option(256, "side after resizing, before the crop, pixels", min=8)
    num_points: int = option(1024, "points per cloud", min=2)
    max_faces: int = option(500, "largest number of faces a mesh may have; smaller ones repeat faces", min=1)
    num_views: int = option(1, "pictures per object: the listed one and those in view_01 ... beside it", min=1)
    train_view: Literal["random", "first"] = option("random", "which of the num_views pictures a training step sees")
    eval_view: Literal["first", "mean"] = option("first", "evaluation: the listed picture, or the mean embedding of all")
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
            raise ValueError(f"data.dataset names files and folders: letters, digits, '_', '-', '.' only, got {self.dataset!r}")
        for key in ("modalities", "train_lists", "test_lists"):
            _check_modalities(f"data.{key}", getattr(self, key))
        if len(self.modalities) < 2 or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"data.modalities needs at least two different modalities, got {list(self.modalities)}")
        if self.pairing == "none" and self.positives != "views":
            raise ValueError(
                "data.pairing: none leaves the modality-invariance loss without positives across modalities; say what replaces "
                "them with data.positives: views (two random views of one sample)"
            )
        if self.image_resize < self.image_size:
            raise ValueError(f"data.image_resize ({self.image_resize}) must be at least data.image_size ({self.image_size})")
        try:
            groups = re.compile(self.instance_id).groups
        except re.error as error:
            raise ValueError(f"data.instance_id is not a regular expression: {self.instance_id!r} ({error})") from error
        if groups != 1:
            raise ValueError(f"data.instance_id needs exactly one group, got {groups} in {self.instance_id!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Encoders and the step-2 head."""

    embedding_dim: int = option(1024, "L, width of the common space (paper: 1024 in step 1, 256 in step 2)", min=1)
    num_neighbors: int = option(20, "neighbours per point in DGCNN's graphs", min=1)
    point_width: int = option(1024, "channels of DGCNN's last convolution (published: 1024)", min=1)
    edge_conv: Literal["fused", "reference"] = option("fused", "DGCNN's layers without or with an edge tensor: the same numbers")
    mesh_width: int = option(1024, "channels of MeshNet's pooled feature (published: 1024)", min=1)
    mesh_conv_width: int = option(256, "channels of MeshNet's first mesh convolution (published: 256)", min=1)
    mesh_mask_ratio: float = option(0.95, "share of faces hidden from MeshNet's maximum in training (published: 0.95)", min=0, below=1)
    image_stages: int = option(4, "residual stages of ResNet18 (published: 4); 3 for 32-pixel images on a CPU", min=1, max=4)
    pretrained: dict[str, str] = option({}, "modality -> imagenet | none | PATH of a weight file")
    classifier_hidden: int = option(128, "hidden width of the step-2 classifier", min=1)

    def __post_init__(self) -> None:
        _check_modalities("model.pretrained", self.pretrained)
        for name, source in self.pretrained.items():
            if not source:
                raise ValueError(f"model.pretrained.{name} is empty: give imagenet, none, or the path of a weight file")
            if source == "imagenet" and MODALITIES[name].kind != "image":
                raise ValueError(f"model.pretrained.{name}: imagenet is for images only; give none or the path of a weight file")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation of either stage (Adam)."""

    epochs: int = option(20, "passes over the training set (paper: 20 in step 1, 50 in step 2)", min=1)
    batch_size: int = option(50, "instances per step", min=2)
    learning_rate: float = option(2e-4, "Adam's step size", above=0)
    weight_decay: float = option(0.0, "L2 penalty", min=0)
    schedule: Literal["constant", "cosine"] = option("constant", "course of the learning rate")
    fused: bool = option(False, "Adam's fused kernel: one pass over all parameters; equal up to rounding")


@dataclass(frozen=True)
class PLAConfig:
    """Step 1, pseudo-label annotation (Eq. 3, 6-8, 13-14)."""

    num_clusters: int = option(20, "K, independent of the number of classes; more is over-clustering", min=2)
    lambda_1: float = option(0.25, "weight of self matching in Eq. 3; 1 - lambda_1 weights modality invariance", min=0, max=1)
    tau_1: float = option(0.5, "sharpening: memory predictions are raised to 1 / tau_1", above=0)
    tau_2: float = option(0.05, "temperature of the modality-invariance loss", above=0)
    momentum: float = option(0.9, "eta of the memory update, Eq. 6", min=0, below=1)
    warmup_epochs: int = option(0, "epochs of modality invariance alone before the banks are filled and clustered", min=0)
    estimator: Literal["class", "instance", "hard"] = option("class", "reading of the joint probability in Eq. 8")
    memory_samples: int = option(0, "N', extra bank rows per step in the self-matching loss", min=0)
    recluster_every: int = option(0, "epochs between two clusterings after the first; 0 never", min=0)
    logit_scale: float = option(10.0, "factor on the classifiers' cosine logits", above=0)


@dataclass(frozen=True)
class RDLConfig:
    """Step 2, robust discriminative learning (Eq. 4, 11-12)."""

    lambda_2: float = option(0.25, "weight of the robust loss in Eq. 4; 1 - lambda_2 weights modality invariance", min=0, max=1)
    alpha: float = option(0.3, "exponent of the robust loss", min=0, max=1)
    tau_2: float = option(0.15, "temperature of the modality-invariance loss", above=0)
    warmup_epochs: int = option(0, "first epochs with RCLL not clipped at p = 1/K (ours; 0 in the paper)", min=0)
    num_clusters: int | None = option(None, "K; default: read from the pseudo-labels' .meta.json", min=2)
    pseudo_labels: str = option("pseudo_labels", "folder that step 1 wrote")


@dataclass(frozen=True)
class RunConfig:
    """Everything around the training itself."""

    seed: int = option(0, "seed of all random draws", min=0, max=2**32 - 1)
    device: str = option("auto", "auto | cpu | cuda | cuda:N")
    amp: bool = option(False, "bfloat16 autocast in the encoders")
    compile: Literal["off", "default", "cuda-graphs"] = option("off", "torch.compile of the encoders, alone or with CUDA graphs")
    sync_batchnorm: bool = option(True, "several processes: batch statistics of the global batch, as one process would have")
    threads: int | None = option(None, "CPU threads; default: torch's choice", min=1)
    output: str = option("runs", "folder of the run folders")
    pseudo_labels: str = option("pseudo_labels", "folder that step 1 writes")
    eval_every: int = option(1, "epochs between evaluations; 0 only after the last", min=0)
    log_interval: int = option(10, "steps between progress updates", min=1)
    deterministic: bool = option(True, "deterministic kernels where they exist")
    figures: bool = option(True, "draw figures at the end")


def _check_pretrained(data: DataConfig, model: ModelConfig) -> None:
    """No modality starts from random weights unless the configuration says so."""
    missing = [name for name in data.modalities if name not in model.pretrained]
    if missing:
        raise ValueError(
            f"model.pretrained says nothing about {', '.join(missing)}: give imagenet (images only), "
            f"none (random start) or the path of a weight file, e.g. --set model.pretrained.{missing[0]}=none"
        )


def _check_neighbors(data: DataConfig, model: ModelConfig) -> None:
    if "PointCloud" in data.modalities and model.num_neighbors > data.num_points:
        raise ValueError(f"model.num_neighbors ({model.num_neighbors}) must not exceed data.num_points ({data.num_points})")


@dataclass(frozen=True)
class Step1Config:
    """Settings of train_step1.py."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    pla: PLAConfig = dataclasses.field(default_factory=PLAConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_pretrained(self.data, self.model)
        _check_neighbors(self.data, self.model)
        if self.pla.warmup_epochs >= self.optim.epochs:  # without an epoch after it, g would never leave its random start
            raise ValueError(f"pla.warmup_epochs ({self.pla.warmup_epochs}) must be below optim.epochs ({self.optim.epochs})")


@dataclass(frozen=True)
class Step2Config:
    """Settings of train_step2.py."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    rdl: RDLConfig = dataclasses.field(default_factory=RDLConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_pretrained(self.data, self.model)
        _check_neighbors(self.data, self.model)
