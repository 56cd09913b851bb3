"""Processes that a queue starts: with fixed threads, a log, and a signal that is handed on once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from paqdetr.engine.interrupt import StopRequest

_POLL = 0.2


class StudyInterrupted(KeyboardInterrupt):
    """A signal has ended the queue; what was being trained has saved its state.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative if a signal killed it.
        seconds: by the clock.
        cpu_seconds: that it and its children were given; None where the system does not say.
        log_start: bytes of the log that are older.
    """

    code: int
    seconds: float
    cpu_seconds: float | None
    log_start: int = 0


def raise_if_stopped(stop: StopRequest) -> None:
    """Raise StudyInterrupted if a signal came."""
    if stop.signal_number is not None:
        raise StudyInterrupted(stop.signal_number)


def run_child(
    arguments: list[str],
    *,
    threads: int,
    log: Path,
    lock: IO[bytes] | None,
    stop: StopRequest,
    watch: Callable[[], object] = lambda: None,
) -> Ended:
    """Run `python -m ARGUMENTS` to its end. A signal to this process is handed on, once; the child saves and ends.

    The child is in a session of its own: Ctrl-C in a terminal would reach it a second time otherwise, and the second
    one ends it at once. It inherits the lock, so a child that outlives a queue that was killed keeps its run.

    Args:
        threads: of OpenMP, BLAS and numba.
        log: what it prints is added there.
        watch: called now and then while it runs.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started, before = time.perf_counter(), os.times()
    with log.open("ab") as file:
        log_start = file.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | _thread_settings(threads),
            start_new_session=True,
            pass_fds=() if lock is None else (lock.fileno(),),
        )
        with _ended_with(child):
            handed_on = False
            while child.poll() is None:
                if stop.signal_number is not None and not handed_on:
                    handed_on = True
                    child.send_signal(stop.signal_number)
                watch()
                time.sleep(_POLL)
    after = os.times()
    given = after.children_user + after.children_system - before.children_user - before.children_system
    return Ended(child.returncode, time.perf_counter() - started, given or None, log_start)


@contextmanager
def _ended_with(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens to the queue itself (a second Ctrl-C, a defect), no child goes on without it."""
    try:
        yield
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _thread_settings(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"PYTHONUNBUFFERED": "1"}


def last_words(log: Path, ended: Ended) -> str:
    """Why a process failed, in its own words as far as it had any."""
    code = ended.code
    number = -code if code < 0 else code - 128  # the latter of a process that a launcher has started
    if number in list(signal.Signals):
        name = signal.Signals(number).name
        return f"killed by {name}" + (": memory may have run out" if name == "SIGKILL" else "")
    own = log.read_bytes()[ended.log_start :] if log.is_file() else b""
    lines = own.decode(errors="replace").splitlines()
    told = [line for line in lines[-50:] if line.startswith(("error:", "internal error:"))]
    spoken = [line for line in lines if line.strip()]
    return (told or spoken or [f"exit code {code}"])[-1][:500]
