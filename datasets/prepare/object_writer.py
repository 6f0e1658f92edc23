"""Writes a data set of 3D objects, one object at a time and in parallel; a run that was cut off goes on where it stopped.

`objects.jsonl` beside the data is the journal: the settings, then one line per finished object with the hashes of its files.
The lists and then the manifest are written last, so a data set that is not complete is never read.
"""

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.prepare.parallel import run_tasks
from datasets.prepare.shapes.mesh import MeshError
from datasets.prepare.writer import FOLDERS, MANIFEST, SPLITS
from utils.engine.checkpoint import atomic_write_json, atomic_write_text
from utils.errors import UserError
from utils.modalities import MODALITIES

JOURNAL = "objects.jsonl"


@dataclass(frozen=True)
class ObjectTask:
    """One object to prepare: its number in file names, its name in the source, and where its shape comes from.

    Attributes:
        number: unique in the data set; split: "train" or "test"; label: for the list files.
        member: mesh file inside the archive, or None.
        cloud: (n, 3) float32 points, z up, or None.
    """

    number: int
    name: str
    split: str
    label: int
    member: str | None = None
    cloud: np.ndarray | None = None


Make = Callable[[ObjectTask], tuple[dict[str, np.ndarray], dict]]


def object_file(modality: str, split: str, number: int, view: int = 0) -> str:
    """Return the path of one file relative to the data root; it carries no class. Views after the first have own folders."""
    folder = f"{split}/{FOLDERS[modality]}" + (f"/view_{view:02d}" if view else "")
    return f"{folder}/{modality}_{split}_{number:06d}.{'png' if modality in ('RGBImg', 'GrayImg') else 'npy'}"


def write_objects(
    root: str | Path, settings: dict, tasks: Sequence[ObjectTask], make: Make, workers: int, dependents: Sequence[Path] = ()
) -> tuple[bool, dict]:
    """Make, or finish, a data set.

    Args:
        root: data folder, made if need be.
        settings: everything that decides the content (JSON values), with "dataset" and "modalities"; another value of any of
            them starts over.
        tasks: all objects.
        make: task -> modality -> array (images (views, S, S[, 3]) uint8, others as stored), and facts for the journal;
            picklable; a MeshError leaves the object out of every modality.
        workers: processes; 1 works in this one.
        dependents: files the caller makes from the finished objects; removed before any object changes.
    Returns:
        Whether anything was done, and the manifest.
    Raises:
        UserError: on repeated numbers, a foreign folder, or a split without any usable object.
        RuntimeError: when a worker process dies, naming the objects in its hands.
        OSError: when a file does not read back as written.
    """
    root = Path(root)
    if not tasks or len({task.number for task in tasks}) != len(tasks) or workers < 1:
        raise UserError(f"expected objects with distinct numbers and at least one worker, found {len(tasks)} and {workers}")
    _check_root(root)
    records = _intact_records(root, settings)
    todo = [task for task in tasks if task.number not in records]
    lists = _list_paths(root, settings)
    if not todo and (root / MANIFEST).is_file() and all(path.is_file() for path in lists.values()):
        return False, json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    for path in (root / MANIFEST, *lists.values(), *dependents):
        path.unlink(missing_ok=True)
    if not records:
        for split in SPLITS:
            shutil.rmtree(root / split, ignore_errors=True)
    _write_journal(root, settings, records)
    with open(root / JOURNAL, "a", encoding="utf-8") as journal:
        for record in run_tasks(partial(_produce, make, str(root)), todo, workers):
            records[record["number"]] = record
            journal.write(json.dumps(record) + "\n")
            journal.flush()
    return True, _finish(root, settings, records, {task.number for task in todo})


def report(root: str | Path, made: bool, manifest: dict) -> None:
    """Print what `write_objects` did."""
    print(f"{root}: {'written' if made else 'already prepared, nothing to do'}; objects {manifest['counts']}")
    for entry in manifest["left_out"]:
        print(f"left out of every modality: {entry['split']} {entry['name']}: {entry['left_out']}")
    if manifest["flagged"]:
        print(f"{len(manifest['flagged'])} simplified meshes lost much of their area or silhouette (`flagged` in the manifest)")


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Return package -> version of what meshes are made with.

    Raises:
        UserError: naming requirements-data.txt, when one is not installed.
    """
    try:
        return {name: version(name) for name in names}
    except PackageNotFoundError as error:
        raise UserError(f"meshes need the package {error.name}: pip install -r requirements-data.txt") from error


def _produce(make: Make, root: str, task: ObjectTask) -> dict:
    """Make the files of one object and return its journal entry."""
    record = {"number": task.number, "name": task.name, "split": task.split, "label": task.label}
    try:
        arrays, facts = make(task)
    except MeshError as error:
        return {**record, "left_out": str(error)}
    files = {}
    for modality, array in arrays.items():
        views = array if modality in ("RGBImg", "GrayImg") else array[None]
        for view, content in enumerate(views):
            name = object_file(modality, task.split, task.number, view)
            data = _encode(content, name)
            (Path(root) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / name).write_bytes(data)
            files[name] = hashlib.sha256(data).hexdigest()
    return {**record, **facts, "files": files}


def _encode(array: np.ndarray, name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG") if name.endswith(".png") else np.save(stream, array)
    return stream.getvalue()


def _finish(root: Path, settings: dict, records: dict[int, dict], fresh: set[int]) -> dict:
    """Check what is there, write journal, lists and manifest; return the manifest."""
    records = {number: records[number] for number in sorted(records)}
    damaged = next((records[number]["name"] for number in fresh if not _is_intact(root, records[number])), None)
    if damaged is not None:
        raise OSError(f"the files of {damaged} below {root} do not read back as written; check the disk and run the command again")
    kept = [record for record in records.values() if "files" in record]
    _check_files(root, settings, kept)
    _write_journal(root, settings, records)
    for (modality, split), path in _list_paths(root, settings).items():
        rows = [f"{object_file(modality, split, r['number'])} {r['label']}\n" for r in kept if r["split"] == split]
        atomic_write_text(path, "".join(rows))
    manifest = {
        **settings,
        "counts": {split: sum(record["split"] == split for record in kept) for split in SPLITS},
        "left_out": [{key: r[key] for key in ("name", "split", "left_out")} for r in records.values() if "files" not in r],
        "flagged": [record["name"] for record in kept if record.get("flagged")],
        "content_sha256": {split: _content_hashes(settings, kept, split) for split in SPLITS},
    }
    atomic_write_json(root / MANIFEST, manifest)
    return manifest


def _check_files(root: Path, settings: dict, kept: list[dict]) -> None:
    """Remove what a killed run left without a record; then the folders must hold exactly the recorded files."""
    expected = {name for record in kept for name in record["files"]}
    for split in SPLITS:
        if not any(record["split"] == split for record in kept):
            raise UserError(f"no usable object in the {split} split; see {root / JOURNAL} for the reasons")
        for path in [path for path in (root / split).rglob("*") if path.is_file()]:
            if path.relative_to(root).as_posix() not in expected:
                path.unlink()
    per_kind = Counter((name.split("/")[0], name.split("/")[1]) for name in expected)
    for split, folder in [(split, FOLDERS[modality]) for split in SPLITS for modality in settings["modalities"]]:
        found = sum(path.is_file() for path in (root / split / folder).rglob("*"))
        if found != per_kind[split, folder]:
            raise OSError(f"{root / split / folder}: expected {per_kind[split, folder]} files, found {found}; run the command again")


def _content_hashes(settings: dict, kept: list[dict], split: str) -> dict[str, str]:
    """Return modality -> sha256 of the lines `path sha256` of its files, in the order of the numbers."""
    hashes = {modality: hashlib.sha256() for modality in settings["modalities"]}
    folders = {f"{split}/{FOLDERS[modality]}/": modality for modality in hashes}
    for name, digest in [item for record in kept if record["split"] == split for item in record["files"].items()]:
        modality = next(modality for folder, modality in folders.items() if name.startswith(folder))
        hashes[modality].update(f"{name} {digest}\n".encode())
    return {modality: value.hexdigest() for modality, value in hashes.items()}


def _list_paths(root: Path, settings: dict) -> dict[tuple[str, str], Path]:
    tokens = {name: MODALITIES[name].list_name if name in MODALITIES else name for name in settings["modalities"]}
    return {(name, split): root / f"{settings['dataset']}_{token}_{split}_list.txt" for name, token in tokens.items() for split in SPLITS}


def _write_journal(root: Path, settings: dict, records: dict[int, dict]) -> None:
    lines = [{"settings": settings}, *records.values()]
    atomic_write_text(root / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))


def _intact_records(root: Path, settings: dict) -> dict[int, dict]:
    """Return the journal's entries whose files are as recorded; none if it was written with other settings."""
    if not (root / JOURNAL).is_file():
        return {}
    entries = []
    for line in (root / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # the line a killed run was writing
    if not entries or entries[0].get("settings") != json.loads(json.dumps(settings)):
        return {}
    return {entry["number"]: entry for entry in entries[1:] if _is_intact(root, entry)}


def _is_intact(root: Path, record: dict) -> bool:
    files = record.get("files", {})
    return all((root / name).is_file() and hashlib.sha256((root / name).read_bytes()).hexdigest() == digest for name, digest in files.items())


def _check_root(root: Path) -> None:
    ours = (root / MANIFEST).exists() or (root / JOURNAL).exists()
    foreign = next((root / name for name in SPLITS if (root / name).exists() and not ours), None)
    if foreign is not None:
        raise UserError(
            f"{foreign} exists, but {root} has no {MANIFEST}: it was not made by a preparation command and would be replaced; "
            "choose another folder or move it away"
        )
