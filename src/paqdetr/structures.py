"""The typed values that travel between the parts: what is to be found, and what was found."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, overload
from xml.etree.ElementTree import tostring

import numpy as np

from paqdetr.errors import ConfigError, DataError, import_extra
from paqdetr.label_files import voc_document, yolo_line
from paqdetr.text import Summary, did_you_mean, printable, shorten, some
from paqdetr.values import is_whole

if TYPE_CHECKING:  # a program that runs an exported model has no torch
    import supervision
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from paqdetr.images import ImageSource

BACKGROUND_LOGIT = -50.0
"""That of all classes of a query that takes no part, such as a duplicate that has left: its probability is 0 to the last bit that
matters, and half precision can hold it."""

CONFIDENT = 0.3
"""Above this score a prediction counts as made, where predictions are counted."""

# Rows of detections that are printed.
_SHOWN = 20
# Boxes whose overlaps with others are computed at once: 50 MB at most where an image has 5000.
_NMS_ROWS = 128

# What ultralytics, supervision, torchvision and transformers call it.
_WORDS = {
    "xyxy": "boxes", "bboxes": "boxes", "xywh": "to_coco(), under 'bbox'", "confidence": "scores", "conf": "scores",
    "class_id": "labels", "cls": "labels", "classes": "labels", "pred_boxes": "boxes", "pred_classes": "labels",
    "plot": "draw()", "show": "draw().show()", "save": "draw().save(path)", "orig_img": "image", "orig_shape": "size",
    "path": "source", "df": "to_pandas()", "to_df": "to_pandas()", "pandas": "to_pandas()",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Targets:
    """Ground truth of one image.

    Attributes:
        labels: (G,) int64, contiguous class indices in [0, C).
        boxes: (G, 4) float, cxcywh, normalised by the image's own width and height (padding left out), in [0, 1].
        image_id: the data set's own id of the image, for error messages and evaluation; None if there is none.
        size: (height, width) of the image in the file in pixels, before any transform; None if unknown.

    Raises:
        ValueError: another dtype or shape, naming the image. Values are checked where targets are matched.
    """

    labels: Tensor
    boxes: Tensor
    image_id: int | str | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        labels, boxes = self.labels, self.boxes
        where = "the targets" if self.image_id is None else f"image {self.image_id!r}"
        if str(labels.dtype) != "torch.int64" or labels.ndim != 1:
            raise ValueError(
                f"labels of {where} are {labels.dtype} of shape {tuple(labels.shape)}: give int64 of shape (G,)"
            )
        if not boxes.is_floating_point() or tuple(boxes.shape) != (len(labels), 4):
            raise ValueError(
                f"boxes of {where} are {boxes.dtype} of shape {tuple(boxes.shape)}:"
                f" give floats of shape ({len(labels)}, 4), one row for each label"
            )

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on another device."""
        labels, boxes = (part.to(device, non_blocking=part.is_pinned()) for part in (self.labels, self.boxes))
        return Targets(labels, boxes, self.image_id, self.size)

    def pin_memory(self) -> Targets:
        """The same targets in memory that a GPU reads by itself."""
        return Targets(self.labels.pin_memory(), self.boxes.pin_memory(), self.image_id, self.size)


class Detection(NamedTuple):
    """One of the `Detections` of an image, in plain numbers."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    score: float
    label: int
    """The data set's original category id."""
    name: str


@dataclass(slots=True, repr=False)
class Detections(Summary):
    """What was found in one image, best first: a sequence of `Detection`, and arrays of the same length.

    `detections[0]` and iteration give a `Detection`; everything else in brackets gives `Detections`: a slice, a mask such as
    `detections[detections.scores > 0.5]`, positions, and names of classes such as `detections["cat"]`.

    Attributes:
        boxes: (N, 4) float32 array, xyxy in pixels of the image as it was given (EXIF turn applied).
        scores: (N,) float32 array in [0, 1].
        labels: (N,) int64 array, the data set's original category ids.
        names: category id -> category name, of all classes that the model has.
        image_id: the data set's id, or the file name, or None.
        query_indices: (N,) int64 array: which query each box came from.
        file_name: of the image; None if it did not come from a file.
        size: (height, width) of the image in pixels; None if unknown.
        source: what was predicted on, which `image` reads again: a path, a picture, an array; None if unknown.
        frame, time: of a video, from 0, and in seconds; else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: dict[int, str] = field(default_factory=dict)
    image_id: int | str | None = None
    query_indices: np.ndarray | None = None
    file_name: str | None = None
    size: tuple[int, int] | None = None
    source: ImageSource | None = field(default=None, compare=False)
    frame: int | None = None
    time: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        columns = (self.boxes.reshape(-1, 4).tolist(), self.scores.tolist(), self.labels.tolist(), self.class_names)
        for box, score, label, name in zip(*columns, strict=True):
            yield Detection(tuple(box), score, label, name)

    @overload
    def __getitem__(self, key: int | np.integer) -> Detection: ...
    @overload
    def __getitem__(
        self, key: str | slice | np.ndarray | Sequence[int] | Sequence[bool] | Sequence[str]
    ) -> Detections: ...
    def __getitem__(self, key: Any) -> Detection | Detections:
        """One detection by its position, or some of them, with everything that belongs to the image.

        Args:
            key: a position; or a slice, a (N,) bool mask, positions, a class name, or a list of names.

        Raises:
            IndexError: a position that is not there, or a mask of another length.
            ConfigError: a class that the model does not have.
        """
        if isinstance(key, str):
            return self.of(key)
        if isinstance(key, slice):
            return self._rows(key)
        chosen = np.asarray(key)
        if chosen.ndim == 1 and chosen.dtype.kind == "U":
            return self.of(*chosen.tolist())
        if chosen.ndim == 0 and chosen.dtype.kind in "iu":
            if not -len(self) <= chosen < len(self):
                raise IndexError(f"detections: position {chosen} does not exist, there are {len(self)}")
            return next(iter(self._rows([int(chosen)])))
        if chosen.ndim == 1 and not len(chosen):
            chosen = chosen.astype(bool if len(self) == 0 else int)
        if chosen.ndim != 1 or chosen.dtype.kind not in "biu" or (chosen.dtype == bool and len(chosen) != len(self)):
            raise IndexError(
                f"detections: found {shorten(key)} in brackets, expected a position, a slice, positions, a class name, or a mask "
                f"of {len(self)} bool"
            )
        return self._rows(chosen)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detections):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.compare)

    def __getattr__(self, name: str) -> Any:
        """What is not here, under the name that other programs have for it."""
        own = _WORDS.get(name)
        raise AttributeError(
            f"Detections has no {name!r}" + (f"; here it is {own}" if own else ""), name=name, obj=self
        )

    @property
    def class_names(self) -> list[str]:
        """The name of every box; a class without one shows its id."""
        return [self.names.get(label, str(label)) for label in self.labels.tolist()]

    @property
    def image(self) -> Image | None:
        """The picture that was predicted on, RGB and upright, read again where it is a file; None if unknown.

        Raises:
            DataError: it cannot be read any more.
        """
        from paqdetr.images import read_image

        return None if self.source is None else read_image(self.source)

    def of(self, *classes: int | str) -> Detections:
        """Only those of these classes, by name or by category id.

        Raises:
            ConfigError: a class that the model does not have.
        """
        names = {**dict(zip(self.labels.tolist(), self.class_names, strict=True)), **self.names}
        wanted = ClassTable(tuple(names), tuple(names.values())).find(classes)
        return self._rows(np.isin(self.labels, wanted))

    def above(self, threshold: float) -> Detections:
        """Only what scores at least `threshold`."""
        return self._rows(self.scores >= threshold)

    def _rows(self, chosen: slice | np.ndarray | list[int]) -> Detections:
        indices = None if self.query_indices is None else self.query_indices[chosen]
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            query_indices=indices,
        )

    def as_classes(self, ids: Mapping[int, int], names: dict[int, str]) -> Detections:
        """Those whose labels are keys of `ids`, with the labels there, called as in `names`."""
        chosen = self[np.isin(self.labels, list(ids))]
        labels = np.array([ids[label] for label in chosen.labels.tolist()], dtype=np.int64)
        return replace(chosen, labels=labels, names=names)

    def without_duplicates(self, iou_threshold: float = 0.7) -> Detections:
        """Class-wise non-maximum suppression: without every box that overlaps a better one of its own class by more than
        `iou_threshold` in [0, 1]. What is left is best first; equal scores keep their order.
        """
        order = np.lexsort((-self.scores, self.labels))  # class by class, the best first
        labels, boxes = self.labels[order], self.boxes[order].astype(np.float64).reshape(-1, 4)
        left, top, right, bottom = np.ascontiguousarray(boxes.T)
        area, ends = (right - left) * (bottom - top), np.searchsorted(labels, labels, side="right")
        kept = [True] * len(order)
        for start in range(0, len(order), _NMS_ROWS):
            rows = np.array([i for i in range(start, min(start + _NMS_ROWS, len(order))) if kept[i]], dtype=np.int64)
            counts = ends[rows] - rows - 1  # boxes of the same class that score less
            one = np.repeat(rows, counts)
            other = one + 1 + np.arange(len(one)) - np.repeat(np.cumsum(counts) - counts, counts)
            width = np.minimum(right[one], right[other]) - np.maximum(left[one], left[other])
            height = np.minimum(bottom[one], bottom[other]) - np.maximum(top[one], top[other])
            shared = width.clip(0) * height.clip(0)
            with np.errstate(invalid="ignore"):  # two boxes without area
                same = shared / (area[one] + area[other] - shared) > iou_threshold
            for i, j in zip(one[same].tolist(), other[same].tolist(), strict=True):
                kept[j] = kept[j] and not kept[i]
        chosen = np.sort(order[kept])
        return self._rows(chosen[np.argsort(-self.scores[chosen], kind="stable")])

    def to_coco(self, *, rounded: bool = False) -> list[dict[str, Any]]:
        """COCO results: one dict per box with `image_id`, `file_name` and `category_name` (if known), `category_id`, `bbox` as
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
        columns = zip(self.labels.tolist(), boxes.tolist(), scores.tolist(), strict=True)
        called = {label: {"category_name": name} for label, name in self.names.items()}
        return [
            {**image, "category_id": label, **called.get(label, {}), "bbox": box, "score": score}
            for label, box, score in columns
        ]

    def to_yolo(self, *, scores: bool = False) -> str:
        """The text of a YOLO label file: a line for each box with class, centre and sides as shares of the image, cut off at its
        border. Classes are numbered from 0 in the order of `names`.

        Args:
            scores: with a sixth number, as predictions have; labels to train on have none.

        Raises:
            DataError: `size` is unknown, or a label is not among `names`.
        """
        height, width = self._known_size
        numbers = {category: number for number, category in enumerate(self.names)}
        if unknown := set(self.labels.tolist()) - numbers.keys():
            raise DataError(
                f"detections: label {min(unknown)} is not among `names`, so it has no number in YOLO's order",
                "set `names` to the category ids and names of all classes",
            )
        corners = self.boxes.reshape(-1, 2, 2).astype(float).clip(0, [width, height])
        boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
        rows = zip(self.labels.tolist(), boxes.tolist(), self.scores.tolist(), strict=True)
        return "".join(yolo_line(numbers[i], box, (height, width), s if scores else None) for i, box, s in rows)

    def to_voc(self, *, database: str | None = None) -> str:
        """The XML of Pascal VOC, with a `confidence` for each object; boxes to a hundredth of a pixel.

        Args:
            database: what is written as the source of the annotations.

        Raises:
            DataError: `size` is unknown.
        """
        height, width = self._known_size
        objects = [
            (printable(name), {"difficult": 0, "confidence": row["score"]}, row["bbox"])
            for name, row in zip(self.class_names, self.to_coco(rounded=True), strict=True)
        ]
        document = voc_document(printable(self.file_name or ""), (width, height), objects, database=database)
        return tostring(document, encoding="unicode") + "\n"

    def to_supervision(self) -> supervision.Detections:
        """The same as `supervision.Detections`, names under `data["class_name"]`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice on OpenCV, which this package does not need
            module = import_extra("supervision", "supervision")

        return module.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.class_names, dtype=object)},
        )

    def to_fiftyone(self) -> Any:
        """The same as `fiftyone.Detections`, a label field of a `fiftyone.Sample`.

        Raises:
            BackendError: fiftyone is not installed.
            DataError: `size` is unknown.
        """
        fiftyone, (height, width) = import_extra("fiftyone"), self._known_size
        return fiftyone.Detections(
            detections=[
                fiftyone.Detection(
                    label=name,
                    bounding_box=[left / width, top / height, (right - left) / width, (bottom - top) / height],
                    confidence=score,
                )
                for (left, top, right, bottom), score, _, name in self
            ]
        )

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row for each box: `image_id`, `name`, `label`, `score`, and `x1`, `y1`, `x2`, `y2` in
        pixels. Those of several images go together with `pandas.concat`.

        Raises:
            BackendError: pandas is not installed.
        """
        boxes = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.reshape(-1, 4).T, strict=True))
        columns = {
            "image_id": self.image_id,
            "name": self.class_names,
            "label": self.labels,
            "score": self.scores,
            **boxes,
        }
        return import_extra("pandas").DataFrame(columns, index=range(len(self)))

    def draw(self, image: ImageSource | None = None) -> Image:
        """The image with boxes, names and scores drawn on a copy of it.

        Args:
            image: what was predicted on, in any form that `predict` takes; None: `source`.

        Raises:
            DataError: there is no image, or it cannot be read.
        """
        from paqdetr.drawing import draw_boxes

        image = self.source if image is None else image
        if image is None:
            raise DataError("detections: the picture is not known", "pass it: detections.draw(image)")
        return draw_boxes(image, self.boxes, self.labels, self.names, self.scores)

    @property
    def _known_size(self) -> tuple[int, int]:
        if self.size is None:
            raise DataError("detections: the size of the image is not known", "set detections.size to (height, width)")
        return self.size

    def __repr__(self) -> str:
        counts = [f"{printable(name)} ({count})" for name, count in Counter(self.class_names).most_common()]
        where = self.file_name if self.image_id is None else self.image_id
        title = f"{len(self)}" + (f" in {printable(str(where))}" if where is not None else "")
        return f"Detections({title}{': ' if counts else ''}{some(counts, 5)})"

    __str__ = Summary.__repr__

    def _summary(self) -> tuple[str, list[tuple[str, ...]]]:
        rows = [
            (name, f"{score:.2f}", "[" + ", ".join(f"{x:.1f}" for x in box) + "]")
            for box, score, _, name in self[:_SHOWN]
        ]
        more = [("...", f"{len(self) - _SHOWN} more", "")] if len(self) > _SHOWN else []
        return repr(self), rows + more

    def _picture(self) -> str | None:
        from paqdetr.drawing import data_uri

        try:
            return None if self.source is None else data_uri(self.draw(), 640)
        except DataError:  # the file is gone
            return None


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

    def least_score(self, threshold: float | None = None) -> float:
        """The score from which detections are kept: the threshold that a caller gives, else that of the evaluation, else 0.3."""
        return next(x for x in (threshold, self.threshold, 0.3) if x is not None)

    @property
    def shown(self) -> str:
        """For people."""
        if self.threshold is None and self.nms is None:
            return "no threshold known" if self.duplicates_cost is None else "found no threshold: too little was right"
        parts = {"threshold": self.threshold, "nms": self.nms}
        return ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value is not None)


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

    def find(self, wanted: Collection[int | str] | int) -> list[int]:
        """Ids of classes given by id or name.

        Raises:
            ConfigError: a class that is not in the table, or no class at all.
        """
        given = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
        if not given:
            raise ConfigError("classes: names none", "leave it out for all classes")
        names: dict[str, int] = {name: i for i, name in zip(reversed(self.ids), reversed(self.names), strict=True)}
        found = []
        for one in given:
            category = names.get(one) if isinstance(one, str) else one if is_whole(one) and one in self.ids else None
            if category is None:
                raise ConfigError(
                    f"classes: the model has no class {one!r}",
                    did_you_mean(str(one), self.names, f"it has {some(self.names, 10) or 'no classes'}"),
                )
            found.append(category)
        return found

    def misfit(self, other: ClassTable) -> tuple[int, str, str | None] | None:
        """The first class of another table that is not in this one under the same id and name: its id and name, and what this
        table calls the id (None if it does not have it); None if all are."""
        known = self.id_to_name
        for category, name in other.id_to_name.items():
            if known.get(category) != name:
                return category, name, known.get(category)
        return None

    def ids_in(self, other: ClassTable) -> dict[int, int]:
        """Own id -> that of the same class in another table, for all classes of the other one: by id and name, or else by name,
        as of `rows_in`. Empty if one of them is not in this table, or names say nothing since two classes share one.
        """
        if self.misfit(other) is None:
            return {category: category for category in other.ids}
        unique = len(set(self.names)) == len(self) and len(set(other.names)) == len(other)
        rows = self.rows_in(other)
        return {self.ids[own]: other.ids[its] for own, its in rows} if unique and len(rows) == len(other) else {}

    def rows_in(self, other: ClassTable) -> list[tuple[int, int]]:
        """Rows (own, the other's) of the same classes of two tables, no row twice, in the order of the other's.

        The same class is that of the same name, and of several of one name that of the same id, or else the next one. Of what is
        left, names that differ in case alone are the same where there is one such on either side.
        """
        pairs: dict[int, int] = {}  # the other's row -> own
        left: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            left.setdefault(name, []).append(row)
        for by_id in (True, False):
            for row, name in enumerate(other.names):
                rows = left.get(name, []) if row not in pairs else []
                found = [own for own in rows if not by_id or self.ids[own] == other.ids[row]]
                if found:
                    pairs[row] = found[0]
                    rows.remove(found[0])
        free: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        for row in (row for rows in left.values() for row in rows):
            free[0].setdefault(self.names[row].casefold(), []).append(row)
        for row in (row for row in range(len(other)) if row not in pairs):
            free[1].setdefault(other.names[row].casefold(), []).append(row)
        for name, its in free[1].items():
            own = free[0].get(name, [])
            if len(own) == len(its) == 1:
                pairs[its[0]] = own[0]
        return sorted(((own, its) for its, own in pairs.items()), key=lambda pair: pair[1])

    @property
    def id_to_index(self) -> dict[int, int]:
        """Original category id -> contiguous index."""
        return {category_id: index for index, category_id in enumerate(self.ids)}

    @property
    def id_to_name(self) -> dict[int, str]:
        """Original category id -> name."""
        return dict(zip(self.ids, self.names, strict=True))
