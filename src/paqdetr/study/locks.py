"""Files that say: somebody is at it. A lock ends with the last process that holds it, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[IO[bytes] | None]:
    """Keep others out for as long as the block runs, and for as long as a child lives that has inherited the file.

    Unlike the lock of a run's config.yaml, which belongs to a process, this one belongs to the open file: a training that goes on
    after its queue was killed still holds it.

    Args:
        path: of the lock; made if absent.
        wait: for the other process to let go.

    Yields:
        the open file, to be passed on to children; None where there are no such locks (Windows).

    Raises:
        Busy: another process holds it, and `wait` is off.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(str(path)) from None
        except OSError:
            pass  # a network's file system without locks
        yield file
