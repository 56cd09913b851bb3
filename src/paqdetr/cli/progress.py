"""What a training shows while it runs."""

from __future__ import annotations

from typing import Any

from rich.progress import TextColumn, TimeRemainingColumn

from paqdetr.cli.console import errors, live_bars, print_styled
from paqdetr.text import duration, figure
from paqdetr.training.callbacks import Progress, TrainingPlan


class TrainingProgress(Progress):
    """A live bar on a terminal; a line for every record and evaluation in a log."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = live_bars(TextColumn("left"), TimeRemainingColumn())
        self._train = self._eval = None

    def on_start(self, plan: TrainingPlan) -> None:
        super().on_start(plan)
        config, self._epochs = plan.config, plan.config.epochs
        done = f", resumed at step {plan.first_step}" if plan.first_step else ""
        what = f": {plan.images} images, {plan.total_steps} steps of {plan.step_images} on {plan.device}{done}"
        print_styled(errors, (config.name, "bold"), what)
        self._bar.start()
        self._train = self._bar.add_task("train", total=plan.total_steps, completed=plan.first_step, figures="")

    def on_step(self, step: int, loss: float) -> None:
        super().on_step(step, loss)
        if self._train is not None:
            self._bar.update(self._train, completed=step, figures=self.figures)

    def on_record(self, record: dict[str, Any]) -> None:
        super().on_record(record)
        if errors.is_terminal:
            return
        losses = {key.removeprefix("loss_"): value for key, value in record.items() if key.startswith("loss_")}
        parts = [
            f"step {record['step']}/{self.total}",
            f"epoch {record['epoch']:.2f}/{self._epochs}",
            f"loss {record['loss']:.3f} ({', '.join(f'{key} {value:.3f}' for key, value in losses.items())})",
            f"lr {record['lr']:.2e}",
            f"{record['images_per_second']:.1f} images/s",
            f"{duration(self.left)} left",
        ]
        positives = record.get("positives_per_box", [])
        if any(count != 1 for count in positives):
            parts.append("positives per box by layer " + " ".join(f"{count:.2f}" for count in positives))
        errors.print("  ".join(parts))

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
        super().on_evaluation(record)
        if self._eval is not None:
            self._bar.remove_task(self._eval)
            self._eval = None
        errors.print(
            f"epoch {record['epoch']}: {record['split']} AP {figure(record['AP'])}, AP50 {figure(record['AP50'])}, "
            f"AP after NMS {figure(record['AP_nms'])}, {record['predictions_per_image']:.1f} predictions over 0.3 "
            f"for {record['boxes_per_image']:.1f} boxes per image"
        )

    def on_end(self) -> None:
        self._bar.stop()
