"""What is measured about a detector: COCO's figures, and how evenly its queries are used."""

from __future__ import annotations

from paqdetr.metrics.coco import (
    FIGURE_NAMES,
    CocoFigures,
    evaluate_detections,
    non_maximum_suppression,
    read_results,
)
from paqdetr.metrics.matching import MatchTable
from paqdetr.metrics.query_use import gini

__all__ = [
    "FIGURE_NAMES",
    "CocoFigures",
    "MatchTable",
    "evaluate_detections",
    "gini",
    "non_maximum_suppression",
    "read_results",
]
