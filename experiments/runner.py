"""Runs cells as processes, a few at a time. What is done is never run again; what was begun goes on where it stopped."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.cells import Cell
from experiments.jobs import MARKER, checkpoint_time, collect, command, epochs_done, is_done
from utils.engine.lock import hold_lock
from utils.engine.progress import progress
from utils.engine.run_log import REPOSITORY, environment, origin
from utils.errors import UserError
from utils.files import atomic_write_json, read_json

STATE = "state.json"  # how the attempts at an unfinished cell went
WAITING, RUNNING, DONE, FAILED, INTERRUPTED, SKIPPED = "waiting", "running", "done", "failed", "interrupted", "skipped"
POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0


def folder_of(cell: Cell, root: Path) -> Path:
    """Return a cell's folder, like `root` from the repository's root, where every process runs."""
    return root / "cells" / cell.id


def states(cells: Sequence[Cell], root: Path) -> dict[str, dict]:
    """Return id -> status, and the reason of a failure; a cell that waits for a failed one is "skipped".

    A needed cell stands before its users.
    """
    found: dict[str, dict] = {}
    for cell in cells:
        state = found[cell.id] = _state(folder_of(cell, root))
        blocked = [need.name for need in cell.needs if found[need.id]["status"] in (FAILED, SKIPPED)]
        if blocked and state["status"] == WAITING:
            state |= {"status": SKIPPED, "reason": f"needs {', '.join(blocked)}"}
    return found


def finished(cells: Sequence[Cell], root: Path) -> dict[str, dict]:
    """Return id -> record of the cells that are done."""
    folders = {cell.id: folder_of(cell, root) for cell in cells}
    return {name: read_json(REPOSITORY / folder / MARKER) for name, folder in folders.items() if is_done(folder)}


def _state(folder: Path) -> dict[str, Any]:
    if is_done(folder):
        return {"status": DONE}
    path = REPOSITORY / folder / STATE
    return read_json(path) if path.is_file() else {"status": WAITING, "attempts": []}


def hold(root: Path) -> contextlib.AbstractContextManager[int]:
    """Lock a folder of cells for one command; processes that inherit the yielded descriptor hold it as long as they live."""
    return hold_lock(REPOSITORY / root / "lock", f"another reproduce.py, or a run that one started, works in {root}: "
                                                 "wait until it ends, or stop it; --list shows its state")


def run_cells(
    cells: Sequence[Cell], root: Path, devices: Sequence[str], lock: int, budget: float | None = None, resume: bool = False
) -> None:
    """Run cells, a needed one before its users, until none is left, the budget is used up, or Ctrl-C.

    Args:
        root: folder of their folders, from the repository's root.
        devices: one entry per process that may run at a time, e.g. ["cpu", "cpu"].
        lock: of `hold`.
        budget: seconds after which nothing is started, and running cells are ended right after their next checkpoint; those
            that write none run to their end.
        resume: whether to go on with cells that were interrupted or failed.
    Raises:
        UserError: if there are such cells and `resume` is False.
        KeyboardInterrupt: after Ctrl-C, once the running processes have ended and their cells are "interrupted".
    """
    begun = zip(states(cells, root).values(), cells)
    broken = [f"  {state['status']}: {cell.name}" for state, cell in begun if state["status"] in (RUNNING, INTERRUPTED, FAILED)]
    if broken and not resume:
        raise UserError("these cells were begun and not finished, go on with --resume:\n" + "\n".join(broken))
    deadline, stop = math.inf if budget is None else time.time() + budget, threading.Event()
    with ThreadPoolExecutor(len(devices)) as pool:
        start = lambda cell, device: pool.submit(_run, cell, folder_of(cell, root), device, lock, deadline, stop)
        try:
            title = "epochs" if all(cell.epochs for cell in cells) else "epochs, and runs that give no number of them"
            for _ in progress(_schedule(cells, root, list(devices), deadline, start), sum(cell.steps for cell in cells), title):
                pass
        finally:
            stop.set()  # the pool waits until its threads have ended their processes


def _schedule(
    cells: Sequence[Cell], root: Path, free: list[str], deadline: float, start: Callable[[Cell, str], Future]
) -> Iterator[None]:
    """Start every cell as soon as what it needs is done and a device is free; yield once per epoch that is done."""
    done = lambda cell: is_done(folder_of(cell, root))
    waiting, running, shown = [cell for cell in cells if not done(cell)], {}, 0
    while True:
        ready = [cell for cell in waiting if all(map(done, cell.needs))]
        for cell in ready[: len(free)] if time.time() < deadline else ():
            waiting.remove(cell)
            device = free.pop(0)
            running[start(cell, device)] = device
        if not running:
            return
        for ended in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
            free.append(running.pop(ended))
            ended.result()  # raises what went wrong in its thread
        epochs = sum(epochs_done(cell, folder_of(cell, root)) for cell in cells)
        yield from [None] * (epochs - shown)
        shown = max(epochs, shown)


def _run(cell: Cell, folder: Path, device: str, lock: int, deadline: float, stop: threading.Event) -> None:
    """Run a cell, which goes on where an earlier attempt stopped, until it ends or is to stop; note how it went."""
    place, line, begun = REPOSITORY / folder, command(cell, folder, device), time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    attempt = {**code_state(device), "command": " ".join(["python", *line]), "seconds": None}
    attempts = [*_state(folder)["attempts"], attempt]
    note = lambda status, **more: atomic_write_json(place / STATE, {"status": status, "attempts": attempts, **more})
    note(RUNNING)  # before the start: whatever kills us then, the next call knows of it
    with open(place / "output.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, *line], cwd=REPOSITORY, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            pass_fds=[lock], env={**os.environ, **({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})},
        )
    stopped = _ended(process, folder, deadline, stop)
    attempt["seconds"] = round(time.monotonic() - begun, 3)
    try:
        if process.returncode != 0:
            raise UserError(f"exit status {process.returncode}")
        atomic_write_json(place / MARKER, {**collect(cell, folder), **provenance(attempts)})
    except UserError as error:
        if stopped:
            return note(INTERRUPTED)
        note(FAILED, reason=str(error))
        tail = (place / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        tqdm.write("\n  ".join([f"FAILED {cell.name}: {error} ({place / 'output.log'})", *tail]))


def _ended(process: subprocess.Popen, folder: Path, deadline: float, stop: threading.Event) -> bool:
    """Wait until a process ends, or end it: at once on `stop`, after the deadline right after a checkpoint; return whether it was."""
    while process.poll() is None:
        if stop.wait(POLL_SECONDS) or time.time() >= deadline <= checkpoint_time(folder):
            for number in (signal.SIGTERM, signal.SIGKILL):  # its children (loader workers) share its session
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
            return True
    return False


def code_state(device: str) -> dict[str, Any]:
    """Return code revision and machine of an attempt; a YAML file of --add may stand in the root, since the command says it all."""
    own = {"gpu": None, "threads": 1} if device == "cpu" else {"threads": None}
    return origin(environment(seed=0, unread=["*.yaml"]) | own)


def provenance(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the attempts at one cell: dirty if one was or git could not tell, every commit, the command of the first."""
    commits = dict.fromkeys(entry["commit"] for entry in attempts if entry["commit"])
    return {
        **attempts[-1], "command": attempts[0]["command"], "commit": ", ".join(commits) or None, "attempts": len(attempts),
        "dirty": any(entry["dirty"] is not False for entry in attempts),
        "seconds": round(sum(entry["seconds"] or 0 for entry in attempts), 3),
    }
