"""The array of a sample list as a memory-mapped file beside the list: shared by all processes, never held twice. The preparation makes
those of the data set's own configuration, first use makes all others.

It is `.arrays/{list}-{settings}-{sources}.npy`, with its sha256 in a .json beside it. The name depends on the settings that decide the
array, on names and ids of the list, and on size and modification time of every file: when one changes, another array is made.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.kinds import Kind
from datasets.lists import SampleList
from utils.engine import distributed
from utils.engine.lock import hold_lock
from utils.files import atomic_write_json
from utils.settings.options import DataConfig

FOLDER, FORMAT = ".arrays", 2  # FORMAT: raised when the reading of files changes what they give


def stored_array(sample_list: SampleList, kind: Kind, data: DataConfig) -> tuple[Tensor, str | None]:
    """Return the (N, V, ...) array of a list, read-only and mapped from its file, and its sha256; every process must call it.

    Where the file cannot be written, the array is in memory, without a sha256, and a warning says so.

    Raises:
        UserError: on files that the kind cannot read.
    """
    place = _place(sample_list, kind, data)
    failure = distributed.from_main(lambda: store_array(sample_list, kind, data, place))
    found = None if failure else _open(place)
    if found is None:
        warnings.warn(f"{place.parent} takes no file ({failure}): arrays stay in memory, every start reads all files", stacklevel=2)
        return torch.from_numpy(kind.load(sample_list, data)), None
    kind.check(found[0], sample_list, data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(found[0]), found[1]


def _place(sample_list: SampleList, kind: Kind, data: DataConfig) -> Path:
    settings, files = kind.sources(sample_list, data)
    content = [FORMAT, sample_list.names, sample_list.instance_ids, [(entry.st_size, entry.st_mtime_ns) for entry in map(os.stat, files)]]
    made = digest_of([sample_list.modality, settings])
    return sample_list.path.parent / FOLDER / f"{sample_list.path.stem}-{made[:12]}-{digest_of(content)[:24]}.npy"


def digest_of(content: Sequence) -> str:
    """Return the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _open(place: Path) -> tuple[np.ndarray, str] | None:
    """Return array and sha256; None if there is none, or the file is not as it was written."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        note, entry = json.loads(place.with_suffix(".json").read_text(encoding="utf-8")), place.stat()
        if note["written"] == [entry.st_size, entry.st_mtime_ns]:
            return np.load(place, mmap_mode="r", allow_pickle=False), note["sha256"]
    return None


def store_array(sample_list: SampleList, kind: Kind, data: DataConfig, place: Path | None = None) -> str | None:
    """Write the file of a list's array, one process at a time, unless it is there; return why that was impossible, if it was.

    It replaces what was made of the list before. Errors as `stored_array`.
    """
    place = place or _place(sample_list, kind, data)
    if _open(place) is not None:
        return None
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(exist_ok=True)
        with hold_lock(place.parent / ".lock"):
            if _open(place) is None:  # not made by another process meanwhile
                _write(place, temporary, sample_list, kind, data)
                for old in place.parent.glob(f"{place.name.rpartition('-')[0]}-*"):
                    if old.stem != place.stem:
                        old.unlink(missing_ok=True)
                for abandoned in place.parent.glob(".*.tmp"):
                    abandoned.unlink(missing_ok=True)
    except OSError as error:
        return str(error)
    return None


def _write(place: Path, temporary: Path, sample_list: SampleList, kind: Kind, data: DataConfig) -> None:
    mapped = []

    def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        mapped.append(np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape))
        if hasattr(os, "posix_fallocate"):  # a full disk would otherwise kill the process when a page is written
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return mapped[0]

    try:
        kind.load(sample_list, data, allocate)
        mapped[0].flush()
        digest = hashlib.sha256(mapped.pop()).hexdigest()
        os.replace(temporary, place)
        entry = place.stat()
        atomic_write_json(place.with_suffix(".json"), {"sha256": digest, "written": [entry.st_size, entry.st_mtime_ns]})
    finally:
        temporary.unlink(missing_ok=True)
