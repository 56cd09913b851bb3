"""What kind of mistakes a detector makes: the error split of TIDE, and which class is taken for which.

The split is hotcoco's, held against hand-made cases by tests/metrics/test_mistakes.py. Its confusion matrix matches boxes
without looking at classes, so that two overlapping objects, both found, can come out as exchanged; ours starts from the
matches that AP is made of and lets hotcoco sort out the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

from paqdetr.errors import ConfigError
from paqdetr.metrics.coco_records import CocoRecords, GroundTruth, IouType
from paqdetr.metrics.matching import MatchTable, threshold_index
from paqdetr.serialize import fields_of

_Json = Mapping[str, Any]

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
    the rest. missed: an object that no detection found and that no classification or localisation mistake is about.

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
class Confusion:
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

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json."""
        return fields_of(self)


def error_split(
    ground_truth: GroundTruth,
    results: Sequence[_Json],
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
            f"background IoU threshold {background}: expected 0 to below the foreground's, {foreground}",
            "use 0.1",
        )
    records = CocoRecords.open(ground_truth, iou_type)
    rows = [row for row in records.results(results) if row["score"] >= score_threshold]
    truth = records.ground_truth()
    found = _evaluated(truth, rows, iou_type).tide_errors(pos_thr=foreground, bg_thr=background)
    objects = any(not annotation["iscrowd"] for annotation in truth["annotations"])
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
    results: Sequence[_Json],
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
    rest = _evaluated(truth | {"annotations": left_over}, others, iou_type)
    matrix += rest.confusion_matrix(iou_thr=iou_threshold, max_det=len(others) + 1)["matrix"].astype(np.int64)
    return Confusion(table.class_names, matrix, iou_threshold, score_threshold)


def _evaluated(truth: dict[str, Any], rows: list[dict[str, Any]], iou_type: IouType) -> hotcoco.COCOeval:
    dataset = hotcoco.COCO(truth)
    evaluation = hotcoco.COCOeval(dataset, dataset.load_res(rows), iou_type)
    evaluation.evaluate()
    return evaluation
