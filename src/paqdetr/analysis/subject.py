"""What is analysed: a set of results beside its ground truth, or a model with what one pass over the split found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.data.dataset import DetectionDataset
from paqdetr.evaluation.evaluate import Evaluation
from paqdetr.metrics.coco import IouType
from paqdetr.metrics.diagnosis import ThresholdCurves, threshold_curves
from paqdetr.metrics.matches import MatchTable
from paqdetr.models import Detector


@dataclass(frozen=True, slots=True)
class Judged:
    """Detections of any detector, matched.

    Attributes:
        label: what the report calls them.
        truth: a COCO json or its file.
        results: COCO results.
        table: their matches.
        iou_type: "bbox" or "segm".
        curves: F1 and the like at IoU .5.
    """

    label: str
    truth: dict[str, Any] | str | Path
    results: Sequence[dict[str, Any]]
    table: MatchTable
    iou_type: IouType = "bbox"
    curves: ThresholdCurves = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "curves", threshold_curves(self.table))

    @property
    def confident(self) -> float:
        """The score threshold at which F1 over all classes is at its best; 0 if nothing is found at all."""
        best = float(self.curves.best_threshold[-1])
        return 0.0 if np.isnan(best) else best


def labels(judged: Sequence[Judged]) -> list[str]:
    """ "" for one result set; "A: ..." and "B: ..." for two."""
    if len(judged) == 1:
        return [""]
    return [f"{letter}: {own.label}" for letter, own in zip("AB", judged, strict=True)]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and what it found.

    Attributes:
        label: what the report calls it.
        model: the detector.
        checkpoint: where it was read from, a file or a run's folder; None if it came as an object.
        split: the images.
        truth: their ground truth, a COCO json.
        evaluation: of the model on the split.
        table: how its detections were matched.
    """

    label: str
    model: Detector
    checkpoint: Path | None
    split: DetectionDataset
    truth: dict[str, Any]
    evaluation: Evaluation
    table: MatchTable


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model got right in each of I images of a split, at one score threshold and IoU 0.5.

    Attributes:
        threshold: detections below it are not looked at: where F1 over all classes is at its best.
        right, wrong, missed: (I,) int64 detections that found an object, that found none, objects not found.
    """

    threshold: float
    right: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(I,) 2 right / (2 right + wrong + missed); 1 where there was nothing to find and nothing was found."""
        total = 2 * self.right + self.wrong + self.missed
        return np.where(total > 0, 2 * self.right / np.maximum(total, 1), 1.0)


def outcome(table: MatchTable, threshold: float, image_ids: Sequence[int | str]) -> Outcome:
    """Count right, wrong and missed by image, in the order of `image_ids`: tables sort whole numbers, files need not."""
    t, images = table.threshold_index(0.5), len(table.image_ids)
    kept = (table.scores >= threshold) & ~table.ignored[0, t]
    right = np.bincount(table.images[kept & table.true_positive[0, t]], minlength=images)
    found = np.bincount(table.images[kept], minlength=images)
    objects = table.positives[0].sum(axis=0)
    places = {own: place for place, own in enumerate(table.image_ids)}
    order = [places[own] for own in image_ids]
    return Outcome(threshold, right[order], (found - right)[order], (objects - right)[order])
