"""Run folders: resolved configuration, environment, text log, and one JSON line of metrics per epoch."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from utils.engine import distributed
from utils.engine.checkpoint import atomic_write_json, atomic_write_text
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
RESULT_NEUTRAL = ("run.output", "run.figures", "run.log_interval")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository, None without git or outside a repository."""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(seed: int) -> dict:
    """Describe code revision, software and hardware, for env.json.

    Args:
        seed: the run's seed.
    Returns:
        Plain dictionary; git_sha and git_dirty are None where git cannot tell.
    """
    status = _git("status", "--porcelain")
    has_gpu = torch.cuda.is_available()
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Dotted keys -> leaves; an empty dictionary is a leaf, so that it differs from an absent one."""
    flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat.update(_flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value})
    return flat


def check_same_config(saved: dict, new: dict, ignore: Iterable[str] = RESULT_NEUTRAL) -> None:
    """Refuse to resume a run under settings that would change its result.

    Args:
        saved: configuration of the run folder, as nested plain dictionaries.
        new: configuration of this call.
        ignore: dotted keys (or sections) that may differ.
    Raises:
        UserError: lists every differing key with both values.
    """
    old, now = _flatten(saved), _flatten(new)
    ignored = tuple(ignore)
    differing = [
        key
        for key in sorted(old.keys() | now.keys())
        if (key not in old or key not in now or old[key] != now[key])
        and not any(key == name or key.startswith(f"{name}.") for name in ignored)
    ]
    if differing:
        values = ((key, old.get(key, "(absent)"), now.get(key, "(absent)")) for key in differing)
        rows = "\n".join(f"  {key}: {before!r} in the run, {after!r} now" for key, before, after in values)
        raise UserError(f"cannot resume, settings differ from the run's:\n{rows}\nDrop them, or start a new run.")


def _plain_number(key: str, value: Any) -> Any:
    """Turn tensor and NumPy scalars into Python numbers; refuse NaN and infinity."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"metric {key!r} is {value}: metrics.jsonl holds finite numbers only")
    return value


class RunLog:
    """One run folder `<output>/<dataset>/<stage>/<run-id>/`.

    Write an epoch's line before its checkpoint: on resume `truncate_after` drops lines that no checkpoint backs.

    Attributes:
        folder: the run folder.
        run_id: its name.
        writes: whether this process writes; of several processes only the main one does, the others' calls do nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.run_id = self.folder.resolve().name
        self.writes = distributed.is_main()

    @classmethod
    def create(cls, output: str | Path, dataset: str, stage: str, config: dict, seed: int) -> "RunLog":
        """Make a new, unique run folder and write env.json and config.yaml.

        Args:
            output: folder of all runs.
            dataset, stage: the two levels below it, e.g. "digits", "step1".
            config: resolved configuration (utils.settings.config.to_dict).
            seed: the run's seed, part of the run id.
        Returns:
            The log of the new run.
        """
        parent = Path(output) / dataset / stage
        parent.mkdir(parents=True, exist_ok=True)
        stamp = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-seed{seed}"
        attempt = 1
        while True:
            folder = parent / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                folder.mkdir()  # atomic: two runs that start together get two folders
                break
            except FileExistsError:
                attempt += 1
        atomic_write_json(folder / "env.json", environment(seed))
        atomic_write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))  # last: marks a usable folder
        return cls(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "RunLog":
        """Open an existing run folder; writes nothing.

        Raises:
            UserError: if the folder is missing or holds no config.yaml.
        """
        if not (Path(folder) / "config.yaml").is_file():
            problem = "has no config.yaml" if Path(folder).is_dir() else "does not exist"
            raise UserError(f"run folder {folder} {problem}: give a folder like runs/<dataset>/<stage>/<run-id>")
        return cls(folder)

    def config(self) -> dict:
        """Return the resolved configuration the run was started with."""
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))

    def log(self, text: str) -> None:
        """Print a line without tearing progress bars, and append it to log.txt with the UTC time."""
        if not self.writes:
            return
        tqdm.write(text)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} {text}\n")

    def write_epoch(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; the file is replaced as a whole, so no line is ever torn.

        Args:
            values: must hold the integer `epoch`, larger than that of the last line; numbers (tensor and NumPy
                scalars too), strings or None.
        Raises:
            UserError: if the epoch is missing or does not grow, or a number is not finite.
        """
        if not self.writes:
            return
        epochs = self.read_epochs()
        epoch = values.get("epoch")
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            raise UserError(f"an epoch's metrics need the integer key 'epoch', got {epoch!r}")
        if epochs and epoch <= epochs[-1]["epoch"]:
            raise UserError(f"{self._metrics} already ends with epoch {epochs[-1]['epoch']}, cannot append epoch {epoch}")
        self._replace([*epochs, {key: _plain_number(key, value) for key, value in values.items()}])

    def read_epochs(self) -> list[dict]:
        """Return the lines of metrics.jsonl; a torn last line (no line end, no valid JSON) is left out.

        Raises:
            UserError: if any other line is damaged, naming file and row.
        """
        if not self._metrics.is_file():
            return []
        lines = self._metrics.read_text(encoding="utf-8", errors="replace").split("\n")
        epochs = []
        for row, line in enumerate(lines, start=1):
            try:
                epochs.append(json.loads(line))
            except json.JSONDecodeError as error:
                if row == len(lines):
                    break
                raise UserError(f"{self._metrics}, row {row}: not a JSON object: {line[:80]!r}") from error
        return epochs

    def truncate_after(self, epoch: int) -> None:
        """Drop the lines of epochs later than `epoch`, atomically; call it when a run resumes from that epoch."""
        if self.writes:
            self._replace([entry for entry in self.read_epochs() if entry["epoch"] <= epoch])

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _replace(self, epochs: list[dict]) -> None:
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in epochs)
        atomic_write_text(self._metrics, text)
