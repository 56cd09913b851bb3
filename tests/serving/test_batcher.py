from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from PIL import Image
from stub import Stub

from paqdetr.serving.batcher import Batcher, Closed, QueueFull


def image(red: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (red, 0, 0))


def blocked(**how: Any) -> tuple[Batcher[str], list[tuple[int, str]], threading.Event]:
    """A batcher whose model notes (images, options) of each call and waits for the event."""
    calls: list[tuple[int, str]] = []
    event, stub = threading.Event(), Stub()

    def predict(images, options):
        calls.append((len(images), options))
        assert event.wait(30)
        return stub.predict(images, threshold=0.0)

    return Batcher(predict, **how), calls, event


def wait_for_first(calls: list[tuple[int, str]]) -> None:
    end = time.monotonic() + 30
    while not calls and time.monotonic() < end:
        time.sleep(0.001)


def test_what_waits_goes_together_by_options_and_each_gets_its_own_answer() -> None:
    batcher, calls, event = blocked(max_batch=3, max_wait=0, max_queue=64)
    first = batcher.submit(image(1), "a")
    wait_for_first(calls)
    futures = [batcher.submit(image(red), options) for red, options in enumerate("aabaaab")]
    futures[3].cancel()
    event.set()
    assert len(first.result(30)) == 1
    assert [len(f.result(30)) for f in futures if not f.cancelled()] == [0, 1, 2, 4, 5, 6]
    # Three of "a" (of which one was cancelled), two of "b", which had waited longer than the rest of "a".
    assert calls == [(1, "a"), (2, "a"), (2, "b"), (2, "a")]
    assert (batcher.batches, batcher.images) == (4, 7)


def test_a_full_queue_refuses_and_a_closed_one_finishes_what_waits() -> None:
    batcher, calls, event = blocked(max_batch=1, max_wait=0, max_queue=2)
    running = batcher.submit(image(1), "a")
    wait_for_first(calls)
    futures = [batcher.submit(image(1), "a") for _ in range(2)]
    with pytest.raises(QueueFull):
        batcher.submit(image(1), "a")
    assert not batcher.close(0.01)
    with pytest.raises(Closed):
        batcher.submit(image(1), "a")
    event.set()
    assert [len(f.result(30)) for f in (running, *futures)] == [1, 1, 1]
    assert batcher.close(30) and not batcher.alive


def test_what_nobody_waits_for_any_more_takes_no_place() -> None:
    batcher, calls, event = blocked(max_batch=1, max_wait=0, max_queue=2)
    batcher.submit(image(1), "a")
    wait_for_first(calls)
    for _ in range(3):
        futures = [batcher.submit(image(1), "a") for _ in range(2)]
        assert batcher.waiting == 2 and all(future.cancel() for future in futures)
        assert batcher.waiting == 0
    kept = batcher.submit(image(2), "a")
    assert [job.found for job in batcher._jobs] == [kept]  # the others' images are not in memory
    event.set()
    assert len(kept.result(30)) == 2


def test_the_first_of_a_batch_may_be_given_up_while_it_waits() -> None:
    batcher: Batcher[str] = Batcher(lambda images, options: Stub().predict(images, threshold=0.0), max_wait=0.2)
    batcher.submit(image(1), "a").cancel()
    assert len(batcher.submit(image(2), "b").result(30)) == 2 and batcher.alive


def test_what_is_work_enough_goes_alone() -> None:
    batcher, calls, event = blocked(max_batch=3, max_wait=0, alone=lambda options: options == "tiles")
    futures = [batcher.submit(image(1), "b")]
    wait_for_first(calls)
    futures += [batcher.submit(image(1), options) for options in ("tiles", "tiles", "b", "b")]
    event.set()
    assert [len(future.result(30)) for future in futures] == [1] * 5
    assert calls == [(1, "b"), (1, "tiles"), (1, "tiles"), (2, "b")]


def test_one_image_that_the_model_fails_on_takes_no_other_with_it() -> None:
    batcher: Batcher[str] = Batcher(lambda images, options: Stub().predict(images, threshold=0.0), max_wait=0.2)
    futures = [batcher.submit(image(red), "a") for red in (2, 255, 3)]
    assert len(futures[0].result(30)) == 2 and len(futures[2].result(30)) == 3
    with pytest.raises(RuntimeError, match="a defect"):
        futures[1].result(30)


def test_a_lone_image_waits_no_longer_than_it_has_to() -> None:
    batcher: Batcher[str] = Batcher(lambda images, options: Stub().predict(images, threshold=0.0), max_wait=0.05)
    started = time.perf_counter()
    batcher.submit(image(1), "a").result(30)
    assert 0.045 < time.perf_counter() - started < 5
