"""The typed values that travel between the parts: what is to be found, and what was found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a program that runs an exported model has no torch
    import supervision
    import torch
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """Ground truth of one image.

    Attributes:
        labels: (G,) int64, contiguous class indices in [0, C).
        boxes: (G, 4) float, cxcywh, normalised by the image's own width and height (padding left out), in [0, 1].
        image_id: the data set's own id of the image, for error messages and evaluation; None if there is none.
        size: (height, width) of the image in the file in pixels, before any transform; None if unknown.
    """

    labels: Tensor
    boxes: Tensor
    image_id: int | str | None = None
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on another device."""
        labels, boxes = (part.to(device, non_blocking=part.is_pinned()) for part in (self.labels, self.boxes))
        return Targets(labels, boxes, self.image_id, self.size)

    def pin_memory(self) -> Targets:
        """The same targets in memory that a GPU reads by itself."""
        return Targets(self.labels.pin_memory(), self.boxes.pin_memory(), self.image_id, self.size)


@dataclass(slots=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: (N, 4) float32 array, xyxy in pixels of the image as it was given (EXIF turn applied).
        scores: (N,) float32 array in [0, 1].
        labels: (N,) int64 array, the data set's original category ids.
        names: category id -> category name.
        image_id: the data set's id, or the file name, or None.
        query_indices: (N,) int64 array: which query each box came from.
        file_name: of the image; None if it did not come from a file.
        image: RGB, as it was predicted on, where a stream gives the detections; else None.
        frame, time: of a video, from 0, and in seconds; else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: dict[int, str] = field(default_factory=dict)
    image_id: int | str | None = None
    query_indices: np.ndarray | None = None
    file_name: str | None = None
    image: Image | None = field(default=None, repr=False, compare=False)
    frame: int | None = None
    time: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Only what scores at least `threshold`."""
        return self.rows(self.scores >= threshold)

    def rows(self, chosen: np.ndarray) -> Detections:
        """Some of them, by position or by mask; everything about the image comes along."""
        indices = None if self.query_indices is None else self.query_indices[chosen]
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            query_indices=indices,
        )

    def without_duplicates(self, iou_threshold: float) -> Detections:
        """Class-wise non-maximum suppression: without every box that overlaps a better one of its own class by more than
        `iou_threshold` in [0, 1]. What is left is best first; equal scores keep their order.
        """
        order = np.argsort(-self.scores, kind="stable")
        boxes, labels = self.boxes[order].astype(np.float64).reshape(-1, 4), self.labels[order]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        kept = np.ones(len(order), dtype=bool)
        for i in range(len(order)):
            if kept[i]:
                rest = slice(i + 1, None)
                corner = np.minimum(boxes[i, 2:], boxes[rest, 2:]) - np.maximum(boxes[i, :2], boxes[rest, :2])
                shared = corner.clip(min=0).prod(1)
                overlaps = shared > iou_threshold * (area[i] + area[rest] - shared)
                kept[rest] &= ~(overlaps & (labels[rest] == labels[i]))
        return self.rows(order[kept])

    def to_coco(self, *, rounded: bool = False) -> list[dict[str, Any]]:
        """COCO results: one dict per box with `image_id`, `file_name` (if known), `category_id`, `category_name`, `bbox` as
        [x, y, width, height] in pixels, and `score`.

        Args:
            rounded: boxes to 2 decimals and scores to 5, for files that people read; figures made of them differ in the fourth
                digit, since equal scores have no order.
        """
        boxes, scores = self.boxes.copy(), self.scores
        boxes[:, 2:] -= boxes[:, :2]
        if rounded:
            boxes, scores = boxes.astype(np.float64).round(2), scores.astype(np.float64).round(5)
        image: dict[str, Any] = {"image_id": self.image_id}
        if self.file_name is not None:
            image["file_name"] = self.file_name
        return [
            {
                **image,
                "category_id": label,
                "category_name": self.names.get(label, str(label)),
                "bbox": box,
                "score": score,
            }
            for box, label, score in zip(boxes.tolist(), self.labels.tolist(), scores.tolist(), strict=True)
        ]

    def to_supervision(self) -> supervision.Detections:
        """The same as `supervision.Detections`, names under `data["class_name"]`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice on OpenCV, which this package does not need
            import supervision

        names = np.array([self.names.get(int(label), str(label)) for label in self.labels], dtype=object)
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": names},
        )

    def draw(self, image: Image | np.ndarray) -> Image:
        """The image with boxes, names and scores drawn on a copy of it.

        Args:
            image: the PIL image or (H, W, 3) uint8 RGB array that was predicted on.
        """
        from paqdetr.drawing import draw_boxes

        return draw_boxes(image, self.boxes, self.labels, self.names, self.scores)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """How a model's detections are best used, as its evaluation found.

    Attributes:
        threshold: the least score, in [0, 1], where F1 at IoU 0.5 is at its best; None if that is not known.
        nms: the IoU over which a box gives way to a better one of its class; None where there is too little to gain.
        duplicates_cost: AP after non-maximum suppression minus AP; None if it is not known.
    """

    threshold: float | None = None
    nms: float | None = None
    duplicates_cost: float | None = None


@dataclass(frozen=True, slots=True)
class ClassTable:
    """Contiguous class index (position) <-> the data set's original category id and name."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def numbered(cls, num_classes: int) -> ClassTable:
        """A table for a model that has seen no data set: ids 0..C-1, names "class 0"..."""
        return cls(tuple(range(num_classes)), tuple(f"class {i}" for i in range(num_classes)))

    @classmethod
    def from_categories(cls, categories: Sequence[dict[str, Any]]) -> ClassTable:
        """From COCO `categories`, in ascending order of id."""
        ordered = sorted(categories, key=lambda category: category["id"])
        return cls(tuple(int(c["id"]) for c in ordered), tuple(str(c["name"]) for c in ordered))

    def misfit(self, other: ClassTable) -> tuple[int, str, str | None] | None:
        """The first class of another table that is not in this one under the same id and name: its id and name, and what this
        table calls the id (None if it does not have it); None if all are."""
        known = self.id_to_name
        for category, name in other.id_to_name.items():
            if known.get(category) != name:
                return category, name, known.get(category)
        return None

    @property
    def id_to_index(self) -> dict[int, int]:
        """Original category id -> contiguous index."""
        return {category_id: index for index, category_id in enumerate(self.ids)}

    @property
    def id_to_name(self) -> dict[int, str]:
        """Original category id -> name."""
        return dict(zip(self.ids, self.names, strict=True))
