"""Run folders: resolved configuration, environment, text log, and one JSON line of metrics per epoch."""

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from tqdm import tqdm

from utils.engine import distributed
from utils.errors import UserError
from utils.files import atomic_write_json, atomic_write_text
from utils.settings.config import load_config, to_dict
from utils.settings.files import flatten

T = TypeVar("T")
UNREAD = (":(exclude)results", ":(exclude)docs", ":(exclude,glob)**/*.md")  # no run reads them; written while other runs are on
REPOSITORY = Path(__file__).resolve().parents[2]
STARTS = ("step1", "step2", "features")  # stages whose runs may be a start; compared methods may have read labels
# Where things lie and how fast they go; what training reads is guarded by the hashes in the checkpoint
RESULT_NEUTRAL = (
    "data.root", "data.train_lists", "data.test_lists", "data.placement", "data.workers", "run.device", "run.threads", "run.output",
    "run.pseudo_labels", "run.eval_every", "run.figures", "run.log_interval", "rdl.pseudo_labels", "rdl.rounds", "eval",
)


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository, None without git or outside a repository."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(seed: int, unread: Sequence[str] = ()) -> dict:
    """Describe code revision, software and hardware, for env.json; git_sha and git_dirty are None where git cannot tell.

    Dirty is a tree that differs from the commit in more than records and documents, and what else the caller says is `unread`.
    """
    status = _git("status", "--porcelain", "--", ".", *UNREAD, *(f":(exclude,glob){pattern}" for pattern in unread))
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def origin(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record of a result keeps of an `environment`."""
    return {"commit": found["git_sha"], "dirty": found["git_dirty"], "device": found["gpu"] or found["cpu"],
            **{key: found[key] for key in ("threads", "torch")}}


def check_same_config(saved: dict, new: dict) -> list[str]:
    """Refuse, by a UserError that names them all, settings that would change the result of a run that was started with others.

    Returns:
        One line per setting of `RESULT_NEUTRAL` that differs.
    """
    old, now = flatten(saved), flatten(new)
    neutral, refused = [], []
    for key in sorted(old.keys() | now.keys()):
        before, after = old.get(key, "(absent)"), now.get(key, "(absent)")
        if before != after:
            chosen = neutral if any(f"{key}.".startswith(f"{name}.") for name in RESULT_NEUTRAL) else refused
            chosen.append(f"{key}: {before!r} in the run, {after!r} now")
    if refused:
        rows = "\n  ".join(refused)
        raise UserError(f"settings differ from the run's:\n  {rows}\nDrop them, or start a new run.")
    return neutral


def plain_row(values: dict[str, Any]) -> dict[str, Any]:
    """Return an epoch's metrics with tensor and NumPy scalars as Python numbers; a ValueError if one is not finite."""
    row = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metric {key!r} is {value}: metrics.jsonl holds finite numbers only")
    return row


class RunLog:
    """One run folder `<output>/<dataset>/<stage>/<run-id>/`; a leading ~ is the home folder.

    Of several processes the main one writes (`writes`); others' calls do nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.run_id = self.folder.resolve().name
        self.writes = distributed.is_main()

    @classmethod
    def create(cls, output: str | Path, dataset: str, stage: str, config: dict, seed: int) -> "RunLog":
        """Make a new, unique folder output/dataset/stage/<run-id> with env.json and config.yaml; the seed is part of the id."""
        parent = Path(output) / dataset / stage
        parent.mkdir(parents=True, exist_ok=True)
        stamp = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-seed{seed}"
        for ending in chain([""], map("-{}".format, count(2))):
            folder = parent / (stamp + ending)
            with suppress(FileExistsError):
                folder.mkdir()  # atomic: two runs that start together get two folders
                break
        atomic_write_json(folder / "env.json", environment(seed))
        atomic_write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))  # last: marks a usable folder
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "RunLog":
        """Open an existing run folder, writing nothing; a UserError without its config.yaml."""
        run = cls(folder)
        if not (run.folder / "config.yaml").is_file():
            problem = "has no config.yaml" if run.folder.is_dir() else "is no folder" if run.folder.exists() else "does not exist"
            raise UserError(f"run folder {folder} {problem}: give a folder like runs/<dataset>/<stage>/<run-id>")
        return run

    def config(self) -> dict:
        """Return the resolved configuration the run was started with; a UserError if config.yaml is damaged."""
        path = self.folder / "config.yaml"
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        if not isinstance(tree, dict) or not all(isinstance(tree.get(section), dict) for section in ("data", "optim", "run")):
            raise UserError(f"{path} is damaged: expected all settings that the run was started with, found {tree!r:.80}")
        return tree

    def settings(self, cls: type[T]) -> T:
        """Return them as `cls` of `utils.settings.options`; those that did not exist when the run was started have their defaults."""
        self.config()
        return load_config(cls, str(self.folder / "config.yaml"))

    def settings_of_call(self, cls: type[T], path: str | None, overrides: Sequence[str]) -> tuple[T, list[str]]:
        """Return the settings with which a call goes on with the run or scores it, and one line per setting that differs.

        Args:
            cls: as for `settings`; path: of a configuration, default: the run's own; overrides: "section.key=value" texts.
        Raises:
            UserError: naming all settings that would change the result, see `RESULT_NEUTRAL`.
        """
        saved, config = self.settings(cls), load_config(cls, path or str(self.folder / "config.yaml"), overrides)
        marked = dataclasses.replace(config.model, reads_labels=saved.model.reads_labels)  # what its start has read no call can change
        config = dataclasses.replace(config, model=marked)
        return config, check_same_config(to_dict(saved), to_dict(config))

    def log(self, text: str) -> None:
        """Print a line without tearing progress bars, and append it to log.txt with the UTC time."""
        if not self.writes:
            return
        tqdm.write(text)
        self._append(text)

    def _append(self, text: str) -> None:
        with open(self.folder / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {text}\n")

    @contextmanager
    def failures_logged(self) -> Iterator[None]:
        """Append what ends the block to log.txt: the message of a failure that a user can mend, the traceback of any other.

        Every process writes, since a fault may show in one of them alone. The failure itself goes on.
        """
        try:
            yield
        except BaseException as error:
            text = f"error: {error}" if isinstance(error, UserError) else traceback.format_exc().rstrip()
            with suppress(OSError):  # the log may be what cannot be written
                self._append(text if distributed.world() == 1 else f"process {distributed.rank()}: {text}")
            raise

    def write_epochs(self, rows: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl by rows of `plain_row`, one line per epoch; atomic, so no line is ever torn."""
        if self.writes:
            atomic_write_text(self._metrics, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    @property
    def has_record(self) -> bool:
        """Whether the folder holds metrics of a training."""
        return (self.folder / "metrics.json").exists() or self._metrics.exists() and self._metrics.stat().st_size > 0

    def read_epochs(self) -> list[dict]:
        """Return the lines of metrics.jsonl without a torn last one; a UserError if another one is damaged, naming file and row."""
        if not self._metrics.is_file():
            return []
        lines = self._metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        epochs = []
        for row, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                int(entry["epoch"])
                epochs.append(entry)
            except (ValueError, TypeError, LookupError) as error:
                if row == len(lines):
                    break
                raise UserError(f"{self._metrics}, row {row}: not a JSON object of an epoch: {line[:80]!r}") from error
        return epochs

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"
