"""The one writer of prepared data sets: files, list files and a manifest, object by object and in parallel.

A data set is built in `root/.preparing` and moved into `root` when it is complete, so what was there before stays readable until
then, and a run that was cut off goes on where it stopped. `objects.jsonl` is the journal: the settings, then one line per object
with the hashes of its files. Files that no journal names are never touched.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from datasets.prepare.ownership import JOURNAL, MANIFEST, SPLITS, STAGING, check_root, is_same, list_paths, read_journal
from datasets.prepare.parallel import DIED, run_tasks
from datasets.prepare.tasks import Make, ObjectTask, Records, as_recorded, lost, object_file, produce, take_for_empty_split
from utils.errors import UserError
from utils.files import atomic_write_json, atomic_write_text, read_json

REPORTED = 20  # objects left out, on the screen
SKIPPED = "skipped.csv"


def write_dataset(
    root: str | Path, settings: dict, tasks: Sequence[ObjectTask], make: Make, *, workers: int = 1, overwrite: bool = False,
    dependents: Sequence[Path] = (),
) -> tuple[bool, dict]:
    """Make, finish or repair a data set, and print what was done.

    Args:
        root: data folder, made if need be.
        settings: everything that decides the content (JSON values), with "dataset" and "modalities". "packages", versions by
            name, are recorded only: a data set made with other versions is left as it is, unless `overwrite`.
        make: task -> modality -> array (images (views, S, S[, 3]) uint8, others as stored), and facts for the journal;
            picklable; a MeshError, or the death of its process, leaves the object out of every modality.
        workers: processes; 1 works in this one.
        overwrite: replace data made with other settings once the new ones are complete.
        dependents: files the caller makes from the finished objects; removed when these change.
    Returns:
        Whether anything was done, and the manifest.
    Raises:
        UserError: on repeated numbers, a folder of other data or other settings, a split without any usable object, or when
            a file cannot be written or does not read back as written.
    """
    root, settings = Path(root), json.loads(json.dumps(settings))
    if not tasks or len({(task.split, task.number) for task in tasks}) != len(tasks) or workers < 1:
        raise UserError(f"expected objects with distinct numbers and at least one worker, found {len(tasks)} and {workers}")
    try:
        made, manifest = _write(root, settings, tasks, make, workers, overwrite, dependents)
    except OSError as error:
        raise UserError(f"{root} could not be made: {error}; what is finished is kept, run the same command again") from error
    _report(root, made, manifest)
    return made, manifest


def _report(root: Path, made: bool, manifest: dict) -> None:
    print(f"{root}: {'written' if made else 'already prepared, nothing to do'}; objects {manifest['counts']}")
    for entry in manifest["left_out"][:REPORTED]:
        print(f"left out of every modality: {entry['split']} {entry['name']}: {entry['left_out']}")
    if len(manifest["left_out"]) > REPORTED:
        print(f"... {len(manifest['left_out'])} in all (`left_out` in the manifest)")
    if manifest["flagged"]:
        print(f"{len(manifest['flagged'])} simplified meshes lost much of their area or silhouette (`flagged` in the manifest)")


def write_skipped(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a CSV file of what was left out: name -> reason; one that says so already is left alone, as the folder may be read-only."""
    stream = io.StringIO()
    csv.writer(stream).writerows([("object", "reason"), *reasons.items()])
    if not path.is_file() or path.read_bytes() != stream.getvalue().encode():
        atomic_write_text(path, stream.getvalue())


def _write(
    root: Path, settings: dict, tasks: Sequence[ObjectTask], make: Make, workers: int, overwrite: bool, dependents: Sequence[Path]
) -> tuple[bool, dict]:
    staging = root / STAGING
    if (staging / MANIFEST).is_file():  # killed while moving
        _publish(root, dependents)
    check_root(root, settings, overwrite)
    (found, old), (started, new) = read_journal(root), read_journal(staging)
    if not is_same(found, settings) or (overwrite and found.get("packages") != settings.get("packages")):
        found, old = {}, {}
    if not is_same(started, settings):
        new = {}
    tasks = as_recorded(tasks, {**old, **new})
    names = {(task.split, task.number): task.name for task in tasks}
    records = {key: record for key, record in {**old, **new}.items() if names.get(key) == record["name"]}
    records = {key: record for key, record in records.items() if record.get("left_out") != DIED and _is_intact(root, record)}
    todo = [task for task in tasks if (task.split, task.number) not in records]
    if not todo and found and all(path.is_file() for path in (root / MANIFEST, *_lists(root, settings).values())):
        return False, read_json(root / MANIFEST)
    check_root(staging, settings, overwrite)
    if started and not new:
        _discard(staging)
    if "packages" in settings:
        settings["packages"] = _merge(*(header.get("packages", {}) for header in (found, started if new else {}, settings)))
    _write_journal(staging, settings, records)
    fresh = []
    with open(staging / JOURNAL, "a", encoding="utf-8") as journal:
        while todo := todo or take_for_empty_split(tasks, records):
            for record in run_tasks(partial(produce, make, str(staging)), todo, workers, lost):
                records[record["split"], record["number"]] = record
                fresh.append(record)
                journal.write(json.dumps(record) + "\n")
                journal.flush()
            todo = []
    _finish(root, settings, records, fresh)
    return True, _publish(root, dependents)


def _merge(*versions: Mapping[str, str]) -> dict[str, str]:
    """Join package -> version; one that changed between two runs keeps all its versions."""
    found = {name: {part for v in versions for part in v.get(name, "").split(", ") if part} for v in versions for name in v}
    return {name: ", ".join(sorted(parts)) for name, parts in sorted(found.items())}


def _is_intact(root: Path, record: dict) -> bool:
    """Whether every file of a record is, as recorded, among the half-built or the finished ones."""
    def found(name: str) -> set[str]:
        places = (root / STAGING / name, root / name)
        return {hashlib.sha256(path.read_bytes()).hexdigest() for path in places if path.is_file()}

    return all(digest in found(name) for name, digest in record.get("files", {}).items())


def _finish(root: Path, settings: dict, records: Records, fresh: list[dict]) -> None:
    """Check what was written, then complete the journal and write the manifest, which marks the half-built folder as whole."""
    damaged = next((record["name"] for record in fresh if not _is_intact(root, record)), None)
    if damaged is not None:
        raise OSError(f"the files of {damaged} do not read back as written; check the disk")
    records = dict(sorted(records.items(), key=lambda item: (item[0][1], item[0][0])))
    kept = [record for record in records.values() if "files" in record]
    left_out = [{key: r[key] for key in ("name", "split", "left_out")} for r in records.values() if "files" not in r]
    _write_journal(root / STAGING, settings, records)
    for split in SPLITS:
        if not any(record["split"] == split for record in kept):
            write_skipped(root / SKIPPED, {entry["name"]: entry["left_out"] for entry in left_out})
            raise UserError(
                f"no usable object in the {split} split: {len(left_out)} of {len(records)} are left out, with their reasons in "
                f"{root / SKIPPED}; mend them or add others, and run the command again with --overwrite"
            )
    atomic_write_json(root / STAGING / MANIFEST, {
        **settings,
        "counts": {split: sum(record["split"] == split for record in kept) for split in SPLITS},
        "left_out": left_out,
        "flagged": [record["name"] for record in kept if record.get("flagged")],
        "content_sha256": {split: _content_hashes(settings, kept, split) for split in SPLITS},
    })


def _content_hashes(settings: dict, kept: list[dict], split: str) -> dict[str, str]:
    """Return modality -> sha256 of the lines `path sha256` of its files, in the order of the numbers."""
    hashes = {modality: hashlib.sha256() for modality in settings["modalities"]}
    for name, digest in [item for record in kept if record["split"] == split for item in record["files"].items()]:
        hashes[Path(name).name.split("_")[0]].update(f"{name} {digest}\n".encode())
    return {modality: value.hexdigest() for modality, value in hashes.items()}


def _publish(root: Path, dependents: Sequence[Path]) -> dict:
    """Move a complete half-built data set into place and return its manifest; may be cut off and repeated at any point."""
    staging = root / STAGING
    manifest = read_json(staging / MANIFEST)
    (settings, records), (found, old) = read_journal(staging), read_journal(root)
    files, replaced = ({name for record in part.values() for name in record.get("files", {})} for part in (records, old))
    outdated = list(_lists(root, found).values()) if found else []
    for path in (root / MANIFEST, *outdated, *(dependents if records != old else ())):
        path.unlink(missing_ok=True)
    for name in replaced - files:
        (root / name).unlink(missing_ok=True)
    for name in files:
        if (staging / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, root / name)
    for (modality, split), path in _lists(root, settings).items():
        kept = [record for record in records.values() if record["split"] == split and "files" in record]
        rows = [(object_file(modality, split, record["number"]), record["label"]) for record in kept]
        atomic_write_text(path, "".join(f"{name}\n" if label is None else f"{name} {label}\n" for name, label in rows))
    _write_journal(root, settings, records)
    atomic_write_json(root / MANIFEST, manifest)
    _discard(staging)
    return manifest


def _discard(staging: Path) -> None:
    """Remove a half-built data set: first what says it is whole, last what says it is ours."""
    (staging / MANIFEST).unlink(missing_ok=True)
    for path in (path for path in staging.glob("*") if path.name != JOURNAL):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(staging, ignore_errors=True)


def _lists(root: Path, settings: dict) -> dict[tuple[str, str], Path]:
    return list_paths(root, settings["dataset"], settings["modalities"])


def _write_journal(folder: Path, settings: dict, records: Records) -> None:
    lines = [{"settings": settings}, *records.values()]
    atomic_write_text(folder / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
