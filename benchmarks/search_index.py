"""A search index of fabricated vectors in a real store: `python -m benchmarks.search_index [--sizes 10000 100000 1000000]`.

Seconds to fill it, to make LanceDB's ANN index and to add 1,000 items; milliseconds per query, exact and through the ANN index;
recall@10 of the latter; bytes per object. Processor time stands beside elapsed time, which a busy machine stretches.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.floors import start, write_report
from search.index import Index, identity
from utils.engine.session import run_command

CENTRES, SPREAD = 1000, 0.06  # of the vectors: as far around their centre as the centres are from each other, nearly
THUMBNAIL_BYTES = 2048
PIECE = 10_000
ADDED, BEST = 1000, 10


def main(argv: list[str] | None = None) -> None:
    """Measure every size and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=256, help="width of the vectors")
    parser.add_argument("--queries", type=int, default=20)
    args, report = start("search_index", parser, argv)
    report |= {"thumbnail_bytes": THUMBNAIL_BYTES, "items": {}}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            row = report["items"][str(size)] = measure(Path(folder) / "index", size, args.dim, args.queries)
        print(f"{size} items: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        write_report("search_index", report, args.output)


def measure(place: Path, size: int, dim: int, queries: int) -> dict[str, float]:
    """Make an index of `size` items at a place and return what was measured."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dim)).astype(np.float32) / dim**0.5
    row, index = {}, Index.create(str(place), {"graph": False}, {"vector": dim})

    def put(first: int, count: int) -> None:
        for begin in range(first, first + count, PIECE):
            numbers = range(begin, min(begin + PIECE, first + count))
            vectors = _vectors(rng, centres, len(numbers))
            index.put({
                "path": list(map(_path, numbers)), "sha256": ["0" * 64] * len(numbers), "vector": vectors,
                "thumbnail": [rng.bytes(THUMBNAIL_BYTES) for _ in numbers],
            })

    def fill() -> None:
        put(0, size)
        index.finish()

    asked = _vectors(rng, centres, queries)
    row |= _timed("fill", fill)
    index.table.optimize(cleanup_older_than=timedelta(0))
    row["bytes_per_object"] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / size
    exact, approximate = [], []
    index.nearest(asked[0], BEST)  # opens the files
    row |= _timed("exact_query", lambda: exact.extend(index.nearest(query, BEST)[0] for query in asked), queries)
    row |= _timed("add_1000", lambda: put(size, ADDED))
    index.delete(identity(_path(number)) for number in range(size, size + ADDED))
    row |= _timed("make_ann", lambda: index.finish(ann=True))
    index.nearest(asked[0], BEST, ann=True)
    row |= _timed("ann_query", lambda: approximate.extend(index.nearest(query, BEST, ann=True)[0] for query in asked), queries)
    row["ann_recall_at_10"] = float(np.mean([len(set(best) & set(found)) / len(best) for best, found in zip(exact, approximate)]))
    return row


def _path(number: int) -> str:
    return f"/collection/shapes/object_{number:09d}.off"


def _vectors(rng: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    vectors = centres[rng.integers(len(centres), size=count)] + SPREAD * rng.standard_normal((count, centres.shape[1]), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _timed(name: str, action: Callable[[], Any], calls: int = 1) -> dict[str, float]:
    """Return elapsed and processor seconds per call."""
    begin, processor = time.perf_counter(), time.process_time()
    action()
    elapsed, used = time.perf_counter() - begin, time.process_time() - processor
    return {f"{name}_seconds": elapsed / calls, f"{name}_processor_seconds": used / calls}


if __name__ == "__main__":
    sys.exit(run_command(main))
