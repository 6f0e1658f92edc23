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

from datasets.kinds import KINDS
from datasets.lists import read_labelled_list
from datasets.prepare.parallel import user_path
from datasets.samples import list_path
from datasets.stored import stored_array
from models import DGCNN
from models.build import build_classifiers, build_encoders
from utils.engine.checkpoint import save_checkpoint
from utils.engine.device import select_device, set_threads
from utils.engine.epoch import learning_rate, run_batches
from utils.engine.run_log import environment
from utils.engine.seed import BatchGenerator, derive_seed, generator_for, seed_everything, set_deterministic
from utils.engine.session import run_command
from utils.evaluation.features import extract_features
from utils.settings.config import load_config, to_dict
from utils.settings.data_options import DataConfig
from utils.settings.options import Step1Config

CONFIG, OUTPUT = "configs/modelnet40_splat/step1.yaml", Path("pretrained/dgcnn-reads-labels.pt")
MODALITY, SMOOTHING, LOGIT_SCALE = "PointCloud", 0.2, 10.0  # label smoothing as in DGCNN's release


def labelled_clouds(data: DataConfig, split: str) -> tuple[Tensor, Tensor]:
    """Return the clouds of a split, (N, 1, P, 3) float32, and their ground truth, (N,) int64: the label door of this command."""
    rows, labels = read_labelled_list(
        list_path(data, MODALITY, split), modality=MODALITY, root=data.root, instance_id=data.instance_id, num_classes=data.num_classes
    )
    return stored_array(rows, KINDS["points"], data)[0], torch.from_numpy(labels)


def train(config: Step1Config, device: torch.device) -> tuple[DGCNN, dict[str, float]]:
    """Train encoder and classifier by cross-entropy on cosine logits to the last epoch.

    Args:
        config: `data`, `model` and `optim` count; the cloud of a sample is augmented as in step 1.
    Returns:
        The encoder, and "loss" and "accuracy/test" of the last epoch, which nothing is selected by.
    """
    data, optim, seed = config.data, config.optim, config.run.seed
    clouds, labels = (values.to(device) for values in labelled_clouds(data, "train"))
    encoder = build_encoders(data, config.model)[MODALITY].to(device)
    classes = data.num_classes or int(labels.max()) + 1
    classifier = build_classifiers([MODALITY], config.model, classes, LOGIT_SCALE)[MODALITY].to(device)
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *classifier.parameters()], lr=optim.learning_rate, weight_decay=optim.weight_decay
    )

    def step(index: Tensor) -> dict[str, Tensor]:
        points = KINDS["points"].augment(clouds[index, 0], data, BatchGenerator(numbers, None, len(index)))
        loss = F.cross_entropy(classifier.classify(encoder(points)), labels[index], label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    size = min(optim.batch_size, len(clouds))
    for epoch in range(1, optim.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, epoch)
        torch.manual_seed(derive_seed(seed, "supervised start", epoch, "global"))
        numbers = generator_for(seed, "supervised start", epoch, device=device)
        order = torch.randperm(len(clouds), generator=numbers, device=device)
        batches = order[: len(order) // size * size].split(size)
        means = run_batches(batches, step, title=f"supervised start, epoch {epoch}", log_interval=config.run.log_interval)
        print(f"epoch {epoch}/{optim.epochs}: loss {means['loss']:.4f}", flush=True)
    return encoder, {**means, "accuracy/test": _accuracy(encoder, classifier, data, device)}


def _accuracy(encoder: nn.Module, classifier: nn.Module, data: DataConfig, device: torch.device) -> float:
    clouds, labels = (values.to(device) for values in labelled_clouds(data, "test"))
    inputs = lambda index: KINDS["points"].prepare(clouds[index], data)
    found = extract_features(encoder, classifier, inputs, len(clouds), device).posteriors.argmax(dim=1)
    return float((found == labels).float().mean())


def main(argv: list[str] | None = None) -> None:
    """Train by the settings of a step 1 and write the weight file."""
    parser = argparse.ArgumentParser(prog="python -m baselines.supervised_start", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help=f"YAML file of settings of a step 1; default {CONFIG}")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="override settings")
    parser.add_argument("--output", type=user_path, default=OUTPUT, metavar="FILE", help=f"weight file to write; default {OUTPUT}")
    arguments = parser.parse_args(argv)
    config = load_config(Step1Config, arguments.config, [*arguments.overrides, "model.freeze=[]", "mlm.relations=0"])
    device = select_device(config.run.device)
    set_threads(config.run.threads)
    set_deterministic(config.run.deterministic)
    seed_everything(config.run.seed)
    encoder, scores = train(config, device)
    weights = {name: values.cpu() for name, values in encoder.state_dict().items()}
    facts = {"settings": to_dict(config), "environment": json.loads(json.dumps(environment(config.run.seed))), "scores": scores}
    save_checkpoint(arguments.output, {"encoder": weights, "reads_labels": f"training labels of {config.data.dataset}", **facts})
    print(f"wrote {arguments.output}, which has read labels: {', '.join(f'{key} {value:.4f}' for key, value in scores.items())}")


if __name__ == "__main__":
    sys.exit(run_command(main))
