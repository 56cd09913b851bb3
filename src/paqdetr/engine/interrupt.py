"""What ends a training from outside. Ctrl-C and SIGTERM: the step in hand is finished and the state saved first. A process
that loads images dies: an error that says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from paqdetr.errors import WorkerError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal has ended a training, whose state is saved: `resume=True` continues it.

    Attributes:
        step: optimiser steps that are done and saved.
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}; saved at step {step}")
        self.step, self.signal_number = step, signal_number
        self.exit_code = 128 + signal_number


class StopRequest:
    """While entered, notes the first signal instead of dying of it; a second one acts as ever.

    Args:
        told: called with the signal's name when it arrives.

    Attributes:
        signal_number: the signal that came, or None.
    """

    def __init__(self, told: Callable[[str], object] = lambda name: None) -> None:
        self.signal_number: int | None = None
        self._told = told
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may: elsewhere the program that trains handles its signals.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        self._restore()
        self._told(signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def worker_error(error: RuntimeError | MemoryError) -> WorkerError | None:
    """What a user can do about torch's complaint that a worker died; None for any other error."""
    if "DataLoader worker" not in str(error):
        return None
    reason = str(error).strip().split("\n")[0]
    return WorkerError(
        f"a process that loads images died: {reason}",
        "often memory ran out: set workers or cache_images lower, then continue with --resume",
    )
