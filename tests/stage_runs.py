"""How tests run the two stages on the small digits, and compare what comes out."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from datasets.samples import load_training_samples
from utils.engine import session
from utils.engine.checkpoint import load_checkpoint, save_checkpoint
from utils.settings.config import load_config
from utils.settings.options import Step1Config

REPOSITORY = Path(__file__).resolve().parents[1]
PSEUDO_LABELS = ["digits_GrayImgs_train_list_pseudo_labelling.txt", "digits_PointCloud_train_list_pseudo_labelling.txt"]


def smoke_config(root: Path, *overrides: str) -> Step1Config:
    """Step 1 on the small digits."""
    return load_config(Step1Config, str(REPOSITORY / "configs/smoke/step1.yaml"), [f"data.root={root}", *overrides])


def smoke_samples(root: Path, *overrides: str):
    """That configuration and its training samples."""
    config = smoke_config(root, *overrides)
    return config, load_training_samples(config.data, torch.device("cpu"))


def settings(root: Path, out: Path, step: int, *more: str) -> list[str]:
    """Arguments of one stage on the small digits, with every output under `out`."""
    config = REPOSITORY / f"configs/smoke/step{step}.yaml"
    return ["--config", str(config), "--set", f"data.root={root}", f"run.output={out / 'runs'}", *more]


# Settings of step 1 under which every modality gets at least four clusters: equal label files then prove something
DISTINCT = (
    "optim.epochs=4", "optim.batch_size=4", "optim.learning_rate=0.002", "pla.num_clusters=16", "pla.lambda_1=0.5", "pla.tau_2=0.2",
    "pla.recluster_every=1",
)


def distinct(root: Path, out: Path, step: int, *more: str) -> list[str]:
    """As `settings`, for runs that are compared with those of the fixture `finished`."""
    return settings(root, out, step, *(DISTINCT if step == 1 else ()), *more)


def trained(root: Path, out: Path, step: int, *more: str) -> Path:
    """Train one stage on the small digits; return its run folder."""
    importlib.import_module(f"train_step{step}").main(settings(root, out, step, *more))
    return only_run(out, step)


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing in the code under test catches it."""


def kill(*_):
    raise Killed


def kill_at(monkeypatch, main, arguments: list[str], epoch: int, saved: bool = True) -> None:
    """Train until the checkpoint of an epoch has been saved, or is about to be."""

    def save(path, state):
        if saved or state["epoch"] < epoch:
            save_checkpoint(path, state)
        if state["epoch"] == epoch:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(session, "save_checkpoint", save)
        main(arguments)


def only_run(out: Path, step: int) -> Path:
    (run,) = (out / "runs" / "digits" / f"step{step}").iterdir()
    return run


def labels_of(out: Path) -> Path:
    """Folder of the pseudo-labels of the only run of step 1."""
    return only_run(out, 1) / "pseudo_labels"


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, by dotted name."""
    flat = {}

    def visit(prefix, value):
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, entry in value.items():
                visit(f"{prefix}.{key}", entry)

    visit("", load_checkpoint(run / "last.pt")["learner"])
    return flat


def assert_same_result(first: Path, second: Path, step: int) -> None:
    one, two = weights(only_run(first, step)), weights(only_run(second, step))
    assert one.keys() == two.keys() and len(one) > 50
    assert all(torch.equal(one[key], two[key]) for key in one)
    if step == 1:
        for name in PSEUDO_LABELS:
            assert (labels_of(first) / name).read_bytes() == (labels_of(second) / name).read_bytes()


def log_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("seconds", "memory"))} for line in lines]
