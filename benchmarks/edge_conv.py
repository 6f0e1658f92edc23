"""EdgeConv, fused (on CUDA also with Triton kernels) against reference: `python -m benchmarks.edge_conv [--points 1024]`.

Forward and backward of the four DGCNN layers, neighbours given, and k-NN alone. All are timed in turn, so that what else the
machine does meets all; the peak memory of an implementation is that of a process of its own.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.floors import alone, count_work, in_turn, measure_rates, memory_bytes, print_table, start, write_report
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
    names = [name for name in IMPLEMENTATIONS if name != "triton" or args.device.type == "cuda"]
    rates, features = measure_rates(args.device), torch.randn(args.batch, args.points, max(KNN_CHANNELS), device=args.device)
    actions = {name: partial(_step, *_make_problem(args, name)) for name in names}
    actions |= {f"k-NN, C = {channels}": partial(knn, features[..., :channels], args.k) for channels in KNN_CHANNELS}
    results = {name: action() for name, action in actions.items()}  # warms up
    layers, x, weights, index = _make_problem(args, "fused")
    results["float64"] = _step(layers.double(), x.double(), weights.double(), index)
    rows = {}
    for name, taken in in_turn(actions, args.device, args.repeats).items():
        rows[name] = rates.beside(statistics.median(taken), count_work(actions[name]))
        rows[name] |= {"min_seconds": min(taken), "all_seconds": taken, "peak_bytes": None}
    for name in names:
        rows[name]["peak_bytes"] = alone(_peak_bytes, args, name, torch.get_num_threads())
    pairs = [(name, true) for name in names for true in ("reference", "float64") if name != true]
    fused, reference = rows["fused"], rows["reference"]
    report |= {
        "rates": dataclasses.asdict(rates), **rows, "speedup": reference["seconds"] / fused["seconds"],
        # none where the problem is too small to raise the process's peak
        "memory_ratio": reference["peak_bytes"] / fused["peak_bytes"] if fused["peak_bytes"] else None,
        "largest_relative_difference": {f"{found} from {true}": _difference(results[found], results[true]) for found, true in pairs},
    }
    print_table(report, rates, rows, (("min s", "min_seconds", ".4g"), ("peak bytes", "peak_bytes", ".3g")))
    print("\n".join(f"{key}: {report[key]}" for key in ("speedup", "memory_ratio", "largest_relative_difference")))
    write_report(f"edge_conv-n{args.points}", report, args.output)


def _make_problem(args: argparse.Namespace, implementation: str) -> tuple[nn.ModuleList, Tensor, Tensor, Tensor]:
    """The layers, x, the weights of the output in the loss, and the neighbours; the same for every implementation."""
    torch.backends.cudnn.allow_tf32 = False  # the reference's convolution; matrix products are in float32 by default
    torch.manual_seed(SEED)
    layers = nn.ModuleList(EdgeConv(c_in, c_out, args.k, implementation) for c_in, c_out in LAYERS).to(args.device)
    x = torch.randn(args.batch, args.points, 3, device=args.device)
    weights = torch.randn(args.batch, args.points, LAYERS[-1][1], device=args.device)
    return layers, x, weights, knn(x, args.k)


def _step(layers: nn.ModuleList, x: Tensor, weights: Tensor, index: Tensor) -> dict[str, Tensor]:
    """One forward and backward; returns the output and the gradients of all parameters."""
    layers.zero_grad()
    features = x
    for layer in layers:
        features = layer(features, index)
    (features * weights).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in layers.named_parameters()}
    return {"output": features.detach()} | gradients


def _peak_bytes(args: argparse.Namespace, implementation: str, threads: int) -> int:
    """Return the bytes that a step needs at most in this process: of the GPU's memory, or of the process's on Linux."""
    torch.set_num_threads(threads)
    layers, *inputs = _make_problem(args, implementation)
    _step(layers, *(tensor[:1] for tensor in inputs))  # what the libraries allocate once does not count
    cuda = args.device.type == "cuda"
    peak = lambda: torch.cuda.max_memory_allocated(args.device) if cuda else memory_bytes("VmHWM")
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    with contextlib.suppress(OSError):  # forgets the peak of what came before, where that is possible
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak()
    _step(layers, *inputs)
    return peak() - before


def _difference(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest |found - true| / largest |true|, of the output and over the gradients, and of the latter in L2 norm.

    Single gradients jump where rounding changes which of two nearly equal neighbours wins the maximum.
    """
    largest, norms = {}, {}
    for name, value in true.items():
        error = found[name].double() - value.double()
        largest[name], norms[name] = (error.abs().max() / value.abs().max()).item(), (error.norm() / value.double().norm()).item()
    output = largest.pop("output")
    norms.pop("output")
    return {"output": output, "gradients": max(largest.values()), "gradients_l2": max(norms.values())}


if __name__ == "__main__":
    sys.exit(run_command(main))
