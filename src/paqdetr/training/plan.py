"""Before a training: what it will need of memory, time and disk, measured on a few steps, and whether it can learn at all."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from torchvision.ops import box_convert, box_iou

from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch, TrainingImages, plain_batch
from paqdetr.environment import available_memory, peak_memory, require_device
from paqdetr.errors import DataError
from paqdetr.evaluation.evaluate import evaluate_split
from paqdetr.models import Detector
from paqdetr.runs import Run
from paqdetr.serialize import Jsonable, fields_of
from paqdetr.training.figures import ValidationLoss
from paqdetr.training.memory import Progress, in_own_process, worst_batch
from paqdetr.training.trainer import Trainer

# Steps that come before those that are timed, and steps on the worst batch.
_WARM_UP, _WORST = 2, 2
_EVALUATED = 16
# A detection in the rows of an evaluation, and in those without duplicates: 44 MiB for 30,000 of them.
_ROW_BYTES = 1600
# Of a box that counts as found.
_IOU, _SCORE = 0.5, 0.3


@dataclass(frozen=True, slots=True)
class Plan(Jsonable):
    """What a training will take.

    Attributes:
        device: that trains.
        images, batches: of the training split, and of an epoch.
        step_images: images of an optimiser step.
        epoch_steps, total_steps: optimiser steps.
        lr: of the transformer, after the rule for other batch sizes.
        parameters, trainable: numbers of them.
        memory: GiB by what it is for, measured in a process that trains, on the worst batch too, and
            evaluates a few: what the "process" has before, "model" with its average, "step" with gradients and optimiser,
            "evaluation" beyond that, grown to the whole split; "cached images" when all are decoded; "workers" that load them.
            Of these the training process has its "peak", which its run will report; "total" is all on the device that trains,
            and "available" there.
        fits: whether the total is less than what is available.
        measured_steps: after the warm-up.
        step_seconds: mean of the measured ones, loading included.
        epoch_seconds, evaluation_seconds, total_seconds: extrapolated; the total has the evaluations in it.
        disk: GiB that the run's folder will take.
    """

    device: str
    images: int
    batches: int
    step_images: int
    epoch_steps: int
    total_steps: int
    lr: float
    parameters: int
    trainable: int
    memory: dict[str, float]
    fits: bool
    measured_steps: int
    step_seconds: float
    epoch_seconds: float
    evaluation_seconds: float
    total_seconds: float
    disk: float


def plan_training(
    config: Config,
    train_split: DetectionDataset,
    val_split: DetectionDataset | None,
    *,
    device: str | None = None,
    steps: int = 5,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Train a few steps, throw them away, and extrapolate to the whole recipe in one process.

    Args:
        config: with the number of classes of the data.
        steps: to measure, after two that warm up.
        progress: called with (steps and images done, all of them).

    Raises:
        UserError: as a training would.
    """
    plan = in_own_process(_try_training, config, train_split, val_split, device, steps, progress=progress)
    available = available_memory(torch.device(plan.device)) / 2**30
    memory = plan.memory | {"available": round(available, 3)}
    return replace(plan, memory=memory, fits=memory["total"] < available)


def _try_training(
    config: Config,
    train_split: DetectionDataset,
    val_split: DetectionDataset | None,
    device: str | None,
    steps: int,
    progress: Progress,
) -> Plan:
    """A few steps and a short evaluation, as a training does them. What is available is not asked while they take memory."""
    some = 0 if val_split is None else min(_EVALUATED, len(val_split))
    total = _WARM_UP + steps + _WORST + some
    counted = itertools.count(1)

    def advance() -> None:
        progress(next(counted), total)

    place = require_device(device)
    process = peak_memory(place)
    with tempfile.TemporaryDirectory() as folder:
        quiet = config.model_copy(update={"trackers": ()})
        trainer = Trainer(quiet, Run(Path(folder)), train_split, None, device=device, callbacks=[])
    model, images = peak_memory(place), cast(TrainingImages, trainer.loader.images)
    seconds, workers = _time_steps(trainer, steps, advance)
    worst = worst_batch(config, train_split, trainer.model.preprocessing, config.batch_size, device=place)
    for _ in range(_WORST):
        trainer.step([worst] * config.accumulate, boxes=float(sum(map(len, worst.targets))), progress=0.0)
        advance()
    apart = trainer.config.workers > 0 or place.type != "cpu"
    decoded = 0 if apart else images.cache.nbytes / 2**30
    step, evaluation, evaluation_seconds = peak_memory(place), 0.0, 0.0
    if val_split is not None:
        first, part = (
            DetectionDataset(val_split.annotations.with_images(np.arange(count)), name=val_split.name)
            for count in (1, some)
        )
        evaluate_split(cast(Detector, trainer.average.model), first)  # pays for what is made once
        started = time.perf_counter()
        found = evaluate_split(
            cast(Detector, trainer.average.model),
            part,
            observers=[ValidationLoss(trainer.step.criterion)],
            progress=lambda *_: advance(),
        )
        evaluation_seconds = (time.perf_counter() - started) / len(part) * len(val_split)
        rows = len(found.results) / len(part) * (len(val_split) - len(part))
        evaluation = peak_memory(place) - step + (rows * _ROW_BYTES / 2**30 if place.type == "cpu" else 0)
    weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    memory = {
        "process": process,
        "model": model - process,
        "step": step - model - decoded,
        "evaluation": evaluation,
        "cached images": images.cache.capacity / 2**30,
        "workers": workers,
    }
    step_seconds = sum(seconds) / len(seconds)
    epochs = trainer.total_steps / trainer.epoch_steps
    evaluations = 0 if val_split is None else math.ceil(math.ceil(epochs) / config.eval_every)
    return Plan(
        device=str(place),
        images=len(train_split),
        batches=len(trainer.batches),
        step_images=trainer.step_images,
        epoch_steps=trainer.epoch_steps,
        total_steps=trainer.total_steps,
        lr=config.lr * trainer.lr_scale,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        memory=with_totals(memory, place, images_apart=apart),
        fits=False,
        measured_steps=len(seconds),
        step_seconds=round(step_seconds, 4),
        epoch_seconds=round(step_seconds * trainer.epoch_steps, 1),
        evaluation_seconds=round(evaluation_seconds, 1),
        total_seconds=round(step_seconds * trainer.total_steps + evaluation_seconds * evaluations, 1),
        # best, last, and the state with weights, average and two moments; a file is written beside the one it replaces
        disk=round((6 * weights + 4 * sum(parameter.nbytes for parameter in trained)) / 2**30, 3),
    )


def with_totals(memory: dict[str, float], device: torch.device, *, images_apart: bool) -> dict[str, float]:
    """Parts in GiB with their "peak" and "total", as in `Plan`. `images_apart`: decoded images are no part of the peak."""
    total = sum(memory.values())
    peak = total - memory["workers"] - (memory["cached images"] if images_apart else 0)
    memory = memory | {"peak": peak, "total": total if device.type == "cpu" else peak}
    return {name: round(value, 3) for name, value in memory.items()}


def _time_steps(trainer: Trainer, count: int, advance: Callable[[], None]) -> tuple[list[float], float]:
    """Seconds of single optimiser steps, where a short epoch is begun again; and the GiB that only its workers have."""
    seconds: list[float] = []
    others = set(psutil.Process().children())
    trainer.wrapped.train()
    accumulate = min(trainer.config.accumulate, len(trainer.batches))
    try:
        while len(seconds) < _WARM_UP + count:
            source = iter(trainer.loader)
            for _ in range(len(trainer.batches) // accumulate):
                started = time.perf_counter()
                batches, boxes = trainer.fetch(source, accumulate)
                trainer.step(batches, boxes=boxes, progress=0.0)
                trainer.average.update(trainer.model)
                seconds.append(time.perf_counter() - started)
                advance()
                if len(seconds) == _WARM_UP + count:
                    break
            trainer.batches.epoch += 1
        workers = sum(map(_own_memory, set(psutil.Process().children()) - others)) / 2**30
    finally:
        trainer.loader.close()
    return seconds[_WARM_UP:], workers


def _own_memory(process: psutil.Process) -> int:
    """Bytes that a process shares with no other, such as the decoded images."""
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


@dataclass(frozen=True, slots=True)
class Overfit:
    """One batch, seen again and again.

    Attributes:
        images, boxes: of the batch.
        losses: of each step.
        found: share of the boxes that a prediction of their class finds, with IoU >= 0.5 and a score over 0.3.
        wrong: predictions over 0.3 that find no box, for each box.
        learnt: whether at least 0.9 of the boxes are found.
    """

    images: int
    boxes: int
    losses: list[float]
    found: float
    wrong: float

    @property
    def learnt(self) -> bool:
        return self.found >= 0.9

    def to_json(self) -> dict[str, Any]:
        """By name, ready for json."""
        return fields_of(self) | {"learnt": self.learnt}


def overfit_one_batch(
    config: Config, split: DetectionDataset, *, steps: int = 200, device: str | None = None
) -> Overfit:
    """Train on one batch without augmentation. A model that does not learn it by heart will learn nothing else: look for
    wrong classes or boxes, a learning rate far off, or frozen weights.

    Args:
        config: with the number of classes of the data; rates stay constant, the moving average is off.
        split: its first `batch_size` images with boxes are the batch.

    Raises:
        DataError: no image has boxes.
    """
    chosen = [index for index in range(len(split)) if len(split.labels(index))][: config.batch_size]
    if not chosen:
        raise DataError(f"{split.annotation_file}: no image has boxes", "`paqdetr data check` shows what is there")
    update = {"ema_decay": 0.0, "trackers": (), "batch_size": len(chosen), "workers": 0}
    with tempfile.TemporaryDirectory() as folder:
        quiet = config.model_copy(update=update)
        trainer = Trainer(quiet, Run(Path(folder)), split, None, device=device, callbacks=[])
    batch = plain_batch(split, trainer.model.preprocessing, chosen).to(trainer.accelerator.device)
    boxes = float(sum(len(target) for target in batch.targets))
    trainer.wrapped.train()
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    losses = [round(trainer.step([batch], boxes=boxes, progress=step / steps).loss, 4) for step in range(steps)]
    found, wrong = _found(trainer.model.eval(), batch)
    return Overfit(len(chosen), int(boxes), losses, round(found / boxes, 4), round(wrong / boxes, 4))


@torch.inference_mode()
def _found(model: Detector, batch: Batch) -> tuple[int, int]:
    """Boxes that are found, and sure predictions that find none."""
    output = model(batch.images, batch.padding_mask)
    found = wrong = 0
    for logits, boxes, target in zip(output.pred_logits, output.pred_boxes, batch.targets, strict=True):
        scores, labels = logits.float().sigmoid().max(-1)
        sure = scores > _SCORE
        overlap = box_iou(
            box_convert(boxes[sure].float(), "cxcywh", "xyxy"), box_convert(target.boxes, "cxcywh", "xyxy")
        )
        hit = (overlap >= _IOU) & (labels[sure, None] == target.labels[None])  # (sure, G)
        found += int(hit.any(0).sum())
        wrong += int((~hit.any(1)).sum())
    return found, wrong
