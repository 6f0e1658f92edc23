"""Atomic files: a reader sees the old content or the new one, never a mixture."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import MissingFileError, UserError


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
