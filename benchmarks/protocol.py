"""Both stages on prepared data, one epoch each: `python -m benchmarks.protocol [--config-dir configs/digits] [--epochs 1]`.

Runs train_step1.py and train_step2.py themselves, without MLM-only epochs and figures, in a temporary folder. The time of the whole
protocol is extrapolated from the last epoch and labelled so.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import train_step1
import train_step2
from benchmarks.floors import Rates, add_arguments, count_work, header, measure_rates, open_device, print_table, write_report
from benchmarks.training_step import count_step
from utils.engine.session import Session, run_command
from utils.settings.config import load_config
from utils.settings.options import Step1Config, Step2Config

STAGES = {"step1": (train_step1, Step1Config), "step2": (train_step2, Step2Config)}


class _Probe:
    """Stands in for the function `fit` of a training script: times the evaluations, and keeps what it was called with."""

    def __init__(self, fit: Callable[..., list[dict[str, Any]]]) -> None:
        self.fit, self.evaluation_seconds = fit, []

    def __call__(self, session: Session, learner: Any, evaluate: Callable[[], Mapping], stage: str) -> list[dict[str, Any]]:
        self.learner, self.evaluate = learner, evaluate
        self.rows = self.fit(session, learner, self._timed_evaluation, stage)
        return self.rows

    def _timed_evaluation(self) -> Mapping[str, float]:
        start = time.perf_counter()
        scores = self.evaluate()  # plain numbers: the device is done
        self.evaluation_seconds.append(time.perf_counter() - start)
        return scores


def main(argv: list[str] | None = None) -> None:
    """Run both stages, print the table and write the JSON."""
    args = _parse_arguments(argv)
    device = open_device(args)
    report = header("protocol", device, argv)
    configs = {
        stage: load_config(config_class, str(args.config_dir / f"{stage}.yaml"), args.overrides)
        for stage, (_, config_class) in STAGES.items()
    }
    rates = measure_rates(device, torch.bfloat16 if configs["step1"].run.amp else torch.float32)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, (script, _) in STAGES.items():
            probe, seconds = run_stage(script, stage, args, str(device), folder)
            figures[stage] = stage_figures(probe, seconds, configs[stage], rates)
    rows = {}
    for stage, found in figures.items():
        rows[f"{stage}, training epoch"] = found["training"]
        rows[f"{stage}, evaluation"] = found["evaluation"] | {"pairs_per_second": None}
    print_table(report, rates, rows, (("pairs/s", "pairs_per_second", ".1f"),))
    for stage, found in figures.items():
        print(f"{stage}: {found['other_seconds']:.1f} s once for loading, start, checkpoints and export; extrapolated to its "
              f"{found['epochs']} epochs with {found['evaluations']} evaluations: {found['extrapolated_seconds'] / 60:.1f} min")
    whole = sum(found["extrapolated_seconds"] for found in figures.values())
    print(f"whole protocol, extrapolated: {whole / 60:.1f} min")
    report |= {
        "config_dir": str(args.config_dir), "rates": dataclasses.asdict(rates), "stages": figures, "extrapolated_seconds": whole,
    }
    write_report(f"protocol-{args.config_dir.name}", report, args.output)


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", type=Path, default=Path("configs/digits"), help="folder of step1.yaml, step2.yaml")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
                        help="override settings that both stages know, e.g. --set data.root=DIR")
    parser.add_argument("--epochs", type=int, default=1, help="epochs to run; with more than one, clustering, compilation and "
                        "other costs of the first are not extrapolated")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    return args


def run_stage(
    script: ModuleType, stage: str, args: argparse.Namespace, device: str, folder: str
) -> tuple[_Probe, float]:
    """Call the main function of a training script with `args.epochs` epochs, each evaluated.

    Args:
        script: train_step1 or train_step2.
        stage: its name.
        args: config_dir, overrides, epochs.
        device: as in the settings.
        folder: of runs and pseudo-labels.
    Returns:
        What its `fit` was called with, and the seconds of the whole call.
    """
    stage_settings = {
        "step1": [f"run.pseudo_labels={folder}/pseudo_labels", "pla.mlm_only_epochs=0"],
        "step2": [f"rdl.pseudo_labels={folder}/pseudo_labels"],
    }[stage]
    settings = [
        *args.overrides, f"run.output={folder}/runs", f"run.device={device}", f"run.threads={torch.get_num_threads()}",
        f"optim.epochs={args.epochs}", "run.eval_every=1", "run.figures=false", *stage_settings,
    ]
    probe = _Probe(script.fit)
    start = time.perf_counter()
    with mock.patch.object(script, "fit", probe):
        script.main(["--config", str(args.config_dir / f"{stage}.yaml"), "--set", *settings])
    return probe, time.perf_counter() - start


def stage_figures(probe: _Probe, seconds: float, config: Any, rates: Rates) -> dict[str, Any]:
    """Work out the figures of one stage; trains on one more batch and evaluates once more to count their work.

    Args:
        probe: of the finished stage.
        seconds: of the whole call.
        config: the settings that the extrapolation is for.
        rates: of the device.
    Returns:
        training and evaluation: `Rates.beside` of the last epoch, the former with pairs_per_second; other_seconds: the rest
        of the call; epochs and evaluations of the configuration, and extrapolated_seconds for them.
    """
    learner = probe.learner
    training = [row["seconds/train"] for row in probe.rows]
    evaluation = statistics.median(probe.evaluation_seconds)
    other = seconds - sum(training) - sum(probe.evaluation_seconds)
    steps = max(learner.source.counts) // learner.batch_size
    pairs = steps * learner.batch_size
    epochs, every = config.optim.epochs, config.run.eval_every
    evaluations = sum(epoch == epochs or bool(every) and epoch % every == 0 for epoch in range(1, epochs + 1))
    return {
        "training": rates.beside(training[-1], count_step(learner).times(steps)) | {"pairs_per_second": pairs / training[-1]},
        "evaluation": rates.beside(evaluation, count_work(probe.evaluate)), "training_seconds": training,
        "evaluation_seconds": probe.evaluation_seconds, "other_seconds": other, "epochs": epochs, "evaluations": evaluations,
        "extrapolated_seconds": training[0] + (epochs - 1) * training[-1] + evaluations * evaluation + other,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
