"""Work that threads do while this one is busy with what they did before: pictures are read while a GPU detects."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def read_ahead(jobs: Iterable[Job], work: Callable[[Job], Result], *, threads: int) -> Iterator[Result]:
    """The result of every job, in their order, whoever did it and when.

    Args:
        jobs: taken one by one, as they are begun.
        work: what is done with each; its error is raised in place of its result.
        threads: that work at the same time. So many results beside the one given out exist at most. 0 works in this thread, on
            demand.
    """
    if threads == 0:
        yield from map(work, jobs)
        return
    remaining = iter(jobs)
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="read ahead") as pool:
        try:
            begun.extend(pool.submit(work, job) for job in islice(remaining, threads))
            while begun:
                result = begun.popleft().result()
                begun.extend(pool.submit(work, job) for job in islice(remaining, 1))
                yield result
        finally:  # whoever stops in between waits for what is being done, and for nothing else
            for future in begun:
                future.cancel()
