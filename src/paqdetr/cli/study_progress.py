"""What a queue shows while it works."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from paqdetr.cli.console import errors, show
from paqdetr.study.queue import QueueEvents
from paqdetr.study.results import RunResult
from paqdetr.study.runs import PlannedRun
from paqdetr.study.spec import Study


class QueueProgress(QueueEvents):
    """Two live bars on a terminal, over the runs and over the steps of the one in hand; a line for each run in a log."""

    def __init__(self, study: Study, runs: Sequence[PlannedRun]) -> None:
        self._checkpoint: str = study.evaluate.checkpoints[0]
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=errors,
            disable=not errors.is_terminal,
        )
        self._all = self._bars.add_task(study.name, total=len(runs), figures="")
        self._one = self._bars.add_task("", total=1, figures="", visible=False)

    def __enter__(self) -> QueueProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def on_begin(self, planned: PlannedRun, step: str, number: int, total: int) -> None:
        self._bars.update(self._all, completed=number - 1)
        self._bars.reset(self._one, description=f"{step} {planned.key}", total=planned.steps, visible=step == "train")
        if not errors.is_terminal:
            errors.print(f"{number} of {total}: {step} {planned.key}")

    def on_progress(self, planned: PlannedRun, step: int, ap: float | None) -> None:
        figures = "" if ap is None else f"AP {show(ap)}"
        self._bars.update(self._one, completed=step, figures=figures)

    def on_result(self, planned: PlannedRun, result: RunResult) -> None:
        self._bars.update(self._one, visible=False)
        if result.failed is not None:
            errors.print(f"{planned.key}: failed: {result.failed}")
            return
        figures = result.figures[self._checkpoint]
        errors.print(f"{planned.key}: AP {show(figures['AP'])}, after NMS {show(figures['AP_nms'])}")

    def on_wait(self, planned: PlannedRun) -> None:
        self._bars.update(self._one, description=f"waiting for another process: {planned.key}", visible=True)
