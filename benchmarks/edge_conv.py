"""EdgeConv, fused (on CUDA also with Triton kernels) against reference: `python -m benchmarks.edge_conv [--points 1024]`.

Each implementation lives in its own process, for its peak memory, and they run in turn, so that what else the machine does
meets all. Forward and backward of the four DGCNN layers, neighbours given; k-NN is timed apart.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.floors import Rates, Work, count_work, measure_rates, print_table, seconds_of, start, timed, write_report
from models.kernels.edge_conv import IMPLEMENTATIONS, EdgeConv
from models.kernels.knn import knn
from utils.engine.session import run_command

LAYERS = ((3, 64), (64, 64), (64, 128), (128, 256))
KNN_CHANNELS = (3, 64, 128)
SEED = 0


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=50, help="clouds, B")
    parser.add_argument("--points", type=int, default=1024, help="points of a cloud; the reference takes 9 GB at 1024")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after one for warming up")
    args, report = start("edge_conv", parser, argv)
    args.implementations = [name for name in IMPLEMENTATIONS if name != "triton" or args.device.type == "cuda"]
    report |= {"batch": args.batch, "points": args.points, "k": args.k, "repeats": args.repeats}
    rates = measure_rates(args.device)
    runs, difference = _run_in_turn(args, rates)
    report |= {
        "rates": dataclasses.asdict(rates), "largest_relative_difference": difference, **runs, "knn": _measure_knn(args, rates),
        "speedup": runs["reference"]["seconds"] / runs["fused"]["seconds"],
        # none where the problem is too small to raise the process's peak
        "memory_ratio": runs["reference"]["peak_bytes"] / runs["fused"]["peak_bytes"] if runs["fused"]["peak_bytes"] else None,
    }
    _print_report(report, rates)
    write_report(f"edge_conv-n{args.points}", report, args.output)


def _run_in_turn(args: argparse.Namespace, rates: Rates) -> tuple[dict, dict]:
    """Time the implementations alternately; return their figures and the differences of their results."""
    context, names = multiprocessing.get_context("spawn"), args.implementations
    runs, results = {}, {}
    with contextlib.ExitStack() as stack:
        given = {name: (name, args, torch.get_num_threads()) for name in names}
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, context, _Worker.begin, given[name])) for name in names}
        rounds = [{name: workers[name].submit(_Worker.timed_step).result() for name in names} for _ in range(args.repeats + 1)]
        for name in names:
            taken = [seconds[name] for seconds in rounds[1:]]
            peak, work, results[name] = workers[name].submit(_Worker.finish).result()
            runs[name] = rates.beside(statistics.median(taken), work)
            runs[name] |= {"min_seconds": min(taken), "all_seconds": taken, "peak_bytes": peak}
    layers, inputs = _make_problem(args, "fused")
    results["float64"] = _step(layers.double(), *(tensor.double() for tensor in inputs[:2]), inputs[2])
    pairs = [(name, true) for name in names for true in ("reference", "float64") if name != true]
    return runs, {f"{found} from {true}": _difference(results[found], results[true]) for found, true in pairs}


def _make_problem(args: argparse.Namespace, implementation: str) -> tuple[nn.ModuleList, tuple[Tensor, ...]]:
    """The layers and (x, weights of the output in the loss, neighbours), the same in every process."""
    torch.manual_seed(SEED)
    layers = nn.ModuleList(EdgeConv(c_in, c_out, args.k, implementation) for c_in, c_out in LAYERS).to(args.device)
    x = torch.randn(args.batch, args.points, 3, device=args.device)
    weights = torch.randn(args.batch, args.points, LAYERS[-1][1], device=args.device)
    return layers, (x, weights, knn(x, args.k))


def _step(layers: nn.ModuleList, x: Tensor, weights: Tensor, index: Tensor) -> dict[str, Tensor]:
    """One forward and backward; returns the output and the gradients of all parameters."""
    layers.zero_grad()
    features = x
    for layer in layers:
        features = layer(features, index)
    (features * weights).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in layers.named_parameters()}
    return {"output": features.detach()} | gradients


class _Worker:
    """One implementation in a process of its own."""

    @classmethod
    def begin(cls, implementation: str, args: argparse.Namespace, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # the reference's convolution; matrix products are in float32 by default
        cls.device, (cls.layers, cls.inputs) = args.device, _make_problem(args, implementation)
        _step(cls.layers, *(tensor[:1] for tensor in cls.inputs))  # what the libraries allocate once does not count
        cls.before = _reset_peak(args.device)

    @classmethod
    def timed_step(cls) -> float:
        cls.results, seconds = timed(lambda: _step(cls.layers, *cls.inputs), cls.device)
        return seconds

    @classmethod
    def finish(cls) -> tuple[int, Work, dict[str, np.ndarray]]:
        """Return the bytes that the steps needed at most, the work of one, and the results of the last."""
        peak, results = _peak_bytes(cls.device) - cls.before, {name: tensor.cpu() for name, tensor in cls.results.items()}
        return peak, count_work(lambda: _step(cls.layers, *cls.inputs)), {name: value.numpy() for name, value in results.items()}


def _reset_peak(device: torch.device) -> int:
    """Forget the peak of what came before, where that is possible, and return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_bytes(device)


def _peak_bytes(device: torch.device) -> int:
    """Peak of GPU memory, or of the process's on Linux, which unlike getrusage's does not start at the parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1]) * 1024


def _difference(found: dict, true: dict) -> dict[str, float]:
    """Largest |found - true| / largest |true|, of the output and over the gradients, and of the latter in L2 norm.

    Single gradients jump where rounding changes which of two nearly equal neighbours wins the maximum.
    """
    largest, norms = {}, {}
    for name, value in true.items():
        value = torch.as_tensor(value).cpu().double()
        error = torch.as_tensor(found[name]).double() - value
        largest[name], norms[name] = (error.abs().max() / value.abs().max()).item(), (error.norm() / value.norm()).item()
    output = largest.pop("output")
    norms.pop("output")
    return {"output": output, "gradients": max(largest.values()), "gradients_l2": max(norms.values())}


def _measure_knn(args: argparse.Namespace, rates: Rates) -> dict[str, dict[str, float]]:
    x = torch.randn(args.batch, args.points, max(KNN_CHANNELS), device=args.device)
    figures = {}
    for channels in KNN_CHANNELS:
        search = lambda points=x[..., :channels]: knn(points, args.k)
        figures[f"k-NN, C = {channels}"] = rates.beside(min(seconds_of(search, args.device, args.repeats)), count_work(search))
    return figures


def _print_report(report: dict, rates: Rates) -> None:
    print(f"B {report['batch']}, N {report['points']}, k {report['k']}; forward and backward of four layers, median; k-NN, best")
    rows = {name: report[name] for name in IMPLEMENTATIONS if name in report}
    rows = {name: figures | {"peak_megabytes": figures["peak_bytes"] / 1e6} for name, figures in rows.items()}
    rows |= {name: figures | {"min_seconds": None, "peak_megabytes": None} for name, figures in report["knn"].items()}
    print_table(report, rates, rows, (("min s", "min_seconds", ".4g"), ("peak MB", "peak_megabytes", ".0f")))
    memory = "memory too small to measure" if report["memory_ratio"] is None else f"1/{report['memory_ratio']:.1f} of the memory"
    print(f"fused is {report['speedup']:.1f} times faster, {memory}")
    for pair, found in report["largest_relative_difference"].items():
        print(f"largest relative difference, {pair}: output {found['output']:.1e}, gradients {found['gradients']:.1e} "
              f"(L2 {found['gradients_l2']:.1e})")


if __name__ == "__main__":
    sys.exit(run_command(main))
