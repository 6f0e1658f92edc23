"""Runs one function over many tasks in several processes, and the options of the commands that do. Called by the preparation."""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from threadpoolctl import threadpool_limits

from utils.engine.progress import progress
from utils.errors import UserError

DIED = "its process died: out of memory, or a crash in a library"


def user_path(text: str) -> Path:
    """Turn a path as people write it, with ~ for their home, into one."""
    return Path(os.path.expanduser(text))


def add_writer_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that writes a data set has: --workers and --overwrite."""
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings or package versions")


def run_tasks(
    produce: Callable[[Any], Any], todo: Sequence, workers: int, lost: Callable[[Any], Any], title: str = "objects"
) -> Iterator:
    """Yield produce(task) of all tasks, which have a `name`, in the order they are ready, and show the progress; 1 worker is this process.

    When a worker process dies, the tasks in flight are repeated one by one, each in a process of its own. Of one that kills this as
    well, lost(task) is yielded.

    Raises:
        UserError: when processes die without a task. Whatever `produce` raises is raised here.
    """
    yield from progress(map(produce, todo) if workers == 1 else _run_parallel(produce, todo, workers, lost), len(todo), title)


def _run_parallel(produce: Callable[[Any], Any], todo: Sequence, workers: int, lost: Callable[[Any], Any]) -> Iterator:
    waiting = dict(enumerate(todo))
    while waiting:
        yield from _run_pool(produce, waiting, workers)
        if waiting and not any(_run_pool(bool, {0: True}, 1)):
            raise UserError("worker processes die before they have anything to do: use --workers 1, or free memory")
        for number in list(waiting)[: 2 * workers + 1]:  # in order: each process had one, the queue a few more
            alone = {number: waiting.pop(number)}
            yield from _run_pool(produce, alone, 1)
            yield from map(lost, alone.values())


def _run_pool(produce: Callable[[Any], Any], waiting: dict[int, Any], workers: int) -> Iterator:
    """Yield produce(task) of the tasks that are finished before a process dies, and take them out of `waiting`."""
    context = multiprocessing.get_context("spawn")  # a fork would share the state of the graphics libraries
    pool, numbers = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker), {}
    try:
        with suppress(BrokenProcessPool):
            for number, task in waiting.items():
                numbers[pool.submit(produce, task)] = number
        for future in as_completed(list(numbers)):
            number = numbers.pop(future)  # and with it the result
            if not isinstance(future.exception(), BrokenProcessPool):
                del waiting[number]
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Give a worker one thread, and let it end with the command, which may be killed without a word to it."""
    threadpool_limits(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
