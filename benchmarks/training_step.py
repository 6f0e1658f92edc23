"""Pairs per second of both stages: `python -m benchmarks.training_step [--config-dir configs/mnist3d_cpu] [--steps 8]`.

Random samples of the shapes that the configuration names, so no data is needed. Whole epochs are timed after one for
warming up, which holds the k-means of step 1; the share spent on fetching and augmenting data comes from another epoch.
"""

import argparse
import dataclasses
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.floors import Rates, Work, count_work, measure_rates, print_table, start, timed, write_report
from datasets.arrays import MAX_POINTS
from datasets.label_runs import PseudoLabels
from datasets.samples import PairedSamples
from train_step1 import PLALearner
from train_step2 import RDLLearner
from utils.engine.learner import StageLearner
from utils.engine.seed import seed_everything, set_deterministic
from utils.engine.session import run_command
from utils.modalities import FACE_CHANNELS, MODALITIES
from utils.settings.config import SET, load_config
from utils.settings.options import Step1Config, Step2Config

SEED, CLUSTERS = 0, 20  # random samples have no clusters to be found
COLUMNS = (("pairs/s", "pairs_per_second", ".1f"), ("waiting for data", "share_waiting_for_data", ".1%"))


def main(argv: list[str] | None = None) -> None:
    """Time both stages, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", type=Path, default=Path("configs/mnist3d_cpu"), help="folder of step1.yaml, step2.yaml")
    parser.add_argument("--set", **SET, help="override settings that both stages know, e.g. --set run.amp=true")
    parser.add_argument("--steps", type=int, default=8, help="steps of an epoch; with data.placement=host, enough to "
                        "outweigh the start of the workers")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs, of which the median counts")
    args, report = start("training_step", parser, argv)
    own = [f"pla.num_clusters={CLUSTERS}", "pla.mlm_only_epochs=0", "pla.recluster_every=0"]
    first = load_config(Step1Config, str(args.config_dir / "step1.yaml"), [*args.overrides, *own])
    second = load_config(Step2Config, str(args.config_dir / "step2.yaml"), args.overrides)
    set_deterministic(first.run.deterministic)
    rates = measure_rates(args.device, torch.bfloat16 if first.run.amp else torch.float32)
    stages = {
        "step1": measure_stage(PLALearner(first, random_samples(first, args), args.device), args.epochs, rates),
        "step2": measure_stage(make_step2(second, args), args.epochs, rates),
    }
    print_table(report, rates, {f"{stage}, one step": figures for stage, figures in stages.items()}, COLUMNS)
    report |= {"config_dir": str(args.config_dir), "rates": dataclasses.asdict(rates), "stages": stages}
    write_report(f"training_step-{args.config_dir.name}", report, args.output)


def make_step2(config: Step2Config, args: argparse.Namespace) -> RDLLearner:
    """Return the learner of step 2 on random samples and pseudo-labels."""
    samples = random_samples(config, args)
    labels = {name: torch.randint(CLUSTERS, (len(array),)) for name, array in samples.arrays.items()}
    return RDLLearner(config, samples, PseudoLabels(labels, None, CLUSTERS, {}, {}), args.device)


def random_samples(config: Step1Config | Step2Config, args: argparse.Namespace) -> PairedSamples:
    """Make `args.steps` batches of random samples in the shapes of `PairedSamples`, without list files.

    Pictures are as large as before the crop; clouds have as many points as the loader keeps.
    """
    seed_everything(SEED)
    data, count, side = config.data, args.steps * config.optim.batch_size, config.data.image_resize
    device = torch.device("cpu") if data.placement == "host" else args.device
    makers = {
        "image": lambda: torch.randint(256, (count, data.num_views, 3, side, side), dtype=torch.uint8),
        "points": lambda: torch.rand(count, 1, max(MAX_POINTS, data.num_points), 3) - 0.5,
        "mesh": lambda: _random_faces(count, data.max_faces),
    }
    return PairedSamples({}, {name: makers[MODALITIES[name].kind]().to(device) for name in data.modalities})


def _random_faces(count: int, faces: int) -> Tensor:
    array = torch.randn(count, 1, faces, FACE_CHANNELS)
    array[..., 15:] = torch.randint(faces, (count, 1, faces, 3))  # the neighbours across the edges
    return array


def measure_stage(learner: StageLearner, epochs: int, rates: Rates) -> dict[str, Any]:
    """Time whole epochs of a learner, then count the work of one, with the encoders not compiled.

    Returns:
        `Rates.beside` of one step, pairs_per_second, share_waiting_for_data, batch_size, steps_per_epoch, epoch_seconds.
    """
    train, batch, device = learner.train_epoch, learner.batch_size, learner.device
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*joint clusters hold none")  # random samples have no clusters
        train(1)
    times = [timed(partial(train, epoch), device)[1] for epoch in range(2, 2 + epochs)]
    steps, seconds = max(learner.source.counts) // batch, statistics.median(times)
    with mock.patch.object(learner, "forwards", list(learner.encoders.values())):
        work = count_work(partial(train, 2 + epochs))
    return rates.beside(seconds / steps, Work(work.flops // steps, work.bytes // steps)) | {
        "pairs_per_second": steps * batch / seconds, "share_waiting_for_data": _share_of_data(learner, 3 + epochs),
        "batch_size": batch, "steps_per_epoch": steps, "epoch_seconds": times,
    }


def _share_of_data(learner: StageLearner, epoch: int) -> float:
    """Train one epoch; return the share of its time until batches are fetched and augmented."""
    spent, fetch, augment = [], learner.source.fetch, learner.source.augment

    def spend(action: Callable[..., Any], *given: Any) -> Any:
        result, seconds = timed(lambda: action(*given), learner.device)
        spent.append(seconds)
        return result

    def timed_fetch(plan: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        batches = iter(fetch(plan))
        return iter(lambda: spend(next, batches, None), None)

    with mock.patch.multiple(learner.source, fetch=timed_fetch, augment=partial(spend, augment)):
        _, seconds = timed(lambda: learner.train_epoch(epoch), learner.device)
    return sum(spent) / seconds


if __name__ == "__main__":
    sys.exit(run_command(main))
