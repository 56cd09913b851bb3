from __future__ import annotations

import threading
import time

import pytest

from paqdetr.data.read_ahead import read_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_results_come_in_order(threads: int, count: int) -> None:
    def work(job: int) -> int:
        time.sleep(0.004 if job % 3 == 0 else 0)  # the first of three is ready last
        return job * job

    assert list(read_ahead(range(count), work, threads=threads)) == [job * job for job in range(count)]


def test_no_more_is_begun_than_threads_can_do() -> None:
    begun: list[int] = []
    results = read_ahead(range(20), lambda job: begun.append(job) or job, threads=3)
    for given in range(15):
        assert next(results) == given
        assert len(begun) <= given + 1 + 3
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 18, "whoever stops has no more begun"


def test_somebody_else_works() -> None:
    names = set(read_ahead(range(8), lambda _: threading.current_thread(), threads=2))
    assert 1 <= len(names) <= 2 and threading.current_thread() not in names
    assert not any(thread.is_alive() for thread in names)
    assert set(read_ahead(range(3), lambda _: threading.current_thread(), threads=0)) == {threading.current_thread()}


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_in_its_place(threads: int) -> None:
    results = read_ahead([4, 2, 0, 1], lambda job: 4 // job, threads=threads)
    assert next(results) == 1 and next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)
