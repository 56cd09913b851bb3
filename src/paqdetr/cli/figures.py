"""Tables of figures for the terminal: of one result set, with or without intervals, and of two side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from paqdetr.cli.console import show, table
from paqdetr.metrics.coco import FIGURE_NAMES, CocoFigures
from paqdetr.metrics.intervals import Comparison, Difference, FigureIntervals


def figures_table(
    figures: CocoFigures, title: str, more: Mapping[str, float | None], intervals: FigureIntervals | None
) -> Table:
    """The twelve figures and what there is besides, each in a row, with its interval if there are any."""
    made = table(title, ("figure",), ("value", *_interval_headings(intervals)), no_wrap=True)
    for name in FIGURE_NAMES:
        made.add_row(name, show(getattr(figures, name)), *_interval(intervals, "figures", name))
    for name, value in more.items():
        made.add_row(name, show(value))
    return made


def classes_table(figures: CocoFigures, intervals: FigureIntervals | None) -> Table:
    """AP and AP50 of every class."""
    headings = _interval_headings(intervals)
    made = table("by class", ("class",), ("AP", *headings, "AP50", *headings), no_wrap=True)
    for name, value in figures.per_class.items():
        made.add_row(
            name,
            show(value),
            *_interval(intervals, "per_class", name),
            show(figures.per_class_AP50[name]),
            *_interval(intervals, "per_class_AP50", name),
        )
    return made


def comparison_table(found: Comparison, title: str) -> Table:
    """The twelve figures of two result sets and their paired differences."""
    made = table(title, ("figure",), _comparison_headings(found), no_wrap=True)
    for name, own in found.figures.items():
        made.add_row(name, *_comparison_row(found, "figures", name, own))
    return made


def class_comparison_table(found: Comparison) -> Table:
    """AP of every class of two result sets and their paired differences."""
    made = table("AP by class", ("class",), _comparison_headings(found), no_wrap=True)
    for name, own in found.per_class.items():
        made.add_row(name, *_comparison_row(found, "per_class", name, own))
    return made


def _interval_headings(intervals: FigureIntervals | None) -> tuple[str, ...]:
    return () if intervals is None else (f"{intervals.level:.0%} interval".replace("%", " %"),)


def _interval(intervals: FigureIntervals | None, kind: str, name: str) -> tuple[str, ...]:
    if intervals is None:
        return ()
    own = getattr(intervals, kind)[name]
    return ("-" if math.isnan(own.low) else f"{own.low:.3f} to {own.high:.3f}",)


def _comparison_headings(found: Comparison) -> tuple[str, ...]:
    return "A", "B", "B - A", *_interval_headings(found.first), "B better"


def _comparison_row(found: Comparison, kind: str, name: str, own: Difference) -> tuple[Any, ...]:
    values = [show(getattr(side, kind)[name].value) for side in (found.first, found.second)]
    if math.isnan(own.value):
        return *values, "-", "-", "-"
    if math.isnan(own.low):
        return *values, f"{own.value:+.3f}", "-", "-"
    return *values, f"{own.value:+.3f}", _signed(own), f"{own.superiority:.1%}".replace("%", " %")


def _signed(own: Difference) -> str:
    return f"{own.low:+.3f} to {own.high:+.3f}"
