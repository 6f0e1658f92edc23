"""The index of a collection: one LanceDB table in a folder or on object storage, every change of which is atomic.

A row is a file: an item, or with a code one that could not be described. Ids are hashes of paths, so nothing shifts when a file goes.
The row of an item also holds its nearest items, for `--ranking diffusion`; the metadata of the table tell what made it.
"""

import hashlib
import json
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import datasets
from utils.engine.lock import hold_lock
from utils.engine.progress import progress
from utils.errors import UserError
from utils.evaluation.ranking import NEIGHBOURS, DiffusionRanking, nearest

del sys.modules["datasets"]  # LanceDB takes a loaded package of this name for Hugging Face's
try:
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfPq
except ImportError as missing:
    raise UserError(f"search needs LanceDB ({missing}): pip install -r requirements-search.txt") from missing
finally:
    sys.modules["datasets"] = datasets

FORMAT, TABLE, LOCK = 3, "items", "lock"
TEXTS = dict.fromkeys(("path", "sha256", "code", "reason"), pa.string())
COLUMNS = {"id": pa.int64(), **TEXTS, "thumbnail": pa.binary(), "neighbours": pa.list_(pa.int64())}  # and vectors
ITEMS, SKIPPED = "code IS NULL", "code IS NOT NULL"  # conditions of `Index.rows`
SPARE = 64  # items fetched beyond those wanted, to be ordered in double precision
MARGIN = 1e-5  # more than single precision misplaces a dot product of two vectors of norm at most 1
SCORE_STEPS = 1e12  # equal scores that differ by summation order alone must tie
SMALLEST_ANN = 256  # rows from which LanceDB trains its index
KEPT = timedelta(hours=1)  # old versions stay this long for readers that have them open
BLOCK = 1024  # items whose neighbours are looked up at once


@contextmanager
def told(place: str) -> Iterator[None]:
    """Turn what LanceDB raises on a damaged index, or where it cannot write, into one message; what others raise stays."""
    try:
        yield
    except BaseException as error:  # a panic of its Rust code is no Exception
        if isinstance(error, KeyboardInterrupt) or "lancedb" not in str(traceback.extract_tb(error.__traceback__)):
            raise
        raise UserError(
            f"{place} cannot be read or written, or is damaged ({' '.join(str(error).split())[:200]}): repeat the command, or delete the "
            f"index and make it anew with python search.py build --run RUN --collection DIR --index {place}"
        ) from error


class Index:
    """An existing index, in a folder or at an address of object storage; `info` is what `create` was given."""

    def __init__(self, place: str) -> None:
        self.place = place
        if not exists(place):
            raise UserError(f"no index at {place}: make one with python search.py build --run RUN --collection DIR --index {place}")
        self.table = lancedb.connect(place, read_consistency_interval=timedelta(0)).open_table(TABLE)  # a server sees what others change
        self.info = json.loads((self.table.schema.metadata or {}).get(b"info", "{}"))
        if self.info.get("format") != FORMAT:
            raise UserError(f"{place} is no index of format {FORMAT}, found {self.info.get('format')}: make another one with this version")

    @classmethod
    def create(cls, place: str, info: Mapping[str, Any], widths: Mapping[str, int]) -> "Index":
        """Make an empty index; `widths` are those of the columns of vectors, of which "vector" is ranked."""
        vectors = {name: pa.list_(pa.float32(), width) for name, width in widths.items()}
        schema = pa.schema(COLUMNS | vectors, {"info": json.dumps({"format": FORMAT, **info})})
        lancedb.connect(place).create_table(TABLE, schema=schema)
        return cls(place)

    def __len__(self) -> int:
        return self.table.count_rows(ITEMS)

    def rows(self, *names: str, where: str = ITEMS) -> pa.Table:
        """Return ids and columns of all items, or of the rows of an SQL condition, by ascending id."""
        return self.table.search().where(where).select(["id", *names]).to_arrow().sort_by("id")

    def pick(self, ids: list[int], *names: str) -> dict[int, dict[str, Any]]:
        """Return id -> columns of some items; absent ones are left out."""
        return {row["id"]: row for row in self.rows(*names, where=f"{ITEMS} AND id IN ({str([-1, *ids])[1:-1]})").to_pylist()}

    def put(self, columns: Mapping[str, Sequence]) -> None:
        """Insert or replace rows by their "path", without any other columns; or change rows that are there by their "id". In one step."""
        if "path" in columns:
            empty = dict.fromkeys(self.table.schema.names, [None] * len(columns["path"]))
            columns = {**empty, **columns, "id": list(map(identity, columns["path"]))}
        if columns["id"]:
            rows = pa.table({name: pa.array(list(values), self.table.schema.field(name).type) for name, values in columns.items()})
            merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows, on_bad_vectors="null")

    def delete(self, ids: Iterable[int]) -> None:
        """Remove the rows of these ids, in one step; absent ones do not matter."""
        if ids := list(ids):
            self.table.delete(f"id IN ({str(ids)[1:-1]})")

    def nearest(
        self, query: np.ndarray, count: int, ranking: str = "plain", ann: bool = False, column: str = "vector",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and scores float64 of the best items for a query (D,), by a column of vectors, best first, ties by id.

        Plain scores are dot products, exact and in double precision: single precision only preselects, with a margin. With `ann`, the
        ANN index preselects. Or `diffusion` gives the scores.
        """
        best = lambda ids, scores: np.lexsort([ids, -np.round(scores * SCORE_STEPS)])[:count]
        if ranking == "diffusion":
            ids, graph = diffusion(self, self.table.version)
            scores = graph.scores(torch.from_numpy(query[None]).double())[0].numpy()
            order = best(ids, scores)
            return ids[order], scores[order]
        fetch = min(count, len(self)) + SPARE
        while True:
            search = self.table.search(query, vector_column_name=column).distance_type("dot").limit(fetch)
            search = search.nprobes(64).refine_factor(4) if ann else search.bypass_vector_index()
            rows = search.select(["id", column, "_distance"]).to_arrow()  # none without a vector
            ids, scores = rows["id"].to_numpy(), vectors_of(rows, column) @ query.astype(np.float64)
            order = best(ids, scores)
            if ann or len(ids) < fetch or scores[order[-1]] > 1 - rows["_distance"][-1].as_py() + MARGIN:
                return ids[order], scores[order]
            fetch *= 4

    def finish(self, ann: bool = False) -> None:
        """Bring the graph up to date and join the pieces that many small changes leave; with `ann`, make the ANN index too."""
        if self.info["graph"]:
            update_graph(self)
        if ann and len(self) < SMALLEST_ANN:
            raise UserError(f"an ANN index needs at least {SMALLEST_ANN} items, {self.place} has {len(self)}; exact search is faster there")
        if ann:
            self.table.create_index("vector", config=IvfPq(distance_type="dot"))
        self.table.optimize(cleanup_older_than=KEPT)


def identity(path: str) -> int:
    """Return the stable key of a path: 63 bits of its hash."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def exists(place: str) -> bool:
    """Whether there is an index; in a folder, one whose making was stopped at its very start counts as none."""
    if "://" in place:
        return TABLE in lancedb.connect(place).list_tables().tables
    return any(Path(place).glob(f"{TABLE}.lance/_versions/*.manifest"))


def writing(place: str, new: bool) -> AbstractContextManager:
    """Return what one process at a time may enter, to change the index or (`new`) to make one; a UserError refuses all others.

    There is no such lock on object storage, nor where there is no index to change.
    """
    if "://" in place or not (new or exists(place)):
        return nullcontext()
    folder = Path(place)
    here = folder.iterdir() if folder.is_dir() else [folder] * folder.exists()
    if not {path.name for path in here} <= {f"{TABLE}.lance", LOCK}:
        raise UserError(f"{place} holds other files: give an empty or new folder for the index")
    return hold_lock(folder / LOCK, f"another search.py changes {place} at this moment: repeat the command when it has ended")


def vectors_of(rows: pa.Table, name: str = "vector") -> np.ndarray:
    """Return a column of vectors as (N, D) float64."""
    column = rows[name]
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size).astype(np.float64)


def update_graph(index: Index) -> None:
    """Look up the neighbours that a change has touched, and write them in one step; after a kill, calling it again does.

    Touched are items that are new or changed, those with a neighbour that is new, changed or gone, and those whose last neighbour is
    farther than a new or changed item.
    """
    rows = index.rows("vector", "neighbours")
    ids, gallery, lists = rows["id"].to_numpy(), torch.from_numpy(vectors_of(rows)), rows["neighbours"].to_pylist()
    fresh = np.array([found is None for found in lists], dtype=bool)
    old, whole = set(ids[~fresh].tolist()), min(NEIGHBOURS, len(ids) - 1)
    kept = np.array([found is not None and len(found) == whole and old.issuperset(found) for found in lists], dtype=bool)
    if kept.any() and fresh.any():
        last = ids.searchsorted([lists[row][-1] for row in np.flatnonzero(kept)])
        kept[kept] = nearest(gallery[kept], gallery[fresh], 1)[1][:, 0] <= (gallery[kept] * gallery[last]).sum(dim=1)
    again, changed = torch.from_numpy(np.flatnonzero(~kept)), []
    blocks = again.split(BLOCK) if len(again) else ()
    for block in progress(blocks, len(blocks), "neighbours"):
        changed += ids[nearest(gallery[block], gallery, NEIGHBOURS, block)[0].numpy()].tolist()
    index.put({"id": ids[again.numpy()].tolist(), "neighbours": changed})


def behind(rows: pa.Table) -> int:
    """Return how many of all items are not in the neighbour graph, or have a neighbour that is gone."""
    known = set(rows["id"].to_pylist())
    return sum(found is None or not known.issuperset(found) for found in rows["neighbours"].to_pylist())


@lru_cache(maxsize=1)
def diffusion(index: Index, version: int) -> tuple[np.ndarray, DiffusionRanking]:
    """Return the ids of the items and the ranking over their graph, of the present `version` of the table; a UserError if it is behind."""
    rows = index.rows("vector", "neighbours")
    if missing := behind(rows):
        raise UserError(
            f"no diffusion over {index.place}: {missing} items are not in the neighbour graph, or a neighbour of theirs is gone; mend it "
            f"with python search.py update {index.place}, or where it was built with --no-graph, build another index"
        )
    ids, gallery = rows["id"].to_numpy(), torch.from_numpy(vectors_of(rows))
    places = torch.from_numpy(ids.searchsorted(np.array(rows["neighbours"].to_pylist(), dtype=np.int64)))
    similarities = torch.zeros(places.shape, dtype=torch.float64)
    for rank, found in enumerate(places.T):
        similarities[:, rank] = (gallery * gallery[found]).sum(dim=1)
    return ids, DiffusionRanking(gallery, neighbours=(places, similarities))
