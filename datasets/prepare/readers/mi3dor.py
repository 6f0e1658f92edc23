"""MI3DOR: reads both layouts of its release and checks its photographs. Called by `datasets.prepare.mi3dor`."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from datasets.prepare.ownership import SPLITS
from datasets.prepare.photographs import IMAGE_SUFFIXES, Item, examine_photographs
from datasets.prepare.tasks import files_below
from utils.errors import UserError

NUM_CLASSES, IMAGES_PER_CLASS, VIEWS_PER_MODEL = 21, 500, 12
OFFICIAL_MODELS = {"train": 3842, "test": 3848}
LAYOUTS = {
    "folder": tuple(f"{kind}/{split}" for kind in ("image", "model") for split in SPLITS),
    "track": tuple(f"split/shrec2019_{kind}_{split}.txt" for kind in ("Image", "View") for split in SPLITS),
}


@dataclass(frozen=True)
class Release:
    """What a folder holds; `class_to_index` is None in the track release, which has no class names."""

    layout: str
    images: tuple[Item, ...]
    models: tuple[Item, ...]
    class_to_index: dict[str, int] | None


def read_release(root: str | Path) -> Release:
    """List the photographs and models of the official release, in either of its layouts.

    Args:
        root: holds image/{train,test}/CLASS and model/{train,test}/CLASS (folder release), or data/ and
            split/shrec2019_{Image,View}_{train,test}.txt (track release).
    Raises:
        UserError: when neither or both layouts are there, a listed photograph is missing, no model has an OBJ file, on a broken
            list, or on a photograph or model that occurs twice.
    """
    root = Path(root)
    missing = {layout: [path for path in paths if not (root / path).exists()] for layout, paths in LAYOUTS.items()}
    complete = [layout for layout, paths in missing.items() if not paths]
    if not complete:
        lacking = "; ".join(f"for the {layout} release it lacks {', '.join(paths)}" for layout, paths in missing.items())
        raise UserError(f"{root} is not the folder of an unpacked MI3DOR release: {lacking}")
    if len(complete) == 2:
        raise UserError(f"{root} holds both layouts, image/ and model/ as well as the lists in split/; move one of them away")
    release = _read_folders(root) if complete == ["folder"] else _read_track(root)
    files = [model.file for model in release.models if model.file]
    for names in ([image.name for image in release.images], [model.name for model in release.models], files):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UserError(f"{root}: {repeated[0]} is listed more than once ({len(repeated)} such names); expected each once")
    if {image.split for image in release.images} != set(SPLITS):
        raise UserError(f"{root}: expected photographs ({' '.join(IMAGE_SUFFIXES)}) of both splits; unpack them as well")
    if not files:
        raise UserError(f"{root}: found no OBJ file of any of the {len(release.models)} models; unpack them as well")
    return release


def check_official(release: Release) -> dict[str, str | None]:
    """Compare with the official 10,500 / 10,500 images, 500 per class, and 3,842 / 3,848 models of 21 classes.

    Returns:
        "images" and "models" -> None, or one line on the difference.
    """
    images, models = (Counter((item.split, item.label) for item in items) for items in (release.images, release.models))
    everywhere = {(split, label): IMAGES_PER_CLASS for split in SPLITS for label in range(NUM_CLASSES)}
    all_models = _totals(models) == OFFICIAL_MODELS and {label for _, label in models} == set(range(NUM_CLASSES))
    total, (train, test) = NUM_CLASSES * IMAGES_PER_CLASS, OFFICIAL_MODELS.values()
    expected = {
        "images": (images == everywhere, images, f"{total} / {total} images, {IMAGES_PER_CLASS} of each of {NUM_CLASSES} classes"),
        "models": (all_models, models, f"{train} / {test} models of {NUM_CLASSES} classes"),
    }
    return {
        kind: None if official else
        f"expected {wanted}, found {' / '.join(map(str, _totals(counts).values()))} of "
        f"{len({label for _, label in counts})}, {min(counts.values(), default=0)} to {max(counts.values(), default=0)} of each"
        for kind, (official, counts, wanted) in expected.items()
    }


def check_photographs(root: str | Path, images: Sequence[Item], workers: int) -> dict[str, str]:
    """Read every photograph as `examine_photographs` does; a UserError names those that are no complete 8-bit pictures.

    Returns:
        name -> sha256 of the file.
    """
    hashes, broken = examine_photographs(root, images, workers)
    if broken:
        raise UserError(
            f"{root}: {len(broken)} of {len(images)} photographs cannot be read: "
            f"{', '.join(f'{name} ({reason})' for name, reason in sorted(broken.items())[:4])}; fetch them "
            "again, or take them out of the release and use --any-counts"
        )
    return hashes


def _totals(counts: Counter) -> dict[str, int]:
    return {split: sum(count for (part, _), count in counts.items() if part == split) for split in SPLITS}


def _read_folders(root: Path) -> Release:
    folders = [path for part in LAYOUTS["folder"] for path in (root / part).iterdir() if path.is_dir()]
    classes = sorted({path.name for path in folders if not path.name.startswith(".")})
    labels = {name: label for label, name in enumerate(classes)}
    found = {
        kind: tuple(
            Item(path.relative_to(root).as_posix(), split, label, path.relative_to(root).as_posix())
            for split in SPLITS for name, label in labels.items() for path in files_below(root / kind / split / name, suffixes)
        )
        for kind, suffixes in (("image", IMAGE_SUFFIXES), ("model", (".obj",)))
    }
    return Release("folder", found["image"], found["model"], labels)


def _read_track(root: Path) -> Release:
    meshes: dict[str, list[PurePosixPath]] = {}
    for path in files_below(root, (".obj",)):
        meshes.setdefault(path.stem, []).append(PurePosixPath(path.relative_to(root).as_posix()))
    images, models = [], []
    for split in SPLITS:
        for where, name, label in _rows(root, "Image", split):
            file = next((base + name for base in ("", "data/") if (root / (base + name)).is_file()), None)
            if file is None:
                raise UserError(f"{where}: {name} does not exist, neither below {root} nor below {root / 'data'}")
            images.append(Item(file, split, label, file))
        for folder, rows in groupby(_rows(root, "View", split), key=lambda row: PurePosixPath(row[1]).parent):
            models.append(_track_model(folder, list(rows), meshes, split))
    return Release("track", tuple(images), tuple(models), None)


def _rows(root: Path, kind: str, split: str) -> list[tuple[str, str, int]]:
    """Return (place for messages, path, label) of the rows of one list; labels are 0..20."""
    path, rows = root / f"split/shrec2019_{kind}_{split}.txt", []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        name, *label = line.strip().rsplit(maxsplit=1)
        if not (label and re.fullmatch(r"[0-9]{1,2}", label[0]) and int(label[0]) < NUM_CLASSES):
            raise UserError(
                f"{path}, row {number}: expected `path label` with a label in 0..{NUM_CLASSES - 1}, found {line.strip()!r}; the "
                "lists of the contest, which have no test labels, cannot be used"
            )
        rows.append((f"{path}, row {number}", PurePosixPath(name).as_posix(), int(label[0])))
    return rows


def _track_model(folder: PurePosixPath, rows: list, meshes: dict[str, list[PurePosixPath]], split: str) -> Item:
    """Return one model from the rows of its views; its OBJ file is called like their folder, in the most alike branch."""
    where, _, label = rows[0]
    if len(rows) != VIEWS_PER_MODEL or len({row[2] for row in rows}) != 1:
        raise UserError(
            f"{where}: expected {VIEWS_PER_MODEL} consecutive views of {folder} with one label, found {len(rows)} with labels "
            f"{sorted({row[2] for row in rows})}; fetch the list again"
        )
    others = set(SPLITS) - {split}  # an OBJ file below a folder of the other split is another model's
    candidates = [file for file in meshes.get(folder.name, []) if split in file.parts or not others & set(file.parts)]
    shared = {file: len(set(file.parts) & set(folder.parts)) for file in candidates}
    best = [file for file, count in shared.items() if count == max(shared.values())]
    if len(best) > 1:
        raise UserError(f"{where}: both {best[0]} and {best[1]} may be the mesh of {folder}; remove one of them")
    return Item(folder.as_posix(), split, label, best[0].as_posix() if best else None)
