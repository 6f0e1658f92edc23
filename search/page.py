"""Answers as text, CSV, JSON, and one HTML file that needs no network: thumbnails are inside, made when the index was."""

import base64
import csv
import html
import io
import json
from collections.abc import Sequence

from search.query import Answer
from utils.evaluation.tables import align

FIELDS = ("rank", "score", "cosine", "farther", "path")
STYLE = "body{font:14px sans-serif;margin:2em}figure{display:inline-block;width:110px;margin:6px;vertical-align:top}" \
    "figcaption{font-size:11px;overflow-wrap:anywhere}.nothing{color:#a00}"


def as_text(answers: Sequence[Answer]) -> str:
    """Return one table per query; names are shown without control characters."""
    return "\n\n".join(f"{_title(answer)}\n{align([FIELDS, *map(cells, answer.results)])}" for answer in answers)


def as_json(answers: Sequence[Answer]) -> str:
    """Return a list of `Answer.plain`."""
    return json.dumps([answer.plain() for answer in answers], indent=2, allow_nan=False)


def as_csv(answers: Sequence[Answer]) -> str:
    """Return one row per result."""
    writer = csv.writer(stream := io.StringIO(), lineterminator="\n")
    writer.writerow(["query", "nothing_like_this", *FIELDS])
    writer.writerows([answer.query, answer.nothing, *(row[name] for name in FIELDS)] for answer in answers for row in answer.results)
    return stream.getvalue().rstrip("\n")


def as_html(answers: Sequence[Answer]) -> str:
    """Return a page."""
    parts = [f"<!doctype html><meta charset=utf-8><title>Search</title><style>{STYLE}</style>"]
    for answer in answers:
        parts.append(f"<h2 class={'nothing' if answer.nothing else 'found'}>{html.escape(_title(answer))}</h2>")
        parts.append(_figure(answer.picture, "query", "") + "<hr>")
        for row in answer.results:
            text = f"{row['rank']}. score {row['score']:.3f}, cosine {row['cosine']:.3f}"
            parts.append(_figure(row["thumbnail"], f"{text}, nearer than {100 * row['farther']:.1f} % of random pairs", row["path"]))
    return "\n".join(parts)


def _figure(png: bytes, text: str, path: str) -> str:
    return f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" width=96 height=96>' \
        f"<figcaption>{html.escape(text)}<br>{html.escape(shown(path))}</figcaption></figure>"


def verdict(answer: Answer) -> str:
    """Say in words whether the collection holds something like the query."""
    best = f"best cosine {max(row['cosine'] for row in answer.results):.3f}"
    if answer.nothing:
        return f"nothing like this in the collection: {best}, unrelated queries reach {answer.level:.3f}"
    return f"{best}, above the {answer.level:.3f} that unrelated queries reach"


def _title(answer: Answer) -> str:
    return f"{shown(answer.query)} ({answer.modality}): {verdict(answer)}"


def cells(row: dict) -> list[str]:
    """Return what stands in the columns `FIELDS`."""
    return [str(row["rank"]), *(f"{row[name]:.4f}" for name in FIELDS[1:4]), shown(row["path"])]


def shown(name: str) -> str:
    """Return a name without characters that move the cursor of a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
