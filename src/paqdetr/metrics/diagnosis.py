"""What kind of mistakes a detector makes: precision and recall by threshold, calibration, the error split of TIDE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

from paqdetr.errors import ConfigError, DataError
from paqdetr.metrics.coco import CocoRecords, GroundTruth, IouType, Json, evaluated
from paqdetr.metrics.matches import RECALLS, MatchTable, threshold_index
from paqdetr.serialize import Jsonable, fields_of, json_number, plain


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
        """Everything, ready for json; None for NaN, and for the name of the row over all."""
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
    """The precision that COCO reads at recall 0, .01, ... 1, whose mean is AP: (C, 101) float64, the best at that recall or a
    higher one, 0 where it is not reached, NaN for a class without objects. `iou_threshold` None: the mean over all thresholds."""
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
    """Precision, recall and F1 = 2 TP / (detections + objects) against the score threshold, at one of `table.iou_thresholds`;
    detections matched to a crowd are left out."""
    t = table.threshold_index(iou_threshold)
    thresholds = np.linspace(0, 1, 101)
    classes = len(table.class_names)
    precision, recall, f1 = (np.full((classes + 1, len(thresholds)), np.nan) for _ in range(3))
    best_threshold, best_f1 = np.full(classes + 1, np.nan), np.full(classes + 1, np.nan)
    for row in range(classes + 1):
        over_all = row == classes
        own = slice(0, len(table.scores)) if over_all else table.of_class(row)
        positives = int((table.positives[0] if over_all else table.positives[0, row]).sum())
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
    return ThresholdCurves(table.class_names, iou_threshold, thresholds, precision, recall, f1, best_threshold, best_f1)


def _counts(
    table: MatchTable, own: slice, t: int, order: np.ndarray | slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) true positives, and detections that count, down to each detection."""
    right = np.cumsum(table.true_positive[0, t, own][order])
    return right, np.cumsum(~table.ignored[0, t, own][order])


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Detections in bins of equal width by score.

    Attributes:
        edges: (B + 1,) from 0 to 1; a bin holds its lower edge, the last one 1 as well.
        counts: (B,) detections that count (matched to a crowd they do not).
        confidence: (B,) their mean score; NaN in an empty bin.
        accuracy: (B,) the share that is right; NaN in an empty bin.
        error: the expected calibration error, mean of |accuracy - confidence| over detections; NaN without any.
        chance: about what `error` is for scores that are exact, since few detections in a bin are right more or less often by
            chance; NaN without any.
        largest_error: the largest difference of a bin.
        iou_threshold: what counts as right; None: the share of IoU thresholds .50:.05:.95 at which it is.
        score_threshold: detections below it were left out.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float
    chance: float
    largest_error: float
    iou_threshold: float | None
    score_threshold: float

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json; None for NaN."""
        names = ("low", "high", "detections", "confidence", "accuracy")
        columns = (self.edges[:-1], self.edges[1:], self.counts, self.confidence, self.accuracy)
        return {
            "iou_threshold": self.iou_threshold,
            "score_threshold": self.score_threshold,
            "expected_calibration_error": json_number(self.error),
            "error_by_chance": json_number(self.chance),
            "largest_error": json_number(self.largest_error),
            "bins": [dict(zip(names, values, strict=True)) for values in zip(*map(plain, columns), strict=True)],
        }


def calibration(
    table: MatchTable, *, iou_threshold: float | None = 0.5, bins: int = 10, score_threshold: float = 0.0
) -> Calibration:
    """Reliability bins and the expected calibration error.

    Args:
        iou_threshold: one of `table.iou_thresholds`; None takes the localisation into account (see above).
        bins: at least 1, of equal width.
        score_threshold: leave out what scores less. A DETR gives every image a hundred detections, most of them near a score
            of 0 and rightly so: with all of them the error looks small whatever the rest does.

    Raises:
        ConfigError: a setting out of its range.
        DataError: scores are not in [0, 1].
    """
    if bins < 1:
        raise ConfigError(f"calibration: found {bins} bins, expected at least 1", "use 10")
    scores = table.scores
    if len(scores) and not 0 <= scores.min() <= scores.max() <= 1:
        raise DataError(
            f"calibration: scores lie between {scores.min():.3g} and {scores.max():.3g}, expected 0 to 1",
            "turn them into probabilities first",
        )
    chosen = slice(None) if iou_threshold is None else [table.threshold_index(iou_threshold)]
    # What lies in a crowd by one of the IoU thresholds is about no object at the higher ones either.
    counted = ~table.ignored[0, chosen].any(axis=0) & (scores >= score_threshold)
    scores, right = scores[counted], table.true_positive[0, chosen].mean(axis=0)[counted]
    places = np.minimum((scores * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(places, scores, bins) / np.where(counts, counts, np.nan)
        accuracy = np.bincount(places, right, bins) / np.where(counts, counts, np.nan)
    gaps = np.abs(accuracy - confidence)[counts > 0]
    # The mean absolute deviation of a normal distribution with the variance of a share of n: c (1 - c) / n.
    luck = np.sqrt(2 / np.pi * confidence * (1 - confidence) / np.maximum(counts, 1))[counts > 0]
    return Calibration(
        edges=np.linspace(0, 1, bins + 1),
        counts=counts,
        confidence=confidence,
        accuracy=accuracy,
        error=float(gaps @ counts[counts > 0] / counts.sum()) if len(scores) else math.nan,
        chance=float(luck @ counts[counts > 0] / counts.sum()) if len(scores) else math.nan,
        largest_error=float(gaps.max()) if len(scores) else math.nan,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )


MISTAKES = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
"""The six kinds, in TIDE's order, and what hotcoco calls them."""


@dataclass(frozen=True, slots=True)
class ErrorSplit:
    """The six kinds of mistakes of TIDE (Bolya et al. 2020), at IoU thresholds f (foreground) and b (background).

    A false positive is the first of these that fits, whether or not the object is found by another detection:
    localisation: its best IoU with an object of its class lies between b and f; classification: it has IoU f or more with
    an object of another class; duplicate: f or more with one of its own; background: less than b with every object; both:
    the rest. missed: an object that no detection found and that no classification or localisation mistake is about. Crowds, and
    detections matched to them, are left out.

    Attributes:
        ap: AP at IoU f.
        gains: kind -> what AP would gain were these mistakes alone mended: the class or the box put right, the rest taken
            away, missed objects no longer asked for. Gains do not add up to 1 - ap.
        counts: kind -> how many detections, or objects.
        false_positives, false_negatives: what AP would gain without any false positive, or without any object not found.
        foreground, background: f and b.
        score_threshold: detections below it were left out.
    """

    ap: float
    gains: dict[str, float]
    counts: dict[str, int]
    false_positives: float
    false_negatives: float
    foreground: float
    background: float
    score_threshold: float

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json; None for NaN."""
        found = fields_of(self)
        return {"AP": found.pop("ap"), **found}


@dataclass(frozen=True, slots=True, eq=False)
class Confusion(Jsonable):
    """Which class is taken for which.

    Attributes:
        class_names: (C).
        matrix: (C + 1, C + 1) int64; rows are the objects' classes, columns the detections'. The last row counts detections
            of no object, the last column objects that were not found. The diagonal of the classes holds the true positives
            of AP.
        iou_threshold, score_threshold: what counts as found, and which detections count.
    """

    class_names: tuple[str, ...]
    matrix: np.ndarray
    iou_threshold: float
    score_threshold: float


def error_split(
    ground_truth: GroundTruth,
    results: Sequence[Json],
    *,
    iou_type: IouType = "bbox",
    foreground: float = 0.5,
    background: float = 0.1,
    score_threshold: float = 0.0,
) -> ErrorSplit:
    """Split the mistakes of a result set.

    Args:
        ground_truth, results, iou_type: as of `evaluate_detections`, with its errors.
        foreground: IoU threshold of what is found, one of .50, .55, ... .95.
        background: IoU threshold of what overlaps at all, from 0 to below `foreground`.
        score_threshold: leave out what scores less. Without it the counts of a DETR are mostly detections that nobody would
            look at; the gains need them all, as AP does.

    Raises:
        ConfigError: an IoU threshold that is none of these.
    """
    # Of another one hotcoco would take matches at the nearest of the ten, and kinds at the threshold itself.
    threshold_index(np.array(hotcoco.Params(iou_type).iou_thrs), foreground)
    if not 0 <= background < foreground:
        raise ConfigError(
            f"background IoU threshold {background}: expected 0 to below the foreground's, {foreground}", "use 0.1"
        )
    records = CocoRecords.open(ground_truth, iou_type)
    rows = [row for row in records.results(results) if row["score"] >= score_threshold]
    truth = records.ground_truth()
    objects = [annotation for annotation in truth["annotations"] if not annotation["iscrowd"]]
    if len(objects) < len(truth["annotations"]):  # hotcoco would take a crowd for an object that is badly hit
        table = MatchTable.of_records(records, rows)
        # Of more than 100 on an image, none may move up into the place of one on a crowd.
        off_crowds = table.detections[~table.ignored[0, table.threshold_index(foreground)]]
        rows = [rows[place] for place in np.sort(off_crowds)]
        truth = truth | {"annotations": objects}
    found = evaluated(truth, rows, iou_type).tide_errors(pos_thr=foreground, bg_thr=background)
    return ErrorSplit(
        ap=float(found["ap_base"]) if objects else math.nan,
        gains={kind: float(found["delta_ap"][own]) for kind, own in MISTAKES.items()},
        counts={kind: int(found["counts"][own]) for kind, own in MISTAKES.items()},
        false_positives=float(found["delta_ap"]["FP"]),
        false_negatives=float(found["delta_ap"]["FN"]),
        foreground=foreground,
        background=background,
        score_threshold=score_threshold,
    )


def confusion(
    ground_truth: GroundTruth,
    results: Sequence[Json],
    *,
    iou_type: IouType = "bbox",
    iou_threshold: float = 0.5,
    score_threshold: float = 0.3,
    table: MatchTable | None = None,
) -> Confusion:
    """Count which class is taken for which.

    First come the matches of AP, within each class, best score first: they make the diagonal. What is left over of
    detections is then matched with what is left over of objects, whatever their classes, again best score first, each with
    the free object of the largest IoU. Crowds, and detections matched to them, are left out.

    Args:
        ground_truth, results, iou_type: as of `evaluate_detections`, with its errors.
        iou_threshold: one of .50, .55, ... .95.
        score_threshold: leave out what scores less.
        table: the matches of just these results, if they are there already.
    """
    records = CocoRecords.open(ground_truth, iou_type)
    rows, truth = records.results(results), records.ground_truth()
    table = table or MatchTable.of_records(records, rows)
    t, classes = table.threshold_index(iou_threshold), len(table.class_names)
    kept = (table.scores >= score_threshold) & ~table.ignored[0, t]
    right = kept & table.true_positive[0, t]
    places = np.repeat(np.arange(classes), np.diff(table.offsets))
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    np.fill_diagonal(matrix[:-1, :-1], np.bincount(places[right], minlength=classes))

    matched = set(table.matches[t, right].tolist())
    left_over = [
        annotation
        for number, annotation in enumerate(truth["annotations"])
        if number not in matched and not annotation["iscrowd"]
    ]
    others = [rows[place] for place in table.detections[kept & ~right].tolist()]
    rest = evaluated(truth | {"annotations": left_over}, others, iou_type)
    matrix += rest.confusion_matrix(iou_thr=iou_threshold, max_det=len(others) + 1)["matrix"].astype(np.int64)
    return Confusion(table.class_names, matrix, iou_threshold, score_threshold)
