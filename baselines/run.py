"""Trains and scores one method of the comparison: python -m baselines.run METHOD --config FILE --seed S."""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines import Entry, method_entry
from baselines.learner import MethodLearner, make_context
from baselines.method import ShallowMethod
from baselines.noisy_labels import noisy_labels
from baselines.settings import BaselineConfig, check_optim, method_overrides
from baselines.stored_features import load_features, noted_facts, original_samples
from datasets.prepare.parallel import user_path
from datasets.samples import PairedSamples, load_test_samples, load_training_samples
from training import circumstances, mark_labels
from utils.engine.device import peak_mib
from utils.engine.session import Session, fit, open_session, run_command, stage_parser
from utils.errors import UserError
from utils.evaluation.metrics import mean_average_precision
from utils.evaluation.report import draw_figures, label_note
from utils.evaluation.tables import format_table, retrieval_table, scored_tasks
from utils.files import atomic_write_json
from utils.modalities import task_name
from utils.settings.config import load_config

DEFAULT_CONFIG = "configs/digits_features/step1.yaml"
SHUFFLES = 10  # of the gallery, whose order decides between equal similarities: L-bit codes have L + 1 of them


def run_method(session: Session) -> None:
    """Train the method of a `BaselineConfig`, or go on where its checkpoint stopped, score the test set and write metrics.json."""
    config, run, device = session.config, session.run, session.device
    entry = method_entry(config.method.name)
    with run.failures_logged():
        features_noted = noted_facts(Path(config.data.root)) if config.data.features else {}
        samples = load_training_samples(config.data, device)
        run.log(circumstances(samples, session))
        labels = _labels(entry, config, samples, device)
        test, test_labels = load_test_samples(config.data, device, samples)
        if issubclass(entry.load(), ShallowMethod):
            start = time.perf_counter()
            codes = _fit(entry.load(), config, samples, labels, test, device)
            seconds = time.perf_counter() - start
        else:
            features = _shared_features(config.method.features, samples, device) if config.method.features else None
            start = time.perf_counter()
            learner = MethodLearner(config, entry.load(), samples, labels, features, device)
            seconds = time.perf_counter() - start + sum(row["seconds/train"] for row in fit(session, learner, None))
            codes = learner.codes(test)
        metrics = {**score_codes(codes, test_labels, entry.kind == "hash"), **_facts(entry, config, device), **label_note(run)}
        metrics |= {"features": features_noted, "seconds": round(seconds, 2)}
        atomic_write_json(run.folder / "metrics.json", metrics)
        run.log(format_table([(metrics["row"], metrics)]))
        if config.run.figures:
            pictures = original_samples(config.data, device) or test
            draw_figures(run, {name: F.normalize(rows, dim=1) for name, rows in codes.items()}, test_labels, pictures.arrays)


def _labels(entry: Entry, config: BaselineConfig, samples: PairedSamples, device: torch.device) -> Tensor | None:
    """Return training labels for the methods that the table says read them; nothing for any other."""
    if config.method.noise and entry.labels != "noisy labels":
        raise UserError(f"method.noise is for methods that read noisy labels, {entry.title} reads {entry.labels}")
    if not entry.reads_truth:
        return None
    return noisy_labels(config.data, samples, config.method.noise, config.method.noise_kind, config.run.seed).to(device)


def _fit(
    cls: type, config: BaselineConfig, samples: PairedSamples, labels: Tensor | None, test: PairedSamples, device: torch.device
) -> dict[str, Tensor]:
    """Fit a shallow method on the training features; return modality -> (N, L) float64 codes of the test features."""
    features = {name: rows[:, 0] for name, rows in samples.arrays.items()}
    plain, method = (lambda rows: rows.double().cpu().numpy()), cls()
    context = make_context(config, cls, samples, labels, features, device)
    method.fit({name: plain(rows) for name, rows in features.items()}, context)
    return {name: torch.as_tensor(method.transform(name, plain(rows[:, 0]))) for name, rows in test.arrays.items()}


def _shared_features(folder: str, samples: PairedSamples, device: torch.device) -> dict[str, Tensor]:
    """Return the features in a folder, modality -> (N, d), checked to be of the same objects in the same order."""
    found = load_features(Path(folder), list(samples.lists), device)
    for name, rows in found.lists.items():
        if rows.instance_ids != samples.lists[name].instance_ids:
            raise UserError(f"{rows.path} and {samples.lists[name].path} do not list the same objects in one order")
    return {name: rows[:, 0].to(device) for name, rows in found.arrays.items()}


def score_codes(codes: Mapping[str, Tensor], labels: Mapping[str, Tensor], signs: bool) -> dict[str, float]:
    """Return `retrieval_table` of the codes and, if asked, "sign/RP" ..., "sign/avg": mAP of the sign codes, mean over the shuffles.

    Args:
        codes: modality -> (N, L) continuous codes of any norm; labels: modality -> (N,) int64.
        signs: rank by sign codes too; a zero counts as -1.
    """
    table = retrieval_table({name: F.normalize(rows.double(), dim=1) for name, rows in codes.items()}, labels)
    if not signs:
        return table
    binary = {name: (rows > 0).double() * 2 - 1 for name, rows in codes.items()}
    pairs = scored_tasks(codes)
    for query, gallery in pairs:
        found = [
            mean_average_precision(binary[query], labels[query], binary[gallery], labels[gallery], seed=seed) for seed in range(SHUFFLES)
        ]
        table[f"sign/{task_name(query, gallery)}"] = sum(found) / SHUFFLES
    table["sign/avg"] = sum(table[f"sign/{task_name(*pair)}"] for pair in pairs) / len(pairs)
    return table


def _facts(entry: Entry, config: BaselineConfig, device: torch.device) -> dict[str, Any]:
    """Return what a reader must know of a score beside its settings."""
    labels = entry.labels
    if labels == "noisy labels":
        labels = f"labels, {config.method.noise:g} of them wrong ({config.method.noise_kind})"
    return {
        "row": entry.title, "method": config.method.name, "reads": labels, "selection": "last epoch", "peak_mib": peak_mib(device),
        "mode": "head" if config.data.features else "e2e",
    }


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run one method."""
    parser = stage_parser(__doc__)
    parser.add_argument("method", help="name in baselines.METHODS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", metavar="DIR", type=user_path, help="end to end: shared features for targets (method.features)")
    parser.add_argument("--figures", action="store_true", help="draw t-SNE and the five best of some queries")
    arguments = parser.parse_args(argv)
    features = [f"method.features={arguments.features}"] if arguments.features else []
    figures = [] if arguments.resume and not arguments.figures else [f"run.figures={str(arguments.figures).lower()}"]
    arguments.overrides = [*_defaults(arguments), *figures, *features, *arguments.overrides]
    entry = method_entry(arguments.method)
    mark = lambda config: mark_labels(config, None, f"{entry.labels} of {config.data.dataset}" if entry.reads_truth else None)
    session = open_session(BaselineConfig, "baseline", arguments, DEFAULT_CONFIG, mark)
    if session.config.method.name != arguments.method:
        raise UserError(f"{arguments.resume} is a run of {session.config.method.name}, not of {arguments.method}")
    run_method(session)


def _defaults(arguments: argparse.Namespace) -> list[str]:
    """Return the "section.key=value" texts that a new run has beside its configuration: its method's own training."""
    entry = method_entry(arguments.method)
    if arguments.resume:
        return []
    arguments.config = arguments.config or DEFAULT_CONFIG
    if any(text.startswith("method.name=") for text in arguments.overrides):
        raise UserError(f"--set method.name: the method is the first word of the command, found {arguments.method}; leave method.name out")
    data = load_config(BaselineConfig, arguments.config, ["pla.mlm_only_epochs=0", *arguments.overrides]).data
    if len(data.modalities) > 2 and not entry.joint:
        raise UserError(
            f"{entry.title} takes two modalities, found data.modalities: {list(data.modalities)}: name two of them, "
            f"e.g. --set data.modalities=[{data.modalities[0]},{data.modalities[-1]}]"
        )
    if data.pairing == "none" or data.positives == "views":
        raise UserError(
            f"{entry.title} learns from pairs, expected data.pairing: instance or class and data.positives: modalities, found "
            f"{data.pairing} and {data.positives}: give a configuration whose rows are pairs"
        )
    if not data.features and not entry.end_to_end:
        raise UserError(f"{entry.title} is trained on features: give a configuration with data.features, see docs/comparison.md")
    if data.features and (arguments.features or any(text.startswith("method.features=") for text in arguments.overrides)):
        raise UserError(f"--features is for training end to end, and {arguments.config} is of features already: leave it out")
    check_optim(entry, arguments.overrides)
    one_view = [f"data.views.{name}=1" for name in data.modalities]
    return [f"run.seed={arguments.seed}", *one_view, *method_overrides(arguments.method, not data.features)]


if __name__ == "__main__":
    sys.exit(run_command(main))
