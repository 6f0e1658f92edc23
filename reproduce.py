"""Reproduces the paper's tables and figures, one command each; what is run stands in experiments/protocol.yaml.

python reproduce.py table4 --dataset digits --scale small --seeds 3     a table: runs what is missing, then renders it
python reproduce.py table4 --dataset digits --scale small --list        its cells and their state; runs nothing
python reproduce.py record mine runs/digits/step2/RUN                   adds finished runs to the table results/mine.jsonl
python reproduce.py render                                              every table, figure and document again from results/
"""

import argparse
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Container
from pathlib import Path

import torch

from datasets.prepare.parallel import user_path
from experiments.cells import Cell, all_cells, expand
from experiments.documents import rewrite
from experiments.protocol import find_setup, load_protocol
from experiments.records import publish, record_run
from experiments.runner import DONE, FAILED, SKIPPED, finished, hold, run_cells, states
from experiments.tables import render
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
    option("table", help="a table of experiments/protocol.yaml or --add (a wrong name lists them), record, or render")
    option("record", nargs="*", metavar="RECORD", help="after record: the table, and run folders")
    option("--row", metavar="NAME", help="with record: row of the table, default: what was trained")
    option("--variant", metavar="NAME", help="with record: what is compared, as evaluate.py prints it, e.g. 'posterior, diffusion'")
    option("--dataset", help="a data set of the protocol, or a folder of configs/")
    option("--scale", choices=("full", "small"), help="default full; small: fewer epochs, see experiments/protocol.yaml")
    option("--mode", choices=("head", "e2e"), help="comparisons: on frozen features, as they are by default, or with the encoders")
    option("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    option("--tasks", nargs="+", default=[], metavar="TASK", help="e.g. RP GM; a pair of modalities trains both directions")
    option("--device", default="auto", help="auto (every GPU, else the CPU), cpu, cuda or cuda:N")
    option("--workers", type=int, metavar="W", help="processes at a time per device, default: 2 on the CPU, 1 per GPU")
    option("--budget", type=float, metavar="MINUTES", help="then start nothing more, and stop running cells at a checkpoint")
    option("--resume", action="store_true", help="go on with cells that were interrupted or failed")
    option("--list", action="store_true", help="print the cells and their state, run nothing")
    option("--add", type=user_path, metavar="FILE", help="YAML like experiments/protocol.yaml: more data sets, tables, rows")
    option("--results", type=user_path, default=REPOSITORY / "results", metavar="DIR", help="folder of tables and records")
    option("--runs", type=user_path, default=Path("runs/reproduce"), metavar="DIR", help="folder of the runs")
    arguments = parser.parse_args(argv)
    if arguments.table == "record" and len(arguments.record) < 2:
        parser.error("record needs a table and at least one run folder")
    if arguments.table != "record" and arguments.record:
        parser.error(f"unexpected: {' '.join(arguments.record)}")
    if arguments.table not in ("record", "render") and not arguments.dataset:
        parser.error("--dataset is needed")
    if min(arguments.seeds, arguments.workers or 1) < 1 or (arguments.budget is not None and arguments.budget < 0):
        parser.error("--seeds and --workers must be at least 1, --budget at least 0")
    return arguments


def scale_of(arguments: argparse.Namespace, mode: str | None, scales: Container[str]) -> str:
    """Return the scale that the command line asks for, given a table's own mode and what the protocol has of the data set.

    Raises:
        UserError: on frozen features where the table is of trained encoders, or a --scale beside a mode that has a scale of its own.
    """
    if (arguments.mode, mode) == ("head", "e2e"):
        raise UserError(f"{arguments.table} is of encoders that are trained: leave --mode out")
    mode = arguments.mode or mode
    if mode != "head" and not (mode == "e2e" and mode in scales):
        return arguments.scale or "full"
    if arguments.scale:
        raise UserError(f"--mode {mode} has one size on {arguments.dataset}, found --scale {arguments.scale}: leave --scale out")
    return mode


def command_of(arguments: argparse.Namespace, scale: str) -> str:
    """Return the command that fills a table, without what belongs to one machine: places, devices, budget."""
    words = ["python", "reproduce.py", arguments.table, "--dataset", arguments.dataset]
    words += [*(["--mode", arguments.mode] if arguments.mode else []), *(["--scale", scale] if scale in ("full", "small") else [])]
    words += ["--seeds", str(arguments.seeds), *(["--tasks", *arguments.tasks] if arguments.tasks else [])]
    return shlex.join([*words, *(["--add", arguments.add.name] if arguments.add else [])])


def reproduce(arguments: argparse.Namespace, protocol: dict[str, dict]) -> int:
    """Run and render one table of the protocol; return the exit status."""
    if arguments.table not in protocol["tables"]:
        names = [*protocol["tables"], "record", "render"]
        raise UserError(f"unknown table {arguments.table!r}{nearest(arguments.table, names)}; known: {', '.join(names)}")
    table = protocol["tables"][arguments.table]
    scale = scale_of(arguments, table.get("mode"), protocol["datasets"].get(arguments.dataset, {}))
    setup = find_setup(protocol, arguments.dataset, scale, arguments.tasks)
    if scale == "head" and setup.source is None:
        raise UserError(f"{setup.dataset} names no frozen features: use --mode e2e, or --add a head: with a source:, see docs/reproduce.md")
    rows = expand(table, setup, range(arguments.seeds))
    if not rows:
        raise UserError(f"every row of {arguments.table} is of frozen features: use --mode head")
    root, cells = arguments.runs / f"{setup.dataset}-{setup.scale}", all_cells(rows)
    if arguments.list:
        found = [state["status"] for state in states(cells, root).values()]
        epochs = [f"{cell.epochs:4d} epochs" if cell.epochs else " " * 11 for cell in cells]
        print("\n".join(f"{status:12s} {cell.id}  {count}  {cell.name}" for cell, count, status in zip(cells, epochs, found)))
        print(f"{len(cells)} cells: " + ", ".join(f"{count} {status}" for status, count in Counter(found).items()))
        return COMPLETE
    stopped, path = False, arguments.results / f"{arguments.table}-{setup.dataset}-{setup.scale}.jsonl"
    with hold(root) as lock:
        budget = None if arguments.budget is None else 60 * arguments.budget
        try:
            run_cells(cells, root, devices(arguments), lock, budget, arguments.resume)
        except KeyboardInterrupt:
            stopped = True
        publish(path, rows, finished(cells, root), command_of(arguments, scale))
        return report(states(cells, root), cells, render(path, protocol), stopped)


def devices(arguments: argparse.Namespace) -> list[str]:
    """Return the device of every process that may run at a time."""
    device = select_device(arguments.device)
    every = arguments.device == "auto" and device.type == "cuda"
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if every else [str(device)]
    return names * (arguments.workers or (min(2, os.cpu_count() or 1) if device.type == "cpu" else 1))


def report(found: dict[str, dict], cells: list[Cell], written: list[Path], stopped: bool) -> int:
    """Say what was written, what failed and what is left; return the exit status."""
    print("".join(f"wrote {path}\n" for path in written), end="")
    told = [(found[cell.id], f"{found[cell.id]['status']}: {cell.name}") for cell in cells]
    troubled = [f"{text}: {state['reason']}" for state, text in told if state["status"] in (FAILED, SKIPPED)]
    left = [text for state, text in told if state["status"] not in (DONE, FAILED, SKIPPED)]
    for title, entries in (("not done", troubled), ("left, go on with the same command and --resume", left)):
        more = [f"... and {len(entries) - SHOWN} more, see --list"] if len(entries) > SHOWN else []
        if entries:
            print("\n  ".join([f"{len(entries)} of {len(cells)} cells {title}:", *entries[:SHOWN], *more]))
    return STOPPED if stopped else LEFT if left else SOME_FAILED if troubled else COMPLETE


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = parse_arguments(argv)
    protocol = load_protocol(arguments.add)
    if arguments.table not in ("record", "render"):
        return reproduce(arguments, protocol)
    for folder in arguments.record[1:]:
        record_run(arguments.results / f"{arguments.record[0]}.jsonl", user_path(folder), arguments.row, arguments.variant)
    written = [entry for path in sorted(arguments.results.glob("*.jsonl")) for entry in render(path, protocol)]
    if arguments.results.resolve() == REPOSITORY / "results":
        written += rewrite(REPOSITORY, arguments.results, protocol)
    print("\n".join(f"wrote {path}" for path in written))
    return COMPLETE


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run_command(main))
