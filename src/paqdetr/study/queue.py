"""Trains and measures what a study lacks, one run at a time in a child process; can be stopped and started at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from paqdetr.config import load_config
from paqdetr.errors import ConfigError
from paqdetr.files import Busy, held, write_text
from paqdetr.interrupt import STOP_SIGNALS, StopRequest
from paqdetr.runs import Run, flat_settings
from paqdetr.study.measure import Job
from paqdetr.study.results import RunResult, read_result
from paqdetr.study.runs import Places, PlannedRun, note_source, read_source, require_same_settings, require_same_source
from paqdetr.study.spec import Study

_POLL, _WAIT = 0.2, 2.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

# Seconds in which trainings of a cluster save their state when the study is stopped.
_PATIENCE = 120.0


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
            env=os.environ | dict.fromkeys(_THREADS, str(threads)) | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=() if lock is None else (lock.fileno(),),
        )
        try:
            handed_on = False
            while child.poll() is None:
                if stop.signal_number is not None and not handed_on:
                    handed_on = True
                    if os.name != "nt":  # where Ctrl-C reaches the child by itself, and no signal can be sent
                        child.send_signal(stop.signal_number)
                watch()
                time.sleep(_POLL)
        except BaseException:  # a second Ctrl-C, a defect: no child goes on without the queue
            child.terminate()
            child.wait()
            raise
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Ended(child.returncode, time.perf_counter() - started, cpu or None, log_start)


def last_words(log: Path, ended: Ended) -> str:
    """Why a process failed: the error it printed, else its last line, else its exit code."""
    code = ended.code
    number = -code if code < 0 else code - 128  # the latter of a process that a launcher has started
    if number in list(signal.Signals):
        name = signal.Signals(number).name
        return f"killed by {name}" + (": memory may have run out" if name == "SIGKILL" else "")
    own = log.read_bytes()[ended.log_start :] if log.is_file() else b""
    lines = own.decode(errors="replace").splitlines()
    errors = [line for line in lines[-50:] if line.startswith(("error:", "internal error:"))]
    printed = [line for line in lines if line.strip()]
    return (errors or printed or [f"exit code {code}"])[-1][:500]


class QueueEvents(Protocol):
    """What a queue calls as it goes along. A class that is derived from it need not have every method."""

    def on_begin(self, planned: PlannedRun, step: str, number: int, total: int) -> None:
        """A step, "train" or "measure", of the run with this number begins."""

    def on_progress(self, planned: PlannedRun, step: int, ap: float | None) -> None:
        """The training stands at this optimiser step; AP is that of its last evaluation."""

    def on_result(self, planned: PlannedRun, result: RunResult) -> None:
        """A run is done or has failed."""

    def on_wait(self, planned: PlannedRun) -> None:
        """What remains is being done by other processes."""


class _Unheard(QueueEvents):
    """For a queue to which nobody listens."""


@dataclass(slots=True)
class Done:
    """What a queue did.

    Attributes:
        skipped: runs that were done before.
        trained, measured: steps taken.
        failed: runs that failed, now or before.
    """

    skipped: int = 0
    trained: int = 0
    measured: int = 0
    failed: list[PlannedRun] = field(default_factory=list)


def run_queue(
    study: Study,
    runs: Sequence[PlannedRun],
    places: Places,
    *,
    device: str | None = None,
    retry: bool = False,
    events: QueueEvents | None = None,
) -> Done:
    """Do what is missing of the runs.

    Args:
        device: "cpu", "cuda", ...: the best there is if None.
        retry: also what has failed before.

    Raises:
        ConfigError: a run that is there was made with other settings than the study has now.
        StudyInterrupted: SIGINT, SIGTERM or SIGHUP came.
    """
    for planned in runs:
        require_no_conflict(planned, places)
    queue = _Queue(study, places, device, retry, events or _Unheard(), len(runs))
    waiting = list(enumerate(runs, start=1))
    with StopRequest() as queue.stop:
        while waiting:
            busy = [(number, planned) for number, planned in waiting if not queue.attempt(planned, number)]
            if busy:
                queue.events.on_wait(busy[0][1])
                end = time.monotonic() + _WAIT
                while time.monotonic() < end:
                    raise_if_stopped(queue.stop)
                    time.sleep(0.1)
            waiting = busy
    return queue.done


def run_queue_on_ray(
    study: Study,
    runs: Sequence[PlannedRun],
    places: Places,
    *,
    address: str | None,
    device: str | None = None,
    retry: bool = False,
    events: QueueEvents | None = None,
) -> Done:
    """As `run_queue`, with every run as a task of a Ray cluster: as many at a time as it has CPUs, or GPUs, for.

    A task is a queue of one run, so that locks, states and results are the same: a task whose worker dies starts over, waits for
    what it had begun, and goes on from its last state.

    Args:
        places: absolute, in a file system that all nodes share; likewise the folders of the runs' data.
        address: as of `predict_on_ray`.
        device: "cuda" asks the cluster for a GPU for every process of a training.

    Raises:
        as `run_queue`, and BackendError.
    """
    from paqdetr.serving.ray_predict import connect_ray, errors_of_workers

    for planned in runs:
        require_no_conflict(planned, places)
    ray, done, listener = connect_ray(address), Done(), events or _Unheard()
    gpus = study.processes if device is not None and device.startswith("cuda") else 0
    task = ray.remote(num_cpus=study.threads * study.processes, num_gpus=gpus, max_retries=3)(run_queue)
    waiting = {task.remote(study, [planned], places, device=device, retry=retry): planned for planned in runs}
    with StopRequest() as stop:
        while waiting:
            if stop.signal_number is not None:
                for reference in waiting:
                    ray.cancel(reference, recursive=False)
                ray.wait(list(waiting), num_returns=len(waiting), timeout=_PATIENCE)
                raise_if_stopped(stop)
            for reference in ray.wait(list(waiting), timeout=_POLL)[0]:
                planned = waiting.pop(reference)
                with errors_of_workers():
                    one: Done = ray.get(reference)
                done.skipped += one.skipped
                done.trained += one.trained
                done.measured += one.measured
                done.failed += one.failed
                result = read_result(places.result(planned.key))
                listener.on_begin(planned, "done", len(runs) - len(waiting), len(runs))
                if result is not None and not one.skipped:
                    listener.on_result(planned, result)
    return done


def require_no_conflict(planned: PlannedRun, places: Places) -> None:
    """Raise ConfigError if the run, or its result, was made with other settings or of other images. A run that failed may be
    mended by other settings, once what it left is gone."""
    run, file = places.run(planned.key), places.result(planned.key)
    result = read_result(file)
    if result is not None and result.key != planned.key:
        raise ConfigError(
            f"{file}: is the result of {result.key}, not of {planned.key}",
            "name data set, variant and seed inside the file as the folders are named, or move it back",
        )
    remedy = None
    if result is not None and result.failed is not None:
        remedy = f"the run has failed: to make it anew with what the study says now, remove {run.output}"
    if run.config_file.is_file():
        require_same_settings(planned, flat_settings(load_config(run.config_file)), run.config_file, remedy)
        require_same_source(planned, read_source(places.source(planned.key)), run.output)
    if result is not None and result.failed is None:
        require_same_settings(planned, result.settings, file)
        require_same_source(planned, result.provenance.get("source"), file)


@dataclass(slots=True)
class _Queue:
    study: Study
    places: Places
    device: str | None
    retry: bool
    events: QueueEvents
    total: int
    stop: StopRequest = field(default_factory=StopRequest)
    done: Done = field(default_factory=Done)

    def attempt(self, planned: PlannedRun, number: int) -> bool:
        """Do what is missing of a run; False if another process is at it."""
        raise_if_stopped(self.stop)
        try:
            with held(self.places.lock(planned.key)) as lock:
                self._do(planned, number, lock)
        except Busy:
            return False
        return True

    def _do(self, planned: PlannedRun, number: int, lock: Any) -> None:
        run, file = self.places.run(planned.key), self.places.result(planned.key)
        job = Job.of(self.study, planned, self.places, device=self.device)
        result = read_result(file)
        if result is not None and (result.measure == job.measure if result.failed is None else not self.retry):
            self.done.skipped += 1
            if result.failed is not None:
                self.done.failed.append(planned)
            return
        if result is not None and result.failed is not None:
            file.unlink()  # else a retry that is interrupted would count as failed again
        if not run.finished:
            _require_free(run)
            note_source(planned, self.places)
            self.events.on_begin(planned, "train", number, self.total)
            arguments = planned.train_arguments(run, device=self.device)
            ended = self._run(planned, arguments, lock)
            _note_cost(run, ended, self.study.threads)  # of a session that a signal ended, too
            raise_if_stopped(self.stop)
            if ended.code != 0:
                return self._fail(planned, job, "training", ended)
            self.done.trained += 1
        self.events.on_begin(planned, "measure", number, self.total)
        order = file.with_name(f".{file.stem}.job")
        write_text(order, json.dumps(asdict(job)))
        ended = self._run(planned, ["paqdetr.study.measure", str(order)], lock)
        order.unlink(missing_ok=True)
        raise_if_stopped(self.stop)
        if ended.code != 0:
            return self._fail(planned, job, "measuring", ended)
        self.done.measured += 1
        result = read_result(file)
        if result is None:
            raise RuntimeError(f"{file}: a measurement ended well and has written nothing")
        self.events.on_result(planned, result)

    def _run(self, planned: PlannedRun, arguments: list[str], lock: Any) -> Ended:
        run, size = self.places.run(planned.key), -1

        def watch() -> None:
            nonlocal size
            now = run.metrics_file.stat().st_size if run.metrics_file.is_file() else -1
            if now != size:
                size, records = now, run.records()
                step = max((int(record.get("step") or 0) for record in records), default=0)
                self.events.on_progress(planned, step, next((r["AP"] for r in reversed(records) if "AP" in r), None))

        return run_child(
            arguments,
            threads=self.study.threads,
            log=self.places.log(planned.key),
            lock=lock,
            stop=self.stop,
            watch=watch,
        )

    def _fail(self, planned: PlannedRun, job: Job, step: str, ended: Ended) -> None:
        """Keep the reason as the run's result, unless an earlier measurement has left one, and let the others go on."""
        if ended.code - 128 in STOP_SIGNALS or -ended.code in STOP_SIGNALS:  # somebody stopped the child itself
            raise ConfigError(
                f"{planned.key}: {step} was stopped from outside",
                "its state is saved; continue the study with --resume",
            )
        reason = f"{step}: {last_words(self.places.log(planned.key), ended)}"
        result = job.failed(reason)
        file = self.places.result(planned.key)
        if read_result(file) is None:
            write_text(file, result.to_text())
        self.done.failed.append(planned)
        self.events.on_result(planned, result)


def _require_free(run: Run) -> None:
    """Raise Busy if a training that somebody started by hand is in the folder."""
    if not run.config_file.is_file():
        return
    try:
        file = run.hold()
    except ConfigError:
        raise Busy(str(run.output)) from None
    if file is not None:
        file.close()


def _note_cost(run: Run, ended: Ended, threads: int) -> None:
    """Beside the run: what each session of the training took, so that a resumed one counts whole."""
    if run.config_file.is_file():
        row = {"seconds": round(ended.seconds, 1), "cpu_seconds": ended.cpu_seconds, "threads": threads}
        with (run.output / "sessions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
