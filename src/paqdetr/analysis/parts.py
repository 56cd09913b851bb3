"""Shared by the chapters on queries and patterns: a plot as a part of a report."""

from __future__ import annotations

from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes

from paqdetr.analysis.plots import to_svg
from paqdetr.analysis.section import Figure


def plot_part(axes: Axes, *, name: str, title: str, caption: str, data: Any) -> Figure:
    """The whole figure that the axes stand in; `title` is for screen readers, the rest as of `Figure`."""
    figure = axes.figure
    assert isinstance(figure, matplotlib.figure.Figure)
    return Figure(name=name, caption=caption, svg=to_svg(figure, title=title), data=data)


def rounded_values(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table with its floats to six digits."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
