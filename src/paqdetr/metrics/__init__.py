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
from paqdetr.metrics.query_report import PatternUse, Places, QueryUsageReport, Spread
from paqdetr.metrics.query_usage import QueryUsage
from paqdetr.metrics.query_use import chance_gini, gini, lorenz_curve

__all__ = [
    "FIGURE_NAMES",
    "CocoFigures",
    "MatchTable",
    "PatternUse",
    "Places",
    "QueryUsage",
    "QueryUsageReport",
    "Spread",
    "chance_gini",
    "evaluate_detections",
    "gini",
    "lorenz_curve",
    "non_maximum_suppression",
    "read_results",
]
