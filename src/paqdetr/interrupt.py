"""What ends a training from outside. Ctrl-C, SIGTERM and SIGHUP: the step in hand is finished and the state saved first. A
process that loads images dies: an error that says so."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from paqdetr.errors import WorkerError

# A signal to a whole process group arrives several times: from the group, from `timeout`, from torchrun. A person who presses
# Ctrl-C again takes longer than this, in seconds.
_ECHO = 1.0
# What asks a training to stop. SIGHUP: its terminal is gone.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


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
    """While entered, notes the first signal instead of dying of it. Further ones change nothing, but for a second Ctrl-C, which
    acts as ever. Signals that the process was started to ignore (`nohup`) stay ignored.

    Args:
        notify: called with the signal's name when it arrives.

    Attributes:
        signal_number: the signal that came, or None.
    """

    def __init__(self, notify: Callable[[str], object] = lambda name: None) -> None:
        self.signal_number: int | None = None
        self._notify = notify
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may: elsewhere the program that trains handles its signals.
        if threading.current_thread() is threading.main_thread():
            handled = [n for n in STOP_SIGNALS if signal.getsignal(n) not in (None, signal.SIG_IGN)]
            self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number, self._came = number, time.monotonic()
            self._notify(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._came > _ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def worker_start_method() -> str:
    """How processes that load images are started. Python 3.14 has a server fork them on Linux: they would be no children of this
    process, which nobody would tell that one has died, and would take its SIGTERM for a stranger's. They are forked as before."""
    method = multiprocessing.get_start_method()
    return "fork" if method == "forkserver" else method


_GO_ON = "; `paqdetr train RUN --resume` continues a training"


def worker_error(error: RuntimeError | ConnectionError | EOFError) -> WorkerError | None:
    """What a user can do about torch's complaint that a worker died or hangs; None for any other error. One that dies while its
    batch is on the way shows in the connection."""
    reason = str(error).strip().split("\n")[0]
    if reason.startswith("Caught "):  # raised in a worker that lives on: torch's text has its traceback
        return None
    if isinstance(error, ConnectionError | EOFError):
        reason = f"DataLoader worker has closed its connection ({reason or type(error).__name__})"
    if "DataLoader timed out" in reason:
        return WorkerError(
            f"the processes that load images have loaded none for too long: {reason}",
            f"look at the disk or network that the images are on{_GO_ON}",
        )
    if "DataLoader worker" not in reason:
        return None
    if "Bus error" in reason:
        remedy = "/dev/shm is full (docker run --shm-size=8g gives more): set workers=0, or make room"
    elif "exited unexpectedly" in reason and worker_start_method() != "fork":
        remedy = "if a script of yours calls this, put the call below `if __name__ == '__main__':`"
    else:
        remedy = "often memory ran out: set workers or cache_images lower"
    return WorkerError(f"a process that loads images died: {reason}", f"{remedy}{_GO_ON}")
