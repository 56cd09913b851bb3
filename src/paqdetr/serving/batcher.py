"""Puts the images of many callers together into calls of one model, made in one thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from PIL.Image import Image

from paqdetr.structures import Detections

_Options = TypeVar("_Options", bound=Hashable)


class QueueFull(Exception):
    """As many images wait as may."""


class Closed(Exception):
    """The batcher takes nothing any more."""


@dataclass(eq=False, slots=True)
class _Job(Generic[_Options]):
    image: Image
    options: _Options
    found: Future[Detections] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[_Options]):
    """Images with equal options that wait at the same time go through the model together.

    Args:
        predict: images and their options -> their detections. It is called in one thread only.
        max_batch: images of a call.
        max_wait: seconds that the first image of a call waits for others.
        max_queue: images that may wait.
        alone: options -> whether images with these are calls of their own, since each of them is work enough.

    Attributes:
        batches, images: calls of the model that are done, and images in them.
        busy_since: `time.monotonic()` at the start of the call that is being made; None between calls.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Image], _Options], list[Detections]],
        *,
        max_batch: int = 8,
        max_wait: float = 0.005,
        max_queue: int = 64,
        alone: Callable[[_Options], bool] = lambda options: False,
    ) -> None:
        self._predict, self._alone = predict, alone
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._jobs: list[_Job[_Options]] = []
        self._changed = threading.Condition()
        self._closed = False
        self.batches = self.images = 0
        self.busy_since: float | None = None
        # A daemon: a call that never returns does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="paqdetr-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that somebody waits for."""
        return sum(not job.found.cancelled() for job in self._jobs)

    @property
    def alive(self) -> bool:
        """Whether images will still be looked at."""
        return self._thread.is_alive() and not self._closed

    def submit(self, image: Image, options: _Options) -> Future[Detections]:
        """The detections of an image, once they are there. A future that is cancelled while its image waits costs nothing.

        Raises:
            QueueFull: as many wait as may.
            Closed: after `close`.
        """
        job = _Job(image, options)
        with self._changed:
            if self._closed:
                raise Closed
            self._jobs = [job for job in self._jobs if not job.found.cancelled()]  # and their images
            if len(self._jobs) >= self._max_queue:
                raise QueueFull
            self._jobs.append(job)
            self._changed.notify()
        return job.found

    def close(self, seconds: float = 0) -> bool:
        """Take nothing more; what waits is still done. Returns whether it is within so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._take():
            jobs = [job for job in batch if job.found.set_running_or_notify_cancel()]
            if jobs:
                self._answer(jobs)
                self.busy_since = None

    def _take(self) -> list[_Job[_Options]]:
        """The next jobs with equal options, the oldest first; none once everything is done after `close`."""
        with self._changed:
            while self._jobs or not self._closed:
                if not self._jobs:
                    self._changed.wait()
                    continue
                first = self._jobs[0]
                most = 1 if self._alone(first.options) else self._max_batch
                batch = [job for job in self._jobs if job.options == first.options][:most]
                left = first.arrived + self._max_wait - time.monotonic()
                if len(batch) == most or left <= 0 or self._closed:
                    self._jobs = [job for job in self._jobs if job not in batch]
                    return batch
                self._changed.wait(left)
            return []

    def _answer(self, jobs: Sequence[_Job[_Options]]) -> None:
        self.busy_since = time.monotonic()
        try:
            found = self._predict([job.image for job in jobs], jobs[0].options)
            if len(found) != len(jobs):
                raise RuntimeError(f"the model gave {len(found)} results for {len(jobs)} images")
        except BaseException as error:
            if len(jobs) > 1:  # one image may be to blame: the others get their answer
                for job in jobs:
                    self._answer([job])
            else:
                jobs[0].found.set_exception(error)
            return
        self.batches, self.images = self.batches + 1, self.images + len(jobs)
        for job, detections in zip(jobs, found, strict=True):
            job.found.set_result(detections)
