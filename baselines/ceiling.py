"""What the encoders reach with the training set's ground truth: `python -m baselines.ceiling --config FILE --points 128 256 512`.

Step 2 with true labels in place of pseudo-labels, and cross-entropy alone. It learns from labels, so its scores are no result of
RoMo: they say how far pseudo-labels could lead encoders of this size, and with which number of points.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from baselines.release_protocol.labels import training_labels
from datasets.label_runs import PseudoLabels
from datasets.samples import describe_samples, load_test_samples, load_training_samples
from models.build import load_pretrained
from train_step2 import RDLLearner
from utils.engine.checkpoint import atomic_write_json
from utils.engine.device import select_device, set_threads
from utils.engine.run_log import environment
from utils.engine.seed import seed_everything, set_deterministic
from utils.engine.session import run_command
from utils.evaluation.tables import align, retrieval_table
from utils.modalities import MODALITIES
from utils.settings.config import load_config, to_dict
from utils.settings.options import Step2Config

SUPERVISED = ("rdl.loss=ce", "rdl.lambda_2=1", "rdl.start=fresh")


def measure(config: Step2Config, device: torch.device) -> dict[str, float]:
    """Train every modality's encoder and classifier with the true labels, and score the test set.

    Returns:
        "accuracy/P" ... by letter of the modality, "map/GP", "map/PP" ... of the embeddings, fractions.
    """
    seed_everything(config.run.seed)
    samples = load_training_samples(config.data, device)
    labels = training_labels(config.data, samples)
    test, truth = load_test_samples(config.data, device, samples)
    classes = 1 + max(int(values.max()) for values in (*labels.values(), *truth.values()))
    learner = RDLLearner(config, samples, PseudoLabels(labels, None, classes, {}, {}), device)
    load_pretrained(learner.encoders, config.model.pretrained)
    for epoch in range(1, config.optim.epochs + 1):
        losses = learner.train_epoch(epoch)
        print(f"{config.data.num_points} points, epoch {epoch}/{config.optim.epochs}: loss {losses['loss/ce']:.4f}", flush=True)
    features = describe_samples(learner.encoders, learner.classifiers, test, config.data, device)
    right = {name: values.posteriors.argmax(dim=1).cpu() == truth[name] for name, values in features.items()}
    table = retrieval_table({name: values.embeddings for name, values in features.items()}, truth, within=True)
    return {
        **{f"accuracy/{MODALITIES[name].letter}": float(hits.float().mean()) for name, hits in right.items()},
        **{key: value for key, value in table.items() if key.startswith("map/")},
    }


def main(argv: list[str] | None = None) -> None:
    """Measure every number of points, print one table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True, help="a step2.yaml")
    parser.add_argument("--points", type=int, nargs="+", required=True, help="points per cloud, one training each")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="further settings")
    parser.add_argument("--output", type=Path, default=Path("runs/ceiling.json"), help="where the record goes")
    arguments = parser.parse_args(argv)
    load = lambda points: load_config(Step2Config, arguments.config, [*arguments.overrides, *SUPERVISED, f"data.num_points={points}"])
    configs = {points: load(points) for points in arguments.points}  # all of them are checked before the first is trained
    config = configs[arguments.points[0]]
    device = select_device(config.run.device)
    set_threads(config.run.threads)
    set_deterministic(config.run.deterministic)
    record: dict[str, Any] = {**environment(config.run.seed), "settings": to_dict(config), "by_points": {}}
    for points, chosen in configs.items():
        record["by_points"][str(points)] = scores = measure(chosen, device)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(arguments.output, record)
    rows = [[f"{points} points", *(f"{100 * value:.1f}" for value in found.values())] for points, found in record["by_points"].items()]
    print(align([["test set [%], trained with the TRUE labels", *scores], *rows]))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
