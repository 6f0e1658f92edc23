"""Runs jobs as processes, a few at a time. What is done is never run again; what was begun goes on where it stopped."""

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.jobs import FAILED, INTERRUPTED, RUNNING, SKIPPED, WAITING, Job
from utils.engine.lock import hold_lock
from utils.engine.progress import progress
from utils.errors import UserError

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0


def states(jobs: Sequence[Job]) -> list[dict]:
    """Return the states of jobs; one that waits for a failed one is "skipped". A needed job stands before its users."""
    found: dict[str, dict] = {}
    for job in jobs:
        state = found[job.cell.id] = job.state()
        blocked = [need.name for need in job.cell.needs if found[need.id]["status"] in (FAILED, SKIPPED)]
        if blocked and state["status"] == WAITING:
            state |= {"status": SKIPPED, "reason": f"needs {', '.join(blocked)}"}
    return list(found.values())


def hold(root: Path) -> contextlib.AbstractContextManager[int]:
    """Lock a folder of jobs for one command; processes that inherit the yielded descriptor hold it as long as they live."""
    return hold_lock(root / "lock", f"another reproduce.py, or a run that one started, works in {root}: wait until it ends, or stop it; "
                                    "--list shows its state")


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], lock: int, budget: float | None = None, resume: bool = False) -> None:
    """Run jobs, a needed one before its users, until none is left, the budget is used up, or Ctrl-C.

    Args:
        devices: one entry per process that may run at a time, e.g. ["cpu", "cpu"].
        lock: of `hold`.
        budget: seconds after which nothing is started, and running jobs are ended right after their next checkpoint; jobs
            that write none run to their end.
        resume: whether to go on with jobs that were interrupted or failed.
    Raises:
        UserError: if there are such jobs and `resume` is False.
        KeyboardInterrupt: after Ctrl-C, once the running jobs have ended as "interrupted".
    """
    begun = [(state["status"], job.cell.name) for job, state in zip(jobs, states(jobs))]
    broken = [f"  {status}: {name}" for status, name in begun if status in (RUNNING, INTERRUPTED, FAILED)]
    if broken and not resume:
        raise UserError("these cells were begun and not finished, go on with --resume:\n" + "\n".join(broken))
    deadline = math.inf if budget is None else time.time() + budget
    for _ in progress(_run(jobs, list(devices), lock, deadline), sum(job.cell.epochs for job in jobs), "epochs"):
        pass


def _run(jobs: Sequence[Job], free: list[str], lock: int, deadline: float) -> Iterator[None]:
    """Run every job whose needs are done on a free device; yield once per epoch that is done."""
    by_id, waiting, running, shown = {job.cell.id: job for job in jobs}, [job for job in jobs if not job.done], [], 0
    try:
        while True:
            ready = [job for job in waiting if all(by_id[need.id].done for need in job.cell.needs)]
            for job in ready[: len(free)] if time.time() < deadline else ():
                waiting.remove(job)
                job.start(free.pop(0), lock)
                running.append(job)
            if not running:
                break
            time.sleep(POLL_SECONDS)
            for job in list(running):
                late = job.process.poll() is None and time.time() >= deadline <= job.checkpoint()
                if late:
                    _end([job])
                if job.process.poll() is not None:
                    running.remove(job)
                    free.append(job.device)
                    job.conclude(stopped=late)
            done = sum(job.epochs() for job in jobs)
            yield from [None] * (done - shown)
            shown = max(done, shown)
    finally:
        _end(running)
        for job in running:
            job.conclude(stopped=True)


def _end(jobs: Sequence[Job]) -> None:
    """End processes and their children (loader workers), which share their sessions, first politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, number)
        for job in jobs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.process.wait(GRACE_SECONDS)
