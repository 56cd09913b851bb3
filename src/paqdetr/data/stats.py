"""Figures of a data set (how many boxes, how large, where and of what shape), and one sheet that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.layout import find_layout
from paqdetr.drawing import PALETTE
from paqdetr.outputs import mark, write_output
from paqdetr.text import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Sides of COCO's small and medium boxes: sqrt(area) below 32, below 96.
SMALL, MEDIUM = 32.0, 96.0
MAX_DETECTIONS = 100
"""Detections of one class in an image that COCO's AP counts (`maxDets`)."""

# The fewest queries that a model of this package has.
FEWEST_QUERIES = 100

_QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_EDGES = tuple(float(2**power) for power in range(12))


@dataclass(frozen=True, slots=True)
class BoxSizes:
    """How large boxes are, in pixels of the files as they are.

    Attributes:
        small, medium, large: number of boxes with a side (the root of the area) below 32, below 96, and above.
        histogram: lower edge of the side -> number of boxes; bins double from 1 to 2,048 pixels, the first is all below 2.
    """

    small: int = 0
    medium: int = 0
    large: int = 0
    histogram: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sides: np.ndarray) -> BoxSizes:
        """Of (A,) roots of the boxes' areas in pixels."""
        counts, _ = np.histogram(np.maximum(sides, 1.0), bins=[*_EDGES, np.inf])
        small, medium, large = np.histogram(sides, bins=[0, SMALL, MEDIUM, np.inf])[0].tolist()
        histogram = {f"{edge:g}": int(count) for edge, count in zip(_EDGES, counts, strict=True)}
        return cls(small, medium, large, histogram)


@dataclass(slots=True)
class SplitSummary:
    """Counts of one split.

    Attributes:
        images, boxes, crowds, images_without_boxes: how many there are; crowds are no boxes, those without area are.
        boxes_per_class: by category name, with its id where several have one name; classes without boxes included.
        box_sizes: how many boxes are how large.
        traits: how many images are out of the ordinary in which way, see `read_traits`; empty if none was opened.
    """

    images: int = 0
    boxes: int = 0
    crowds: int = 0
    images_without_boxes: int = 0
    boxes_per_class: dict[str, int] = field(default_factory=dict)
    box_sizes: BoxSizes = field(default_factory=BoxSizes)
    traits: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, annotations: Annotations) -> SplitSummary:
        """From the annotations alone."""
        single = ~annotations.crowd
        per_class = np.bincount(annotations.labels[single], minlength=len(annotations.classes)).tolist()
        names = annotations.classes.names
        return cls(
            images=len(annotations),
            boxes=int(single.sum()),
            crowds=int(annotations.crowd.sum()),
            images_without_boxes=len(annotations) - len(np.unique(annotations.owners[single])),
            boxes_per_class={
                name if names.count(name) == 1 else f"{name} ({own})": count
                for own, name, count in zip(annotations.classes.ids, names, per_class, strict=True)
            },
            box_sizes=BoxSizes.of(_box_sides(annotations)),
        )


@dataclass(frozen=True, slots=True)
class SplitStats:
    """A split's figures, ready to be drawn.

    Attributes:
        annotations: what they were taken from.
        per_class: number of boxes of every class, in the order of the class table.
        per_image: (N,) number of boxes of every image.
        sides: (A,) root of every box's area in pixels.
        shares: (A,) the same over the root of its image's area.
        aspects: (B,) width over height of the boxes that have an area.
        centres: (A, 2) centre of every box, relative to its image.
    """

    annotations: Annotations
    per_class: np.ndarray
    per_image: np.ndarray
    sides: np.ndarray
    shares: np.ndarray
    aspects: np.ndarray
    centres: np.ndarray

    @classmethod
    def of(cls, annotations: Annotations) -> SplitStats:
        """Of a split's boxes without crowds."""
        a = annotations
        rows = np.flatnonzero(~a.crowd)
        boxes, owners, sides = a.boxes[rows], a.owners[rows], _box_sides(a)
        size = a.sizes[owners][:, ::-1].astype(float).reshape(-1, 2)
        width, height = boxes[sides > 0, 2:].T
        return cls(
            annotations=a,
            per_class=np.bincount(a.labels[rows], minlength=len(a.classes)),
            per_image=np.bincount(owners, minlength=len(a)),
            sides=sides,
            shares=sides / np.sqrt(size.prod(axis=1)),
            aspects=width / height,
            centres=(boxes[:, :2] + boxes[:, 2:] / 2) / size,
        )

    def to_json(self) -> dict[str, Any]:
        """Counts and quantiles."""
        a, counts = self.annotations, SplitSummary.of(self.annotations)
        return {
            "images": counts.images,
            "boxes": counts.boxes,
            "crowds": counts.crowds,
            "images_without_boxes": counts.images_without_boxes,
            "boxes_per_class": counts.boxes_per_class,
            "box_sizes": {name: getattr(counts.box_sizes, name) for name in ("small", "medium", "large")},
            "quantiles": {
                "at": list(_QUANTILES),
                "boxes_per_image": _quantiles(self.per_image),
                "box_side": _quantiles(self.sides),
                "box_side_of_image": _quantiles(self.shares),
                "box_aspect": _quantiles(self.aspects),
                "image_width": _quantiles(a.sizes[:, 1]),
                "image_height": _quantiles(a.sizes[:, 0]),
            },
        }


def describe_crowding(
    annotations: Annotations, *, queries: int | None = None, max_detections: int | None = MAX_DETECTIONS
) -> list[str]:
    """Sentences on images with more boxes than a detector can find, and on those with more than AP counts.

    Args:
        queries: of the detector, each of which finds one object at most; None if it is not known yet.
        max_detections: of one class that AP counts in an image; None leaves that out.
    """
    counted, known = ~annotations.crowd, queries is not None
    owners, labels = annotations.owners[counted], annotations.labels[counted]
    limit = queries if known else FEWEST_QUERIES
    return crowding_sentences(
        owners, labels, len(annotations), queries=limit, max_detections=max_detections, known=known
    )


def crowding_sentences(
    owners: np.ndarray,
    labels: np.ndarray,
    images: int,
    *,
    queries: int | None,
    max_detections: int | None,
    known: bool = True,
) -> list[str]:
    """As `describe_crowding`, of the boxes' images and classes, (G,) integers each; queries=None leaves queries out."""
    sentences = []
    per_image = np.bincount(owners, minlength=1)
    if queries is not None and per_image.max() > queries:
        sentences.append(
            f"{int((per_image > queries).sum())} of {images} images have more than {queries} boxes (up to {per_image.max()}), "
            "and a query finds one object at most: "
            + (
                f"raise model.num_queries, which is {queries}, to at least {per_image.max()}"
                if known
                else "take a model with enough queries"
            )
        )
    of_class, counts = np.unique(np.stack([owners, labels]), axis=1, return_counts=True)
    over = counts > max_detections if max_detections else np.zeros(0, dtype=bool)
    if over.any():
        sentences.append(
            f"{len(np.unique(of_class[0, over]))} of {images} images have more than {max_detections} boxes of one class (up to "
            f"{counts.max()}), and AP counts no more detections of a class than that: `paqdetr eval --max-detections` raises it"
        )
    return sentences


def _box_sides(annotations: Annotations) -> np.ndarray:
    """(A,) root of the area of every box that is no crowd."""
    boxes = annotations.boxes[~annotations.crowd]
    return np.sqrt(np.clip(boxes[:, 2], 0, None) * np.clip(boxes[:, 3], 0, None))


def dataset_stats(data: str | Path) -> dict[str, SplitStats]:
    """Figures of every split, from the annotations alone.

    Raises:
        DataError: the data set or a split is malformed.
    """
    return {split: SplitStats.of(place.read(Issues())) for split, place in find_layout(data).splits.items()}


def _quantiles(values: np.ndarray) -> list[float]:
    return np.quantile(values, _QUANTILES).round(4).tolist() if len(values) else []


_MOST_CLASSES = 40
_COLOURS = (PALETTE[4], PALETTE[0], PALETTE[2], PALETTE[5], PALETTE[6])


def draw_stats(
    stats: Mapping[str, SplitStats], output: str | Path, *, title: str = "", overwrite: bool = False
) -> Path:
    """Six plots: classes, box sizes, boxes per image, shapes, where boxes lie, image sizes. Splits differ in colour.

    Args:
        stats: by split, as of `dataset_stats`.
        output: a PNG file.
        title: what stands over the sheet.
        overwrite: replace a file that is no such sheet.

    Raises:
        ConfigError: the file exists and is no such sheet.
        StorageError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
    axes.set_yticks(np.arange(len(order)) + 0.4 - height / 2, [literal(names[i], 24) for i in order], fontsize=8)
    axes.invert_yaxis()
    left_out = f", {len(order)} most frequent of {len(names)}" if len(order) < len(names) else ""
    axes.set(title=f"Classes{left_out}", xlabel="share of the split's boxes (number beside it)")
    axes.margins(x=0.12)
    axes.legend(fontsize=8)


def _histogram(
    axes: Axes, stats: Mapping[str, SplitStats], values_of: Callable[[SplitStats], np.ndarray], edges: np.ndarray
) -> None:
    """Per cent of each split's values between edges; what lies beyond is counted at the ends."""
    for split, s, colour in _coloured(stats):
        values = np.clip(values_of(s), edges[0], edges[-1])
        if len(values):
            weights = np.full(len(values), 100 / len(values))
            label = literal(split)
            axes.hist(
                values, bins=list(edges), weights=weights, histtype="step", color=colour, label=label, linewidth=1.8
            )


def _sizes(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    _histogram(axes, stats, lambda s: s.sides, 2.0 ** np.arange(0, 11.5, 0.5))
    for edge, text, side in ((SMALL, f"small < {SMALL:g} ", "right"), (MEDIUM, f" large > {MEDIUM:g}", "left")):
        axes.axvline(edge, color="#888888", linewidth=1, linestyle="--")
        place = axes.get_xaxis_transform()
        axes.text(edge, 0.985, text, fontsize=8, color="#555555", va="top", ha=side, transform=place)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(title="Box sizes", xlabel="side of the box, the root of its area, in pixels", ylabel="% of boxes")


def _per_image(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    most = int(max((np.quantile(s.per_image, 0.99) for s in stats.values() if len(s.per_image)), default=1))
    edges = np.arange(-0.5, most + 1.5, -(-(most + 1) // 40))  # at most 40 bins of whole numbers
    edges = np.append(edges[edges < most + 0.5], most + 0.5)
    _histogram(axes, stats, lambda s: s.per_image, edges)
    axes.set(title="Boxes per image (the last bin: and more)", xlabel="boxes", ylabel="% of images")


def _shapes(axes: Axes, stats: Mapping[str, SplitStats]) -> None:
    _histogram(axes, stats, lambda s: s.aspects, 2.0 ** np.linspace(-4, 4, 41))
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
