"""Precision against recall, and precision, recall and F1 against the score threshold, of each class and over all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paqdetr.metrics.matching import MatchTable
from paqdetr.metrics.weighting import RECALLS
from paqdetr.serialize import json_number, plain


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdCurves:
    """What keeping only detections that score at least a threshold gives, at one IoU.

    Attributes:
        class_names: (C).
        iou_threshold: what counts as found.
        thresholds: (101,) 0, .01, ... 1.
        precision: (C + 1, 101); the last row is over all: true and false positives of all classes together. NaN where
            nothing scores as much.
        recall, f1: (C + 1, 101); NaN for a class without objects.
        best_threshold: (C + 1,) the highest score at which F1 is at its best, among the scores of the detections: exact, not
            on the grid. NaN where nothing is found.
        best_f1: (C + 1,) F1 there; 0 where nothing is found, NaN for a class without objects.
    """

    class_names: tuple[str, ...]
    iou_threshold: float
    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    best_threshold: np.ndarray
    best_f1: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json; None for NaN, the row over all under "all"."""
        rows = [*self.class_names, None]
        return {
            "iou_threshold": self.iou_threshold,
            "thresholds": self.thresholds.tolist(),
            "classes": [
                {
                    "name": name,
                    **{key: plain(getattr(self, key)[row]) for key in ("precision", "recall", "f1")},
                    **{key: json_number(getattr(self, key)[row]) for key in ("best_threshold", "best_f1")},
                }
                for row, name in enumerate(rows)
            ],
        }


def precision_recall(table: MatchTable, iou_threshold: float | None = 0.5) -> np.ndarray:
    """The precision that COCO reads at recall 0, .01, ... 1: its mean over recalls is AP.

    Args:
        table: matched results.
        iou_threshold: one of `table.iou_thresholds`, or None for the mean over all of them.

    Returns:
        (C, 101) float64: the best precision at that recall or a higher one, 0 where it is not reached, NaN for a class
        without objects.
    """
    chosen = range(len(table.iou_thresholds))
    if iou_threshold is not None:
        chosen = [table.threshold_index(iou_threshold)]
    found = np.full((len(table.class_names), len(chosen), len(RECALLS)), np.nan)
    for c in range(len(table.class_names)):
        own, positives = table.of_class(c), int(table.positives[0, c].sum())
        if not positives:
            continue
        for row, t in enumerate(chosen):
            right, seen = _counts(table, own, t)
            best = np.maximum.accumulate((right / np.maximum(seen, 1))[::-1])[::-1]
            places = np.searchsorted(right / positives, RECALLS)
            found[c, row] = np.append(best, 0.0)[places]
    return found.mean(axis=1)


def threshold_curves(table: MatchTable, iou_threshold: float = 0.5) -> ThresholdCurves:
    """Precision, recall and F1 against the score threshold.

    F1 = 2 TP / (detections + objects); detections matched to a crowd are left out.

    Args:
        table: matched results.
        iou_threshold: one of `table.iou_thresholds`.
    """
    t = table.threshold_index(iou_threshold)
    thresholds = np.linspace(0, 1, 101)
    classes = len(table.class_names)
    precision, recall, f1 = (np.full((classes + 1, len(thresholds)), np.nan) for _ in range(3))
    best_threshold, best_f1 = np.full(classes + 1, np.nan), np.full(classes + 1, np.nan)
    for row in range(classes + 1):
        everything = row == classes
        own = slice(0, len(table.scores)) if everything else table.of_class(row)
        positives = int((table.positives[0] if everything else table.positives[0, row]).sum())
        order = np.argsort(-table.scores[own], kind="stable")
        scores = table.scores[own][order]
        right, seen = _counts(table, own, t, order)
        # How many score at least as much as each threshold: scores fall.
        ends = np.searchsorted(-scores, -thresholds, side="right")
        hits, kept = np.append(0, right)[ends], np.append(0, seen)[ends]
        with np.errstate(invalid="ignore"):
            precision[row] = hits / np.where(kept, kept, np.nan)
        if not positives:
            continue
        recall[row], f1[row] = hits / positives, 2 * hits / (kept + positives)
        best_f1[row] = 0.0
        if len(right) and right[-1]:
            last = np.append(scores[1:] != scores[:-1], True)  # equal scores come and go together
            at_each = np.where(last, 2 * right / (seen + positives), -1.0)
            place = int(np.argmax(at_each))
            best_threshold[row], best_f1[row] = scores[place], at_each[place]
    return ThresholdCurves(
        table.class_names, iou_threshold, thresholds, precision, recall, f1, best_threshold, best_f1
    )


def _counts(
    table: MatchTable, own: slice, t: int, order: np.ndarray | slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) true positives, and detections that count, down to each detection."""
    right = np.cumsum(table.true_positive[0, t, own][order])
    return right, np.cumsum(~table.ignored[0, t, own][order])
