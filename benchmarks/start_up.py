"""Start of a training on many objects: `python -m benchmarks.start_up --objects 20000 [--points 2048] [--size 64] [--batches 100]`.

Fabricates clouds and pictures, then measures twice in a process of its own what precedes the first step (lists, arrays, their
fingerprints) and the batches after it: the first start, which reads every file, and a later one.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.floors import alone, memory_bytes, start, write_report
from datasets.batches import BatchSource
from datasets.lists import default_list_path
from datasets.samples import load_training_samples
from utils.engine.learner import plan_epoch
from utils.engine.seed import BatchGenerator
from utils.engine.session import run_command
from utils.settings.data_options import DataConfig

BATCH, CPU = 128, torch.device("cpu")


def fabricate(root: Path, objects: int, points: int, size: int) -> None:
    """Write a training list of random gray pictures and one of random clouds, with their files."""
    generator = np.random.default_rng(0)
    for modality, folder, suffix in (("GrayImg", "gray_imgs", "png"), ("PointCloud", "point_cloud", "npy")):
        (root / "train" / folder).mkdir(parents=True)
        names = [f"train/{folder}/{modality}_train_{number:07d}.{suffix}" for number in range(objects)]
        for name in names:
            if suffix == "npy":
                np.save(root / name, generator.standard_normal((points, 3), dtype=np.float32))
            else:
                Image.fromarray(generator.integers(256, size=(size, size), dtype=np.uint8)).save(root / name, compress_level=0)
        default_list_path(root, "fabricated", modality, "train").write_text("".join(f"{name} 0\n" for name in names), encoding="utf-8")


def measure(data: DataConfig, batches: int) -> dict[str, float]:
    """Start once: time to the first batch, batches (fetched and augmented) per second, and memory of this process.

    Returns:
        start_seconds, batches_per_second, the same in CPU time (a busy machine shares its cores), peak_mib (largest resident set, pages
        of mapped files included), private_mib (at the end, without them).
    """
    clock = lambda: np.array([time.perf_counter(), time.process_time()])
    began = clock()
    samples = load_training_samples(data, CPU)
    for name, array in samples.arrays.items():
        if name not in samples.fingerprints:
            hashlib.sha256(array.numpy()).hexdigest()
    started = clock()
    source, numbers = BatchSource(samples, data, CPU), torch.Generator().manual_seed(0)
    plan = islice(plan_epoch(source.counts, source.stored_views, source.views, BATCH, numbers), batches)
    count = sum(1 for _, raw in source.fetch(plan) if source.augment(raw, BatchGenerator(numbers)))
    (seconds, cpu), (running, running_cpu) = started - began, clock() - started
    return {
        "start_seconds": seconds, "start_cpu_seconds": cpu, "batches_per_second": count / running,
        "batches_per_cpu_second": count / running_cpu,
        "peak_mib": memory_bytes("VmHWM") / 2**20, "private_mib": memory_bytes("RssAnon") / 2**20,
    }


def main(argv: list[str] | None = None) -> None:
    """Fabricate, measure, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"objects": (20000, "N"), "points": (2048, "per cloud"), "size": (64, "pixels"), "batches": (100, f"of {BATCH}")}
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    args, report = start("start_up", parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        fabricate(Path(folder), args.objects, args.points, args.size)
        data = DataConfig(
            dataset="fabricated", root=folder, modalities=("GrayImg", "PointCloud"), image_size=args.size, image_resize=args.size,
            num_points=min(128, args.points), workers=0,
        )
        for title in ("first start", "later start"):
            report[title] = found = alone(measure, data, args.batches)
            print(f"{title}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    write_report("start_up", report, args.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
