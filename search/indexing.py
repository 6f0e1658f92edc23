"""Makes an index, and changes it by files: added, changed, gone. A killed command is finished by calling it again."""

import io
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from datasets.images import read_image
from datasets.pseudo_labels import file_hash
from search.files import Unusable, list_collection, modality_of, read_sample
from search.graph import graph_problem, update_graph
from search.model import Model
from search.store import Index, exists, identity, vectors_of
from utils.engine.progress import progress
from utils.errors import UserError
from utils.figures.thumbnails import thumbnail
from utils.modalities import MODALITIES

BATCH = 256  # files described and stored at once, as many as the encoders of evaluation see
THUMBNAIL = 96  # pixels
REPAIRABLE = ("empty", "type", "unreadable")  # codes of `Unusable` that another content of the file may end


def open_or_create(place: str, model: Model, collection: str, asked: dict[str, Any]) -> Index:
    """Return the index of this model at a place, and check what is there as `check_same` does.

    Args:
        asked: "modality", "representation", "graph" and "up" as given by the user; None where nothing is.
    """
    if exists(place):
        index = Index(place)
        model.check(index.info, place)
        check_same(index, asked)
        return index
    fitting = [asked["modality"]] if asked["modality"] else [name for name in model.encoders if not MODALITIES[name].is_2d]
    if len(fitting) != 1 or fitting[0] not in model.encoders:
        raise UserError(f"say with --modality what the collection holds: one of {', '.join(model.encoders)}")
    next(list_collection(collection), None)  # refuses one that does not exist
    chosen = {**asked, "modality": fitting[0], "representation": asked["representation"] or model.scores.representation}
    vectors = {"vector": model.widths[chosen["representation"]]}
    if chosen["representation"] != "embedding":
        vectors["embedding"] = model.widths["embedding"]
    facts = {**model.identity, "collection": os.path.abspath(collection), **chosen, "calibration": model.calibrate(fitting[0])}
    return Index.create(place, facts, vectors)


def check_same(index: Index, asked: dict[str, Any]) -> None:
    """Raise a UserError where an option that is given (not None) differs from what the index was built with."""
    wrong = [f"{key} {index.info[key]}" for key, value in asked.items() if value not in (None, index.info[key])]
    if wrong:
        raise UserError(f"{index.place} was built with {', '.join(wrong)}: leave these options as they were, or build another index")


def synchronise(index: Index, model: Model, collections: Iterable[str] | None, dry_run: bool = False) -> dict[str, Any]:
    """Describe the files of collections that the index does not hold with their present content.

    Args:
        collections: see `list_collection`; None stands for the items of the index and the files that could not be described, of which
            those without a file are dropped.
    Returns:
        Lists of paths "new", "changed", "unchanged" and "gone", and "skipped": path -> Unusable. What cannot be described is listed
        in the index, and no longer found if it could be before.
    """
    known, digests, skipped = index.hashes(index.items, "path"), {}, {}
    if collections is None:
        rows = index.columns(index.skipped, "path", "code").to_pylist()
        kept = [*known, *(row["path"] for row in rows if row["code"] in REPAIRABLE)]
        listed = {path: None for path in kept if os.path.isfile(path)}
        gone = [path for path in kept if path not in listed]
    else:
        listed = dict(entry for place in collections for entry in list_collection(place) if not _below(entry[0], index.place))
        gone = []
    for path, problem in progress(listed.items(), len(listed), "files compared"):
        try:
            if problem:
                raise problem
            modality_of(path, [index.info["modality"]])
            digests[path] = file_hash(path)
        except (Unusable, OSError) as error:
            skipped[path] = error if isinstance(error, Unusable) else Unusable("unreadable", str(error))
    todo = [path for path, digest in digests.items() if known.get(path) != digest]
    if not dry_run:
        for table in (index.items, index.skipped):
            index.delete(table, map(identity, gone))
        batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
        for batch in progress(batches, len(batches), f"batches of {BATCH} files described"):
            skipped |= _describe(index, model, {path: digests[path] for path in batch})
        _keep_skipped(index, listed.keys(), skipped)
        _finish(index)
    described = [path for path in todo if path not in skipped]
    return {
        "new": [path for path in described if path not in known], "changed": [path for path in described if path in known],
        "unchanged": [path for path in digests if known.get(path) == digests[path]], "gone": gone, "skipped": skipped,
    }


def _describe(index: Index, model: Model, digests: dict[str, str]) -> dict[str, Unusable]:
    """Store one batch of files; return those that could not be read."""
    modality, samples, thumbnails, failed = index.info["modality"], {}, [], {}
    for path in digests:
        try:
            sample = read_sample(path, modality, model.data, index.info["up"])
            thumbnails.append(picture_of(path, modality, sample))
            samples[path] = sample
        except Unusable as error:
            failed[path] = error
    if samples:
        features = model.describe(modality, list(samples.values()))
        index.put(index.items, {
            "path": list(samples), "sha256": [digests[path] for path in samples], "thumbnail": thumbnails,
            "vector": features.represent(index.info["representation"]).numpy(), "embedding": features.embeddings.numpy(),
        })
    return failed


def _keep_skipped(index: Index, listed: Iterable[str], skipped: dict[str, Unusable]) -> None:
    """List what was skipped, take it out of the items, and unlist what is skipped no longer."""
    codes, reasons = [error.code for error in skipped.values()], list(map(str, skipped.values()))
    index.put(index.skipped, {"path": list(skipped), "code": codes, "reason": reasons})
    index.delete(index.items, map(identity, skipped))
    before = set(index.columns(index.skipped, "path")["path"].to_pylist())
    index.delete(index.skipped, map(identity, before & set(listed) - skipped.keys()))


def picture_of(path: str, modality: str, sample: np.ndarray) -> bytes:
    """Return a PNG thumbnail of a file that was read as `sample`."""
    if MODALITIES[modality].is_2d:
        picture = ImageOps.fit(read_image(path), (THUMBNAIL, THUMBNAIL))
    else:
        picture = Image.fromarray(thumbnail(modality, sample[0], THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def remove(index: Index, places: Iterable[str], dry_run: bool = False) -> list[str]:
    """Drop files, or all files below folders, from the index; return the paths of what was there."""
    tables, places = (index.items, index.skipped), list(places)
    listed = [index.columns(table, "path")["path"].to_pylist() for table in tables]
    found = [[path for path in paths if any(_below(path, place) for place in places)] for paths in listed]
    if not dry_run:
        for table, paths in zip(tables, found):
            index.delete(table, map(identity, paths))
        _finish(index)
    return found[0]


def _below(path: str, place: str) -> bool:
    root = os.path.abspath(os.path.expanduser(place))
    return path == root or path.startswith(os.path.join(root, ""))


def _finish(index: Index) -> None:
    if index.info["graph"]:
        update_graph(index)
    index.optimise()


def problems(index: Index) -> list[str]:
    """Check every item against its file, itself and the graph; return one line `code: what` per problem."""
    rows = index.columns(index.items, "id", "path", "sha256", "vector")
    found, seen, vectors = [], set(), vectors_of(rows["vector"])
    for number, path, digest, vector in zip(*(rows[name].to_pylist() for name in ("id", "path", "sha256")), vectors):
        there, sound = os.path.isfile(path), np.isfinite(vector).all() and vector.any() and number == identity(path)
        wrong = {"twice": number in seen, "damaged": not sound, "missing": not there, "changed": there and file_hash(path) != digest}
        found += [f"{code}: {path}" for code in wrong if wrong[code]]
        seen.add(number)
    problem = graph_problem(index) if index.info["graph"] else None
    return found + ([f"graph: {problem}"] if problem else [])
