"""Everything that waits for a GPU, in one command: `python -m benchmarks.gpu_suite [--minutes 9] [--list]`.

Runs the gpu tests, the benchmarks and both stages on 3D MNIST, each in its own process. When the minutes are over it stops what
runs; the same command goes on from there. Every run leaves one line in results/benchmarks/gpu_suite.jsonl; what is done at the present
commit is not run again. Exit status: 0 all done, or no GPU; 1 a step failed; 3 something is left.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.engine.run_log import REPOSITORY, environment
from utils.engine.session import run_command

RECORDS = REPOSITORY / "results" / "benchmarks" / "gpu_suite.jsonl"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
LEFT = 3
OUTPUT_CHARACTERS = 2000  # kept of a run
GRACE_SECONDS = 20  # to write a checkpoint after SIGINT
TRAINING_STEP = ["-m", "benchmarks.training_step", "--config-dir", "configs/mnist3d"]
STEPS = {
    "tests": ["-m", "pytest", "-q", "-m", "gpu", "tests"],
    "edge_conv-n256": ["-m", "benchmarks.edge_conv", "--points", "256"],
    "edge_conv-n1024": ["-m", "benchmarks.edge_conv"],
    "training_step": TRAINING_STEP,
    "training_step-fast": [*TRAINING_STEP, "--output", "results/benchmarks/training_step-fast-gpu.json",
                           "--set", "run.amp=true", "run.compile=default"],
    "training_step-triton": [*TRAINING_STEP, "--output", "results/benchmarks/training_step-triton-gpu.json",
                             "--set", "model.edge_conv=triton"],
    "retrieval_metrics": ["-m", "benchmarks.retrieval_metrics", "--large"],
    "memory_bank": ["-m", "benchmarks.memory_bank", "--samples", "9843"],
    "loss_curves": ["-m", "benchmarks.loss_curves"],
    "mnist3d": ["reproduce.py", "table2-romo", "--dataset", "mnist3d", "--scale", "full", "--seeds", "3", "--resume"],
}


def read_states(records: Path, commit: str) -> dict[str, str]:
    """Return step -> what became of its last run at a commit."""
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    return {row["step"]: row["status"] for row in map(json.loads, lines) if row["commit"] == commit}


def run_steps(steps: Mapping[str, list[str]], records: Path, seconds: float, facts: Mapping[str, str]) -> int:
    """Run the steps that are not done, in order, until the time is over; failed ones are tried again. Return the exit status.

    Args:
        steps: name -> arguments of the interpreter; a step that was stopped must be able to go on by the same command.
        records: JSON lines, one per run: step, command, status, seconds, output (its end), and the facts.
        seconds: after which a running step is stopped and none is started.
        facts: commit, device and so on.
    """
    end = time.monotonic() + seconds
    for name, arguments in steps.items():
        if read_states(records, facts["commit"]).get(name) == DONE or time.monotonic() >= end:
            continue
        start = time.monotonic()
        status, output = _run(arguments, end - start)
        taken = round(time.monotonic() - start, 1)
        row = {"step": name, "command": ["python", *arguments], "status": status, "seconds": taken, "output": output, **facts}
        records.parent.mkdir(parents=True, exist_ok=True)
        with records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}: {status} after {taken:.0f} s" + (f"\n{output}" if status == FAILED else ""), flush=True)
    states = read_states(records, facts["commit"])
    if FAILED in (states.get(name) for name in steps):
        return 1
    return 0 if all(states.get(name) == DONE for name in steps) else LEFT


def _run(arguments: list[str], seconds: float) -> tuple[str, str]:
    """Return the status of one process and the end of what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen([sys.executable, *arguments], cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        stopped = False
        for limit, number in ((seconds, signal.SIGINT), (GRACE_SECONDS, signal.SIGKILL)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
                break
            os.killpg(process.pid, number)
            stopped = True
        status = FAILED if process.wait() else DONE
        output.seek(0)
        return STOPPED if stopped else status, output.read()[-OUTPUT_CHARACTERS:]


def main(argv: list[str] | None = None) -> int:
    """Run or list the steps; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="after which the command ends, at most half a minute later")
    parser.add_argument("--list", action="store_true", help="print the steps and what became of them, run nothing")
    args = parser.parse_args(argv)
    found = environment(seed=0)
    if args.list:
        states = read_states(RECORDS, found["git_sha"])
        print("\n".join(f"{states.get(name, 'not run'):8} {name}: python {' '.join(step)}" for name, step in STEPS.items()))
        return 0
    if not torch.cuda.is_available():
        print(f"No CUDA device here: none of the {len(STEPS)} steps was run (--list shows them).")
        return 0
    facts = {"commit": found["git_sha"], "device": torch.cuda.get_device_name(), "torch": found["torch"]}
    return run_steps(STEPS, RECORDS, 60 * args.minutes, facts)


if __name__ == "__main__":
    sys.exit(run_command(main))
