"""Whose a data folder is: which data set with which settings a preparation made there, its lists, and what it may replace."""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets.lists import default_list_path
from utils.errors import MissingFileError, UserError
from utils.files import atomic_write_text, read_json

SPLITS = ("train", "test")
MANIFEST, JOURNAL, STAGING = "manifest.json", "objects.jsonl", ".preparing"


def required(module: str, what: str) -> ModuleType:
    """Import a module of requirements-data.txt; a UserError says what needs it when that is not possible."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise UserError(f"{what} needs {package} ({error}): pip install -r requirements-data.txt") from error


def mesh_packages(*more: str) -> dict[str, str]:
    """Return package -> version of what meshes are made with; a UserError names requirements-data.txt when one is not installed."""
    try:
        return {name: version(name) for name in ("fast-simplification", "pyvista", "vtk", *more)}
    except PackageNotFoundError as error:
        raise UserError(f"meshes need the package {error.name}: pip install -r requirements-data.txt") from error


def read_journal(folder: Path) -> tuple[dict, dict[tuple[str, int], dict]]:
    """Return the settings in a folder's journal and its entries by (split, number); both are empty without a journal."""
    entries = []
    if (folder / JOURNAL).is_file():
        for line in (folder / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line a killed run was writing
    settings = entries[0].get("settings", {}) if entries and isinstance(entries[0], dict) else {}
    return settings, {(entry["split"], entry["number"]): entry for entry in entries[1:]}


def is_same(found: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether data made with the settings `found` are what `settings` would make; versions of packages do not count."""
    return bool(found) and not _differences(found, settings)


def check_root(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse a folder that is not ours to write to.

    Args:
        folder: of finished or half-built data; it need not exist.
        settings: of the data to be made; "dataset" alone asks whether it is another data set's folder.
        overwrite: whether data of the same data set made with other settings may be replaced.
    Raises:
        UserError: when it is no folder, holds another data set, an unreadable manifest, data that no preparation made, or,
            without `overwrite`, data of other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected the folder of a data set: choose another one")
    found = read_journal(folder)[0] or read_manifest(folder / MANIFEST)
    check_settings(folder, found, settings, overwrite)
    patterns = ("*",) if folder.name == STAGING else (*SPLITS, f"{settings['dataset']}_*_list.txt")
    foreign = [path for pattern in patterns for path in folder.glob(pattern) if path.name != f".{JOURNAL}.tmp"]
    if foreign and not found:
        raise UserError(
            f"{foreign[0]} exists, but {folder} has no {MANIFEST}: no preparation command made it; "
            "choose another folder or move it away"
        )


def check_settings(place: Path, found: Mapping[str, Any], settings: Mapping[str, Any], overwrite: bool) -> None:
    """Raise a UserError where data made with the settings `found`, if any, would be replaced by others: always or unless `overwrite`."""
    if not found:
        return
    dataset, differences = found.get("dataset"), _differences(found, settings)
    if dataset != settings["dataset"]:
        raise UserError(f"{place} is of the data set {dataset!r}, not {settings['dataset']!r}; choose another folder")
    if differences and not overwrite:
        raise UserError(
            f"{place} was made with other settings or input ({'; '.join(differences[:4])}). Repeat the command with those, "
            "choose another folder, or replace the data with --overwrite"
        )


def list_paths(root: Path, dataset: str, modalities: Sequence[str]) -> dict[tuple[str, str], Path]:
    """Return (modality, split) -> list file."""
    return {(name, split): default_list_path(root, dataset, name, split) for name in modalities for split in SPLITS}


def pairs_path(root: Path, dataset: str) -> Path:
    """Return the manifest of lists that a command writes beside the writer's."""
    return root / f"{dataset}_pairs.json"


def publish_lists(root: Path, manifest: Mapping[str, Any], texts: Mapping[tuple[str, str], str], overwrite: bool) -> bool:
    """Write lists beside those of the writer and then their manifest, unless they are there already; return whether they were not.

    Args:
        manifest: of the lists, see `check_settings`, with "dataset"; texts: (modality, split) -> list.
    """
    place = pairs_path(root, manifest["dataset"])
    check_settings(place, read_manifest(place), manifest, overwrite)
    files = {default_list_path(root, manifest["dataset"], *key): text for key, text in texts.items()}
    files[place] = json.dumps(manifest, indent=2) + "\n"
    if all(path.is_file() and path.read_bytes() == text.encode() for path, text in files.items()):
        return False
    for path in files:
        path.unlink(missing_ok=True)
    for path, text in files.items():  # the manifest is the last
        atomic_write_text(path, text)
    return True


def read_manifest(path: Path) -> dict:
    """Return a manifest; empty if there is none. A UserError names one that is no JSON object."""
    try:
        return read_json(path)
    except MissingFileError:
        return {}
    except UserError as error:
        raise UserError(f"{error}; move it away and prepare the data again") from error


def _differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    keys = [key for key in settings if key != "packages" and found.get(key) != settings[key]]
    texts = [f"{key}: {json.dumps(found.get(key))} instead of {json.dumps(settings[key])}" for key in keys]
    return [text if len(text) < 80 else f"{key} differs" for key, text in zip(keys, texts, strict=True)]
