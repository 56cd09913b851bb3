"""What every reader of a format returns: texts and ids in flat arrays, and where it reports what is wrong."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np

from paqdetr.errors import DataError
from paqdetr.structures import ClassTable

Entry = TypeVar("Entry", str, int | str)

EDGE_TOLERANCE = 1.0
"""Boxes may reach this many pixels over the edge of their image: exporters round."""
_FEW_BOXES = 8  # so many may all have any property by chance


class _Packed(Sequence[Entry]):
    """A read-only list: the UTF-8 bytes of its entries in one array, and where each begins."""

    _to_text: Callable[[Entry], str]
    _from_text: Callable[[str], Entry]

    def __init__(self, entries: Iterable[Entry]) -> None:
        encoded = [type(self)._to_text(entry).encode("utf-8", "surrogatepass") for entry in entries]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._starts = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=self._starts[1:])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, end = self._starts[place], self._starts[place + 1]
        return type(self)._from_text(self._bytes[start:end].tobytes().decode("utf-8", "surrogatepass"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({list(self)!r})" if len(self) < 9 else f"<{len(self)} {name.lower()}>"


class Texts(_Packed[str]):
    """A read-only list of texts."""

    _to_text = _from_text = str


class Ids(_Packed[int | str]):
    """A read-only list of ids, integers or texts, each of which comes out as what it was."""

    _to_text, _from_text = json.dumps, json.loads


REMEDY = "Correct the annotation file; `paqdetr data check` lists all problems of a data set."

DECIMALS = 8
"""Pixels that are computed from other numbers are rounded to so many decimals: 5.1 - 1 is 4.1."""


class MissingSplitError(DataError):
    """A split is named, and there is nothing where its images should be."""


# A set with a systematic mistake has it a million times.
_KEPT_OF_A_KIND = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    Attributes:
        severity: "error" where reading or training would stop, "warning" where it would go on.
        kind: what sort of problem, such as "box outside".
        split: name of the split, or "" where it concerns the whole folder.
        subject: the file, image or class.
        message: what was found and what was expected.
    """

    severity: Literal["error", "warning"]
    kind: str
    split: str
    subject: str
    message: str


class Issues:
    """Takes what is wrong: the first error is raised, or, with `collect`, all of them are kept and reading goes on without them.

    Attributes:
        found: the problems, at most 1,000 of a kind.
        counts: how many there were of each (severity, kind).
    """

    def __init__(self, *, collect: bool = False, split: str = "") -> None:
        self.collect, self.split = collect, split
        self.found: list[Problem] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    @property
    def has_errors(self) -> bool:
        """Whether some of the split is not read, or wrong."""
        return any(severity == "error" for severity, _ in self.counts)

    def error(self, subject: Path | str, message: str, remedy: str = REMEDY, *, kind: str = "annotation") -> None:
        """Something training would stop at.

        Raises:
            DataError: unless problems are collected.
        """
        if not self.collect:
            raise DataError(f"{subject}: {message}", remedy)
        self._keep(Problem("error", kind, self.split, str(subject), message))

    def unreadable(self, path: Path, error: DataError) -> None:
        """A file of annotations that could not be read, or one of several images.

        Raises:
            DataError: `error`, unless problems are collected.
        """
        if not self.collect:
            raise error
        self.error(path, error.message.removeprefix(f"{path}: "), error.remedy, kind="unreadable file")

    def warn(self, subject: Path | str, message: str, *, kind: str) -> None:
        """Something a user should look at; forgotten unless problems are collected."""
        if self.collect:
            self._keep(Problem("warning", kind, self.split, str(subject), message))

    def doubt(self, subject: Path | str, message: str, *, kind: str) -> None:
        """Something that the check calls an error, and that training goes on with: the first of a kind is logged there."""
        if self.collect:
            return self.error(subject, message, kind=kind)
        self.counts["error", kind] += 1
        if self.counts["error", kind] == 1:
            log = logging.getLogger(__name__)
            log.warning("%s: %s; `paqdetr data check` lists all of these", subject, message)

    def _keep(self, problem: Problem) -> None:
        self.counts[problem.severity, problem.kind] += 1
        if self.counts[problem.severity, problem.kind] <= _KEPT_OF_A_KIND:
            self.found.append(problem)


@dataclass(slots=True)
class Annotations:
    """One split as its files have it, in flat arrays; boxes are neither clipped nor left out.

    Attributes:
        source: the file or folder that errors name.
        image_dir: the folder that `file_names` are relative to.
        classes: contiguous class index <-> category id and name.
        image_ids: the data set's own ids.
        file_names: relative to `image_dir`, with forward slashes.
        sizes: (N, 2) int64, (height, width) of every image in pixels, its EXIF turn applied.
        starts: (N + 1,) int64: boxes of image i are the rows starts[i]:starts[i + 1] of what follows.
        boxes: (A, 4) float64, [x, y, width, height] in pixels.
        labels: (A,) int64, contiguous class indices.
        crowd: (A,) bool: groups and regions to ignore.
        areas: (A,) float64, square pixels; NaN where the format gives none.
        masks: annotations that have a segmentation, which this package does not use.
        poses: annotations that have keypoints, which it does not use either.
    """

    source: Path
    image_dir: Path
    classes: ClassTable
    image_ids: Ids
    file_names: Texts
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: int = 0
    poses: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def owners(self) -> np.ndarray:
        """(A,) int64: position of each box's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def duplicates(self) -> np.ndarray:
        """(A,) bool: boxes that an earlier one of the same image equals in class, coordinates and crowd flag."""
        owners, left = self.owners, self.boxes[:, 0]
        order = np.lexsort((left, owners))
        one, other = order[:-1], order[1:]
        close = (owners[one] == owners[other]) & (left[one] == left[other])
        rows = np.union1d(one[close], other[close])  # few: sorting all columns of all boxes takes four times as long
        keys = np.column_stack([owners, self.labels, self.crowd, self.boxes])[rows]
        _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        found = np.zeros(len(left), dtype=bool)
        found[rows[first[which.reshape(-1)] != np.arange(len(rows))]] = True
        return found

    def other_form(self) -> str | None:
        """What `bbox` of a COCO file holds in the place of x, y, width, height in pixels: a sentence, or None. Corners, if most
        boxes are over the edge of their image and as x1, y1, x2, y2 all are inside; shares of the sides, if no number is over 1.
        Of few boxes nothing is said, as chance may have it."""
        rows = ~self.crowd
        if self.source.suffix != ".json" or rows.sum() < _FEW_BOXES:
            return None
        height, width = self.sizes[self.owners[rows]].T
        x, y, w, h = self.boxes[rows].T
        if self.boxes[rows].min() >= 0 and self.boxes[rows].max() <= 1 < self.sizes.min():
            return (
                f"no number of {len(x)} boxes is over 1: bbox holds shares of the sides, perhaps from the centre as in YOLO, "
                "where COCO has the left and upper edge, width and height in pixels"
            )
        over = (w > 0) & (h > 0) & (np.max([-x, -y, x + w - width, y + h - height], axis=0) > EDGE_TOLERANCE)
        inside = (w > x) & (h > y) & (np.max([-x, -y, w - width, h - height], axis=0) <= EDGE_TOLERANCE)
        if not inside.all() or 2 * over.sum() <= len(x):
            return None
        return (
            f"{over.sum()} of {len(x)} boxes are over the edge of their image, and as x1, y1, x2, y2 all are inside: bbox holds "
            "corners, where COCO has x, y, x2 - x1, y2 - y1"
        )

    def trainable(self) -> tuple[np.ndarray, np.ndarray]:
        """What a detector can learn from: no crowds, no duplicates, and only what lies inside the image.

        Returns:
            (A,) bool, which boxes these are; (A, 4) float64, all boxes as [x0, y0, x1, y1] in pixels, clipped to their image.
        """
        corners = self.boxes.copy()
        corners[:, 2:] += corners[:, :2]
        corners = np.clip(corners, 0, self.sizes[self.owners][:, [1, 0, 1, 0]])
        single = corners.astype(np.float32)  # in which training computes: a side may vanish
        inside = (single[:, 2:] > single[:, :2]).all(axis=1)
        return inside & ~self.crowd & ~self.duplicates(), corners

    def overlapping(self, iou: float) -> np.ndarray:
        """(A,) bool: `trainable` boxes that overlap a later one of their image, of whatever class, by more than `iou`."""
        trainable, corners = self.trainable()
        rows = np.flatnonzero(trainable)
        owners, x0, y0, x1, y1 = self.owners[rows], *corners[rows].T
        areas, found = (x1 - x0) * (y1 - y0), np.zeros(len(corners), dtype=bool)
        for lag in range(1, len(rows)):  # every box with the one that stands so many behind it
            close = np.flatnonzero(owners[lag:] == owners[:-lag])
            if not len(close):
                break
            other = close + lag
            width = np.minimum(x1[close], x1[other]) - np.maximum(x0[close], x0[other])
            height = np.minimum(y1[close], y1[other]) - np.maximum(y0[close], y0[other])
            shared = width.clip(0) * height.clip(0)
            found[rows[close[shared > iou * (areas[close] + areas[other] - shared)]]] = True
        return found

    def with_images(self, chosen: np.ndarray) -> Annotations:
        """The images at the positions `chosen`, in this order, with their boxes. `masks` and `poses` are 0: whose they are is
        not known."""
        starts = self.starts.tolist()
        rows = [np.arange(starts[index], starts[index + 1]) for index in chosen.tolist()]
        order = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        return replace(
            self,
            masks=0,
            poses=0,
            image_ids=Ids([self.image_ids[index] for index in chosen.tolist()]),
            file_names=Texts(self.file_names[index] for index in chosen.tolist()),
            sizes=self.sizes[chosen],
            starts=np.concatenate([[0], np.cumsum([len(own) for own in rows], dtype=np.int64)]),
            **self._columns(order),
        )

    def with_boxes(self, keep: np.ndarray) -> Annotations:
        """The same images with some of the boxes. `keep`: (A,) bool."""
        return replace(self, starts=np.concatenate([[0], np.cumsum(keep)])[self.starts], **self._columns(keep))

    def _columns(self, rows: np.ndarray) -> dict[str, Any]:
        return {name: getattr(self, name)[rows] for name in ("boxes", "labels", "crowd", "areas")}


@dataclass(slots=True)
class Builder:
    """Collects images and boxes in any order and makes `Annotations` of them."""

    image_ids: list[int | str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    masks: int = 0
    poses: int = 0
    _owners: list[int] = field(default_factory=list)
    _labels: list[int] = field(default_factory=list)
    _boxes: list[Sequence[float]] = field(default_factory=list)
    _crowd: list[bool] = field(default_factory=list)
    _areas: list[float] = field(default_factory=list)

    def add_image(self, image_id: int | str, file_name: str, *, height: int, width: int) -> int:
        """The image's position."""
        self.image_ids.append(image_id)
        self.file_names.append(file_name)
        self.sizes.append((height, width))
        return len(self.image_ids) - 1

    def add_box(
        self, image: int, label: int, box: Sequence[float], *, crowd: bool = False, area: float | None = None
    ) -> None:
        """A box [x, y, width, height] of the image at a position."""
        self._owners.append(image)
        self._labels.append(label)
        self._boxes.append(box)
        self._crowd.append(crowd)
        self._areas.append(np.nan if area is None else area)

    def build(self, *, source: Path, image_dir: Path, classes: ClassTable) -> Annotations:
        """Everything collected, sorted by image; boxes of an image keep their order."""
        owners = np.array(self._owners, dtype=np.int64)
        order = np.argsort(owners, kind="stable")
        starts = np.zeros(len(self.image_ids) + 1, dtype=np.int64)
        np.cumsum(np.bincount(owners, minlength=len(self.image_ids)), out=starts[1:])
        return Annotations(
            source=source,
            image_dir=image_dir,
            classes=classes,
            image_ids=Ids(self.image_ids),
            file_names=Texts(self.file_names),
            sizes=np.array(self.sizes, dtype=np.int64).reshape(-1, 2),
            starts=starts,
            boxes=np.array(self._boxes, dtype=np.float64).reshape(-1, 4)[order],
            labels=np.array(self._labels, dtype=np.int64)[order],
            crowd=np.array(self._crowd, dtype=bool)[order],
            areas=np.array(self._areas, dtype=np.float64)[order],
            masks=self.masks,
            poses=self.poses,
        )
