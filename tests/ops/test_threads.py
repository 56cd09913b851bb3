from __future__ import annotations

import threading

import pytest

from paqdetr.ops.threads import for_each


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_item_once(threads: int, count: int) -> None:
    done: list[int] = []
    for_each(done.append, range(count), threads=threads)
    assert sorted(done) == list(range(count))


def test_helpers_help() -> None:
    """The two items wait for each other, so one thread alone would never end."""
    both = threading.Barrier(2, timeout=30)
    for_each(lambda _: both.wait() and None, [0, 1], threads=2)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_reaches_the_caller_and_what_is_left_is_left(threads: int) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("one")
        done.append(item)

    with pytest.raises(ValueError, match="one"):
        for_each(work, [1, *range(2, 2 + threads), *range(100, 200)], threads=threads)
    for_each(done.append, [1000], threads=threads)
    assert done[-1] == 1000


def test_a_failure_in_a_helper_reaches_the_caller() -> None:
    both = threading.Barrier(2, timeout=30)
    caller = threading.current_thread()

    def work(_: int) -> None:
        both.wait()
        if threading.current_thread() is not caller:
            raise ValueError("helper")

    with pytest.raises(ValueError, match="helper"):
        for_each(work, [0, 1], threads=2)


def test_many_callers_at_once_and_callers_within_callers() -> None:
    done: list[tuple[int, int]] = []

    def outer(i: int) -> None:
        for_each(lambda j: done.append((i, j)), range(20), threads=4)

    callers = [threading.Thread(target=for_each, args=(outer, range(5)), kwargs={"threads": 4}) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert sorted(done) == sorted((i, j) for i in range(5) for j in range(20) for _ in range(6))
