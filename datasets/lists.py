"""List files (`path label`, one sample a row): parsing, validation, pairing. The only reader of labels in the code base.

In messages, row k is the k-th non-empty row of a file, counted from 1.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import MissingFileError, MissingLabelsError, UserError
from utils.modalities import MODALITIES

_FEATURES = "python -m baselines.features --config configs/{}/step1.yaml"
PREPARATION = {
    "digits_features": _FEATURES.format("digits_small"),
    "mnist3d_features": _FEATURES.format("mnist3d_small"),
    "modelnet10_splat_features": _FEATURES.format("modelnet10_splat"),
    "modelnet40_splat_features": _FEATURES.format("modelnet40_splat"),
    "digits": "python -m datasets.prepare_digits",
    "mnist3d": "python -m datasets.prepare_mnist3d",
    "modelnet10_splat": "python -m datasets.prepare_modelnet --npz modelnet10_points.npz",
    "modelnet40_splat": "python -m datasets.prepare_modelnet --npz modelnet40_points.npz",
    "modelnet10": "python -m datasets.prepare_modelnet --archive ModelNet10.zip",
    "modelnet40": "python -m datasets.prepare_modelnet --archive ModelNet40.zip",
    "photos_modelnet40": "python -m datasets.prepare_photos --photos DIR --npz modelnet40_points.npz",
    "mi3dor_class": "python -m datasets.prepare_mi3dor --root DIR --pairing class",
    "mi3dor": "python -m datasets.prepare_mi3dor --root DIR",
}
INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True)
class SampleList:
    """The samples of one list file, without labels.

    Attributes:
        path: the list file; modality: key of `MODALITIES`.
        names: paths as written in the list; files: where they were found, as text: a million path objects take half a minute.
        instance_ids: the object each sample shows; equal ids in two lists are the same object.
    """

    path: Path
    modality: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    instance_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """Return list, row and file of a sample, for messages."""
        return f"{self.path}, row {index + 1}: {self.files[index]}"


def default_list_path(root: str | Path, dataset: str, modality: str, split: str) -> Path:
    """Return `{root}/{dataset}_{list name of the modality}_{split}_list.txt`; a UserError names an unknown modality."""
    _check_modality(modality)
    return Path(root) / f"{dataset}_{MODALITIES[modality].list_name}_{split}_list.txt"


def read_training_list(
    path: str | Path, *, modality: str, root: str | Path, instance_id: str = r"(\d+)$", num_classes: int | None = None,
    unique: Sequence[str] = ("path", "instance id"),
) -> SampleList:
    """Return the samples of a list, in its order, for training. A label column may be there; it is checked and dropped.

    Args:
        modality: key of `MODALITIES`.
        root: folder the rows are relative to; a row not found there is tried from the current directory.
        instance_id: regular expression searched in the file stem; group 1 is the id of the object.
        num_classes: if given, labels must be below it.
        unique: what may occur once only; less for lists whose rows are not paired by object.
    Raises:
        UserError: on a missing or empty list, a missing file, a bad row or label, a repeated path or id, or one that is not found.
    """
    return _read(Path(path), modality, Path(root), instance_id, num_classes, unique)[0]


def read_labelled_list(
    path: str | Path, *, modality: str, root: str | Path, instance_id: str = r"(\d+)$", num_classes: int | None = None,
    unique: Sequence[str] = ("path", "instance id"),
) -> tuple[SampleList, np.ndarray]:
    """Return what `read_training_list` does and the (N,) int64 labels; for evaluation, preparation and what in `baselines` reads labels.

    Raises:
        MissingLabelsError: without labels, and UserErrors as `read_training_list`.
    """
    samples, labels = _read(Path(path), modality, Path(root), instance_id, num_classes, unique)
    if labels is None:
        found = f"found {samples.names[0]!r} without a label"
        raise MissingLabelsError(f"{path}, row 1: expected `path label`, {found}; evaluation needs labels")
    return samples, labels


def check_paired(lists: Sequence[SampleList], by_object: bool = True) -> None:
    """Raise a UserError where two lists differ in length or, by object, row k does not show the same one: both files, row and ids."""
    advice = "with data.pairing: class, row k of every list must show the same class"
    if by_object:
        advice = "write both lists in the same order of ids (for the authors' lists: python -m datasets.prepare_mnist3d --authors DIR)"
    first, *others = lists
    for other in others:
        if len(other) != len(first):
            raise UserError(f"{first.path} has {len(first)} rows, {other.path} has {len(other)}; {advice}")
    for other in others if by_object else ():
        for row, (left, right) in enumerate(zip(first.instance_ids, other.instance_ids, strict=True), start=1):
            if left != right:
                raise UserError(f"row {row} is not the same object: id {left} in {first.path}, id {right} in {other.path}; {advice}")


def check_disjoint(train: SampleList, test: SampleList) -> None:
    """Raise a UserError if a file is in both lists: the first such file and its rows."""
    rows = {_identity(file): row for row, file in enumerate(train.files, start=1)}
    for row, file in enumerate(test.files, start=1):
        if _identity(file) in rows:
            raise UserError(
                f"{file} is in the training list {train.path}, row {rows[_identity(file)]}, and in the test list {test.path}, "
                f"row {row}; remove it from one of them"
            )


def _identity(file: str) -> tuple[int, int] | str:
    """Return what the links to a file share, much faster than resolving its path; the path of a file that is not there."""
    try:
        entry = os.stat(file)
    except OSError:
        return file
    return entry.st_dev, entry.st_ino


def text_rows(content: bytes, path: Path, columns: str) -> list[str]:
    """Return the non-empty rows of a text file without the blanks around them.

    A UserError names `path` and the first row that is not UTF-8, and says that a row holds `columns`.
    """
    rows = [row for line in re.split(rb"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf")) if (row := line.strip())]
    for number, row in enumerate(rows, start=1):
        try:
            rows[number - 1] = row.decode().strip()
        except UnicodeDecodeError as error:
            found = f"found other bytes ({error.reason})"
            raise UserError(f"{path}, row {number}: expected UTF-8 text with rows `{columns}`, {found}") from error
    return rows


def _check_modality(modality: str) -> None:
    if modality not in MODALITIES:
        raise UserError(f"unknown modality {modality!r}; expected one of {', '.join(MODALITIES)}")


def _read(
    path: Path, modality: str, root: Path, instance_id: str, num_classes: int | None, unique: Sequence[str]
) -> tuple[SampleList, np.ndarray | None]:
    _check_modality(modality)
    pattern, folder, prefix = _compile(instance_id), str(root), f"{path}, row "
    parsed: list[tuple] = []
    for row, text in enumerate(_rows(path), start=1):
        where = prefix + str(row)
        name, label, file = _parse_row(text, folder, where)
        if label is not None and not 0 <= label < (num_classes or 2**63):
            raise UserError(f"{where}: label {label} is outside 0..{num_classes - 1 if num_classes else '2^63'}; see data.num_classes")
        if parsed and (label is None) != (parsed[0][1] is None):
            raise UserError(f"{where}: either all rows carry a label or none; row 1 and this row differ ({text!r})")
        stem = os.path.splitext(os.path.basename(file))[0]
        match = pattern.search(stem)
        if not match or not match[1]:
            raise UserError(f"{where}: instance_id {pattern.pattern!r} finds no id in the file stem {stem!r}")
        parsed.append((name, label, file, match[1]))
    names, labels, files, ids = zip(*parsed, strict=True)
    for what, values in (("path", files), ("instance id", ids)):
        if what in unique:
            _check_unique(values, what, path)
    return SampleList(path, modality, names, files, ids), None if labels[0] is None else np.array(labels, dtype=np.int64)


def _rows(path: Path) -> list[str]:
    if not path.is_file():
        command = next((call for name, call in PREPARATION.items() if path.name.startswith(f"{name}_")), None)
        advice = f"make it with: {command}" if command else "see docs/data.md for the format of list files"
        raise MissingFileError(f"list file {path} not found; {advice}")
    rows = text_rows(path.read_bytes(), path, "path label")
    if not rows:
        raise UserError(f"{path}: expected rows `path label`, found an empty file")
    return rows


def _parse_row(text: str, root: str, where: str) -> tuple[str, int | None, str]:
    """Split one row from the right, so that paths may hold spaces; the last column is a label if it is an integer."""
    head, *tail = text.rsplit(maxsplit=1)
    if tail and INTEGER.fullmatch(tail[0]) and abs(int(tail[0])) < 2**63:
        return head, int(tail[0]), _find_file(head, root, where)
    if tail and _existing(text, root) is None and _existing(head, root) is not None:
        raise UserError(f"{where}: expected `path label` with an integer label of at most 64 bits, found label {tail[0]!r}")
    return text, None, _find_file(text, root, where)


def _existing(name: str, root: str) -> str | None:
    if "./" in name or "//" in name:  # another spelling of a path that may stand in another row
        name = str(Path(name))
    return next((file for file in (os.path.join(root, name), name) if os.path.isfile(file)), None)  # False, too, for impossible names


def _find_file(name: str, root: str, where: str) -> str:
    file = _existing(name, root)
    if file is not None:
        return file
    shorter = name.rsplit(maxsplit=1)[0]
    if _existing(shorter, root) is not None:
        raise UserError(f"{where}: expected `path label`, found more columns after {shorter!r}")
    raise MissingFileError(f"{where}: file {name!r} does not exist, neither below {root} nor below the current directory")


def _compile(instance_id: str) -> re.Pattern:
    try:
        pattern = re.compile(instance_id)
    except re.error as error:
        raise UserError(f"instance_id {instance_id!r} is not a regular expression: {error}") from error
    if pattern.groups < 1:
        raise UserError(f"instance_id {instance_id!r} needs a group in parentheses around the id")
    return pattern


def _check_unique(values: Sequence, what: str, path: Path) -> None:
    seen: dict = {}
    for row, value in enumerate(values, start=1):
        if seen.setdefault(value, row) != row:
            raise UserError(f"{path}, row {row}: {what} {str(value)!r} is already in row {seen[value]}; expected each once")
