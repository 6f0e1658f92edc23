"""Runs one function over many tasks in several processes. Called by `datasets.prepare.object_writer`."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm


def run_tasks(produce: Callable[[Any], Any], todo: Sequence, workers: int) -> Iterator:
    """Yield produce(task) of all tasks in the order they are ready, with one progress bar.

    Args:
        produce: picklable, if there are several workers.
        todo: tasks; each has a `name`, for messages.
        workers: processes; 1 works in this one.
    Raises:
        RuntimeError: when a worker process dies, naming the tasks in flight. Whatever `produce` raises is raised here.
    """
    with tqdm(total=len(todo), desc="objects", unit="object") as bar:
        for result in map(produce, todo) if workers == 1 else _run_parallel(produce, todo, workers):
            bar.update()
            yield result


def _run_parallel(produce: Callable[[Any], Any], todo: Sequence, workers: int) -> Iterator:
    context = multiprocessing.get_context("spawn")  # a fork would share the state of the graphics libraries
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=threadpool_limits, initargs=(1,))
    waiting, pending = iter(todo), {}
    try:
        for task in waiting:
            pending[pool.submit(produce, task)] = task
            if len(pending) >= 4 * workers:
                yield from _collect(pending)
        while pending:
            yield from _collect(pending)
    except BrokenProcessPool as error:
        names = ", ".join(sorted(task.name for task in pending.values()))
        raise RuntimeError(
            f"a worker process died (killed, out of memory, or a crash in a library) while one of these was made: {names}. "
            "Finished objects are kept: run the same command again, with fewer --workers if memory is short"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(pending: dict) -> Iterator:
    """Wait for at least one result, remove it from `pending` and yield it."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        result = future.result()
        del pending[future]
        yield result
