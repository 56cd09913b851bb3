"""What a training tells whoever listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paqdetr.config import Config


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
        """After the last step, or when the training fails."""


class Callbacks(Callback):
    """Passes every event on to a list of callbacks."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks

    def on_start(self, plan: TrainingPlan) -> None:
        for callback in self.callbacks:
            callback.on_start(plan)

    def on_step(self, step: int, loss: float) -> None:
        for callback in self.callbacks:
            callback.on_step(step, loss)

    def on_record(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_record(record)

    def on_skip(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_skip(record)

    def on_interrupt(self, name: str) -> None:
        for callback in self.callbacks:
            callback.on_interrupt(name)

    def on_evaluation_progress(self, done: int, total: int) -> None:
        for callback in self.callbacks:
            callback.on_evaluation_progress(done, total)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_evaluation(record)

    def on_end(self) -> None:
        for callback in self.callbacks:
            callback.on_end()
