"""Opens a trained run: its settings, and its encoders and classifiers with the weights of one checkpoint. For evaluation and search."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.build import build_classifiers, build_encoders
from utils.engine.checkpoint import load_checkpoint
from utils.engine.run_log import RunLog
from utils.errors import UserError
from utils.settings.options import CONFIGS, Step1Config, Step2Config


@dataclass(frozen=True)
class TrainedRun:
    """What `open_trained` found; `state` is the checkpoint, encoders and classifiers have its weights, modality -> module."""

    run: RunLog
    config: Step1Config | Step2Config
    state: dict[str, Any]
    encoders: nn.ModuleDict
    classifiers: nn.ModuleDict


def open_trained(checkpoint: Path, device: torch.device, overrides: Sequence[str] = ()) -> TrainedRun:
    """Build the modules of a run on a device and load them from one of its checkpoints.

    Args:
        checkpoint: .pt file in a run folder, beside its config.yaml.
        overrides: "section.key=value" texts of where things lie, see `utils.engine.run_log.RESULT_NEUTRAL`.
    Raises:
        UserError: if the run folder or the checkpoint is missing or broken, or a setting would change the result.
    """
    run = RunLog.open(checkpoint.parent)
    state = load_checkpoint(checkpoint, map_location=device)
    if not {"stage", "epoch", "learner"} <= state.keys() or state["stage"] not in CONFIGS:
        raise UserError(f"{checkpoint} is not a checkpoint of a training stage: it holds {sorted(state)}")
    config, _ = run.settings_of_call(CONFIGS[state["stage"]], None, overrides)
    encoders = build_encoders(config.data, config.model).to(device)
    try:
        scale = config.pla.logit_scale if state["stage"] == "step1" else None
        classifiers = build_classifiers(encoders, config.model, state["learner"]["num_clusters"], scale).to(device)
        encoders.load_state_dict(state["learner"]["encoders"])
        classifiers.load_state_dict(state["learner"]["classifiers"])
    except (LookupError, RuntimeError) as error:
        raise UserError(f"{checkpoint} does not fit {run.folder / 'config.yaml'}: {error}") from error
    return TrainedRun(run, config, state, encoders, classifiers)
