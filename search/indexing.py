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


def open_or_create(place: str, model: Model, collection: str, modality: str | None, representation: str | None, graph: bool) -> Index:
    """Return the index of this model at a place; a UserError if what is there was made otherwise."""
    if exists(place):
        index = Index(place)
        model.check(index.info, place)
        asked = {"modality": modality, "representation": representation, "graph": graph}
        wrong = [f"{key} {index.info[key]}" for key, value in asked.items() if value not in (None, index.info[key])]
        if wrong:
            raise UserError(f"{place} was built with {', '.join(wrong)}: leave these options as they were, or give a new --index")
        return index
    shapes = [name for name in model.encoders if not MODALITIES[name].is_2d]
    if (modality or len(shapes) == 1) and (modality or shapes[0]) in model.encoders:
        modality = modality or shapes[0]
    else:
        raise UserError(f"say with --modality what the collection holds: one of {', '.join(model.encoders)}")
    representation = representation or model.scores.representation
    width = model.widths
    vectors = {"vector": width[representation]} | ({} if representation == "embedding" else {"embedding": width["embedding"]})
    info = {
        **model.identity, "collection": os.path.abspath(collection), "modality": modality, "representation": representation,
        "graph": graph, "calibration": model.calibrate(modality),
    }
    return Index.create(place, info, vectors)


def add_files(index: Index, model: Model, collections: Iterable[str], dry_run: bool = False) -> dict[str, Any]:
    """Describe the files of collections that the index does not hold with their present content.

    Returns:
        Lists of paths "new", "changed", "unchanged" and "gone" (none), and "skipped": path -> Unusable. What cannot be described
        is listed in the index, and no longer found if it could be before.
    """
    return _synchronise(index, model, dict(entry for place in collections for entry in list_collection(place)), [], dry_run)


def update(index: Index, model: Model, dry_run: bool = False) -> dict[str, Any]:
    """As `add_files`, of the files in the index: describes changed ones anew and drops those that are gone."""
    present = {path: os.path.isfile(path) for path in index.known()}
    gone = [path for path, there in present.items() if not there]
    return _synchronise(index, model, {path: None for path, there in present.items() if there}, gone, dry_run)


def _synchronise(index: Index, model: Model, listed: dict[str, Unusable | None], gone: list[str], dry_run: bool) -> dict[str, Any]:
    known, digests, skipped = index.known(), {}, {}
    for path, problem in progress(listed.items(), len(listed), "files compared"):
        try:
            if problem:
                raise problem
            modality_of(path, (index.info["modality"],))
            digests[path] = file_hash(path)
        except (Unusable, OSError) as error:
            skipped[path] = error if isinstance(error, Unusable) else Unusable("unreadable", str(error))
    todo = [path for path, digest in digests.items() if known.get(path) != digest]
    if not dry_run:
        index.delete(index.items, map(identity, gone))
        batches = [todo[start : start + BATCH] for start in range(0, len(todo), BATCH)]
        for batch in progress(batches, len(batches), f"batches of {BATCH} files described"):
            skipped |= _describe(index, model, {path: digests[path] for path in batch})
        _keep_skipped(index, listed.keys(), skipped)
        _finish(index)
    return {
        "new": [path for path in todo if path not in known and path not in skipped],
        "changed": [path for path in todo if path in known and path not in skipped],
        "unchanged": [path for path in digests if known.get(path) == digests[path]], "gone": gone, "skipped": skipped,
    }


def _keep_skipped(index: Index, listed: Iterable[str], skipped: dict[str, Unusable]) -> None:
    """List what was skipped, take it out of the items, and unlist what is skipped no longer."""
    reasons = list(map(str, skipped.values()))
    index.put(index.skipped, {"path": list(skipped), "code": [error.code for error in skipped.values()], "reason": reasons})
    index.delete(index.items, map(identity, skipped.keys() & index.known().keys()))
    before = set(index.columns(index.skipped, "path")["path"].to_pylist())
    index.delete(index.skipped, map(identity, before & set(listed) - skipped.keys()))


def _describe(index: Index, model: Model, digests: dict[str, str]) -> dict[str, Unusable]:
    """Store one batch of files; return those that could not be read."""
    modality, representation = index.info["modality"], index.info["representation"]
    samples, thumbnails, failed = {}, {}, {}
    for path in digests:
        try:
            samples[path] = read_sample(path, modality, model.data)
            thumbnails[path] = picture_of(path, modality, samples[path])
        except Unusable as error:
            samples.pop(path, None)
            failed[path] = error
    if samples:
        features = model.describe(modality, list(samples.values()))
        columns = {"path": list(samples), "sha256": [digests[path] for path in samples], "thumbnail": list(thumbnails.values())}
        columns |= {"vector": features.represent(representation).numpy(), "embedding": features.embeddings.numpy()}
        index.put(index.items, columns)
    return failed


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
    roots = [os.path.abspath(os.path.expanduser(place)) for place in places]
    inside = lambda path: any(path == root or path.startswith(os.path.join(root, "")) for root in roots)
    skipped = index.columns(index.skipped, "path")["path"].to_pylist()
    found = {name: [path for path in paths if inside(path)] for name, paths in (("items", index.known()), ("skipped", skipped))}
    if not dry_run:
        for name, paths in found.items():
            index.delete(getattr(index, name), map(identity, paths))
        _finish(index)
    return found["items"]


def _finish(index: Index) -> None:
    if index.info["graph"]:
        update_graph(index)
    index.optimise()


def problems(index: Index) -> list[str]:
    """Check every item against its file, itself and the graph; return one line `code: what` per problem."""
    rows = index.columns(index.items, "id", "path", "sha256", "vector")
    found, seen = [], set()
    vectors = vectors_of(rows["vector"])
    for number, path, digest, vector in zip(rows["id"].to_pylist(), rows["path"].to_pylist(), rows["sha256"].to_pylist(), vectors):
        if number in seen:
            found.append(f"twice: {path}")
        seen.add(number)
        if number != identity(path) or not np.isfinite(vector).all() or not vector.any():
            found.append(f"damaged: {path}")
        if not os.path.isfile(path):
            found.append(f"missing: {path}")
        elif file_hash(path) != digest:
            found.append(f"changed: {path}")
    problem = graph_problem(index) if index.info["graph"] else None
    return found + ([f"graph: {problem}"] if problem else [])
