"""Runs independent jobs as processes, a few at a time, with a queue file that a later call goes on from."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from experiments.queue import DONE, FAILED, INTERRUPTED, MARKER, RUNNING, SKIPPED, WAITING, Job, Queue, hold
from utils.engine.checkpoint import atomic_write_json
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int
    started: float
    stopping: bool = False


class Scheduler:
    """Runs jobs on slots until none is left, the budget is used up, or Ctrl-C.

    Args:
        queue: entered; gets every change of status.
        jobs: a needed one before its users.
        slots: device of every process that may run at a time, e.g. ["cpu", "cpu"].
        describe: device -> commit, dirty flag and so on, asked at every start and kept in the record.
        budget: seconds after which nothing is started, and running jobs are ended right after their next checkpoint; jobs
            that write none run to their end.
        resume: whether to go on with jobs that were interrupted or failed.
    Raises:
        UserError: if there are such jobs and `resume` is False, or a job still runs in a process that outlived its scheduler.
    """

    def __init__(
        self, queue: Queue, jobs: Sequence[Job], slots: Sequence[str], describe: Callable[[str], Mapping[str, Any]],
        budget: float | None = None, resume: bool = False,
    ) -> None:
        self.queue, self.jobs, self.slots, self.describe = queue, jobs, slots, describe
        self.deadline = None if budget is None else time.time() + budget
        self.status = {job.id: DONE if job.done else WAITING for job in jobs}
        self.running: list[_Running] = []
        self._check(resume)

    def _check(self, resume: bool) -> None:
        for job in (job for job in self.jobs if not job.done):
            lock = hold(job.folder / "lock")
            if lock is None:
                raise UserError(f"{job.name} still runs in a process of an earlier call (folder {job.folder}): wait, or stop it")
            os.close(lock)
        before = {job.name: self.queue.lines.get(job.id, {}).get("status") for job in self.jobs if not job.done}
        broken = [f"  {status}: {name}" for name, status in before.items() if status in (RUNNING, INTERRUPTED, FAILED)]
        if broken and not resume:
            raise UserError("these cells were begun and not finished, go on with --resume:\n" + "\n".join(broken))

    def run(self) -> dict[str, str]:
        """Run the jobs; return id -> status. KeyboardInterrupt ends the running ones as "interrupted" and is raised again."""
        self.queue.set(self.jobs, self.status.values())
        total, begun = sum(job.units for job in self.jobs), self._units_done()
        often = 0.5 if sys.stderr.isatty() else 60
        with tqdm(total=total, initial=begun, unit="epoch", smoothing=0, mininterval=often) as self.bar:
            try:
                while self._turn():
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop_all()
        return self.status

    def _turn(self) -> bool:
        """Look once at everything; return whether there is more to do."""
        for entry in [entry for entry in self.running if entry.process.poll() is not None]:
            self.running.remove(entry)
            self._end(entry)
        over = self.deadline is not None and time.time() >= self.deadline
        if over:
            for entry in self.running:
                if not entry.stopping and entry.job.checkpoint() >= self.deadline:
                    self._terminate(entry)
        else:
            self._start_ready()
        done = list(self.status.values()).count(DONE)
        self.bar.set_postfix_str(f"{done}/{len(self.jobs)} cells, {len(self.running)} running", refresh=False)
        self.bar.update(self._units_done() - self.bar.n)
        return bool(self.running)

    def _start_ready(self) -> None:
        free = [slot for slot in range(len(self.slots)) if slot not in {entry.slot for entry in self.running}]
        for job in self.jobs:
            needs = {self.status.get(need, DONE) for need in job.needs}
            if self.status[job.id] == WAITING and needs & {FAILED, SKIPPED}:
                blocked = [entry.name for entry in self.jobs if entry.id in job.needs]
                self._set(job, SKIPPED, reason=f"needs {', '.join(blocked)}")
            elif free and self.status[job.id] == WAITING and needs <= {DONE}:
                self._start(job, free.pop(0))

    def _start(self, job: Job, slot: int) -> None:
        lock = hold(job.folder / "lock")  # inherited by the process: held as long as it lives, even without us
        if lock is None:
            raise UserError(f"{job.name} was started by somebody else meanwhile (folder {job.folder})")
        device = self.slots[slot]
        line = job.command(device)
        attempts = self.queue.lines[job.id].get("attempts", [])
        attempts = [*attempts, {**self.describe(device), "command": _shown(line), "seconds": None}]
        self._set(job, RUNNING, attempts=attempts)  # before the start: whatever kills us then, the queue knows of it
        variables = {**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})}
        with open(job.folder / "output.log", "ab") as log:
            process = subprocess.Popen(
                line, cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[lock],
                env=variables,
            )
        os.close(lock)
        self.running.append(_Running(job, process, slot, time.monotonic()))

    def _end(self, entry: _Running) -> None:
        """Record how a process ended; the marker is written last."""
        job, attempts = entry.job, self.queue.lines[entry.job.id]["attempts"]
        attempts[-1]["seconds"] = round(time.monotonic() - entry.started, 3)
        if entry.process.returncode == 0:
            try:
                record = job.collect()
            except ValueError as error:
                self._fail(job, str(error), attempts)
                return
            atomic_write_json(job.folder / MARKER, {**record, **_provenance(attempts)})
            self._set(job, DONE, attempts=attempts)
        elif entry.stopping:
            self._set(job, INTERRUPTED, attempts=attempts)
        else:
            self._fail(job, f"exit status {entry.process.returncode}", attempts)

    def _fail(self, job: Job, reason: str, attempts: list[dict]) -> None:
        self._set(job, FAILED, reason=reason, attempts=attempts)
        tail = (job.folder / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        tqdm.write("\n  ".join([f"FAILED {job.name}: {reason} ({job.folder / 'output.log'})", *tail]))

    def _set(self, job: Job, status: str, **more: Any) -> None:
        self.status[job.id] = status
        self.queue.set([job], [status], **more)

    def _units_done(self) -> int:
        done = sum(job.units for job in self.jobs if self.status[job.id] == DONE)
        return done + sum(min(job.progress(), job.units) for job in self.jobs if self.status[job.id] in (RUNNING, INTERRUPTED))

    def _terminate(self, entry: _Running) -> None:
        entry.stopping = True
        _signal(entry.process, signal.SIGTERM)

    def _stop_all(self) -> None:
        """End what still runs, after Ctrl-C or an error: first politely, then not."""
        for entry in self.running:
            self._terminate(entry)
        limit = time.monotonic() + GRACE_SECONDS
        for entry in self.running:
            try:
                entry.process.wait(max(0.0, limit - time.monotonic()))
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C
                _signal(entry.process, signal.SIGKILL)
                entry.process.wait()
            self._end(entry)
        self.running = []


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and its children (loader workers), which share its session."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _shown(line: Sequence[str]) -> str:
    return " ".join(["python" if part == sys.executable else part for part in line])


def _provenance(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the attempts of one cell: dirty if one was or git could not tell, every commit, the command of the first."""
    commits = list(dict.fromkeys(entry["commit"] for entry in attempts if entry["commit"]))
    known = [entry["seconds"] for entry in attempts if entry["seconds"] is not None]
    return {
        **attempts[-1], "command": attempts[0]["command"], "commit": ", ".join(commits) or None,
        "dirty": any(entry["dirty"] is not False for entry in attempts),
        "seconds": round(sum(known), 3), "attempts": len(attempts),
    }
