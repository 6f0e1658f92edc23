"""Both stages on prepared data, one epoch each: `python -m benchmarks.protocol [--config-dir configs/digits] [--epochs 1]`.

Runs train_step1.py and train_step2.py themselves, without MLM-only epochs and figures, in a temporary folder, and then the
evaluation alone. The time of the whole protocol is extrapolated from the last epoch and labelled so.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import evaluate
import train_step1
import train_step2
from benchmarks.floors import start, timed, write_report
from utils.engine.session import run_command
from utils.settings.config import load_config
from utils.settings.options import CONFIGS

STAGES = {"step1": train_step1, "step2": train_step2}


def run_stage(stage: str, config_dir: Path, out: Path, labels: Path, settings: list[str]) -> tuple[Path, list[dict[str, Any]]]:
    """Train a stage with pseudo-labels in `labels`; return its run folder below `out` and its epochs."""
    own = [f"run.pseudo_labels={labels}"] if stage == "step1" else [f"rdl.pseudo_labels={labels}", "rdl.start=fresh"]
    settings = [f"run.output={out}", "run.figures=false", *own, *settings]
    STAGES[stage].main(["--config", str(config_dir / f"{stage}.yaml"), "--set", *settings])
    (metrics,) = out.glob(f"*/{stage}/*/metrics.jsonl")
    return metrics.parent, [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def main(argv: list[str] | None = None) -> None:
    """Run both stages, print their times and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", type=Path, default=Path("configs/digits"), help="folder of step1.yaml, step2.yaml")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
                        help="override settings that both stages know, e.g. --set data.root=DIR")
    parser.add_argument("--epochs", type=int, default=1, help="epochs to run; with more than one, clustering, compilation and "
                        "other costs of the first are not extrapolated")
    args, report = start("protocol", parser, argv, ("epochs",))
    with tempfile.TemporaryDirectory() as folder:
        figures = {stage: measure_stage(stage, args, Path(folder)) for stage in STAGES}
    for stage, found in figures.items():
        print(f"{stage}: {found['training_seconds'][-1]:.1f} s for an epoch, {found['evaluation_seconds']:.1f} s for an "
              f"evaluation, {found['other_seconds']:.1f} s once; extrapolated to its {found['epochs']} epochs with "
              f"{found['evaluations']} evaluations: {found['extrapolated_seconds'] / 60:.1f} min")
    whole = sum(found["extrapolated_seconds"] for found in figures.values())
    print(f"whole protocol, extrapolated: {whole / 60:.1f} min")
    report |= {"config_dir": str(args.config_dir), "stages": figures, "extrapolated_seconds": whole}
    write_report(f"protocol-{args.config_dir.name}", report, args.output)


def measure_stage(stage: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train a stage, step 2 on the pseudo-labels that step 1 left in the folder, and evaluate it once more.

    Returns:
        training_seconds of every epoch; evaluation_seconds, loading included; other_seconds: the rest of the training script;
        epochs and evaluations of the configuration, and extrapolated_seconds for them.
    """
    config = load_config(CONFIGS[stage], str(args.config_dir / f"{stage}.yaml"), args.overrides)
    mlm_only = ["pla.mlm_only_epochs=0"] if stage == "step1" and config.pla.mlm_only_epochs != "all" else []
    settings = [*args.overrides, *mlm_only, f"run.device={args.device}", f"run.threads={torch.get_num_threads()}",
                f"optim.epochs={args.epochs}", "run.eval_every=0"]
    train = lambda: run_stage(stage, args.config_dir, folder / "runs", folder / "pseudo_labels", settings)
    (run, rows), whole = timed(train, args.device)
    _, evaluation = timed(lambda: evaluate.main(["--run", str(run), "--device", str(args.device)]), args.device)
    training = [row["seconds/train"] for row in rows]
    other = max(0.0, whole - sum(training) - evaluation)
    epochs, every = config.optim.epochs, config.run.eval_every
    evaluations = sum(epoch == epochs or bool(every) and epoch % every == 0 for epoch in range(1, epochs + 1))
    return {
        "training_seconds": training, "evaluation_seconds": evaluation, "other_seconds": other, "epochs": epochs,
        "evaluations": evaluations,
        "extrapolated_seconds": training[0] + (epochs - 1) * training[-1] + evaluations * evaluation + other,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
