"""The twelve COCO figures of a list of results, per-class AP, and AP after non-maximum suppression.

The numbers come from hotcoco, held equal to pycocotools by tests/metrics/test_coco.py (why it and no other:
docs/decisions/0002-coco-evaluation-library.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import torch
from torchvision.ops import batched_nms

from paqdetr.errors import DataError
from paqdetr.files import read_json
from paqdetr.metrics.coco_records import (
    MAX_DETECTIONS,
    CocoRecords,
    GroundTruth,
    IouType,
    counted_detections,
)
from paqdetr.serialize import fields_of
from paqdetr.structures import Detections

_Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CocoFigures:
    """What COCO reports for one set of results.

    Every figure lies in [0, 1] and is averaged over the classes that have ground truth. It is NaN where
    nothing defines it: `APl` without a large object, all without any object (pycocotools says -1 there).

    Attributes:
        AP: mean over IoU .50:.05:.95, area "all", the best 100 detections per image and class; AP50, AP75 at one IoU.
        APs, APm, APl: AP of objects below 32^2, between, and above 96^2 square pixels of annotated `area`.
        AR1, AR10, AR100: recall with that many detections per image and class, mean over the IoU thresholds. With another
            `max_detections`, that number stands in the place of 100 everywhere.
        ARs, ARm, ARl: AR100 by object area.
        per_class: class name -> AP; NaN for a class without ground truth. In ascending order of category id.
        per_class_AP50: class name -> AP at IoU .50.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    per_class: dict[str, float] = field(default_factory=dict)
    per_class_AP50: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The twelve figures and `per_class`, ready for json: None (null) stands where a figure is NaN."""
        return {key: value for key, value in fields_of(self).items() if key != "per_class_AP50"}


FIGURE_NAMES: tuple[str, ...] = tuple(
    f.name for f in fields(CocoFigures) if not f.name.startswith("per_class")
)
"""The twelve figures, in the order in which COCO prints them."""


def evaluate_detections(
    ground_truth: GroundTruth,
    results: Sequence[_Json],
    *,
    iou_type: IouType = "bbox",
    source: str = "",
    max_detections: int = MAX_DETECTIONS,
) -> CocoFigures:
    """Compare results with the ground truth, by COCO's rules. Prints nothing and changes neither argument.

    Args:
        ground_truth: a COCO json, the file with it, or its records: `images`, `categories`, `annotations`. Ids may be
            integers or strings. An annotation without `area` gets that of its box (of its mask for "segm"),
            one without `iscrowd` counts as a single object.
        results: COCO results, as of `Detections.to_coco()`: `image_id`, `category_id`, `score` and `bbox`
            ([x, y, width, height] in pixels) or, for "segm", `segmentation`. May be empty: AP is then 0.
        iou_type: "bbox" compares boxes, "segm" masks (`bbox` of a result is then ignored).
        source: what errors call the results by, their file as a rule.
        max_detections: how many of each class are looked at in an image, best first (COCO's maxDets). More than 100 are needed
            where images have more than 100 objects of a class: those beyond count as missed.

    Raises:
        DataError: the ground truth cannot be read or is malformed, or a result belongs to an unknown image or
            category, or its box, mask or score is missing or not finite.
        ConfigError: `iou_type` is something else, or `max_detections` is below 1.
    """
    records = CocoRecords.open(ground_truth, iou_type)
    dataset = hotcoco.COCO(records.ground_truth())
    detected = dataset.load_res(records.results(results, source))
    evaluation = hotcoco.COCOeval(dataset, detected, iou_type)
    evaluation.params.max_dets = counted_detections(max_detections)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()  # fills the figures; summarize() would do so too, but prints
    figures = {
        name: _or_nan(value) for name, value in evaluation.get_results().items() if name in FIGURE_NAMES
    }

    # (thresholds, recalls, classes, areas, max detections): area "all" is the first, `max_detections` the last.
    precision = (evaluation.eval or {})["precision"][:, :, :, 0, -1]
    return CocoFigures(
        **figures,
        per_class={name: _mean(precision[:, :, k]) for k, name in enumerate(records.class_names)},
        per_class_AP50={name: _mean(precision[0, :, k]) for k, name in enumerate(records.class_names)},
    )


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The COCO results in a json file: a list with one dict a detection.

    Raises:
        DataError: the file is missing, is not json, or holds something else than a list of objects.
    """
    results = read_json(Path(path))
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise DataError(
            f"{path}: found a json {type(results).__name__}, expected a list of detections",
            "give the file that `paqdetr predict` or another detector wrote, not the annotations",
        )
    return results


def non_maximum_suppression(detections: Detections, iou_threshold: float = 0.7) -> Detections:
    """Drop every box that overlaps a better one of its own class by more than `iou_threshold`.

    A DETR needs none; AP with and without it shows what duplicate boxes cost.

    Args:
        detections: of one image.
        iou_threshold: in [0, 1].

    Returns:
        What is left, best first; names, image id and query indices come along.
    """
    # float64: batched_nms moves classes apart by multiples of the image size, which eats float32's last bits.
    keep = batched_nms(
        torch.as_tensor(detections.boxes, dtype=torch.float64).reshape(-1, 4),
        torch.as_tensor(detections.scores, dtype=torch.float64),
        torch.as_tensor(detections.labels, dtype=torch.int64),
        iou_threshold,
    ).numpy()
    return detections.rows(keep)


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined: COCO marks the rest with -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _or_nan(value: float) -> float:
    return math.nan if value == -1 else float(value)
