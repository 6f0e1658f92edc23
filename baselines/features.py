"""Frozen features of a data set, label-free, stored as a prepared data set: python -m baselines.features --config FILE --out DIR."""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from baselines.extract import read_out
from baselines.stored_features import SOURCE, provenance
from datasets.batches import BatchSource
from datasets.lists import SampleList, default_list_path, text_rows
from datasets.prepare.parallel import user_path
from datasets.samples import PairedSamples, list_path, load_training_samples
from losses import ModalityInvarianceLoss
from models.build import build_encoders, load_pretrained
from training import FEATURES_NOTE, circumstances, mark_labels
from utils.engine.learner import StageLearner
from utils.engine.run_log import environment
from utils.engine.seed import BatchGenerator
from utils.engine.session import fit, open_session, run_command
from utils.errors import MissingFileError, UserError
from utils.files import atomic_write_json, atomic_write_text
from utils.modalities import MODALITIES
from utils.settings.config import SET, config_hash, load_config, to_dict
from utils.settings.data_options import DataConfig
from utils.settings.options import Step1Config

GRID = 16  # cells per axis of the occupancy grid of raw clouds and meshes
SUFFIXES = {"learned": "features", "raw": "raw", "random": "random", "initial": "initial"}


class ViewsLearner(StageLearner):
    """Trains each encoder alone: two augmented views of one sample are positives, pairs are not known (Eq. 13-14 within a modality)."""

    num_clusters = 1

    def __init__(self, config: Step1Config, samples: PairedSamples, device: torch.device) -> None:
        self.modality_invariance = ModalityInvarianceLoss(config.pla.tau_2, config.mlm.self_term)
        source = BatchSource(samples, config.data, device)
        super().__init__("features", config, source, samples.arrays, build_encoders(config.data, config.model), nn.ModuleDict(), device)

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """One step on the mean over the modalities of the loss among their own views."""
        loss = self.invariance(self.embed(raw, generator))
        self.optimise(loss)
        return {"loss/views": loss.detach()}


class RawImage(nn.Module):
    """Pixels of a prepared image (B, 3, S, S), a third of them where the channels are equal."""

    def __init__(self, gray: bool) -> None:
        super().__init__()
        self.channels = 1 if gray else 3

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, C * S * S)."""
        return images[:, : self.channels].flatten(1)


class Occupancy(nn.Module):
    """Which cells of a GRID^3 grid over the unit cube hold a point (B, P, 3), or the centre of a face (B, F, 18)."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, GRID^3) of zeros and ones."""
        cells = ((rows[:, :, :3] + 1) / 2 * GRID).long().clamp(0, GRID - 1)
        places = (cells[:, :, 0] * GRID + cells[:, :, 1]) * GRID + cells[:, :, 2]
        return rows.new_zeros(len(rows), GRID**3).scatter_(1, places, 1.0)


def make_features(
    config_path: str, overrides: list[str], kind: str, seed: int, out: Path | None, command: str, resume: str | None = None
) -> dict[str, Any]:
    """Write features of both splits into a folder of their own, with lists as the source's and `features.json`.

    Args:
        config_path, overrides: settings of step 1 on the samples.
        kind: "learned" without labels and pairs, "raw" (pixels, occupancy grid), "random" (untrained encoders), or "initial": of the
            modalities that `model.pretrained` names a file for, the features of that file of all views; the others keep their samples.
        seed: of the encoders; out: the folder, by default `default_folder`; command: for the record; resume: run folder to continue.
    Returns:
        The content of features.json.
    """
    texts = [f"data.views.{name}=2" for name in MODALITIES] + overrides
    texts += [f"run.seed={seed}", "data.pairing=none", "data.positives=views", "pla.num_clusters=20", "pla.fuse=none"]
    mark = lambda config: mark_labels(config, None)
    config = mark(load_config(Step1Config, config_path, texts))
    if config.data.features:
        raise UserError(f"{config_path} is of features already: give the configuration of the samples")
    out = out or default_folder(config.data, kind, seed)
    is_there = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if not is_there:
        arguments = argparse.Namespace(config=config_path, resume=resume, overrides=texts)
        session = open_session(Step1Config, "features", arguments, config_path, mark)
        with session.run.failures_logged():
            splits = _splits(session.config.data, session.device)
            _write(session.config, kind, _encoders(session, kind, splits["train"]), splits, out, command, session.device)
    elif not (out / FEATURES_NOTE).is_file():
        raise UserError(f"{out} is there and not of this command: remove it, or give another --out")
    note = provenance(out)
    if (note["kind"], note["seed"], note["config_hash"]) != (kind, seed, config_hash(config)):
        raise UserError(f"{out} holds {note['kind']} features of seed {note['seed']} with other settings: give another --out")
    with suppress(MissingFileError):  # the samples may be gone
        found = _contents(_splits(config.data, torch.device("cpu"))) if is_there else {}
        if any(note.get("contents", {}).get(key, entry) != entry for key, entry in found.items()):
            raise UserError(f"{out} holds features of other samples than {config.data.root} has now: remove it, or give another --out")
    settings = [f"data.root={out}", *note["settings"], f"data.modalities=[{','.join(config.data.modalities)}]"]
    print(f"{out} holds these features; train on them with --set {' '.join(settings)}")
    return note


def default_folder(data: DataConfig, kind: str, seed: int) -> Path:
    """Return where features of a data set go if nothing else is said."""
    return Path("dataset") / (f"{data.dataset}_{SUFFIXES[kind]}" + f"_seed{seed}" * (seed > 0))


def _splits(data: DataConfig, device: torch.device) -> dict[str, PairedSamples]:
    """Return the samples of both splits without their labels, which no feature needs."""
    test = dataclasses.replace(data, train_lists={name: str(list_path(data, name, "test")) for name in data.modalities})
    return {split: load_training_samples(source, device) for split, source in (("train", data), ("test", test))}


def _contents(splits: Mapping[str, PairedSamples]) -> dict[str, dict[str, Any]]:
    return {f"{split}/{name}": entry for split, samples in splits.items() for name, entry in samples.contents.items()}


def _encoders(session: Any, kind: str, samples: PairedSamples) -> nn.ModuleDict:
    """Return what turns samples into features, trained on `samples` where the kind is learned."""
    config, device = session.config, session.device
    session.run.log(circumstances(samples, session))
    if kind == "raw":  # a sample is written down as one vector, without any learning
        make = lambda name: RawImage(name == "GrayImg") if config.data.kind_of(name) == "image" else Occupancy()
        return nn.ModuleDict({name: make(name) for name in config.data.modalities})
    learner = ViewsLearner(config, samples, device)
    if kind == "initial":
        for name in [name for name in learner.encoders if config.model.pretrained[name] == "none"]:
            del learner.encoders[name]
        if not learner.encoders:
            raise UserError("--kind initial needs weights: give imagenet or a file, e.g. --set model.pretrained.RGBImg=imagenet")
    load_pretrained(learner.encoders, config.model.pretrained)
    if kind == "learned":
        fit(session, learner, None)
    for encoder in learner.encoders.values():
        encoder.head = nn.Identity()  # the pooled features, which transfer better than what the loss saw
    return learner.encoders


def _write(
    config: Step1Config, kind: str, encoders: nn.ModuleDict, splits: Mapping[str, PairedSamples], out: Path, command: str,
    device: torch.device,
) -> None:
    data, staging = config.data, out.with_name(f"{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    dataset, widths = f"{data.dataset}_{SUFFIXES[kind]}", {}
    shown = dataclasses.replace(data, eval_view="mean") if kind == "initial" else data  # all views, each by itself
    for split, samples in splits.items():
        for name, rows in read_out(encoders, samples, shown, device, average=kind != "initial").items():
            widths[name] = rows.shape[-1]
            _write_list(staging, dataset, split, samples.lists[name], rows.cpu().numpy())
        for name in set(samples.lists) - set(encoders):
            source = samples.lists[name]  # its own files, seen from the finished folder
            _copy_list(staging, dataset, split, source, [os.path.relpath(file, out) for file in source.files])
    noted = environment(config.run.seed)
    note = {
        "kind": kind, "seed": config.run.seed, "instance_id": data.instance_id, "command": command,
        "settings": [f"data.dataset={dataset}", *(f"data.features.{name}={width}" for name, width in widths.items())],
        "reads_labels": None if kind == "raw" else config.model.reads_labels,
        "config_hash": config_hash(config), "contents": _contents(splits),
        "commit": noted["git_sha"], "dirty": noted["git_dirty"], "device": noted["gpu"] or noted["cpu"],
    }
    atomic_write_text(staging / SOURCE, yaml.safe_dump(to_dict(config), sort_keys=False))
    atomic_write_json(staging / FEATURES_NOTE, note)
    os.replace(staging, out)


def _write_list(root: Path, dataset: str, split: str, source: SampleList, rows: np.ndarray) -> None:
    """Write one file per sample and the list of them; where files of several folders share names, a row's number goes before its name."""
    folder, stems = f"{split}/{MODALITIES[source.modality].folder}", [Path(file).stem for file in source.files]
    if len(set(stems)) < len(stems):
        stems = [f"{row:06d}_{stem}" for row, stem in enumerate(stems)]
    (root / folder).mkdir(parents=True)
    for stem, row in zip(stems, rows):
        np.save(root / folder / f"{stem}.npy", row)
    _copy_list(root, dataset, split, source, [f"{folder}/{stem}.npy" for stem in stems])


def _copy_list(root: Path, dataset: str, split: str, source: SampleList, paths: Sequence[str]) -> None:
    """Write a list of other paths; what follows a path in the source's list is copied as text, unread."""
    texts = text_rows(source.path.read_bytes(), source.path, "path label")
    lines = [f"{path}{text.removeprefix(name)}\n" for path, name, text in zip(paths, source.names, texts)]
    atomic_write_text(default_list_path(root, dataset, source.modality, split), "".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and make one folder of features."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m baselines.features", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="settings of step 1 on the samples, e.g. configs/digits/step1.yaml")
    parser.add_argument("--set", **SET, help="override settings")
    parser.add_argument("--kind", choices=SUFFIXES, default="learned",
                        help="trained without labels or pairs, plain samples, untrained, or of the weights in model.pretrained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=user_path, metavar="DIR", help="folder to make; default dataset/NAME_KIND, and _seedS if S > 0")
    parser.add_argument("--resume", metavar="RUN", type=os.path.expanduser, help="run folder of an interrupted call to continue")
    arguments = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "baselines.features", *argv])
    make_features(arguments.config, arguments.overrides, arguments.kind, arguments.seed, arguments.out, command, arguments.resume)


if __name__ == "__main__":
    sys.exit(run_command(main))
