"""Whether scores mean what they say: of the detections that score 0.7, are 70 % right?

Calibration (Guo et al. 2017) for detectors: a detection is right where COCO matches it at an IoU threshold. The variant
that looks at the localisation too lets a detection be right to the degree that it is so at the ten thresholds from .50
to .95, so that a perfectly calibrated score says how well the box fits (in the spirit of Oksuz et al. 2023, whose
measure multiplies precision by the mean IoU of what is right).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics.matching import MatchTable
from paqdetr.serialize import json_number


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Detections in bins of equal width by score.

    Attributes:
        edges: (B + 1,) from 0 to 1; a bin holds its lower edge, the last one 1 as well.
        counts: (B,) detections that count (matched to a crowd they do not).
        confidence: (B,) their mean score; NaN in an empty bin.
        accuracy: (B,) the share that is right; NaN in an empty bin.
        error: the expected calibration error, mean of |accuracy - confidence| over detections; NaN without any.
        largest_error: the largest difference of a bin.
        iou_threshold: what counts as right; None: the share of IoU thresholds .50:.05:.95 at which it is.
        score_threshold: detections below it were left out.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float
    largest_error: float
    iou_threshold: float | None
    score_threshold: float

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json; None for NaN."""
        return {
            "iou_threshold": self.iou_threshold,
            "score_threshold": self.score_threshold,
            "expected_calibration_error": json_number(self.error),
            "largest_error": json_number(self.largest_error),
            "bins": [
                {
                    "low": low,
                    "high": high,
                    "detections": int(count),
                    "confidence": json_number(confidence),
                    "accuracy": json_number(accuracy),
                }
                for low, high, count, confidence, accuracy in zip(
                    self.edges[:-1].tolist(),
                    self.edges[1:].tolist(),
                    self.counts.tolist(),
                    self.confidence.tolist(),
                    self.accuracy.tolist(),
                    strict=True,
                )
            ],
        }


def calibration(
    table: MatchTable,
    *,
    iou_threshold: float | None = 0.5,
    bins: int = 10,
    score_threshold: float = 0.0,
    class_index: int | None = None,
) -> Calibration:
    """Reliability bins and the expected calibration error.

    Args:
        table: matched results.
        iou_threshold: one of `table.iou_thresholds`; None takes the localisation into account (see above).
        bins: at least 1, of equal width.
        score_threshold: leave out what scores less. A DETR gives every image a hundred detections, most of them near a score
            of 0 and rightly so: with all of them the error looks small whatever the rest does.
        class_index: of this class alone, by its position in the table.

    Raises:
        ConfigError: a setting out of its range.
        DataError: scores are not in [0, 1].
    """
    if bins < 1:
        raise ConfigError(f"calibration: found {bins} bins, expected at least 1", "use 10")
    own = slice(0, len(table.scores)) if class_index is None else table.of_class(class_index)
    scores = table.scores[own]
    if len(scores) and not 0 <= scores.min() <= scores.max() <= 1:
        raise DataError(
            f"calibration: scores lie between {scores.min():.3g} and {scores.max():.3g}, expected 0 to 1",
            "turn them into probabilities first",
        )
    chosen = slice(None) if iou_threshold is None else [table.threshold_index(iou_threshold)]
    counted = ~table.ignored[0, chosen, own].all(axis=0) & (scores >= score_threshold)
    scores, right = scores[counted], table.true_positive[0, chosen, own].mean(axis=0)[counted]
    places = np.minimum((scores * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(places, scores, bins) / np.where(counts, counts, np.nan)
        accuracy = np.bincount(places, right, bins) / np.where(counts, counts, np.nan)
    gaps = np.abs(accuracy - confidence)[counts > 0]
    return Calibration(
        edges=np.linspace(0, 1, bins + 1),
        counts=counts,
        confidence=confidence,
        accuracy=accuracy,
        error=float(gaps @ counts[counts > 0] / counts.sum()) if len(scores) else math.nan,
        largest_error=float(gaps.max()) if len(scores) else math.nan,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
