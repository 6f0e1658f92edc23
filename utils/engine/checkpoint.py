"""Checkpoints: tensors and plain containers in one file, never half-written, damage noticed when they are read."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import atomic_write

FORMAT_VERSION = 1
LAST = "last.pt"  # the newest checkpoint of a run folder
_UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError)
_PLAIN_TYPES = (type(None), bool, int, float, str, bytes)


def _check_plain(value: Any, where: str) -> None:
    """Refuse what `torch.load(weights_only=True)` would refuse later, naming the entry."""
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN_TYPES:
        return
    if type(value) in (dict, OrderedDict):
        for key, entry in value.items():
            _check_plain(key, f"{where}[{key!r}]")
            _check_plain(entry, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    else:
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise ValueError(f"{where} is a {kind}; a checkpoint holds only tensors, numbers, strings, dicts, lists and tuples")


def save_checkpoint(path: str | Path, state: dict) -> None:
    """As `atomic_write`, of tensors and plain containers, so that they load with weights_only=True; adds a format version.

    Raises:
        ValueError: if an entry is neither a tensor nor plain (NumPy scalars included), naming it.
    """
    _check_plain(state, "state")
    atomic_write(path, lambda stream: torch.save({"format_version": FORMAT_VERSION, "state": state}, stream))


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict:
    """Return the state that `save_checkpoint` wrote, its tensors on the device `map_location`.

    Raises:
        UserError: if the file is missing, truncated, damaged, no checkpoint of this project, or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the .pt file inside a run folder of a training script")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"checksum of {damaged} does not match")
        content = torch.load(path, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} ({path.stat().st_size} bytes) is damaged or not a checkpoint: {reason}") from error
    if not isinstance(content, dict) or set(content) != {"format_version", "state"}:
        raise UserError(f"{path} is not a checkpoint of this project: expected the keys format_version and state")
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has checkpoint format {content['format_version']!r}, this code reads {FORMAT_VERSION}: use the "
                        "matching version")
    return content["state"]
