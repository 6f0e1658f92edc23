"""Reads the folders that `baselines.features` writes: where they come from, their samples, and the samples that they were made of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datasets.samples import PairedSamples, load_test_samples, load_training_samples
from training import FEATURES_NOTE
from utils.errors import UserError
from utils.files import read_json
from utils.settings.config import load_config
from utils.settings.data_options import DataConfig
from utils.settings.options import Step1Config

SOURCE = "source.yaml"


def provenance(folder: Path) -> dict[str, Any]:
    """Return features.json of a folder; a UserError if it is none of `baselines.features`."""
    if not (folder / FEATURES_NOTE).is_file():
        raise UserError(f"{folder} holds no {FEATURES_NOTE}: make features with python -m baselines.features --config FILE --out {folder}")
    return read_json(folder / FEATURES_NOTE)


def noted_facts(folder: Path) -> dict[str, Any]:
    """Return kind, seed, commit and command of the features in a folder; nothing of one's own, which have no note, so that nobody knows.

    Raises:
        UserError: on a damaged note.
    """
    if not (folder / FEATURES_NOTE).is_file():
        return {}
    note, wanted = provenance(folder), ("kind", "seed", "commit", "command")
    if missing := [key for key in wanted if key not in note]:
        raise UserError(
            f"{folder / FEATURES_NOTE} is damaged: expected {', '.join(wanted)}, found no {', '.join(missing)}: make the features anew, "
            "or remove the file if they are your own"
        )
    return {key: note[key] for key in wanted}


def load_features(folder: Path, modalities: Sequence[str], device: torch.device) -> PairedSamples:
    """Return the training features in a folder."""
    note = provenance(folder)
    texts = [f"data.root={folder}", *note["settings"], f"data.modalities=[{', '.join(modalities)}]"]
    texts += [f"data.instance_id={note['instance_id']}"] + [f"model.pretrained.{name}=none" for name in modalities]
    return load_training_samples(load_config(Step1Config, None, texts).data, device)


def original_samples(data: DataConfig, device: torch.device) -> PairedSamples | None:
    """Return the test samples that features were made of, for pictures of them; None if `data` is not of features or they are gone."""
    if not data.features or not (Path(data.root) / SOURCE).is_file():
        return None
    source = load_config(Step1Config, str(Path(data.root) / SOURCE), [f"data.modalities=[{', '.join(data.modalities)}]"]).data
    try:
        return load_test_samples(source, device)[0]
    except UserError:
        return None
