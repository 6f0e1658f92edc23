"""The neighbour graph that `--ranking diffusion` needs, kept with the index: only what a change touches is worked out anew."""

import numpy as np
import pyarrow as pa
import torch

from search.store import Index
from utils.engine.progress import progress
from utils.errors import UserError
from utils.evaluation.ranking import NEIGHBOURS, DiffusionRanking, nearest

BLOCK = 1024  # items whose neighbours are looked up at once


def update_graph(index: Index) -> None:
    """Bring the graph in line with the items; after a kill, calling it again does.

    An item is looked up in full if it is new or changed, or one of its neighbours is new, changed or gone. To the lists of all
    others, items that are new or changed are added where they are near enough. All changed lists are written in one step.
    """
    ids, vectors = index.matrix()
    gallery = torch.from_numpy(vectors).double()
    known = dict(zip(*(index.columns(index.items, "id", "sha256")[name].to_pylist() for name in ("id", "sha256"))))
    rows = index.columns(index.graph, "id", "sha256", "neighbours", "similarities")
    old = {row["id"]: row for row in rows.to_pylist() if known.get(row["id"]) == row["sha256"]}
    full = lambda row: len(row["neighbours"]) >= min(NEIGHBOURS, len(ids) - 1) and all(number in old for number in row["neighbours"])
    lists = {number: row for number, row in old.items() if full(row)}
    again = np.flatnonzero([number not in lists for number in ids.tolist()])
    fresh = np.flatnonzero([number not in old for number in ids.tolist()])
    changed = {}
    for block in progress(np.array_split(again, len(again) // BLOCK + 1), len(again) // BLOCK + 1, "neighbours"):
        own = torch.from_numpy(block)
        columns, similarities = nearest(gallery[own], gallery, NEIGHBOURS, own) if len(block) else ([], [])
        changed |= {int(ids[row]): (ids[places].tolist(), values.tolist()) for row, places, values in zip(block, columns, similarities)}
    changed |= _entered(lists, ids, gallery, fresh)
    numbers = list(changed)
    neighbours, similarities = zip(*changed.values()) if changed else ([], [])
    hashes = [known[number] for number in numbers]
    index.put(index.graph, {"id": numbers, "sha256": hashes, "neighbours": neighbours, "similarities": similarities})
    index.delete(index.graph, set(rows["id"].to_pylist()) - known.keys())


def _entered(lists: dict[int, dict], ids: np.ndarray, gallery: torch.Tensor, fresh: np.ndarray) -> dict[int, tuple[list, list]]:
    """Return the lists that one of the fresh items enters: id -> neighbours and their similarities."""
    kept, found = np.flatnonzero([number in lists for number in ids.tolist()]), {}
    for start in range(0, len(kept) if len(fresh) else 0, BLOCK):
        block = kept[start : start + BLOCK]
        old = torch.tensor([lists[number]["similarities"] for number in ids[block].tolist()], dtype=torch.float64)
        similarity = gallery[block] @ gallery[fresh].T
        for row in torch.nonzero((similarity > old[:, -1:]).any(dim=1)).flatten().tolist():
            number = int(ids[block[row]])
            best = torch.cat([old[row], similarity[row]]).topk(old.shape[1])
            names = np.concatenate([lists[number]["neighbours"], ids[fresh]])[best.indices]
            found[number] = (names.tolist(), best.values.tolist())
    return found


def graph_problem(index: Index) -> str | None:
    """Say how the graph differs from the items, if it does: ids, contents, or neighbours that are not there."""
    pairs = lambda table: set(zip(*(index.columns(table, "id", "sha256")[name].to_pylist() for name in ("id", "sha256"))))
    items, graph = pairs(index.items), pairs(index.graph)
    if items != graph:
        return f"{len(items - graph)} items are not in the neighbour graph, {len(graph - items)} of its rows are of no item"
    named = index.columns(index.graph, "neighbours")["neighbours"].combine_chunks().flatten()
    lost = set(pa.compute.unique(named).to_pylist()) - {number for number, _ in items}
    return f"{len(lost)} neighbours in the graph are gone" if lost else None


def diffusion(index: Index) -> tuple[np.ndarray, DiffusionRanking]:
    """Return the ids of the items and the ranking over them, from the stored graph; a UserError names the command that mends it."""
    problem = graph_problem(index) if index.info["graph"] else "it was built with --no-graph"
    if problem:
        command = f"update {index.place}" if index.info["graph"] else f"build ... --index NEW_INDEX, without --no-graph: {index.place}"
        raise UserError(f"no diffusion over {index.place}: {problem}; mend it with python search.py {command}")
    ids, vectors = index.matrix()
    rows = index.columns(index.graph, "id", "neighbours", "similarities").sort_by("id")
    shape = (len(ids), min(NEIGHBOURS, len(ids) - 1))
    lists = [rows[name].combine_chunks().flatten().to_numpy().reshape(shape) for name in ("neighbours", "similarities")]
    places = torch.from_numpy(np.searchsorted(ids, lists[0]))
    return ids, DiffusionRanking(torch.from_numpy(vectors).double(), neighbours=(places, torch.from_numpy(lists[1].copy())))
