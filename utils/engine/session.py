"""What both stages share: command line, run folder, resume, epoch loop with checkpoints, and the loop over batches."""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from utils.engine import distributed
from utils.engine.checkpoint import load_checkpoint, save_checkpoint
from utils.engine.device import select_device, set_threads
from utils.engine.run_log import RunLog, check_same_config
from utils.engine.seed import rng_state, seed_everything, set_deterministic, set_rng_state
from utils.errors import UserError
from utils.settings.config import add_config_arguments, load_config, to_dict

LAST = "last.pt"


@dataclass
class Session:
    """One invocation of a training script: settings, device, run folder, and the checkpoint to continue from, if any."""

    config: Any
    device: torch.device
    run: RunLog
    checkpoint: dict | None


class Learner(Protocol):
    """What `fit` drives; both stages implement it."""

    def train_epoch(self, epoch: int) -> dict[str, float]: ...

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


def parse_arguments(description: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse --config, --set and --resume; argv None means the command line."""
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    return parser.parse_args(argv)


def open_session(config_class: type, stage: str, arguments: argparse.Namespace, default_config: str) -> Session:
    """Load the settings, choose the device, seed everything and make or reopen the run folder.

    Args:
        config_class: utils.settings.options.Step1Config or Step2Config.
        stage: "step1" or "step2".
        arguments: from `parse_arguments`.
        default_config: used when neither --config nor --resume is given; such a bare call needs a GPU.
    Returns:
        The session. With --resume, the settings are the run's own; --config or --set beside it must agree with them.
    Raises:
        ValueError, FileNotFoundError: on bad settings or a run folder that cannot be continued.
    """
    distributed.start()
    run = RunLog.open(arguments.resume) if arguments.resume else None
    path = str(run.folder / "config.yaml") if run and not arguments.config else arguments.config or default_config
    config = load_config(config_class, path, arguments.overrides)
    device = select_device(config.run.device)
    if not (arguments.config or run) and device.type == "cpu" and config.run.device == "auto":
        raise UserError(_cpu_advice(stage, default_config))
    if run:
        check_same_config(run.config(), to_dict(config))
    set_threads(config.run.threads)
    set_deterministic(config.run.deterministic)
    seed_everything(config.run.seed)
    if run is None:
        create = lambda: RunLog.create(config.run.output, config.data.dataset, stage, to_dict(config), config.run.seed)  # noqa: E731
        run = RunLog.open(distributed.from_main(lambda: create().folder))
    last = run.folder / LAST
    run.log(f"{stage} on {device}, run folder {run.folder}")
    checkpoint = load_checkpoint(last) if last.is_file() else None
    return Session(config, device, run, checkpoint)


def _cpu_advice(stage: str, default_config: str) -> str:
    cpu_config = default_config.replace("mnist3d/", "mnist3d_cpu/")
    return (
        f"no GPU found. {default_config} (224-pixel images, 1,024 points, batch 50) is estimated at half an hour per epoch on "
        f"2 CPU cores, a day and a half for both stages. Use the CPU configuration, about half an hour per stage:\n"
        f"  python train_{stage}.py --config {cpu_config}\nor insist with --config {default_config}"
    )


def fit(
    session: Session, learner: Learner, evaluate: Callable[[], Mapping[str, float]], stage: str
) -> list[dict[str, Any]]:
    """Train to the last epoch, one line of metrics and one checkpoint per epoch, continuing where the session says.

    The metrics line is written before the checkpoint that backs it; on resume, lines without a checkpoint are dropped, so
    a process killed anywhere continues to the same result.

    Args:
        session: settings, run folder and checkpoint.
        learner: trains one epoch at a time and gives its state.
        evaluate: scores on the test set, for the log alone; nothing is selected by them.
        stage: name for messages.
    Returns:
        The metrics of all epochs.
    """
    config, run = session.config, session.run
    done = 0
    if session.checkpoint is not None:
        learner.load_state_dict(session.checkpoint["learner"])
        set_rng_state(session.checkpoint["rng"])
        done = session.checkpoint["epoch"]
        run.log(f"resumed after epoch {done} of {config.optim.epochs}")
    run.truncate_after(done)
    for epoch in range(done + 1, config.optim.epochs + 1):
        start = time.perf_counter()
        row = {"epoch": epoch, "stage": stage, **learner.train_epoch(epoch)}
        row["seconds/train"] = round(time.perf_counter() - start, 3)
        if epoch == config.optim.epochs or (config.run.eval_every and epoch % config.run.eval_every == 0):
            row.update(evaluate())
        run.write_epoch(row)
        if run.writes:
            save_checkpoint(
                run.folder / LAST, {"stage": stage, "epoch": epoch, "learner": learner.state_dict(), "rng": rng_state()}
            )
        run.log(_summary(row, config.optim.epochs))
    return run.read_epochs()


def _summary(row: Mapping[str, Any], epochs: int) -> str:
    shown = {key: value for key, value in row.items() if key.startswith("loss/") or key in ("agreement", "cross_nmi", "map/avg")}
    return f"epoch {row['epoch']}/{epochs}: " + ", ".join(f"{key} {value:.4f}" for key, value in shown.items())


def run_batches(
    batches: Iterable[Any], step: Callable[[Any], Mapping[str, Tensor]], *, title: str, log_interval: int
) -> dict[str, float]:
    """Run one optimisation step per batch and average what the steps return.

    Sums stay on the device; they are read back once per `log_interval` steps, for the progress bar and the check that
    every component is finite.

    Args:
        batches: what `step` takes.
        step: trains on one batch, returns detached scalars.
        title: for the progress bar and errors, e.g. "step1 epoch 3".
        log_interval: steps between two read-backs.
    Returns:
        Mean of every scalar over the steps.
    Raises:
        UserError: if there is no batch. UserError: if a component is not finite.
    """
    totals: dict[str, Tensor] = {}
    count = 0
    with tqdm(batches, desc=title, leave=False, disable=not (sys.stderr.isatty() and distributed.is_main())) as progress:
        for batch in progress:
            for key, value in step(batch).items():
                totals[key] = totals[key] + value if key in totals else value
            count += 1
            if count % log_interval == 0:
                progress.set_postfix({key: f"{value:.4f}" for key, value in _means(totals, count, title).items()})
    if count == 0:
        raise UserError(f"{title}: no batch to train on; lower optim.batch_size or add samples")
    return _means(totals, count, title)


def _means(totals: Mapping[str, Tensor], count: int, title: str) -> dict[str, float]:
    means = {key: float(value) / count for key, value in totals.items()}
    if not all(math.isfinite(value) for value in means.values()):
        raise UserError(
            f"{title}, step {count}: a loss is not finite, means so far {means}; the last checkpoint is from the epoch "
            "before. Lower optim.learning_rate or check the data"
        )
    return means


def learning_rate(config: Any, epoch: int) -> float:
    """Return the rate of an epoch (1-based): constant, or a half cosine from the initial rate towards zero."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / config.epochs))


def run_command(main: Callable[[], None]) -> int:
    """Run a script's main function; turn the errors that a user can mend into one message instead of a traceback."""
    try:
        main()
    except UserError as error:
        who = "" if distributed.is_main() else f" (process {distributed.rank()})"
        print(f"error{who}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if distributed.world() == 1 or not re.search("gloo|NCCL|Connection closed", str(error)):
            raise
        print(f"process {distributed.rank()}: another process has stopped, see its message", file=sys.stderr)
        return 3
    finally:
        distributed.stop()
    return 0
