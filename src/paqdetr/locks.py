"""Lock files: at most one process trains in a folder, makes a data set, writes a file. The system releases a lock when its last
holder ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from weakref import WeakSet

# `filelock` would not do: a study hands its lock on to the training that it starts, which takes the open file itself.
try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

_held: WeakSet[IO[bytes]] = WeakSet()


class Busy(Exception):
    """Another process holds the lock."""


def acquire(path: Path, *, wait: bool = False) -> IO[bytes] | None:
    """Take a lock, held until the returned file is closed everywhere.

    A process that is forked from this one closes its copy at once (those that load images must not keep a run locked whose
    training was killed); one that is started with `subprocess` and `pass_fds` keeps it.

    Args:
        path: the lock file; made if absent, and never replaced. Only its holder may remove it.
        wait: for the other process to let go.

    Returns:
        the open file; None where there are no such locks (Windows, some network file systems).

    Raises:
        Busy: another process holds it, and `wait` is off.
        OSError: the file cannot be made.
    """
    if fcntl is None:
        return None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise Busy(str(path)) from None
        except OSError:
            file.close()
            return None
        if _is_at(file, path):
            _held.add(file)
            return file
        file.close()  # its last holder has removed it in between: whoever comes next makes another


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[IO[bytes] | None]:
    """Hold a lock for as long as the block runs; see `acquire`."""
    file = acquire(path, wait=wait)
    try:
        yield file
    finally:
        if file is not None:
            file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _close_held() -> None:
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)
