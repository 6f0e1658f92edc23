"""Files below results/: one JSON per cell, and one manifest per table that says which cells its rows are made of."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments.cells import Row
from experiments.protocol import HERE, Setup
from experiments.queue import MARKER, Job
from utils.engine.checkpoint import atomic_write_json


def publish(folder: Path, jobs: Iterable[Job]) -> None:
    """Copy the records of finished jobs to {folder}/cells/{id}.json."""
    for job in (job for job in jobs if job.done):
        target = folder / "cells" / f"{job.id}.json"
        record = json.loads((job.folder / MARKER).read_text(encoding="utf-8"))
        if not target.is_file() or json.loads(target.read_text(encoding="utf-8")) != record:
            atomic_write_json(target, record)


def manifest(name: str, table: Mapping[str, Any], setup: Setup, rows: Iterable[Row], command: str) -> dict[str, Any]:
    """Return everything that rendering needs besides the cells' records.

    Args:
        name: of the table; table: its entry in the protocol; setup: data set and scale.
        rows: expanded rows.
        command: that fills the table.
    Returns:
        Plain dictionary: the table's texts, the paper's numbers of this data set, and per row its cells by seed and pair.
    """
    return {
        "table": name, "dataset": setup.dataset, "scale": setup.scale, "config": str(setup.config), "command": command,
        "paper_dataset": setup.paper, "paper": _paper(table, setup),
        **{key: table[key] for key in ("title", "kind", "baseline", "ranking", "notes") if key in table},
        "rows": [
            {"name": row.name, **{key: row.options[key] for key in ("paper", "against", "grid", "value") if key in row.options},
             "cells": {str(seed): {pair: cell.id for pair, cell in pairs.items()} for seed, pairs in row.cells.items()}}
            for row in rows
        ],
    }


def _paper(table: Mapping[str, Any], setup: Setup) -> dict[str, Any]:
    numbers = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))
    return numbers.get(table.get("paper"), {}).get(setup.paper, {})


def manifest_path(folder: Path, name: str, setup: Setup) -> Path:
    """Return where a table's manifest lies; the rendered files have the same name and other endings."""
    return folder / f"{name}-{setup.dataset}-{setup.scale}.json"


def read_manifests(folder: Path) -> dict[Path, dict]:
    """Return every manifest of a results folder by its path."""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {path: content for path, content in found.items() if isinstance(content, dict) and {"table", "rows"} <= content.keys()}


def read_cells(folder: Path, content: Mapping[str, Any]) -> dict[str, dict]:
    """Return id -> record of the cells that a manifest names and those they need, as far as they were run."""
    wanted = [cell for row in content["rows"] for pairs in row["cells"].values() for cell in pairs.values()]
    records: dict[str, dict] = {}
    while wanted:
        cell = wanted.pop()
        path = folder / "cells" / f"{cell}.json"
        if cell not in records and path.is_file():
            records[cell] = json.loads(path.read_text(encoding="utf-8"))
            wanted += records[cell]["needs"]
    return records
