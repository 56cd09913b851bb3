"""Training, from a recipe and a folder of data to a run."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from paqdetr._version import __version__
from paqdetr.config import Config, load_config
from paqdetr.data.coco import CocoDataset, open_split
from paqdetr.data.layout import available_splits
from paqdetr.data.loader import Batch, training_loader
from paqdetr.engine.device import require_device
from paqdetr.engine.evaluate import evaluate_split, require_same_classes
from paqdetr.engine.events import Callback, Callbacks, TrainingPlan
from paqdetr.engine.optim import MovingAverage, build_optimizer, build_schedule, lr_factor
from paqdetr.engine.pictures import GroundTruth, contact_sheet, training_curves
from paqdetr.engine.run import Run, prepare_run
from paqdetr.engine.state import Position, load_state, save_state
from paqdetr.errors import ConfigError, NonFiniteError
from paqdetr.losses import LossReport, build_criterion
from paqdetr.models import Detector, load, save
from paqdetr.models.detector import DetectorOutput
from paqdetr.models.files import model_to_train

_LOG = logging.getLogger(__name__)


def train(
    model: str | Path,
    *,
    data: str | Path,
    output: str | Path,
    resume: bool = False,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    settings: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Run:
    """Train a model and evaluate it on the validation split after each `eval_every` epochs.

    Args:
        model: a name of `list_models()`, a recipe of `list_configs()`, or a YAML file.
        data: a data set's folder with a `train` and, if there is one, a `val` split.
        output: the run's folder.
        resume: continue a run that was interrupted; start it if there is none; do nothing if it is finished.
        device: "cpu", "cuda", ...; the best there is if None.
        callbacks: told of every step and evaluation.
        settings: overrides with dotted keys, such as {"model.num_patterns": 32}.
        overrides: overrides of top-level settings, such as epochs=12.

    Raises:
        UserError: settings, data or the output folder cannot be used; nothing is overwritten.
    """
    config = load_config(model, {**(settings or {}), **overrides})
    train_split = open_split(data, "train")
    val_split = open_split(data, "val") if "val" in available_splits(data) else None
    if val_split is not None:  # now, not after the first epoch
        require_same_classes(train_split.classes, val_split)
    architecture = config.model.model_copy(update={"num_classes": len(train_split.classes)})
    config = config.model_copy(update={"model": architecture})
    run = prepare_run(output, config, resume=resume)
    if run.finished:
        return run
    trainer = Trainer(config, run, train_split, val_split, device=device, callbacks=list(callbacks))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        run.write_config(config)
    trainer.fit()
    return run


@dataclass(slots=True)
class _Interval:
    """Sums over the steps between two records."""

    steps: int = 0
    images: int = 0
    started: float = field(default_factory=time.perf_counter)
    sums: dict[str, float] = field(default_factory=dict)
    positives: list[list[float]] = field(default_factory=list)

    def add(self, values: Mapping[str, float], positives: list[float], images: int) -> None:
        self.steps += 1
        self.images += images
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        if positives and not math.isnan(positives[0]):
            self.positives.append(positives)

    def means(self) -> dict[str, Any]:
        means: dict[str, Any] = {key: round(value / self.steps, 6) for key, value in self.sums.items()}
        means["images_per_second"] = round(self.images / (time.perf_counter() - self.started), 3)
        if self.positives:
            columns = zip(*self.positives, strict=True)
            means["positives_per_box"] = [round(sum(column) / len(column), 4) for column in columns]
        return means


class Trainer:
    """One training. `train` is the door; this class is for those who change the loop."""

    def __init__(
        self,
        config: Config,
        run: Run,
        train_split: CocoDataset,
        val_split: CocoDataset | None,
        *,
        device: str | None,
        callbacks: list[Callback],
    ) -> None:
        self.config, self.run, self.val_split = config, run, val_split
        self.accelerator = _accelerator(config, device)
        self.events = Callbacks(callbacks if self.accelerator.is_main_process else [])
        torch.manual_seed(config.seed)
        self.model, self.taken = model_to_train(config, train_split.classes, resumed=run.state_file.is_file())
        if self.taken is not None and self.accelerator.is_main_process:
            _LOG.warning("init %s: %s", config.init, self.taken)
        self.model.to(self.accelerator.device)
        if config.channels_last:
            self.model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.criterion = build_criterion(config.loss)
        self.loader, self.batches = training_loader(
            config,
            train_split,
            self.model.preprocessing,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        epoch_steps = len(self.batches)
        planned = config.epochs * epoch_steps
        self.total_steps = min(planned, config.max_steps or planned)
        self.num_images = len(train_split)
        self.average = MovingAverage(self.model, config.ema_decay)
        optimizer = build_optimizer(self.model, config)
        self.position = Position()
        if run.state_file.is_file():
            self.position = load_state(
                run.state_file, model=self.model, average=self.average, optimizer=optimizer
            )
            run.truncate_metrics(self.position.metrics_size)
        elif run.metrics_file.is_file():
            run.truncate_metrics(0)
        self.schedule = build_schedule(optimizer, config, self.total_steps, done=self.position.step)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def fit(self) -> None:
        """Train to the end of the recipe. Callbacks hear of the main process alone."""
        self.events.on_start(
            TrainingPlan(
                config=self.config,
                first_step=self.position.step,
                total_steps=self.total_steps,
                images=self.num_images,
                device=str(self.accelerator.device),
            )
        )
        self._record(
            {
                "kind": "start",
                "step": self.position.step,
                "version": __version__,
                "torch": torch.__version__,
                "device": str(self.accelerator.device),
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "processes": self.accelerator.num_processes,
                **({} if self.taken is None else {"init": self.taken.to_dict()}),
            }
        )
        try:
            while self.position.step < self.total_steps:
                self._epoch()
            self._finish()
            self.accelerator.wait_for_everyone()
        finally:
            self.events.on_end()

    def _epoch(self) -> None:
        started = time.perf_counter()
        epoch, step = self.position.epoch, self.position.step
        self.batches.epoch = epoch
        # Noise of an epoch depends on the seed and the epoch alone, so resuming at its start repeats it exactly.
        torch.manual_seed(self.config.seed * 1_000_003 + epoch * 10_007 + self.accelerator.process_index)
        self.wrapped.train()
        interval = _Interval()
        for batch in self.loader:
            report, values = self._step(batch, step / self.total_steps)
            step += 1
            interval.add(values, report.positives_per_box, len(batch.targets))
            self.events.on_step(step, values["loss"])
            if step % self.config.log_every == 0 or step == self.total_steps:
                record = {"kind": "train", "step": step, "epoch": round(step / len(self.batches), 4)}
                factor = lr_factor(self.config, step - 1, self.total_steps)
                record |= interval.means() | {"lr": self.config.lr * factor}
                self._record(record)
                self.events.on_record(record)
                interval = _Interval()
            if step >= self.total_steps:
                break
        seconds = self.position.seconds + time.perf_counter() - started
        self.position = replace(self.position, epoch=epoch + 1, step=step, seconds=seconds)
        self._close_epoch()

    def _step(self, batch: Batch, progress: float) -> tuple[LossReport, dict[str, float]]:
        batch = batch.to(self.accelerator.device)
        images = batch.images
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        boxes = torch.tensor(float(sum(map(len, batch.targets))), device=self.accelerator.device)
        num_boxes = float(cast(Tensor, self.accelerator.reduce(boxes, "mean")))
        with self.accelerator.autocast():
            output = self.wrapped(images, batch.padding_mask, batch.targets)
        report = self.criterion(
            output,
            batch.targets,
            aux_losses=self.model.aux_losses(),
            progress=progress,
            num_boxes=num_boxes,
        )
        total = float(report.total.detach())
        if not math.isfinite(total):
            ids = [target.image_id for target in batch.targets]
            raise NonFiniteError(
                f"the loss became {total} on images {ids}",
                "lower the learning rate, or train without half precision",
            )
        self.optimizer.zero_grad()
        self.accelerator.backward(report.total)
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.average.update(self.model)
        values = {"loss": total, **_grouped(report.terms), **mixture_figures(output)}
        values["grad_norm"] = float(cast(Tensor, norm))
        return report, values

    def _close_epoch(self) -> None:
        """Evaluate if it is time, then write checkpoints, and the state last: it stands for all that came before."""
        done = self.position.step >= self.total_steps
        metrics: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            averaged = cast(Detector, self.average.model)
            if self.val_split is not None and (done or self.position.epoch % self.config.eval_every == 0):
                metrics = self._evaluate(averaged)
            header = {"metrics": metrics, "step": self.position.step, "epoch": self.position.epoch}
            save(averaged, self.run.last, **header)
            ap = float(metrics.get("AP") or 0.0)
            if self.val_split is None or (metrics and ap > self.position.best_ap):
                save(averaged, self.run.best, **header)
                self.position = replace(self.position, best_ap=ap)
            size = self.run.metrics_file.stat().st_size
            self.position = replace(self.position, metrics_size=size)
            save_state(
                self.run.state_file,
                model=self.model,
                average=self.average,
                optimizer=cast(torch.optim.Optimizer, self.optimizer),
                position=self.position,
            )
        self.accelerator.wait_for_everyone()

    def _evaluate(self, model: Detector) -> dict[str, Any]:
        assert self.val_split is not None
        result = evaluate_split(model, self.val_split, progress=self.events.on_evaluation_progress)
        metrics = result.to_json()
        record = {
            "kind": "eval",
            "step": self.position.step,
            "epoch": self.position.epoch,
            "split": "val",
            **metrics,
        }
        self._record(record)
        self.events.on_evaluation(record)
        return metrics

    def _finish(self) -> None:
        if not self.accelerator.is_main_process:
            return
        training_curves(self.run.metrics_file, self.run.output / "curves.png")
        if self.val_split is not None:
            draw_predictions(load(self.run.best), self.val_split, self.run.output / "predictions.png")
        self._record(
            {
                "kind": "finished",
                "step": self.position.step,
                "epoch": self.position.epoch,
                "seconds": round(self.position.seconds, 1),
                "peak_memory_gib": round(_peak_memory(), 3),
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.append(record)


def draw_predictions(model: Detector, split: CocoDataset, output: Path, *, images: int = 12) -> None:
    """Write a contact sheet of the first images of a split: predictions beside ground truth."""
    items = []
    for index in range(min(images, len(split))):
        picture = split.image(index)
        ids = [split.classes.ids[label] for label in split.labels(index).tolist()]
        items.append((picture, model.predict(picture)[0], GroundTruth(split.boxes(index), ids)))
    contact_sheet(items, split.classes.id_to_name, output=output)


def mixture_figures(output: DetectorOutput) -> dict[str, float]:
    """How content queries differ: mean cosine between those of an image, and the entropy of mixture rows over log m."""
    with torch.no_grad():
        unit = torch.nn.functional.normalize(output.mixture.content.float(), dim=-1)  # (B, n, d)
        count = unit.shape[1]
        together = unit.sum(1).square().sum(-1)  # |sum|^2 = n + sum of all pairs' cosines
        figures = {"query_cosine": float(((together - count) / max(count * (count - 1), 1)).mean())}
        if output.mixture.weights is not None:
            weights = output.mixture.weights
            entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1).mean()
            figures["mixture_entropy"] = float(entropy) / math.log(weights.shape[-1])
    return figures


def _grouped(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Terms by what they are: decoder class, L1 and GIoU over all layers, encoder, denoising, diversity."""
    values = torch.stack([term.detach() for term in terms.values()]).tolist()
    sums: dict[str, float] = {}
    for name, value in zip(terms, values, strict=True):
        place, _, kind = name.partition("/")
        group = kind if place.startswith("layer") else place.rstrip("0123456789")
        sums[f"loss_{group}"] = sums.get(f"loss_{group}", 0.0) + value
    return sums


def _accelerator(config: Config, device: str | None) -> Accelerator:
    wanted = require_device(device)
    on_cpu = wanted.type == "cpu"
    if wanted.index:
        raise ConfigError(
            f"device {device!r}: training takes the first device it sees",
            f"set CUDA_VISIBLE_DEVICES={wanted.index} and use --device {wanted.type}",
        )
    if config.amp == "fp16" and on_cpu:
        raise ConfigError("amp='fp16' needs a GPU, and the device is the CPU", "use amp=bf16 or amp=no")
    # accelerate keeps one state a process, and refuses another training in it with other precision or device.
    if AcceleratorState._shared_state:
        state = AcceleratorState()
        if state.mixed_precision != config.amp or (state.device.type == "cpu") != on_cpu:
            AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=config.amp,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )


def _peak_memory() -> float:
    """Peak memory of the process in GiB; on a GPU, of the device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
