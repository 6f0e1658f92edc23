"""The neighbour graph that `--ranking diffusion` needs, kept with the index: only what a change touches is worked out anew."""

import numpy as np
import torch

from search.store import Index
from utils.engine.progress import progress
from utils.errors import UserError
from utils.evaluation.ranking import NEIGHBOURS, DiffusionRanking, nearest

BLOCK = 1024  # items whose neighbours are looked up at once


def update_graph(index: Index) -> None:
    """Bring the graph in line with the items; after a kill, calling it again does.

    An item is looked up anew if it is new or changed, if one of its neighbours is new, changed or gone, or if a new or changed item is
    nearer than its last neighbour. All changed lists are written in one step.
    """
    ids, vectors = index.matrix()
    gallery, known = torch.tensor(vectors, dtype=torch.float64), index.hashes(index.items)
    rows = {row["id"]: row for row in index.columns(index.graph, "id", "sha256", "neighbours", "similarities").to_pylist()}
    old = {number: row for number, row in rows.items() if known.get(number) == row["sha256"]}
    complete = lambda row: len(row["neighbours"]) >= min(NEIGHBOURS, len(ids) - 1) and old.keys() >= set(row["neighbours"])
    fresh = np.array([number not in old for number in ids.tolist()], dtype=bool)
    kept = np.array([number in old and complete(old[number]) for number in ids.tolist()], dtype=bool)
    if kept.any() and fresh.any():
        last = np.array([old[number]["similarities"][-1] for number in ids[kept].tolist()])
        kept[kept] = nearest(gallery[kept], gallery[fresh], 1)[1][:, 0].numpy() <= last
    again, changed = np.flatnonzero(~kept), []
    for block in progress(np.array_split(again, len(again) // BLOCK + 1), len(again) // BLOCK + 1, "neighbours"):
        if len(block):
            columns, similarities = nearest(gallery[block], gallery, NEIGHBOURS, torch.from_numpy(block))
            changed += zip(ids[block].tolist(), ids[columns.numpy()].tolist(), similarities.tolist())
    numbers, neighbours, similarities = zip(*changed) if changed else ([], [], [])
    hashes = [known[number] for number in numbers]
    index.put(index.graph, {"id": numbers, "sha256": hashes, "neighbours": neighbours, "similarities": similarities})
    index.delete(index.graph, rows.keys() - known.keys())


def graph_problem(index: Index) -> str | None:
    """Say how the graph differs from the items, if it does: by ids or contents."""
    items, graph = (index.hashes(table).items() for table in (index.items, index.graph))
    problem = f"{len(items - graph)} items are not in the neighbour graph, {len(graph - items)} of its rows are of no item"
    return problem if items != graph else None


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
    return ids, DiffusionRanking(torch.tensor(vectors, dtype=torch.float64), neighbours=(places, torch.from_numpy(lists[1].copy())))
