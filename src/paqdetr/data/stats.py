"""Figures of a data set: how many, how large, where and of what shape its boxes are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paqdetr.data.annotations import Annotations, Issues
from paqdetr.data.layout import find_layout

# Sides of COCO's small and medium boxes: sqrt(area) below 32, below 96.
SMALL, MEDIUM = 32.0, 96.0
MAX_DETECTIONS = 100
"""Detections of one class in an image that COCO's AP counts (`maxDets`)."""

# The fewest queries that a model of this package has.
FEWEST_QUERIES = 100

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
    def of(cls, annotations: Annotations) -> BoxSizes:
        """Of a split's boxes without crowds."""
        sides = box_sides(annotations)
        counts, _ = np.histogram(np.maximum(sides, 1.0), bins=[*_EDGES, np.inf])
        return cls(
            small=int((sides < SMALL).sum()),
            medium=int(((sides >= SMALL) & (sides < MEDIUM)).sum()),
            large=int((sides >= MEDIUM).sum()),
            histogram={f"{edge:g}": int(count) for edge, count in zip(_EDGES, counts, strict=True)},
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
        aspects: (A,) width over height.
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
        """Of a split's boxes without crowds and without those that have no area."""
        a = annotations
        rows = np.flatnonzero(~a.crowd & (a.boxes[:, 2] > 0) & (a.boxes[:, 3] > 0))
        boxes, owners = a.boxes[rows], a.owners[rows]
        size = a.sizes[owners][:, ::-1].astype(float).reshape(-1, 2)
        sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
        return cls(
            annotations=a,
            per_class=np.bincount(a.labels[rows], minlength=len(a.classes)),
            per_image=np.bincount(owners, minlength=len(a)),
            sides=sides,
            shares=sides / np.sqrt(size.prod(axis=1)),
            aspects=boxes[:, 2] / boxes[:, 3],
            centres=(boxes[:, :2] + boxes[:, 2:] / 2) / size,
        )

    def to_json(self) -> dict[str, Any]:
        """Counts and quantiles."""
        a = self.annotations
        return {
            "images": len(a),
            "boxes": int(self.per_class.sum()),
            "crowds": int(a.crowd.sum()),
            "images_without_boxes": int((self.per_image == 0).sum()),
            "boxes_per_class": dict(zip(a.classes.names, self.per_class.tolist(), strict=True)),
            "box_sizes": {
                "small": int((self.sides < SMALL).sum()),
                "medium": int(((self.sides >= SMALL) & (self.sides < MEDIUM)).sum()),
                "large": int((self.sides >= MEDIUM).sum()),
            },
            "quantiles": {
                "at": [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1],
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
    counted = ~annotations.crowd
    owners, labels = annotations.owners[counted], annotations.labels[counted]
    limit = FEWEST_QUERIES if queries is None else queries
    return crowding_sentences(
        owners,
        labels,
        len(annotations),
        queries=limit,
        max_detections=max_detections,
        known=queries is not None,
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
            + (f"raise model.num_queries={queries}" if known else "take a model with enough queries")
        )
    of_class, counts = np.unique(np.stack([owners, labels]), axis=1, return_counts=True)
    over = counts > max_detections if max_detections else np.zeros(0, dtype=bool)
    if over.any():
        sentences.append(
            f"{len(np.unique(of_class[0, over]))} of {images} images have more than {max_detections} boxes of one class (up to "
            f"{counts.max()}), and AP counts no more detections of a class than that: `paqdetr eval --max-detections` raises it"
        )
    return sentences


def box_sides(annotations: Annotations) -> np.ndarray:
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
    if not len(values):
        return []
    return [round(float(q), 4) for q in np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])]
