"""What a training shows while it runs."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from paqdetr.cli.console import errors, print_styled, show
from paqdetr.training.callbacks import Callback, TrainingPlan


class TrainingProgress(Callback):
    """A live bar on a terminal; a line for every record and evaluation in a log."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=errors,
            disable=not errors.is_terminal,
        )
        self._train = self._eval = None
        self._ap = ""
        self._speed = ""

    def on_start(self, plan: TrainingPlan) -> None:
        config = plan.config
        done = f", resumed at step {plan.first_step}" if plan.first_step else ""
        what = f": {plan.images} images, {plan.total_steps} steps of {plan.step_images} on {plan.device}{done}"
        print_styled(errors, (config.name, "bold"), what)
        self._bar.start()
        self._train = self._bar.add_task("train", total=plan.total_steps, completed=plan.first_step, figures="")

    def on_step(self, step: int, loss: float) -> None:
        if self._train is not None:
            self._bar.update(self._train, completed=step, figures=f"loss {loss:6.3f}{self._ap}{self._speed}")

    def on_record(self, record: dict[str, Any]) -> None:
        self._speed = f"  {record['images_per_second']:.1f} images/s"
        if errors.is_terminal:
            return
        positives = ""
        if "positives_per_box" in record:
            positives = "  positives a box by layer " + " ".join(f"{k:.2f}" for k in record["positives_per_box"])
        errors.print(
            f"step {record['step']}  epoch {record['epoch']:.2f}  loss {record['loss']:.3f}  "
            f"lr {record['lr']:.2e}  {record['images_per_second']:.1f} images/s{positives}"
        )

    def on_skip(self, record: dict[str, Any]) -> None:
        errors.print(f"step {record['step']} left out: {record['reason']}")

    def on_interrupt(self, name: str) -> None:
        second = "; a second Ctrl-C ends at once" if name == "SIGINT" else ""
        errors.print(f"{name}: finishing the step, then saving{second}")

    def on_evaluation_progress(self, done: int, total: int) -> None:
        if self._eval is None:
            self._eval = self._bar.add_task("evaluate", total=total, figures="")
        self._bar.update(self._eval, completed=done)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        if self._eval is not None:
            self._bar.remove_task(self._eval)
            self._eval = None
        self._ap = f"  AP {show(record['AP'])}"
        errors.print(
            f"epoch {record['epoch']}: {record['split']} AP {show(record['AP'])}, AP50 {show(record['AP50'])}, "
            f"AP after NMS {show(record['AP_nms'])}, {record['predictions_per_image']:.1f} predictions over 0.3 "
            f"for {record['boxes_per_image']:.1f} boxes an image"
        )

    def on_end(self) -> None:
        self._bar.stop()
