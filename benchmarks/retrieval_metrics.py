"""mAP@All against plain Python loops, and alone on large sets: `python -m benchmarks.retrieval_metrics [--large]`.

"double loop": scores, ranking and precision of every query in Python, nothing vectorised. "loop over ranks": the same, but
scores and order come from NumPy. The loops stand beside the floors of the vectorised pass. Exit code 1 if either loop differs
from `utils.evaluation.metrics` by 1e-6 or more. "diffusion": the gallery's graph, and the scores of every query by it.
"""

import argparse
import dataclasses
import operator
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.floors import count_work, measure_rates, print_table, seconds_of, start, timed, write_report
from utils.engine.session import run_command
from utils.evaluation.metrics import mean_average_precision
from utils.evaluation.ranking import DiffusionRanking

SEED = 0
CLASSES = 10
LARGE = 100_000  # too large for diffusion, whose scores of a block of queries are a dense matrix
BLOCK = 500  # queries
LIMIT = 1e-6
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and the sizes, print the table and write the JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop-size", type=int, default=1000, help="queries and gallery items of the comparison")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000], help="queries and gallery items of the runs alone")
    parser.add_argument("--large", action="store_true", help=f"run {LARGE} alone as well")
    parser.add_argument("--dim", type=int, default=256, help="width of the embeddings")
    parser.add_argument("--repeats", type=int, default=5, help="timed vectorised passes, of which the median counts")
    args, report = start("retrieval_metrics", parser, argv)
    device, rates = args.device, measure_rates(args.device, torch.float64)  # mAP ranks in double precision

    def once(action: Callable[[], object]) -> dict[str, float]:
        """Time and count at once: the counters take microseconds per operator, a pass up to many minutes."""
        work, taken = timed(lambda: count_work(action), device)
        return rates.beside(taken, work)

    problem, small = make_problem(args.loop_size, args.dim, device), f"metrics, {args.loop_size} x {args.loop_size}"
    rank = partial(mean_average_precision, *problem)
    found, work = {small: rank()}, count_work(rank)
    rows = {small: rates.beside(statistics.median(seconds_of(rank, device, args.repeats)), work)}
    for name in LOOPS:
        found[name], taken = timed(partial(loop_map, name, *problem), device)
        rows[name] = rates.beside(taken, work)
    for size in sorted(set(args.sizes + [LARGE] * args.large)):
        name, problem, values = f"metrics, {size} x {size}", make_problem(size, args.dim, device), []
        rows[name] = once(lambda: values.append(mean_average_precision(*problem)))  # noqa: B023
        found[name] = values[0]
        if size < LARGE:
            rows[f"diffusion, {size} x {size}"] = once(lambda: diffuse(*problem[::2]))  # noqa: B023
    difference = max(abs(found[small] - found[name]) for name in LOOPS)
    equal = difference < LIMIT
    speedup = {name: rows[name]["seconds"] / rows[small]["seconds"] for name in LOOPS}
    print_table(report, rates, rows)
    print(", ".join(f"{factor:.1f} times faster than the {name}" for name, factor in speedup.items()))
    print(f"largest difference from the loops: {difference:.1e}, {'below' if equal else 'NOT below'} {LIMIT:.0e}")
    report |= {
        "rates": dataclasses.asdict(rates), "times": rows, "map": found, "difference": difference, "speedup": speedup, "equal": equal,
    }
    write_report("retrieval_metrics", report, args.output)
    return 0 if equal else 1


def make_problem(size: int, dim: int, device: torch.device) -> Problem:
    """Return query, its labels, gallery and its labels: (size, dim) float32 around one centre per class, (size,) int64."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(CLASSES, dim, generator=generator)
    parts = []
    for _ in range(2):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        rows = centres[labels] + 4 * torch.randn(size, dim, generator=generator)
        parts += [rows.to(device), labels.to(device)]
    return tuple(parts)


def diffuse(queries: Tensor, gallery: Tensor) -> None:
    """Rank a gallery (G, D) by diffusion for queries (N, D), from its graph on."""
    queries, gallery = (F.normalize(rows, dim=1) for rows in (queries, gallery))
    ranking = DiffusionRanking(gallery)
    for block in queries.split(BLOCK):
        ranking.scores(block)


def python_ranking(queries: Tensor, gallery: Tensor) -> Iterator[list[int]]:
    """Yield the ranking of the gallery (G, D) for every query (N, D) by its products, nothing vectorised."""
    items = gallery.tolist()
    for row in queries.tolist():
        scores = [sum(map(operator.mul, row, item)) for item in items]
        yield sorted(range(len(items)), key=scores.__getitem__, reverse=True)


def numpy_ranking(queries: Tensor, gallery: Tensor) -> list[list[int]]:
    """As `python_ranking`; scores and order come from NumPy."""
    return np.argsort(-(queries.numpy() @ gallery.numpy().T), axis=1).tolist()


LOOPS = {"double loop": python_ranking, "loop over ranks": numpy_ranking}


def loop_map(loop: str, query: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """mAP@All by a Python loop over the ranks of every query; arguments as `make_problem` returns them."""
    orders = LOOPS[loop](*(F.normalize(rows.cpu().double(), dim=1) for rows in (query, gallery)))
    labels = gallery_labels.tolist()
    return statistics.fmean(_average_precision(order, labels, label) for order, label in zip(orders, query_labels.tolist()))


def _average_precision(order: list[int], labels: list[int], label: int) -> float:
    hits, total = 0, 0.0
    for rank, item in enumerate(order, start=1):
        if labels[item] == label:
            hits += 1
            total += hits / rank
    return total / hits if hits else 0.0


if __name__ == "__main__":
    sys.exit(run_command(main))
