"""Work shared between threads that let go of the interpreter lock, as numba's `nogil` loops do.

Own threads rather than numba's: its OpenMP layer ends the process when a forked DataLoader worker uses it, and its other
built-in layer must not be entered from two Python threads at once. Here a caller works too and never waits for a thread
that has not begun, so callers cannot block each other, and a fork loses nothing but idle threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None
_lock = Lock()


def for_each(work: Callable[[T], None], items: Sequence[T], *, threads: int) -> None:
    """Call `work` on every item, by the caller and up to `threads - 1` helpers: each takes the next item that is left.

    Which thread takes which item is left to chance, so `work` has to write to places that belong to its item.

    Raises:
        Exception: the first that `work` raised; items not begun by then are left out.
    """
    left = deque(items)

    def drain() -> None:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return
            work(item)

    helpers = _start(drain, min(threads, len(items)) - 1)
    try:
        drain()
    finally:
        left.clear()
        begun = [helper for helper in helpers if not helper.cancel()]
        failures = [failure for helper in begun if (failure := helper.exception()) is not None]
    if failures:
        raise failures[0]


def _start(work: Callable[[], None], count: int) -> list[Future[None]]:
    global _pool
    if count < 1:
        return []
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, 2), thread_name_prefix="paqdetr")
        try:
            return [_pool.submit(work) for _ in range(count)]
        except RuntimeError:  # the interpreter is shutting down: no new threads, and the caller works alone
            return []


def _forget() -> None:
    """In a forked child: threads are not copied, and another thread may have held the lock."""
    global _pool, _lock
    _pool, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
