"""AP and recall of a `MatchTable` for many whole-numbered weights of its images at once.

With weight w an image's detections and objects count w times. Between two true positives precision only falls, and COCO
takes at every recall the best precision from there on: so precision matters at the true positives alone, and all that
is needed of the others is how many of them, by weight, stand before each.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from paqdetr.metrics.matching import MatchTable

RECALLS = np.linspace(0.0, 1.0, 101)
"""Where COCO reads the precision."""

# Cumulated weights held at once: 4 million numbers, 16 MB.
_BLOCK = 4_000_000


@dataclass(frozen=True, slots=True, eq=False)
class WeightedFigures:
    """COCO figures of S weightings of the images. NaN where nothing defines one, as in `CocoFigures`.

    Attributes:
        figures: name -> (S,) float64; the twelve of `FIGURE_NAMES` in their order.
        per_class: (S, C) AP of each class.
        per_class_AP50: (S, C).
    """

    figures: dict[str, np.ndarray]
    per_class: np.ndarray
    per_class_AP50: np.ndarray


def weighted_figures(table: MatchTable, weights: np.ndarray) -> WeightedFigures:
    """`MatchTable.figures`; weights (S, I) int32."""
    precision = average_precision(table, weights, range(4))  # (S, A, C, T)
    recalls = recall(table, weights, range(4), table.max_detections)
    few = [recall(table, weights, (0,), number)[:, 0] for number in (1, 10)]
    thresholds = np.round(table.iou_thresholds, 2)
    fifty, seventy_five = (int(np.flatnonzero(thresholds == iou)[0]) for iou in (0.5, 0.75))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, and meant so
        figures = {
            "AP": np.nanmean(precision[:, 0], axis=(1, 2)),
            "AP50": np.nanmean(precision[:, 0, :, fifty], axis=1),
            "AP75": np.nanmean(precision[:, 0, :, seventy_five], axis=1),
            **{
                f"AP{size}": np.nanmean(precision[:, a], axis=(1, 2)) for a, size in enumerate("sml", start=1)
            },
            "AR1": np.nanmean(few[0], axis=(1, 2)),
            "AR10": np.nanmean(few[1], axis=(1, 2)),
            "AR100": np.nanmean(recalls[:, 0], axis=(1, 2)),
            **{f"AR{size}": np.nanmean(recalls[:, a], axis=(1, 2)) for a, size in enumerate("sml", start=1)},
        }
    return WeightedFigures(figures, precision[:, 0].mean(axis=2), precision[:, 0, :, fifty])


def average_precision(table: MatchTable, weights: np.ndarray, areas: Sequence[int]) -> np.ndarray:
    """`MatchTable.average_precision`; weights (S, I) int32."""
    samples, classes = len(weights), len(table.class_names)
    found = np.full((samples, len(areas), classes, len(table.iou_thresholds)), np.nan)
    for c in range(classes):
        own = table.of_class(c)
        rows = max(1, _BLOCK // max(own.stop - own.start, 1))
        for start in range(0, samples, rows):
            block = weights[start : start + rows]
            for a, area in enumerate(areas):
                positives = block @ table.positives[area, c]  # (rows,)
                defined = positives > 0
                if defined.any():
                    found[start : start + rows, a, c][defined] = _of_class(
                        block[defined],
                        positives[defined],
                        table.images[own],
                        table.true_positive[area, :, own],
                        ~table.ignored[area, :, own],
                    )
    return found


def _of_class(
    weights: np.ndarray,  # (S, I)
    positives: np.ndarray,  # (S,), all above 0
    images: np.ndarray,  # (n,)
    true_positive: np.ndarray,  # (T, n)
    counted: np.ndarray,  # (T, n): not ignored
) -> np.ndarray:  # (S, T)
    found = np.zeros((len(weights), len(true_positive)))
    if not true_positive.any():
        return found
    end = int(np.flatnonzero(true_positive.any(axis=0))[-1]) + 1  # what comes later changes nothing
    images, true_positive, counted = images[:end], true_positive[:, :end], counted[:, :end]
    # What counts at one threshold counts at the others, but for the few that are matched: cumulate once, then correct.
    base = counted[-1]
    kept = np.flatnonzero(base)
    before = _cumulated(weights[:, images[kept]])  # (S, 1 + kept)
    for t, (hits, counts) in enumerate(zip(true_positive, counted, strict=True)):
        places = np.flatnonzero(hits)  # (k,)
        if not len(places):
            continue
        right = np.cumsum(weights[:, images[places]], axis=1, dtype=np.int32)  # (S, k)
        all_of_them = before[:, np.searchsorted(kept, places, side="right")]
        changed = np.flatnonzero(counts != base)
        if len(changed):
            signed = weights[:, images[changed]] * np.where(counts[changed], 1, -1).astype(np.int32)
            all_of_them = all_of_them + _cumulated(signed)[:, np.searchsorted(changed, places, side="right")]
        precision = right / (all_of_them + np.spacing(1.0))  # nothing before and weight 0: 0, not 0 / 0
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Recalls that are read at each true positive: those above the one before it, up to its own.
        reached = np.searchsorted(RECALLS, right / positives[:, None], side="right")  # (S, k)
        read = np.diff(reached, axis=1, prepend=0)
        found[:, t] = np.einsum("sk,sk->s", best, read) / len(RECALLS)
    return found


def _cumulated(weights: np.ndarray) -> np.ndarray:
    """(S, n) -> (S, n + 1): the sum of the first 0, 1, ... n."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1), np.int32)
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def recall(table: MatchTable, weights: np.ndarray, areas: Sequence[int], max_detections: int) -> np.ndarray:
    """`MatchTable.recall`; weights (S, I) int32."""
    thresholds, images = len(table.iou_thresholds), len(table.image_ids)
    found = np.full((len(weights), len(areas), len(table.class_names), thresholds), np.nan)
    weights = weights.astype(np.float64)  # whole numbers still, and products by BLAS
    for c in range(len(table.class_names)):
        own = table.of_class(c)
        early = table.ranks[own] < max_detections
        for a, area in enumerate(areas):
            positives = weights @ table.positives[area, c]  # (S,)
            hits = np.stack(
                [
                    np.bincount(table.images[own][row & early], minlength=images)
                    for row in table.true_positive[area, :, own]
                ]
            )  # (T, I)
            with np.errstate(invalid="ignore"):
                found[:, a, c] = np.where(
                    positives[:, None] > 0, (weights @ hits.T) / positives[:, None], np.nan
                )
    return found
