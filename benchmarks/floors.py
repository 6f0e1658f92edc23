"""What a measured time is held against: rates of the device, counted arithmetic and traffic; and the report of a benchmark.

The two floors of a time are FLOPs / measured matrix-product rate and bytes / measured copy rate.
"""

import argparse
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from utils.engine.device import select_device, set_threads
from utils.engine.run_log import REPOSITORY, environment, origin
from utils.evaluation.tables import align
from utils.files import atomic_write_json

SMALLEST_SIDE = 256  # of the matrix product, doubled until one takes PRODUCT_SECONDS
PRODUCT_SECONDS = 0.02
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far above the caches
RATE_REPEATS = 5

aten = torch.ops.aten
MISSED_BY_TORCH = {  # in-place products, as in the fused EdgeConv's backward pass, and products with a vector
    aten.addmm_: lambda added, left, right, **_: 2 * math.prod(left) * right[-1],
    aten.baddbmm_: lambda added, left, right, **_: 2 * math.prod(left) * right[-1],
    aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
}
WITHOUT_TRAFFIC = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
OVERWRITING = {"aten::copy_", "aten::zero_", "aten::fill_"}  # their first tensor is written, not read
INDEXED = {  # they touch the indexed rows of their first tensor only
    f"aten::{name}{suffix}" for suffix in ("", "_")
    for name in ("index", "index_select", "gather", "embedding", "_embedding_bag", "_embedding_bag_forward_only",
                 "index_put", "_index_put_impl", "index_add", "index_copy", "scatter", "scatter_add")
}


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and convolutions, a multiply-add counting 2, and bytes that operators move, see `count_work`."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device: of a square matrix product in a dtype, and of a copy in memory, read plus written."""

    dtype: str
    flops_per_second: float
    bytes_per_second: float

    def beside(self, seconds: float, work: Work) -> dict[str, float]:
        """Return a time with the work done in it, the two floors in seconds, and the share of the matrix-product rate."""
        floor = work.flops / self.flops_per_second
        return {
            "seconds": seconds, "flops": work.flops, "bytes": work.bytes, "flop_floor_seconds": floor,
            "byte_floor_seconds": work.bytes / self.bytes_per_second, "share_of_matmul_rate": floor / seconds,
        }


def measure_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Time square matrix products of growing size, and a copy; each rate is the best found."""
    side, product, rates = SMALLEST_SIDE, 0.0, []
    while product < PRODUCT_SECONDS:
        matrix = torch.randn(side, side, device=device).to(dtype)
        product = min(seconds_of(lambda: matrix @ matrix, device, RATE_REPEATS))  # noqa: B023
        rates.append(2 * side**3 / product)
        side *= 2
    size = COPIED_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), device, RATE_REPEATS))
    return Rates(str(dtype).removeprefix("torch."), max(rates), 2 * size / copy)


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Time an action `repeats` times, after one run that is not counted."""
    return [timed(action, device)[1] for _ in range(repeats + 1)][1:]


def in_turn(actions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Time actions `repeats` times, one after the other, so that what else the machine does meets all."""
    rounds = [{name: timed(action, device)[1] for name, action in actions.items()} for _ in range(repeats)]
    return {name: [seconds[name] for seconds in rounds] for name in actions}


def timed(action: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Run an action once; return what it returns, and the seconds until the device is idle."""
    wait = lambda: torch.cuda.synchronize(device) if device.type == "cuda" else None
    wait()
    start = time.perf_counter()
    result = action()
    wait()
    return result, time.perf_counter() - start


def alone(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function in a new process, for its memory and its first start; return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def memory_bytes(line: str) -> int:
    """Return a size of this process that Linux tells in /proc/self/status: VmHWM, its largest resident set, or RssAnon."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) * 1024


def count_work(action: Callable[[], object]) -> Work:
    """Run an action once and count its FLOPs and its traffic; not seen: parts under `torch.compile`, traffic of Triton kernels.

    Traffic: every operator reads its inputs and writes its outputs once; views are free, and gathers and scatters touch no
    more of the indexed tensor than they move. Tensors that stay in a cache between two operators are faster than this floor.
    """
    counter, traffic = FlopCounterMode(display=False, custom_mapping=MISSED_BY_TORCH), _TrafficCounter()
    with counter, traffic:
        action()
    return Work(counter.get_total_flops(), traffic.bytes)


class _TrafficCounter(TorchDispatchMode):
    """Adds up in `bytes` what the operators inside the block move."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(func, torch._ops.OpOverload) and not func.is_view and func._schema.name not in WITHOUT_TRAFFIC:
            self.bytes += _moved(func._schema, args, kwargs, result)
        return result


def _moved(schema: Any, args: Sequence, kwargs: Mapping, result: Any) -> int:
    """Bytes read and written by one call of an operator."""
    given = {argument.name: value for argument, value in zip(schema.arguments, args)} | dict(kwargs)
    moved, changed = [], []
    for argument in schema.arguments:
        tensors, alias = _tensors(given.get(argument.name)), argument.alias_info
        moved += tensors
        if alias is not None and alias.is_write:
            changed += tensors
            moved += [] if argument.is_out or schema.name in OVERWRITING else tensors
    moved += [tensor for tensor in _tensors(result) if not any(tensor is known for known in changed)]
    if schema.name not in INDEXED:
        return sum(map(_size, moved))
    rest = [_size(tensor) for tensor in moved if tensor is not args[0]]
    return sum(rest) + sum(min(_size(tensor), max(rest)) for tensor in moved if tensor is args[0])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor in memory; an expanded one counts what is stored."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def start(
    module: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line of `python -m benchmarks.MODULE` and set its threads; before the work, as it notes the tree's state.

    Args:
        parser: without --threads, --device and --output, which all benchmarks share; a whole number below 1 is refused.
    Returns:
        The arguments, `device` as a torch.device, and what every report begins with: the whole numbers among them and its origin.
    """
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: results/benchmarks/BENCHMARK-DEVICE.json")
    args = parser.parse_args(argv)
    numbers = {name: value for name, value in vars(args).items() if type(value) is int}
    if small := [f"--{name.replace('_', '-')}" for name, value in numbers.items() if value < 1]:
        parser.error(f"{', '.join(small)} must be at least 1")
    set_threads(args.threads)
    args.device = select_device(args.device)
    found = environment(seed=0)
    command = ["python", "-m", f"benchmarks.{module}", *(sys.argv[1:] if argv is None else argv)]
    if "--output" in command:  # where the report went changes nothing
        place = command.index("--output")
        del command[place : place + 2]
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else found["cpu"]
    return args, {
        "command": " ".join(command), **numbers, **origin(found), "device": name,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # shows a busy machine
    }


def write_report(benchmark: str, report: Mapping[str, Any], output: Path | None) -> Path:
    """Write a report as JSON to results/benchmarks/BENCHMARK-DEVICE.json or another file; print where, and return it."""
    device = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    path = output or REPOSITORY / "results" / "benchmarks" / f"{benchmark}-{device}.json"
    atomic_write_json(path, dict(report))
    print(f"written to {path}")
    return path


def print_table(
    report: Mapping[str, Any], rates: Rates, rows: Mapping[str, Mapping], columns: Iterable[tuple[str, str, str]] = (),
) -> None:
    """Print the device and one line per `Rates.beside`; columns: more of them as (title, key, format), None shown as "-"."""
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}: {rates.flops_per_second / 1e9:.1f} "
          f"GFLOP/s in {rates.dtype} matrix products, {rates.bytes_per_second / 1e9:.1f} GB/s in copies")
    shown = [("seconds", "seconds", ".4g"), *columns, ("FLOP floor s", "flop_floor_seconds", ".3g"),
             ("byte floor s", "byte_floor_seconds", ".3g"), ("of matmul rate", "share_of_matmul_rate", ".1%")]
    cells = [[name, *("-" if row[key] is None else format(row[key], style) for _, key, style in shown)] for name, row in rows.items()]
    print(align([["", *(title for title, _, _ in shown)], *cells]))
