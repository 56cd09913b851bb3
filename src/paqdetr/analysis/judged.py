"""A result set held against its ground truth: what the diagnosis of mistakes needs, and no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.metrics.coco_records import IouType
from paqdetr.metrics.curves import ThresholdCurves, threshold_curves
from paqdetr.metrics.matching import MatchTable


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
