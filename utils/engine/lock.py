"""One process at a time: a lock that the kernel lets go of when the process dies, however it dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError


@contextmanager
def hold_lock(path: Path, refusal: str | None = None) -> Iterator[int]:
    """Hold the lock file `path`, made with its folder; processes that inherit the yielded descriptor hold it as long as they live.

    Raises:
        UserError: with the text `refusal`, at once, if another process holds it; without a text, that one is waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise UserError(refusal) from None
        yield file.fileno()
