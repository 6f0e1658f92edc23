"""Writes configurations for a collection of one's own, sized for a CPU. Called by `datasets.prepare.objects`."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from utils.files import atomic_write_text
from utils.settings.config import load_config
from utils.settings.options import Step1Config

MARK = "# Written by datasets.prepare_objects"
SHARED = Path("configs/shared")  # of the repository, where the command must run
BATCH, POINTS, SUBSETS = 128, 128, 4  # of configs/shared/ours_cpu_*
SAMPLES_SEEN = 48_000  # in training, as in configs/modelnet10_splat
MOST_EPOCHS = 100


def write_configs(folder: Path, settings: Mapping, root: Path, size: int, points: int, overwrite: bool) -> None:
    """Write data.yaml, step1.yaml and step2.yaml, sized for a CPU; files that are there stay unless `overwrite`.

    Args:
        settings: of the data set; root: its folder; size: of its training split; points: that each half has a cloud of.
    """
    data = {"dataset": settings["dataset"], "root": str(root), "modalities": settings["modalities"]}
    if settings["classes"]:
        data["num_classes"] = len(settings["classes"])
    data["num_views"] = settings["views"]
    if "Mesh" in settings["modalities"]:
        data["max_faces"] = settings["max_faces"]
    if points < POINTS * SUBSETS:
        data.update(num_points=min(points, POINTS), eval_subsets=max(points // POINTS, 1))
    data["augment"] = {"image_elastic": 0.04, "point_warp": 0.05}
    batch = BATCH if size >= 2 * BATCH else 2 ** max(size.bit_length() - 2, 1)
    epochs = min(max(round(SAMPLES_SEEN / size), 12), MOST_EPOCHS)
    texts = {"data": yaml.safe_dump({"data": data}, sort_keys=False, default_flow_style=None, allow_unicode=True)}
    from utils.evaluation.consensus import NEIGHBOURS  # with what clusters; the processes that read files do without
    few = "pla: {num_clusters: 2}   # too few objects for a neighbour graph\n" if size <= NEIGHBOURS else ""
    lasts = {
        1: few,
        2: "eval: {representation: joint}   # kinds of few objects make unsure clusters, which the embedding makes up for\n",
    }
    for step, last in lasts.items():
        texts[f"step{step}"] = (
            f"# command: python train_step{step}.py --config {folder}/step{step}.yaml\n"
            "# Two modalities train faster: --set data.modalities=[RGBImg,PointCloud]\n"
            f"extends: [../shared/ours_cpu_step{step}.yaml, data.yaml]\noptim: {{epochs: {epochs}, batch_size: {batch}}}\n{last}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        path, text = folder / f"{name}.yaml", f"{MARK} for {size} training objects; yours to change.\n{text}"
        if overwrite or not path.exists():
            atomic_write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            print(f"{path} is there already and stays as it is; --overwrite writes it anew")


def misfits(path: Path, settings: Mapping, root: Path) -> list[str]:
    """Say where a configuration, which may be of an earlier call or changed by hand, does not fit the data set that was made."""
    data, classes = load_config(Step1Config, str(path)).data, len(settings["classes"])
    fits = {
        f"root {root}": Path(data.root).resolve() == root.resolve(), f"num_classes {classes}": classes in (0, data.num_classes),
        f"num_views {settings['views']}": data.num_views <= settings["views"],
        f"modalities {settings['modalities']}": set(data.modalities) <= set(settings["modalities"]),
        f"max_faces {settings['max_faces']}": "Mesh" not in data.modalities or data.max_faces >= settings["max_faces"],
    }
    return [f"made was {made}, it has {getattr(data, made.split()[0])}" for made, right in fits.items() if not right]
