"""The queue file of an experiment, its lock, and what a job is. The scheduler is the only writer."""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.engine.checkpoint import atomic_write_text
from utils.errors import UserError

MARKER = "done.json"
WAITING, RUNNING, DONE, FAILED, INTERRUPTED, SKIPPED = "waiting", "running", "done", "failed", "interrupted", "skipped"


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        id, name: in the queue file; for people.
        folder: its own; holds output.log and, written last, done.json.
        command: device -> command line; asked at every start, so it can continue what an earlier start left.
        collect: the record of a finished run; raises ValueError if the run is not complete.
        needs: ids of jobs that must be done first.
        units: amount of work, for the progress bar; progress: how much of it is done.
        checkpoint: when its last checkpoint was written, seconds since the epoch; 0 if there is none.
    """

    id: str
    name: str
    folder: Path
    command: Callable[[str], list[str]]
    collect: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()
    units: int = 1
    progress: Callable[[], int] = lambda: 0
    checkpoint: Callable[[], float] = lambda: 0.0

    @property
    def done(self) -> bool:
        """Whether its marker was written."""
        return (self.folder / MARKER).is_file()


class Queue:
    """The queue file {root}/queue.jsonl, one line per job, held by one process at a time (`with Queue(root) as queue`).

    Raises (on entering):
        UserError: if another process holds it.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / "queue.jsonl"
        self.lines: dict[str, dict] = {}

    def __enter__(self) -> "Queue":
        self._lock = hold(self.path.with_suffix(".lock"))
        if self._lock is None:
            raise UserError(f"another reproduce.py works on {self.path}: wait until it ends, or stop it; --list shows its state")
        self.lines = read_queue(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def set(self, jobs: Iterable[Job], statuses: Iterable[str], **more: Any) -> None:
        """Change the lines of some jobs and write the file; what `more` does not name stays."""
        for job, status in zip(jobs, statuses, strict=True):
            known = {key: value for key, value in self.lines.get(job.id, {}).items() if key != "reason"}
            self.lines[job.id] = {**known, "id": job.id, "name": job.name, "status": status, **more}
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()))


def read_queue(path: Path) -> dict[str, dict]:
    """Return id -> line of a queue file; empty without one."""
    rows = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line["id"]: line for line in map(json.loads, rows)}


def states(jobs: Sequence[Job], root: Path) -> dict[str, dict]:
    """Return id -> line of the queue file below `root` for every job; a marker in a job's folder counts more than the file."""
    lines = read_queue(root / "queue.jsonl")
    found = {job.id: lines.get(job.id, {"status": WAITING}) for job in jobs}
    return {job.id: {**found[job.id], "status": DONE} if job.done else found[job.id] for job in jobs}


def hold(path: Path) -> int | None:
    """Lock a file and return its descriptor, or None if it is held; processes that inherit the descriptor hold it as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
