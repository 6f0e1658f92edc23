"""Runs one function over many tasks in several processes, and the options of the commands that do. Called by the preparation."""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from utils.engine.progress import progress
from utils.errors import UserError


def user_path(text: str) -> Path:
    """Turn a path as people write it, with ~ for their home, into one."""
    return Path(os.path.expanduser(text))


def add_writer_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that writes a data set has: --workers and --overwrite."""
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings or package versions")


def run_tasks(produce: Callable[[Any], Any], todo: Sequence, workers: int, title: str = "objects") -> Iterator:
    """Yield produce(task) of all tasks, which have a `name`, in the order they are ready, and show the progress; 1 worker is this process.

    Raises:
        UserError: when a worker process dies, naming the tasks in flight. Whatever `produce` raises is raised here.
    """
    yield from progress(map(produce, todo) if workers == 1 else _run_parallel(produce, todo, workers), len(todo), title)


def _run_parallel(produce: Callable[[Any], Any], todo: Sequence, workers: int) -> Iterator:
    context = multiprocessing.get_context("spawn")  # a fork would share the state of the graphics libraries
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=threadpool_limits, initargs=(1,))
    pending = {}
    try:
        pending.update((pool.submit(produce, task), task) for task in todo)
        for future in as_completed(list(pending)):
            yield future.result()
            del pending[future]
    except BrokenProcessPool as error:
        begun = list(pending.values())[: 2 * workers + 1]  # in order: each process has one, the queue a few more
        names = ", ".join(task.name for task in begun)
        raise UserError(
            f"a worker process died (killed, out of memory, or a crash in a library) while one of these was made: {names}. "
            "Finished objects are kept: run the same command again, with fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
