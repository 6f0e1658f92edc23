"""The index of a collection: LanceDB tables in one folder (or on object storage), every change of which is atomic.

`items` holds one row per described file, `skipped` those that could not be, `graph` the nearest items of every item, and `info` one
JSON object on the model that described them. Ids are hashes of paths: nothing shifts when an item goes.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from utils.engine.lock import hold_lock
from utils.errors import UserError

_ours = sys.modules.pop("datasets", None)  # LanceDB takes a loaded package of this name for Hugging Face's, here and in Table.add
try:
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfPq
except ImportError as missing:
    raise UserError(f"search needs LanceDB ({missing}): pip install -r requirements-search.txt") from missing
finally:
    if _ours is not None:
        sys.modules["datasets"] = _ours

FORMAT = 2
LOCK = "lock"
SPARE = 64  # items fetched beyond those wanted, to be ordered in double precision
MARGIN = 1e-5  # more than single precision misplaces a dot product of two vectors of norm at most 1
SCORE_STEPS = 1e12  # equal scores that differ by summation order alone must tie
AT_ONCE = 1000  # ids in one condition
SMALLEST_ANN = 256  # rows from which LanceDB trains its index
KEPT = timedelta(hours=1)  # old versions stay this long for readers that have them open


def identity(path: str) -> int:
    """Return the stable key of a path: 63 bits of its hash."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def _told(method: Callable) -> Callable:
    """Turn what LanceDB raises on a damaged index, or where it cannot write, into one message."""
    @wraps(method)
    def told(self: "Index", *given: Any, **named: Any) -> Any:
        try:
            return method(self, *given, **named)
        except UserError:
            raise
        except (RuntimeError, OSError, ValueError, LookupError) as error:
            raise UserError(
                f"{self.place} cannot be read or written, or is damaged ({' '.join(str(error).split())[:200]}): repeat the command, or "
                f"delete the index and make it anew with python search.py build --run RUN --collection DIR --index {self.place}"
            ) from error
    return told


class Index:
    """An existing index.

    Args:
        place: folder, or address of object storage that LanceDB understands.
    Raises:
        UserError: if there is none, or it is damaged or of another format.
    """

    @_told
    def __init__(self, place: str) -> None:
        self.place = place
        if not exists(place):
            raise UserError(f"no index at {place}: make one with python search.py build --run RUN --collection DIR --index {place}")
        tables = lancedb.connect(place, read_consistency_interval=timedelta(0))  # a server sees what others change
        self.items, self.skipped, self.graph, info = map(tables.open_table, ("items", "skipped", "graph", "info"))
        self.info = json.loads(info.search().to_list()[0]["text"])
        if self.info["format"] != FORMAT:
            raise UserError(f"{place} has index format {self.info['format']!r}, this code reads {FORMAT}: use the matching version")

    @classmethod
    def create(cls, place: str, info: Mapping[str, Any], widths: Mapping[str, int]) -> "Index":
        """Make an empty index; one that a killed process left half made is completed.

        Args:
            info: what to remember of the model and the collection, plain values.
            widths: column of `items` -> width of its vectors; "vector" is what is ranked.
        """
        _refuse_other_files(place)
        key, text = ("id", pa.int64()), lambda *names: [(name, pa.string()) for name in names]
        vectors = [(name, pa.list_(pa.float32(), width)) for name, width in widths.items()]
        lists = [("neighbours", pa.list_(pa.int64())), ("similarities", pa.list_(pa.float64()))]
        tables = lancedb.connect(place)
        for name, columns in (
            ("items", [key, *text("path", "sha256"), *vectors, ("thumbnail", pa.binary())]),
            ("skipped", [key, *text("path", "code", "reason")]), ("graph", [key, *text("sha256"), *lists]),
        ):
            tables.create_table(name, schema=pa.schema(columns), exist_ok=True)
        tables.create_table("info", [{"text": json.dumps({"format": FORMAT, **info})}])  # last: marks an index
        return cls(place)

    @_told
    def __len__(self) -> int:
        return self.items.count_rows()

    def hashes(self, table: Any, key: str = "id") -> dict[Any, str]:
        """Return column `key` -> SHA-256 of the content, of every row of `items` or `graph`."""
        rows = self.columns(table, key, "sha256")
        return dict(zip(rows[key].to_pylist(), rows["sha256"].to_pylist()))

    @_told
    def columns(self, table: Any, *names: str) -> pa.Table:
        """Return whole columns of one of the tables."""
        return table.search().select(list(names)).to_arrow()

    def matrix(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (N,) of all items in ascending order and their vectors (N, D) float32."""
        rows = self.columns(self.items, "id", "vector").sort_by("id")
        return rows["id"].to_numpy(), vectors_of(rows["vector"])

    @_told
    def put(self, table: Any, columns: Mapping[str, Sequence]) -> None:
        """Insert rows or replace those with the same id, in one step; ids are those of the column "path" if it is given."""
        if "path" in columns:
            columns = {**columns, "id": [identity(path) for path in columns["path"]]}
        if len(columns["id"]):
            rows = pa.table([pa.array(list(columns[field.name]), field.type) for field in table.schema], schema=table.schema)
            table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    @_told
    def delete(self, table: Any, ids: Iterable[int]) -> None:
        """Remove the rows of these ids, a thousand in one step; absent ones do not matter."""
        for condition in _conditions(ids):
            table.delete(condition)

    @_told
    def rows(self, ids: Iterable[int], *names: str) -> dict[int, dict[str, Any]]:
        """Return id -> columns of some items; absent ones are left out."""
        parts = [self.items.search().where(condition).select(["id", *names]).to_list() for condition in _conditions(ids)]
        return {row["id"]: row for part in parts for row in part}

    @_told
    def nearest(self, query: np.ndarray, count: int, ann: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and scores float64 of the items with the largest dot products with a query (D,), best first, ties by id.

        Exact, and in double precision: single precision only preselects, with a margin. With `ann`, through the ANN index.
        """
        fetch = min(count, len(self)) + SPARE
        while True:
            search = self.items.search(query.astype(np.float32), vector_column_name="vector").distance_type("dot").limit(fetch)
            search = search.nprobes(64).refine_factor(4) if ann else search.bypass_vector_index()
            rows = search.select(["id", "vector", "_distance"]).to_arrow()
            ids, scores = rows["id"].to_numpy(), vectors_of(rows["vector"]).astype(np.float64) @ query.astype(np.float64)
            order = best_first(ids, scores)[:count]
            if ann or len(ids) < fetch or scores[order[-1]] > 1 - rows["_distance"][-1].as_py() + MARGIN:
                return ids[order], scores[order]
            fetch *= 4

    @_told
    def optimise(self, ann: bool = False) -> None:
        """Join the pieces that many small changes leave; with `ann`, make the ANN index too. Readers are not disturbed."""
        if ann and len(self) < SMALLEST_ANN:
            raise UserError(f"an ANN index needs at least {SMALLEST_ANN} items, {self.place} has {len(self)}; exact search is faster there")
        if ann:
            self.items.create_index("vector", config=IvfPq(distance_type="dot"))
        for table in (self.items, self.skipped, self.graph):
            table.optimize(cleanup_older_than=KEPT)

    @property
    def has_ann(self) -> bool:
        """Whether an ANN index was made."""
        return bool(self.items.list_indices())


def exists(place: str) -> bool:
    """Whether there is an index; one whose making was stopped at its very start counts as none."""
    return ("://" in place or Path(place).is_dir()) and "info" in lancedb.connect(place).list_tables().tables


def writing(place: str, new: bool) -> AbstractContextManager:
    """Return what one process at a time may enter, to change the index or (`new`) to make one; a UserError refuses all others.

    There is no such lock on object storage, nor where there is no index to change.
    """
    if "://" in place or not (new or exists(place)):
        return nullcontext()
    _refuse_other_files(place)
    return hold_lock(Path(place) / LOCK, f"another search.py changes {place} at this moment: repeat the command when it has ended")


def _refuse_other_files(place: str) -> None:
    folder = Path(place)
    here = () if "://" in place or not folder.exists() else folder.iterdir() if folder.is_dir() else [folder]
    if [path for path in here if path.suffix != ".lance" and path.name != LOCK]:
        raise UserError(f"{place} holds other files: give an empty or new folder for the index")


def best_first(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the order of falling scores, equal ones by id."""
    return np.lexsort([ids, -np.round(scores * SCORE_STEPS)])


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of vectors as (N, D)."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), column.type.list_size)


def _conditions(ids: Iterable[int]) -> Iterator[str]:
    numbers = [str(int(number)) for number in ids]
    return (f"id IN ({', '.join(numbers[start : start + AT_ONCE])})" for start in range(0, len(numbers), AT_ONCE))
