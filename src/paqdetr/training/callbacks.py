"""What a training reports: callbacks, and trackers (TensorBoard, Weights & Biases, MLflow, trackio)."""

from __future__ import annotations

import html
import logging
import math
import re
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from paqdetr.config import Config
from paqdetr.errors import ConfigError
from paqdetr.runs import Run, flat_settings
from paqdetr.text import duration, figure

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What is about to happen.

    Attributes:
        config: as resolved.
        first_step: optimiser steps done before, 0 unless resumed.
        total_steps: optimiser steps in all.
        images: of the training split.
        device: that trains.
        step_images: images of an optimiser step, of all processes.
    """

    config: Config
    first_step: int
    total_steps: int
    images: int
    device: str
    step_images: int


class Callback:
    """Override what you need; records are the json objects of metrics.jsonl."""

    def on_start(self, plan: TrainingPlan) -> None:
        """Before the first step."""

    def on_step(self, step: int, loss: float) -> None:
        """After every optimiser step; step counts from 1. The loss is that of all processes, NaN if the step was left out."""

    def on_record(self, record: dict[str, Any]) -> None:
        """After every record of kind "train", written each `log_every` steps and at the end of an epoch."""

    def on_skip(self, record: dict[str, Any]) -> None:
        """After a record of kind "skipped": a step that `nan_policy` left out."""

    def on_interrupt(self, name: str) -> None:
        """When a signal such as "SIGINT" arrives; the step in hand is still finished and the state saved."""

    def on_evaluation_progress(self, done: int, total: int) -> None:
        """While a split is evaluated: images done."""

    def on_evaluation(self, record: dict[str, Any]) -> None:
        """After every record of kind "eval"."""

    def on_end(self) -> None:
        """After the last step, or when the training fails. What is raised here is logged, and changes nothing."""


class Progress(Callback):
    """How far a training is, for callbacks that show it."""

    def __init__(self) -> None:
        self.step = self.total = self._first = 0
        self.loss, self.ap = math.nan, None
        self.record: dict[str, Any] = {}
        self._began = time.monotonic()

    def on_start(self, plan: TrainingPlan) -> None:
        self.step = self._first = plan.first_step
        self.total, self._began = plan.total_steps, time.monotonic()

    def on_step(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss

    def on_record(self, record: dict[str, Any]) -> None:
        self.record = record

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self.ap = record["AP"]

    @property
    def left(self) -> float:
        """Seconds to the end, evaluations included, if it goes on as until now."""
        done = self.step - self._first
        return (time.monotonic() - self._began) / done * (self.total - self.step) if done else math.nan

    @property
    def figures(self) -> str:
        """Loss, AP and speed."""
        parts = [f"loss {self.loss:6.3f}"]
        parts += [] if self.ap is None else [f"AP {figure(self.ap)}"]
        parts += [f"{self.record['images_per_second']:.1f} images/s"] if self.record else []
        return "  ".join(parts)


class NotebookProgress(Progress):
    """A bar below the cell of a notebook that trains."""

    _PAUSE = 0.5  # seconds between two pictures of it
    _name, _doing, _shown = "", "", 0.0

    @staticmethod
    def wanted() -> bool:
        """Whether this process is the kernel of a notebook."""
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        return getattr(shell, "kernel", None) is not None

    def on_start(self, plan: TrainingPlan) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        super().on_start(plan)
        self._name = plan.config.name
        self._place: Any = display(self, display_id=True)

    def on_step(self, step: int, loss: float) -> None:
        super().on_step(step, loss)
        self._doing = ""
        self._show()

    def on_evaluation_progress(self, done: int, total: int) -> None:
        self._doing = f"evaluating image {done} of {total}"
        self._show()

    def on_evaluation(self, record: dict[str, Any]) -> None:
        super().on_evaluation(record)
        self._doing = ""

    def on_end(self) -> None:
        self._show(at_once=True)

    def _show(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._shown > self._PAUSE:
            self._shown = now
            self._place.update(self)

    def _repr_html_(self) -> str:
        return f'<progress value="{self.step}" max="{self.total}"></progress> {html.escape(repr(self))}'

    def __repr__(self) -> str:
        left = "" if math.isnan(self.left) or self.step >= self.total else f"{duration(self.left)} left"
        parts = (f"{self._name} {self.step}/{self.total}", self.figures, self._doing or left)
        return "  ".join(filter(None, parts))


class Callbacks(list[Callback]):
    """Passes every event on to all callbacks."""

    def emit(self, event: str, *values: Any) -> None:
        """Call the method `event` of each."""
        for callback in self:
            getattr(callback, event)(*values)

    def end(self) -> None:
        """`on_end` of each: one that fails must not hide how the training ended, nor cost the others theirs."""
        for callback in self:
            try:
                callback.on_end()
            except Exception as error:  # anybody's code
                logging.getLogger(__name__).warning(
                    "on_end of %s: %s: %s", type(callback).__name__, type(error).__name__, error, exc_info=True
                )


_PROJECT = "paqdetr"


def require_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a tracker whose package is not installed: accelerate would leave it out in silence."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"trackers: {name!r} is not installed", f"`pip install {name}`, or leave it out of trackers"
            )


def start_trackers(accelerator: Accelerator, run: Run, config: Config, *, step: int) -> None:
    """Begin, or take up again, the trackers of the settings; what an earlier process logged after `step` is forgotten where
    the tracker can.

    Raises:
        ConfigError: one cannot start, because its server does not answer for example.
    """
    if not config.trackers:
        return
    # The same in every resumption, and of no other run in a folder of this name. trackio knows a run by its name alone.
    ident = run.id or uuid4().hex
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": run.output.name, "dir": str(run.output), "id": ident, "resume": "allow"},
        "mlflow": {"run_name": run.output.name},
        "trackio": {"name": f"{run.output.name}-{ident[:8]}", "resume": "allow"},
    }
    # Trackers take plain values.
    settings = {
        key: value if isinstance(value, (bool, int, float, str)) else str(value)
        for key, value in flat_settings(config).items()
    }
    project = "tensorboard" if config.trackers == ("tensorboard",) else _PROJECT
    try:
        accelerator.init_trackers(
            project,
            config=settings if step == 0 else None,
            init_kwargs={name: options[name] for name in config.trackers},
        )
    except Exception as error:  # each has its own
        raise ConfigError(
            f"trackers={list(config.trackers)}: they cannot start ({type(error).__name__}: {error})",
            "mend what it says, or leave the tracker out: trackers may differ when a run is resumed",
        ) from error


def track(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Send the numbers of a "train" or "eval" record, under names such as train/loss and eval/per_class/cat. A tracker that fails
    is warned of and gets no more: it must not cost the training, nor the time that it takes to fail each time."""
    if accelerator.trackers and record["kind"] in ("train", "eval"):
        # MLflow refuses names with other characters, and TensorBoard replaces them.
        values = {
            re.sub(r"[^\w./ -]", "_", name): value
            for name, value in _numbers(record, record["kind"] + "/", leave_out=("kind", "step", "split"))
        }
        for tracker in list(accelerator.trackers):
            try:
                tracker.log(values, step=record["step"])
            except Exception as error:  # each has its own
                accelerator.trackers.remove(tracker)
                _warn_of(tracker, error, "it gets no more of this start; metrics.jsonl has every record")
                _finish(tracker)


def finish_trackers(accelerator: Accelerator) -> None:
    """The end of what was sent; a tracker that fails is warned of."""
    for tracker in accelerator.trackers:
        _finish(tracker)


def _finish(tracker: Any) -> None:
    try:
        tracker.finish()
    except Exception as error:
        _warn_of(tracker, error, "what it got last may be missing there")


def _warn_of(tracker: Any, error: Exception, consequence: str) -> None:
    logging.getLogger(__name__).warning(
        "tracker %s: %s: %s; %s", tracker.name, type(error).__name__, error, consequence
    )


def _numbers(values: dict[str, Any], prefix: str, *, leave_out: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if key in leave_out:
            continue
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            found += _numbers({str(i): item for i, item in enumerate(value, start=1)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((prefix + key, float(value)))
    return found
