"""Trains and measures what a study lacks, one run at a time, and can be stopped and started at any moment.

A run has two steps, each in a process of its own. Training is `paqdetr train --resume` and leaves an ordinary folder; measuring
writes the run's result, a json, whole or not at all. A step whose product is there is not repeated, so what remains to be done is
read off the disk: there is no state that could be lost. Several queues may work on one study.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paqdetr.checkpoint import write_whole
from paqdetr.config import load_config
from paqdetr.data.loader import STOP_SIGNALS
from paqdetr.engine.interrupt import StopRequest
from paqdetr.engine.run import Run, flat_settings
from paqdetr.errors import ConfigError
from paqdetr.locks import Busy, held
from paqdetr.study.children import Ended, last_words, raise_if_stopped, run_child
from paqdetr.study.measure import Job, is_current
from paqdetr.study.results import RunResult, read_result
from paqdetr.study.runs import Places, PlannedRun, require_same_settings
from paqdetr.study.sources import note_source, read_source, require_same_source
from paqdetr.study.spec import Study

_WAIT = 2.0


class QueueEvents:
    """What a queue tells while it works; every method may be overridden."""

    def on_begin(self, planned: PlannedRun, step: str, number: int, total: int) -> None:
        """A step, "train" or "measure", of the run with this number begins."""

    def on_progress(self, planned: PlannedRun, step: int, ap: float | None) -> None:
        """The training stands at this optimiser step; AP is that of its last evaluation."""

    def on_result(self, planned: PlannedRun, result: RunResult) -> None:
        """A run is done or has failed."""

    def on_wait(self, planned: PlannedRun) -> None:
        """What remains is being done by other processes."""


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
    queue = _Queue(study, places, device=device, retry=retry, events=events or QueueEvents(), total=len(runs))
    waiting = list(enumerate(runs, start=1))
    with StopRequest() as queue.stop:
        while waiting:
            busy = [(number, planned) for number, planned in waiting if not queue.attempt(planned, number)]
            if busy:
                queue.events.on_wait(busy[0][1])
                _sleep(queue.stop)
            waiting = busy
    return queue.done


def require_no_conflict(planned: PlannedRun, places: Places) -> None:
    """Raise ConfigError if the run, or its result, was made with other settings or of other images. A run that failed may be
    mended by other settings, once what it left is gone."""
    run, file = places.run(planned.key), places.result(planned.key)
    result = read_result(file)
    remedy = None
    if result is not None and result.failed is not None:
        remedy = f"the run has failed: to make it anew with what the study says now, remove {run.output}"
    if run.config_file.is_file():
        require_same_settings(planned, flat_settings(load_config(run.config_file)), run.config_file, remedy)
        require_same_source(planned, read_source(places.source(planned.key)), run.output)
    if result is not None and result.failed is None:
        require_same_settings(planned, result.settings, file)
        require_same_source(planned, result.provenance.get("source"), file)


class _Queue:
    def __init__(
        self,
        study: Study,
        places: Places,
        *,
        device: str | None,
        retry: bool,
        events: QueueEvents,
        total: int,
    ) -> None:
        self.study, self.places, self.device, self.retry = study, places, device, retry
        self.events, self.total = events, total
        self.stop = StopRequest()
        self.done = Done()

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
        if result is not None and (is_current(result, job) if result.failed is None else not self.retry):
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
        file.parent.mkdir(parents=True, exist_ok=True)
        order = file.with_name(f".{file.stem}.job")
        order.write_text(json.dumps(job.to_json()), encoding="utf-8")
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
        tail = _Tail(self.places.run(planned.key))

        def watch() -> None:
            if tail.read():
                self.events.on_progress(planned, tail.step, tail.ap)

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
        if (
            ended.code - 128 in STOP_SIGNALS or -ended.code in STOP_SIGNALS
        ):  # somebody stopped the child itself
            raise ConfigError(
                f"{planned.key}: {step} was stopped from outside",
                "its state is saved; continue the study with --resume",
            )
        reason = f"{step}: {last_words(self.places.log(planned.key), ended)}"
        result = job.failed(reason)
        text, file = result.to_text(), self.places.result(planned.key)
        if read_result(file) is None:
            write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
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


def _sleep(stop: StopRequest) -> None:
    end = time.monotonic() + _WAIT
    while time.monotonic() < end:
        raise_if_stopped(stop)
        time.sleep(0.1)


class _Tail:
    """Follows metrics.jsonl of a training while it grows."""

    def __init__(self, run: Run) -> None:
        self._file, self._size = run.metrics_file, -1
        self.step, self.ap = 0, None

    def read(self) -> bool:
        """Whether something is new."""
        size = self._file.stat().st_size if self._file.is_file() else -1
        if size == self._size:
            return False
        self._size = size
        for record in Run(self._file.parent).records():
            self.step = max(self.step, int(record.get("step") or 0))
            self.ap = record.get("AP", self.ap)
        return True
