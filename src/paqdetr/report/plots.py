"""One style for all plots of the package's reports: draw with these colours and helpers, then `plot_part` or `to_svg`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

from paqdetr.drawing import BLUE, GREEN, ORANGE, PINK, RED, SKY
from paqdetr.report import section
from paqdetr.text import literal

GREY = "#757575"
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, GREY)  # without the yellow, which is lost on white
INK, MUTED, GRID = "#000000", "#5B6470", "#D9DDE3"
# One hue from faint to strong, for what has an order, such as layers: see `ramp`.
RAMP = ("#A9CBE8", "#86B4DC", "#639DCE", "#4486BD", "#2B6FA8", "#17588F", "#0A4274", "#052D57")

_STYLE: Any = {
    "image.interpolation": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {list(PALETTE)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "figure.constrained_layout.use": True,
}


# Text stays text, and the same figure gives the same bytes.
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "paqdetr"}


def to_svg(axes: Axes) -> str:
    """The whole figure that the axes stand in, as an SVG document on white ground."""
    assert isinstance(axes.figure, Figure), "a part of a figure cannot be saved by itself"
    buffer = io.StringIO()
    with matplotlib.rc_context(_SVG), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # text stays text: the browser has the letters
        axes.figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def plot_part(axes: Axes, *, name: str, caption: str, data: Any) -> section.Figure:
    """The whole figure that the axes stand in, as a part of a report."""
    return section.Figure(name=name, caption=caption, svg=to_svg(axes), data=data)


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib draws in the reports' style inside this `with`. The helpers below need none."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_axes(*, width: float = 6.0, height: float = 3.2, title: str = "", x: str = "", y: str = "") -> Axes:
    """One plot; its figure is `axes.figure`.

    Args:
        width, height: inches. 6 fit a page; a phone shows text of such a plot at some 8 pixels.
        title, x, y: heading and names of the axes.
    """
    return new_grid(1, 1, width=width, height=height, titles=[title], x=x, y=y)[0]


def new_grid(
    rows: int,
    columns: int,
    *,
    width: float = 6.0,
    height: float = 3.2,
    titles: Sequence[str] = (),
    x: str = "",
    y: str = "",
) -> list[Axes]:
    """Several plots in one figure, row by row. `x` names the axes of the last row, `y` those of the first column."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        plots = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
        for i, axes in enumerate(plots):
            axes.set_title(literal(titles[i]) if i < len(titles) else "")
            axes.set_xlabel(literal(x) if i >= (rows - 1) * columns else "")
            axes.set_ylabel(literal(y) if i % columns == 0 else "")
        return plots


def whole_numbers(axes: Axes) -> None:
    """Marks of the x axis at whole epochs."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def colour(number: int) -> str:
    """The number-th colour for things without an order; after seven they repeat, so vary the line as well."""
    return PALETTE[number % len(PALETTE)]


def ramp(count: int) -> list[str]:
    """`count` colours for things in an order, faint to strong; at most eight differ."""
    if count == 1:
        return [RAMP[-3]]
    return [RAMP[round(i * (len(RAMP) - 1) / (count - 1))] for i in range(count)]


def line(
    axes: Axes,
    x: ArrayLike,
    y: ArrayLike,
    *,
    label: str = "",
    colour: str = BLUE,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    dash: str = "-",
    marker: str = "",
) -> None:
    """A line and, given `low` and `high`, the band between them (an interval). A single point gets a mark."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if low is not None and high is not None:
        axes.fill_between(xs, np.asarray(low, float), np.asarray(high, float), color=colour, alpha=0.18, linewidth=0)
    mark = marker or ("o" if len(xs) == 1 else "")
    axes.plot(xs, ys, dash, color=colour, label=literal(label) or None, marker=mark or None, markersize=4)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: ArrayLike,
    *,
    label: str = "",
    colour: str = BLUE,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    series: tuple[int, int] = (0, 1),
    form: str = "{:.3g}",
) -> None:
    """Horizontal bars, the first on top, each with its value beside it: names of any length stay readable.

    Args:
        low, high: ends of an interval at each bar, drawn as a line.
        series: (which, of how many) where several sets of bars share the axes.
        form: how a value is written; "" writes none.
    """
    numbers = np.asarray(values, dtype=float)
    which, of = series
    thickness = 0.8 / of
    places = np.arange(len(numbers)) + (which - (of - 1) / 2) * thickness
    errors = None
    if low is not None and high is not None:
        errors = np.stack([numbers - np.asarray(low, float), np.asarray(high, float) - numbers]).clip(min=0)
    drawn = axes.barh(
        places, numbers, height=thickness * 0.92, color=colour, label=literal(label) or None, xerr=errors,
        error_kw=dict(ecolor=INK, elinewidth=1, capsize=2),
    )  # fmt: skip
    if form:
        texts = ["" if np.isnan(value) else form.format(value) for value in numbers]
        axes.bar_label(drawn, labels=texts, padding=3, fontsize=8, color=INK)
        axes.margins(x=0.2 if (numbers < 0).any() else 0.12)  # left of a bar below zero stand names as well
    axes.set_yticks(np.arange(len(numbers)), list(map(literal, names)))
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=GRID, linewidth=0.7)


def heat_map(
    axes: Axes,
    values: ArrayLike,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    bar: str = "",
    low: float | None = None,
    high: float | None = None,
    centred: bool = False,
    form: str = "{:.2f}",
    most_labels: int = 40,
) -> None:
    """A matrix as colours, with its values written into the cells where they fit.

    Args:
        values: (R, C); NaN cells stay empty.
        rows, columns: names; of more than `most_labels` every n-th is shown.
        bar: what the colours mean, beside the colour bar.
        low, high: ends of the colours; the values' own if None.
        centred: values have a sign: blue below zero, red above, as strong on both sides.
        form: how a value is written; "" writes none.
    """
    matrix = np.asarray(values, dtype=float)
    finite = matrix[np.isfinite(matrix)]
    least = float(finite.min(initial=np.inf)) if low is None else low
    most = float(finite.max(initial=-np.inf)) if high is None else high
    if not np.isfinite([least, most]).all():
        least, most = 0.0, 1.0
    if centred:
        most = max(abs(least), abs(most), 1e-12)
        least = -most
    map_name = "RdBu_r" if centred else "cividis"
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    drawn = axes.imshow(
        matrix, cmap=map_name, vmin=least, vmax=max(most, least + 1e-12), aspect="auto", interpolation="none"
    )
    with style():  # the colour bar is another plot
        shown = axes.figure.colorbar(drawn, ax=axes, pad=0.015, fraction=0.06)
        shown.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        shown.set_label(literal(bar))
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        if names is None:
            continue
        stride = -(-len(names) // most_labels)
        axis.set_ticks(range(0, len(names), stride), [literal(name, 24) for name in names[::stride]])
    if columns is not None and max(map(len, columns), default=0) > 3:
        axes.tick_params(axis="x", rotation=60 if len(columns) > 4 else 0)
        if len(columns) > 4:
            for text in axes.get_xticklabels():
                text.set(horizontalalignment="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    if form and matrix.size <= 400 and matrix.shape[1] <= 16:
        shades = matplotlib.colormaps[map_name](drawn.norm(np.nan_to_num(matrix)))
        bright = np.asarray(shades)[..., :3] @ [0.299, 0.587, 0.114] > 0.5
        for row, column in np.argwhere(np.isfinite(matrix)):
            axes.text(
                column, row, form.format(matrix[row, column]), ha="center", va="center", fontsize=7,
                color="#111111" if bright[row, column] else "#FFFFFF",
            )  # fmt: skip


def legend(axes: Axes, *, outside: bool = False, columns: int = 3) -> None:
    """The legend below the plot, where it hides no value; `outside` puts it right of it. Nothing if nothing has a label."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    places: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    if not outside:
        assert isinstance(axes.figure, Figure)
        below = ScaledTranslation(0, -(33 if axes.get_xlabel() else 19) / 72, axes.figure.dpi_scale_trans)
        spec = axes.get_subplotspec()
        width = axes.figure.get_figwidth() / (1 if spec is None else spec.get_gridspec().ncols)
        columns = min(columns, max(1, int(width * 14 / (max(map(len, names)) + 6))))
        places = {"bbox_to_anchor": (0.0, 0.0), "bbox_transform": axes.transAxes + below, "ncols": columns}
        places |= {"loc": "upper left", "borderaxespad": 0.0}
    with style():
        axes.legend(handles, names, **places)
