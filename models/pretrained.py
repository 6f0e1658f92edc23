"""Loads public weights into the encoders and reports every key, or raises; called by `models/build.py`."""

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from utils.engine.checkpoint import LAST, load_checkpoint
from utils.engine.run_log import STARTS, RunLog
from utils.errors import UserError

PRETRAINED_DIR = Path("pretrained")
OPTIONAL_SUFFIX = "num_batches_tracked"  # counters that old files lack
MESHNET_WIDTH = 1024
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError)


@dataclass
class LoadReport:
    """What became of every key: `used` names of the module, `skipped` 'checkpoint key: reason', `missing` names."""

    used: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line of counts for the run log."""
        return f"{len(self.used)} tensors loaded, {len(self.skipped)} skipped, {len(self.missing)} left as they were"


def _load_matching(
    module: nn.Module, state: Mapping[str, Tensor], rename: Callable[[str], str | None], required: tuple[str, ...], source: str
) -> LoadReport:
    """Copy the tensors of a state dict that the module has under the same name and shape; nothing unless all required are there.

    Args:
        state: key -> tensor; a leading `module.` (DataParallel) is stripped from the keys.
        rename: maps a stripped key to the module's name, or to None for a key to leave out.
        required: beginnings of the module's names that must all be filled, counters of seen batches excepted.
        source: of the weights, for the UserError if no key matches or a required name is missing.
    """
    own = module.state_dict()
    report, chosen = LoadReport(), {}
    for key, tensor in state.items():
        name = rename(key.removeprefix("module."))
        if name is None:
            report.skipped.append(f"{key}: not used by this encoder")
        elif name not in own:
            report.skipped.append(f"{key}: the encoder has no {name}")
        elif own[name].shape != tensor.shape:
            report.skipped.append(f"{key}: shape {tuple(tensor.shape)}, the encoder's {name} has {tuple(own[name].shape)}")
        else:
            chosen[name] = tensor
    report.used, report.missing = sorted(chosen), sorted(own.keys() - chosen.keys())
    lacking = [name for name in report.missing if name.startswith(required) and not name.endswith(OPTIONAL_SUFFIX)]
    if lacking or not chosen:
        what = f"lacks {', '.join(lacking[:5])}" if chosen else "matches no parameter of the encoder"
        raise UserError(f"{source}: the checkpoint {what} ({len(lacking)} required tensors missing, {len(chosen)} matched); "
                        f"first keys not used: {'; '.join(report.skipped[:5]) or 'no keys at all'}")
    with torch.no_grad():
        for name, tensor in chosen.items():
            own[name].copy_(tensor)
    return report


def read_state_dict(path: str | Path, modality: str | None = None) -> dict[str, Tensor]:
    """Read a flat state dict, from the present or the pre-zip container of PyTorch, to the CPU, without running code of the file.

    A weight file of this project (`baselines.supervised_start`) gives its encoder's, a run folder (or the `last.pt` in it) those of the
    modality.

    Raises:
        UserError: if there is no such file, it is damaged, of an unfinished run or a compared method, has no such modality, or holds
            anything but named tensors.
    """
    run = _run_folder(path)
    state = _of_run(run, modality) if run else _read(path).get("encoder")
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a flat state dict (name -> tensor)")
    return dict(state)


def labels_read_by(path: str | Path) -> str | None:
    """Return what a weight file, or the settings of a run, say of the labels that it has read; None if they say nothing.

    Raises:
        UserError: as `read_state_dict`.
    """
    run = _run_folder(path)
    return RunLog.open(run).config()["model"].get("reads_labels") if run else _read(path).get("reads_labels")


def _run_folder(source: str | Path) -> Path | None:
    """Return the run folder that a start means: itself, or of its `last.pt`; None for a weight file."""
    path = Path(source)
    return path if path.is_dir() else path.parent if path.name == LAST else None


def _of_run(folder: Path, modality: str | None) -> dict[str, Tensor]:
    run, state = RunLog.open(folder), load_checkpoint(folder / LAST)
    if state.get("stage") not in STARTS:
        raise UserError(f"{folder} is no start: expected a run of {', '.join(STARTS)}, found {state.get('stage')}")
    if state["epoch"] < run.config()["optim"]["epochs"]:
        raise UserError(f"{folder} has not finished (epoch {state['epoch']}): go on with it first, by --resume {folder}")
    weights, prefix = state["learner"]["encoders"], f"{modality}."
    found = {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}
    if not found:
        others = sorted({name.partition(".")[0] for name in weights})
        raise UserError(f"{folder} has no encoder of {modality}, found those of {', '.join(others)}")
    return found


def _read(path: str | Path) -> Mapping:
    """Return the state of a file of this project; what a public one holds comes as its "encoder"."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; give the path of a checkpoint or a run folder, or `none` to train from scratch")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "no detail"
        raise UserError(f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}: {reason}); fetch it again") from error
    if not (isinstance(content, Mapping) and "format_version" in content and isinstance(content.get("state"), Mapping)):
        return {"encoder": content}
    if "learner" in content["state"]:
        raise UserError(f"{path} is a checkpoint of a run: give its run folder, which knows what it has read")
    return content["state"]


def load_imagenet_resnet18() -> dict[str, Tensor]:
    """ImageNet weights of ResNet18 on the CPU: from `pretrained/` if they are there, else through torchvision's address.

    A download goes to the folder of torch.hub (set by TORCH_HOME) and is found there again; the contents are checked
    against the hash in the file name in all cases.

    Raises:
        UserError: if a file is damaged, or the download fails; says what to fetch, where to put it, and the alternative.
    """
    url = ResNet18_Weights.IMAGENET1K_V1.url
    name = Path(urlparse(url).path).name
    for path in (PRETRAINED_DIR / name, Path(torch.hub.get_dir()) / "checkpoints" / name):
        if path.is_file():
            with path.open("rb") as file:
                found, expected = hashlib.file_digest(file, "sha256").hexdigest(), path.stem.rsplit("-", 1)[-1]
            if not found.startswith(expected):
                raise UserError(f"{path} is damaged: its SHA-256 should start with {expected}, found {found}; fetch it again")
            return read_state_dict(path)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (HTTPException, *UNREADABLE) as error:
        raise UserError(f"could not download the ImageNet weights of ResNet18 ({type(error).__name__}: {error}). Fetch {name} from "
                        f"{url} and put it at {PRETRAINED_DIR / name}, or set the weights to `none` to train from scratch") from error


def load_weights(encoder: nn.Module, source: str | Path, modality: str | None = None) -> LoadReport:
    """Fill an encoder with weights of a file, in place; public ones are of its trunk and leave the projection to the common space as it is.

    Args:
        encoder: what has to be in the file depends on its class:
            `models.ResNet18`: all of `backbone`, under torchvision's names; `fc` is left out.
            `models.DGCNN`: the four EdgeConvs, as in the public classification checkpoint (`model.1024.t7`), and conv5 when its
            width fits. The file registers its BatchNorms twice: `convN.1` is read, `bnN` left out.
            `models.MeshNet`: descriptors and mesh convolutions, as in the public classification checkpoint (2021 version, one of
            its `.pkl` files), and `fusion_mlp` and `concat_mlp` when the encoder has their published width.
            The classifiers of the files never enter an encoder. Of a file of `baselines.supervised_start` or a run, all that fits.
        source: path of the file or the run folder, or "imagenet" for ResNet18.
        modality: whose encoder of a run is meant.
    Raises:
        UserError: weights that are absent, damaged, incomplete or not to be had.
    """
    kind = type(encoder).__name__
    state = load_imagenet_resnet18() if source == "imagenet" else read_state_dict(source, modality)
    required, rename = TRUNKS[kind]
    if kind == "MeshNet" and encoder.fusion_mlp[0].out_channels == MESHNET_WIDTH:
        required += ("fusion_mlp.", "concat_mlp.")
    if any(key.startswith(("backbone.", "edge_convs.")) for key in state):  # names of this project
        rename = str
    return _load_matching(encoder, state, rename, required, f"{kind} checkpoint {source}")


def _dgcnn_name(key: str) -> str | None:
    layer, _, rest = key.partition(".")
    part, _, name = rest.partition(".")
    if layer not in {f"conv{n}" for n in range(1, 6)} or part not in ("0", "1"):
        return None
    if layer == "conv5":
        return f"conv5.{name}" if part == "0" else f"bn5.{name}"
    return f"edge_convs.{int(layer[4:]) - 1}.{'conv' if part == '0' else 'bn'}.{name}"


TRUNKS = {  # encoder -> the beginnings of the names that a file must fill, and its name of a public file's key
    "ResNet18": (("backbone.",), lambda key: None if key.startswith("fc.") else f"backbone.{key}"),
    "DGCNN": (("edge_convs.",), _dgcnn_name),
    "MeshNet": (
        ("spatial_descriptor.", "structural_descriptor.", "mesh_conv1.", "mesh_conv2."),
        lambda key: None if key.startswith("classifier.") else key,
    ),
}
