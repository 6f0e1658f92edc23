"""Old / new: the hot paths of two checkouts, timed in turns: `python -m benchmarks.against OLD [--counts 1 2] [--repeats 7]`.

OLD is the folder of another checkout, e.g. made by `git worktree add OLD COMMIT`. One process per checkout does the work when it
is told to, so that both meet the same noise. What both return is compared before any time is taken. Floors are those of this
checkout, see `benchmarks.floors`.
"""

import argparse
import importlib
import itertools
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent.parent
TOLERANCE = 2e-3  # relative, of a sum over many rounded terms
BATCH = 128
STEP = [  # one step of step 1 that both checkouts can run: one view, no warp, K and the banks as before
    "data.modalities=[GrayImg,PointCloud]", f"optim.batch_size={BATCH}", "model.image_stages=3", "pla.num_clusters=20",
    "pla.memory_samples=0", "pla.lambda_1=0.5",
]
STEP_NEW = [
    "data.views={}", "data.augment.image_elastic=0", "data.augment.point_warp=0", "data.eval_subsets=1", "pla.fuse=none",
    "pla.mlm_only_epochs=0",
]
STEP_OLD = ["pla.warmup_epochs=0"]


def moved(*names: str) -> Any:
    """Return the first of these modules that this checkout has."""
    for name in names[:-1]:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return importlib.import_module(names[-1])


def knn_case(points: int, k: int, channels: int) -> Callable[[], Tensor]:
    """k nearest neighbours in BATCH clouds, or 16 of 1,024 points; returns the sum of the squared distances found."""
    knn = moved("models.kernels.knn", "models.knn").knn
    x = torch.randn(BATCH if points < 1024 else 16, points, channels)

    def run() -> Tensor:
        index = knn(x, k)
        near = torch.stack([cloud[rows] for cloud, rows in zip(x, index)])
        return (near - x[:, :, None]).square().sum()

    run.timed = lambda: knn(x, k)
    return run


def dgcnn_case(points: int, k: int) -> Callable[[], Tensor]:
    """DGCNN of width 128, forward and backward on BATCH clouds; returns the sum of the absolute gradients."""
    from models import DGCNN

    return encoder_case(DGCNN(128, k, 128), torch.randn(BATCH, points, 3))


def meshnet_case(faces: int) -> Callable[[], Tensor]:
    """MeshNet of the CPU configurations, forward and backward on 64 meshes."""
    from models import MeshNet

    rows = torch.randn(64, faces, 18)
    rows[..., 12:15] = torch.nn.functional.normalize(rows[..., 12:15], dim=2)  # others would make the Gaussians denormal numbers
    rows[..., 15:] = torch.randint(faces, (64, faces, 3)).float()
    return encoder_case(MeshNet(128, 128, 0.0, 64), rows)


def encoder_case(encoder: torch.nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of an encoder under a fixed quadratic loss."""
    target = torch.randn(len(inputs), 128)

    def run() -> Tensor:
        encoder.zero_grad()
        (encoder(inputs) - target).square().mean().backward()
        return sum(parameter.grad.abs().sum() for parameter in encoder.parameters())

    return run


def step_case() -> Callable[[], float]:
    """Step 1 as `configs/mnist3d_cpu` had it, epochs of one step: fetch, augment, both encoders, losses, Adam, bank; returns its loss."""
    samples, options = moved("datasets.samples"), moved("utils.settings.options", "utils.options")
    from train_step1 import PLALearner

    new = "mlm_only_epochs" in options.PLAConfig.__dataclass_fields__
    config = moved("utils.settings.config", "utils.config").load_config(
        options.Step1Config, "configs/mnist3d_cpu/step1.yaml", STEP + (STEP_NEW if new else STEP_OLD)
    )
    arrays = {"GrayImg": torch.randint(256, (BATCH, 1, 3, 36, 36), dtype=torch.uint8), "PointCloud": torch.randn(BATCH, 1, 2048, 3)}
    learner = PLALearner(config, samples.PairedSamples({}, arrays), torch.device("cpu"))
    learner.train_epoch(1)  # it begins with k-means
    epochs = itertools.count(2)
    return lambda: sum(value for name, value in learner.train_epoch(next(epochs)).items() if "loss" in name)


def evaluation_case() -> Callable[[], float]:
    """mAP@All of 10,000 queries in a gallery of 10,000."""
    metrics = moved("utils.evaluation.metrics", "utils.metrics")
    rows, labels = torch.randn(2, 10_000, 128), torch.randint(10, (2, 10_000))
    return lambda: metrics.mean_average_precision(rows[0], labels[0], rows[1], labels[1])


def splat_case() -> Callable[[], float]:
    """Six pictures of 112 pixels of a cloud of 2,048 points, as preparation draws them; returns a sum that any byte changes."""
    render = moved("datasets.prepare.shapes.render", "datasets.rendering")
    points = (torch.nn.functional.normalize(torch.randn(2048, 3), dim=1) * torch.tensor([1.0, 0.7, 0.5])).double().numpy()
    cameras, weights = render.ring_of_cameras(6, 30.0), torch.rand(6 * 112 * 112 * 3, dtype=torch.float64)
    return lambda: weights @ torch.from_numpy(render.splat_views(points, cameras, 112)).flatten().double()


CASES: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {  # name -> what makes it, runs per timing
    "k-NN, 128 points, k 8": (lambda: knn_case(128, 8, 64), 5),
    "k-NN, 256 points, k 10": (lambda: knn_case(256, 10, 64), 3),
    "k-NN, 1,024 points, k 20": (lambda: knn_case(1024, 20, 64), 2),
    "DGCNN, 128 points, k 8": (lambda: dgcnn_case(128, 8), 3),
    "DGCNN, 256 points, k 10": (lambda: dgcnn_case(256, 10), 3),
    "MeshNet, 64 meshes of 500 faces": (lambda: meshnet_case(500), 3),
    "training step, both encoders": (step_case, 3),
    "evaluation, 10,000 x 10,000": (evaluation_case, 1),
    "six splat pictures of 112 px": (splat_case, 3),
}


def enter(folder: str, threads: int) -> None:
    """Make this process one of a checkout."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.set_num_threads(threads)
    getattr(moved("utils.engine.device", "utils.device"), "keep_freed_memory", int)()  # as a session of this checkout does, if it does


HELD: dict[str, Callable[[], Any]] = {}  # one case at a time


def made(case: str) -> Callable[[], Any]:
    """Make what a case runs."""
    if case not in HELD:
        HELD.clear()
        torch.manual_seed(0)
        HELD[case] = CASES[case][0]()
    return HELD[case]


def value(case: str) -> float:
    """Return what a run of a case gives."""
    return float(made(case)())


def seconds(case: str) -> float:
    """Return the seconds of a run of a case."""
    run, runs = made(case), CASES[case][1]
    timed, begin = getattr(run, "timed", run), time.perf_counter()
    for _ in range(runs):
        timed()
    return (time.perf_counter() - begin) / runs


def beside(case: str, taken: float) -> dict[str, float]:
    """Return the seconds of a case with the two floors, see `Rates.beside`."""
    from benchmarks.floors import count_work, measure_rates

    run = made(case)
    return measure_rates(torch.device("cpu")).beside(taken, count_work(getattr(run, "timed", run)))


def compare(case: str, old: Executor, new: Executor, repeats: int) -> dict[str, Any]:
    """Compare what both processes return for a case, then time it in turns."""
    values = [side.submit(value, case).result() for side in (old, new)]
    times: dict[Executor, list[float]] = {old: [], new: []}
    for _ in range(repeats):
        for side, taken in times.items():
            taken.append(side.submit(seconds, case).result())
    before, after = map(statistics.median, times.values())
    return {
        "old_value": values[0], "new_value": values[1], "equal": math.isclose(*values, rel_tol=TOLERANCE),
        "old_seconds": times[old], "new_seconds": times[new], "ratio": before / after, **new.submit(beside, case, after).result(),
    }


def main(argv: list[str] | None = None) -> int:
    """Compare, print the table, write the JSON; return 1 if any pair of results differs."""
    from benchmarks.floors import start, write_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side, of which the median counts")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    args, report = start("against", parser, argv)
    found, context = {}, multiprocessing.get_context("spawn")
    for threads in args.counts:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes
        old, new = (ProcessPoolExecutor(1, context, enter, (str(folder), threads)) for folder in (args.old.resolve(), HERE))
        with old, new:
            for case in args.cases:
                row = found[f"{case}, {threads} thread{'s' * (threads > 1)}"] = compare(case, old, new, args.repeats)
                print(f"{case:34s} {threads} threads: {statistics.median(row['old_seconds']):8.4f} -> {row['seconds']:8.4f} s, "
                      f"{row['ratio']:.2f}x, floors {row['flop_floor_seconds']:.4f} s (FLOP) {row['byte_floor_seconds']:.4f} s (bytes), "
                      f"results {'equal' if row['equal'] else 'DIFFER'}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=args.old, capture_output=True, text=True, check=True).stdout.strip()
    write_report("against", {**report, "command": report["command"].replace(str(args.old), "OLD"), "old_commit": commit, "cases": found,
                             "old_over_new": {case: row["ratio"] for case, row in found.items()}}, args.output)
    return 0 if all(row["equal"] for row in found.values()) else 1


if __name__ == "__main__":
    from utils.engine.session import run_command

    sys.exit(run_command(main))
