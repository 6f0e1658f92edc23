"""What both stages share: command line, run folder, resume, the loop over epochs with checkpoints, and exit messages."""

import argparse
import errno
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from utils.engine import distributed
from utils.engine.checkpoint import LAST, load_checkpoint, save_checkpoint
from utils.engine.device import keep_freed_memory, peak_mib, select_device, set_threads
from utils.engine.learner import StageLearner
from utils.engine.run_log import RunLog, plain_row
from utils.engine.seed import seed_everything, set_deterministic
from utils.errors import UserError
from utils.settings.config import SET, load_config, to_dict

# Failures of the file system; other OSErrors come from libraries and are no user's to mend
MENDABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.ESTALE,
}


@dataclass
class Session:
    """One invocation of a training script."""

    stage: str  # "step1", "step2", "features" or "baseline"
    config: Any
    device: torch.device
    run: RunLog
    checkpoint: dict | None  # what to continue from, if anything; `fit` loads it and lets it go


def stage_parser(description: str, meaning_of_from: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of --config, --set and --resume, and of --from (`source`) if it has a meaning."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    example = "--set optim.epochs=5 data.modalities=[GrayImg,PointCloud]"
    parser.add_argument("--set", **SET, help=f"override settings, e.g. {example}; may be repeated")
    parser.add_argument(
        "--resume", metavar="RUN", type=os.path.expanduser, help="run folder to continue, with the settings it was started with"
    )
    if meaning_of_from:
        parser.add_argument("--from", dest="source", metavar="RUN", help=meaning_of_from)
    return parser


def go_on_from(arguments: argparse.Namespace, section: str, *overrides: str) -> None:
    """Let a new run start from the settings and the encoders of the finished run `arguments.source`, of the same stage.

    Args:
        arguments: of the command line; --config and --set win over what is filled in here.
        section: of the stage's own settings, "pla"; its key `start` names the run. overrides: further "section.key=value" texts.
    Raises:
        UserError: if the run is of another stage or has not finished.
    """
    run = RunLog.open(arguments.source)
    settings = run.config()
    if section not in settings:
        raise UserError(f"--from {run.folder}: expected a run of the same stage, found none of the settings {section}")
    if len(run.read_epochs()) < settings["optim"]["epochs"]:
        raise UserError(f"--from {run.folder}: that run has not finished; go on with it first, by --resume {run.folder}")
    arguments.config = arguments.config or str(run.folder / "config.yaml")
    taken = [f"{section}.start={json.dumps(str(run.folder))}", "run.pseudo_labels=null", *overrides]
    arguments.overrides = taken + arguments.overrides


def open_session(
    config_class: type, stage: str, arguments: argparse.Namespace, default_config: str,
    complete: Callable[[Any], Any] = lambda config: config,
) -> Session:
    """Load the settings, choose the device, seed everything and make or reopen the run folder.

    Args:
        default_config: used when neither --config nor --resume is given; such a bare call needs a GPU.
        complete: fills in the settings of a new run that depend on what lies on the disk.
    Returns:
        The session. With --resume, the settings are the run's own; of --config or --set beside it, only places and speed
        may differ (`utils.engine.run_log.RESULT_NEUTRAL`).
    Raises:
        UserError: on bad settings or a run folder that cannot be continued.
    """
    if arguments.resume and getattr(arguments, "source", None):
        raise UserError("--from beside --resume: a run keeps what it started from; give one of them")
    distributed.start()
    run = RunLog.open(arguments.resume) if arguments.resume else None
    if run:
        config, changed = run.settings_of_call(config_class, arguments.config, arguments.overrides)
    else:
        config, changed = load_config(config_class, arguments.config or default_config, arguments.overrides), []
    device = select_device(config.run.device)
    if not (arguments.config or run) and device.type == "cpu" and config.run.device == "auto":
        raise UserError(_cpu_advice(stage, default_config))
    checkpoint = _load_last(run, stage) if run else None
    keep_freed_memory()
    set_threads(config.run.threads)
    set_deterministic(config.run.deterministic)
    seed_everything(config.run.seed)
    if run is None:
        config = distributed.from_main(lambda: complete(config))
        create = lambda: RunLog.create(config.run.output, config.data.dataset, stage, to_dict(config), config.run.seed)
        run = RunLog.open(distributed.from_main(lambda: create().folder))
    run.log("\n  ".join([f"{stage} on {device}, run folder {run.folder}", *changed]))
    return Session(stage, config, device, run, checkpoint)


def _load_last(run: RunLog, stage: str) -> dict | None:
    """Return the checkpoint to go on from; None if the run was stopped before its first one."""
    last = run.folder / LAST
    if not last.is_file() and run.has_record:
        raise UserError(
            f"cannot resume {run.folder}: metrics are there and {LAST} is not, as in finished runs of methods that are fitted without "
            f"epochs; else it is gone. Nothing was changed; put {LAST} back, or train anew by the command in {run.folder / 'env.json'}"
        )
    if not last.is_file():
        return None
    checkpoint = load_checkpoint(last)
    if checkpoint.get("stage") != stage or not {"epoch", "learner", "rows"} <= checkpoint.keys():
        found = f"it is of {checkpoint.get('stage')!r} and holds {', '.join(sorted(map(str, checkpoint)))}"
        raise UserError(f"{last} is no checkpoint of {stage} that this version can continue: {found}")
    return checkpoint


def _cpu_advice(stage: str, default_config: str) -> str:
    cpu_config = default_config.replace("mnist3d/", "mnist3d_cpu/")
    return (
        f"no GPU found. {default_config} (224-pixel images, 1,024 points, batch 50) is estimated at more than half an hour per "
        f"epoch on 2 CPU cores, more than a day for both stages. Use the CPU configuration, about a quarter of an hour per stage:\n"
        f"  python train_{stage}.py --config {cpu_config}\nor insist with --config {default_config}"
    )


def fit(session: Session, learner: StageLearner, evaluate: Callable[[], Mapping[str, float]] | None) -> list[dict[str, Any]]:
    """Train to the last epoch, one checkpoint and one line of metrics per epoch, continuing where the session says.

    The checkpoint carries the lines of all epochs so far, and metrics.jsonl is written from it: a process killed anywhere
    continues to the same result and the same record.

    Args:
        evaluate: scores on the test set, for the log alone; nothing is selected by them. None skips them.
    Returns:
        The metrics of all epochs.
    """
    config, run = session.config, session.run
    done, rows = min(config.optim.epochs, 1) - 1, []  # without epochs of training, "epoch 0" is what the learner does instead
    if session.checkpoint is not None:
        learner.load_state_dict(session.checkpoint["learner"])
        done, rows = session.checkpoint["epoch"], session.checkpoint["rows"]
        session.checkpoint = None  # as large as the weights
        run.log(f"resumed after epoch {done} of {config.optim.epochs}")
    run.write_epochs(rows)
    for epoch in range(done + 1, config.optim.epochs + 1):
        start = time.perf_counter()
        row = {"epoch": epoch, "stage": session.stage, **learner.train_epoch(epoch)}
        row |= {"seconds/train": round(time.perf_counter() - start, 3), "memory/peak_mib": peak_mib(session.device)}
        if evaluate and (epoch == config.optim.epochs or (config.run.eval_every and epoch % config.run.eval_every == 0)):
            row.update(evaluate())
        rows.append(plain_row(row))
        if run.writes:
            state = {"stage": session.stage, "epoch": epoch, "learner": learner.state_dict(), "rows": rows}
            save_checkpoint(run.folder / LAST, state)
        run.write_epochs(rows)
        shown = [key for key in row if key.startswith("loss/") or key in ("agreement", "cross_nmi", "map/avg")]
        run.log(f"epoch {epoch}/{config.optim.epochs}: " + ", ".join(f"{key} {row[key]:.4f}" for key in shown))
    return rows


def run_command(main: Callable[[], int | None]) -> int:
    """Run a script's main function; turn failures that a user can mend into one message, and leave bugs their traceback.

    The exit status is what it returns, None being 0; 2 after such a message, 3 where another process of several has failed, 130
    when interrupted, 141 where its output's reader has left.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without a line of our source
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return 141  # as a shell says it
    except (UserError, MemoryError, torch.OutOfMemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in MENDABLE:
            raise
        who = "" if distributed.is_main() else f" (process {distributed.rank()})"
        print(f"error{who}: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; a training goes on with --resume RUN", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            print(f"error: {_message(MemoryError(str(error).splitlines()[0]))}", file=sys.stderr)
            return 2
        if distributed.world() == 1 or not re.search("gloo|NCCL|Connection closed", str(error)):
            raise
        print(f"process {distributed.rank()}: another process has stopped, see its message", file=sys.stderr)
        return 3
    finally:
        distributed.stop()


def _reader_has_left() -> bool:
    """Whether nobody reads what this process prints any more, as after `| head`; the rest of it then goes nowhere."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _message(error: Exception) -> str:
    """Say what a user can do about it; a UserError says it itself."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check that path, its permissions and the space on its disk"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UserError):
        return str(error)
    return f"out of memory ({error}); lower optim.batch_size, or keep the samples on the host with data.placement=host"
