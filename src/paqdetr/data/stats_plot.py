"""Draws the figures of a data set on one sheet."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paqdetr.data.stats import MEDIUM, SMALL, SplitStats
from paqdetr.drawing import PALETTE
from paqdetr.outputs import mark, write_output
from paqdetr.text import literal

_MOST_CLASSES = 40
_COLOURS = (PALETTE[4], PALETTE[0], PALETTE[2], PALETTE[5], PALETTE[6])


def draw_stats(
    stats: Mapping[str, SplitStats], output: str | Path, *, title: str = "", overwrite: bool = False
) -> Path:
    """Six plots: classes, box sizes, boxes an image, shapes, where boxes lie, image sizes. Splits differ in colour.

    Args:
        stats: by split, as of `dataset_stats`.
        output: a PNG file.
        title: what stands over the sheet.
        overwrite: replace a file that is no such sheet.

    Raises:
        ConfigError: the file exists and is no such sheet.
        StorageError: it cannot be written.
    """
    names = next(iter(stats.values())).annotations.classes.names
    rows = min(len(names), _MOST_CLASSES)
    figure = Figure(figsize=(15, max(8.0, 4.5 + 0.22 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(literal(title))
    grid = figure.add_gridspec(2, 3)
    _classes(figure.add_subplot(grid[0, 0]), stats)
    _sizes(figure.add_subplot(grid[0, 1]), stats)
    _per_image(figure.add_subplot(grid[0, 2]), stats)
    _shapes(figure.add_subplot(grid[1, 0]), stats)
    _places(figure.add_subplot(grid[1, 1]), stats)
    _images(figure.add_subplot(grid[1, 2]), stats)
    output = Path(output)
    maker = "paqdetr data stats"

    def write(place: Path) -> None:
        figure.savefig(place, dpi=100, format="png", metadata={"Software": mark(maker)})

    write_output(output, write, maker=maker, overwrite=overwrite)
    return output


def _coloured(stats: Mapping[str, SplitStats]) -> list[tuple[str, SplitStats, str]]:
    return [(split, s, _COLOURS[i % len(_COLOURS)]) for i, (split, s) in enumerate(stats.items())]


def _classes(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    """Share of every class in its split: splits of different sizes can be compared."""
    first = next(iter(stats.values()))
    names = first.annotations.classes.names
    order = np.argsort(-first.per_class, kind="stable")[:_MOST_CLASSES]
    height = 0.8 / len(stats)
    for number, (split, s, colour) in enumerate(_coloured(stats)):
        if s.annotations.classes.names != names:
            continue
        shares = s.per_class[order] / max(s.per_class.sum(), 1)
        places = np.arange(len(order)) + number * height
        bars = axes.barh(places, shares, height=height, color=colour, label=literal(split))
        axes.bar_label(bars, labels=[str(c) for c in s.per_class[order]], fontsize=6, padding=2)
    axes.set_yticks(
        np.arange(len(order)) + 0.4 - height / 2, [literal(_short(names[i])) for i in order], fontsize=8
    )
    axes.invert_yaxis()
    left_out = f", {len(order)} most frequent of {len(names)}" if len(order) < len(names) else ""
    axes.set(title=f"Classes{left_out}", xlabel="share of the split's boxes (number beside it)")
    axes.margins(x=0.12)
    axes.legend(fontsize=8)


def _sizes(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    edges = 2.0 ** np.arange(0, 11.5, 0.5)
    for split, s, colour in _coloured(stats):
        if len(s.sides):
            weights = np.full(len(s.sides), 100 / len(s.sides))
            sides = np.clip(s.sides, 1, edges[-1])
            axes.hist(
                sides,
                bins=list(edges),
                weights=weights,
                histtype="step",
                color=colour,
                label=literal(split),
                linewidth=1.8,
            )
    for edge, text, side in (
        (SMALL, f"small < {SMALL:g} ", "right"),
        (MEDIUM, f" large > {MEDIUM:g}", "left"),
    ):
        axes.axvline(edge, color="#888888", linewidth=1, linestyle="--")
        axes.text(
            edge, 0.985, text, fontsize=8, color="#555555", va="top", ha=side,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(
        title="Box sizes", xlabel="side of the box, the root of its area, in pixels", ylabel="% of boxes"
    )


def _per_image(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    most = int(max((np.quantile(s.per_image, 0.99) for s in stats.values() if len(s.per_image)), default=1))
    edges = np.arange(-0.5, most + 1.5, -(-(most + 1) // 40))  # at most 40 bins of whole numbers
    edges = np.append(edges[edges < most + 0.5], most + 0.5)
    for split, s, colour in _coloured(stats):
        if len(s.per_image):
            weights = np.full(len(s.per_image), 100 / len(s.per_image))
            counts = np.minimum(s.per_image, most)
            axes.hist(
                counts,
                bins=list(edges),
                weights=weights,
                histtype="step",
                color=colour,
                label=literal(split),
                linewidth=1.8,
            )
    axes.set(title="Boxes an image (the last bin: and more)", xlabel="boxes", ylabel="% of images")


def _shapes(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    edges = 2.0 ** np.linspace(-4, 4, 41)
    for split, s, colour in _coloured(stats):
        if len(s.aspects):
            weights = np.full(len(s.aspects), 100 / len(s.aspects))
            aspects = np.clip(s.aspects, edges[0], edges[-1])
            axes.hist(
                aspects,
                bins=list(edges),
                weights=weights,
                histtype="step",
                color=colour,
                label=literal(split),
                linewidth=1.8,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    axes.set(title="Box shapes", xlabel="width / height", ylabel="% of boxes")


def _places(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    centres = np.concatenate([s.centres for s in stats.values()])
    counts, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=24, range=[[0, 1], [0, 1]])
    axes.imshow(counts, extent=(0, 1, 1, 0), cmap="viridis", aspect="equal")
    axes.set(title="Centres of boxes, all splits", xlabel="x / width", ylabel="y / height")


def _images(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    largest = max((int(s.annotations.sizes.max()) for s in stats.values() if len(s.annotations)), default=1)
    for (split, s, colour), marker in zip(_coloured(stats), cycle("osD^v"), strict=False):
        sizes, counts = np.unique(s.annotations.sizes, axis=0, return_counts=True)
        if len(sizes):
            area = 20 + 300 * counts / counts.sum()
            axes.scatter(
                sizes[:, 1], sizes[:, 0], s=area, edgecolors=colour, facecolors="none", marker=marker, label=literal(split)
            )  # fmt: skip
    axes.set(title="Image sizes (larger mark: more images)", xlabel="width", ylabel="height")
    axes.set(xlim=(0, 1.08 * largest), ylim=(0, 1.08 * largest), aspect="equal")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
