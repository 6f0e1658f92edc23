"""How far a long loop is: a bar on a terminal, a line per tenth in a file or a pipe."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """Yield `total` items, and show on standard error how many are done: those after which the next one was asked for."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title)
        return
    start, shown = time.monotonic(), 0
    for done, item in enumerate(items, start=1):
        yield item
        tenth = 10 * done // total
        if tenth > shown:
            shown = tenth
            print(f"{title}: {done} of {total}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
