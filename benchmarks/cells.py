"""Two cells of a table side by side, or one after the other: `python -m benchmarks.cells [--config FILE] [--epochs 2] [--repeats 3]`.

Side by side, as `reproduce.py` runs them on two cores, each training has one thread; in turn, each has two. Both ways run the same two
commands of step 1, seeds 0 and 1, from the start of Python to the scores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.floors import REPOSITORY, start, write_report
from utils.engine.session import run_command
from utils.errors import UserError

THREADS = {"side by side": 1, "in turn": 2}


def main(argv: list[str] | None = None) -> None:
    """Time both ways in turn, print the medians and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits/step1.yaml", metavar="FILE", help="a step1.yaml whose data are prepared")
    parser.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each way, of which the median counts")
    args, report = start("cells", parser, argv, ("epochs", "repeats"))
    found: dict[str, list[float]] = {way: [] for way in THREADS}
    for _ in range(args.repeats):
        for way, taken in found.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                for seeds in ([0, 1],) if way == "side by side" else ([0], [1]):
                    for process in [_start(args, seed, THREADS[way], Path(folder)) for seed in seeds]:
                        _finish(process)
                taken.append(time.perf_counter() - begin)
    medians = {way: statistics.median(taken) for way, taken in found.items()}
    ratio = medians["in turn"] / medians["side by side"]
    print(f"two trainings: {medians['side by side']:.1f} s side by side, {medians['in turn']:.1f} s in turn, {ratio:.2f}x")
    write_report("cells", {**report, "all_seconds": found, "seconds_of_both": medians, "speedup": {"side by side": ratio}}, args.output)


def _start(args: argparse.Namespace, seed: int, threads: int, folder: Path) -> subprocess.Popen:
    own = [f"optim.epochs={args.epochs}", f"run.seed={seed}", f"run.threads={threads}", f"run.output={folder / str(seed)}",
           "run.device=cpu", "run.figures=false"]
    command = [sys.executable, "train_step1.py", "--config", args.config, "--set", *args.overrides, *own]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen) -> None:
    said = process.communicate()[1]
    if process.returncode:
        raise UserError(f"{' '.join(process.args)} failed: {said.strip()[-500:]}")


if __name__ == "__main__":
    sys.exit(run_command(main))
