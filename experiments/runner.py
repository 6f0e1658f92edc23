"""Runs jobs as processes, a few at a time. What is done is never run again; what was begun goes on where it stopped."""

import contextlib
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
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
        id, name: in records; for people.
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
    """Lock a folder of jobs for one command; processes that inherit the descriptor hold it as long as they live.

    Raises:
        UserError: if another command, or a process that outlived one, holds it.
    """
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
    """Run jobs until none is left, the budget is used up, or Ctrl-C; return `states`.

    Args:
        jobs: a needed one before its users.
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
    runner = _Runner(lock, describe, math.inf if budget is None else time.time() + budget)
    for _ in progress(runner.run(jobs, list(devices)), sum(job.units for job in jobs), "epochs"):
        pass
    return states(jobs)


@dataclass
class _Runner:
    lock: int
    describe: Callable[[str], Mapping[str, Any]]
    deadline: float
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, jobs: Sequence[Job], free: list[str]) -> Iterator[None]:
        """Run every job whose needs are done on a free device; yield once per unit of work that is done."""
        waiting, running, shown = [job for job in jobs if not job.done], {}, 0
        with ThreadPoolExecutor(len(free)) as pool:
            try:
                while True:
                    ready = [job for job in waiting if all(entry.done for entry in jobs if entry.id in job.needs)]
                    for job in ready[: len(free)] if time.time() < self.deadline else ():
                        waiting.remove(job)
                        device = free.pop(0)
                        running[pool.submit(self.execute, job, device)] = device
                    if not running:
                        break
                    for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                        free.append(running.pop(future))
                        future.result()
                    done = sum(job.units if job.done else min(job.progress(), job.units) for job in jobs)
                    yield from [None] * (done - shown)
                    shown = max(done, shown)
            finally:
                self.stop.set()

    def execute(self, job: Job, device: str) -> None:
        """Run a job to its end; the state file says how it ended, and the marker is written last."""
        job.folder.mkdir(parents=True, exist_ok=True)
        line, log_path = job.command(device), job.folder / "output.log"
        attempts = [*job.state()["attempts"], {**self.describe(device), "command": _shown(line), "seconds": None}]
        keep = lambda status, **more: atomic_write_json(job.folder / STATE, {"status": status, "attempts": attempts, **more})
        keep(RUNNING)  # before the start: whatever kills us then, the next call knows of it
        begun = time.monotonic()
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                line, cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=[self.lock], env={**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})},
            )
        stopped = self._watch(job, process)
        attempts[-1]["seconds"] = round(time.monotonic() - begun, 3)
        try:
            if process.returncode != 0:
                raise UserError(f"exit status {process.returncode}")
            record = job.collect()
        except UserError as error:
            keep(INTERRUPTED) if stopped else keep(FAILED, reason=str(error))
            tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            if not stopped:
                tqdm.write("\n  ".join([f"FAILED {job.name}: {error} ({log_path})", *tail]))
        else:
            keep(DONE)
            atomic_write_json(job.folder / MARKER, {**record, **provenance(attempts)})

    def _watch(self, job: Job, process: subprocess.Popen) -> bool:
        """Wait for a process; return whether it had to be ended, first politely, then not."""
        while process.poll() is None:
            if self.stop.wait(POLL_SECONDS) or time.time() >= self.deadline <= job.checkpoint():
                _signal(process, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                _signal(process, signal.SIGKILL)
                process.wait()
                return True
        return False


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and its children (loader workers), which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _shown(line: Sequence[str]) -> str:
    return " ".join(["python" if part == sys.executable else part for part in line])


def provenance(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the attempts of one job: dirty if one was or git could not tell, every commit, the command of the first."""
    commits = list(dict.fromkeys(entry["commit"] for entry in attempts if entry["commit"]))
    known = [entry["seconds"] for entry in attempts if entry["seconds"] is not None]
    return {
        **attempts[-1], "command": attempts[0]["command"], "commit": ", ".join(commits) or None,
        "dirty": any(entry["dirty"] is not False for entry in attempts),
        "seconds": round(sum(known), 3), "attempts": len(attempts),
    }
