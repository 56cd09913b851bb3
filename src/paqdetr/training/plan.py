"""Before a training: what it will need of memory, time and disk, measured on a few steps, and whether it can learn at all."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert, box_iou

from paqdetr.config import Config
from paqdetr.data.dataset import DetectionDataset
from paqdetr.data.loader import Batch, plain_batch
from paqdetr.environment import available_memory
from paqdetr.errors import DataError
from paqdetr.evaluation.evaluate import detect_split
from paqdetr.models import Detector
from paqdetr.runs import Run
from paqdetr.serialize import Jsonable, fields_of
from paqdetr.training.memory import peaks_of_steps
from paqdetr.training.optim import lr_scale
from paqdetr.training.trainer import Trainer

_WARM_UP = 2
_EVALUATED = 8
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
        memory: GiB by what it is for: "weights" of the model and its average, "gradients", "optimizer", "activations" and all
            else; their "total", measured in a process that trains on a batch of the largest images; and "available".
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
) -> Plan:
    """Train a few steps, throw them away, and extrapolate to the whole recipe in one process.

    Args:
        config: with the number of classes of the data.
        steps: to measure, after two that warm up.

    Raises:
        UserError: as a training would.
    """
    with tempfile.TemporaryDirectory() as folder:
        quiet = config.model_copy(update={"trackers": ()})
        trainer = Trainer(quiet, Run(Path(folder)), train_split, None, device=device, callbacks=[])
        seconds = _time_steps(trainer, steps)
        evaluation = 0.0 if val_split is None else _time_evaluation(trainer, val_split)
    device_used = trainer.accelerator.device
    (total,) = peaks_of_steps(config, train_split, [config.batch_size], device=device_used)
    weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    gradients = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    gib = {
        "weights": 2 * weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": total - 2 * weights - 3 * gradients,
        "total": total,
        "available": available_memory(device_used),
    }
    step_seconds = sum(seconds) / len(seconds)
    epochs = trainer.total_steps / trainer.epoch_steps
    evaluations = 0 if val_split is None else math.ceil(math.ceil(epochs) / config.eval_every)
    return Plan(
        device=str(device_used),
        images=len(train_split),
        batches=len(trainer.batches),
        step_images=config.batch_size * config.accumulate,
        epoch_steps=trainer.epoch_steps,
        total_steps=trainer.total_steps,
        lr=config.lr * lr_scale(config),
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        memory={name: round(value / 2**30, 3) for name, value in gib.items()},
        fits=gib["total"] < gib["available"],
        measured_steps=len(seconds),
        step_seconds=round(step_seconds, 4),
        epoch_seconds=round(step_seconds * trainer.epoch_steps, 1),
        evaluation_seconds=round(evaluation, 1),
        total_seconds=round(step_seconds * trainer.total_steps + evaluation * evaluations, 1),
        # best, last, and the state with weights, average and two moments; a file is written beside the one it replaces
        disk=round((6 * weights + 4 * gradients) / 2**30, 3),
    )


def _time_steps(trainer: Trainer, count: int) -> list[float]:
    """Seconds of single optimiser steps; a short epoch is begun again."""
    seconds: list[float] = []
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
                if len(seconds) == _WARM_UP + count:
                    break
            trainer.batches.epoch += 1
    finally:
        trainer.loader.close()
    return seconds[_WARM_UP:]


def _time_evaluation(trainer: Trainer, split: DetectionDataset) -> float:
    """Seconds for the whole split, from its first images."""
    some = min(_EVALUATED, len(split))
    found = detect_split(trainer.model, split, batch_size=4)
    next(found)  # the first one pays for what is made once
    started = time.perf_counter()
    done = sum(1 for _ in zip(range(some - 1), found, strict=False))
    return (time.perf_counter() - started) / max(done, 1) * len(split)


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
