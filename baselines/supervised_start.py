"""Trains the point encoder with the training labels of a data set: the start that the paper's ModelNet rows most likely had.

python -m baselines.supervised_start [--config configs/modelnet40_splat/step1.yaml] [--output FILE] [--set optim.epochs=8]

The file is for `model.pretrained.PointCloud` and says that it has read labels: runs that start from it carry the mark.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.true_labels import count_classes, learn, prepare_device, true_labels
from datasets.batches import BatchSource
from datasets.kinds import KINDS
from datasets.lists import read_training_list
from datasets.prepare.parallel import user_path
from datasets.samples import PairedSamples, list_options
from datasets.stored import stored_array
from models.build import build_classifiers, build_encoders
from utils.engine.checkpoint import save_checkpoint
from utils.engine.learner import StageLearner
from utils.engine.run_log import environment
from utils.engine.seed import BatchGenerator, seed_everything
from utils.engine.session import run_command
from utils.settings.config import SET, load_config, to_dict
from utils.settings.data_options import DataConfig
from utils.settings.options import Step1Config

CONFIG, OUTPUT = "configs/modelnet40_splat/step1.yaml", Path("pretrained/dgcnn-reads-labels.pt")
MODALITY, SMOOTHING, LOGIT_SCALE = "PointCloud", 0.2, 10.0  # label smoothing as in DGCNN's release


class SupervisedLearner(StageLearner):
    """A point encoder and a classifier of cosine logits, trained by smoothed cross-entropy with the labels of its samples, (N,) int64."""

    def __init__(self, config: Step1Config, samples: PairedSamples, labels: Tensor, num_classes: int, device: torch.device) -> None:
        self.labels = labels.to(device)
        encoders = nn.ModuleDict({MODALITY: build_encoders(config.data, config.model)[MODALITY]})
        classifiers = build_classifiers(encoders, config.model, num_classes, LOGIT_SCALE)
        super().__init__("supervised start", config, BatchSource(samples, config.data, device), {}, encoders, classifiers, device)

    def step(self, index: Tensor, raw: list[Tensor], generator: BatchGenerator) -> dict[str, Tensor]:
        """One step on the augmented clouds of a batch."""
        (views,), labels = self.embed(raw, generator), self.labels[index[0]]
        logits = self.classifiers[MODALITY].classify(views.float().flatten(0, 1))  # (V * B, K)
        loss = F.cross_entropy(logits, labels.repeat(len(views)), label_smoothing=SMOOTHING)
        self.optimise(loss)
        return {"loss": loss.detach()}


def clouds_of(data: DataConfig, split: str) -> PairedSamples:
    """Return the clouds of a split, without labels and without the other modalities."""
    rows = read_training_list(**list_options(data, MODALITY, split))
    return PairedSamples({MODALITY: rows}, {MODALITY: stored_array(rows, KINDS["points"], data)[0]})


def main(argv: list[str] | None = None) -> None:
    """Train by the settings of a step 1 (`data`, `model` and `optim` count) and write the weight file."""
    parser = argparse.ArgumentParser(prog="python -m baselines.supervised_start", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"YAML file of settings of a step 1; default {CONFIG}")
    parser.add_argument("--set", **SET, help="override settings")
    parser.add_argument("--output", type=user_path, default=OUTPUT, metavar="FILE", help=f"weight file to write; default {OUTPUT}")
    arguments = parser.parse_args(argv)
    config = load_config(Step1Config, arguments.config, [*arguments.overrides, "model.freeze=[]", "mlm.relations=0", "optim.trunk_rate=1"])
    device = prepare_device(config.run)
    seed_everything(config.run.seed)
    train, test = (clouds_of(config.data, split) for split in ("train", "test"))
    labels, truth = true_labels(config.data, train), true_labels(config.data, test, "test")
    learner = SupervisedLearner(config, train, labels[MODALITY], count_classes(config.data, labels), device)
    losses, _, accuracy = learn(learner, test, truth, "supervised start")
    scores = {**losses, "accuracy/test": accuracy[MODALITY]}
    weights = {name: values.cpu() for name, values in learner.encoders[MODALITY].state_dict().items()}
    facts = {"settings": to_dict(config), "environment": json.loads(json.dumps(environment(config.run.seed))), "scores": scores}
    save_checkpoint(arguments.output, {"encoder": weights, "reads_labels": f"training labels of {config.data.dataset}", **facts})
    print(f"wrote {arguments.output}, which has read labels: {', '.join(f'{key} {value:.4f}' for key, value in scores.items())}")


if __name__ == "__main__":
    sys.exit(run_command(main))
