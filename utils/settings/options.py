"""Every setting of the two stages in frozen dataclasses: type, default, limits, meaning. `utils.settings.config` fills them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError
from utils.modalities import MODALITIES
from utils.settings.data_options import DataConfig, check_modalities, nearest, option

ROBUST_LOSSES = ("rcll", "ce", "mae", "gce", "aue", "nce_agce")  # as in losses/robust.py, which stands by itself


@dataclass(frozen=True)
class ModelConfig:
    """Encoders and the step-2 head."""

    embedding_dim: int = option(256, "L, width of the common space (paper: 1024 in step 1, 256 in step 2)", min=1)
    num_neighbors: int = option(20, "neighbours per point in DGCNN's graphs", min=1)
    point_width: int = option(1024, "channels of DGCNN's last convolution (published: 1024)", min=1)
    edge_conv: Literal["fused", "triton", "reference"] = option(
        "fused", "DGCNN's layers: without an edge tensor, the same with kernels for CUDA (no card has run them yet), or with one"
    )
    mesh_width: int = option(1024, "channels of MeshNet's pooled feature (published: 1024)", min=1)
    mesh_conv_width: int = option(256, "channels of MeshNet's first mesh convolution (published: 256)", min=1)
    mesh_mask_ratio: float = option(0.95, "share of faces hidden from MeshNet's maximum in training (published: 0.95)", min=0, below=1)
    image_stages: int = option(4, "residual stages of ResNet18 (published: 4); 3 for 32-pixel images on a CPU", min=1, max=4)
    pretrained: dict[str, str] = option({}, "modality -> imagenet | none | PATH of a weight file or a run", path=True)
    feature_hidden: int = option(512, "hidden width of the MLP that encodes the modalities of data.features", min=1)
    reads_labels: str | None = option(None, "labels that the initial weights or the run before have read; taken from files that say so")
    freeze: tuple[str, ...] = option((), "modalities whose encoder stays as it starts; the others move towards it")
    headless: tuple[str, ...] = option(
        (), "modalities whose encoder ends without projection: a good start keeps its own space, whose width embedding_dim must be"
    )
    classifier_hidden: int = option(128, "hidden width of the step-2 classifier", min=1)

    def __post_init__(self) -> None:
        for key in ("pretrained", "freeze", "headless"):
            check_modalities(f"model.{key}", getattr(self, key))
        for name, source in self.pretrained.items():
            if not source:
                raise UserError(f"model.pretrained.{name} is empty: give imagenet, none, or the path of a weight file")
            if source == "imagenet" and MODALITIES[name].kind != "image":
                raise UserError(f"model.pretrained.{name}: imagenet is for images only; give none or the path of a weight file")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation of either stage (Adam)."""

    epochs: int = option(20, "passes over the training set (paper: 20 in step 1, 50 in step 2); 0 in step 1 with pla.start", min=0)
    batch_size: int = option(50, "instances per step", min=2)
    learning_rate: float = option(2e-4, "Adam's step size", above=0)
    trunk_rate: float = option(1.0, "factor on it for encoders that start from model.pretrained, all but their projection", above=0)
    weight_decay: float = option(0.0, "L2 penalty", min=0)
    schedule: Literal["constant", "cosine"] = option("cosine", "course of the learning rate")
    fused: bool = option(True, "Adam's fused kernel: one pass over all parameters; off is equal up to rounding")


@dataclass(frozen=True)
class MLMConfig:
    """The modality-invariance loss of either stage (Eq. 13-14); its temperature is pla.tau_2 and rdl.tau_2."""

    self_term: bool = option(False, "keep the anchor itself in both sums of Eq. 13, as printed")
    relations: float = option(0.0, "weight of the relational loss towards the encoders of model.freeze; the rest is Eq. 14's", min=0, max=1)


@dataclass(frozen=True)
class PLAConfig:
    """Step 1, pseudo-label annotation (Eq. 3, 5-9, 13-14)."""

    num_clusters: int | Literal["auto", "fine"] = option(
        "auto", "K, independent of the number of classes; auto: the communities of the neighbour graph; fine: many small ones", min=2
    )
    fuse: Literal["none", "mean", "trusted"] = option(
        "trusted", "pseudo-labels of each modality by itself (paper), or one for all from the mean of their beliefs, weighted by trust"
    )
    lambda_1: float = option(0.25, "weight of self matching in Eq. 3; 1 - lambda_1 weights modality invariance", min=0, max=1)
    tau_1: float = option(0.5, "sharpening: memory predictions are raised to 1 / tau_1", above=0)
    tau_2: float = option(0.5, "temperature of the modality-invariance loss", above=0)
    momentum: float = option(0.9, "eta of the memory update, Eq. 6", min=0, below=1)
    renormalise: bool = option(True, "memory rows go back to unit norm after Eq. 6; false is the equation as printed")
    mlm_only_epochs: int | Literal["all"] = option(
        "all", "first epochs, of modality invariance alone, before clustering; all: the clusters at the end are the pseudo-labels",
        min=0, formerly="warmup_epochs",
    )
    estimator: Literal["class", "instance", "hard"] = option("class", "reading of the joint probability in Eq. 7-8")
    symmetric_joint: bool = option(False, "estimator class: (J + J^T) / 2 in place of the joint J")
    memory_samples: int = option(1024, "N', memory rows sampled per step beside those of the batch, Eq. 7-8", min=0)
    banks: tuple[str, ...] | None = option(
        None, "modalities with a momentum memory bank, default all; the others' memory is the last epoch's features (Table VIII)"
    )
    recluster_every: int = option(0, "epochs between two clusterings after the first; 0 never", min=0)
    logit_scale: float = option(10.0, "factor on the classifiers' cosine logits", above=0)
    start: str | None = option(None, "run of step 1 whose encoders to go on from, see --from; default: model.pretrained", path=True)

    def __post_init__(self) -> None:
        if self.symmetric_joint and self.estimator != "class":
            raise UserError(f"pla.symmetric_joint needs pla.estimator: class, found {self.estimator}")


@dataclass(frozen=True)
class RDLConfig:
    """Step 2, robust discriminative learning (Eq. 4, 10-14)."""

    loss: str = option("rcll", f"robust loss on the pseudo-labels (Tables IV, V): {' | '.join(ROBUST_LOSSES)} | module:Class")
    loss_scale: float = option(1.0, "factor on the robust loss, e.g. to give a steeper one RCLL's slope; 1 in the paper", above=0)
    lambda_2: float = option(0.9, "weight of the robust loss in Eq. 4; 1 - lambda_2 weights modality invariance", min=0, max=1)
    alpha: float = option(0.3, "exponent of RCLL", min=0, max=1)
    tau_2: float = option(0.5, "temperature of the modality-invariance loss", above=0)
    unclipped_epochs: int = option(3, "first epochs with RCLL not clipped at 1/K (ours; paper: 0)", min=0, formerly="warmup_epochs")
    num_clusters: int | None = option(None, "K; default: read from the pseudo-labels' .meta.json", min=2)
    start: Literal["fresh", "inherited"] = option("inherited", "encoders: anew (paper), or as the run that wrote the labels left them")
    confidence: bool = option(False, "weigh a sample in RCLL by how sure the run that wrote its pseudo-label was")
    fuse: Literal["none", "mean", "trusted"] = option("trusted", "as pla.fuse, for the labels that this run writes for another round")
    rounds: int = option(1, "rounds that a call trains, a run folder each: every further one on the labels of the one before", min=1)
    pseudo_labels: str | None = option(None, "folder of pseudo-labels; default: of step 1's newest finished run, see --from", path=True)

    def __post_init__(self) -> None:
        if ":" not in self.loss and self.loss not in ROBUST_LOSSES:
            known, hint = ", ".join(ROBUST_LOSSES), nearest(self.loss, ROBUST_LOSSES)
            raise UserError(f"rdl.loss must be one of {known}, or module:Class, found {self.loss!r}{hint}")
        if self.confidence and self.loss != "rcll":
            raise UserError(f"rdl.confidence weighs RCLL alone, found rdl.loss: {self.loss}")


@dataclass(frozen=True)
class EvalConfig:
    """What the logged scores compare; evaluate.py prints all of it."""

    representation: Literal["embedding", "posterior", "joint"] = option("embedding", "what is compared: v (paper), beliefs, both")
    ranking: Literal["plain", "diffusion"] = option("plain", "by similarity (paper), or over the gallery's neighbour graph")


@dataclass(frozen=True)
class RunConfig:
    """Everything around the training itself."""

    seed: int = option(0, "seed of all random draws", min=0, max=2**32 - 1)
    device: str = option("auto", "auto | cpu | cuda | cuda:N")
    amp: bool = option(False, "bfloat16 autocast in the encoders")
    compile: Literal["off", "default", "cuda-graphs"] = option("off", "torch.compile of the encoders, alone or with CUDA graphs")
    sync_batchnorm: bool = option(True, "several processes: batch statistics of the global batch, as one process would have")
    threads: int | None = option(None, "CPU threads; default: torch's choice", min=1)
    output: str = option("runs", "folder of the run folders", path=True)
    pseudo_labels: str | None = option(None, "folder that step 1 writes; default: pseudo_labels in its run folder", path=True)
    eval_every: int = option(1, "epochs between evaluations; 0 only after the last", min=0)
    log_interval: int = option(10, "steps between progress updates", min=1)
    deterministic: bool = option(True, "deterministic kernels where they exist")
    figures: bool = option(True, "draw figures at the end")


@dataclass(frozen=True)
class StageConfig:
    """The sections of both stages."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mlm: MLMConfig = dataclasses.field(default_factory=MLMConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        missing = [name for name in self.data.modalities if name not in self.model.pretrained]
        if missing:  # no modality starts from random weights unless the configuration says so
            raise UserError(
                f"model.pretrained says nothing about {', '.join(missing)}: give imagenet (images only), "
                f"none (random start) or the path of a weight file, e.g. --set model.pretrained.{missing[0]}=none"
            )
        loaded = [name for name in self.data.features if self.model.pretrained.get(name, "none") != "none"]
        if loaded:
            raise UserError(f"model.pretrained.{loaded[0]} must be none: the MLP of data.features has no weights to start from")
        self._check_frozen()
        neighbors, points = self.model.num_neighbors, self.data.num_points
        if "PointCloud" in self.data.modalities and neighbors > points:
            raise UserError(f"model.num_neighbors ({neighbors}) must not exceed data.num_points ({points})")

    def _check_frozen(self) -> None:
        data, frozen = self.data, self.model.freeze
        for key in ("freeze", "headless"):
            unknown = [name for name in getattr(self.model, key) if name not in data.modalities]
            if unknown:
                raise UserError(f"model.{key} names {', '.join(unknown)}, but data.modalities is {list(data.modalities)}")
        if set(frozen) == set(data.modalities):
            raise UserError(f"model.freeze: {list(frozen)} leaves no encoder to train")
        if self.mlm.relations and (not frozen or data.pairing == "none" or data.positives != "modalities"):
            raise UserError("mlm.relations needs a frozen encoder (model.freeze) and rows that are pairs (data.pairing, data.positives)")


@dataclass(frozen=True)
class Step1Config(StageConfig):
    """Settings of train_step1.py."""

    pla: PLAConfig = dataclasses.field(default_factory=PLAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.pla.banks or () if name not in self.data.modalities]
        if unknown:
            raise UserError(f"pla.banks names {', '.join(unknown)}, but data.modalities is {list(self.data.modalities)}")
        if not self.optim.epochs and not self.pla.start:
            raise UserError("optim.epochs: 0 needs the encoders of a finished run: python train_step1.py --from RUN")
        if self.mlm_only_epochs > self.optim.epochs:
            raise UserError(f"pla.mlm_only_epochs ({self.mlm_only_epochs}) must not exceed optim.epochs, {self.optim.epochs}")
        if self.data.pairing == "none" and (isinstance(self.pla.num_clusters, str) or self.pla.fuse != "none"):
            raise UserError("pla.num_clusters: auto or fine and pla.fuse need rows that are pairs, found data.pairing: none")

    @property
    def mlm_only_epochs(self) -> int:
        """Number of first epochs of modality invariance alone."""
        return self.optim.epochs if self.pla.mlm_only_epochs == "all" else self.pla.mlm_only_epochs


@dataclass(frozen=True)
class Step2Config(StageConfig):
    """Settings of train_step2.py."""

    eval: EvalConfig = dataclasses.field(default_factory=lambda: EvalConfig(representation="posterior"))
    rdl: RDLConfig = dataclasses.field(default_factory=RDLConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.optim.epochs:
            raise UserError("optim.epochs: must be at least 1 in step 2, got 0")


CONFIGS = {"step1": Step1Config, "step2": Step2Config}
