"""What the encoders reach with the training set's ground truth: `python -m baselines.ceiling --config FILE --points 128 256 512`.

Step 2 with true labels in place of pseudo-labels, and cross-entropy alone. It learns from labels, so its scores are no result of
RoMo: they say how far pseudo-labels could lead encoders of this size, and with which number of points.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from baselines.true_labels import count_classes, learn, prepare_device, true_labels
from datasets.label_runs import PseudoLabels
from datasets.samples import load_test_samples, load_training_samples
from models.build import load_pretrained
from train_step2 import RDLLearner
from utils.engine.run_log import environment
from utils.engine.seed import seed_everything
from utils.engine.session import run_command
from utils.evaluation.tables import align, retrieval_table
from utils.files import atomic_write_json
from utils.modalities import MODALITIES
from utils.settings.config import SET, load_config, to_dict
from utils.settings.options import Step2Config

SUPERVISED = ("rdl.loss=ce", "rdl.lambda_2=1", "rdl.start=fresh")


def measure(config: Step2Config, device: torch.device) -> dict[str, float]:
    """Train every modality's encoder and classifier with the true labels, and score the test set.

    Returns:
        "accuracy/P" ... by letter of the modality, "map/GP", "map/PP" ... of the embeddings, fractions.
    """
    seed_everything(config.run.seed)
    samples = load_training_samples(config.data, device)
    labels = true_labels(config.data, samples)
    test, truth = load_test_samples(config.data, device, samples)
    learner = RDLLearner(config, samples, PseudoLabels(labels, None, count_classes(config.data, labels), {}, {}), device)
    load_pretrained(learner.encoders, config.model.pretrained)
    _, embeddings, accuracy = learn(learner, test, truth, f"{config.data.num_points} points")
    table = retrieval_table(embeddings, truth, within=True)
    return {
        **{f"accuracy/{MODALITIES[name].letter}": share for name, share in accuracy.items()},
        **{key: value for key, value in table.items() if key.startswith("map/")},
    }


def main(argv: list[str] | None = None) -> None:
    """Measure every number of points, print one table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True, help="a step2.yaml")
    parser.add_argument("--points", type=int, nargs="+", required=True, help="points per cloud, one training each")
    parser.add_argument("--set", **SET, help="further settings")
    parser.add_argument("--output", type=Path, default=Path("runs/ceiling.json"), help="where the record goes")
    arguments = parser.parse_args(argv)
    load = lambda points: load_config(Step2Config, arguments.config, [*arguments.overrides, *SUPERVISED, f"data.num_points={points}"])
    configs = {points: load(points) for points in arguments.points}  # all of them are checked before the first is trained
    config = configs[arguments.points[0]]
    device = prepare_device(config.run)
    record: dict[str, Any] = {**environment(config.run.seed), "settings": to_dict(config), "by_points": {}}
    for points, chosen in configs.items():
        record["by_points"][str(points)] = scores = measure(chosen, device)
        atomic_write_json(arguments.output, record)
    rows = [[f"{points} points", *(f"{100 * value:.1f}" for value in found.values())] for points, found in record["by_points"].items()]
    print(align([["test set [%], trained with the TRUE labels", *scores], *rows]))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
