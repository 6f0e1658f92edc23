"""Reproduces the paper's tables and figures, one command each; what is run stands in experiments/protocol.yaml.

python reproduce.py table4 --dataset digits --scale small --seeds 3     a table: runs what is missing, then renders it
python reproduce.py table4 --dataset digits --scale small --list        its cells and their state; runs nothing
python reproduce.py render                                              every table and figure again from results/ alone
"""

import argparse
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch

from experiments.cells import all_cells, expand
from experiments.jobs import code_state, make_jobs
from experiments.protocol import SCALES, find_setup, load_protocol
from experiments.queue import DONE, FAILED, SKIPPED, Job, Queue, states
from experiments.results import manifest, manifest_path, publish, read_manifests
from experiments.scheduler import Scheduler
from experiments.tables import render
from utils.engine.checkpoint import atomic_write_json
from utils.engine.device import select_device
from utils.engine.run_log import REPOSITORY
from utils.engine.session import run_command
from utils.errors import UserError
from utils.settings.data_options import nearest

COMPLETE, SOME_FAILED, LEFT, STOPPED = 0, 1, 3, 130  # exit status; 2 is a wrong call
SHOWN = 12  # names of cells that are printed at the end


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("table", help="table2-romo table4 table6 table8 table9 fig3 fig4 fig5 fidelity, one of --add, or render")
    option("--dataset", help="a data set of the protocol, or a folder of configs/")
    option("--scale", choices=SCALES, default="full", help="small: sized for a CPU, see experiments/protocol.yaml")
    option("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    option("--tasks", nargs="+", default=[], metavar="TASK", help="e.g. RP GM; a pair of modalities trains both directions")
    option("--device", default="auto", help="auto (every GPU, else the CPU), cpu, cuda or cuda:N")
    option("--workers", type=int, default=1, metavar="W", help="processes at a time per device; on the CPU one thread each")
    option("--budget", type=float, metavar="MINUTES", help="then start nothing more, and stop running cells at a checkpoint")
    option("--resume", action="store_true", help="go on with cells that were interrupted or failed")
    option("--list", action="store_true", help="print the cells and their state, run nothing")
    option("--add", type=Path, metavar="FILE", help="YAML like experiments/protocol.yaml: more data sets, tables, rows")
    option("--results", type=Path, default=REPOSITORY / "results", metavar="DIR", help="folder of tables and records")
    option("--runs", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="folder of the queues and runs")
    arguments = parser.parse_args(argv)
    if arguments.table != "render" and not arguments.dataset:
        parser.error("--dataset is needed")
    if min(arguments.seeds, arguments.workers) < 1 or (arguments.budget is not None and arguments.budget < 0):
        parser.error("--seeds and --workers must be at least 1, --budget at least 0")
    return arguments


def command_of(arguments: argparse.Namespace) -> str:
    """Return the command that fills a table, without what belongs to one machine: places, devices, budget."""
    words = ["python", "reproduce.py", arguments.table, "--dataset", arguments.dataset, "--scale", arguments.scale]
    words += ["--seeds", str(arguments.seeds), *(["--tasks", *arguments.tasks] if arguments.tasks else [])]
    return shlex.join([*words, *(["--add", arguments.add.name] if arguments.add else [])])


def reproduce(arguments: argparse.Namespace) -> int:
    """Run and render one table; return the exit status.

    Args:
        arguments: of the command line.
    Raises:
        ValueError, FileNotFoundError: on a wrong call, or a queue that cannot be worked on now.
    """
    protocol = load_protocol(arguments.add)
    if arguments.table not in protocol["tables"]:
        names = [*protocol["tables"], "render"]
        raise UserError(f"unknown table {arguments.table!r}{nearest(arguments.table, names)}; known: {', '.join(names)}")
    table = protocol["tables"][arguments.table]
    setup = find_setup(protocol, arguments.dataset, arguments.scale, arguments.tasks)
    rows = expand(table, setup, range(arguments.seeds))
    root = arguments.runs / f"{setup.dataset}-{setup.scale}"
    jobs = make_jobs(all_cells(rows), root)
    if arguments.list:
        print_state(jobs, states(jobs, REPOSITORY / root))
        return COMPLETE
    path = manifest_path(arguments.results, arguments.table, setup)
    content = manifest(arguments.table, table, setup, rows, command_of(arguments))
    stopped = False
    with Queue(REPOSITORY / root) as queue:
        budget = None if arguments.budget is None else 60 * arguments.budget
        scheduler = Scheduler(queue, jobs, slots(arguments), code_state, budget, arguments.resume)
        try:
            scheduler.run()
        except KeyboardInterrupt:
            stopped = True
        publish(arguments.results, jobs)
        atomic_write_json(path, content)
        written = render(path, content)
        return report(jobs, states(jobs, REPOSITORY / root), written, stopped)


def slots(arguments: argparse.Namespace) -> list[str]:
    """Return the device of every process that may run at a time."""
    device = select_device(arguments.device)
    devices = [str(device)]
    if arguments.device == "auto" and device.type == "cuda":
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return devices * arguments.workers


def print_state(jobs: list[Job], lines: dict[str, dict]) -> None:
    """Print every cell with its state, and how many there are of each."""
    for job in jobs:
        print(f"{lines[job.id]['status']:12s} {job.id}  {job.units:4d} epochs  {job.name}")
    counts = Counter(line["status"] for line in lines.values())
    print(f"{len(jobs)} cells: " + ", ".join(f"{count} {status}" for status, count in counts.items()))


def report(jobs: list[Job], lines: dict[str, dict], written: list[Path], stopped: bool) -> int:
    """Say what was written, what failed and what is left; return the exit status."""
    for path in written:
        print(f"wrote {path}")
    troubled, left = [], []
    for job in jobs:
        line = lines[job.id]
        if line["status"] in (FAILED, SKIPPED):
            troubled.append(f"{line['status']}: {job.name}: {line['reason']}")
        elif line["status"] != DONE:
            left.append(f"{line['status']}: {job.name}")
    for title, entries in (("not done", troubled), ("left, go on with the same command and --resume", left)):
        if entries:
            more = [f"... and {len(entries) - SHOWN} more, see --list"] if len(entries) > SHOWN else []
            print("\n  ".join([f"{len(entries)} of {len(jobs)} cells {title}:", *entries[:SHOWN], *more]))
    return STOPPED if stopped else LEFT if left else SOME_FAILED if troubled else COMPLETE


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = parse_arguments(argv)
    if arguments.table == "render":
        for path, content in read_manifests(arguments.results).items():
            for written in render(path, content):
                print(f"wrote {written}")
        return COMPLETE
    return reproduce(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    status: list[int] = []
    sys.exit(run_command(lambda: status.append(main())) or status[0])
