"""EdgeConv, fused against reference: `python -m benchmarks.edge_conv [--points 1024] [--batch 50] [--k 20]`.

Each implementation lives in its own process, for its peak memory, and the two run in turn, so that what else the
machine does meets both. Forward and backward of the four DGCNN layers, neighbours given; k-NN is timed apart.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from models.edge_conv import IMPLEMENTATIONS, EdgeConv, knn

LAYERS = ((3, 64), (64, 64), (64, 128), (128, 256))
SEED = 0


def main() -> None:
    """Run the benchmark, print the table and write the JSON."""
    args = _parse_arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs, difference = _run_in_turn(args, Path(folder))
    x = torch.randn(args.batch, args.points, LAYERS[-1][0], device=args.device)
    report = {
        "command": "python -m benchmarks.edge_conv " + " ".join(sys.argv[1:]), "torch": torch.__version__,
        "device": _device_name(args.device), "threads": args.threads, "batch": args.batch, "points": args.points,
        "k": args.k, "repeats": args.repeats, "floors": _floors(args), "largest_relative_difference": difference,
        "knn_seconds": {str(c): _seconds(lambda c=c: knn(x[..., :c], args.k), args.device) for c in (3, 64, 128)},
    } | runs
    report["speedup"] = runs["reference"]["median_seconds"] / runs["fused"]["median_seconds"]
    report["memory_ratio"] = runs["reference"]["peak_bytes"] / runs["fused"]["peak_bytes"]
    _print_table(report)
    name = f"edge_conv_{report['device']}_n{args.points}.json".replace(" ", "-").replace("/", "-")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / name).write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.out / name}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=50, help="clouds, B")
    parser.add_argument("--points", type=int, default=1024, help="points of a cloud; the reference takes 9 GB at 1024")
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after one for warming up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    return parser.parse_args()


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _run_in_turn(args: argparse.Namespace, folder: Path) -> tuple[dict, dict]:
    """Time the implementations alternately; return their figures and the differences of their results."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in IMPLEMENTATIONS:
        pipes[name], other = context.Pipe()
        processes.append(context.Process(target=_worker, args=(other, name, args, folder / f"{name}.pt"), daemon=True))
        processes[-1].start()
    seconds = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(args.repeats + 1):
        for name in IMPLEMENTATIONS:
            pipes[name].send("step")
            seconds[name].append(pipes[name].recv())
    runs = {}
    for name in IMPLEMENTATIONS:
        pipes[name].send("stop")
        timed = seconds[name][1:]
        runs[name] = {"median_seconds": statistics.median(timed), "min_seconds": min(timed), "all_seconds": timed,
                      "peak_bytes": pipes[name].recv()}
    for process in processes:
        process.join()
    results = {name: torch.load(folder / f"{name}.pt") for name in IMPLEMENTATIONS}
    layers, inputs = _make_problem(args, "fused")
    results["float64"] = _step(layers.double(), *(tensor.double() for tensor in inputs[:2]), inputs[2])
    pairs = (("fused", "reference"), ("fused", "float64"), ("reference", "float64"))
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


def _worker(pipe: Connection, implementation: str, args: argparse.Namespace, path: Path) -> None:
    """Answer every "step" with the seconds of one forward and backward; then save results and send the peak memory."""
    torch.set_num_threads(args.threads)
    layers, inputs = _make_problem(args, implementation)
    before, results = _peak_bytes(args.device), {}
    while pipe.recv() == "step":
        start = time.perf_counter()
        results = _step(layers, *inputs)
        _synchronize(args.device)
        pipe.send(time.perf_counter() - start)
    peak = _peak_bytes(args.device) - before
    torch.save({name: tensor.cpu() for name, tensor in results.items()}, path)
    pipe.send(peak)


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _difference(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest |found - true| / largest |true|, of the output and over the gradients, and of the latter in L2 norm.

    Single gradients jump where rounding changes which of two nearly equal neighbours wins the maximum.
    """
    output, gradients, norms = 0.0, 0.0, 0.0
    for name, value in true.items():
        value = value.cpu().double()
        error = found[name].cpu().double() - value
        largest = (error.abs().max() / value.abs().max()).item()
        if name == "output":
            output = largest
        else:
            gradients, norms = max(gradients, largest), max(norms, (error.norm() / value.norm()).item())
    return {"output": output, "gradients": gradients, "gradients_l2": norms}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _seconds(action: Callable[[], object], device: str, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _floors(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds that the arithmetic and the traffic alone would take at this machine's measured rates.

    Arithmetic counts the matrix products of forward and backward (twice the forward). Traffic counts, in float32 and
    once per pass over it, the edge tensors of the reference (2C in, four of C_out) and, for the fused one, the gathered
    doubles and some ten point tensors; the backward again counts twice.
    """
    a = torch.randn(2048, 2048, device=args.device)
    matmul_rate = 2 * 2048**3 / _seconds(lambda: a @ a, args.device)
    source = torch.randn(2**26, device=args.device)
    target = torch.empty_like(source)
    byte_rate = 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), args.device)
    points = args.batch * args.points
    edges = points * args.k
    flops = {"reference": sum(3 * 2 * edges * 2 * c * o for c, o in LAYERS),
             "fused": sum(points * (3 * 2 * 2 * c * o + 2 * 7 * c * c) for c, o in LAYERS)}
    moved = {"reference": sum(3 * 4 * edges * (2 * c + 4 * o) for c, o in LAYERS),
             "fused": sum(8 * edges * o + 3 * 4 * points * 10 * max(c, o) for c, o in LAYERS)}
    return {name: {"flops": flops[name], "bytes": moved[name], "arithmetic_seconds": flops[name] / matmul_rate,
                   "traffic_seconds": moved[name] / byte_rate} for name in IMPLEMENTATIONS}


def _print_table(report: dict) -> None:
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}; "
          f"B {report['batch']}, N {report['points']}, k {report['k']}; forward and backward of four layers")
    print(f"{'':10} {'median s':>9} {'min s':>8} {'peak MB':>8} {'FLOP floor s':>13} {'byte floor s':>13}")
    for name in IMPLEMENTATIONS:
        run, floor = report[name], report["floors"][name]
        print(f"{name:10} {run['median_seconds']:9.3f} {run['min_seconds']:8.3f} {run['peak_bytes'] / 1e6:8.0f} "
              f"{floor['arithmetic_seconds']:13.3f} {floor['traffic_seconds']:13.3f}")
    print(f"fused is {report['speedup']:.1f} times faster in 1/{report['memory_ratio']:.1f} of the memory")
    for pair, found in report["largest_relative_difference"].items():
        print(f"largest relative difference, {pair}: output {found['output']:.1e}, gradients {found['gradients']:.1e} "
              f"(L2 {found['gradients_l2']:.1e})")
    print("k-NN s: " + ", ".join(f"{seconds:.3f} at C = {c}" for c, seconds in report["knn_seconds"].items()))


if __name__ == "__main__":
    main()
