"""What is measured about a detector: COCO's figures and their intervals, its mistakes, and how evenly its queries are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paqdetr.metrics.coco import FIGURE_NAMES, CocoFigures, evaluate_detections, read_results
from paqdetr.metrics.diagnosis import (
    Calibration,
    Confusion,
    ErrorSplit,
    ThresholdCurves,
    calibration,
    confusion,
    error_split,
    precision_recall,
    threshold_curves,
)
from paqdetr.metrics.intervals import (
    Comparison,
    Difference,
    FigureIntervals,
    Interval,
    compare_results,
    figure_intervals,
    resample_images,
)
from paqdetr.metrics.matches import MatchTable
from paqdetr.metrics.query_report import PatternUse, Places, QueryUsageReport, Spread, chance_gini, gini, lorenz_curve

if TYPE_CHECKING:
    from paqdetr.metrics.query_usage import QueryUsage

__all__ = [
    "FIGURE_NAMES",
    "Calibration",
    "CocoFigures",
    "Comparison",
    "Confusion",
    "Difference",
    "ErrorSplit",
    "FigureIntervals",
    "Interval",
    "MatchTable",
    "PatternUse",
    "Places",
    "QueryUsage",
    "QueryUsageReport",
    "Spread",
    "ThresholdCurves",
    "calibration",
    "chance_gini",
    "compare_results",
    "confusion",
    "error_split",
    "evaluate_detections",
    "figure_intervals",
    "gini",
    "lorenz_curve",
    "precision_recall",
    "read_results",
    "resample_images",
    "threshold_curves",
]


def __getattr__(name: str) -> Any:
    """`QueryUsage` looks at tensors; what compares boxes needs no torch."""
    if name != "QueryUsage":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from paqdetr.metrics.query_usage import QueryUsage

    return QueryUsage
