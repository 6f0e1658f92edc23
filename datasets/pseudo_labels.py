"""Sole writer and reader of pseudo-label files, the only thing that passes from step 1 to step 2."""

import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from datasets.lists import SampleList, default_list_path, text_rows
from utils.errors import UserError
from utils.files import atomic_write, atomic_write_json, atomic_write_text, read_json

COMMAND = "python train_step1.py"


def pseudo_label_path(folder: str | Path, dataset: str, modality: str) -> Path:
    """Return `<folder>/<dataset>_<list name>_train_list_pseudo_labelling.txt`."""
    path = default_list_path(folder, dataset, modality, "train")
    return path.with_name(f"{path.stem}_pseudo_labelling.txt")


def write_pseudo_labels(
    path: str | Path, sample_list: SampleList, pseudo_labels: np.ndarray, *, dataset: str, num_clusters: int, provenance: dict
) -> None:
    """Write rows `name pseudo_label` in list order, and `<path>.meta.json`; both atomically, so an older file stays intact on failure.

    Args:
        pseudo_labels: (N,) integers in 0..num_clusters-1, in the order of the training list.
        provenance: plain values on the run (id, epoch, configuration hash ...), kept in the meta file.
    Raises:
        UserError: on another shape or type, or a value outside 0..K-1.
    """
    path, labels = Path(path), np.asarray(pseudo_labels)
    if labels.shape != (len(sample_list),) or labels.dtype.kind not in "iu":
        expected = f"{len(sample_list)} integer pseudo-labels for {sample_list.path}"
        raise UserError(f"{path}: expected {expected}, found shape {labels.shape} and dtype {labels.dtype}")
    bad = np.flatnonzero((labels < 0) | (labels >= num_clusters))
    if len(bad):
        raise UserError(f"{path}: pseudo-label {labels[bad[0]]} of sample {bad[0]} is outside 0..{num_clusters - 1}")
    text = "".join(f"{name} {label}\n" for name, label in zip(sample_list.names, labels.tolist(), strict=True))
    meta = {
        "dataset": dataset, "modality": sample_list.modality, "num_clusters": num_clusters, "count": len(labels),
        "histogram": np.bincount(labels, minlength=num_clusters).tolist(), "sha256": _sha256(text.encode()),
        "names_sha256": _sha256("\n".join(sample_list.names).encode()), "provenance": provenance,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text)
    atomic_write_json(_meta_path(path), meta)


def read_pseudo_labels(
    path: str | Path, sample_list: SampleList, *, dataset: str, num_clusters: int | None = None
) -> tuple[np.ndarray, int]:
    """Read a pseudo-label file in the order of a training list.

    Rows are `path pseudo_label` or, as in the authors' files, `path pseudo_label true_label`; the third column is dropped.
    Rows may come in any order. The meta file, if there is one, is checked.

    Args:
        num_clusters: K, needed for files without a meta file.
    Returns:
        (N,) int64 pseudo-labels in list order, and K.
    Raises:
        UserError: if the file is missing, belongs to another data set or modality, was altered, has bad rows or values outside
            0..K-1, or K is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"pseudo-label file {path} not found; make it with: {COMMAND}, with the step1.yaml of the same data set and folder")
    content = path.read_bytes()
    num_clusters = _resolve_clusters(path, content, sample_list.modality, dataset, num_clusters)
    labels = _match_rows(path, content, sample_list, dataset, num_clusters)
    _warn_if_degenerate(labels, num_clusters, path)
    return labels, num_clusters


def posteriors_path(folder: str | Path, dataset: str) -> Path:
    """Return `<folder>/<dataset>_train_posteriors.npz`."""
    return Path(folder) / f"{dataset}_train_posteriors.npz"


def write_posteriors(path: Path, posteriors: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray], run_id: str) -> None:
    """Write what the pseudo-labels were decided on, in list order, and the run; atomically.

    Args:
        posteriors: modality -> (N, K) float32; own: modality -> (N,) integers, the ids it would give by itself.
    """
    ids = {f"own_{name}": values for name, values in own.items()}
    atomic_write(path, lambda stream: np.savez_compressed(stream, run_id=np.array(run_id), **posteriors, **ids))


def read_own_ids(path: Path, modality: str) -> np.ndarray | None:
    """Return the ids (N,) that a modality would give by itself, or None without a sound file that holds them."""
    with suppress(OSError, ValueError, zipfile.BadZipFile), np.load(path, allow_pickle=False) as archive:
        return archive.get(f"own_{modality}")


def read_posteriors(path: Path, modalities: Iterable[str], run_id: str | None, count: int, num_clusters: int) -> dict[str, np.ndarray]:
    """Read what `write_posteriors` wrote for the given modalities.

    Raises:
        UserError: if the file is missing, damaged, of another run than the pseudo-labels, or not (count, num_clusters).
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            writer, found = str(archive["run_id"]), {name: archive[name] for name in modalities}
    except FileNotFoundError:
        raise UserError(f"{path} not found: rdl.confidence needs the posteriors that a run writes beside its pseudo-labels") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not the posteriors of {', '.join(modalities)} ({error}); make the pseudo-labels again") from error
    if writer != run_id:
        raise UserError(f"{path} is of run {writer}, the pseudo-labels beside it of {run_id}; make them again")
    for name, rows in found.items():
        if rows.shape != (count, num_clusters):
            raise UserError(f"{path}: expected posteriors ({count}, {num_clusters}) of {name}, found {rows.shape}")
    return found


def read_origin(path: str | Path) -> dict:
    """Return what a file's meta file says of the run that wrote it ("run_id", "pairing" ...); nothing if there is none."""
    meta = _meta_path(Path(path))
    origin = read_json(meta).get("provenance", {}) if meta.is_file() else {}
    if not isinstance(origin, dict):
        raise UserError(f"{meta} is damaged: expected an object as provenance, found {origin!r:.80}")
    return origin


def file_hash(path: Path | str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _resolve_clusters(path: Path, content: bytes, modality: str, dataset: str, num_clusters: int | None) -> int:
    """Check the file and what is asked for against the meta file, if there is one, and return K."""
    meta_path = _meta_path(path)
    if not meta_path.is_file():
        if num_clusters is None:
            unknown = f"{path} has no {meta_path.name}, so the number of clusters is unknown"
            raise UserError(f"{unknown}: give num_clusters (rdl.num_clusters)")
        return num_clusters
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        recorded = {key: meta[key] for key in ("dataset", "modality", "num_clusters", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{meta_path}: expected the JSON that {COMMAND} writes, found a broken file ({error!r})") from error
    if recorded["sha256"] != _sha256(content):
        differs = f"{path} is not the file described by {meta_path} (sha256 differs)"
        raise UserError(f"{differs}: it was edited, or writing was cut off; run {COMMAND} again")
    for key, wanted in (("dataset", dataset), ("modality", modality)):
        if recorded[key] != wanted:
            raise UserError(f"{path} belongs to another dataset or modality: expected {key} {wanted!r}, found {recorded[key]!r}")
    if num_clusters not in (None, recorded["num_clusters"]):
        raise UserError(f"{path}: expected {num_clusters} clusters, but it was written with {recorded['num_clusters']}")
    return recorded["num_clusters"]


def _match_rows(path: Path, content: bytes, sample_list: SampleList, dataset: str, num_clusters: int) -> np.ndarray:
    position: dict[str, list[int]] = {}
    for index, name in enumerate(sample_list.names):
        for spelling in _spellings(name):
            position.setdefault(spelling, []).append(index)
    labels = np.full(len(sample_list), -1, dtype=np.int64)
    rows = text_rows(content, path, "path pseudo_label")
    for row, line in enumerate(rows, start=1):
        where = f"{path}, row {row}"
        name, value = _split_row(line, position, where)
        if not 0 <= value < num_clusters:
            raise UserError(f"{where}: pseudo-label {value} is outside 0..{num_clusters - 1}")
        if name not in position:
            raise UserError(
                f"{where}: {name!r} is not in {sample_list.path}; the file belongs to another dataset than "
                f"{dataset!r} (first path expected: {sample_list.names[0]!r})"
            )
        index = next((place for place in position[name] if labels[place] < 0), None)
        if index is None:
            raise UserError(f"{where}: {name!r} stands in the file twice, or once more than in {sample_list.path}")
        labels[index] = value
    if (labels < 0).any():
        raise UserError(
            f"{path} belongs to another dataset or is cut short: it has {len(rows)} rows for the {len(sample_list)} of "
            f"{sample_list.path}; the first one missing is {sample_list.names[int(np.argmin(labels))]!r}"
        )
    return labels


def _split_row(text: str, known: dict[str, list[int]], where: str) -> tuple[str, int]:
    """Return path and pseudo-label of a row with two columns, or three whose last is dropped; paths may hold spaces."""
    two, three, normal = text.rsplit(maxsplit=1), text.rsplit(maxsplit=2), os.path.normpath  # ./a and a are one path
    if len(two) < 2:
        raise UserError(f"{where}: expected `path pseudo_label`, found {text!r}")
    is_three = len(three) == 3 and normal(two[0]) not in known and (
        normal(three[0]) in known or re.fullmatch(r"[+-]?[0-9]+", three[1])
    )
    name, value = three[:2] if is_three else two
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):  # fits int64
        raise UserError(f"{where}: expected an integer pseudo-label, found {value!r}")
    return normal(name), int(value)


def _spellings(name: str) -> list[str]:
    """Return a path and, if it is absolute, its endings: the authors' files name `./dataset/...`, lists joined from theirs do not."""
    parts = Path(os.path.normpath(name)).parts
    starts = len(parts) - 1 if os.path.isabs(name) else 1  # never the bare file name
    return [os.path.join(*parts[start:]) for start in range(max(1, starts))]


def _warn_if_degenerate(labels: np.ndarray, num_clusters: int, path: Path) -> None:
    counts = np.bincount(labels, minlength=num_clusters)
    if (counts == 0).any():
        warnings.warn(f"{path}: {(counts == 0).sum()} of {num_clusters} clusters are empty", stacklevel=3)
    if counts.max() * 2 > len(labels):
        warnings.warn(f"{path}: cluster {counts.argmax()} holds {counts.max()} of {len(labels)} samples", stacklevel=3)


def _meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
