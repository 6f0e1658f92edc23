"""Photographs and shapes that no pair joins, through splat pictures: a photograph and a picture are of one modality, a picture and its
shape are a pair. Prints one row per method, and adds them to a table's records.

python -m baselines.unpaired --photos dataset/photos_modelnet40_initial --bridge RUN [--reads-labels] [--record results/TABLE.jsonl]

Both were made by `python -m baselines.features --kind initial` with the same weights: the folder of --photos, and the pictures that RUN was
trained on (configs/modelnet40_imagenet).
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from baselines.cca import unit_rows
from baselines.extract import read_out
from baselines.matching import SOFTNESS, Codes, agree, agreement, next_round, shared_axes, soft_clusters, standardise
from baselines.stored_features import SOURCE, provenance
from baselines.true_labels import true_labels
from datasets.prepare.ownership import MANIFEST, read_manifest
from datasets.prepare.parallel import user_path
from datasets.samples import PairedSamples, load_test_samples, load_training_samples
from experiments.cells import describe_setup
from experiments.protocol import Setup
from experiments.records import add_records, made_with
from models.trained import TrainedRun, open_trained
from utils.engine.checkpoint import LAST
from utils.engine.device import set_threads
from utils.engine.run_log import RunLog, environment
from utils.engine.seed import derive_seed
from utils.engine.session import run_command
from utils.errors import UserError
from utils.evaluation.tables import format_table, retrieval_table
from utils.settings.config import load_config
from utils.settings.options import Step1Config

CONFIG = Path("configs/photos_modelnet40")
PICTURE, SHAPE = "RGBImg", "PointCloud"
CLUSTERS, STARTS = (10, 15, 20, 30, 40), 2  # number of clusters per set, and clusterings of each number
CLASSES = 10  # clusters of the row with one clustering
DIMENSIONS = (16, 32, 64)  # of the spaces in which clusters are compared
ROUNDS = 3
COUPLINGS = ("soft", "hungarian", "gromov")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Sets:
    """Both sides; of each split, rows of float64.

    Attributes:
        photos, pictures: features of the same weights, (N, d) and (M, d), of pictures the mean over the views.
        seen: photographs through the picture head, (N, L); clouds: (M, L), both unit rows of the common space of the bridge.
        labels: of the test split, modality -> (N,) int64; classes: of the training split, where the row that says so is wanted.
    """

    photos: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    clouds: dict[str, np.ndarray]
    labels: dict[str, Tensor]
    classes: dict[str, np.ndarray] | None


def load_sets(photos: Path, bridge: Path, pictures: Path | None, device: torch.device, reads_labels: bool = False) -> Sets:
    """Read the photographs' features, and of their shapes the pictures' features and what the bridge makes of the clouds.

    Args:
        photos: folder of features; bridge: run folder; pictures: where the features lie that it was trained on, default: as it says.
        reads_labels: whether those of the training split are wanted; else they are not read.
    Raises:
        UserError: if the run is not on features of pictures, other weights or shapes are behind the two, or shapes are missing.
    """
    trained = open_trained(bridge / LAST, device, [f"data.root={pictures}"] if pictures else [])
    data = trained.config.data
    if set(data.features) != {PICTURE} or SHAPE not in data.modalities:
        raise UserError(f"{bridge}: expected a run of configs/modelnet40_imagenet, or another on features of {PICTURE} and on {SHAPE}")
    _check_same_source(photos, Path(data.root))
    note = provenance(photos)
    texts = [f"data.root={photos}", *note["settings"], f"model.pretrained.{PICTURE}=none"]
    config = load_config(Step1Config, str(photos / SOURCE), texts)
    mine = load_training_samples(config.data, device)
    test, labels = load_test_samples(config.data, device, mine)
    shapes = {"train": load_training_samples(data, device), "test": load_test_samples(data, device)[0]}
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("photos", "pictures", "seen", "clouds")}
    for split, samples in zip(SPLITS, (mine, test)):
        seen = replace(data, eval_subsets=1) if split == "train" else data  # for centroids, one subset of a cloud's points is enough
        chosen = _chosen(shapes[split], samples, split)
        clouds = read_out({SHAPE: trained.encoders[SHAPE]}, chosen, seen, device)[SHAPE]
        parts["photos"][split] = samples.arrays[PICTURE][:, 0].double().numpy()
        parts["pictures"][split] = chosen.arrays[PICTURE].double().mean(dim=1).numpy()
        parts["clouds"][split] = unit_rows(clouds.double().cpu().numpy())
    for split in SPLITS:
        parts["seen"][split] = _through_head(trained, parts, split)
    classes = {name: values.numpy() for name, values in true_labels(config.data, mine).items()} if reads_labels else None
    return Sets(**parts, labels=labels, classes=classes)


def _check_same_source(photos: Path, pictures: Path) -> None:
    sources = [load_config(Step1Config, str(folder / SOURCE), []) for folder in (photos, pictures) if provenance(folder)]
    weights = [Path(source.model.pretrained[PICTURE]).resolve() for source in sources]
    if weights[0] != weights[1]:
        raise UserError(f"{photos} has features of {weights[0]}, {pictures} of {weights[1]}: make both with the same weights")
    shapes = [read_manifest(Path(source.data.root) / MANIFEST).get("input_sha256", {}).get("objects") for source in sources]
    if shapes[0] != shapes[1]:
        raise UserError(f"{sources[0].data.root} and {sources[1].data.root} were made from different clouds: prepare both from one .npz")


def _chosen(shapes: PairedSamples, wanted: PairedSamples, split: str) -> PairedSamples:
    """Return the shapes that the photographs' data set lists, in its order: file numbers are the same."""
    places = {name[-6:]: row for row, name in enumerate(shapes.lists[SHAPE].instance_ids)}
    numbers = [name[-6:] for name in wanted.lists[SHAPE].instance_ids]
    missing = [number for number in numbers if number not in places]
    if missing:
        raise UserError(f"{shapes.lists[SHAPE].path} lacks {len(missing)} {split} shapes of {wanted.lists[SHAPE].path}: prepare both again")
    rows = torch.tensor([places[number] for number in numbers])
    return PairedSamples(shapes.lists, {name: array[rows] for name, array in shapes.arrays.items()})


@torch.no_grad()
def _through_head(trained: TrainedRun, parts: Mapping[str, Mapping[str, np.ndarray]], split: str) -> np.ndarray:
    """Give photographs the mean and deviation of pictures, then the picture encoder of the bridge: (N, L) unit rows."""
    photos, pictures = parts["photos"], parts["pictures"]["train"]
    mean, deviation = photos["train"].mean(axis=0), photos["train"].std(axis=0) + 1e-6
    rows = (photos[split] - mean) / deviation * pictures.std(axis=0) + pictures.mean(axis=0)
    return unit_rows(trained.encoders[PICTURE].eval()(torch.from_numpy(rows).float()).double().numpy())


def rows_of(sets: Sets, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name and the scores of every row; "stability" is how much a matching agrees with that of other clusterings."""
    photos, pictures = (standardise(side["test"], side["train"]) for side in (sets.photos, sets.pictures))
    yield "ImageNet features, photograph to picture", _scores(sets, photos, pictures)
    yield "picture head, photograph to cloud", _scores(sets, sets.seen["test"], sets.clouds["test"])
    yield "picture head, photograph to cloud, diffusion", _scores(sets, sets.seen["test"], sets.clouds["test"], "diffusion")
    features = [standardise(side["train"], side["train"]) for side in (sets.photos, sets.pictures)]
    one = agree(*_clusterings(sets, (CLASSES,), 1, seed), [tuple(features)], "hungarian")
    yield f"{CLASSES} clusters each, hungarian", _scores(sets, *(codes.test for codes in one))
    both = (_matchings(sets, features, number) for number in (seed, derive_seed(seed, "again")))
    for (name, found), (_, again) in zip(*both):
        stability = agreement(found, *(codes.train for codes in again))
        yield name, {**_scores(sets, *(codes.test for codes in found)), "stability": stability}
    if sets.classes is not None:
        yield "prototypes of the true classes, READS LABELS", _scores(sets, *_prototypes(sets))


def _matchings(sets: Sets, features: list[np.ndarray], seed: int) -> Iterator[tuple[str, tuple[Codes, Codes]]]:
    """Yield every coupling and round of many clusterings."""
    photos, shapes = _clusterings(sets, CLUSTERS, STARTS, seed)
    start = [tuple(unit_rows(rows @ axes) for rows in features) for axes in (shared_axes(*features, count) for count in DIMENSIONS)]
    for how in COUPLINGS:
        spaces = start
        for turn in range(1, ROUNDS + 1):
            found = agree(photos, shapes, spaces, how)
            yield f"{len(photos)} clusterings each, {how}, round {turn}", found
            spaces = next_round(found, features[0], spaces)


def _clusterings(sets: Sets, counts: tuple[int, ...], starts: int, seed: int) -> tuple[list[Codes], list[Codes]]:
    """Cluster the photographs by their features, and the shapes by what the bridge makes of their clouds."""
    photos = [standardise(sets.photos[split], sets.photos["train"]) for split in SPLITS]
    clouds = [sets.clouds[split] for split in SPLITS]
    seeds = [(count, derive_seed(seed, "unpaired", count, start)) for count in counts for start in range(starts)]
    return tuple([soft_clusters(*side, count, number) for count, number in seeds] for side in (photos, clouds))


def _prototypes(sets: Sets) -> tuple[np.ndarray, np.ndarray]:
    """Return what the photographs and clouds have in common with the mean of each class of their training half, which labels name."""
    sides = []
    for side, name in ((sets.photos, PICTURE), (sets.clouds, SHAPE)):
        train, test = (standardise(side[split], side["train"]) for split in SPLITS)
        means = unit_rows(np.stack([train[sets.classes[name] == label].mean(axis=0) for label in np.unique(sets.classes[name])]))
        sides.append(softmax(test @ means.T / SOFTNESS, axis=1))
    return tuple(sides)


def _scores(sets: Sets, photos: np.ndarray, shapes: np.ndarray, ranking: str = "plain") -> dict[str, float]:
    return retrieval_table({PICTURE: torch.from_numpy(photos), SHAPE: torch.from_numpy(shapes)}, sets.labels, ranking=ranking)


def write_records(path: Path, rows: list[tuple[str, dict, float]], seed: int, command: str, read: str | None = None) -> None:
    """Add the rows, with their seconds, to a table's records; a UserError from uncommitted code, whose commit would not repeat them.

    `read` are the labels that the bridge says it has read, if any.
    """
    shared = {
        "pair": "RP", "setup": describe_setup(Setup(CONFIG.name, "full", CONFIG, ())), "id": f"unpaired-seed{seed}", "stage": "unpaired",
        "seed": seed, "needs": [], **made_with(environment(seed), "this result"), "command": command,
    }
    labels = lambda name: "; ".join(filter(None, (read, f"training labels of {CONFIG.name}" if "READS LABELS" in name else None)))
    marks = lambda name: {"reads_labels": labels(name)} if labels(name) else {}
    add_records(path, [{"row": name, **shared, **marks(name), "scores": scores, "seconds": seconds} for name, scores, seconds in rows])


def main(argv: list[str] | None = None) -> None:
    """Score every row, print them, and record them if asked."""
    argv = sys.argv[1:] if argv is None else argv
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m baselines.unpaired", description=__doc__, formatter_class=raw)
    parser.add_argument("--photos", type=user_path, required=True, metavar="DIR", help="features of the photographs")
    parser.add_argument("--bridge", type=user_path, required=True, metavar="RUN", help="run folder on features of pictures, and clouds")
    parser.add_argument("--pictures", type=user_path, metavar="DIR", help="the features RUN was trained on, if moved")
    parser.add_argument("--reads-labels", action="store_true", help="also score what the training labels would give, in a row that says so")
    parser.add_argument("--record", type=user_path, metavar="FILE", help="records of a table to add the rows to")
    parser.add_argument("--seed", type=int, default=0, help="of the clusterings")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args(argv)
    set_threads(arguments.threads)
    sets = load_sets(arguments.photos, arguments.bridge, arguments.pictures, torch.device("cpu"), arguments.reads_labels)
    rows, before = [], time.perf_counter()
    for name, scores in rows_of(sets, arguments.seed):
        rows.append((name, scores, round(time.perf_counter() - before, 1)))
        note = f", stability {scores['stability']:.3f}" if "stability" in scores else ""
        print(f"{name}: RP {scores['map/RP']:.3f} PR {scores['map/PR']:.3f}{note}", flush=True)
        before = time.perf_counter()
    print(format_table([(name, scores) for name, scores, _ in rows]))
    if arguments.record:
        read = RunLog.open(arguments.bridge).config()["model"].get("reads_labels")
        write_records(arguments.record, rows, arguments.seed, shlex.join(["python", "-m", "baselines.unpaired", *argv]), read)


if __name__ == "__main__":
    sys.exit(run_command(main))
