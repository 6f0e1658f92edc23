"""Runs jobs as processes, a few at a time. What is done is never run again; what was begun goes on where it stopped."""

import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.engine.checkpoint import atomic_write_json
from utils.engine.progress import progress
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError

MARKER, STATE = "done.json", "state.json"
WAITING, RUNNING, DONE, FAILED, INTERRUPTED, SKIPPED = "waiting", "running", "done", "failed", "interrupted", "skipped"
POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        name: for people.
        folder: its own; holds output.log, state.json and, written last, done.json.
        command: device -> command line; asked at every start, so it can continue what an earlier start left.
        collect: the record of a finished run; raises UserError if the run is not complete.
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

    def state(self) -> dict[str, Any]:
        """Return status, reason of a failure, and attempts."""
        path = self.folder / STATE
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"status": WAITING, "attempts": []}
        return {**found, "status": DONE} if self.done else found


def states(jobs: Sequence[Job]) -> dict[str, dict]:
    """Return id -> state; a job that waits for one that failed is "skipped". A needed job stands before its users."""
    found: dict[str, dict] = {}
    for job in jobs:
        found[job.id] = job.state()
        blocked = [entry.name for entry in jobs if entry.id in job.needs and found[entry.id]["status"] in (FAILED, SKIPPED)]
        if blocked and found[job.id]["status"] == WAITING:
            found[job.id] |= {"status": SKIPPED, "reason": f"needs {', '.join(blocked)}"}
    return found


@contextlib.contextmanager
def hold(root: Path) -> Iterator[int]:
    """Lock a folder of jobs for one command; processes that inherit the yielded descriptor hold it as long as they live."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another reproduce.py, or a run that one started, works in {root}: wait until it ends, or stop it; "
                            "--list shows its state") from None
        yield file.fileno()


def run_jobs(
    jobs: Sequence[Job], devices: Sequence[str], lock: int, describe: Callable[[str], Mapping[str, Any]],
    budget: float | None = None, resume: bool = False,
) -> dict[str, dict]:
    """Run jobs, a needed one before its users, until none is left, the budget is used up, or Ctrl-C; return `states`.

    Args:
        devices: one entry per process that may run at a time, e.g. ["cpu", "cpu"].
        lock: of `hold`.
        describe: device -> commit, dirty flag and so on, asked at every start and kept in the record.
        budget: seconds after which nothing is started, and running jobs are ended right after their next checkpoint; jobs
            that write none run to their end.
        resume: whether to go on with jobs that were interrupted or failed.
    Raises:
        UserError: if there are such jobs and `resume` is False.
        KeyboardInterrupt: after Ctrl-C, once the running jobs have ended as "interrupted".
    """
    begun = [(state["status"], job.name) for job, state in zip(jobs, states(jobs).values())]
    broken = [f"  {status}: {name}" for status, name in begun if status in (RUNNING, INTERRUPTED, FAILED)]
    if broken and not resume:
        raise UserError("these cells were begun and not finished, go on with --resume:\n" + "\n".join(broken))
    deadline = math.inf if budget is None else time.time() + budget
    start = lambda job, device: _Attempt(job, device, lock, describe(device))
    for _ in progress(_run(jobs, list(devices), start, deadline), sum(job.units for job in jobs), "epochs"):
        pass
    return states(jobs)


def _run(jobs: Sequence[Job], free: list[str], start: Callable[[Job, str], "_Attempt"], deadline: float) -> Iterator[None]:
    """Run every job whose needs are done on a free device; yield once per unit of work that is done."""
    waiting, running, shown = [job for job in jobs if not job.done], [], 0
    try:
        while True:
            ready = [job for job in waiting if all(entry.done for entry in jobs if entry.id in job.needs)]
            for job in ready[: len(free)] if time.time() < deadline else ():
                waiting.remove(job)
                running.append(start(job, free.pop(0)))
            if not running:
                break
            time.sleep(POLL_SECONDS)
            for attempt in list(running):
                late = attempt.process.poll() is None and time.time() >= deadline <= attempt.job.checkpoint()
                if late:
                    _end([attempt])
                if attempt.process.poll() is not None:
                    running.remove(attempt)
                    free.append(attempt.device)
                    attempt.conclude(stopped=late)
            done = sum(job.units if job.done else min(job.progress(), job.units) for job in jobs)
            yield from [None] * (done - shown)
            shown = max(done, shown)
    finally:
        _end(running)
        for attempt in running:
            attempt.conclude(stopped=True)


def _end(attempts: Sequence["_Attempt"]) -> None:
    """End processes and their children (loader workers), which share their sessions, first politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for attempt in attempts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(attempt.process.pid, number)
        for attempt in attempts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                attempt.process.wait(GRACE_SECONDS)


class _Attempt:
    """A process of a job; the state file says how it ended, and the marker is written last."""

    def __init__(self, job: Job, device: str, lock: int, facts: Mapping[str, Any]) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        line = job.command(device)
        shown = " ".join(["python" if part == sys.executable else part for part in line])
        self.job, self.device, self.log, self.begun = job, device, job.folder / "output.log", time.monotonic()
        self.attempts = [*job.state()["attempts"], {**facts, "command": shown, "seconds": None}]
        self.keep(RUNNING)  # before the start: whatever kills us then, the next call knows of it
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                line, cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=[lock], env={**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})},
            )

    def keep(self, status: str, **more: Any) -> None:
        atomic_write_json(self.job.folder / STATE, {"status": status, "attempts": self.attempts, **more})

    def conclude(self, stopped: bool) -> None:
        """Note how the ended process went; `stopped`: it was not its own end."""
        self.attempts[-1]["seconds"] = round(time.monotonic() - self.begun, 3)
        try:
            if self.process.returncode != 0:
                raise UserError(f"exit status {self.process.returncode}")
            record = self.job.collect()
        except UserError as error:
            self.keep(INTERRUPTED) if stopped else self.keep(FAILED, reason=str(error))
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            if not stopped:
                tqdm.write("\n  ".join([f"FAILED {self.job.name}: {error} ({self.log})", *tail]))
        else:
            self.keep(DONE)
            atomic_write_json(self.job.folder / MARKER, {**record, **provenance(self.attempts)})


def provenance(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the attempts of one job: dirty if one was or git could not tell, every commit, the command of the first."""
    commits = list(dict.fromkeys(entry["commit"] for entry in attempts if entry["commit"]))
    known = [entry["seconds"] for entry in attempts if entry["seconds"] is not None]
    return {
        **attempts[-1], "command": attempts[0]["command"], "commit": ", ".join(commits) or None,
        "dirty": any(entry["dirty"] is not False for entry in attempts),
        "seconds": round(sum(known), 3), "attempts": len(attempts),
    }
