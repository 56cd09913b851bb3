"""The loop of a training: steps, records, evaluations, and a state that another process can go on from."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from paqdetr.checkpoint import read_checkpoint
from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.digest import SplitDigest
from paqdetr.data.loader import Batch, training_loader
from paqdetr.distributed import Processes, build_accelerator, lost_process
from paqdetr.environment import describe_start, peak_memory
from paqdetr.errors import CheckpointError, DataError, NonFiniteError, UserError, memory_error
from paqdetr.evaluation.evaluate import evaluate_together
from paqdetr.interrupt import StopRequest, TrainingInterrupted
from paqdetr.losses import build_criterion
from paqdetr.models import Detector, load
from paqdetr.models.files import model_to_train
from paqdetr.ops import backends_run
from paqdetr.runs import Run
from paqdetr.structures import OperatingPoint
from paqdetr.training.callbacks import Callback, Callbacks, TrainingPlan, finish_trackers, start_trackers, track
from paqdetr.training.curves import draw_predictions, training_curves
from paqdetr.training.figures import Interval, ValidationLoss
from paqdetr.training.optim import MovingAverage, build_optimizer, build_schedule, lr_factor, lr_scale, step_images
from paqdetr.training.setup import ready_to_train
from paqdetr.training.state import Position, load_state, random_state, restore_random_state, save_state
from paqdetr.training.step import Step, TrainingStep

# With nan_policy=skip-step: so many left out in a row mean that the training itself has failed.
_MOST_SKIPPED = 10
_LESS_MEMORY = (
    "start a new run with --auto-batch, or with batch_size=1 accumulate=4 checkpoint_activations=true, "
    "or with a smaller image_size"
)


class Trainer:
    """One training. `paqdetr.training.train` is the door; this class is for those who change the loop."""

    def __init__(
        self,
        config: Config,
        run: Run,
        train_split: DetectionDataset,
        val_split: DetectionDataset | None,
        *,
        device: str | None,
        callbacks: list[Callback],
        accept_new_data: bool = False,
    ) -> None:
        self.config, self.run, self.val_split = config, run, val_split
        splits = [split for split in (train_split, val_split) if split is not None]
        self.data = {split.name: SplitDigest.of(split) for split in splits}
        self.accelerator = build_accelerator(config, device, run.output)
        self.processes = Processes.of(self.accelerator)
        self.events = Callbacks(callbacks if self.processes.main else [])
        self.stop = StopRequest(partial(self.events.emit, "on_interrupt"))
        torch.manual_seed(config.seed)
        self.model, self.taken = model_to_train(config, train_split.classes, resumed=run.state_file.is_file())
        if self.taken is not None and self.processes.main:
            logging.getLogger(__name__).warning("init %s: %s", config.init, self.taken)
        self.model = ready_to_train(self.model, config, self.accelerator.device)
        self.loader, self.batches = training_loader(
            config, train_split, self.model.preprocessing, rank=self.processes.index, world_size=self.processes.count
        )
        self.epoch_steps = -(-len(self.batches) // config.accumulate)
        planned = config.epochs * self.epoch_steps
        self.total_steps = min(planned, config.max_steps or planned)
        if config.max_steps is not None and config.max_steps > planned and self.processes.main:
            note = "max_steps=%d changes nothing: epochs=%d are %d steps"
            logging.getLogger(__name__).warning(note, config.max_steps, config.epochs, planned)
        self.num_images = len(train_split)
        self.average = MovingAverage(self.model, config.ema_decay)
        self.step_images = step_images(config, len(self.batches), self.processes.count)
        self.lr_scale = lr_scale(config, self.step_images)
        optimizer = build_optimizer(self.model, config, scale=self.lr_scale)
        self.position = Position()
        self._random: dict[str, Tensor] | None = None
        self.new_validation = False
        if run.state_file.is_file():
            with self.processes.agreeing():
                self._load(optimizer, accept_new_data=accept_new_data)
        self.schedule = build_schedule(optimizer, config, self.total_steps, done=self.position.step)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.step = TrainingStep(
            config=config,
            model=self.model,
            wrapped=self.wrapped,
            optimizer=cast(torch.optim.Optimizer, self.optimizer),
            criterion=build_criterion(config.loss),
            accelerator=self.accelerator,
        )
        self._saved = (self.position.epoch, self.position.step)
        self._saved_at = time.monotonic()
        self.interval = Interval()

    def fit(self) -> None:
        """Train to the end of the recipe. Callbacks hear of the main process alone."""
        self.events.emit(
            "on_start",
            TrainingPlan(
                config=self.config,
                first_step=self.position.step,
                total_steps=self.total_steps,
                images=self.num_images,
                device=str(self.accelerator.device),
                step_images=self.step_images,
            ),
        )
        try:
            with self.processes.agreeing():
                if self.processes.main:
                    # Of steps that are done again, or of a start that saved nothing.
                    self.run.truncate_metrics(self.position.metrics_size)
                    start_trackers(self.accelerator, self.run, self.config, step=self.position.step)
            start = describe_start(self.accelerator.device, self.processes.count)
            start |= {} if self.taken is None else {"init": self.taken.to_dict()}
            start |= {"new_validation": True} if self.new_validation else {}
            self._record({"kind": "start", "step": self.position.step, "lr_scale": self.lr_scale} | start)
            with self.stop:
                while not self._ended:
                    self._epoch()
            self._finish()
            self.processes.wait()
        except (RuntimeError, MemoryError) as error:
            known: UserError | None = memory_error(error, _LESS_MEMORY)
            if known is None and isinstance(error, RuntimeError) and self.processes.count > 1:
                known = lost_process(error)
            if known is None:
                raise
            raise known from error
        finally:
            self.events.end()
            self.loader.close()
            finish_trackers(self.accelerator)

    @property
    def _ended(self) -> bool:
        patience = self.config.patience
        whole = self.position.step <= self.position.epoch * self.epoch_steps
        return whole and (
            self.position.step >= self.total_steps or (patience is not None and self.position.stale >= patience)
        )

    def _epoch(self) -> None:
        """What is left of the epoch, and its evaluation."""
        epoch = self.position.epoch
        first = self.position.step - epoch * self.epoch_steps
        self.batches.epoch, self.batches.start = epoch, first * self.config.accumulate
        if self._random is None or first == 0:
            # Noise of an epoch depends on the seed and the epoch alone, so resuming at its start repeats it exactly.
            torch.manual_seed(self.config.seed * 1_000_003 + epoch * 10_007 + self.processes.index)
        else:
            restore_random_state(self._random, self.accelerator.device)
        self._random, self.interval = None, Interval()
        self.wrapped.train()
        last = min(self.epoch_steps, self.total_steps - epoch * self.epoch_steps)
        source = iter(self.loader) if first < last else iter(())
        mark = time.perf_counter()
        for number in range(first, last):
            left = len(self.batches) - number * self.config.accumulate
            batches, boxes = self.fetch(source, min(self.config.accumulate, left))
            step = self.step(batches, boxes=boxes, progress=self.position.step / self.total_steps)
            self._advance(step, seconds=time.perf_counter() - mark)
            mark = time.perf_counter()
        self._close_epoch()

    def fetch(self, source: Iterator[Batch], count: int) -> tuple[list[Batch], float]:
        """The batches of the next step, and the boxes in those of all processes.

        Here, between two steps, all processes agree on whether one of them cannot go on, is to stop, or is to save.
        """
        batches, failure = [], None
        try:
            batches = [next(source).to(self.accelerator.device) for _ in range(count)]
        except UserError as error:
            if isinstance(error, DataError):
                error.remedy += (
                    f" What was trained up to step {self.position.step} is saved: then resume, with --accept-new-data if the "
                    "images are no longer those that the run began with."
                )
            failure = error
        own_boxes = sum(len(target) for batch in batches for target in batch.targets)
        stopped = self.stop.signal_number is not None
        boxes, failed, stop, due = self.processes.sum(
            [float(own_boxes), float(failure is not None), float(stopped), float(self._save_is_due())]
        )
        if failed or stop or due:
            self._save()
        if failed:
            self.processes.raise_together(failure)
        if stop:
            raise TrainingInterrupted(self.position.step, self.stop.signal_number or signal.SIGINT)
        return batches, boxes

    def _save_is_due(self) -> bool:
        steps, minutes = self.config.save_every_steps, self.config.save_every_minutes
        by_step = steps is not None and self.position.step % steps == 0
        by_clock = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return by_step or (by_clock and self.processes.main)

    def _advance(self, step: Step, *, seconds: float) -> None:
        """Weights are changed: schedule, average, position and records follow."""
        self.schedule.step()
        if step.problem is None:
            if not step.overflowed:
                self.average.update(self.model)
            self.interval.add(step.values, step.batches, step.images, overflowed=step.overflowed)
        self.position = replace(
            self.position,
            step=self.position.step + 1,
            skipped=0 if step.problem is None else self.position.skipped + 1,
            seconds=self.position.seconds + seconds,
        )
        number = self.position.step
        if step.problem is not None:
            record = {"kind": "skipped", "step": number, "reason": step.problem}
            self._record(record)
            self.events.emit("on_skip", record)
        self.events.emit("on_step", number, step.loss)
        if self.position.skipped >= _MOST_SKIPPED:
            error = NonFiniteError(
                f"{_MOST_SKIPPED} steps in a row were left out; the last because {step.problem}",
                "lower the learning rate, or train without half precision",
            )
            self.processes.raise_together(error)
        # No step is left to a record of the next epoch: an evaluation lies in between.
        ends = number % self.epoch_steps == 0 or number == self.total_steps
        if (ends or number % self.config.log_every == 0) and self.interval.steps:
            record = {"kind": "train", "step": number, "epoch": round(number / self.epoch_steps, 4)}
            factor = lr_factor(self.config, number - 1, self.total_steps)
            record |= self.interval.means(self.processes) | {"lr": self.config.lr * self.lr_scale * factor}
            self._record(record)
            self.events.emit("on_record", record)
            self.interval = Interval()

    def _close_epoch(self) -> None:
        """Evaluate if it is time, then write checkpoints, and the state last: it stands for all that came before. The steps are
        saved before the evaluation too, whatever may end that: a resumption begins with it."""
        epoch = self.position.epoch + 1
        averaged = cast(Detector, self.average.model)
        done = self.position.step >= self.total_steps
        averaged.operating_point = OperatingPoint()  # that of an earlier epoch says nothing about these weights
        metrics: dict[str, Any] = {}
        if self.val_split is not None and (done or epoch % self.config.eval_every == 0):
            self._save()
            metrics = self._evaluate(averaged, self.val_split, epoch)
        position = replace(self.position, epoch=epoch)
        with self.processes.agreeing():
            if self.processes.main:
                header = {"metrics": metrics, "step": position.step, "epoch": epoch}
                ap = metrics.get("AP")  # None where nothing defines it: a validation split without boxes
                better = ap is not None and ap > position.best_ap
                averaged.save(self.run.last, **header)
                if better or self.val_split is None or (bool(metrics) and ap is None):
                    averaged.save(self.run.best, **header)
                if better:
                    position = replace(position, best_ap=ap, stale=0)
                elif ap is not None:
                    position = replace(position, stale=position.stale + 1)
        self.position = self.processes.broadcast(position)
        self._save()

    def _evaluate(self, model: Detector, split: DetectionDataset, epoch: int) -> dict[str, Any]:
        """Figures of a model, in the main process; nothing in the others."""

        def progress(done: int, total: int) -> None:
            self.events.emit("on_evaluation_progress", done, total)
            # Alone, nobody waits.
            if self.stop.signal_number is not None and self.processes.count == 1:
                raise TrainingInterrupted(self.position.step, self.stop.signal_number)

        # Weights are equal everywhere; running statistics of norms that train are each process's own.
        self.processes.copy_from_main(model.buffers())
        losses = ValidationLoss(self.step.criterion)
        workers = None if self.config.workers else 0
        result = evaluate_together(model, split, self.processes, progress=progress, observers=[losses], workers=workers)
        if result is None:
            return {}
        model.operating_point = result.operating_point
        metrics = result.to_json()
        record = {
            "kind": "eval",
            "step": self.position.step,
            "epoch": epoch,
            "split": "val",
            **metrics,
            **losses.means(),
        }
        self._record(record)
        self.events.emit("on_evaluation", record)
        return metrics

    def _save(self) -> None:
        """Write the state, unless the file has it already."""
        place = (self.position.epoch, self.position.step)
        self._saved_at = time.monotonic()
        if place == self._saved:
            return
        random = self.processes.gather(random_state(self.accelerator.device))
        scaler = self.accelerator.scaler
        with self.processes.agreeing():
            if random is not None:
                self.position = replace(self.position, metrics_size=self.run.flush_metrics())
                save_state(
                    self.run.state_file,
                    model=self.model,
                    average=self.average,
                    optimizer=cast(torch.optim.Optimizer, self.optimizer),
                    position=self.position,
                    random=random,
                    scaler=None if scaler is None else scaler.state_dict(),
                    batches=len(self.batches),
                    data=self.data,
                )
        self._saved = place

    def _load(self, optimizer: torch.optim.Optimizer, *, accept_new_data: bool) -> None:
        """Take up the saved state.

        Raises:
            ConfigError: it is of other data, or of another number of processes.
        """
        path = self.run.state_file
        saved = load_state(path, model=self.model, average=self.average, optimizer=optimizer)
        batches = len(self.batches)
        saved.require(
            path,
            processes=self.processes.count,
            batches=batches,
            data=self.data,
            max_steps=self.config.max_steps,
            accept_new_data=accept_new_data,
        )
        self.new_validation = saved.has_other_validation(self.data)
        self.position = saved.position_for(
            batches=batches, epoch_steps=self.epoch_steps, accumulate=self.config.accumulate
        )
        if self.new_validation:  # its AP compares with no earlier one
            self.position = replace(self.position, best_ap=-1.0, stale=0)
        self._random = saved.random[self.processes.index]
        if self.processes.main and self.position.epoch:
            self._check_checkpoints()
        if self.accelerator.scaler is not None and saved.scaler:
            self.accelerator.scaler.load_state_dict(saved.scaler)

    def _check_checkpoints(self) -> None:
        """Whether those of earlier epochs are still what was written: the best one may be what the run ends with.

        Raises:
            CheckpointError: one is damaged.
        """
        for path in (self.run.best, self.run.last):
            try:
                if path.exists():
                    read_checkpoint(path)
            except CheckpointError as error:
                remedy = "copy it again from where it came, or remove it: an epoch to come writes a new one"
                raise CheckpointError(error.message, remedy) from None
        if self.position.best_ap >= 0 and not self.run.best.exists():
            logging.getLogger(__name__).warning("%s is gone: the next evaluation writes a new one", self.run.best)
            self.position = replace(self.position, best_ap=-1.0)

    def _finish(self) -> None:
        if not self.processes.main:
            return
        try:
            training_curves(self.run.metrics_file, self.run.output / "curves.png")
            if self.val_split is not None:
                draw_predictions(load(self.run.best), self.val_split, self.run.output / "predictions.png")
        except Exception as error:  # of a library too: a picture must not cost the training
            logging.getLogger(__name__).warning("not all pictures of the run could be drawn: %s", error)
        record: dict[str, Any] = {
            "kind": "finished",
            "step": self.position.step,
            "epoch": self.position.epoch,
            "seconds": round(self.position.seconds, 1),
            "peak_memory_gib": round(peak_memory(self.accelerator.device), 3),
            "attention": list(backends_run()),
        }
        if self.position.step < self.total_steps:
            record["stopped"] = f"no better AP in {self.position.stale} evaluations"
        self._record(record)

    def _record(self, record: dict[str, Any]) -> None:
        if self.processes.main:
            self.run.append(record)
            track(self.accelerator, record)
