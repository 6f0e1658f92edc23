"""Atomic files and checkpoints: a reader sees the old content or the new one, never a mixture."""

import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import MissingFileError, UserError

FORMAT_VERSION = 1
LAST = "last.pt"  # the newest checkpoint of a run folder
_UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError)
_PLAIN_TYPES = (type(None), bool, int, float, str, bytes)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a binary file that replaces `path` when it is complete, creating its folder if needed.

    Goes through `.NAME.tmp` in the same folder, fsync, rename over `path`, fsync the folder. The temporary name is fixed on
    purpose: what a killed process left is overwritten by the next save.

    Raises:
        OSError: if it cannot be written, with the free space; the previous file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch's zip writer hides the failed system call
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        state = "the previous file is intact" if existed else "no file was left behind"
        raise OSError(cause.errno, f"could not write {path}: {cause.strerror or cause} ({free:.1f} MiB free on that disk); {state}. "
                                   "Free space or choose another folder.") from error


def atomic_write_text(path: str | Path, text: str) -> None:
    """As `atomic_write`, of UTF-8 text; line ends are written as given."""
    atomic_write(path, lambda stream: stream.write(text.encode("utf-8")))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """As `atomic_write`, of `value` as indented JSON; NaN and infinity, which JSON does not know, are a ValueError."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON object; a UserError if the file is missing, damaged or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} not found: was the folder copied as a whole?") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: expected a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected a JSON object, found a {type(value).__name__}")
    return value


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
