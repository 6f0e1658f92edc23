"""Answers: the items of an index nearest to a picture or a shape, and how much each similarity means; as text, CSV, JSON and HTML."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from search.files import modality_of, picture_of, read_sample, reading
from search.index import Index
from search.model import Model
from utils.errors import UserError
from utils.evaluation.tables import align

FIELDS = ("rank", "score", "cosine", "farther", "path")
STYLE = "body{font:14px sans-serif;margin:2em}figure{display:inline-block;width:110px;margin:6px;vertical-align:top}" \
    "figcaption{font-size:11px;overflow-wrap:anywhere}.nothing{color:#a00}"


def search(
    index: Index, model: Model, paths: Sequence[str], count: int = 10, ranking: str = "plain", modality: str | None = None,
    ann: bool = False, up: str | None = None,
) -> list[dict[str, Any]]:
    """Find the `count` best items, see `Index.nearest`, for each of some files.

    Args:
        modality: of the queries, by default what their files are; up: vertical axis of shapes, by default that of the index.
    Returns:
        Per query "query", "modality", "nothing_like_this" (the best cosine does not reach "level", below which unrelated queries stay),
        "verdict" in words, both about the item of all whose embedding is nearest; "reads_labels": which ones the model reads, if any;
        "results": `FIELDS` of each, where "farther" is the share 0..1 of random pairs that are farther apart, and "pictures": PNG of
        the query and of every result.
    Raises:
        UserError: if options do not fit the index or the run, or a file cannot be described.
    """
    if not len(index):
        raise UserError(f"{index.place} holds no item: add some with python search.py add {index.place} DIR")
    if count < 1:
        raise UserError(f"-k must be at least 1, found {count}")
    if modality and modality not in model.encoders:
        raise UserError(f"queries may be of {' or '.join(model.encoders)}, which the run has learned, found --as {modality}")
    if ann and not (ranking == "plain" and index.table.list_indices()):
        raise UserError(f"--ann needs --ranking plain and an ANN index: python search.py update {index.place} --ann")
    modalities, found = [modality] if modality else list(model.encoders), []
    for path in paths:
        try:
            with reading(path):
                seen = modality_of(path, modalities)
                sample = read_sample(path, seen, model.data, up or index.info["up"])
                picture = picture_of(path, seen, sample)
        except UserError as error:
            raise UserError(f"{path} is no query: {error}") from error
        features, meaning = model.describe({seen: torch.from_numpy(sample[None])})[seen], index.info["calibration"][seen]
        ids, scores = index.nearest(features.represent(index.info["representation"])[0].cpu().numpy(), count, ranking, ann)
        picked = index.pick(ids.tolist(), "path", "thumbnail", "embedding")  # without those that have been removed meanwhile
        rows = [{**picked[number], "score": score} for number, score in zip(ids.tolist(), scores.tolist()) if number in picked]
        embedding, quantiles = features.embeddings[0].cpu().numpy(), meaning["quantiles"]
        for rank, row in enumerate(rows, start=1):
            cosine = float(row["embedding"] @ embedding.astype(np.float64))
            row |= {"rank": rank, "cosine": cosine, "farther": float(np.interp(cosine, quantiles, np.linspace(0, 1, len(quantiles))))}
        shown_first = index.info["representation"] == "embedding" and ranking == "plain" and not ann
        nearest = [row["cosine"] for row in rows[:1]] if shown_first else index.nearest(embedding, 1, column="embedding")[1].tolist()
        best, level = max(nearest, default=-1.0), meaning["level"]
        verdict = f"{'nothing like this in the collection: ' * (best < level)}best cosine {best:.3f}, unrelated queries reach {level:.3f}"
        found.append({
            "query": path, "modality": seen, "nothing_like_this": best < level, "level": level, "verdict": verdict,
            "reads_labels": index.info.get("reads_labels"), "results": [{name: row[name] for name in FIELDS} for row in rows],
            "pictures": [picture, *(row["thumbnail"] for row in rows)],
        })
    return found


def title(answer: dict[str, Any]) -> str:
    """Return the query and the verdict."""
    return f"{shown(answer['query'])} ({answer['modality']}{made_by(answer)}): {answer['verdict']}"


def made_by(facts: Mapping[str, Any]) -> str:
    """Return what is to be said, in an answer or of an index, of a model that reads labels."""
    return f", by a model that READS LABELS ({facts['reads_labels']})" if facts.get("reads_labels") else ""


def table(answer: dict[str, Any]) -> list[list[str]]:
    """Return the columns `FIELDS` of all results."""
    return [[str(row["rank"]), *(f"{row[name]:.4f}" for name in FIELDS[1:4]), shown(row["path"])] for row in answer["results"]]


def as_text(answers: Sequence[dict[str, Any]]) -> str:
    """Return one table per query."""
    return "\n\n".join(f"{title(answer)}\n{align([FIELDS, *table(answer)])}" for answer in answers)


def as_json(answers: Sequence[dict[str, Any]]) -> str:
    """Return a list of the answers without their pictures."""
    plain = [{name: value for name, value in answer.items() if name != "pictures"} for answer in answers]
    return json.dumps(plain, indent=2, allow_nan=False)


def as_csv(answers: Sequence[dict[str, Any]]) -> str:
    """Return one row per result."""
    writer = csv.writer(stream := io.StringIO(), lineterminator="\n")
    writer.writerow([*(whole := ("query", "nothing_like_this", "reads_labels")), *FIELDS])
    writer.writerows([*map(answer.get, whole), *row.values()] for answer in answers for row in answer["results"])
    return stream.getvalue().rstrip("\n")


def as_html(answers: Sequence[dict[str, Any]]) -> str:
    """Return a page that needs no network: the thumbnails, made when the index was, are inside."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Search</title><style>{STYLE}</style>"]
    for answer in answers:
        parts.append(f"<h2 class={'nothing' if answer['nothing_like_this'] else 'found'}>{html.escape(title(answer))}</h2>")
        captions = ["query"] + [
            f"{row['rank']}. score {row['score']:.3f}, cosine {row['cosine']:.3f}, "
            f"nearer than {100 * row['farther']:.1f} % of random pairs: {shown(row['path'])}" for row in answer["results"]
        ]
        parts += [
            f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" width=96 height=96>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>" for png, caption in zip(answer["pictures"], captions)
        ]
    return "\n".join(parts)


def shown(name: str) -> str:
    """Return a name without characters that move the cursor of a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
