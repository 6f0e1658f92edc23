"""Two cells of a table side by side, or one after the other: `python -m benchmarks.cells [--config FILE] [--epochs 2] [--repeats 3]`.

Side by side, as `reproduce.py` runs them on two cores, each training has one thread; in turn, each has two. Both ways run the same two
commands of step 1, seeds 0 and 1, from the start of Python to the scores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.floors import REPOSITORY, in_turn, start, write_report
from utils.engine.session import run_command
from utils.errors import UserError
from utils.settings.config import SET


def main(argv: list[str] | None = None) -> None:
    """Time both ways in turn, print the medians and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits/step1.yaml", metavar="FILE", help="a step1.yaml whose data are prepared")
    parser.add_argument("--set", **SET, help="further settings")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each way, of which the median counts")
    args, report = start("cells", parser, argv)
    with tempfile.TemporaryDirectory() as folder:
        own = [f"optim.epochs={args.epochs}", f"run.output={folder}", "run.device=cpu", "run.figures=false"]
        command = [sys.executable, "train_step1.py", "--config", args.config, "--set", *args.overrides, *own]
        ways = {
            "side by side": lambda: _train(command, seeds=(0, 1), threads=1),
            "in turn": lambda: [_train(command, seeds=(seed,), threads=2) for seed in (0, 1)],
        }
        found = in_turn(ways, args.device, args.repeats)
    medians = {way: statistics.median(taken) for way, taken in found.items()}
    ratio = medians["in turn"] / medians["side by side"]
    print(f"two trainings: {medians['side by side']:.1f} s side by side, {medians['in turn']:.1f} s in turn, {ratio:.2f}x")
    write_report("cells", {**report, "all_seconds": found, "seconds_of_both": medians, "speedup": {"side by side": ratio}}, args.output)


def _train(command: Sequence[str], seeds: Sequence[int], threads: int) -> None:
    """Run one training per seed, all at once."""
    commands = [[*command, f"run.seed={seed}", f"run.threads={threads}"] for seed in seeds]
    started = [subprocess.Popen(one, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for one in commands]
    for process in started:
        said = process.communicate()[1]
        if process.returncode:
            raise UserError(f"{' '.join(process.args)} failed: {said.strip()[-500:]}")


if __name__ == "__main__":
    sys.exit(run_command(main))
